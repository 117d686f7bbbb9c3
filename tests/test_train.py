"""Log-probabilities, packing, the plan and the trainer: against float64, against padding, at other sizes."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dast
from conftest import TOY, launch


def test_token_logprobs_equal_float64(alone, monkeypatch):
    """Hand-made logits through an identity head, and a real head in several chunks: value and gradient."""
    rng = torch.Generator().manual_seed(0)
    logits, targets = 5 * torch.randn(6, 9, generator=rng), torch.tensor([0, 8, 3, 3, 1, 7])
    reference = logits.double().log_softmax(1)[range(6), targets]
    ours = alone.token_logprobs(logits, torch.eye(9), targets)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=0)

    vocabulary = 1000
    monkeypatch.setattr(alone, "LOGITS", 7 * vocabulary)  # 100 positions in 15 chunks
    hidden, weight = torch.randn(100, 4, generator=rng), torch.randn(vocabulary, 4, generator=rng)
    targets = torch.randint(vocabulary, (100,), generator=rng)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    ours = alone.token_logprobs(h, w, targets)
    ours.sum().backward()
    grads, h64, w64 = (h.grad, w.grad), h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    reference = (h64 @ w64.T).log_softmax(1)[range(100), targets]
    reference.sum().backward()
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[0].double(), h64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1].double(), w64.grad, rtol=1e-4, atol=1e-5)


def test_pack_as_its_docstring_says(alone):
    batch = alone.pack([[([1, 2], [3, 4])], [([5], [6])]])
    shown = {name: getattr(value, "tolist", lambda: value)() for name, value in batch.items() if name != "longest"}
    assert shown == dict(tokens=[1, 2, 3, 4, 5, 6], positions=[0, 1, 2, 3, 0, 1], starts=[0, 4, 6], predict=[1, 2, 4],
                         targets=[3, 4, 6], counts=[2, 1], example=[0, 1])
    pair = alone.pack([[([1], [2]), ([1], [3, 4])]])
    assert pair["example"].tolist() == [0, 0] and pair["counts"] == [1, 2]
    nothing = alone.pack([])
    assert nothing["tokens"].tolist() == [0] and nothing["targets"].tolist() == [] == nothing["example"].tolist()


SIZES = [(3, 30), (12, 1), (1, 2), (20, 50), (7, 7), (2, 90)]
SEQUENCES = [[(list(range(5, 5 + p)), list(range(40, 40 + c)))] for p, c in SIZES]


def test_packed_equals_padded(alone):
    """The packed forward and its gradient against transformers' own padded forward, sequence by sequence."""
    from transformers import AutoModelForCausalLM
    network, policy, _ = alone.load_for_training(TOY / "model")
    ours = policy(alone.pack(SEQUENCES))
    ours.sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float32)
    longest = max(len(p) + len(c) for e in SEQUENCES for p, c in e)
    rows = [p + c for e in SEQUENCES for p, c in e]
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logprobs = plain(input_ids=ids, attention_mask=mask).logits.log_softmax(2)
    theirs = torch.cat([logprobs[s, range(len(p) - 1, len(p + c) - 1), c] for s, ((p, c),) in enumerate(SEQUENCES)])
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_dpo_loss_of_a_model_equals_float64(alone):
    """The pairs' loss through the packed policy, against transformers' own forward in float64, one sequence at a time;
    policy and reference differ by 1 % of every weight."""
    from transformers import AutoModelForCausalLM
    pairs = [[SEQUENCES[a][0], SEQUENCES[b][0]] for a, b in [(0, 1), (3, 4), (5, 2)]]
    logprobs = []
    for factor in (1.0, 1.01):
        plain = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float64)
        for parameter in plain.parameters():
            parameter.data.mul_(factor)
        rows = [(p, c, plain(torch.tensor([p + c])).logits[0].log_softmax(1)) for pair in pairs for p, c in pair]
        logprobs.append(torch.stack([x[range(len(p) - 1, len(p + c) - 1), c].sum() for p, c, x in rows]).detach())
    gain = logprobs[1] - logprobs[0]
    expected = -torch.nn.functional.logsigmoid(0.1 * (gain[0::2] - gain[1::2])).sum()
    _, policy, _ = alone.load_for_training(TOY / "model")
    batch = alone.pack(pairs)
    with torch.no_grad():
        batch["reference"] = alone.sequence_logprobs(policy(batch), batch)
        assert dast.dpo_loss(policy(batch), batch)[0] == 3 * torch.tensor(2.0).log()  # exactly, where they are the same
        for parameter in policy.parameters():
            parameter.mul_(1.01)
        total, weight, _ = dast.dpo_loss(policy(batch), batch)
    torch.testing.assert_close(batch["reference"].double(), logprobs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    assert weight == 3 and abs(float(gain.abs().mean())) > 0.1


def test_micro_batches_give_the_same_gradient(alone):
    """All sequences at once against four micro-batches, one of them empty: to 1e-6 of the gradient's norm."""
    gradients = []
    for parts in ([SEQUENCES], [SEQUENCES[:1], SEQUENCES[1:4], SEQUENCES[4:], []]):
        network, policy, _ = alone.load_for_training(TOY / "model")
        for part in parts:
            (-policy(alone.pack(part)).sum()).backward()
        gradients.append({name: p.grad.full_tensor() for name, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("tokens, expected", [(1e9, 0), (800, 2), (10, 3)])
def test_activations_made_twice_give_the_same_gradient(alone, monkeypatch, tokens, expected):
    """Where a GPU has room for the activations of so many tokens only, some of the three blocks make theirs twice: the
    same gradient bit for bit, and less is kept."""
    batch, gradients, kept = alone.pack(SEQUENCES), [], []
    for room in (float("inf"), tokens * 37_000):  # about what the toy keeps of a token
        monkeypatch.setattr(alone, "room_for_activations", lambda policy: room)
        network, policy, _ = alone.load_for_training(TOY / "model")
        assert alone.spare_memory(policy, 1000) == (0 if room == float("inf") else expected)
        policy(batch).sum().backward()
        gradients.append({name: p.grad.full_tensor() for name, p in network.named_parameters()})
        kept.append(alone.kept_bytes(policy, 128) - alone.kept_bytes(policy, 64))
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert 30_000 < kept[0] / 64 < 45_000 and (kept[1] < kept[0] * (1 - expected / 4) if expected else True)


@pytest.mark.parametrize("room, count", [(400, 0), (399, 2), (320, 2), (319, 3), (230, 3), (229, 4), (1, 4)])
def test_as_few_blocks_as_must_make_their_activations_twice(alone, room, count):
    """Four blocks that keep 100 bytes of a token each; 10 of their input: 400, 410, 320, 230, 140 bytes for 0 to 4."""
    assert alone.blocks_to_recompute(4, 400, 10, room) == count


def test_a_full_gpu_is_one_line(alone, capsys):
    def loss(logprobs, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    _, policy, _ = alone.load_for_training(TOY / "model")
    with pytest.raises(SystemExit):
        alone.gradients(policy, loss, [SEQUENCES])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "225 tokens at once, 6 examples" in said and "--max-tokens" in said


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [1, 100, 10**6])
def test_plan_properties(alone, processes, max_tokens):
    lengths = np.random.default_rng(1).integers(1, 200, 53).tolist()
    plan = alone.plan_batches(lengths, 16, 2, max_tokens, processes, np.random.default_rng(0))
    steps = [[e for micro in step for e in micro] for step in plan]
    assert [len(s) for s in steps] == [16, 16, 16, 5] * 2
    assert sorted(sum(steps[:4], [])) == sorted(sum(steps[4:], [])) == list(range(53))
    same = alone.plan_batches(lengths, 16, 2, 777, 1, np.random.default_rng(0))
    assert [sorted(s) for s in steps] == [sorted(e for m in s for e in m) for s in same]  # neither changes a step
    for step in plan:
        assert len(step) % processes == 0
        assert all(sum(lengths[e] for e in m) <= max_tokens or len(m) == 1 for m in step)


def test_schedule(alone):
    factors = [alone.learning_rate_factor(s, 100, 0.05, True) for s in range(100)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]) and factors[52] == pytest.approx(0.5, abs=0.01)
    assert all(a >= b for a, b in zip(factors[5:], factors[6:])) and 0 < factors[99] < 0.001
    assert alone.learning_rate_factor(0, 1, 0.05, True) == 1.0
    # adastar's: a number of steps, then constant; an iteration may be shorter than its warm-up
    assert [alone.learning_rate_factor(s, 6, 4.0, False) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert alone.learning_rate_factor(39, 40, 100.0, False) == 0.4 and alone.learning_rate_factor(0, 9, 0.0, False) == 1


TRAIN = """
import sys; sys.path.insert(0, {root!r})
import common, dast, json
SEED = 3
MODEL = {model!r}
RUN = sys.argv[1]
WANDB = False
ENGINE = ""
GRADER = ""
SAVE_MINUTES = 10.0
run = common.start_run(globals())
examples = [json.loads(line) for line in open("examples.jsonl")]
run.once("round_0/model", lambda folder: common.train(run, MODEL, examples, dast.sft_loss, folder, round=0, lr=1e-3,
    warmup=0.1, epochs=2, batch_size=8, max_tokens=int(sys.argv[2]), weight_decay=0.01, clip=0.3))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights and metrics after six steps on the same 18 examples: at once, in micro-batches, on two processes."""
    folder = tmp_path_factory.mktemp("train")
    from conftest import ROOT
    (folder / "train.py").write_text(TRAIN.format(root=str(ROOT), model=str(TOY / "model")))
    problems = [json.loads(line) for line in open(TOY / "train.jsonl")][:18]
    (folder / "examples.jsonl").write_text("".join(json.dumps(
        {"id": str(i), "prompt": f"Question: {p['problem']}\nAnswer:\n", "completions": [p["solution"]],
         "end": "<|endoftext|>"}) + "\n" for i, p in enumerate(problems)))
    found = {"folder": folder / "runs" / "whole" / "round_0" / "model"}
    for name, tokens, processes in [("whole", 10**6, 0), ("micro", 150, 0), ("two", 10**6, 2)]:
        launch(folder, folder / "train.py", name, tokens, processes=processes)
        found[name] = load_file(folder / "runs" / name / "round_0" / "model" / "model.safetensors")
        found[name + " log"] = [json.loads(line) for line in open(folder / "runs" / name / "metrics.jsonl")]
    return found


@pytest.mark.parametrize("other", ["micro", "two"])
def test_micro_batches_and_processes_do_not_change_the_result(weights, other):
    """Loss of the first step to 1e-6; weights after six steps of AdamW (it magnifies rounding) to 1e-5."""
    start = load_file(TOY / "model" / "model.safetensors")
    for name, tensor in weights["whole"].items():
        assert (tensor - start[name]).norm() > 1e-3 * tensor.norm(), name  # it did learn
        assert (weights[other][name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    [whole], [log] = weights["whole log"], weights[other + " log"]
    assert log["steps"] == whole["steps"] == 6 and log["tokens"] == whole["tokens"]
    assert log["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-6)
    assert log["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_saved_folder_loads_as_it_is(weights):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(weights["folder"])
    assert weights["whole"].keys() == {name for name, _ in model.named_parameters()}  # the tied head is not there twice
    assert all(torch.equal(parameter, weights["whole"][name]) for name, parameter in model.named_parameters())
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (TOY / "model", weights["folder"]))
    assert before.get_vocab() == after.get_vocab() and before.chat_template == after.chat_template
