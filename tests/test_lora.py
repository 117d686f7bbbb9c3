"""LoRA: adapters against the formula in float64, merged models, rounds that continue, saves, memory."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import common
import dast
from conftest import SCRIPTS, SMALL, TOY, launch, lines, run_of
from test_losses import SEQUENCES, TWO, examples, start, train  # noqa: F401

LORA = {"lora_rank": 4, "lora_alpha": 8.0}


def adapters_of(folder):
    return load_file(f"{folder}/adapters/adapters.safetensors")


def test_a_layer_is_w_plus_alpha_over_r_b_a(start):  # noqa: F811
    rng = start().rng("test")
    layer = torch.nn.Linear(6, 5)
    common.add_adapters(torch.nn.ModuleList([layer]), 3, 12.0, rng)
    layer.double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = x @ (layer.weight + 12.0 / 3 * layer.lora_B @ layer.lora_A).T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_adapters_begin_at_the_model_and_reach_all_linear_layers_of_the_blocks(start):  # noqa: F811
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


def test_merged_model_gives_what_the_adapted_one_gives(start, examples):  # noqa: F811
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


def test_next_round_continues_the_adapters_of_the_last(start, examples):  # noqa: F811
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


def test_small_updates_survive_the_round(start, examples):  # noqa: F811
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


def test_first_step_of_dpo_from_adapters_has_the_loss_ln_2(start, examples):  # noqa: F811
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


def test_two_processes_learn_what_one_does(start, examples, tmp_path):  # noqa: F811
    common.write(tmp_path / "examples.jsonl", examples)
    paths = [str(TOY.parent), str(TOY.parent.parent)]
    program = TWO.format(paths=paths, model=str(TOY / "model")).replace('open("examples.jsonl")])',
                                                                       f'open("examples.jsonl")], **{LORA})')
    (tmp_path / "two.py").write_text(program)
    launch(tmp_path, tmp_path / "two.py", "two", processes=2)
    one = train(start("one", MAX_TOKENS=10**5), "round_0/model", examples, **LORA)
    two = load_file(tmp_path / "runs/two/round_0/model/model.safetensors")
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_training_resumes_from_a_save_of_adapters_only(start, examples):  # noqa: F811
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


def test_adapters_take_few_bytes(start, examples):  # noqa: F811
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
    [*folders] = run_of(tmp_path, script, []).glob("round_*/model/adapters")
    assert folders
    assert adapters_of(folders[0].parent)["model.layers.0.mlp.up_proj.lora_A"].shape[0] == 3
