"""eval.py --compare: what runs reached and spent, against small folders written by hand, and on a real run."""
import json
import struct

import pytest

import common
import eval
from conftest import error_of, launch

IDS = ["s/test/0", "s/test/1", "s/test/2", "s/test/3"]


def make_run(folder, seed, tokens, right, selection=(), held_out=0, **constants):
    """A run's folder: the base, round 0 and one more for each of `tokens` generated; right: the numbers of the IDS that
    are right in the base and in each round; selection: its lines in round 1. The last of the IDS may be held out."""
    problems = [{"id": i, "level": 1 + number // 2} for number, i in enumerate(IDS)]
    for problem in problems[len(IDS) - held_out:]:
        problem["id"] = problem["id"].replace("test", "train")
    metrics = []
    for t, numbers in zip(["base", *range(len(tokens) + 1)], right):
        answers = [{"id": p["id"], "correct": i in numbers, "finish": "stop"} for i, p in enumerate(problems)]
        name = "round_0/eval_base.json" if t == "base" else f"round_{t}/eval.json"
        common.write(folder / name, common.score(problems, answers))
        if t == "base":
            continue
        for block in range(2 * bool(t)):  # as adastar.py draws
            metrics.append({"round": t, "phase": f"responses_{block}", "draws": 9, "tokens": tokens[t - 1] // 2,
                            "flops": 5, "seconds": 1.5})
        metrics += [{"round": t, "phase": "train", "tokens": 7, "flops": 100, "seconds": 2},
                    {"round": t, "phase": "eval", "draws": 4, "tokens": 5000, "flops": 1e9, "seconds": 1},
                    {"round": t, "phase": "round", "total_flops": 1}]
    common.write(folder / "metrics.jsonl", metrics)
    common.write(folder / "round_1" / "selection.jsonl", list(selection))
    constants = {"SEED": seed, "NAME": folder.name, **constants}
    common.write(folder / "constants.json", {"script": "fifth.py", "constants": constants})
    return folder


@pytest.fixture
def two_runs(tmp_path):
    """For as many tokens as the one has after two rounds, the other has generated 300, half way through its second.
    Neither says what it trained on by `copies` or `pairs`."""
    first = make_run(tmp_path / "runs/a-0", 0, [100, 200], [[], [], [0], [0, 1]],
                     [{"id": "s/train/p", "outcomes": [0, 1, 1, -1]}, {"id": "s/train/q", "outcomes": [0]}], MODEL="m")
    second = make_run(tmp_path / "runs/b-0", 0, [200, 200], [[], [], [0, 3], [0, 1, 2, 3]],
                      [{"id": "s/train/q", "outcomes": [1, 1]}, {"id": "s/train/r"}], MODEL="n", EPOCHS=2)
    common.write(second / "round_0/probe.jsonl", [{"id": "s/train/q", "correct": right} for right in (1, 1, 0, 1, 1)])
    common.write(second / "round_1/train.jsonl", [{"id": "s/train/q"}] * 4)
    return first, second


def test_costs_add_up_without_scoring(two_runs):
    rounds = eval.Past(two_runs[0]).rounds
    spent = [tuple(r[what] for what in ("round", "generated", "trained", "flops", "seconds")) for r in rounds]
    assert spent == [(0, 0, 0, 0, 0), (0, 0, 7, 100, 2), (1, 100, 14, 210, 7), (2, 300, 21, 320, 12)]


def test_answers_between_two_rounds_are_on_the_straight_line(two_runs):
    second = eval.Past(two_runs[1])
    assert list(second.at("generated", 300).values()) == [1, 0.5, 0.5, 1]
    assert list(second.at("generated", 200).values()) == [1, 0, 0, 1]
    assert second.at("generated", 401) is None


def test_effort_is_binned_by_the_right_answers_of_all_runs(two_runs):
    """A problem's draws, right ones, and how often it was trained on: four examples in two epochs."""
    first, second = (eval.Past(run) for run in two_runs)
    assert {i: list(n) for i, n in first.problems.items()} == {"s/train/p": [4, 2, 0], "s/train/q": [1, 0, 0]}
    assert {i: list(n) for i, n in second.problems.items()} == {"s/train/q": [7, 6, 8], "s/train/r": [0, 0, 0]}
    bins, counts = eval.effort({"a": [first], "b": [second]})
    assert bins.tolist() == [2, 3, 0]  # p: 2 of 4; q: 6 of 8; r: none
    assert counts["b"].tolist() == [[0, 0, 0], [7, 6, 8], [0, 0, 0]]


def costs_of(said):
    """The rows of the table of costs: {first word: the others}."""
    rows = [line.split() for line in said.partition("seconds):")[2].splitlines()[1:]]
    return {row[0]: row[1:] for row in rows}


def test_compare_prints_accuracies_gains_and_costs(two_runs, tmp_path):
    said = launch(tmp_path, "eval.py", "--compare", "runs/a-0", "runs/b-0").stdout
    for words in ("4    100.0%  51.0% - 100.0%   100.0%   100.0%", "b: +50.0 [+1.0, +99.0] points against a",
                  "at 300 tokens", "4     75.0%", "b: +25.0 [", "not that of the seed"):
        assert words in said
    assert costs_of(said)["round"] == ["generated", "trained", "flops", "seconds"]
    assert costs_of(said)["b"][:4] == ["[2]", "400", "21", "320"]  # round, generated, trained on, FLOPs


def test_compare_pools_seeds_and_says_which_runs_are_unlike(two_runs, tmp_path):
    make_run(tmp_path / "runs/a-1", 1, [100, 200], [[], [], [2], [2]], MODEL="m", ROUNDS=9)
    make_run(tmp_path / "runs/a-2", 2, [100, 200], [[], [], [2], [2]], MODEL="m", LR=1)
    said = launch(tmp_path, "eval.py", "--compare", "runs/a-0", "runs/b-0", "runs/a-1", "runs/a-2", "runs/a-1/").stdout
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: runs/a-2 and runs/a-0 differ in LR", "warning: runs/b-0 and runs/a-0 differ in MODEL"]
    assert costs_of(said)["a"][:3] == ["[2,", "2,", "2]"] and costs_of(said)["b"][0] == "[2]"


def test_compare_leaves_held_out_problems_out(tmp_path):
    make_run(tmp_path / "runs/c-0", 0, [100], [[], [], [0, 1, 2, 3]], [{"id": "s/train/p"}], held_out=1)
    said = launch(tmp_path, "eval.py", "--compare", "runs/c-0").stdout
    assert "3 problems were scored in all runs" in said and "train" not in said.split("3 problems")[0]


def test_compare_ends_at_the_round_that_was_reported_and_before_an_unfinished_one(two_runs):
    with open(two_runs[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"round": 3, "phase": "probe", "draws": 1, "tokens": 10}) + "\n")
    assert eval.Past(two_runs[0]).end["generated"] == 300
    with open(two_runs[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"round": 0, "phase": "reported", "iteration": 1}) + "\n")
    assert eval.Past(two_runs[0]).end["round"] == 1


