"""eval.py: scores against values worked out by hand, how often intervals cover the truth, the program."""
import functools
import json
import math
import shutil

import numpy as np
import pytest

import common
import eval
from conftest import TOY, error_of, files, killed_when, launch, lines

T = True


@pytest.mark.parametrize("right, k, expected", [
    ([1, 1, 0, 0], 1, 1 / 2), ([1, 1, 0, 0], 2, 5 / 6),  # 1 - C(2,2)/C(4,2)
    ([1, 1, 0, 0], 3, 1), ([0, 0, 0, 0], 4, 0), ([1], 1, 1),
    ([0, 0, 0, 1, 0], 3, 6 / 10), ([1, 0, 1, 1, 0], 2, 9 / 10)])  # 1 - C(4,3)/C(5,3); 1 - C(2,2)/C(5,2)
def test_pass_at(right, k, expected):
    assert eval.pass_at(np.array([right, right[::-1]]), k) == pytest.approx([expected] * 2)


def test_pass_at_is_unbiased():
    """Its mean over all ways to draw k of n answers' worth is the share of draws with a right one."""
    rng = np.random.default_rng(0)
    correct = rng.random((200_000, 6)) < 0.3
    assert abs(eval.pass_at(correct, 4).mean() - (1 - 0.7 ** 4)) < 0.003


@pytest.mark.parametrize("votes, k, expected", [
    ([T, "a", "a", T], 4, 1 / 2), ([T, "a", "a", T], 2, 1 / 2), ([T, T, "a", None], 4, 1),
    ([T, T, "a", None], 2, 1 / 2), ([None, None], 2, 0), (["a", "b", T, T], 3, 1 / 3),
    (["a", "a", T, T, T, "b"], 3, 1 / 2),
    ([T, None, None, None], 4, 1), (["a", "a", "a", T], 4, 0), (["a", T], 1, 1 / 2)])
def test_maj_at(votes, k, expected):
    assert eval.maj_at([votes], k) == pytest.approx([expected])


def test_votes():
    def vote(text, correct=False, **problem):
        return eval.vote_of({"kind": "math", **problem}, {"text": text, "correct": correct})

    assert vote("anything", correct=True) is True and vote("no\nanswer") is None
    half = {vote(f"\\boxed{{{a}}}") for a in ("1/2", "0.5", "\\frac{1}{2}", "\\dfrac{2}{4}", "0.50")}
    assert len(half) == 1 and half != {vote("\\boxed{-1/2}")} and vote("\\boxed{1/0}") == "1/0"
    assert vote("\\boxed{x + 1}") == vote("$\\boxed{x  +  1}$.") != vote("\\boxed{x}")
    options = {"kind": "choice", "choices": ["cat", "dog"]}
    yesno = {"kind": "yesno"}
    assert vote("No, it does not.", **yesno) == vote("\\boxed{\\text{false}}", **yesno) == "no"
    assert vote("\\boxed{B}", **options) == vote("(B) dog", **options) == vote("dog", **options) == "B"


