"""The four scripts as a user starts them: loop and records, decisions, kills, processes, refusals, arms."""
import fcntl
import functools
import importlib
import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import common
from conftest import ROOT, SCRIPTS, SMALL, TOY, counts, error_of, files, forget, killed_when, launch, lines

DRAWN = {"dast.py": ["responses"], "adastar.py": ["responses_0"], "hs_star.py": ["presamples", "resamples"],
         "sai_dpo.py": ["probe", "responses"]}  # what a round draws
EVAL = {"eval.json", "eval.jsonl"}
HELD_OUT = {"eval_held_out.json", "eval_held_out.jsonl"}
EXAMPLES = {"eval_examples.json", "eval_examples.jsonl"}  # the base with examples in the prompt
HELD_OUT_EXAMPLES = {"eval_examples_held_out.json", "eval_examples_held_out.jsonl"}
MORE = {"dast.py": set(), "adastar.py": HELD_OUT, "hs_star.py": {"prerewards.jsonl", "rerewards.jsonl"},
        "sai_dpo.py": set()}
ROUND_0 = {"dast.py": {"probe.jsonl", "eval_base.json", "eval_base.jsonl", *EXAMPLES, "model", "steps.jsonl", *EVAL},
           "adastar.py": {*EVAL, *HELD_OUT, *EXAMPLES, *HELD_OUT_EXAMPLES},
           "hs_star.py": EVAL, "sai_dpo.py": {"clusters.jsonl", *EVAL}}
TRAINED = {"dast.py": lambda s: [[draw] for draw in s["chosen"]],
           "adastar.py": lambda s: [[draw] for draw in s["chosen"]],
           "hs_star.py": lambda s: s["pairs"],
           "sai_dpo.py": lambda s: [s["pair"]] if s["pair"] else []}  # draws of a problem that are trained on
PARAMETERS = sum(tensor.numel() for tensor in load_file(TOY / "model" / "model.safetensors").values())
README = (ROOT / "README.md").read_text()
EXPLAINED = (TOY.parent / "studies/details.md").read_text().partition("## What a run leaves")[2].partition("\n## ")[0]
each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(script): a finished run with SMALL; whole(script, n): its second round by n processes."""
    @functools.cache
    def run_of(script, processes=0):
        folder = tmp_path_factory.mktemp("whole")
        if processes:
            before_round(run_of(script), folder, 2)
        launch(folder, script, *SMALL[script], "--name", "one", processes=processes)
        return folder / "runs" / "one"
    return run_of


def before_round(run, folder, t):
    """Copy a run into folder/runs/one as it was when round t began; returns the copy."""
    copy = folder / "runs" / "one"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(*(f"round_{later}" for later in range(t, 9))))
    earlier = [m for m in lines(run / "metrics.jsonl") if m["round"] < t and m["phase"] != "reported"]
    common.write(copy / "metrics.jsonl", earlier)
    return copy


def without_constants(run, folder, *names):
    """Copy a run into folder/runs/one so that other constants may resume it, without `names` (patterns)."""
    copy = folder / "runs" / "one"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("constants.json", "metrics.jsonl", *names))
    return copy


def metrics_of(run):
    return {(m["round"], m["phase"]): m for m in lines(run / "metrics.jsonl")}


def selection_of(run, t=1):
    return lines(run / f"round_{t}" / "selection.jsonl")


def responses_of(run, script, t=1):
    """All draws of a round that its selection is made from, numbered as there."""
    folder = run / f"round_{t}"
    if script == "hs_star.py":
        more = [{**r, "draw": r["draw"] + 3} for r in lines(folder / "resamples.jsonl")]
        return lines(folder / "presamples.jsonl") + more
    found = []
    for path in sorted(folder.glob("responses*.jsonl")):
        found += lines(path)
    return found


def write_problems(path, n):
    """The first n problems of the toy, as problem and answer alone."""
    common.write(path, [{"problem": p["problem"], "answer": p["answer"]} for p in lines(TOY / "train.jsonl")[:n]])


def resumed(folder, script, *flags, **options):
    """Run a script in a folder's run "one", with SMALL."""
    return launch(folder, script, *SMALL[Path(script).name], "--name", "one", *flags, **options)


# The loop and what it leaves ------------------------------------------------------------------------------------------

def of_round(script):
    """The names of what a round leaves."""
    drawn = {f"{name}.jsonl" for name in DRAWN[script]}
    return drawn | MORE[script] | {"selection.jsonl", "train.jsonl", "model", "steps.jsonl", *EVAL}


