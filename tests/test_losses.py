"""Losses, log-probabilities, packing, plan and trainer: against closed forms and float64, at other sizes."""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import common
import dast
import hs_star
import sai_dpo
from conftest import TOY, launch, lines

SIZES = [(3, 30), (12, 1), (1, 2), (20, 50), (7, 7), (2, 90)]  # tokens of prompt and completion
SEQUENCES = [[(list(range(5, 5 + p)), list(range(40, 40 + c)))] for p, c in SIZES]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(name, **constants): the Run of a folder of its own, in this process, on one core."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "threads_per_process", lambda: 1)  # two wait for each other

    def started(name="run", **constants):
        g = {**vars(dast), **dast.TOY, "MODEL": str(TOY / "model"), "SEED": 3, "NAME": name, **constants}
        return common.start_run(g)

    return started


@pytest.fixture
def examples():
    """18 toy problems with their solutions, as training examples."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    found = []
    for number, problem in enumerate(lines(TOY / "train.jsonl")[:18]):
        problem["id"] = f"toy/{number}"
        found.append(common.make_example(tokenizer, "zero_shot", problem, problem["solution"]))
    return found


def train(run, file, examples, loss=dast.sft_loss, model=TOY / "model", **settings):
    """Train with the settings of these tests; the weights."""
    settings = dict(lr=1e-3, warmup=0.1, epochs=2, batch_size=8, weight_decay=0.01, clip=0.3) | settings
    folder = common.train(run, file, str(model), examples, loss, **settings)
    return load_file(f"{folder}/model.safetensors")


def gradients(network):
    return {name: parameter.grad.full_tensor() for name, parameter in network.named_parameters()}


# Losses -----------------------------------------------------------------------------------------------------

PAIRS = {"counts": [2, 3, 1, 3],  # two pairs
         "reference": torch.tensor([-5.0, -8.0, -2.5, -9.0], dtype=torch.float64)}


@pytest.fixture
def logprobs():
    """log p of the nine tokens of PAIRS."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(9, dtype=torch.float64, generator=rng).sub(3).requires_grad_()


def margins_of(logprobs, beta):
    """beta times what policy and reference differ by, for both pairs of PAIRS, written out."""
    w1, l1, w2, l2 = (float(part.sum()) for part in logprobs.detach().split(PAIRS["counts"]))
    return [beta * ((w1 + 5.0) - (l1 + 8.0)), beta * ((w2 + 2.5) - (l2 + 9.0))]


@pytest.mark.parametrize("script", [dast, sai_dpo])
def test_dpo_loss_is_the_closed_form(monkeypatch, script, logprobs):
    monkeypatch.setattr(script, "BETA", 0.3)
    total, weight, metrics = script.dpo_loss(logprobs, PAIRS)
    total.backward()
    margins = margins_of(logprobs, 0.3)
    a, b = (-0.3 / (1 + math.exp(m)) for m in margins)
    assert weight == 2
    assert logprobs.grad.tolist() == pytest.approx([a, a, -a, -a, -a, b, -b, -b, -b], rel=1e-12)
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-12)
    assert metrics["margin"].item() == pytest.approx(sum(margins))
    assert metrics["preferred"].item() == sum(m > 0 for m in margins)


def test_dpo_loss_is_ln_2_where_policy_and_reference_are_equal(logprobs):
    sums = torch.stack([part.sum() for part in logprobs.detach().split(PAIRS["counts"])])
    loss, pairs, _ = dast.dpo_loss(logprobs.detach(), {**PAIRS, "reference": sums})
    assert loss.item() / pairs == math.log(2)


def test_dpo_loss_of_no_pair_is_zero():
    """A process without work joins the others in the backward pass."""
    nothing = torch.zeros(0, requires_grad=True)
    batch = {"counts": [], "reference": torch.tensor([])}
    total, pairs, _ = dast.dpo_loss(nothing, batch)
    total.backward()
    assert (total.item(), pairs) == (0, 0)


