"""The real engine, vLLM's CPU build: new weights without a restart, the self-test, the same requests and decisions."""
import json
import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SMOKE, TOY, launch

if not find_spec("vllm"):
    if os.environ.get("CI"):
        raise ImportError("CI must have vLLM's CPU build; see .ci/run")
    pytest.skip("vLLM is not installed (on a CPU: its CPU build, as .ci/run does it)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The toy with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(TOY / "model", folder)
    weights = load_file(folder / "model.safetensors")
    noise = torch.randn(weights["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.01 * noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_new_weights_and_forgotten_ones(tmp_path, untied, head, processes):
    """After training the engine has the trainer's weights, all of them bit for bit; a skipped update stops the run."""
    model = TOY / "model" if head == "tied" else untied
    done = launch(tmp_path, "tests/updates.py", model, processes=processes)
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert result["found"] == 12 and result["wrong"] == []
    assert result["caught"] == [1, 1, 1]
    assert "tensors differ" in done.stderr and "log-probabilities are not the trainer's" in done.stderr
    assert [(r["id"], r["draw"]) for r in result["before"]] == [(r["id"], r["draw"]) for r in result["after"]]
    before, after = (json.loads(line) for line in open(tmp_path / "runs/updates/metrics.jsonl")
                     if json.loads(line)["phase"] in ("before", "after"))
    assert before["start_seconds"] > 0 and before["tensors_equal"] > 10 and "logprob_error" not in before
    assert "start_seconds" not in after and after["load_seconds"] > 0 and after["logprob_error"] <= 1e-4


def test_the_whole_loop_under_vllm(finished, tmp_path):
    """Same requests as under transformers, one engine for the whole run, and the same decisions from one record."""
    done = launch(tmp_path, "dast.py", *SMOKE, "--engine", "vllm", "--run", "v", "--rounds", "2")
    run, other = tmp_path / "runs" / "v", finished / "runs" / "one"
    assert done.stderr == "" and "INFO" not in done.stdout and "sampler  vllm" in done.stdout
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert [m["phase"] for m in metrics if "start_seconds" in m] == ["probe"]  # never again
    assert [(m["round"], m["phase"]) for m in metrics if "load_seconds" in m] == [(0, "eval"), (1, "eval"), (2, "eval")]
    assert all(m["logprob_error"] <= 1e-4 for m in metrics if "load_seconds" in m)
    for t in (1, 2):
        for s in map(json.loads, open(run / f"round_{t}" / "selection.jsonl")):
            firsts = [d for d, k in enumerate(s["outcomes"]) if k and k not in s["outcomes"][:d]]
            assert s["chosen"] == firsts and len(firsts) <= s["target"] and len(s["outcomes"]) <= s["budget"]
            assert len(firsts) < s["target"] or firsts[-1] == len(s["outcomes"]) - 1  # later draws are not recorded
    keys = [[(r["id"], r["draw"]) for r in map(json.loads, open(folder / "round_0" / "probe.jsonl"))]
            for folder in (run, other)]
    assert keys[0] == keys[1]
    replay = tmp_path / "runs" / "replay"  # the decisions from transformers' answers
    for name in ("round_0/probe.jsonl", "round_1/responses.jsonl"):
        (replay / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(other / name, replay / name)
    shutil.copytree(other / "round_0/model", replay / "round_0/model")
    launch(tmp_path, "dast.py", *SMOKE, "--engine", "vllm", "--run", "replay")
    for name in ("round_1/selection.jsonl", "round_1/train.jsonl"):
        assert (replay / name).read_bytes() == (other / name).read_bytes()