@each_script
def test_loop_leaves_the_documented_files(whole, script):
    run = whole(script)
    found = {path.name: {file.name for file in path.iterdir()} for path in run.glob("round_*")}
    assert found == {"round_0": ROUND_0[script], "round_1": of_round(script), "round_2": of_round(script)}
    names = {"constants.json", "metrics.jsonl", "lock", script, "common.py", "max_tokens_1.json"}
    assert {path.name for path in run.iterdir()} == names | found.keys()
    about = common.read(run / "constants.json")
    assert about.keys() == {"script", "constants", "code", "command", "machine", "versions"}
    assert about["constants"]["ENGINE"] == "transformers" and about["versions"]["torch"]


def names_in(text):
    """What stands in backquotes."""
    return set(re.findall(r"`(\w+)`", text))


def keys_of(value):
    """The keys of a record and of the records inside it, without the number of a cluster, a block or a quantile."""
    keys = {re.match(r"[A-Za-z_]*", key)[0].rstrip("_") for key in value}
    for inner in value.values():
        if isinstance(inner, dict):
            keys |= keys_of(inner)
    return keys - {""}


def explained(phase):
    """What the rows of the table name for a phase."""
    known = {"round", "phase", "seconds"}
    for phases, text in re.findall(r"(?m)^\| ([^|]+) \| (.+) \|$", EXPLAINED):
        if phase in re.findall(r"\w+", phases):
            known |= names_in(text)
            if "both FLOPs" in text:
                known |= {"flops", "spent_flops"}
    return known


@each_script
def test_files_and_keys_of_a_run_are_explained_in_readme(whole, script):
    run = whole(script)
    for metrics in lines(run / "metrics.jsonl"):
        phase = re.sub(r"_\d+$", "", metrics["phase"])  # responses_0 is a block of responses
        if "verdicts" in metrics:
            metrics["verdicts"] = {}  # its keys are reasons, a grader's own ones too
        assert keys_of(metrics) <= explained(phase), phase
    for name in "selection.jsonl", "steps.jsonl":
        for record in lines(run / "round_1" / name):
            assert set(record) <= names_in(EXPLAINED), name
    for path in run.rglob("*"):
        if path.is_file() and path.parent.name != "model" and path.suffix != ".py":  # copies of the code
            assert path.name in EXPLAINED, path


@pytest.mark.parametrize("script, base", [("dast.py", "eval_base"), ("adastar.py", "eval")])
def test_base_is_scored_as_what_comes_after_it_and_with_examples(whole, script, base):
    lengths = {}
    for name in (f"round_0/{base}", "round_1/eval", "round_0/eval_examples"):
        lengths[name] = [r["prompt_tokens"] for r in lines(whole(script) / f"{name}.jsonl")]
    before, after, with_examples = lengths.values()
    assert before == after and all(more > n for n, more in zip(before, with_examples))


@pytest.mark.parametrize("script, base", [("dast.py", "eval_base"), ("adastar.py", "eval")])
def test_base_is_scored_once_where_prompts_have_no_examples(tmp_path, script, base):
    flags = ["--prompt", "zero_shot", "--rounds", "0", "--held-out", "0", "--name", "one"]
    if script == "dast.py":
        flags += ["--variant", "P"]
    launch(tmp_path, script, *SMALL[script], *flags)
    names = {path.name for path in (tmp_path / "runs/one/round_0").iterdir()}
    assert f"{base}.json" in names and "eval_examples.json" not in names


@each_script
def test_responses_have_the_documented_fields(whole, script):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    fields = {"id", "draw", "text", "ids", "tokens", "finish", "prompt_tokens", "correct", "reason"}
    for name in DRAWN[script]:
        for r in lines(whole(script) / "round_1" / f"{name}.jsonl"):
            assert r.keys() == fields and "Question:" not in r["text"]
            assert r["finish"] in ("stop", "length") and 1 <= r["tokens"] <= 48
            if r["ids"] is not None:  # null: a stop string begins inside a token
                assert tokenizer.decode([int(token) for token in r["ids"].split()]).strip() == r["text"]


