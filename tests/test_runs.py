"""Real runs of the scripts as a user starts them: the whole loop, one and two processes, interruption, bad input."""
import fcntl
import json
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT, SMOKE, TOY, launch


PHASES = ["round_0/probe.jsonl", "round_0/model", "round_0/eval.json", "round_1/responses.jsonl",
          "round_1/selection.jsonl", "round_1/train.jsonl", "round_1/model", "round_1/eval.json"]


def lines(path):
    return [json.loads(line) for line in open(path)]


def files(run):
    """{name: bytes} of what a run leaves, times and machine aside."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*"))
            if path.is_file() and path.name not in ("metrics.jsonl", "constants.json", "lock")}


def counts(run):
    """metrics.jsonl without its times."""
    return [{k: v for k, v in m.items() if not k.endswith("seconds") and k != "mfu"}
            for m in lines(run / "metrics.jsonl")]


def forget(run, last):
    """Take away what a run made after the phase with this number."""
    for name in PHASES[last + 1:]:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def test_the_whole_loop_leaves_what_design_says(finished):
    run = finished / "runs" / "one"
    names = {"constants.json", "metrics.jsonl", "dast.py", "common.py", "round_0/probe.jsonl", "round_0/eval_base.json",
             *(n for n in PHASES if "model" not in n),
             *(f"round_{t}/model/{n}" for t in (0, 1) for n in ("config.json", "model.safetensors", "tokenizer.json"))}
    found = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names <= found and not [n for n in found if n.endswith(".part")]
    for r in lines(run / "round_0" / "probe.jsonl") + lines(run / "round_1" / "responses.jsonl"):
        assert r.keys() == {"id", "draw", "text", "tokens", "finish", "correct"} and r["finish"] in ("stop", "length")
        assert 1 <= r["tokens"] <= 96 and isinstance(r["correct"], bool) and "Question:" not in r["text"]
    score = json.loads((run / "round_1" / "eval.json").read_text())
    assert score["n"] == 12 == len(score["correct"]) and score["accuracy"] == sum(score["correct"].values()) / 12
    metrics = lines(run / "metrics.jsonl")
    assert [(m["round"], m["phase"]) for m in metrics] == [
        (0, "probe"), (0, "eval_base"), (0, "train"), (0, "eval"), (0, "round"), (1, "sample"), (1, "select"),
        (1, "train"), (1, "eval"), (1, "round")]
    probe, train = metrics[0], metrics[7]
    parameters = sum(t.numel() for t in load_file(TOY / "model" / "model.safetensors").values())
    assert probe["draws"] == probe["spent_draws"] == 54 and probe["flops"] == 2 * parameters * (
        probe["spent_prompt_tokens"] + probe["spent_tokens"])
    assert probe["correct"] + sum(probe.get(f"check_{r}", 0) for r in ("different", "no_answer", "timeout")) == 54
    assert train["flops"] == 6 * parameters * train["tokens"] and train["seconds"] > 0


def test_two_processes_draw_and_decide_the_same(finished, copy_of):
    """The same responses from the same weights, the same decisions from the same responses, weights to 1e-4."""
    one, two = finished / "runs" / "one", copy_of / "runs" / "two"
    (two / "round_1").mkdir(parents=True)
    # the recorded answers of the first round are replayed, since weights that differ by 1e-6 may flip a token
    shutil.copy(one / "round_1" / "responses.jsonl", two / "round_1")
    done = launch(copy_of, "dast.py", *SMOKE, "--run", "two", processes=2, torchrun=True)
    assert "runs/two has results but no constants.json; they are taken as they are" in done.stdout
    for name in ("round_0/probe.jsonl", "round_0/eval_base.json", "round_1/selection.jsonl", "round_1/train.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for t in (0, 1):
        a, b = (load_file(run / f"round_{t}" / "model" / "model.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    # sampling from one and the same trained model: bit for bit, with draws stopped by their targets
    for processes in (0, 2):
        run = copy_of / "runs" / f"replay{processes}"
        shutil.copytree(one, run, ignore=shutil.ignore_patterns("round_1"))
        launch(copy_of, "dast.py", *SMOKE, "--run", run.name, processes=processes)
        assert (run / "round_1" / "responses.jsonl").read_bytes() == (one / "round_1" / "responses.jsonl").read_bytes()


def test_a_finished_run_is_left_alone(copy_of):
    run = copy_of / "runs" / "one"
    before = files(run), (run / "metrics.jsonl").read_bytes()
    done = launch(copy_of, "dast.py", *SMOKE, "--run", "one")
    assert (files(run), (run / "metrics.jsonl").read_bytes()) == before
    assert "goes on in runs/one" in done.stdout and "round 1" in done.stdout.splitlines()[-3]  # the tables again




@pytest.mark.parametrize("last", [0, 4])
def test_a_rerun_goes_on_after_the_last_whole_phase(finished, copy_of, last):
    """As if killed while the phase after `last` was being written: the rest is made anew, bit for bit the same."""
    run = copy_of / "runs" / "one"
    forget(run, last)
    half = run / (PHASES[last + 1] + ".part")
    if half.suffix == ".part" and "model" in half.name:
        half.mkdir()
        (half / "config.json").write_text("{")
    else:
        half.write_text('{"id": "toy/tra')
    launch(copy_of, "dast.py", *SMOKE, "--run", "one", processes=1)
    assert files(run) == files(finished / "runs" / "one")
    assert counts(run) == counts(finished / "runs" / "one")


KILLED = """
import os, signal, sys, time; sys.path.insert(0, {root!r})
import common, {script} as script
name, count, how = (sys.argv.pop(1) + ":SIGKILL").split(":")[:3]
mine = getattr(getattr(script, name, None), "__module__", "") == script.__name__
owner = getattr(common, name.split(".")[0]) if "." in name else script if mine else common
method, calls = getattr(owner, name.split(".")[-1]), 0