def test_dpo_nll_loss_adds_the_mean_of_the_chosen_tokens(monkeypatch, logprobs):
    monkeypatch.setattr(hs_star, "BETA", 0.3)
    monkeypatch.setattr(hs_star, "NLL_WEIGHT", 0.5)
    total, pairs, _ = hs_star.dpo_nll_loss(logprobs, PAIRS)
    total.backward()
    margins = margins_of(logprobs, 0.3)
    chosen = logprobs[:2].mean() + logprobs[5]  # the first pair's has two tokens, the second's one
    assert pairs == 2
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) - 0.5 * chosen.item())
    assert logprobs.grad[0].item() == pytest.approx(-0.3 / (1 + math.exp(margins[0])) - 0.25)


def test_dpo_nll_loss_without_its_weight_is_plain_dpo(logprobs):
    assert hs_star.dpo_nll_loss(logprobs, PAIRS)[0] == dast.dpo_loss(logprobs, PAIRS)[0]


def test_sft_loss_is_cross_entropy():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 6, 0, 3, 3])
    total, weight, _ = dast.sft_loss(logits.log_softmax(1)[range(5), targets], {})
    assert (total / weight).item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())


# Log-probabilities and packing ------------------------------------------------------------------------------

def test_token_logprobs_equal_float64_in_value_and_gradient(monkeypatch):
    """Of 100 positions in 15 chunks."""
    monkeypatch.setattr(common, "LOGITS", 7 * 1000)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 4, generator=rng).requires_grad_()
    weight = torch.randn(1000, 4, generator=rng).requires_grad_()
    targets = torch.randint(1000, (100,), generator=rng)
    ours = common.token_logprobs(hidden, weight, targets)
    ours.sum().backward()
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    exact = (hidden64 @ weight64.T).log_softmax(1)[range(100), targets]
    exact.sum().backward()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("examples, expected, counts", [
    ([[([1, 2], [3, 4])], [([5], [6])]],  # of the docstring
     dict(tokens=[1, 2, 3, 4, 5, 6], positions=[0, 1, 2, 3, 0, 1], starts=[0, 4, 6], predict=[1, 2, 4],
          targets=[3, 4, 6]), [2, 1]),
    ([[([1], [2]), ([1], [3, 4])]], dict(tokens=[1, 2, 1, 3, 4], targets=[2, 3, 4]), [1, 2]),  # a pair
    ([], dict(tokens=[0], targets=[]), [])])
def test_pack_by_hand(examples, expected, counts):
    batch = common.pack(examples)
    assert {name: batch[name].tolist() for name in expected} == expected
    assert batch["counts"] == counts


def test_examples_longer_than_the_context_are_left_out(start, examples, tmp_path, capsys):
    """And said; the others are trained on as if these had not been there."""
    shutil.copytree(TOY / "model", tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 300}))
    long = {**examples[0], "completions": ["1 " * 400]}
    more = train(start("more"), "round_0/model", [*examples, long], model=tmp_path / "short", epochs=1, batch_size=99)
    assert "1 training examples are longer than the model's context" in capsys.readouterr().out
    same = train(start("same"), "round_0/model", examples, model=tmp_path / "short", epochs=1, batch_size=99)
    for name, tensor in same.items():
        assert torch.equal(more[name], tensor)


def test_sampled_tokens_are_trained_on_as_they_were():
    """Not as the tokenizer would write their text; another answer, without ids, is tokenized."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    responses = {"text": "12", "ids": "20 21"}, {"text": "12", "ids": None}
    example = common.make_example(tokenizer, "zero_shot", {"id": "a", "problem": "?"}, *responses)
    [(_, sampled), (_, written)] = common.tokenize(tokenizer, example)
    assert sampled == [20, 21, tokenizer.eos_token_id]
    assert tokenizer.decode(written) == "12<|endoftext|>"


def test_no_blank_is_learnt_before_an_answer():
    """By tokenizers that put one before each text, as Llama 2's does."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "\u2581", "?", "\n", "1", "2"])}
    plain = Tokenizer(BPE(vocabulary, []))
    plain.pre_tokenizer = Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    assert tokenizer("12", add_special_tokens=False)["input_ids"] == [1, 4, 5]
    example = {"prompt": "?\n", "completions": ["12"], "ids": [None], "end": "</s>"}
    assert common.tokenize(tokenizer, example) == [([1, 2, 3], [4, 5, 0])]