@each_script
def test_metrics_add_up(whole, script):
    metrics = metrics_of(whole(script))
    flops = 0
    for (t, phase), m in metrics.items():
        if t == 1 and phase in DRAWN[script]:
            assert m["flops"] == 2 * PARAMETERS * (m["prompt_tokens"] + m["tokens"]) <= m["spent_flops"]
            assert m["draws"] == sum(m["verdicts"].values()) <= m["spent_draws"]
        if t == 1 and not phase.startswith(("eval", "round")):
            flops += m.get("flops", 0)
    train = metrics[1, "train"]
    assert train["flops"] == PARAMETERS * (6 * train["tokens"] + 2 * train["reference_tokens"])
    assert metrics[1, "round"]["total_flops"] == flops + metrics[0, "round"]["total_flops"]


@each_script
def test_answers_to_test_problems_are_kept(whole, script):
    for t in (0, 1, 2):
        answers = lines(whole(script) / f"round_{t}" / "eval.jsonl")
        score = common.read(whole(script) / f"round_{t}" / "eval.json")
        assert score["correct"] == {a["id"]: int(a["correct"]) for a in answers}
        assert score["accuracy"] == sum(score["correct"].values()) / 4
        assert score["accuracy"] == metrics_of(whole(script))[t, "eval"]["accuracy"]


@pytest.mark.parametrize("script", ["hs_star.py", "sai_dpo.py"])
def test_dpo_begins_where_policy_and_reference_are_the_same(whole, script):
    for t in (1, 2):
        steps = lines(whole(script) / f"round_{t}" / "steps.jsonl")
        assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)


@each_script
def test_finished_run_is_left_alone(whole, tmp_path, script):
    """Though it is on another machine, and asks for fewer rounds."""
    run = shutil.copytree(whole(script), tmp_path / "runs" / "two")
    flags = ["--name", "two", "--rounds", "1", "--max-tokens", "512", "--recompute"]
    done = launch(tmp_path, script, *SMALL[script], *flags)
    assert f"{script} resumes in runs/two" in done.stdout
    assert files(run) == files(whole(script))
    assert counts(run) == counts(whole(script))


# Decisions, from the records alone ------------------------------------------------------------------------------------

RECORDED = SimpleNamespace(rng=lambda *key: np.random.default_rng(common.seed_of(0, *key)))  # a run, seed 0


@pytest.fixture
def rules(monkeypatch, alone):
    """rules(script, run): the script as a module with the constants of a run, and that run's problems."""
    def module_of(script, run):
        module = importlib.import_module(script.removesuffix(".py"))
        for name, value in json.loads((run / "constants.json").read_text())["constants"].items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tuple(value) if isinstance(value, list) else value)
        monkeypatch.chdir(ROOT)  # the toy's files are named from here
        problems = common.load_problems(module.TRAIN_DATA, "train", "", module.N_TRAIN)
        return module, common.hold_out(problems, module.HELD_OUT, 0)[0]
    return module_of


def test_dast_selection_follows_from_the_records(whole, rules):
    run = whole("dast.py")
    dast, problems = rules("dast.py", run)
    probe = lines(run / "round_0" / "probe.jsonl")
    budgets = []
    for probed in common.by_problem(probe).values():
        budgets.append(dast.target_and_budget(dast.level_of(dast.pass_rate(probed)))[1])
    for t in (1, 2):
        selection = dast.select(problems, probe, responses_of(run, "dast.py", t), budgets, RECORDED, t)
        assert json.loads(json.dumps(selection)) == selection_of(run, t)
        for s in selection:  # drawn until there were enough
            assert len({*s["outcomes"][:-1]} - {0}) < s["target"]
            assert len(s["chosen"]) == s["target"] or len(s["outcomes"]) == s["budget"]


def test_adastar_walk_follows_from_the_records(whole, rules):
    run = whole("adastar.py")
    adastar, problems = rules("adastar.py", run)
    last = np.zeros(len(problems), int)
    w = np.zeros(len(problems))
    rate = 0.5
    for t in (1, 2):
        blocks = sorted((run / f"round_{t}").glob("responses_*.jsonl"))

        def draw(block):
            drawn = common.by_problem(lines(blocks.pop(0)))
            assert list(drawn) == [problems[i]["id"] for i in block]
            return {i: drawn[problems[i]["id"]] for i in block}

        order = adastar.walk_order(last, w, RECORDED.rng(t, "order"))
        visited = adastar.walk(order, adastar.beta_of(t), rate, draw)
        selection = adastar.select(problems, visited, last, w, adastar.beta_of(t), RECORDED.rng(t, "cut"))
        assert json.loads(json.dumps(selection)) == selection_of(run, t)
        rate = selection[0]["alpha"]
        for i, s in zip(visited, selection):
            if s["committed"]:
                last[i] = t
                w[i] = s["win_rate"]


