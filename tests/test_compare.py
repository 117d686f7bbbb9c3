"""--compare: what runs reached and spent, against small folders written by hand, and on a real run."""
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

import eval
from conftest import ROOT, environment, launch


def make_run(folder, seed, tokens, right, selection, **constants):
    """A run's folder: round 0 and as many more as there are `tokens` generated; right: the ids that are right in each
    round, of "s/0" to "s/3"; selection: its lines in round 1."""
    metrics = []
    for t, ids in enumerate(right):
        (folder / f"round_{t}").mkdir(parents=True)
        correct = {f"s/{i}": int(i in ids) for i in range(4)}
        share = len(ids) / 4
        part = {"accuracy": share, "interval": eval.binomial_interval(len(ids), 4), "n": 4}
        score = part | {"samples": 1, "cut": 0, "by_level": {"1": part}, "by_subject": {}, "by_set": {"s": part},
                        "correct": correct}
        (folder / f"round_{t}" / ("eval.json" if t else "eval_base.json")).write_text(json.dumps(score))
        if t:
            metrics += [{"round": t, "phase": "sample", "draws": 9, "tokens": tokens[t - 1], "spent_tokens": 2 * tokens[
                t - 1], "flops": 10, "seconds": 3}, {"round": t, "phase": "select", "levels": {}},
                {"round": t, "phase": "train", "tokens": 7, "flops": 100, "seconds": 2}]
        metrics += [{"round": t, "phase": "eval", "draws": 4, "tokens": 5000, "spent_tokens": 5000, "flops": 1e9,
                     "seconds": 1}, {"round": t, "phase": "round", "flops": 1, "outside_seconds": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (folder / "constants.json").write_text(json.dumps({"constants": {"SEED": seed, "RUN": folder.name, **constants}}))
    (folder / "round_1" / "selection.jsonl").write_text("".join(json.dumps(s) + "\n" for s in selection))
    return str(folder)


@pytest.fixture
def two_runs(tmp_path):
    """Of as many tokens as the one has after 2 rounds, the other has generated 300, half way through its round 2."""
    first = make_run(tmp_path / "a-0", 0, [100, 200], [[], [0], [0, 1]], [
        {"id": "p", "outcomes": [0, 1, 1, -1], "pairs": [[1, 0], [2, 0]]}, {"id": "q", "outcomes": [0], "pairs": []}])
    second = make_run(tmp_path / "b-0", 0, [200, 200], [[], [0, 3], [0, 1, 2, 3]], [
        {"id": "q", "probe_draws": 5, "probe_correct": 4, "outcomes": [1, 2], "chosen": [0, 1], "copies": [1, 3]}],
        LR=0.5)
    return first, second


def test_what_was_spent_and_reached(two_runs):
    first, second = map(eval.Past, two_runs)
    assert [(r["round"], r["generated"], r["drawn"], r["trained"], r["flops"]) for r in first.rounds] == [
        (0, 0, 0, 0, 0), (1, 100, 200, 7, 110), (2, 300, 600, 14, 220)]
    end = first.end
    assert (end["sampling"], end["rewards"], end["training"], end["scoring"], end["outside"]) == (6, 0, 4, 3, 1.5)
    assert second.at("generated", 300) == {"s/0": 1, "s/1": 0.5, "s/2": 0.5, "s/3": 1}
    assert second.at("generated", 200) == {"s/0": 1, "s/1": 0, "s/2": 0, "s/3": 1} and not second.at("generated", 401)
    assert second.at("flops", 55) == {"s/0": 0.5, "s/1": 0, "s/2": 0, "s/3": 0.5}
    assert first.problems() == {"p": {1: (4, 2, 2)}, "q": {1: (1, 0, 0)}}
    assert second.problems() == {"q": {0: (5, 4, 0), 1: (2, 2, 4)}}
    rng = np.random.default_rng(0)
    row = eval.differences([second], [first], "a-0", 300, rng)
    assert row["against a-0, at the end"].startswith("+50.0 [") and row["at 300 tokens"].startswith("75.0 [")
    assert row["and against it"].startswith("+25.0 [")  # (1 + 0.5 + 0.5 + 1) / 4 - 2 / 4
    spent = eval.costs([first])
    assert (spent["generated"], spent["all drawn"], spent["problems"], spent["times"]) == ("300", "600", "1",
                                                                                          "2.0 (0.0)")


def test_seeds_are_one_arm(two_runs, tmp_path):
    again = make_run(tmp_path / "a-1", 1, [100, 200], [[], [2], [2]], [])
    other = make_run(tmp_path / "a-2", 2, [100, 200], [[], [2], [2]], [], LR=0.5)  # a name like them, other constants
    arms = eval.arms_of([again, *two_runs, other, two_runs[0]])
    assert [(name.rsplit("/", 1)[1], [past.seed for past in arm]) for name, arm in arms.items()] == [
        ("a-1,0", [0, 1]), ("b-0", [0]), ("a-2", [2])]
    merged = eval.merged([past.end["score"] for past in arms[next(iter(arms))]], np.random.default_rng(0))
    assert merged["accuracy"] == 3 / 8 and 0 <= merged["interval"][0] < 3 / 8 < merged["interval"][1] <= 1


def test_paired_differences():
    """By seed where both have it, else in order; over the problems that both were scored on."""
    a, b = {0: {"x": 1, "y": 1}, 1: {"x": 1, "y": 0}}, {1: {"x": 1, "y": 1, "z": 0}, 2: {"x": 0, "y": 0}}
    rng = np.random.default_rng(0)
    assert eval.paired(a, b, rng)["accuracy"] == -0.5  # seed 1 alone
    assert eval.paired(a, {5: {"x": 0, "y": 1}}, rng)["accuracy"] == 0.5
    assert eval.paired(a, {5: {"other": 1}}, rng) is None


@pytest.mark.parametrize("draws, right, place", [(5, 0, 1), (5, 1, 2), (5, 2, 3), (10, 7, 3), (10, 8, 4), (1, 1, 4)])
def test_classes(draws, right, place):  # DAST's cuts: 0.4 and 0.7 are medium
    assert eval.class_of(draws, right) == place


def test_intervals_over_seeds_cover_the_truth():
    """Of seeds that differ by chance, in 88 to 98 % of 200 studies; three seeds are few, so it is rough."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        seeds = [(rng.random(200) < 0.6 + rng.normal(0, 0.02)).astype(float) for _ in range(5)]
        low, high = eval.over_seeds(seeds, rng)["interval"]
        covered.append(low <= 0.6 <= high)
    assert 0.88 <= np.mean(covered) <= 0.98


def test_compare(copy_of, two_runs):
    pytest.importorskip("matplotlib")
    score = json.loads((copy_of / "runs/one/round_1/eval.json").read_text())
    done = launch(copy_of, "eval.py", "--compare", "runs/one", *two_runs, "--run", "seen")
    low, high = score["interval"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("one "))
    assert f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in row
    for name in ("accuracy", "problems", "flow"):
        start = (copy_of / "runs" / "seen" / f"{name}.png").read_bytes()[:24]
        width, height = struct.unpack(">II", start[16:])
        assert start.startswith(b"\x89PNG") and width == 1650 and height > 300


def test_compare_without_matplotlib(copy_of):
    (copy_of / "matplotlib.py").write_text("raise ImportError")  # found before the package, if that is there
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--compare", "runs/one"], cwd=copy_of, check=True,
                          capture_output=True, text=True, env=environment() | {"PYTHONPATH": str(copy_of)})
    assert "pip install matplotlib" in done.stdout.splitlines()[-1] and re.search(r"one +1 +[\d,]+ ", done.stdout)
    assert not (copy_of / "runs" / "compare-one").exists()


@pytest.mark.parametrize("folder, words", [("nothing", "no constants.json"), ("empty", "no round of it is finished")])
def test_what_cannot_be_compared_is_one_line(tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "constants.json").write_text(json.dumps({"constants": {"SEED": 0}}))
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    done = launch(tmp_path, "eval.py", "--compare", folder, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert words in done.stderr and folder in done.stderr
