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
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import common
import dast
import hs_star
import sai_dpo
from conftest import ROOT, SCRIPTS, SMALL, TOY, launch, lines, refusal_of

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


def one_at_a_time(model, sequences):
    """log p of each token of a completion after its prompt, of each sequence alone, by transformers."""
    found = []
    for prompt, completion in sequences:
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(1)
        found.append(logits[range(len(prompt) - 1, len(prompt + completion) - 1), completion])
    return found


def gradients(network):
    return {name: common.whole(parameter.grad) for name, parameter in network.named_parameters()}


# Losses ---------------------------------------------------------------------------------------------------------------

PAIRS = {"counts": [2, 3, 1, 3],  # two pairs
         "reference": torch.tensor([-5.0, -8.0, -2.5, -9.0], dtype=torch.float64)}


@pytest.mark.parametrize("script, loss, nll", [
    (dast, dast.dpo_loss, 0), (sai_dpo, sai_dpo.dpo_loss, 0), (hs_star, hs_star.dpo_nll_loss, 0),
    (hs_star, hs_star.dpo_nll_loss, 0.5)])
def test_dpo_loss_is_the_closed_form(monkeypatch, script, loss, nll):
    """With `nll` less the mean of the chosen tokens: the first pair's has two of them, the second's one."""
    monkeypatch.setattr(script, "BETA", 0.3)
    monkeypatch.setattr(hs_star, "NLL_WEIGHT", nll)
    logprobs = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sub(3).requires_grad_()
    total, weight, metrics = loss(logprobs, PAIRS)
    total.backward()
    w1, l1, w2, l2 = (float(part.sum()) for part in logprobs.detach().split(PAIRS["counts"]))
    margins = [0.3 * ((w1 + 5.0) - (l1 + 8.0)), 0.3 * ((w2 + 2.5) - (l2 + 9.0))]
    a, b = (-0.3 / (1 + math.exp(m)) for m in margins)
    expected = [a - nll / 2, a - nll / 2, -a, -a, -a, b - nll, -b, -b, -b]
    assert weight == 2
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12)
    chosen = logprobs[:2].mean() + logprobs[5]
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) - nll * chosen.item())
    assert metrics["margin"].item() == pytest.approx(sum(margins))
    assert metrics["preferred"].item() == sum(m > 0 for m in margins)


def test_dpo_loss_of_no_pair_is_zero():
    """A process without work joins the others in the backward pass."""
    batch = {"counts": [], "reference": torch.tensor([])}
    total, pairs, _ = dast.dpo_loss(torch.zeros(0, requires_grad=True), batch)
    total.backward()
    assert (total.item(), pairs) == (0, 0)


def test_sft_loss_is_cross_entropy():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 6, 0, 3, 3])
    total, weight, _ = dast.sft_loss(logits.log_softmax(1)[range(5), targets], {})
    assert (total / weight).item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())


# Log-probabilities and packing ----------------------------------------------------------------------------------------

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
    config = common.read(TOY / "model" / "config.json")
    common.write(tmp_path / "short" / "config.json", config | {"max_position_embeddings": 300})
    long = {**examples[0], "completions": ["1 " * 400]}
    settings = dict(model=tmp_path / "short", epochs=1, batch_size=99)
    more = train(start("more"), "round_0/model", [*examples, long], **settings)
    assert "1 training examples are longer than the model's context" in capsys.readouterr().out
    same = train(start("same"), "round_0/model", examples, **settings)
    assert all(torch.equal(more[name], tensor) for name, tensor in same.items())
    with pytest.raises(SystemExit):
        train(start("none"), "round_0/model", [long], **settings)
    assert "all 1 training examples are longer than the model's context of 300" in capsys.readouterr().err


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
    plain = Tokenizer(BPE({"</s>": 0, "\u2581": 1, "?": 2, "\n": 3, "1": 4, "2": 5}, []))
    plain.pre_tokenizer = Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    assert tokenizer("12", add_special_tokens=False)["input_ids"] == [1, 4, 5]
    example = {"prompt": "?\n", "completions": ["12"], "ids": [None], "end": "</s>"}
    assert common.tokenize(tokenizer, example) == [([1, 2, 3], [4, 5, 0])]


def test_packed_sequences_equal_float64_one_at_a_time_in_value_and_gradient(start):
    network, policy = common.load_for_training(start(), str(TOY / "model"))
    ours = policy(common.pack(SEQUENCES))
    ours.sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float64)
    theirs = torch.cat(one_at_a_time(plain, sum(SEQUENCES, [])))
    theirs.sum().backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, gradient in gradients(network).items():
        assert (gradient.double() - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("name, options", [("llama", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})])