def test_hs_star_selection_follows_from_the_records(whole, rules):
    run = whole("hs_star.py")
    hs_star, problems = rules("hs_star.py", run)
    for t in (1, 2):
        own = [problems[i] for i in hs_star.slice_of(len(problems), t, RECORDED)]
        folder = run / f"round_{t}"
        rewards = lines(folder / "prerewards.jsonl") + lines(folder / "rerewards.jsonl")
        drawn = []
        for response, reward in zip(responses_of(run, "hs_star.py", t), rewards, strict=True):
            drawn.append({**reward, **response})
        difficulties = hs_star.classify(own, [r for r in drawn if r["draw"] < 3])
        quotas = hs_star.quotas([name for _, _, name in difficulties], RECORDED.rng(t, "quotas"))
        selection = hs_star.select(own, difficulties, quotas, drawn, RECORDED, t)
        assert json.loads(json.dumps(selection)) == selection_of(run, t)
        assert sum(len(s["outcomes"]) for s in selection) == 8 * 16  # the whole budget
    assert {s["class"] for s in selection_of(run) + selection} == {"inlier", "boundary", "outlier"}


def test_sai_dpo_selection_follows_from_the_records(whole, rules):
    run = whole("sai_dpo.py")
    sai_dpo, problems = rules("sai_dpo.py", run)
    groups = sai_dpo.group(problems, sai_dpo.tags_of(problems, []), RECORDED)
    assert json.loads(json.dumps(groups)) == lines(run / "round_0" / "clusters.jsonl")
    clusters = np.array([g["cluster"] for g in groups])
    unused = np.flatnonzero([not g["probed"] for g in groups])
    probed = clusters[[g["probed"] for g in groups]]
    for t in (1, 2):
        rates = np.array([row["p"] for row in sai_dpo.measure(lines(run / f"round_{t}" / "probe.jsonl"))])
        masses = sai_dpo.error_masses(rates, probed, np.bincount(clusters[unused], minlength=3))
        shares = sai_dpo.shares_of(masses)
        weights = sai_dpo.weights_of(shares, rates, probed)
        chosen = sai_dpo.draw(unused, clusters, weights, 20, RECORDED.rng(t, "draw"))
        unused = np.setdiff1d(unused, chosen)  # 40 of 42
        selection = sai_dpo.select(clusters[chosen], masses, shares, weights, responses_of(run, "sai_dpo.py", t),
                                   RECORDED, t)
        assert json.loads(json.dumps(selection)) == selection_of(run, t)


@each_script
def test_training_examples_are_the_chosen_answers(whole, script):
    responses = responses_of(whole(script), script)
    text = {(r["id"], r["draw"]): (r["text"], r["ids"]) for r in responses}
    expected = []
    for s in selection_of(whole(script)):
        trained = TRAINED[script](s)
        for draws, copies in zip(trained, s.get("copies", [1] * len(trained))):
            expected += [(s["id"], [text[s["id"], draw] for draw in draws])] * copies
    found = [(e["id"], list(zip(e["completions"], e["ids"]))) for e in lines(whole(script) / "round_1" / "train.jsonl")]
    assert len(expected) > 4 and found[:len(expected)] == expected
    assert len(found) - len(expected) == (14 if script == "dast.py" else 0)  # D_o


# Kills and processes --------------------------------------------------------------------------------------------------

def answered(run):
    """Some answers of the second round are kept, of a phase that is not finished."""
    return any(path.stat().st_size > 100 for path in run.glob("unfinished/round_2-*@*.jsonl"))


def rewarded(run):
    return any(run.glob("unfinished/round_2-rerewards@*.jsonl"))


def selected(run):
    return (run / "round_2" / "selection.jsonl").exists()


def stepped(run):
    return (run / "unfinished" / "round_2-step_0000001").exists()


@pytest.mark.parametrize("script, processes, places", [
    ("dast.py", 0, [answered, selected, stepped]), ("dast.py", 2, [stepped]),
    ("adastar.py", 0, [answered, stepped]), ("adastar.py", 2, [answered, stepped]),
    ("hs_star.py", 0, [answered, rewarded, stepped]), ("hs_star.py", 2, [rewarded]),
    ("sai_dpo.py", 0, [answered, stepped]), ("sai_dpo.py", 2, [stepped])])