def dies(*arguments, **options):  # in the place of `method`: at its last call, the signal when it has done its work
    global calls
    number = calls = calls + 1  # another thread may be at its own call
    result = method(*arguments, **options)
    if number == int(count):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)
    return result

setattr(owner, name.split(".")[-1], dies)
if hasattr(script, name):
    setattr(script, name, dies)
common.override_from_cli(vars(script))
script.main()
"""


def killed(folder, script, place, *flags, processes=0):
    """Start a script of which one process is killed at `place`, for example "Sampler._generate:7", its seventh call."""
    (folder / "killed.py").write_text(KILLED.format(root=str(ROOT), script=script))
    done = launch(folder, folder / "killed.py", place, *flags, processes=processes, check=False)
    assert done.returncode != 0 and "Error" not in done.stderr.split("ChildFailedError")[0], done.stderr
    return sorted(p.name for p in folder.glob("runs/*/unfinished/*"))


@pytest.mark.parametrize("place, left", [
    ("Sampler._generate:4", "round_1-sample@0.jsonl"),  # sampling: a wave has been generated, and not checked
    ("Draws.put:60", "round_1-sample@0.jsonl"),  # checking: some verdicts are there
    ("scale_and_clip:2", "round_1-step_0000001"),  # training: in the second step
    ("Progress.save:2", "round_1-step_0000002"),  # just saved
    ("save_model:1", "round_1-step_0000006"),  # the new model is written, and not yet renamed
])
def test_a_killed_run_goes_on(finished, copy_of, place, left):
    """One SIGKILL inside a phase; the rerun goes on from what was kept and ends with the same files, bit for bit."""
    flags, run = [*SMOKE, "--run", "one", "--save-minutes", "0"], copy_of / "runs" / "one"
    forget(run, 2)
    assert left in killed(copy_of, "dast", place, *flags)
    done = launch(copy_of, "dast.py", *flags)
    assert ("training goes on after step" in done.stdout) == ("step" in left)
    assert files(run) == files(finished / "runs" / "one")
    assert counts(run) == counts(finished / "runs" / "one")


def test_two_processes_of_which_one_is_killed(tmp_path):
    """Seven groups of requests, some answered when a process dies: the rerun asks for the rest only, in the same
    groups."""
    flags = ["--model", TOY / "model", "--sets", TOY / "test.jsonl", "--max-new-tokens", "32", "--n-test", "100",
             "--samples", "4", "--temperature", "0.7"]
    launch(tmp_path, "eval.py", *flags, "--run", "whole")
    flags += ["--run", "killed"]
    assert killed(tmp_path, "eval", "Sampler._generate:3", *flags, processes=2)
    kept = [r for p in (tmp_path / "runs/killed/unfinished").iterdir() for r in lines_that_are_whole(p)]
    assert 64 <= len(kept) < 400
    launch(tmp_path, "eval.py", *flags, processes=2)
    whole, again = (files(tmp_path / "runs" / name) for name in ("whole", "killed"))
    assert whole == again


@pytest.mark.parametrize("how, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_run_that_is_stopped_says_one_line(finished, copy_of, how, status):
    """Ctrl-C, or a cluster that wants its machine back: at once, though it is busy elsewhere, and with no traceback."""
    forget(copy_of / "runs" / "one", 2)
    (copy_of / "stopped.py").write_text(KILLED.format(root=str(ROOT), script="dast"))
    flags = [*SMOKE, "--run", "one"]
    done = launch(copy_of, copy_of / "stopped.py", f"Draws.put:60:{how}", *flags, check=False)
    [line] = done.stderr.strip().splitlines()
    assert done.returncode == status and f"stopped by {how}; what is finished stays, and the same" in line
    launch(copy_of, "dast.py", *flags)
    assert files(copy_of / "runs" / "one") == files(finished / "runs" / "one")


def test_a_small_model_with_a_tied_head_goes_on(tmp_path):
    """Head and embedding are one tensor, and would be in one file of what a training has saved."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.save_pretrained(tmp_path / "m")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                                 num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True,
                                 eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "m")
    flags = ["--toy", "--model", "m", "--n-train", "24", "--n-test", "2", "--rounds", "0", "--k-probe", "1",
             "--save-minutes", "0", "--run"]
    launch(tmp_path, "dast.py", *flags, "whole")
    assert "round_0-step_0000001" in killed(tmp_path, "dast", "scale_and_clip:2", *flags, "killed")
    launch(tmp_path, "dast.py", *flags, "killed")
    whole, again = (files(tmp_path / "runs" / name) for name in ("whole", "killed"))
    assert whole == again


