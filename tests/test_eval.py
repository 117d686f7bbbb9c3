"""eval.py: scores against values worked out by hand, how often intervals cover the truth, the program."""
import math
import shutil

import numpy as np
import pytest

import common
import eval
from conftest import TOY, error_of, files, killed_when, launch, lines


@pytest.mark.parametrize("right, k, expected", [
    ([1, 1, 0, 0], 1, 1 / 2), ([1, 1, 0, 0], 2, 5 / 6),  # 1 - C(2,2)/C(4,2)
    ([1, 1, 0, 0], 3, 1), ([0, 0, 0, 0], 4, 0), ([1], 1, 1),
    ([0, 0, 0, 1, 0], 3, 6 / 10), ([1, 0, 1, 1, 0], 2, 9 / 10)])  # 1 - C(4,3)/C(5,3); 1 - C(2,2)/C(5,2)
def test_pass_at(right, k, expected):
    assert eval.pass_at(np.array([right, right[::-1]]), k) == pytest.approx([expected] * 2)


@pytest.mark.parametrize("votes, expected", [
    ([True, "a", "a", True], 1 / 2), ([True, True, "a", None], 1), (["a", "b", True], 1 / 3), ([None, None], 0),
    ([True, None, None], 1), (["a", "a", True], 0)])
def test_majority(votes, expected):
    assert eval.majority(votes) == pytest.approx(expected)


@pytest.mark.parametrize("text, correct, finish, vote", [
    ("anything", True, "stop", True), ("no\nanswer", False, "stop", None), ("\\boxed{7}", False, "length", None),
    ("so $\\boxed{x + 1}$.", False, "stop", "x + 1")])
def test_vote_of(text, correct, finish, vote):
    assert eval.vote_of({"text": text, "correct": correct, "finish": finish}) == vote