def test_killed_in_each_kind_of_phase(whole, tmp_path, script, processes, places):
    """While it samples, while it trains, in between: the last rerun leaves the same files and counts."""
    run = before_round(whole(script), tmp_path, 2)
    flags = [*SMALL[script], "--name", "one", "--save-minutes", "0"]
    for there in places:
        killed_when(tmp_path, script, flags, there, processes=processes)
        assert not (run / "round_2" / "model").exists()
    done = launch(tmp_path, script, *flags, processes=processes)
    assert ("training resumes after step 1" in done.stdout) == (stepped in places)
    assert files(run) == files(whole(script, processes))
    assert counts(run) == counts(whole(script, processes))


def test_training_killed_on_two_processes_resumes_on_one(whole, tmp_path):
    """What was saved inside the training is not lost when the number of processes changes."""
    run = before_round(whole("adastar.py", 2), tmp_path, 2)
    forget(run, "max_tokens_1.json")  # made anew on one process, while the training is unfinished
    flags = [*SMALL["adastar.py"], "--name", "one", "--save-minutes", "0"]
    killed_when(tmp_path, "adastar.py", flags, stepped, processes=2)
    done = launch(tmp_path, "adastar.py", *flags)
    assert "training resumes after step" in done.stdout


def test_one_of_two_killed_ends_the_other(whole, tmp_path):
    """Under the real torchrun; two processes then leave the same files."""
    run = before_round(whole("sai_dpo.py"), tmp_path, 2)
    flags = [*SMALL["sai_dpo.py"], "--name", "one"]
    killed_when(tmp_path, "sai_dpo.py", flags, answered, processes=2, one=True, torchrun=True)
    assert not (run / "round_2" / "eval.json").exists()
    launch(tmp_path, "sai_dpo.py", *flags, processes=2)
    assert files(run) == files(whole("sai_dpo.py", 2))


@pytest.mark.parametrize("script, processes", [*((script, 2) for script in SCRIPTS), ("adastar.py", 4)])
def test_processes_draw_and_decide_the_same_as_one(whole, script, processes):
    """From one and the same model: the same records, and weights to 1e-4."""
    one = whole(script) / "round_2"
    more = whole(script, processes) / "round_2"
    for name in of_round(script) - {"model", "steps.jsonl", *EVAL, *HELD_OUT}:
        assert (one / name).read_bytes() == (more / name).read_bytes(), name
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, more))
    for name in first:
        assert (first[name] - second[name]).norm() <= 1e-4 * first[name].norm(), name


def test_ctrl_c_is_one_line(whole, tmp_path):
    before_round(whole("dast.py"), tmp_path, 2)
    flags = [*SMALL["dast.py"], "--name", "one"]
    done = killed_when(tmp_path, "dast.py", flags, answered, how=signal.SIGINT)
    assert "stopped; finished phases are kept, and the same command resumes" in error_of(done, 130)


# What a rerun may change, and what is refused -------------------------------------------------------------------------

def test_changed_constants_are_refused_with_the_list(whole, tmp_path):
    run = shutil.copytree(whole("dast.py"), tmp_path / "runs" / "one")
    line = error_of(resumed(tmp_path, "dast.py", "--temperature", "0.5", "--seed", "3", "--save-minutes", "1",
                            "--rounds", "5", check=False))
    assert "with different constants or code than " in line and "(SEED 0 -> 3; TEMPERATURE " in line
    assert "SAVE_MINUTES" not in line and "ROUNDS" not in line
    assert files(run) == files(whole("dast.py"))


def test_other_contents_under_the_same_name_are_refused(tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "model")
    write_problems(tmp_path / "p.jsonl", 12)
    flags = [*SMALL["sai_dpo.py"], "--rounds", "0", "--model", "model", "--train-data", "p.jsonl"]
    launch(tmp_path, "sai_dpo.py", *flags)
    write_problems(tmp_path / "p.jsonl", 13)
    assert "problems or models" in error_of(launch(tmp_path, "sai_dpo.py", *flags, check=False))
    write_problems(tmp_path / "p.jsonl", 12)
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert "problems or models" in error_of(launch(tmp_path, "sai_dpo.py", *flags, check=False))


def edited(folder, script, old, new):
    """A copy of a script with an edit, to be started in place of the script."""
    text = (ROOT / script).read_text()
    assert old in text
    (folder / "edited").mkdir(exist_ok=True)
    (folder / "edited" / script).write_text(text.replace(old, new, 1))
    return folder / "edited" / script


