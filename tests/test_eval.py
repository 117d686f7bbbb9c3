"""Scores: pass@k, maj@k and votes against values worked out by hand, and how often intervals cover the truth."""
import functools

import numpy as np
import pytest

import eval

T = True


@pytest.mark.parametrize("right, k, expected", [
    ([1, 1, 0, 0], 1, 1 / 2), ([1, 1, 0, 0], 2, 5 / 6), ([1, 1, 0, 0], 3, 1), ([0, 0, 0, 0], 4, 0),  # 1 - C(2,2)/C(4,2)
    ([0, 0, 0, 1, 0], 3, 6 / 10), ([1, 0, 1, 1, 0], 2, 9 / 10), ([1], 1, 1)])  # 1 - C(4,3)/C(5,3); 1 - C(2,2)/C(5,2)
def test_pass_at(right, k, expected):
    assert eval.pass_at(np.array([right, right[::-1]]), k) == pytest.approx([expected] * 2)


def test_pass_at_is_unbiased():
    """Its mean over all ways to draw k of n answers' worth is the share of draws with a right one."""
    rng = np.random.default_rng(0)
    correct = rng.random((200_000, 6)) < 0.3
    assert abs(eval.pass_at(correct, 4).mean() - (1 - 0.7 ** 4)) < 0.003


@pytest.mark.parametrize("votes, k, expected", [
    ([T, "a", "a", T], 4, 1 / 2), ([T, "a", "a", T], 2, 1 / 2), ([T, T, "a", None], 4, 1), ([T, T, "a", None], 2,
    1 / 2),
    ([None, None], 2, 0), (["a", "b", T, T], 3, 1 / 3), (["a", "a", T, T, T, "b"], 3, 1 / 2), ([T, None, None, None],
    4, 1),
    (["a", "a", "a", T], 4, 0), (["a", T], 1, 1 / 2)])
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


def test_score():
    problems = [{"id": f"s/test/{i}", "level": 1 + i // 2, "tags": ["odd"] if i % 2 else [],
        "kind": "math"} for i in range(4)]
    responses = [{"text": f"\\boxed{{{r}}}", "correct": r == 1, "finish": "stop" if r < 3 else "length"}
                 for r in (1, 1, 2, 1, 3, 3, 3, 2)]
    score = eval.score(problems, responses, np.random.default_rng(0))
    assert (score["accuracy"], score["n"], score["samples"], score["cut"]) == (3 / 8, 4, 2, 3 / 8)
    assert score["correct"] == {"s/test/0": 2, "s/test/1": 1, "s/test/2": 0, "s/test/3": 0}
    assert {level: part["accuracy"] for level, part in score["by_level"].items()} == {"1": 3 / 4, "2": 0}
    assert {name: part["accuracy"] for name, part in score["by_subject"].items()} == {"odd": 1 / 4}
    assert {k: part["accuracy"] for k, part in score["pass_at"].items()} == {"1": 3 / 8, "2": 1 / 2}
    assert score["maj_at"]["2"]["accuracy"] == (1 + 1 / 2) / 4 and list(score["by_set"]) == ["s/test"]
    assert score["level"] == {"s/test/0": 1, "s/test/1": 1, "s/test/2": 2, "s/test/3": 2}
    shares = eval.table_of([score["correct"]], score["correct"]) / score["samples"]
    assert shares.tolist() == [[1, 0.5, 0, 0]]
    found = eval.mean_over_seeds(shares, np.random.default_rng(0), shares)
    assert found == {"accuracy": 0, "interval": [0, 0], "n": 4}


@pytest.mark.parametrize("right, n, low, high", [  # Clopper-Pearson: tables; 0 of n is [0, 1 - 0.025^(1/n)]
    (0, 10, 0, 0.3085), (10, 10, 0.6915, 1), (5, 10, 0.1871, 0.8129), (1, 20, 0.0013, 0.2487), (90, 100, 0.8238,
    0.9510)])
def test_binomial_interval(right, n, low, high):
    assert eval.binomial_interval(right, n) == pytest.approx([low, high], abs=1e-4)


def test_intervals_cover_the_truth():
    """In 93-97 % of 1,000 simulated evaluations: exact ones of greedy answers, bootstrapped ones of several draws."""
    rng = np.random.default_rng(0)
    exact = functools.cache(lambda right: eval.binomial_interval(right, 500))
    covered = [low <= 0.62 <= high for low, high in map(exact, rng.binomial(500, 0.62, size=1000).tolist())]
    assert 0.93 <= np.mean(covered) <= 0.97
    a, b, n, samples = 0.6, 0.9, 150, 8  # problems differ: how easy they are is Beta-distributed, 0.4 on average
    covered = {"mean": [], "pass@4": []}
    truth = {"mean": a / (a + b), "pass@4": 1 - np.prod([(b + i) / (a + b + i) for i in range(4)])}
    for _ in range(1000):
        correct = (rng.random((n, samples)) < rng.beta(a, b, size=(n, 1))).astype(float)
        for name, found in ("mean", eval.accuracy(correct, rng)), ("pass@4", eval.mean_of(eval.pass_at(correct, 4),
            rng)):
            low, high = found["interval"]
            covered[name].append(low <= truth[name] <= high)
    assert all(0.93 <= np.mean(c) <= 0.97 for c in covered.values()), {name: np.mean(c) for name, c in covered.items()}
