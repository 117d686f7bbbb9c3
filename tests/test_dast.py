"""dast.py's rules against tables written out by hand, and its records against a recomputation."""
import json
import math

import numpy as np
import pytest
import torch

import dast


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(dast, "K_SAMPLES", 2)


@pytest.mark.parametrize("correct, draws, level", [
    (10, 10, "E"), (8, 10, "E"), (7, 10, "M"), (5, 10, "M"), (4, 10, "M"), (3, 10, "H"), (1, 10, "H"), (0, 10, "U"),
    (5, 7, "E"), (2, 5, "M"), (1, 3, "H"), (1, 1, "E"), (0, 1, "U")])  # 0.7 and 0.4 themselves are M
def test_levels(correct, draws, level):
    assert dast.level_of(correct, draws) == level


def test_targets_and_budgets_rise_with_difficulty(few_samples):
    assert [dast.target_and_budget(level) for level in "EMHU"] == [(1, 2), (2, 4), (3, 8), (4, 16)]


def lines(path):
    return [json.loads(line) for line in open(path)]


def draws(*texts):
    """Responses from notes: "x" is wrong, "cut:a" a correct text cut by the limit, anything else a correct text."""
    return [{"draw": draw, "text": text.removeprefix("cut:"), "correct": not text.endswith("x"),
             "finish": "length" if text.startswith("cut:") else "stop"} for draw, text in enumerate(texts)]


@pytest.mark.parametrize("texts, outcomes, target, chosen", [
    # the example of the method's notes, draws counted from 0: H, T = 3; correct at 1, 4 (the same text), 6 and 7
    ("x a x x a x b c".split(), [0, 1, 0, 0, 1, 0, 2, 3], 3, [1, 6, 7]),
    # the same counted from 1: its eighth draw is not needed any more
    ("a x x a x b c".split(), [1, 0, 0, 1, 0, 2, 3], 3, [0, 5, 6]),
    ("x x x x".split(), [0, 0, 0, 0], 4, []),
    (["a", " a\n", "A", "a b"], [1, 1, 2, 3], 2, [0, 2]),  # only blanks around it leave a text the same
    (["cut:a", "a", "cut:b"], [0, 1, 0], 4, [1]),  # a correct answer that did not end is not learnt
    ([], [], 1, []),
])
def test_choice(texts, outcomes, target, chosen):
    assert dast.outcomes_of(draws(*texts)) == outcomes
    assert dast.choose(outcomes, target) == chosen


@pytest.mark.parametrize("texts, solved, chosen, pairs", [
    ("x a x cut:b".split(), True, [1], [(1, {0, 2})]),  # a right one, and one of the two wrong ones
    ("x a b c".split(), False, [1, 2, 3], [(1, {0})]),  # each wrong one once: the rest have no partner
    ("a b".split(), False, [0, 1], []),
    ("x x".split(), True, [], [(-1, {0, 1})]),  # unsolved: the worked solution is preferred
    ("x x".split(), False, [], []),
    ("x cut:a".split(), True, [], []),  # it was right, and cut: neither learnt nor replaced
    ("cut:x x a".split(), False, [2], [(2, {1})]),  # what was cut is not rejected as if it had ended
])
def test_pairs(texts, solved, chosen, pairs):
    seen = set()
    for seed in range(20):
        found = dast.choose_pairs(draws(*texts), chosen, solved, np.random.default_rng(seed))
        assert [better for better, _ in found] == [better for better, _ in pairs]
        assert all(worse in allowed for (_, worse), (_, allowed) in zip(found, pairs))
        seen |= set(found)
    assert seen == {(better, worse) for better, allowed in pairs for worse in allowed}


def test_draws_are_spread_evenly():
    counts = dast.spread_evenly(17, 5, np.random.default_rng(0))
    assert sorted(counts) == [3, 3, 3, 4, 4]
    assert counts == dast.spread_evenly(17, 5, np.random.default_rng(0))
    assert sorted(dast.spread_evenly(3, 5, np.random.default_rng(0))) == [0, 0, 1, 1, 1]


def test_examples_are_others_of_the_same_level_then_of_easier_ones():
    pools = {level: [{"id": f"{level}{i}", "problem": f"{level}{i}"} for i in range(n)]
             for level, n in zip("EMHU", (9, 3, 2, 1))}

    def drawn(problem, level, shots, seed):
        rng = np.random.default_rng(seed)
        return [e["id"] for e in dast.draw_examples({"problem": problem}, level, pools, shots, rng)]

    for seed in range(20):
        assert len(set(drawn("E0", "E", 8, seed))) == 8 and "E0" not in drawn("E0", "E", 8, seed)
        # H0: one other H, then all three M, then four E
        ids = drawn("H0", "H", 8, seed)
        assert ids[0] == "H1" and sorted(ids[1:4]) == ["M0", "M1", "M2"] and {i[0] for i in ids[4:]} == {"E"}
        assert len(ids) == len(set(ids)) == 8
        # E has 9: with 11 asked for, the harder levels fill up
        assert [i[0] for i in drawn("x", "E", 11, seed)] == ["E"] * 9 + ["M"] * 2
        # all there is: 15 problems less the one that is asked
        assert len(set(drawn("U0", "U", 20, seed))) == 14
    assert len({tuple(drawn("E0", "E", 2, seed)) for seed in range(20)}) > 10