def test_score_of_two_draws_of_four_problems():
    """Right are 2, 1, 0 and 0 of them; three draws are cut."""
    problems = []
    for i in range(4):
        problems.append({"id": f"s/test/{i}", "level": 1 + i // 2, "tags": ["odd"] if i % 2 else [], "kind": "math"})
    responses = []
    for draw, said in enumerate((1, 1, 2, 1, 3, 3, 3, 2)):  # 1 is right; 3 is cut
        responses.append({"id": f"s/test/{draw // 2}", "text": f"\\boxed{{{said}}}", "correct": said == 1,
                          "finish": "stop" if said < 3 else "length"})
    score = eval.score_samples(problems, responses)
    assert (score["accuracy"], score["n"], score["samples"], score["cut"]) == (3 / 8, 4, 2, 3 / 8)
    assert score["correct"] == {"s/test/0": 2, "s/test/1": 1, "s/test/2": 0, "s/test/3": 0}
    for part, expected in {"by_level": {1: 3 / 4, 2: 0}, "by_subject": {"odd": 1 / 4}, "by_set": {"s/test": 3 / 8},
                           "pass_at": {2: 1 / 2}, "maj_at": {2: (1 + 1 / 2) / 4}}.items():
        assert {name: own["accuracy"] for name, own in score[part].items()} == expected


@pytest.mark.parametrize("right, n, low, high", [  # by hand
    (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361),
    (90, 100, 0.8256, 0.9448)])
def test_interval_of_greedy_answers_is_wilsons(right, n, low, high):
    assert common.wilson_interval(right, n) == pytest.approx([low, high], abs=1e-4)
    answers = np.array([[1.0] * right + [0.0] * (n - right)])
    assert eval.mean_of(answers)["interval"] == pytest.approx([low, high], abs=1e-4)


def test_interval_of_several_draws_covers_the_truth():
    """In 93-97 % of 1,000 evaluations. How easy problems are is Beta-distributed, 0.4 on average."""
    rng = np.random.default_rng(0)
    a, b = 0.6, 0.9
    pass_4 = 1 - np.prod([(b + i) / (a + b + i) for i in range(4)])
    covered = []
    for _ in range(1000):
        correct = (rng.random((150, 8)) < rng.beta(a, b, size=(150, 1))).astype(int)
        low, high = eval.mean_of(correct.mean(1)[None])["interval"]
        least, most = eval.mean_of(eval.pass_at(correct, 4)[None])["interval"]
        covered.append((low <= a / (a + b) <= high, least <= pass_4 <= most))
    assert all(0.93 <= share <= 0.97 for share in np.mean(covered, axis=0))


def test_interval_over_seeds_covers_the_truth():
    """In 93 % and more of 500 studies of three seeds and 200 problems, which all seeds share, and is not just wide."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        p = rng.beta(0.3, 0.3, size=200)
        arms = []
        for _ in range(2):
            arms.append(np.array([rng.random(200) < np.clip(p + rng.normal(0, 0.03), 0, 1) for _ in range(3)], float))
        low, high = eval.mean_of(arms[0])["interval"]
        gain, half = eval.gain_of(*arms)
        covered.append((low <= 0.5 <= high, abs(gain) <= half, high - low))
    own, paired, width = np.mean(covered, axis=0)
    assert own >= 0.93 and paired >= 0.93 and width < 0.15


# The program ----------------------------------------------------------------------------------------------------------

FLAGS = ["--model", TOY / "model", "--max-new-tokens", "48"]
SETS = [f"{TOY}/{name}" for name in ("test.jsonl", "train.jsonl", "deep.json")]
SEVERAL = [*FLAGS, "--sets", ",".join(SETS), "--n-test", "12", "--samples", "3", "--temperature", "0.7", "--name", "e"]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The run "e", three draws of twelve problems of three sets; what it said. For reading."""
    folder = tmp_path_factory.mktemp("several")
    said = launch(folder, "eval.py", *SEVERAL).stdout
    return folder / "runs" / "e", said


def test_program_scores_sets_by_level_and_subject_and_prints_tables(several):
    run, said = several
    [scores] = common.read(run / "eval.json").values()
    assert list(scores) == SETS
    for score in scores.values():
        assert score["n"] == 12 and score["samples"] == 3
        assert sum(part["n"] for part in score["by_level"].values()) == 12
        assert sum(part["n"] for part in score["by_subject"].values()) == 12
        assert 0 <= score["interval"][0] <= score["accuracy"] <= score["interval"][1] <= 1
        assert math.isclose(score["pass_at"]["3"]["accuracy"], sum(n > 0 for n in score["correct"].values()) / 12)
    assert [line["accuracy"] for line in lines(run / "metrics.jsonl")] == [s["accuracy"] for s in scores.values()]
    for words in ("95% interval", "level 1", "pass@3", "maj@3", "digit sums"):
        assert words in said


def test_program_scores_again_from_the_answers_that_are_there(several, tmp_path):
    run = shutil.copytree(several[0], tmp_path / "runs" / "e")
    (run / "eval.json").unlink()
    launch(tmp_path, "eval.py", *SEVERAL)
    assert files(run) == files(several[0])


def test_program_killed_and_resumed_on_two_processes_scores_the_same(several, tmp_path):
    def answered(run):
        return any(path.stat().st_size > 100 for path in run.glob("unfinished/*test@*.jsonl"))

    killed_when(tmp_path, "eval.py", SEVERAL, answered, processes=2)
    launch(tmp_path, "eval.py", *SEVERAL, processes=2)
    assert files(tmp_path / "runs" / "e") == files(several[0])


def test_program_compares_models(tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "other")
    done = launch(tmp_path, "eval.py", "--model", f"{TOY}/model,{tmp_path}/other", "--n-test", "6",
                  "--sets", TOY / "test.jsonl", "--max-new-tokens", "48", "--name", "two")
    first, second = common.read(tmp_path / "runs" / "two" / "eval.json").values()
    assert first == second and "+0.0 [+0.0, +0.0] points against" in done.stdout


def test_program_with_another_setting_takes_another_folder(tmp_path):
    for n in ("3", "4"):
        launch(tmp_path, "eval.py", *FLAGS, "--sets", TOY / "test.jsonl", "--n-test", n)
    assert sorted(len(lines(path)) for path in tmp_path.glob("runs/*/*/*test.jsonl")) == [3, 4]


def test_program_shows_examples_and_scores_what_was_held_out(tmp_path):
    flags = [*FLAGS, "--sets", TOY / "train.jsonl", "--held-out", "3", "--name"]
    few = ["--prompt", "few_shot", "--shots", "2"]
    tokens = {}
    for name, more in {"theirs": [*few, "--examples-from", TOY / "train.jsonl"], "ours": few, "plain": [],
                       "told": ["--first", "Take your time."]}.items():
        launch(tmp_path, "eval.py", *flags, name, *more)
        [answers] = (tmp_path / "runs" / name).glob("*/held-out.jsonl")
        assert len({r["id"] for r in lines(answers)}) == 3
        tokens[name] = lines(tmp_path / "runs" / name / "metrics.jsonl")[0]["prompt_tokens"]
    assert tokens["ours"] > tokens["theirs"] > tokens["plain"] + 3 * 30
    assert tokens["told"] > tokens["plain"] + 3 * 5


@pytest.mark.parametrize("flags, words", [
    (["--samples", "2"], "--temperature"), (["--model", "."], "no letter or digit"),
    (["--examples-from", TOY / "train.jsonl"], "--prompt few_shot"),
    (["--regrade", "none.jsonl"], "no such .jsonl file"),
    (["--sets", "a/b.jsonl,a-b.jsonl"], "share a file")])
def test_flags_that_contradict_are_one_line(tmp_path, flags, words):
    assert words in error_of(launch(tmp_path, "eval.py", *FLAGS, "--sets", TOY / "test.jsonl", *flags, check=False))


STORED = [  # (record, correct, reason)
    ({"answer": "1/2", "text": "so \\boxed{0.5}", "extra": [1, None]}, True, "equal"),
    ({"answer": 7.0, "text": "the answer is 8."}, False, "different"),
    ({"answer": "B", "text": "The answer is (B).", "choices": ["cat", "dog"]}, True, "equal"),
    ({"answer": "B", "text": "(B)", "kind": "choice", "finish": "stop"}, True, "equal"),
    ({"answer": "7", "text": "\\boxed{7}", "finish": "length"}, False, "cut"),
    ({"answer": "", "text": "\\boxed{}"}, False, "bad_gold"),
    ({"answer": "yes", "text": "Yes."}, True, "equal"),
    ({"answer": "2", "text": "\ud800\n"}, False, "different"),
    ({"answer": "2", "text": "none\nat all"}, False, "no_answer"),
    ({"answer": "2", "text": "\\boxed{9^{9^{9^9}}}"}, False, "timeout"),
    ({"id": "toy/test/1", "text": "15"}, True, "equal")]
REGRADE = ["--regrade", "answers.jsonl", "--sets", TOY / "test.jsonl"]


@pytest.fixture
def stored(tmp_path):
    common.write(tmp_path / "answers.jsonl", [record for record, _, _ in STORED])
    return tmp_path


def test_regrade_adds_verdicts_to_stored_answers(stored):
    done = launch(stored, "eval.py", *REGRADE)
    expected = [{**record, "correct": correct, "reason": reason} for record, correct, reason in STORED]
    assert lines(stored / "answers.graded.jsonl") == expected
    assert "45.5%  21.3% - 72.0%" in done.stdout and "equal 5" in done.stdout


def test_regrade_with_your_own_grader(stored):
    (stored / "mine.py").write_text("def never(problem, text):\n    return False, problem['answer']\n")
    launch(stored, "eval.py", *REGRADE, "--grader", "mine.py:never")
    graded = lines(stored / "answers.graded.jsonl")
    assert not any(r["correct"] for r in graded)
    assert (graded[0]["reason"], graded[-1]["reason"]) == ("1/2", "15")


@pytest.mark.parametrize("line, words", [
    ("{", "answers.jsonl:12: "), ('{"text": "7"}', "no 'answer', and no 'id'"), ('{"answer": "7"}', "a text under"),
    ('{"text": "7", "id": "else/9"}', "no 'id' of a"), ('{"answer": "C", "text": "", "choices": ["a"]}', "choices")])
def test_regrade_says_what_a_line_lacks(stored, line, words):
    with open(stored / "answers.jsonl", "a") as file:
        file.write(line + "\n")
    assert words in error_of(launch(stored, "eval.py", *REGRADE, check=False))
    assert not (stored / "answers.graded.jsonl").exists()