def test_loss_of_each_architecture_is_that_of_its_sequences_alone(start, examples, tmp_path, capsys, name, options):
    """lfm2 has convolutions, which run on from one packed sequence into the next."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for example in examples:  # cut short: most of what is learnt is next to what may leak
        example |= {"prompt": "?", "completions": [example["completions"][0][:4]]}
    run = start()
    train(run, "round_0/model", examples, model=tmp_path / "model", batch_size=18, epochs=1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    losses = one_at_a_time(plain, [common.tokenize(tokenizer, example)[0] for example in examples])
    [step] = lines(run.folder / "round_0" / "steps.jsonl")
    assert step["loss"] == pytest.approx(-torch.cat(losses).mean().item(), abs=1e-5)
    assert ("a row of its own" in capsys.readouterr().out) == (name == "lfm2")


def test_dpo_loss_of_a_model_equals_float64(start):
    """Through the packed policy, which differs from its reference by 1 % of every weight."""
    pairs = [[SEQUENCES[a][0], SEQUENCES[b][0]] for a, b in [(0, 1), (3, 4), (5, 2)]]
    plain = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float64)
    _, policy = common.load_for_training(start(), str(TOY / "model"))
    batch = common.pack(pairs)
    with torch.no_grad():
        before = one_at_a_time(plain, sum(pairs, []))
        batch["reference"] = common.sequence_logprobs(policy(batch), batch)
        for parameter in [*plain.parameters(), *policy.parameters()]:
            parameter.mul_(1.01)
        gain = torch.stack([a.sum() - b.sum() for a, b in zip(one_at_a_time(plain, sum(pairs, [])), before)])
        total, weight, _ = dast.dpo_loss(policy(batch), batch)
    expected = -torch.nn.functional.logsigmoid(0.1 * (gain[0::2] - gain[1::2])).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    assert weight == 3
    assert gain.abs().mean() > 0.1


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


def test_compiled_blocks_give_the_same_gradient(start, monkeypatch):
    """Traced as on a GPU, but run by torch as it stands: to compile for a CPU takes a minute."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: compile(block, backend="eager", **options))
    found = []
    for compiled in False, True:
        network, policy = common.load_for_training(start(str(compiled), COMPILE=compiled), str(TOY / "model"))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        policy(common.pack(SEQUENCES)).sum().backward()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs) == compiled
        found.append(gradients(network))
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-5 * gradient.norm(), name


# The plan and the schedule --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("processes, max_tokens", [(1, 1), (2, 100), (3, 500), (8, 10**6)])
def test_plan_has_the_same_steps_in_small_micro_batches_whatever_the_machine(processes, max_tokens):
    lengths = np.random.default_rng(1).integers(1, 200, 53).tolist()
    plan = common.plan_batches(lengths, 16, 2, max_tokens, processes, np.random.default_rng(0))
    steps = []
    for step in plan:
        assert len(step) % processes == 0
        assert all(len(m) <= 1 or sum(lengths[e] for e in m) <= max_tokens for m in step)
        steps.append(sorted(e for micro_batch in step for e in micro_batch))
    assert [len(step) for step in steps] == [16, 16, 16, 5] * 2
    assert sorted(sum(steps[:4], [])) == sorted(sum(steps[4:], [])) == list(range(53))
    assert steps[:4] != steps[4:]
    one = common.plan_batches(lengths, 16, 2, 10**6, 1, np.random.default_rng(0))
    assert [sorted(step[0]) for step in one] == steps


@pytest.mark.parametrize("step, steps, warmup, decay, factor", [
    (0, 100, 0.05, True, 0.2), (1, 100, 0.05, True, 0.4), (4, 100, 0.05, True, 1.0), (5, 100, 0.05, True, 1.0),
    (50, 100, 0.05, True, 0.5 * (1 + math.cos(math.pi * 45 / 95))), (99, 100, 0.05, True, 0.000273),  # half a cosine
    (0, 1, 0.05, True, 1.0), (0, 9, 0.0, False, 1.0), (1, 6, 4.0, False, 0.5), (5, 6, 4.0, False, 1.0),
    (39, 40, 100.0, False, 0.4)])  # adastar.py's: a number of steps, and an iteration may be shorter
def test_learning_rate_by_hand(step, steps, warmup, decay, factor):
    assert common.learning_rate_factor(step, steps, warmup, decay) == pytest.approx(factor, abs=1e-6)


# The trainer ----------------------------------------------------------------------------------------------------------

