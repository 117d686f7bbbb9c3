"""The real engine, vLLM's CPU build: new weights without a restart, the self-test, the same requests and decisions."""
import json
import os
import re
import shutil
from importlib.metadata import packages_distributions, version

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import common
from conftest import ROOT, SMOKE, TOY, launch
from test_runs import killed

BUILDS = packages_distributions().get("vllm", [])
if not any("cpu" in name + version(name) for name in BUILDS):  # the official wheel runs on GPUs only
    if os.environ.get("CI"):
        raise ImportError("CI must have vLLM's CPU build; see .ci/run")
    pytest.skip(f"vLLM's CPU build is not here, see .ci/run (found: {BUILDS})", allow_module_level=True)
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


TEXTS = {}  # of what was drawn before training, by model


@pytest.mark.parametrize("head, processes", [("tied", 1), ("tied", 2), ("untied", 1), ("bfloat16", 1)])
def test_new_weights_and_forgotten_ones(tmp_path, untied, head, processes):
    """After training the engine has the trainer's weights, all of them bit for bit; a skipped update stops the run."""
    model = untied if head == "untied" else TOY / "model"
    if head == "bfloat16":  # saved so, and trained and sampled in float32
        model = tmp_path / "half"
        shutil.copytree(TOY / "model", model)
        weights = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    done = launch(tmp_path, "tests/updates.py", model, processes=processes)
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert result["stopped"] > 0 and result["only_nine"]  # waves of 1, 1, 2, 4, 8; 7 of the 8 are not needed
    assert result["same"] and result["found"] == 12 and result["wrong"] == []
    assert result["caught"] == [1, 1, 1]
    assert "tensors differ" in done.stderr and "log-probabilities are not the trainer's" in done.stderr
    assert result["before"] != result["after"]
    texts = [r["text"] for r in result["before"]]  # at another number of processes: nearly all the same
    assert sum(a == b for a, b in zip(texts, TEXTS.setdefault(head, texts))) >= 11 and len(texts) == 12
    before, after = (json.loads(line) for line in open(tmp_path / "runs/updates/metrics.jsonl")
                     if json.loads(line)["phase"] in ("before", "after"))
    assert before["start_seconds"] > 0 and before["tensors_equal"] > 10 and "logprob_error" not in before
    assert "start_seconds" not in after and after["load_seconds"] > 0
    assert after["logprob_error"] <= (0.1 if head == "bfloat16" else 1e-4)


def test_the_whole_loop_under_vllm(tmp_path):
    """Killed while the first answers are checked, and run again: one engine for the whole run, nothing asked twice."""
    left = killed(tmp_path, "dast", "Draws.put:30", *SMOKE, "--engine", "vllm", "--run", "v")
    assert left == ["round_0-probe@0.jsonl"]
    path = tmp_path / "runs/v/unfinished" / left[0]
    kept = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    kept[0]["text"] = "this was kept"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in kept) + '{"id": "toy/tra')
    done = launch(tmp_path, "dast.py", *SMOKE, "--engine", "vllm", "--run", "v")
    run = tmp_path / "runs" / "v"
    assert done.stderr == "" and "INFO" not in done.stdout and "sampler  vllm" in done.stdout
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert [m["phase"] for m in metrics if "start_seconds" in m] == ["probe"]  # never again
    assert [(m["round"], m["phase"]) for m in metrics if "load_seconds" in m] == [(0, "eval"), (1, "eval")]
    assert all(m["logprob_error"] <= 1e-4 for m in metrics if "load_seconds" in m)
    for s in map(json.loads, open(run / "round_1" / "selection.jsonl")):
        firsts = [d for d, k in enumerate(s["outcomes"]) if k and k not in s["outcomes"][:d]]
        assert s["chosen"] == firsts and len(firsts) <= s["target"] and len(s["outcomes"]) <= s["budget"]
        assert len(firsts) < s["target"] or firsts[-1] == len(s["outcomes"]) - 1  # later draws are not recorded
    probe = {(r["id"], r["draw"]): r for r in map(json.loads, open(run / "round_0" / "probe.jsonl"))}
    assert len(probe) == 54 and 0 < len(kept) < 54
    assert all(probe[r["id"], r["draw"]]["text"] == r["text"] for r in kept)  # the changed one too


def test_a_walk_under_vllm(tmp_path):
    """adastar.py, streaming: problems in priority order up to the last answer that is wanted, what is behind it cut."""
    small = ["--toy", "--n-train", "90", "--held-out", "10", "--n-test", "10", "--steps", "2", "--rounds", "2"]
    launch(tmp_path, "adastar.py", *small, "--engine", "vllm")
    run = tmp_path / "runs" / "adastar-0"
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert sum("start_seconds" in m for m in metrics) == 1
    state = {}
    for t in (1, 2):
        selection = [json.loads(line) for line in open(run / f"round_{t}" / "selection.jsonl")]
        keys = [(*state.get(s["id"], (0, 0.0)), int(s["id"].split("/")[-1])) for s in selection]
        assert keys == sorted(keys) and [(s["last"], s["w"]) for s in selection] == [key[:2] for key in keys]
        assert sum(any(s["outcomes"]) for s in selection) == 16 and any(selection[-1]["outcomes"])
        state |= {s["id"]: (t, s["win_rate"]) for s in selection if s["committed"]}
        [sample] = [m for m in metrics if (m["round"], m["phase"]) == (t, "sample")]
        assert sample["draws"] == sum(len(s["outcomes"]) for s in selection) <= sample["spent_draws"]
    assert state