def test_two_programs_in_one_folder(finished, copy_of):
    """The second is refused while the first lives, and says which that is; nothing is touched."""
    run = copy_of / "runs" / "one"
    forget(run, 6)
    with open(run / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 17 of node", file=lock, flush=True)
        before = files(run)
        line = error_of(launch(copy_of, "dast.py", *SMOKE, "--run", "one", check=False))
        assert "runs/one is in use by process 17 of node; wait for its end, or take another --run" in line
        assert files(run) == before
    launch(copy_of, "dast.py", *SMOKE, "--run", "one")
    assert files(run) == files(finished / "runs" / "one")


def test_a_start_that_failed_is_no_run(copy_of):
    """What was wrong may be mended under the same name."""
    flags = [*SMOKE, "--run", "again", "--rounds", "0", "--model"]
    shutil.copytree(TOY / "model", copy_of / "m")
    weights = load_file(copy_of / "m" / "model.safetensors")
    save_file({n: t * math.nan for n, t in weights.items()}, copy_of / "m" / "model.safetensors", {"format": "pt"})
    assert "is not finite" in error_of(launch(copy_of, "dast.py", *flags, "m", check=False))
    done = launch(copy_of, "dast.py", *flags, TOY / "model")
    assert "dast.py starts in runs/again" in done.stdout


def lines_that_are_whole(path):
    return [json.loads(line) for line in open(path) if line.endswith("}\n")]


def error_of(done, status=1):
    """The one line that a refused command leaves."""
    [line] = done.stderr.strip().splitlines()
    assert done.returncode == status and "Traceback" not in done.stdout + done.stderr, line
    return line


def test_changed_constants_are_refused(copy_of):
    done = launch(copy_of, "dast.py", *SMOKE, "--run", "one", "--lr", "0.5", "--variant", "", check=False)
    line = error_of(done)
    assert "LR 0.0003 -> 0.5" in line and "VARIANT 'PL' -> ''" in line and "SEED" not in line
    launch(copy_of, "dast.py", *SMOKE, "--run", "one", "--max-tokens", "512")  # the machine may differ
    shutil.copytree(TOY / "model", copy_of / "model")
    weights = load_file(copy_of / "model" / "model.safetensors")
    flags = [*SMOKE, "--rounds", "0", "--model", "model", "--train-data", "p.jsonl", "--run", "two"]
    (copy_of / "p.jsonl").write_text("".join(open(TOY / "train.jsonl").readlines()[:4]))
    launch(copy_of, "dast.py", *flags)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copy_of / "model" / "model.safetensors",
              metadata={"format": "pt"})
    assert "contents" in error_of(launch(copy_of, "dast.py", *flags, check=False))  # the same name, another model
    save_file(weights, copy_of / "model" / "model.safetensors", metadata={"format": "pt"})
    launch(copy_of, "dast.py", *flags)
    (copy_of / "p.jsonl").write_text("".join(open(TOY / "train.jsonl").readlines()[1:5]))
    assert "contents" in error_of(launch(copy_of, "dast.py", *flags, check=False))