def test_selection_alone_tells_every_decision(finished):
    """From selection.jsonl and the constants: pass rate, level, target, budget, choice; the training set follows."""
    run = finished / "runs" / "one"
    selection, train = (lines(run / "round_1" / name) for name in ("selection.jsonl", "train.jsonl"))
    assert len(selection) == 18
    probe, responses = (lines(run / name) for name in ("round_0/probe.jsonl", "round_1/responses.jsonl"))
    for s in selection:
        p = s["probe_correct"] / s["probe_draws"]
        hardness = 0 if p > 0.7 else 1 if p >= 0.4 else 2 if p > 0 else 3
        assert (s["pass_rate"], s["level"]) == (p, "EMHU"[hardness])
        assert (s["target"], s["budget"]) == (hardness + 1, 2 * 2**hardness)
        firsts = [d for d, k in enumerate(s["outcomes"]) if k and k not in s["outcomes"][:d]]
        assert s["chosen"] == firsts[:s["target"]] == firsts and s["copies"] == [1] * len(firsts)
        stopped_at_target = len(firsts) == s["target"] and firsts[-1] == len(s["outcomes"]) - 1
        assert stopped_at_target or len(s["outcomes"]) == s["budget"]
        # and the numbers that it starts from are those of the responses
        assert [r["correct"] for r in probe if r["id"] == s["id"]].count(True) == s["probe_correct"]
        mine = [r for r in responses if r["id"] == s["id"]]
        assert [r["draw"] for r in mine] == list(range(len(s["outcomes"])))
        texts = [r["text"] if r["correct"] and r["finish"] == "stop" else None for r in mine]
        assert [k == 0 for k in s["outcomes"]] == [text is None for text in texts]
        assert len(set(texts) - {None}) == max(s["outcomes"])
    assert {s["level"] for s in selection} == set("EMHU")  # the smoke run sees every level
    kept = [(s["id"], r["text"]) for s in selection for d in s["chosen"] for r in responses
            if (r["id"], r["draw"]) == (s["id"], d)]
    assert [(e["id"], e["completions"][0]) for e in train[:len(kept)]] == kept
    assert [e["id"] for e in train[len(kept):]] == [s["id"] for s in selection]  # D_u = D_a, then D_o


def test_dpo_loss_is_the_textbook_formula(monkeypatch):
    """Against the closed form in float64, and its gradient; ln 2 exactly where policy and reference are equal."""
    monkeypatch.setattr(dast, "BETA", 0.3)
    rng = torch.Generator().manual_seed(0)
    logprobs = torch.randn(9, dtype=torch.float64, generator=rng).sub(3).requires_grad_()
    batch = {"counts": [2, 3, 1, 3], "example": torch.tensor([0, 0, 1, 1]),
             "reference": torch.tensor([-5.0, -8.0, -2.5, -9.0], dtype=torch.float64)}
    total, weight, metrics = dast.dpo_loss(logprobs, batch)
    total.backward()
    w1, l1, w2, l2 = (float(part.sum()) for part in logprobs.detach().split(batch["counts"]))
    margins = [0.3 * ((w1 + 5.0) - (l1 + 8.0)), 0.3 * ((w2 + 2.5) - (l2 + 9.0))]
    closed_form = sum(math.log1p(math.exp(-m)) for m in margins)
    assert weight == 2 and float(total.detach()) == pytest.approx(closed_form, rel=1e-12)
    slopes = [-0.3 / (1 + math.exp(m)) for m in margins]  # of the loss, in log p of the preferred answer's tokens
    expected = [slopes[0]] * 2 + [-slopes[0]] * 3 + [slopes[1]] + [-slopes[1]] * 3
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(metrics["margin"]) == pytest.approx(sum(margins))
    assert int(metrics["preferred"]) == sum(m > 0 for m in margins)
    batch["reference"] = torch.tensor([w1, l1, w2, l2], dtype=torch.float64)
    assert float(dast.dpo_loss(logprobs.detach(), batch)[0] / 2) == math.log(2)
    nothing = dict(counts=[0], example=torch.tensor([]), reference=torch.tensor([]))
    total, weight, _ = dast.dpo_loss(torch.zeros(0, requires_grad=True), nothing)
    total.backward()  # a process without work joins the others
    assert (float(total.detach()), weight) == (0.0, 0)


def test_sft_loss_is_the_textbook_formula():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 6, 0, 3, 3])
    logprobs = logits.log_softmax(1)[range(5), targets]
    total, weight, _ = dast.sft_loss(logprobs, {})
    assert total / weight == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-12)