def test_packed_sequences_equal_padded_ones(start):
    """Forward pass and gradient, against transformers' own with padding and a mask."""
    network, policy = common.load_for_training(start(), str(TOY / "model"))
    ours = policy(common.pack(SEQUENCES))
    ours.sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float32)
    ids = torch.zeros(len(SEQUENCES), 92, dtype=torch.long)
    mask = torch.zeros(len(SEQUENCES), 92)
    for row, ((prompt, completion),) in enumerate(SEQUENCES):
        ids[row, :len(prompt + completion)] = torch.tensor(prompt + completion)
        mask[row, :len(prompt + completion)] = 1
    found = plain(input_ids=ids, attention_mask=mask).logits.log_softmax(2)
    theirs = []
    for row, ((p, c),) in enumerate(SEQUENCES):
        theirs.append(found[row, range(len(p) - 1, len(p + c) - 1), c])
    torch.cat(theirs).sum().backward()
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-5)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name, options", [("llama", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})])
def test_loss_of_each_architecture_is_that_of_its_sequences_alone(start, examples, tmp_path, capsys, name, options):
    """lfm2 has convolutions, which run on from one packed sequence into the next."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = start()
    train(run, "round_0/model", examples, model=tmp_path / "model", batch_size=18, epochs=1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    losses = []
    for example in examples:
        [(prompt, completion)] = common.tokenize(tokenizer, example)
        found = plain(torch.tensor([prompt + completion])).logits[0].log_softmax(1)
        losses.append(-found[range(len(prompt) - 1, len(prompt + completion) - 1), completion])
    [step] = lines(run.folder / "round_0" / "steps.jsonl")
    assert step["loss"] == pytest.approx(float(torch.cat(losses).mean().detach()), abs=1e-5)
    assert ("a row of its own" in capsys.readouterr().out) == (name == "lfm2")


def exact_sums(pairs, factor):
    """log p(completion | prompt) in float64, one at a time, of the toy with its weights times `factor`."""
    plain = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float64)
    for parameter in plain.parameters():
        parameter.data.mul_(factor)
    sums = []
    with torch.no_grad():
        for prompt, completion in sum(pairs, []):
            found = plain(torch.tensor([prompt + completion])).logits[0].log_softmax(1)
            sums.append(found[range(len(prompt) - 1, len(prompt + completion) - 1), completion].sum())
    return torch.stack(sums)


def test_dpo_loss_of_a_model_equals_float64(start):
    """Through the packed policy, which differs from its reference by 1 % of every weight."""
    pairs = [[SEQUENCES[a][0], SEQUENCES[b][0]] for a, b in [(0, 1), (3, 4), (5, 2)]]
    gain = exact_sums(pairs, 1.01) - exact_sums(pairs, 1.0)
    expected = -torch.nn.functional.logsigmoid(0.1 * (gain[0::2] - gain[1::2])).sum()
    _, policy = common.load_for_training(start(), str(TOY / "model"))
    batch = common.pack(pairs)
    with torch.no_grad():
        batch["reference"] = common.sequence_logprobs(policy(batch), batch)
        for parameter in policy.parameters():
            parameter.mul_(1.01)
        total, weight, _ = dast.dpo_loss(policy(batch), batch)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    assert weight == 3
    assert gain.abs().mean() > 0.1


def test_one_and_four_micro_batches_give_the_same_gradient(start):
    """All at once, and in four of which one is empty: to 1e-6 of the gradient's norm."""
    run = start()
    found = []
    for parts in [SEQUENCES], [SEQUENCES[:1], SEQUENCES[1:4], SEQUENCES[4:], []]:
        network, policy = common.load_for_training(run, str(TOY / "model"))
        for part in parts:
            policy(common.pack(part)).sum().backward()
        found.append(gradients(network))
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_recompute_keeps_less_and_gives_the_same_gradient(start):
    found = []
    kept = []

    def count(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for recompute in False, True:
        run = start(str(recompute), RECOMPUTE=recompute)
        network, policy = common.load_for_training(run, str(TOY / "model"))
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            total = policy(common.pack(SEQUENCES)).sum()
        total.backward()
        found.append(gradients(network))
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


# The plan and the schedule ----------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(1).integers(1, 200, 53).tolist()


def steps_of(plan):
    """[step] -> its examples, in order."""
    return [sorted(e for micro_batch in step for e in micro_batch) for step in plan]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [1, 100, 10**6])