def test_a_tagger_of_another_shape(tmp_path):
    """sai_dpo.py on two processes: an engine for the tagger, then, after a start of its own, one for the policy."""
    folder = tmp_path / "tagger"
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    flags = ["--toy", "--n-train", "24", "--n-test", "4", "--rounds", "1", "--samples-per-round", "8", "--n-clusters",
             "2", "--k-samples", "4", "--engine", "vllm", "--no-own-tags", "--tagger", folder, "--tag-tokens", "8"]
    done = launch(tmp_path, "sai_dpo.py", *flags, processes=2)
    assert done.stdout.count("the program starts again") == 1 and "goes on in runs/sai_dpo-0" in done.stdout
    assert done.stderr == ""
    run = tmp_path / "runs" / "sai_dpo-0"
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert [m["phase"] for m in metrics if "start_seconds" in m] == ["tag", "eval"]
    outputs = [json.loads(line) for line in open(run / "round_0" / "tagger.jsonl")]
    assert len({o["id"] for o in outputs}) == 24 and (run / "round_1" / "eval.json").exists()


FAILING = """
import os, sys; sys.path.insert(0, {root!r})
import adastar, common
from common import VllmSampler
build, times = VllmSampler._build, int(os.environ["ENGINE_FAILS"])

def breaks(self, folder):  # the engine of the last process, at its 12th step, in the first iteration of so many starts
    build(self, folder)
    step, steps = self.llm.llm_engine.step, 0

    def step_or_fail():
        nonlocal steps
        if list(self.run.unfinished.glob("round_1*")):
            steps += 1
        if steps == 12 and int(os.environ.get(common.STARTS, 0)) < times and common.rank() == common.world_size() - 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step()

    self.llm.llm_engine.step = step_or_fail

VllmSampler._build = breaks
common.override_from_cli(vars(adastar))
adastar.main()
"""


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_fails_is_started_again_once(tmp_path, times):
    """Of one of two processes, in a walk, whose other part waits for it: the answers that are there are not lost."""
    (tmp_path / "failing.py").write_text(FAILING.format(root=str(ROOT)))
    flags = ["--toy", "--n-train", "90", "--held-out", "0", "--n-test", "4", "--steps", "2", "--rounds", "1",
             "--engine", "vllm", "--run", "f"]
    done = launch(tmp_path, tmp_path / "failing.py", *flags, processes=2, check=times == 1,
                  ENGINE_FAILS=str(times))
    assert done.stdout.count("vLLM has failed: CUDA error: an illegal memory access was encountered; see ") == 1
    kept = int(re.search(r"with the ([\d,]+) answers that", done.stdout)[1])
    assert "RuntimeError" in (tmp_path / "runs/f/vllm-1.log").read_text()
    if times == 2:
        return error_of_all(done.stderr)
    assert done.stderr == "" and kept > 0
    run = tmp_path / "runs" / "f"
    selection = [json.loads(line) for line in open(run / "round_1" / "selection.jsonl")]
    assert sum(any(s["outcomes"]) for s in selection) == 16 and (run / "round_1" / "model").exists()
    [sample] = [m for m in map(json.loads, open(run / "metrics.jsonl")) if m["phase"] == "sample"]
    assert sample["spent_draws"] >= kept


def error_of_all(lines):
    assert {line.partition(": error: ")[2].partition(";")[0] for line in lines.splitlines()} == {
        "vLLM has failed again: CUDA error: an illegal memory access was encountered"}


def test_engines_are_told_apart_by_what_matters(tmp_path, untied):
    """Not by how a file says it: one as the Hub has it, of an older transformers, and one that is saved now."""
    older, newer = tmp_path / "older", tmp_path / "newer"
    shutil.copytree(TOY / "model", older)
    config = json.loads((older / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("layer_types", "rope_parameters", "dtype")}
    (older / "config.json").write_text(json.dumps({
        **config, "rope_theta": 10000.0, "sliding_window": 4096, "use_sliding_window": False}))
    network = AutoModelForCausalLM.from_pretrained(older)
    network.save_pretrained(newer)
    AutoTokenizer.from_pretrained(older).save_pretrained(newer)
    assert common.architecture(older) == common.architecture(newer)
    assert (older / "config.json").read_text() != (newer / "config.json").read_text()
    assert common.architecture(newer) != common.architecture(untied)
    tokenizer = AutoTokenizer.from_pretrained(newer)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(newer)
    assert common.architecture(older) != common.architecture(newer)