@pytest.mark.parametrize("flags, words", [
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--test-data", "gsm9k"], ["unknown problem set 'gsm9k'"]),
    (["--run", "../up"], ["--run '../up'"]),
    (["--draws-like", "runs/one"], ["--draws-like"]),
    (["--variant", "", "--draws-like", "runs/none"], ["runs/none/round_1/selection.jsonl: no such file"]),
    (["--wandb", "--run", "w"], ["pip install wandb"]),
    (["--prompt", "zero_shot"], ["L can do nothing"]),
    (["--cuts", "0.4,0.7"], ["--cuts", "the higher one"]),
    (["--model", "short"], ["the prompt of toy/train/", "exceeds the context of 200", "--shots"]),
    (["--engine", "vllm"], ["--engine vllm needs the package vllm"]),
])
def test_bad_input_is_one_line(copy_of, flags, words):
    if flags[0] == "--wandb" and find_spec("wandb") or flags[0] == "--engine" and find_spec("vllm"):
        pytest.skip("it is installed here")
    shutil.copytree(TOY / "model", copy_of / "short")
    config = json.loads((copy_of / "short" / "config.json").read_text())
    (copy_of / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200}))
    line = error_of(launch(copy_of, "dast.py", *SMOKE, *flags, check=False))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("size, words", [
    (200_000, ["round_0/model could not be made: ", "File too large"]),  # too small for the weights
    (20_000, ["responses.jsonl", "File too large"]),
])
def test_a_full_disk_is_one_line_and_a_rerun_goes_on(finished, copy_of, size, words):
    run = copy_of / "runs" / "one"
    forget(run, 2 if size == 20_000 else 0)
    line = error_of(launch(copy_of, "dast.py", *SMOKE, "--run", "one", check=False, bytes=size))
    assert all(word in line for word in words), line
    launch(copy_of, "dast.py", *SMOKE, "--run", "one")
    assert files(run) == files(finished / "runs" / "one")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").symlink_to("/sys/kernel")  # where even root may not write
    assert "start where runs/ can be written" in error_of(launch(tmp_path, "dast.py", *SMOKE, check=False))


def test_a_loss_that_is_not_a_number_stops_the_run(finished, copy_of):
    """With the step and the ids of its examples; the model of the round before stays, and nothing else is there."""
    forget(copy_of / "runs" / "one", 5)
    shutil.move(copy_of / "runs" / "one", copy_of / "runs" / "nan")
    (copy_of / "runs" / "nan" / "constants.json").unlink()
    done = launch(copy_of, "dast.py", *SMOKE, "--run", "nan", "--lr", "1e30", check=False)
    line = error_of(done)
    ids = {e["id"] for e in lines(copy_of / "runs/nan/round_1/train.jsonl")}
    assert "round 1, training step 2 of 6: loss nan" in line and "the last good model stays" in line
    assert {i.strip() for i in line.split("examples: ")[1].split(",")} <= ids
    assert (copy_of / "runs/nan/round_0/model").exists() and not (copy_of / "runs/nan/round_1/model").exists()