def test_micro_batches_do_not_change_what_is_learnt(start, examples):
    """Six steps of AdamW, which magnifies rounding: weights to 1e-5."""
    whole = train(start("whole", MAX_TOKENS=10**5), "round_0/model", examples)
    parts = train(start("parts", MAX_TOKENS=150), "round_0/model", examples)
    before = load_file(TOY / "model" / "model.safetensors")
    for name, tensor in whole.items():
        assert (tensor - before[name]).norm() > 1e-3 * tensor.norm(), name  # it did learn
        assert (parts[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


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


def test_saved_folder_loads_in_float32_and_names_the_dtype_of_its_base(start, examples, tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "half")
    half = {name: tensor.bfloat16() for name, tensor in load_file(TOY / "model/model.safetensors").items()}
    save_file(half, tmp_path / "half/model.safetensors", {"format": "pt"})
    common.write(tmp_path / "half/config.json", common.read(TOY / "model/config.json") | {"dtype": "bfloat16"})
    run = start()
    weights = train(run, "round_0/model", examples[:2], model=tmp_path / "half")
    folder = run.folder / "round_0/model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert weights.keys() == {name for name, _ in model.named_parameters()}  # the tied head once
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())
    assert common.read(folder / "config.json")["dtype"] == "bfloat16"
    before, after = (AutoTokenizer.from_pretrained(path) for path in (TOY / "model", folder))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template


def test_loss_that_is_not_a_number_stops_with_the_step_and_its_examples(start, examples, capsys):
    run = start()
    line = refusal_of(capsys, lambda: train(run, "round_0/model", examples, lr=1e30))
    ids = line.rpartition("examples: ")[2].split(", ")
    assert "round 0, training step 2 of 6: loss nan" in line
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


def test_model_too_large_for_a_gpu_is_refused_before_sampling(start, tmp_path, monkeypatch, capsys):
    """A 24 GB card takes the shape of Qwen2.5-0.5B, 9,600 tokens at a time, and not that of Qwen2.5-1.5B."""
    run = start(MODEL=str(tmp_path), MAX_TOKENS=16_384)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 24_564 * 2**20))

    def fit(parameters, **shape):
        LlamaConfig(**shape).save_pretrained(tmp_path)
        monkeypatch.setattr(common, "count_parameters", lambda model: parameters)
        return common.tokens_that_fit(run)

    assert 9_600 <= fit(494_000_000, hidden_size=896, intermediate_size=4864, num_hidden_layers=24) < 9_700
    shape = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
    assert "too large to train on this GPU" in refusal_of(capsys, lambda: fit(1_544_000_000, **shape))


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


# LoRA ----------------------------------------------------------------------------------------------------------------

LORA = {"lora_rank": 4, "lora_alpha": 8.0}


def adapters_of(folder):
    return load_file(f"{folder}/adapters/adapters.safetensors")


def test_a_layer_is_w_plus_alpha_over_r_b_a(start):
    rng = start().rng("test")
    layer = torch.nn.Linear(6, 5)
    common.add_adapters(torch.nn.ModuleList([layer]), 3, 12.0, rng)
    layer.double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = x @ (layer.weight + 12.0 / 3 * layer.lora_B @ layer.lora_A).T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_adapters_begin_at_the_model_and_reach_all_linear_layers_of_the_blocks(start):
    run = start()
    batch = common.pack(SEQUENCES)
    _, plain = common.load_for_training(run, str(TOY / "model"))
    network, policy = common.load_for_training(run, str(TOY / "model"), 4, 8.0, run.rng("test"))
    assert torch.equal(policy(batch), plain(batch))
    policy(batch).sum().backward()
    learning = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    layers = {name.removesuffix(".weight") for name, p in network.named_parameters() if "_proj.weight" in name}
    assert len(layers) == 7 * network.config.num_hidden_layers
    assert learning == {f"{layer}.{part}" for layer in layers for part in ("lora_A", "lora_B")}