def test_changed_code_is_refused_and_kept_with_keep(whole, tmp_path):
    run = shutil.copytree(whole("sai_dpo.py"), tmp_path / "runs" / "one")
    new = edited(tmp_path, "sai_dpo.py", "def main():", "def main():\n    say('edited')")
    line = error_of(resumed(tmp_path, new, check=False))
    assert "(sai_dpo.py '" in line and "--keep to resume with the new code" in line
    resumed(tmp_path, new, "--keep")
    old, added = common.read(run / "constants.json")["code"]
    assert old["sai_dpo.py"] != added["sai_dpo.py"] and old["common.py"] == added["common.py"]
    assert (run / "sai_dpo.1.py").read_text() == new.read_text()


@each_script
def test_comments_docstrings_and_machine_defaults_are_no_code(whole, tmp_path, script):
    shutil.copytree(whole(script), tmp_path / "runs" / "one")
    new = edited(tmp_path, script, "def main():", "# a comment\n\ndef main():")
    text = new.read_text().replace('"""', '"""Other words. ', 1)
    new.write_text(text.replace("SAVE_MINUTES = 30.0", "SAVE_MINUTES = 20.0"))
    resumed(tmp_path, new)


def test_changed_common_is_refused(whole, tmp_path):
    shutil.copytree(whole("sai_dpo.py"), tmp_path / "runs" / "one")
    edited(tmp_path, "common.py", "def say(", "def another():\n    pass\n\n\ndef say(")
    script = edited(tmp_path, "sai_dpo.py", "def main():", "# a comment\n\ndef main():")
    done = resumed(tmp_path, script, processes=1, torchrun=True, check=False)
    assert "(common.py '" in done.stderr and "sai_dpo.py '" not in done.stderr


def test_script_without_a_machine_constant_fails_in_one_line(tmp_path):
    script = edited(tmp_path, "sai_dpo.py", "EAGER = False", "# EAGER = False")
    script.write_text(script.read_text().replace("EAGER=True, ", ""))  # of TOY
    line = error_of(resumed(tmp_path, script, check=False))
    assert "the constant EAGER is missing" in line


