"""dast.py's rules against tables written out by hand, and its records against a recomputation."""
import json

import numpy as np
import pytest

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


def draws(*texts):
    """Responses from notes: "x" is wrong, "cut:a" a correct text cut by the limit, anything else a correct text."""
    return [{"text": text.removeprefix("cut:"), "correct": text != "x",
             "finish": "length" if text.startswith("cut:") else "stop"} for text in texts]


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


def test_draws_are_spread_evenly():
    counts = dast.spread_evenly(17, 5, np.random.default_rng(0))
    assert sorted(counts) == [3, 3, 3, 4, 4]
    assert counts == dast.spread_evenly(17, 5, np.random.default_rng(0))
    assert sorted(dast.spread_evenly(3, 5, np.random.default_rng(0))) == [0, 0, 1, 1, 1]


def test_size_is_matched_by_leaving_out_or_repeating():
    rng, answers = np.random.default_rng(0), ["a", "b", "c"]
    assert len(set(dast.match_size(answers, 2, rng))) == 2
    assert dast.match_size(answers, 3, rng) == answers
    assert sorted(dast.match_size(answers, 7, rng))[:6] in (sorted("aabbcc"), sorted("aaabbc"))
    assert len(dast.match_size(answers, 7, rng)) == 7 and dast.match_size([], 5, rng) == []


def test_examples_are_others_of_the_same_level_then_of_easier_ones():
    pools = {level: [{"id": f"{level}{i}"} for i in range(n)] for level, n in zip("EMHU", (9, 3, 2, 1))}

    def drawn(problem, level, shots, seed):
        return [e["id"] for e in dast.draw_examples({"id": problem}, level, pools, shots, np.random.default_rng(seed))]

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
    selection = [json.loads(line) for line in open(run / "round_1" / "selection.jsonl")]
    train = [json.loads(line) for line in open(run / "round_1" / "train.jsonl")]
    assert len(selection) == 18
    for s in selection:
        p = s["probe_correct"] / s["probe_draws"]
        rank = 0 if p > 0.7 else 1 if p >= 0.4 else 2 if p > 0 else 3
        assert (s["pass_rate"], s["level"]) == (p, "EMHU"[rank])
        assert (s["target"], s["budget"]) == (rank + 1, 2 * 2**rank)
        firsts = [d for d, k in enumerate(s["outcomes"]) if k and k not in s["outcomes"][:d]]
        assert s["chosen"] == firsts[:s["target"]] == firsts
        stopped_at_target = len(firsts) == s["target"] and firsts[-1] == len(s["outcomes"]) - 1
        assert stopped_at_target or len(s["outcomes"]) == s["budget"]
    chosen = [s["id"] for s in selection for _ in s["chosen"]]
    assert [e["id"] for e in train] == chosen + [s["id"] for s in selection]  # D_u = D_a, then D_o
    responses = {(r["id"], r["draw"]): r for r in map(json.loads, open(run / "round_1" / "responses.jsonl"))}
    assert list(responses) == [(s["id"], d) for s in selection for d in range(len(s["outcomes"]))]
    kept = [responses[s["id"], d]["text"] for s in selection for d in s["chosen"]]
    assert [e["completions"] for e in train[:len(kept)]] == [[text] for text in kept]


def test_sft_loss_is_the_textbook_formula():
    import torch
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 6, 0, 3, 3])
    logprobs = logits.log_softmax(1)[range(5), targets]
    total, weight, _ = dast.sft_loss(logprobs, {})
    assert total / weight == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-12)