def test_merged_model_gives_what_the_adapted_one_gives(start, examples):
    """An ordinary folder: the tensors of the base, in float32, and only those that have adapters have changed."""
    run = start()
    weights = train(run, "round_0/model", examples, lr=1e-2, **LORA)
    base = load_file(TOY / "model/model.safetensors")
    assert weights.keys() == base.keys()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if "_proj.weight" in name}
    row = json.loads((run.folder / "round_0/model/logprobs.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(run.folder / "round_0/model", dtype=torch.float32)
    tokens = torch.tensor([row["tokens"]])
    found = plain(tokens).logits[0, :-1].log_softmax(1).gather(1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(found, torch.tensor(row["logprobs"]), atol=1e-4, rtol=1e-4)


def test_next_round_continues_the_adapters_of_the_last(start, examples):
    """From the original base: with a learning rate of zero all stays as it was. Another run's model gets new ones."""
    run = start()
    train(run, "round_0/model", examples, lr=1e-2, **LORA)
    first = run.folder / "round_0/model"
    train(run, "round_1/model", examples, model=first, lr=0.0, weight_decay=0.0, **LORA)
    for name, tensor in adapters_of(first).items():
        assert torch.equal(tensor, adapters_of(run.folder / "round_1/model")[name])
    other = start("other")
    train(other, "round_0/model", examples[:2], model=first, lr=0.0, epochs=1, **LORA)
    assert not any(tensor.any() for name, tensor in adapters_of(other.folder / "round_0/model").items()
                   if "lora_B" in name)


def test_small_updates_survive_the_round(start, examples):
    """Merged into a bfloat16 base, most of an update of 5e-7 is lost; the next round's adapters have all of it."""
    run = start()
    weights = train(run, "round_0/model", examples, lr=5e-7, **LORA)
    base = load_file(TOY / "model/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    half = base[name].bfloat16().float()
    update = weights[name] - base[name]
    kept = (half + update).bfloat16().float() - half
    assert kept.norm() < 0.5 * update.norm()
    adapters = adapters_of(run.folder / "round_0/model")
    layer = name.removesuffix("weight")
    exact = 8.0 / 4 * adapters[f"{layer}lora_B"] @ adapters[f"{layer}lora_A"]
    assert (exact - update).norm() < 0.1 * update.norm()


def test_first_step_of_dpo_from_adapters_has_the_loss_ln_2(start, examples):
    """The reference is the round's start, adapters included."""
    run = start()
    train(run, "round_0/model", examples, lr=1e-2, **LORA)
    pairs = []
    for one, other in zip(examples[::2], examples[1::2]):
        pairs.append({**one, "completions": one["completions"] + other["completions"], "ids": [None, None]})
    train(run, "round_1/model", pairs, dast.dpo_loss, model=run.folder / "round_0/model", reference=True, **LORA)
    steps = lines(run.folder / "round_1/steps.jsonl")
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert steps[-1]["loss"] < 0.69


TWO = f"""
import json, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import common, dast, test_losses
g = {{**vars(dast), **dast.TOY, "MODEL": {str(TOY / "model")!r}, "SEED": 3, "NAME": "two", "MAX_TOKENS": 10**5}}
examples = [json.loads(line) for line in open("examples.jsonl")]
test_losses.train(common.start_run(g), "round_0/model", examples, **test_losses.LORA)
"""


def test_adapters_are_the_same_on_two_processes(start, examples, tmp_path):
    common.write(tmp_path / "examples.jsonl", examples)
    (tmp_path / "two.py").write_text(TWO)
    launch(tmp_path, tmp_path / "two.py", processes=2)
    one = train(start("one", MAX_TOKENS=10**5), "round_0/model", examples, **LORA)
    two = load_file(tmp_path / "runs/two/round_0/model/model.safetensors")
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_training_resumes_from_a_save_of_adapters_only(start, examples):
    whole = train(start("whole"), "round_0/model", examples, **LORA)
    run = start("killed", SAVE_MINUTES=0.0)
    calls = []

    def loss(logprobs, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return dast.sft_loss(logprobs, batch)

    with pytest.raises(KeyboardInterrupt):
        train(run, "round_0/model", examples, loss, **LORA)
    [save] = run.unfinished.glob("round_0-step_0000003")
    saved = FileSystemReader(save).read_metadata().state_dict_metadata
    assert all("lora_" in name for name in saved if name.startswith("weights."))
    resumed = train(run, "round_0/model", examples, **LORA)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_adapters_take_few_bytes(start, examples):
    """What AdamW keeps: 8 bytes for each parameter that is trained, and nothing for the others."""
    run = start()
    kept = {}
    for name, settings in ("full", (0,)), ("lora", (4, 8.0, run.rng("test"))):
        network, policy = common.load_for_training(run, str(TOY / "model"), *settings)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        kept[name] = sum(16 * p.numel() if p.requires_grad else 4 * p.numel() for p in network.parameters())
        shapes = [(m.in_features + m.out_features) * 4 for m in policy.modules() if hasattr(m, "lora_A")]
        if shapes:
            assert sum(p.numel() for p in trained) == sum(shapes)
    assert kept["lora"] < 0.4 * kept["full"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_train_adapters_where_asked_to(tmp_path, script):
    launch(tmp_path, script, *SMALL[script], "--rounds", 1, "--lora-rank", 3, "--lora-alpha", 6)
    folders = list((tmp_path / "runs").glob("*/round_*/model/adapters"))
    assert folders
    assert adapters_of(folders[0].parent)["model.layers.0.mlp.up_proj.lora_A"].shape[0] == 3