def test_dpo(finished, copy_of):
    """DAST-D on two processes: the pairs are what the records say, the first loss is ln 2, a kill changes nothing."""
    flags = [*SMOKE, "--loss", "dpo", "--save-minutes", "0", "--max-tokens", "400"]
    for name in ("dpo", "again"):  # the same probe, round 0 and answers: nothing in them depends on LOSS
        run = copy_of / "runs" / name
        shutil.copytree(finished / "runs/one", run, ignore=shutil.ignore_patterns("constants.json", "metrics.jsonl"))
        forget(run, 3)
    run = copy_of / "runs" / "dpo"
    launch(copy_of, "dast.py", *flags, "--run", "dpo", processes=2)
    selection, train = (lines(run / "round_1" / name) for name in ("selection.jsonl", "train.jsonl"))
    drawn = {(r["id"], r["draw"]): r for r in lines(run / "round_1" / "responses.jsonl")}
    solution = {f"toy/train/{n}": r["solution"] for n, r in enumerate(lines(TOY / "train.jsonl"), 1)}
    pairs = [(s["id"], *pair) for s in selection for pair in s["pairs"]]
    assert len(pairs) == len(train) > 10
    for (i, better, worse), example in zip(pairs, train):
        rejected = drawn[i, worse]
        assert not rejected["correct"] and rejected["finish"] == "stop" and example["id"] == i
        preferred = solution[i] if better == -1 else drawn[i, better]["text"]
        assert example["completions"] == [preferred, rejected["text"]]
    for s in selection:
        mine = [r for (i, _), r in drawn.items() if i == s["id"]]
        wrong = sum(not r["correct"] and r["finish"] == "stop" for r in mine)
        gold = s["level"] == "U" and not any(r["correct"] for r in mine)
        assert len(s["pairs"]) == min(wrong, 1 if gold else len(s["chosen"])) <= s["target"]
        assert len({worse for _, worse in s["pairs"]}) == len(s["pairs"]) == len(s["copies"])
        assert [better for better, _ in s["pairs"]] == ([-1] if gold else s["chosen"])[:wrong]
    log = next(m for m in lines(run / "metrics.jsonl") if m["phase"] == "train")
    assert log["first_loss"] == pytest.approx(math.log(2), rel=1e-7)  # policy and reference are the same, exactly
    assert log["loss"] < 0.69 and log["preferred"] > 0.5 and log["margin"] > 0
    assert log["tokens"] == log["reference_tokens"] * 3  # three epochs, and the reference once
    # and once more, killed in its second step: the reference is not computed again, and the result is the same
    left = killed(copy_of, "dast", "scale_and_clip:2", *flags, "--run", "again", processes=2)
    assert {"round_1-reference.json", "round_1-step_0000001"} <= set(left)
    shutil.copytree(copy_of / "runs" / "again", copy_of / "runs" / "alone")
    launch(copy_of, "dast.py", *flags, "--run", "again", processes=2)
    assert files(run) == files(copy_of / "runs" / "again")
    # what two processes have saved, one process loads: the step where it went on is done by it alone
    done = launch(copy_of, "dast.py", *flags, "--run", "alone")
    assert "training goes on after step 1" in done.stdout
    a, b = (load_file(copy_of / "runs" / name / "round_1/model/model.safetensors") for name in ("dpo", "alone"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


def test_variants(finished, copy_of):
    """What each control changes, seen in the records; the levels are those of the finished run."""
    texts = {}
    for variant in ("P", "L", ""):
        run = copy_of / "runs" / f"variant{variant}"
        shutil.copytree(finished / "runs" / "one", run, ignore=shutil.ignore_patterns("round_1"))
        stored = json.loads((run / "constants.json").read_text())
        stored["constants"]["VARIANT"] = variant
        (run / "constants.json").write_text(json.dumps(stored))
        launch(copy_of, "dast.py", *SMOKE, "--run", run.name, "--variant", variant)
        for s in lines(run / "round_1" / "selection.jsonl"):
            limits = {"E": (1, 2), "M": (2, 4), "H": (3, 8), "U": (4, 16)}[s["level"]] if "P" in variant else (2, 2)
            assert (s["target"], s["budget"]) == limits
            assert "P" in variant or len(s["outcomes"]) == 2
        texts[variant] = [r["text"] for r in lines(run / "round_1" / "responses.jsonl") if r["draw"] < 1]
    assert texts["L"] != texts[""]  # other examples in the prompt, with the same seeds


def test_same_draws_and_same_size_controls(finished, copy_of):
    theirs = lines(finished / "runs/one/round_1/selection.jsonl")
    draws, kept = sum(len(s["outcomes"]) for s in theirs), sum(len(s["chosen"]) for s in theirs)
    launch(copy_of, "dast.py", *SMOKE, "--run", "vanilla", "--variant", "", "--draws-like", "runs/one",
           "--size-like", "runs/one")
    run = copy_of / "runs" / "vanilla" / "round_1"
    selection, train = lines(run / "selection.jsonl"), lines(run / "train.jsonl")
    assert len(lines(run / "responses.jsonl")) == draws == sum(s["budget"] for s in selection)
    assert {s["budget"] for s in selection} <= {draws // 18, draws // 18 + 1}
    assert sum(sum(s["copies"]) for s in selection) == kept == len(train) - 18
    assert [e["id"] for e in train[:kept]] == [s["id"] for s in selection for n in s["copies"] for _ in range(n)]


def test_problems_without_solutions_and_other_starts(tmp_path):
    """Answers only: round 0 is skipped and said so. Chat prompts; each round from the model of the one before."""
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps({k: r[k] for k in ("problem", "answer")}) + "\n" for r in lines(TOY / "train.jsonl")[:12]))
    done = launch(tmp_path, "dast.py", *SMOKE, "--train-data", "p.jsonl", "--prompt", "chat", "--start", "previous",
                  "--rounds", "2", "--k-samples", "2", "--max-new-tokens", "64", "--shots", "1", "--run", "r")
    assert "D_o is empty" in done.stdout and not (tmp_path / "runs/r/round_0/model").exists()
    for t in (1, 2):
        examples = lines(tmp_path / f"runs/r/round_{t}/train.jsonl")
        assert all(e["prompt"].endswith("<|im_start|>assistant\n") and e["end"] == "<|im_end|>" for e in examples)


def test_gsm8k_where_nearly_nothing_is_correct(shared, tmp_path):
    done = launch(tmp_path, "dast.py", "--toy", "--train-data", "gsm8k", "--test-data", "gsm8k", "--data",
                  shared / "data", "--n-train", "16", "--n-test", "4", "--k-probe", "1", "--k-samples", "1",
                  "--rounds", "1", "--shots", "1", "--max-new-tokens", "24", "--run", "gsm8k", processes=1)
    selection = lines(tmp_path / "runs/gsm8k/round_1/selection.jsonl")
    said = "D_a is empty, the model stays as it is" in done.stdout
    assert said == (not any(s["chosen"] for s in selection))
    assert (tmp_path / "runs/gsm8k/round_1/model").exists() != said
    assert "U 1" in done.stdout and (tmp_path / "runs/gsm8k/round_1/eval.json").exists()


def test_eval(tmp_path):
    sets = [f"{TOY}/{name}" for name in ("test.jsonl", "train.jsonl", "deep.json")]
    flags = ["--model", f"{TOY}/model", "--sets", ",".join(sets), "--max-new-tokens", "96", "--n-test", "12",
             "--samples", "3", "--temperature", "0.7", "--run", "e"]
    done = launch(tmp_path, "eval.py", *flags)
    scores = json.loads((tmp_path / "runs/e/eval.json").read_text())
    assert {model: list(of) for model, of in scores.items()} == {f"{TOY}/model": sets}
    for score in scores[f"{TOY}/model"].values():
        assert score["n"] == 12 == sum(part["n"] for part in score["by_level"].values()) and score["samples"] == 3
        assert score["n"] == sum(part["n"] for part in score["by_subject"].values()) and len(score["by_set"]) == 1
        assert 0 <= score["interval"][0] <= score["accuracy"] <= score["interval"][1] <= 1
        assert list(score["pass_at"]) == ["1", "2", "3"] and list(score["maj_at"]) == ["2", "3"]
        assert math.isclose(score["pass_at"]["1"]["accuracy"], score["accuracy"])
        assert score["pass_at"]["3"]["accuracy"] == sum(n > 0 for n in score["correct"].values()) / 12
    assert all(words in done.stdout for words in ("95 % interval", "level 1", "pass@3", "maj@2", "digit sums"))
    before = files(tmp_path / "runs" / "e")
    (tmp_path / "runs/e/eval.json").unlink()
    launch(tmp_path, "eval.py", *flags)
    assert files(tmp_path / "runs" / "e") == before  # from the answers that are there


def test_eval_of_several_models(tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "other")
    done = launch(tmp_path, "eval.py", "--model", f"{TOY}/model,{tmp_path}/other", "--sets", TOY / "test.jsonl",
                  "--max-new-tokens", "96", "--n-test", "6", "--run", "two")
    first, second = json.loads((tmp_path / "runs/two/eval.json").read_text()).values()
    assert first == second and "+0.0 [+0.0, +0.0] points against" in done.stdout
    assert len(lines(tmp_path / "runs/two/metrics.jsonl")) == 2


def test_eval_shows_examples_and_scores_what_was_held_out(tmp_path):
    flags = ["--model", TOY / "model", "--max-new-tokens", "96", "--sets", TOY / "train.jsonl", "--held-out", "6"]
    few = [*flags, "--prompt", "few_shot", "--shots", "2"]
    launch(tmp_path, "eval.py", *few, "--examples-from", TOY / "train.jsonl", "--run", "theirs")
    launch(tmp_path, "eval.py", *few, "--run", "ours")
    answers = {run: lines(next((tmp_path / "runs" / run).glob("*/held-out.jsonl"))) for run in ("theirs", "ours")}
    assert {r["id"] for r in answers["ours"]} == {r["id"] for r in answers["theirs"]} and len(answers["ours"]) == 6
    first = [*flags, "--first", "Take your time.", "--run"]
    launch(tmp_path, "eval.py", *first, "told")
    launch(tmp_path, "eval.py", *flags, "--run", "plain")
    told, plain = (lines(tmp_path / "runs" / name / "metrics.jsonl")[0]["prompt_tokens"] for name in ("told", "plain"))
    assert told > plain + 6 * 5
    prompt_tokens = {run: lines(tmp_path / "runs" / run / "metrics.jsonl")[0]["prompt_tokens"] for run in answers}
    assert prompt_tokens["ours"] > prompt_tokens["theirs"] > 6 * 60
    for more, words in {("--samples", "2"): "--temperature", ("--model", "."): "no letter or digit",
                        ("--examples-from", TOY / "train.jsonl"): "--prompt few_shot",
                        ("--sets", "gsm8k"): "--split train"}.items():
        assert words in error_of(launch(tmp_path, "eval.py", *flags, *more, "--data", "x", check=False))
    assert "share a file" in error_of(launch(tmp_path, "eval.py", *flags[:-4], "--sets", "a/b.jsonl,a-b.jsonl",
        check=False))


STORED = [  # (record, correct, reason)
    ({"answer": "1/2", "text": "so \\boxed{0.5}", "extra": [1, None]}, True, "equal"),
    ({"answer": 7.0, "text": "the answer is 8."}, False, "different"),
    ({"answer": "B", "text": "I think (B)", "choices": ["cat", "dog"]}, True, "equal"),
    ({"answer": "dog", "text": "\\boxed{A}", "choices": ["cat", "dog"]}, False, "different"),
    ({"answer": "", "text": "\\boxed{}"}, False, "bad_gold"), ({"answer": "yes", "text": "Yes."}, True, "equal"),
    ({"answer": "She has 3\n#### 3", "text": "A: 3"}, True, "equal"), ({"answer": "2", "text": "\ud800\n"}, False,
    "different"),
    ({"answer": "2", "text": "none\nat all"}, False, "no_answer"),
    ({"answer": "2", "text": "\\boxed{9^{9^{9^9}}}"}, False, "timeout"), ({"id": "toy/test/1", "text": "15"}, True,
    "equal")]


def test_regrade(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record, _, _ in STORED))
    flags = ["--regrade", path, "--sets", TOY / "test.jsonl"]
    done = launch(tmp_path, "eval.py", *flags)
    assert lines(tmp_path / "answers.graded.jsonl") == [{**r, "correct": c, "reason": w} for r, c, w in STORED]
    assert "5 of 11 correct (45.5%" in done.stdout and not (tmp_path / "runs").exists()
    (tmp_path / "mine.py").write_text("def never(problem, text):\n    return False, problem['answer']\n")
    launch(tmp_path, "eval.py", *flags, "--grader", "mine.py:never")
    graded = lines(tmp_path / "answers.graded.jsonl")
    assert not any(r["correct"] for r in graded) and graded[0]["reason"] == "1/2" and graded[-1]["reason"] == "15"
    for line, words in {"{": "answers.jsonl:12: ", '{"text": "7"}': "no 'answer'",
        '{"answer": "7"}': "a text under 'text'",
                        '{"answer": [], "text": ""}': "",
                            '{"answer": "C", "text": "", "choices": ["a"]}': "none of the choices"}.items():
        before = (tmp_path / "answers.graded.jsonl").read_text()
        path.write_text("".join(json.dumps(record) + "\n" for record, _, _ in STORED) + line + "\n")
        done = launch(tmp_path, "eval.py", *flags, check=bool(not words))
        assert not words or words in error_of(done) and (tmp_path / "answers.graded.jsonl").read_text() == before
    assert "no such .jsonl file" in error_of(launch(tmp_path, "eval.py", "--regrade", "none.jsonl", check=False))
