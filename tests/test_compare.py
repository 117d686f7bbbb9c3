"""--compare: what runs reached and spent, against small folders written by hand, and on a real run."""
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

import common
import eval
from conftest import ROOT, SMOKE, environment, error_of, launch

IDS = ["s/0", "s/1", "s/2", "s/3"]
PROBLEMS = [{"id": i, "level": level} for i, level in zip(IDS, (1, 1, 2, 2))]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(folder, seed, tokens, right, selection, **constants):
    """A run's folder: round 0 and as many more as there are `tokens` generated; right: the numbers of the IDS that are
    right in each round; selection: its lines in round 1. Half of what was drawn counts."""
    metrics = []
    for t, numbers in enumerate(right):
        (folder / f"round_{t}").mkdir(parents=True)
        answers = [{"id": i, "correct": number in numbers, "finish": "stop"} for number, i in enumerate(IDS)]
        name = "eval.json" if t else "eval_base.json"
        (folder / f"round_{t}" / name).write_text(json.dumps(common.score(PROBLEMS, answers)))
        if t:
            for block in range(2):  # as adastar.py draws
                metrics.append({"round": t, "phase": f"responses_{block}", "draws": 9, "verdicts": {"equal": 9},
                                "tokens": tokens[t - 1] / 2, "spent_tokens": tokens[t - 1], "flops": 5, "seconds": 1.5})
            metrics += [{"round": t, "phase": "prerewards", "tokens": 99, "flops": 0, "seconds": 0.25},
                        {"round": t, "phase": "select", "levels": {}},
                        {"round": t, "phase": "train", "tokens": 7, "flops": 100, "seconds": 2}]
        metrics += [{"round": t, "phase": "eval", "draws": 4, "tokens": 5000, "spent_tokens": 5000, "flops": 1e9,
                     "seconds": 1, "accuracy": len(numbers) / 4},
                    {"round": t, "phase": "round", "flops": 1}]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "round_1" / "selection.jsonl", selection)
    (folder / "constants.json").write_text(json.dumps({"constants": {"SEED": seed, "NAME": folder.name, **constants}}))
    return str(folder)


@pytest.fixture
def two_runs(tmp_path):
    """Of as many tokens as the one has after 2 rounds, the other has generated 300, half way through its round 2."""
    first = make_run(tmp_path / "a-0", 0, [100, 200], [[], [0], [0, 1]], [
        {"id": "p", "outcomes": [0, 1, 1, -1], "pairs": [[1, 0], [2, 0]]}, {"id": "q", "outcomes": [0], "pairs": []}])
    second = make_run(tmp_path / "b-0", 0, [200, 200], [[], [0, 3], [0, 1, 2, 3]], [
        {"id": "q", "outcomes": [1, 2], "chosen": [0, 1], "copies": [1, 3]}, {"id": "r", "outcomes": [], "copies": []}],
        LR=0.5, EPOCHS=2)
    probe = [{"id": "q", "correct": right} for right in (True, True, False, True, True)]
    write_lines(tmp_path / "b-0" / "round_0" / "probe.jsonl", probe)
    return first, second


def test_what_was_spent_up_to_each_round(two_runs):
    first = eval.Past(two_runs[0])
    assert [(r["round"], r["generated"], r["drawn"], r["trained"], r["flops"]) for r in first.rounds] == [
        (0, 0, 0, 0, 0), (1, 100, 200, 7, 110), (2, 300, 600, 14, 220)]
    end = first.end
    kinds = [end[kind] for kind in ("sampling", "rewards", "training", "scoring")]
    assert kinds == [6, 0.5, 4, 3]


def test_answers_between_two_rounds_are_on_the_straight_line(two_runs):
    second = eval.Past(two_runs[1])
    assert second.at("generated", 300) == {"s/0": 1, "s/1": 0.5, "s/2": 0.5, "s/3": 1}
    assert second.at("generated", 200) == {"s/0": 1, "s/1": 0, "s/2": 0, "s/3": 1}
    assert second.at("flops", 55) == {"s/0": 0.5, "s/1": 0, "s/2": 0, "s/3": 0.5}
    assert second.at("generated", 401) is None


def test_draws_right_ones_and_trainings_of_each_problem(two_runs):
    first, second = map(eval.Past, two_runs)
    assert first.problems == {"p": {1: (4, 2, 2)}, "q": {1: (1, 0, 0)}}
    assert second.problems == {"q": {0: (5, 4, 0), 1: (2, 2, 8)}}  # 4 copies in 2 epochs
    sampled, trained = eval.effort({"a": [first], "b": [second]})["b"]
    assert sampled == [[], [], [0], [7]]  # p: 2 of 4 are right, and b never met it; q: 6 of 8
    assert trained == [[], [], [0], [8]]


def test_the_rows_of_the_tables(two_runs):
    first, second = map(eval.Past, two_runs)
    rng = np.random.default_rng(0)
    row = eval.differences([second], [first], 300, IDS, rng)
    assert row["at the end"].startswith("+50.0 [") and row["accuracy at 300 tokens"].startswith("75.0 [")
    assert row["difference there"].startswith("+25.0 [")  # (1 + 0.5 + 0.5 + 1) / 4 - 2 / 4
    assert eval.accuracies([first], IDS, rng) == {  # Wilson's intervals
        "all": "50.0 [15.0, 85.0]", "level 1": "100 [34, 100]", "level 2": "0 [0, 66]"}
    spent = eval.costs([first])
    assert (spent["generated"], spent["all drawn"], spent["problems"]) == ("300", "600", "1")
    assert spent["times"] == "2.0 (0.0)"


@pytest.mark.parametrize("right, n, low, high", [
    (5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 30, 0.0059, 0.1667)])