def test_compare_a_real_run(copy_of):
    """One number has one interval: the one that the run itself gave it. DAST's base is drawn too."""
    pytest.importorskip("matplotlib")
    score = common.read(copy_of / "runs/one/round_1/eval.json")
    said = launch(copy_of, "eval.py", "--compare", "runs/one", "--name", "seen").stdout
    low, high = score["interval"]
    row = next(line for line in said.splitlines() if line.startswith("one "))
    assert f"{score['accuracy']:.1%}  {low:>5.1%} - {high:>5.1%}" in row
    base = common.read(copy_of / "runs/one/round_0/eval_base.json")
    assert eval.Past(copy_of / "runs/one").rounds[0]["right"] == base["correct"]
    for picture in ("accuracy", "problems"):
        start = (copy_of / "runs" / "seen" / f"{picture}.png").read_bytes()[:24]
        assert start.startswith(b"\x89PNG") and struct.unpack(">II", start[16:]) == (1650, 600)


def test_compare_without_matplotlib(two_runs, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # found before the package, if that is there
    done = launch(tmp_path, "eval.py", "--compare", "runs/a-0", PYTHONPATH=str(tmp_path), torchrun=True, processes=1)
    assert "pip install matplotlib" in done.stdout.splitlines()[-1] and "a" in costs_of(done.stdout)


@pytest.mark.parametrize("folder, words", [("nothing", "no metrics.jsonl"), ("empty", "no round of it is finished")])
def test_what_cannot_be_compared_is_one_line(tmp_path, folder, words):
    common.write(tmp_path / "empty/constants.json", {"constants": {"SEED": 0}})
    common.write(tmp_path / "empty/metrics.jsonl", [])
    line = error_of(launch(tmp_path, "eval.py", "--compare", folder, check=False))
    assert words in line and folder in line