def test_plan_keeps_micro_batches_small_and_processes_busy(processes, max_tokens):
    plan = common.plan_batches(LENGTHS, 16, 2, max_tokens, processes, np.random.default_rng(0))
    for step in plan:
        assert len(step) % processes == 0
        assert all(len(m) <= 1 or sum(LENGTHS[e] for e in m) <= max_tokens for m in step)


def test_plan_has_each_example_once_an_epoch():
    steps = steps_of(common.plan_batches(LENGTHS, 16, 2, 500, 2, np.random.default_rng(0)))
    assert [len(step) for step in steps] == [16, 16, 16, 5] * 2
    assert sorted(sum(steps[:4], [])) == sorted(sum(steps[4:], [])) == list(range(53))
    assert steps[:4] != steps[4:]


def test_plan_has_the_same_steps_whatever_the_machine():
    one = common.plan_batches(LENGTHS, 16, 2, 10**6, 1, np.random.default_rng(0))
    other = common.plan_batches(LENGTHS, 16, 2, 100, 8, np.random.default_rng(0))
    assert steps_of(one) == steps_of(other)


def test_learning_rate_rises_then_falls_as_a_half_cosine():
    factors = [common.learning_rate_factor(step, 100, 0.05, True) for step in range(100)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[50] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 95)))
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[99] < 0.001


@pytest.mark.parametrize("step, steps, warmup, decay, factor", [
    (0, 1, 0.05, True, 1.0), (0, 9, 0.0, False, 1.0), (1, 6, 4.0, False, 0.5), (5, 6, 4.0, False, 1.0),
    (39, 40, 100.0, False, 0.4)])  # adastar.py's: a number of steps, and an iteration may be shorter
def test_learning_rate_by_hand(step, steps, warmup, decay, factor):
    assert common.learning_rate_factor(step, steps, warmup, decay) == factor


# The trainer ------------------------------------------------------------------------------------------------

def test_micro_batches_do_not_change_what_is_learnt(start, examples):
    """Six steps of AdamW, which magnifies rounding: weights to 1e-5."""
    whole = train(start("whole", MAX_TOKENS=10**5), "round_0/model", examples)
    parts = train(start("parts", MAX_TOKENS=150), "round_0/model", examples)
    before = load_file(TOY / "model" / "model.safetensors")
    for name, tensor in whole.items():
        assert (tensor - before[name]).norm() > 1e-3 * tensor.norm(), name  # it did learn
        assert (parts[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


TWO = """
import json, sys
sys.path[:0] = {paths!r}
import common, dast, test_losses
g = {{**vars(dast), **dast.TOY, "MODEL": {model!r}, "SEED": 3, "NAME": sys.argv[1], "MAX_TOKENS": 10**5}}
run = common.start_run(g)
test_losses.train(run, "round_0/model", [json.loads(line) for line in open("examples.jsonl")])
"""


def test_two_processes_learn_what_one_does(start, examples, tmp_path):
    common.write(tmp_path / "examples.jsonl", examples)
    paths = [str(TOY.parent), str(TOY.parent.parent)]
    (tmp_path / "two.py").write_text(TWO.format(paths=paths, model=str(TOY / "model")))
    launch(tmp_path, tmp_path / "two.py", "two", processes=2)
    one = train(start("one", MAX_TOKENS=10**5), "round_0/model", examples)
    two = load_file(tmp_path / "runs/two/round_0/model/model.safetensors")
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    ours, theirs = (lines(tmp_path / f"runs/{name}/round_0/steps.jsonl") for name in ("one", "two"))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], rel=1e-5)