def test_wilson_interval(right, n, low, high):
    assert common.wilson_interval(right, n) == pytest.approx([low, high], abs=1e-4)


def test_seeds_are_one_arm(two_runs, tmp_path):
    again = make_run(tmp_path / "a-1", 1, [100, 200], [[], [2], [2]], [], MAX_TOKENS=5, ROUNDS=9)  # these may differ
    other = make_run(tmp_path / "a-2", 2, [100, 200], [[], [2], [2]], [], LR=0.5)  # a name like them, another rate
    step = [make_run(tmp_path / f"c-{n}", 0, [100, 200], [[], [2], [2]], [], MODEL=f"step-{n}") for n in (1, 2)]
    arms = eval.arms_of([again, *two_runs, other, two_runs[0] + "/", *step])
    assert [(name.rsplit("/", 1)[1], [past.constants["SEED"] for past in arm]) for name, arm in arms.items()] == [
        ("a-0,1", [0, 1]), ("b-0", [0]), ("a-2", [2]), ("c-1", [0]), ("c-2", [0])]
    values = eval.table_of([past.end["right"] for past in arms[next(iter(arms))]], ["s/0", "s/1", "s/2", "s/3"])
    found = eval.mean_over_seeds(values, np.random.default_rng(0))
    assert found["accuracy"] == 3 / 8 and 0 <= found["interval"][0] < 3 / 8 < found["interval"][1] <= 1


def test_an_unfinished_run(two_runs, tmp_path):
    """Its last finished round counts; what adastar.py reported is its end, and what came later does not count there."""
    run = tmp_path / "a-0"
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"round": 3, "phase": "probe", "draws": 1, "tokens": 10, "spent_tokens": 10}) + "\n")
    assert eval.Past(run).end["round"] == 2 and eval.Past(run).end["generated"] == 300
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"round": 0, "phase": "reported", "iteration": 1}) + "\n")
    past = eval.Past(run)
    assert past.end["round"] == 1 and past.rounds[-1]["round"] == 2 and eval.costs([past])["generated"] == "100"
    (run / "round_2" / "selection.jsonl").write_text('{"id": "q", "outcomes": [1, 0], "pair": [0, 1]}\n')
    assert past.problems["q"] == {1: (1, 0, 0)}


def test_intervals_over_seeds_cover_the_truth():
    """In 90 % and more of 50 studies of three seeds and 200 problems, easy and hard ones, that all seeds share."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(50):
        p = rng.beta(0.3, 0.3, size=200)
        seeds, others = (np.array([rng.random(200) < np.clip(p + rng.normal(0, 0.03), 0, 1) for _ in range(3)], float)
                         for _ in range(2))
        low, high = eval.mean_over_seeds(seeds, rng)["interval"]
        far, near = eval.mean_over_seeds(seeds, rng, others)["interval"]
        covered.append((low <= 0.5 <= high, far <= 0 <= near, high - low))
    assert min(np.mean(covered, 0)[:2]) >= 0.9 and np.mean(covered, 0)[2] < 0.2  # and they are not just wide


@pytest.mark.parametrize("draws, right, place", [(5, 0, 1), (5, 1, 2), (5, 2, 3), (10, 7, 3), (10, 8, 4), (1, 1, 4)])
def test_classes(draws, right, place):  # DAST's cuts: 0.4 and 0.7 are medium
    assert eval.class_of(draws, right) == place


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_compare(finished, copy_of, loss):
    pytest.importorskip("matplotlib")
    score = json.loads((copy_of / "runs/one/round_1/eval.json").read_text())
    name = "one"
    if loss == "dpo":  # on other problems too
        launch(copy_of, "dast.py", *SMOKE, "--loss", "dpo", "--name", "dpo", "--held-out", "3", "--n-test", "6")
        name = "dpo"
    done = launch(copy_of, "eval.py", "--compare", "runs/one", f"runs/{name}", "--name", "seen")
    low, high = score["interval"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("one "))
    if loss == "sft":
        assert f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in row
        assert "level 1" in done.stdout
    else:
        other = json.loads((copy_of / "runs/dpo/round_1/eval.json").read_text())
        shared = len(score["correct"].keys() & other["correct"].keys())
        assert f"on the {shared} problems that all were scored on, without" in done.stdout and shared > 0
    for picture in ("accuracy", "problems", "flow"):
        start = (copy_of / "runs" / "seen" / f"{picture}.png").read_bytes()[:24]
        width, height = struct.unpack(">II", start[16:])
        assert start.startswith(b"\x89PNG") and width == 1650 and height > 300


def test_compare_without_matplotlib(copy_of):
    (copy_of / "matplotlib.py").write_text("raise ImportError")  # found before the package, if that is there
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--compare", "runs/one"], cwd=copy_of, check=True,
                          capture_output=True, text=True, env=environment() | {"PYTHONPATH": str(copy_of)})
    assert "pip install matplotlib" in done.stdout.splitlines()[-1] and re.search(r"one +1 +[\d,]+ ", done.stdout)
    assert not list(copy_of.glob("runs/compare-*"))


@pytest.mark.parametrize("folder, words", [("nothing", "no constants.json"), ("empty", "no round of it is finished"),
                                           ("odd", "no round of it is finished")])
def test_what_cannot_be_compared_is_one_line(tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "constants.json").write_text(json.dumps({"constants": {"SEED": 0}}))
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "constants.json").write_text("{}")
    (tmp_path / "odd" / "metrics.jsonl").write_text('{"round": 0, "phase": "round"}')
    line = error_of(launch(tmp_path, "eval.py", "--compare", folder, check=False))
    assert words in line and folder in line