def test_score_of_several_draws():
    problems = []
    for i in range(4):
        tags = ["odd"] if i % 2 else []
        problems.append({"id": f"s/test/{i}", "level": 1 + i // 2, "tags": tags, "kind": "math"})
    responses = []
    for draw, said in enumerate((1, 1, 2, 1, 3, 3, 3, 2)):  # 1 is right; 3 is cut
        responses.append({"id": f"s/test/{draw // 2}", "text": f"\\boxed{{{said}}}", "correct": said == 1,
                          "finish": "stop" if said < 3 else "length"})
    score = eval.score_samples(problems, responses, np.random.default_rng(0))
    assert (score["accuracy"], score["n"], score["samples"], score["cut"]) == (3 / 8, 4, 2, 3 / 8)
    assert score["correct"] == {"s/test/0": 2, "s/test/1": 1, "s/test/2": 0, "s/test/3": 0}
    assert {level: part["accuracy"] for level, part in score["by_level"].items()} == {"1": 3 / 4, "2": 0}
    assert {name: part["accuracy"] for name, part in score["by_subject"].items()} == {"odd": 1 / 4}
    assert {k: part["accuracy"] for k, part in score["pass_at"].items()} == {"1": 3 / 8, "2": 1 / 2}
    assert score["maj_at"]["2"]["accuracy"] == (1 + 1 / 2) / 4
    assert list(score["by_set"]) == ["s/test"]
    assert score["level"] == {"s/test/0": 1, "s/test/1": 1, "s/test/2": 2, "s/test/3": 2}


def test_table_of_shares():
    correct = {"a": 2, "b": 1, "c": 0}
    shares = eval.table_of([correct], correct) / 2
    assert shares.tolist() == [[1, 0.5, 0]]
    found = eval.mean_over_seeds(shares, np.random.default_rng(0), shares)
    assert found == {"accuracy": 0, "interval": [0, 0], "n": 3}


@pytest.mark.parametrize("right, n, low, high", [  # by hand
    (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361),
    (90, 100, 0.8256, 0.9448)])
def test_wilson_interval(right, n, low, high):
    assert common.wilson_interval(right, n) == pytest.approx([low, high], abs=1e-4)


def test_intervals_cover_the_truth():
    """In 93-97 % of 1,000 evaluations: Wilson's of greedy answers, bootstrapped ones of several draws."""
    rng = np.random.default_rng(0)
    interval = functools.cache(lambda right: common.wilson_interval(right, 500))
    right = rng.binomial(500, 0.62, size=1000).tolist()
    covered = [low <= 0.62 <= high for low, high in map(interval, right)]
    assert 0.93 <= np.mean(covered) <= 0.97
    a, b, n, samples = 0.6, 0.9, 150, 8  # how easy problems are is Beta-distributed, 0.4 on average
    covered = {"mean": [], "pass@4": []}
    truth = {"mean": a / (a + b), "pass@4": 1 - np.prod([(b + i) / (a + b + i) for i in range(4)])}
    for _ in range(1000):
        correct = (rng.random((n, samples)) < rng.beta(a, b, size=(n, 1))).astype(float)
        for name, values in {"mean": correct.mean(1), "pass@4": eval.pass_at(correct, 4)}.items():
            low, high = eval.mean_of(values, rng)["interval"]
            covered[name].append(low <= truth[name] <= high)
    shares = {name: np.mean(of) for name, of in covered.items()}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


# The program ------------------------------------------------------------------------------------------------

FLAGS = ["--model", TOY / "model", "--max-new-tokens", "48"]
SETS = [f"{TOY}/{name}" for name in ("test.jsonl", "train.jsonl", "deep.json")]
SEVERAL = [*FLAGS, "--sets", ",".join(SETS), "--n-test", "12", "--samples", "3", "--temperature", "0.7",
           "--name", "e"]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder with the run "e", three draws of twelve problems of three sets; what it said. For reading."""
    folder = tmp_path_factory.mktemp("several")
    return folder, launch(folder, "eval.py", *SEVERAL).stdout


def test_program_scores_sets_by_level_and_subject(several):
    folder, said = several
    [scores] = json.loads((folder / "runs" / "e" / "eval.json").read_text()).values()
    assert list(scores) == SETS
    for score in scores.values():
        assert score["n"] == 12 and score["samples"] == 3
        assert sum(part["n"] for part in score["by_level"].values()) == 12
        assert sum(part["n"] for part in score["by_subject"].values()) == 12
        assert 0 <= score["interval"][0] <= score["accuracy"] <= score["interval"][1] <= 1
        assert math.isclose(score["pass_at"]["1"]["accuracy"], score["accuracy"])
        assert score["pass_at"]["3"]["accuracy"] == sum(n > 0 for n in score["correct"].values()) / 12
    for words in ("95 % interval", "level 1", "pass@3", "maj@2", "digit sums"):
        assert words in said


def test_program_scores_again_from_the_answers_that_are_there(several, tmp_path):
    run = shutil.copytree(several[0] / "runs" / "e", tmp_path / "runs" / "e")
    (run / "eval.json").unlink()
    launch(tmp_path, "eval.py", *SEVERAL)
    assert files(run) == files(several[0] / "runs" / "e")


def test_program_killed_and_resumed_on_two_processes_scores_the_same(several, tmp_path):
    def answered(run):
        return any(path.stat().st_size > 100 for path in run.glob("unfinished/*test@*.jsonl"))

    killed_when(tmp_path, "eval.py", SEVERAL, answered, processes=2)
    launch(tmp_path, "eval.py", *SEVERAL, processes=2)
    assert files(tmp_path / "runs" / "e") == files(several[0] / "runs" / "e")


def test_program_scores_several_models(tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "other")
    done = launch(tmp_path, "eval.py", "--model", f"{TOY}/model,{tmp_path}/other", "--n-test", "6",
                  "--sets", TOY / "test.jsonl", "--max-new-tokens", "48", "--name", "two")
    first, second = json.loads((tmp_path / "runs" / "two" / "eval.json").read_text()).values()
    assert first == second and "+0.0 [+0.0, +0.0] points against" in done.stdout
    assert len(lines(tmp_path / "runs" / "two" / "metrics.jsonl")) == 2


def test_program_shows_examples_and_scores_what_was_held_out(tmp_path):
    flags = [*FLAGS, "--sets", TOY / "train.jsonl", "--held-out", "6", "--name"]
    few = ["--prompt", "few_shot", "--shots", "2"]
    tokens = {}
    for name, more in {"theirs": [*few, "--examples-from", TOY / "train.jsonl"], "ours": few, "plain": [],
                       "told": ["--first", "Take your time."]}.items():
        launch(tmp_path, "eval.py", *flags, name, *more)
        [answers] = (tmp_path / "runs" / name).glob("*/held-out.jsonl")
        assert len({r["id"] for r in lines(answers)}) == 6
        tokens[name] = lines(tmp_path / "runs" / name / "metrics.jsonl")[0]["prompt_tokens"]
    assert tokens["ours"] > tokens["theirs"] > tokens["plain"] + 6 * 30
    assert tokens["told"] > tokens["plain"] + 6 * 5


@pytest.mark.parametrize("flags, words", [
    (["--samples", "2"], "--temperature"), (["--model", "."], "no letter or digit"),
    (["--examples-from", TOY / "train.jsonl"], "--prompt few_shot"),
    (["--held-out", "6", "--sets", "gsm8k"], "--split train"),
    (["--sets", "a/b.jsonl,a-b.jsonl"], "share a file"),
    (["--regrade", "none.jsonl"], "no such .jsonl file")])
def test_flags_that_contradict_are_one_line(tmp_path, flags, words):
    line = error_of(launch(tmp_path, "eval.py", *FLAGS, "--sets", TOY / "test.jsonl", *flags, check=False))
    assert words in line


STORED = [  # (record, correct, reason)
    ({"answer": "1/2", "text": "so \\boxed{0.5}", "extra": [1, None]}, True, "equal"),
    ({"answer": 7.0, "text": "the answer is 8."}, False, "different"),
    ({"answer": "B", "text": "I think (B)", "choices": ["cat", "dog"]}, True, "equal"),
    ({"answer": "dog", "text": "\\boxed{A}", "choices": ["cat", "dog"]}, False, "different"),
    ({"answer": "", "text": "\\boxed{}"}, False, "bad_gold"),
    ({"answer": "yes", "text": "Yes."}, True, "equal"),
    ({"answer": "She has 3\n#### 3", "text": "A: 3"}, True, "equal"),
    ({"answer": "2", "text": "\ud800\n"}, False, "different"),
    ({"answer": "2", "text": "none\nat all"}, False, "no_answer"),
    ({"answer": "2", "text": "\\boxed{9^{9^{9^9}}}"}, False, "timeout"),
    ({"id": "toy/test/1", "text": "15"}, True, "equal")]
STORED_TEXT = "".join(json.dumps(record) + "\n" for record, _, _ in STORED)


def test_regrade_adds_verdicts_to_stored_answers(tmp_path):
    (tmp_path / "answers.jsonl").write_text(STORED_TEXT)
    done = launch(tmp_path, "eval.py", "--regrade", "answers.jsonl", "--sets", TOY / "test.jsonl")
    graded = lines(tmp_path / "answers.graded.jsonl")
    assert graded == [{**record, "correct": correct, "reason": reason} for record, correct, reason in STORED]
    assert "5 of 11 correct (45.5%" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_regrade_with_a_grader_of_ones_own(tmp_path):
    (tmp_path / "answers.jsonl").write_text(STORED_TEXT)
    (tmp_path / "mine.py").write_text("def never(problem, text):\n    return False, problem['answer']\n")
    launch(tmp_path, "eval.py", "--regrade", "answers.jsonl", "--sets", TOY / "test.jsonl", "--grader",
           "mine.py:never")
    graded = lines(tmp_path / "answers.graded.jsonl")
    assert not any(r["correct"] for r in graded)
    assert (graded[0]["reason"], graded[-1]["reason"]) == ("1/2", "15")


@pytest.mark.parametrize("line, words", [
    ("{", "answers.jsonl:12: "), ('{"text": "7"}', "no 'answer'"), ('{"answer": "7"}', "a text under 'text'"),
    ('{"answer": "C", "text": "", "choices": ["a"]}', "none of the choices")])
def test_regrade_refuses_a_file_with_a_damaged_line(tmp_path, line, words):
    (tmp_path / "answers.jsonl").write_text(STORED_TEXT + line + "\n")
    flags = ["--regrade", "answers.jsonl", "--sets", TOY / "test.jsonl"]
    assert words in error_of(launch(tmp_path, "eval.py", *flags, check=False))
    assert not (tmp_path / "answers.graded.jsonl").exists()