def test_steps_are_recorded_beside_the_model(start, examples):
    run = start()
    train(run, "round_0/model", examples, lr=1e-3, warmup=2, decay=False)
    steps = lines(run.folder / "round_0/steps.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["lr"] for step in steps] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert all(step["norm"] > 0 and step["seconds"] > 0 for step in steps)
    [logged] = [m for m in lines(run.folder / "metrics.jsonl") if m["phase"] == "train"]
    assert (logged["first_loss"], logged["loss"]) == (steps[0]["loss"], steps[-1]["loss"])


def test_first_step_of_dpo_has_the_loss_ln_2(start, examples):
    run = start(MAX_TOKENS=400)
    pairs = []
    for one, other in zip(examples[::2], examples[1::2]):
        pairs.append({**one, "completions": one["completions"] + other["completions"], "ids": [None, None]})
    train(run, "round_0/model", pairs, dast.dpo_loss, reference=True, batch_size=4)
    steps = lines(run.folder / "round_0/steps.jsonl")
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert (steps[0]["margin"], steps[0]["preferred"]) == (0, 0)
    assert steps[-1]["loss"] < 0.69


def test_saved_folder_loads_as_it_is(start, examples):
    run = start()
    weights = train(run, "round_0/model", examples)
    folder = run.folder / "round_0/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert weights.keys() == {name for name, _ in model.named_parameters()}  # the tied head once
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    before, after = (AutoTokenizer.from_pretrained(path) for path in (TOY / "model", folder))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template


def test_saved_model_is_float32_and_names_the_dtype_of_its_base(start, examples, tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "half")
    half = {name: tensor.bfloat16() for name, tensor in load_file(TOY / "model/model.safetensors").items()}
    save_file(half, tmp_path / "half/model.safetensors", {"format": "pt"})
    config = json.loads((TOY / "model/config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    run = start()
    weights = train(run, "round_0/model", examples[:2], model=tmp_path / "half")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert json.loads((run.folder / "round_0/model/config.json").read_text())["dtype"] == "bfloat16"


def test_loss_that_is_not_a_number_stops_with_the_step_and_its_examples(start, examples, capsys):
    run = start()
    with pytest.raises(SystemExit):
        train(run, "round_0/model", examples, lr=1e30)
    line = capsys.readouterr().err
    ids = line.strip().rpartition("examples: ")[2].split(", ")
    assert line.count("\n") == 1
    assert "round 0, training step 2 of 6: " in line
    assert "nan" in line
    assert set(ids) < {example["id"] for example in examples}
    assert len(ids) == 8
    assert not (run.folder / "round_0/model").exists()


def test_micro_batch_is_cut_to_the_memory_of_the_machine(start, examples, capsys):
    """To half of it, at 52 kB a token of the toy: three layers of 16 * 128 + 6 * 384 floats."""
    run = start(MAX_TOKENS=10**9)
    train(run, "round_0/model", examples[:4])
    tokens = json.loads((run.folder / "max_tokens_1.json").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 256 <= tokens < memory / 2 / 52_224
    assert "was 1,000,000,000: cut to what fits" in capsys.readouterr().out


def test_micro_batch_that_was_cut_stays_in_the_run_folder(start, examples):
    """Another machine, or another --max-tokens, does not change it: a rerun makes the same model."""
    run = start(MAX_TOKENS=10**5)
    run.folder.joinpath("max_tokens_1.json").write_text("300")
    sizes = []

    def loss(logprobs, batch):
        sizes.append(len(batch["tokens"]))
        return dast.sft_loss(logprobs, batch)

    train(run, "round_1/model", examples, loss)
    assert 150 < max(sizes) <= 300