def test_folder_of_another_script_or_in_use_is_refused(whole, tmp_path):
    run = shutil.copytree(whole("sai_dpo.py"), tmp_path / "runs" / "one")
    line = error_of(resumed(tmp_path, "dast.py", check=False))
    assert "runs/one was made by sai_dpo.py with different " in line and "choose a different --name" in line
    with open(run / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = error_of(resumed(tmp_path, "dast.py", check=False))
    assert "runs/one is in use by another program; wait until it ends or choose a different --name" in line


# Failures -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, bytes", [("adastar.py", 3_000), ("sai_dpo.py", 200_000)])
def test_full_disk_is_one_line_and_a_rerun_resumes(whole, tmp_path, script, bytes):
    """Too small for a round's answers; too small for a model's weights."""
    run = before_round(whole(script), tmp_path, 2)
    line = error_of(resumed(tmp_path, script, bytes=bytes, check=False))
    assert "File too large" in line and "finished phases are kept" in line
    resumed(tmp_path, script)
    assert files(run) == files(whole(script))


def test_escaped_exception_is_one_line_with_a_log(whole, tmp_path):
    run = before_round(whole("sai_dpo.py"), tmp_path, 2)
    common.write(run / "round_2" / "probe.jsonl", [{}])
    line = error_of(resumed(tmp_path, "sai_dpo.py", check=False))
    assert "sai_dpo.py: error: KeyError: 'id' (runs/one/error.log)" in line
    assert (run / "error.log").read_text().startswith("Traceback (most recent call last)")


def test_failed_start_is_no_run(tmp_path):
    """What was wrong may be fixed under the same name."""
    shutil.copytree(TOY / "model", tmp_path / "m")
    config = common.read(TOY / "model" / "config.json")
    common.write(tmp_path / "m" / "config.json", config | {"max_position_embeddings": 150})
    flags = [*SMALL["dast.py"], "--rounds", "0", "--model"]
    line = error_of(launch(tmp_path, "dast.py", *flags, "m", check=False))
    assert "exceeds the context of 150" in line
    assert "dast.py starts in" in launch(tmp_path, "dast.py", *flags, TOY / "model").stdout


# Models on disk -------------------------------------------------------------------------------------------------------

@each_script
def test_keep_models_deletes_what_is_not_needed(whole, tmp_path, script):
    """All but the current, DAST's first and AdaSTaR's best; a rerun works without them."""
    run = shutil.copytree(whole(script), tmp_path / "runs" / "one")
    for _ in range(2):
        resumed(tmp_path, script, "--keep-models", "1", "--rounds", 3)
        needed = {3}
        if script == "dast.py":
            needed.add(0)
        if script == "adastar.py":
            needed.add(metrics_of(run)[0, "reported"]["iteration"])
        assert {int(path.parts[-3][6:]) for path in run.glob("round_*/model/*.safetensors")} == needed
    assert selection_of(run, 2) == selection_of(whole(script), 2)


# Arms, prompts and starts ---------------------------------------------------------------------------------------------

LIMITS = {"E": (1, 2), "M": (2, 4), "H": (3, 6), "U": (4, 8)}


@pytest.mark.parametrize("script, flags, holds", [
    ("dast.py", ["--variant", "P"], lambda s: (s["target"], s["budget"]) == LIMITS[s["level"]]),
    ("dast.py", ["--variant", "L"], lambda s: s["target"] is None and s["budget"] == len(s["outcomes"]) == 2),
    # AdaSTaR: STaR-Acc-Full-K, Algorithm 1 to the letter, up to three retries with the answer shown
    ("adastar.py", ["--no-stop-at-beta", "--train-on-all", "--k-samples", "3", "--no-retry", "--traces", "0"],
     lambda s: len(s["outcomes"]) == 3 and s["copies"] == [1] * sum(s["outcomes"])),
    ("adastar.py", ["--k-samples", "4", "--hint", "--order", "random"],
     lambda s: 1 not in s["outcomes"][:-1]),
    # HS-STaR: uniform iterative DPO, no reward model, rewards alone
    ("hs_star.py", ["--pre-samples", "8"], lambda s: len(s["outcomes"]) == 8 and s["quota"] == 0),
    ("hs_star.py", ["--difficulty", "accuracy", "--pairing", "random", "--prm", ""],
     lambda s: (s["class"] == "boundary") == (0 < s["phi_a"] < 1) and not any(s["rewards"])),
    ("hs_star.py", ["--difficulty", "reward", "--tau-low", "0.3", "--tau-high", "0.6", "--nll-weight", "1"],
     lambda s: (s["class"] == "boundary") == (0.3 <= s["phi_r"] <= 0.6)),
    ("sai_dpo.py", ["--select", "random", "--pairs-per-round", "2"], lambda s: s["weight"] is None),
    ("sai_dpo.py", ["--select", "knowledge"], lambda s: s["weight"] == s["share"]),
    ("sai_dpo.py", ["--select", "static", "--no-difficulty-before", "--prefer", "hardest"],
     lambda s: s["weight"] == s["share"])])
def test_arms_draw_and_choose_otherwise(whole, tmp_path, script, flags, holds):
    run = without_constants(whole(script), tmp_path, "round_1", "round_2")
    resumed(tmp_path, script, "--rounds", "1", *flags)
    assert all(holds(s) for s in selection_of(run))
    assert any(TRAINED[script](s) for s in selection_of(run)) and (run / "round_1" / "model").exists()


def test_dast_controls_draw_and_train_as_much_as_another_run(whole, tmp_path):
    run = without_constants(whole("dast.py"), tmp_path, "round_1", "round_2")
    like = whole("dast.py")
    resumed(tmp_path, "dast.py", "--rounds", "1", "--variant", "", "--draws-like", like, "--size-like", like)
    draws = [sum(len(s["outcomes"]) for s in selection_of(folder)) for folder in (run, like)]
    trained = [len(lines(folder / "round_1" / "train.jsonl")) for folder in (run, like)]
    assert draws[0] == draws[1] and trained[0] == trained[1]
    budgets = [s["budget"] for s in selection_of(run)]
    assert max(budgets) - min(budgets) <= 1


def test_dast_dpo_trains_on_pairs_of_right_and_wrong(whole, tmp_path):
    run = without_constants(whole("dast.py"), tmp_path, "round_2", "selection.jsonl", "train.jsonl")
    forget(run, "round_1/model", "round_1/eval.json", "round_1/eval.jsonl")
    resumed(tmp_path, "dast.py", "--rounds", "1", "--loss", "dpo")
    drawn = {(r["id"], r["draw"]): r for r in responses_of(run, "dast.py")}
    solution = {f"toy/train/{n}": p["solution"] for n, p in enumerate(lines(TOY / "train.jsonl"), 1)}
    pairs = [(s["id"], *pair) for s in selection_of(run) for pair in s["pairs"]]
    for (i, better, worse), example in zip(pairs, lines(run / "round_1" / "train.jsonl"), strict=True):
        preferred = solution[i] if better is None else drawn[i, better]["text"]
        assert (example["id"], example["completions"]) == (i, [preferred, drawn[i, worse]["text"]])
        assert not drawn[i, worse]["correct"] and drawn[i, worse]["finish"] == "stop"
    steps = lines(run / "round_1" / "steps.jsonl")
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert steps[-1]["loss"] < 0.69 and steps[-1]["margin"] > 0 and len(pairs) > 4
    train = metrics_of(run)[1, "train"]
    assert train["tokens"] == 3 * train["reference_tokens"] > 0  # three epochs, and the reference once


@each_script
def test_start_decides_which_weights_are_trained(whole, tmp_path, script):
    run = without_constants(whole(script), tmp_path)
    forget(run, "round_2/model", "round_2/eval.json", "round_2/eval.jsonl")
    resumed(tmp_path, script, "--start", "previous" if script == "dast.py" else "base")
    weights = "round_2/model/model.safetensors"
    assert (whole(script) / weights).read_bytes() != (run / weights).read_bytes()


@each_script
def test_chat_prompts_problems_held_out_and_without_solutions(tmp_path, script):
    """Drawn and trained as turns of a chat, from answers alone; DAST then leaves round 0 out."""
    write_problems(tmp_path / "p.jsonl", 23)
    (tmp_path / "odd.py").write_text("def grade(problem, text):\n    return len(text) % 2 == 1, 'odd'\n")
    done = resumed(tmp_path, script, "--rounds", "1", "--prompt", "chat", "--shots", "1", "--train-data", "p.jsonl",
                   "--max-new-tokens", "24", "--held-out", "3", "--grader", "odd.py:grade", "--think", "off")
    assert "its chat template does not know --think" in done.stdout
    assert "\ntest  " in done.stdout and "\nheld out  " in done.stdout
    run = tmp_path / "runs" / "one"
    for example in lines(run / "round_1" / "train.jsonl"):
        assert example["prompt"].endswith("<|im_start|>assistant\n") and example["end"] == "<|im_end|>"
    held_out = common.read(run / "round_1" / "eval_held_out.json")["correct"]
    assert len(held_out) == 3 and not held_out.keys() & {s["id"] for s in selection_of(run)}
    if script == "dast.py":
        assert "D_o is empty" in done.stdout and not (run / "round_0" / "model").exists()


def test_wandb_gets_the_metrics_under_one_id(tmp_path):
    """wandb itself is not installed here: a stand-in writes down what it is told."""
    (tmp_path / "wandb.py").write_text(
        "import json\ndef tell(**values):\n    print(json.dumps(values), file=open('told', 'a'))\n"
        "class Told:\n    log = staticmethod(lambda values: tell(logged=values))\n    finish = staticmethod(tell)\n"
        "def init(**values):\n    tell(**values)\n    return Told\n")
    script = tmp_path / "sai_dpo.py"
    script.write_text(f"import sys\nsys.path[:0] = {[str(ROOT), str(tmp_path)]}\n" + (ROOT / "sai_dpo.py").read_text())
    for _ in range(2):
        launch(tmp_path, script, *SMALL["sai_dpo.py"], "--rounds", "0", "--wandb")
    told = lines(tmp_path / "told")
    starts = [entry for entry in told if "project" in entry]
    assert len(starts) == 2 and starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"
    assert any("eval/draws" in entry.get("logged", {}) for entry in told) and told[-1] == {"exit_code": 0}


@each_script
def test_model_stays_where_nothing_is_correct(tmp_path, script):
    write_problems(tmp_path / "p.jsonl", 12)
    (tmp_path / "never.py").write_text("def grade(problem, text):\n    return False, 'no'\n")
    done = resumed(tmp_path, script, "--rounds", "1", "--train-data", "p.jsonl", "--max-new-tokens", "24",
                   "--grader", "never.py:grade")
    assert "the model stays as it is" in done.stdout
    names = {path.name for path in (tmp_path / "runs" / "one" / "round_1").iterdir()}
    assert "eval.json" in names and "model" not in names
