"""The real engine, vLLM's CPU build: new weights without a restart, its self-test, whole runs."""
import json
import os
import shutil
from importlib.metadata import packages_distributions, version

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import common
from conftest import SMALL, TOY, killed_when, launch, lines

BUILDS = packages_distributions().get("vllm", [])
if not any("cpu" in name + version(name) for name in BUILDS):  # the official wheel runs on GPUs only
    if os.environ.get("CI"):
        raise ImportError("CI must have vLLM's CPU build; see .ci/run")
    pytest.skip(f"vLLM's CPU build is not here, see .ci/run (found: {BUILDS})", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: folder}: the toy as it is, its head the embedding; with a head of its own; saved in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    weights = load_file(TOY / "model" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    untied = {**weights, "lm_head.weight": embedding + 0.01 * noise}
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    changed = {"untied": (untied, {"tie_word_embeddings": False}), "half": (half, {"dtype": "bfloat16"})}
    for name, (tensors, settings) in changed.items():
        shutil.copytree(TOY / "model", folder / name)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        common.write(folder / name / "config.json", common.read(folder / name / "config.json") | settings)
    return {"tied": TOY / "model", "untied": folder / "untied", "half": folder / "half"}


@pytest.mark.parametrize("model, processes", [("tied", 2), ("untied", 0), ("half", 0)])
def test_new_weights_are_taken_over_and_forgotten_ones_caught(tmp_path, models, model, processes):
    """Forgotten: an update at a learning rate of 5e-7; a large one; a large one that only log-probabilities show."""
    done = launch(tmp_path, "tests/studies/updates.py", models[model], processes=processes)
    result = json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])
    assert result["caught"] == [1, 1, 1] and result["only_nine"]
    assert result["same_as_transformers"] == 1 or model == "half"  # the new weights draw what they should
    assert done.stderr.count("tensors differ") == 2 * max(1, processes)
    assert "vLLM's log-probabilities of runs/updates/round_0/large are " in done.stderr
    metrics = {m["phase"]: m for m in lines(tmp_path / "runs" / "updates" / "metrics.jsonl")}
    assert metrics["before"]["tensors_equal"] > 10 and metrics["after"]["load_seconds"] > 0
    assert metrics["after"]["logprob_error"] <= 1e-4


def test_whole_loop_under_vllm_is_killed_and_resumed(tmp_path):
    """What was answered before the kill is not asked again; the engine loads new weights, and only these."""
    flags = [*SMALL["dast.py"], "--rounds", "1", "--name", "v"]
    run = tmp_path / "runs" / "v"
    path = run / "unfinished" / "round_0-probe@0.jsonl"
    killed_when(tmp_path, "dast.py", [*flags, "--engine", "vllm"],
                lambda run: path.exists() and path.stat().st_size > 400)
    kept = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    kept[0]["text"] = "this was kept"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in kept) + '{"id": "toy/tra')
    done = launch(tmp_path, "dast.py", *flags)
    assert "sampler  vllm\n" in done.stdout
    assert "INFO" not in done.stdout + done.stderr
    metrics = lines(run / "metrics.jsonl")
    loaded = [(m["round"], m["phase"]) for m in metrics if "load_seconds" in m]
    assert loaded == [(0, "probe"), (0, "eval"), (1, "eval")]
    probe = {(r["id"], r["draw"]): r["text"] for r in lines(run / "round_0" / "probe.jsonl")}
    assert len(probe) == 14 * 3
    assert all(probe[r["id"], r["draw"]] == r["text"] for r in kept)  # the changed one too


def test_walk_under_vllm_visits_in_order_of_priority(tmp_path):
    launch(tmp_path, "adastar.py", *SMALL["adastar.py"], "--engine", "vllm")
    run = tmp_path / "runs" / "adastar-0"
    metrics = {(m["round"], m["phase"]): m for m in lines(run / "metrics.jsonl")}
    state = {}
    for t in (1, 2):
        selection = lines(run / f"round_{t}" / "selection.jsonl")
        keys = [(*state.get(s["id"], (0, 0.0)), int(s["id"].split("/")[-1])) for s in selection]
        assert keys == sorted(keys)
        assert sum(any(s["outcomes"]) for s in selection) == 16 and any(selection[-1]["outcomes"])
        state |= {s["id"]: (t, s["win_rate"]) for s in selection if s["committed"]}
        drawn = metrics[t, "responses_0"]
        assert drawn["draws"] <= sum(len(s["outcomes"]) for s in selection)
        assert drawn["draws"] < drawn["spent_draws"]
    assert state


def test_eval_refuses_models_of_two_shapes(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "other")
    done = launch(tmp_path, "eval.py", "--model", f"{TOY}/model,other", "--sets", TOY / "test.jsonl",
                  "--n-test", "4", "--max-new-tokens", "16", "--engine", "vllm", check=False)
    [line] = [line for line in done.stderr.splitlines() if ".py: error: " in line]  # beside warnings of libraries
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "other: vLLM's engine was built for a model of a different shape; score one model at a time" in line
