"""The real engine, vLLM's CPU build: new weights without a restart, its self-test, whole runs, a failure."""
import json
import os
import shutil
from importlib.metadata import packages_distributions, version

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT, SMALL, TOY, killed_when, launch, lines

BUILDS = packages_distributions().get("vllm", [])
if not any("cpu" in name + version(name) for name in BUILDS):  # the official wheel runs on GPUs only
    if os.environ.get("CI"):
        raise ImportError("CI must have vLLM's CPU build; see .ci/run")
    pytest.skip(f"vLLM's CPU build is not here, see .ci/run (found: {BUILDS})", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")

UPDATES = f"""
import functools, json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import common, dast

def packed_matrices(folder, model):
    # how many, and names of those that differ: the CPU build packs matrices away; an identity shows them
    sent = dict(common.read_weights(folder))
    fused = {{"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}}
    found = 0
    wrong = []
    for name, layer in model.named_modules():
        if getattr(layer, "weight", None) is not None and layer.weight.numel() == 0:
            last = name.split(".")[-1]
            parts = [sent[name.replace(last, part) + ".weight"] for part in fused.get(last, (last,))]
            weight = torch.cat(parts).float()
            mine = layer.quant_method.apply(layer, torch.eye(weight.shape[1], dtype=weight.dtype), None).T
            found += 1
            if not torch.equal(mine, weight):
                wrong.append(name)
    return found, wrong

def main():
    run = common.start_run({{**vars(dast), "MODEL": sys.argv[1], "NAME": "u", "ENGINE": "vllm"}})
    problems = common.load_problems({str(TOY / "train.jsonl")!r}, "train", "")[:6]
    tokenizer = common.load_tokenizer(sys.argv[1], "zero_shot")
    examples = [common.make_example(tokenizer, "zero_shot", p, p["solution"]) for p in problems]

    def prompt(problem, draw):
        return common.make_prompt(tokenizer, "zero_shot", problem)

    def draw(name, model, draws=2, **options):
        return common.sample(run, f"round_0/{{name}}.jsonl", model, problems, draws, prompt,
                             style="zero_shot", temperature=0.7, max_new_tokens=24, **options)

    def train(name, start, lr):
        return common.train(run, f"round_0/{{name}}", start, examples, dast.sft_loss, lr=lr, warmup=0.0,
                            epochs=2, batch_size=6, weight_decay=0.0, clip=1.0)

    draw("before", sys.argv[1])
    new = train("new", sys.argv[1], 1e-3)
    draw("after", new)
    draw("enough", new, 16, enough=lambda responses: len(responses) >= 9)
    found, wrong = run.engine.llm.apply_model(functools.partial(packed_matrices, new))[0]
    send = run.engine.llm.collective_rpc

    def status_without(part, model):
        # the exit status of a run whose engine keeps the weights of `new` where `part` is in the name
        def forgets(method, kwargs):
            old = dict(common.read_weights(new))
            sent = [(n, old[n] if part in n else w) for n, w in common.read_weights(model)]
            return send(method, kwargs={{"weights_iterator": iter(sent)}})
        run.engine.llm.collective_rpc = forgets
        try:
            draw("never", model)
        except SystemExit as stop:
            return stop.code

    small = train("small", new, 5e-7)
    large = train("large", new, 1e-2)
    caught = [status_without("", small), status_without("", large), status_without("proj.weight", large)]
    common.say("RESULT " + json.dumps(dict(found=found, wrong=wrong, caught=caught)))

if __name__ == "__main__":
    main()
"""


def errors_of(done):
    """What a script said of its failure, a line a process; the libraries' own warnings are left out."""
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if ".py: error: " in line]


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
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | settings))
    return {"tied": TOY / "model", "untied": folder / "untied", "half": folder / "half"}


@pytest.mark.parametrize("model, processes", [("tied", 2), ("untied", 0), ("half", 0)])
def test_new_weights_are_taken_over_and_forgotten_ones_caught(tmp_path, models, model, processes):
    """Forgotten: an update at a learning rate of 5e-7, a large one, and of a large one the matrices alone.

    The CPU build packs matrices away: only small updates of norms, biases and embeddings can be seen."""
    (tmp_path / "updates.py").write_text(UPDATES)
    done = launch(tmp_path, tmp_path / "updates.py", models[model], processes=processes)
    result = json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])
    assert result == {"found": 12, "wrong": [], "caught": [1, 1, 1]}
    assert done.stderr.count("tensors differ") == 2 * max(1, processes)
    assert "vLLM's log-probabilities of runs/u/round_0/large are " in done.stderr
    run = tmp_path / "runs" / "u"
    before, after = (lines(run / "round_0" / f"{name}.jsonl") for name in ("before", "after"))
    assert len(before) == len(after) == 12 and before != after
    assert [r["draw"] for r in lines(run / "round_0" / "enough.jsonl")] == 6 * [*range(9)]
    metrics = {m["phase"]: m for m in lines(run / "metrics.jsonl")}
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
    assert "sampler  vllm (as this folder was begun)" in done.stdout
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


FAILING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import adastar, common
build = common.VllmEngine.build

def build_one_that_fails(self, folder):  # in the last process, at its 12th step of the first iteration
    build(self, folder)
    step = self.llm.llm_engine.step
    steps = 0

    def step_or_fail():
        nonlocal steps
        steps += any(self.run.unfinished.glob("round_1*"))
        if steps == 12 and "FAILS" in os.environ and common.rank() == common.world_size() - 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step()

    self.llm.llm_engine.step = step_or_fail

common.VllmEngine.build = build_one_that_fails
common.launch(adastar.main, vars(adastar))
"""


def test_engine_that_fails_is_one_line_and_a_rerun_resumes(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    flags = [*SMALL["adastar.py"], "--rounds", "1", "--engine", "vllm", "--name", "f"]
    [line] = errors_of(launch(tmp_path, tmp_path / "failing.py", *flags, check=False, FAILS="1"))
    assert "error: RuntimeError: CUDA error: an illegal memory access" in line and "runs/f/error.log" in line
    run = tmp_path / "runs" / "f"
    assert "Traceback" in (run / "error.log").read_text()
    launch(tmp_path, tmp_path / "failing.py", *flags)
    assert sum(any(s["outcomes"]) for s in lines(run / "round_1" / "selection.jsonl")) == 16
    assert (run / "round_1" / "eval.json").exists()


def test_eval_refuses_models_of_two_shapes(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "other")
    done = launch(tmp_path, "eval.py", "--model", f"{TOY}/model,other", "--sets", TOY / "test.jsonl",
                  "--n-test", "4", "--max-new-tokens", "16", "--engine", "vllm", check=False)
    [line] = errors_of(done)
    assert "other: vLLM's engine was built for a model of another shape; score them one by one" in line
