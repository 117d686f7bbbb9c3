"""The four methods' rules against tables worked out by hand, golden traces and oracles; reward models, taggers and
encoders against references; short real runs of what only one method has."""
import itertools
import json
import math
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast,
                          Qwen2Model)

import adastar
import common
import dast
import hs_star
import sai_dpo
from conftest import ROOT, SHARED, TOY, killed_when, launch, lines, refusal_of

sys.path.insert(0, str(ROOT / "tests" / "studies"))
from proportions import simulate  # noqa: E402


def rng(seed=0):
    return np.random.default_rng(seed)


class Seeds:
    """What the rules need of a run: a generator for each key."""

    def rng(self, *key):
        return rng(common.seed_of(*key))


def set_constants(monkeypatch, script, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(script, name, value)


def cases(rule, *rows, **constants):
    """Parameters: of each row the arguments of a rule and, last, its result, under these constants of its script."""
    parameters = []
    for number, (*arguments, result) in enumerate(rows):
        parameters.append(pytest.param(rule, constants, arguments, result, id=f"{rule.__name__}-{number}"))
    return parameters


def drawn(*notes):
    """Responses from notes: "x" is wrong, "cut:a" a correct text that was cut, all else is correct."""
    responses = []
    for draw, note in enumerate(notes):
        finish = "length" if note.startswith("cut:") else "stop"
        responses.append({"id": "p", "draw": draw, "text": note.removeprefix("cut:"), "finish": finish,
                          "correct": not note.endswith("x")})
    return responses


LAST, W = np.array([1, 3, 0, 3, 0, 0]), np.array([0.0, 1.0, 0.5, 0.0, 0.0, 0.5])  # t~ and w of six problems
ALL_DRAWS = {"STOP_AT_BETA": False, "TRAIN_ON_ALL": True}
THIRD = [1 / 3, 1 / 3, 1 / 3]
PROBED = np.array([0, 0, 1, 1, 2])  # clusters of the probed problems
RATES = np.array([1.0, 0.5, 0.0, 0.0, 1.0])  # their p: errors 0.5, 2 and 0
BELOW = np.array([1.0, 0.5, 0.0, 0.0, (1 - math.sqrt(0.6)) / 2])  # means of 4 p (1 - p): 0.5, 0.1 at least, 0.4
QUARTERS = np.array([0.5, 0.25, 0.25])
FEW_TEXTS = ["sums"] * 4 + ["digit sums"] * 3 + ["", "7 + 8"]  # the last two have no words
RULES = [
    # DAST: 0.7 and 0.4 are M
    *cases(dast.pass_rate, (drawn(*"abxx"), 0.5), (drawn("x", "cut:a"), 0.5), (drawn("x"), 0.0)),
    *cases(dast.level_of, (1.0, "E"), (8 / 10, "E"), (7 / 10, "M"), (4 / 10, "M"), (2 / 5, "M"), (3 / 10, "H"),
           (1 / 10, "H"), (0.0, "U")),
    *cases(dast.target_and_budget, ("E", (5, 10)), ("M", (6, 20)), ("H", (7, 40)), ("U", (8, 40))),
    *cases(dast.target_and_budget, ("E", (None, 10)), ("U", (None, 10)), VARIANT="L"),  # vanilla: all that is right
    *cases(dast.distinct_of,
           (drawn(*"xaxxaxbc"), [0, 1, 0, 0, 1, 0, 2, 3]),
           (drawn("a", " a\n", "A", "a b"), [1, 1, 2, 3]),  # only blanks around it leave a text the same
           (drawn("cut:a", "a", "cut:b"), [0, 1, 0]),  # a correct answer that did not end is not learnt
           (drawn(), [])),
    *cases(dast.choose,
           ([0, 1, 0, 0, 1, 0, 2, 3], 3, [1, 6, 7]),  # the example of the method's notes
           ([1, 0, 0, 1, 0, 2, 3], 3, [0, 5, 6]), ([0, 0, 0, 0], 4, []), ([1, 1, 2, 3], 2, [0, 2]),
           ([1, 2, 1, 3], None, [0, 1, 3]), ([], 1, [])),
    # AdaSTaR: t~ 0: w 0, .5, .5 in the order of the file; then t~ 1: w 0; then t~ 3
    *cases(adastar.walk_order, (LAST, W, rng(), [4, 2, 5, 0, 3, 1]), ORDER="adaptive"),
    *cases(adastar.walk_order, (LAST, W, rng(), [2, 4, 5, 0, 1, 3]), ORDER="stale"),
    *cases(adastar.walk_order, (LAST, W, rng(), [4, 0, 3, 2, 5, 1]), ORDER="hardest"),
    *cases(adastar.beta_of, (1, 320), (2, 384), (3, 456), (4, 552), (8, 1144), (16, 4928)),  # the paper's schedule
    *cases(adastar.to_commit, (8, 4, 2), (6, 5, 4), (7, 7, 7), (9, 8, 7), (198, 66, 22), (12, 0, 0), (1, 1, 1),
           (49, 7, 1)),  # 49 * (7 / 49)^2 is 0.999... in floating point
    *cases(adastar.to_commit, (8, 4, 8), (5, 0, 5), CURRICULUM_POWER=0),
    *cases(adastar.to_commit, (10, 9, 7), CURRICULUM_POWER=3),
    *cases(adastar.outcomes_of, (drawn("cut:a", "a", "x"), [0, 1, 0])),  # a cut answer is wrong
    *cases(adastar.choose, ([0, 1], [1]), ([1], [0]), ([1, 1], [0]), ([0, 0], []), TRACES=1),
    *cases(adastar.choose, ([1, 1, 0, 1], [0, 1, 3]), TRACES=0),
    *cases(adastar.choose, ([0, 1, 1, 1], [1, 2]), TRACES=2),
    *cases(adastar.spread, (3, 3, rng(), [1, 1, 1]), (3, 8, rng(), [3, 3, 2]), (0, 8, rng(), []),  # too few: repeated
           (4, 3, rng(), [1, 1, 1, 1])),  # with all traces of a problem there may be one more
    *cases(adastar.spread, (3, 8, rng(), [1, 1, 1]), FILL_STEPS=False),
    *cases(adastar.spread, (4, 3, rng(), [1, 1, 1, 1]), (3, 8, rng(), [1, 1, 1]), **ALL_DRAWS),
    *cases(adastar.spread, (3, 8, rng(), [3, 3, 2]), STOP_AT_BETA=False),
    *cases(adastar.hinted, ({"problem": "1+1?", "answer": "2"}, {"problem": "1+1? (Answer: 2)", "answer": "2"}),
           ({"problem": "?", "solution": "\\boxed{2}"}, {"problem": "? (Answer: 2)", "solution": "\\boxed{2}"}),
           ({"problem": "?\n(A) 2", "answer": "A"}, {"problem": "?\n(A) 2\n(Answer: A)", "answer": "A"})),
    # HS-STaR
    *cases(hs_star.thresholds, ((0.25, 0.5),), PRM="x/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", MODEL="y/Qwen2.5-7B"),
    *cases(hs_star.reward_of, ([0.9, 0.2, 0.8], 0.2), ([], 0)),  # that of its worst step
    *cases(hs_star.slice_of, (3, 1, Seeds(), [0, 1, 2]), (3, 2, Seeds(), [0, 1, 2]), SLICE=4),  # fewer than a slice
    # SAI-DPO
    *cases(sai_dpo.steps_of, ("", 1), ("\\boxed{4}", 1), ("a\nb", 1), ("a\n\nb", 2), ("a\n \t\nb\n\n\n\nc\n", 3),
           ("a\r\n\r\nb", 2), ("Step 1: a\nStep 2: b\n\nso\n\nand so", 2),  # markers count where there are any
           ("**Step 1** a\n\n## Step 2\n\n  step 3. b", 3), ("In step 2 we\n\nsaw Step 1", 2)),  # if they begin a line
    *cases(sai_dpo.error_masses, (RATES, PROBED, np.array([10, 20, 5]), pytest.approx([2.5 / 9, 20 / 9, 0])),
           (RATES, PROBED, np.array([10, 0, 5]), pytest.approx([2.5, 0, 0])),  # one is used up
           (np.ones(5), PROBED, np.array([3, 4, 5]), [0, 0, 0])),  # no failure at all
    *cases(sai_dpo.shares_of, (np.array([1.0, 2.5, 0.0]), pytest.approx([2 / 6.5, 3.5 / 6.5, 1 / 6.5])),
           (np.zeros(4), [0.25] * 4), SMOOTHING=1.0),
    *cases(sai_dpo.shares_of, (np.array([1.0, 4.0, 0.0]), pytest.approx([0.2, 0.8, 0.0])),
           (np.zeros(4), [0.25] * 4), SMOOTHING=0.0),
    *cases(sai_dpo.weights_of, (QUARTERS, BELOW, PROBED, [0.5, 0.25, 0.25]), DIFFICULTY_BEFORE=False),
    *cases(sai_dpo.weights_of, (QUARTERS, BELOW, PROBED, [0.5, 0.25, 0.25]), SELECT="knowledge"),
    *cases(sai_dpo.weights_of, (QUARTERS, BELOW, PROBED, None), SELECT="difficulty"),
    *cases(sai_dpo.weights_of, (QUARTERS, BELOW, PROBED, None), SELECT="random"),
    *cases(sai_dpo.weights_of, (QUARTERS, BELOW, PROBED, pytest.approx([10 / 15, 1 / 15, 4 / 15]))),
    *cases(sai_dpo.apportion, (np.array([0.5, 0.3, 0.2]), np.array([99, 99, 99]), 10, [5, 3, 2]),
           (np.array([0.5, 0.3, 0.2]), np.array([2, 99, 99]), 10, [2, 5, 3]),  # 8 left, at 3 : 2 -> 4.8 and 3.2
           (np.array([0.5, 0.3, 0.2]), np.array([2, 3, 99]), 10, [2, 3, 5]),  # and on to the next
           (np.array([0.5, 0.3, 0.2]), np.array([2, 3, 4]), 10, [2, 3, 4]),  # 9 are all there are
           (np.array(THIRD), np.array([9, 9, 9]), 8, [3, 3, 2]),  # of equal remainders the first
           (np.array([0.6, 0.25, 0.15]), np.array([9, 9, 9]), 3, [2, 1, 0]),  # 1.8, 0.75, 0.45
           (np.array([0.7, 0.0, 0.3]), np.array([3, 9, 3]), 9, [3, 3, 3]),  # without a share what is left
           (np.array([0.9, 0.1]), np.array([0, 0]), 5, [0, 0])),
    *cases(sai_dpo.kmeans, (sai_dpo.tfidf(FEW_TEXTS), 20, rng(), [0] * 4 + [1] * 3 + [2] * 2),  # few different points
           (sai_dpo.tfidf(["one text"] * 3), 20, rng(), [0, 0, 0])),
]


@pytest.mark.parametrize("rule, constants, arguments, expected", RULES)
def test_rule_by_hand(monkeypatch, rule, constants, arguments, expected):
    set_constants(monkeypatch, sys.modules[rule.__module__], **constants)
    found = rule(*arguments)
    assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected


def permuted(values, n=None):
    return set(itertools.permutations(values, n))


def joined(right, wrong):
    """All ways to join each right answer with a wrong one of its own."""
    return {tuple(zip(right, order)) for order in permuted(wrong, len(right))}


RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
CHANCE = [  # (rule, arguments before the generator, constants, all that may come out)
    # DAST: a right one, and one of the two wrong ones; each wrong one once, so that the rest have no partner
    (dast.choose_pairs, (drawn("x", "a", "x", "cut:b"), [1], True), {}, {((1, 0),), ((1, 2),)}),
    (dast.choose_pairs, (drawn("x", "a", "b", "c"), [1, 2, 3], False), {}, {((1, 0),)}),
    (dast.choose_pairs, (drawn("a", "b"), [0, 1], False), {}, {()}),
    (dast.choose_pairs, (drawn("x", "x"), [], True), {}, {((None, 0),), ((None, 1),)}),  # the solution is preferred
    (dast.choose_pairs, (drawn("x", "x"), [], False), {}, {()}),
    (dast.choose_pairs, (drawn("x", "cut:a"), [], True), {}, {()}),  # right, and cut: neither learnt nor replaced
    (dast.choose_pairs, (drawn("cut:x", "x", "a"), [2], False), {}, {((2, 1),)}),  # what was cut is not rejected
    # AdaSTaR: the walk in random order; two answers of five where it does not stop
    (adastar.walk_order, (np.zeros(3), np.zeros(3)), {"ORDER": "random"}, permuted(range(3))),
    (adastar.spread, (5, 2), {"STOP_AT_BETA": False}, permuted([1, 1, 0, 0, 0])),
    # HS-STaR: what is left over of the budget; the best looking right and wrong answers; all ways to join them
    (hs_star.quotas, (["boundary"] * 3 + ["inlier"],), {"BUDGET": 2, "PRE_SAMPLES": 1},
     {(2, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 0)}),
    (hs_star.choose_pairs, ([1, 0, 1, 0, 1], [0.2, 0.9, 0.8, 0.1, 0.5]), {}, joined((2, 4), (1, 3))),
    (hs_star.choose_pairs, ([0, 1, 0, 0], [0.1, 0.0, 0.3, 0.2]), {}, {((1, 2),)}),  # the wrong one that looks best
    (hs_star.choose_pairs, ([0, 1, 0], [0.5, 0.5, 0.5]), {}, {((1, 0),)}),  # of equals the first
    (hs_star.choose_pairs, ([1, -1, 0], [0.1, 0.9, 0.2]), {}, {((0, 2),)}),  # a cut one is in no pair
    (hs_star.choose_pairs, ([1, -1], [0.1, 0.9]), {}, {()}), (hs_star.choose_pairs, ([1, 1], [0.1, 0.9]), {}, {()}),
    (hs_star.choose_pairs, ([1, 1, 1, 0, 0, 0, 0], RISING), {"PAIRING": "hard"}, joined((0, 1, 2), (4, 5, 6))),
    (hs_star.choose_pairs, ([1, 1, 1, 0, 0, 0, 0], RISING), {"PAIRING": "random"}, joined((0, 1, 2), (3, 4, 5, 6))),
    # SAI-DPO: a right and a wrong answer, never the cut one
    (sai_dpo.choose_pair, ([1, 0, -1, 1, 0],), {}, {(0, 1), (0, 4), (3, 1), (3, 4)}),
]


@pytest.mark.parametrize("rule, arguments, constants, may", CHANCE)
def test_rule_by_chance_gives_all_that_it_may_and_nothing_else(monkeypatch, rule, arguments, constants, may):
    set_constants(monkeypatch, sys.modules[rule.__module__], **constants)
    found = set()
    for seed in range(300):
        result = list(rule(*arguments, rng(seed)))
        pairs = result and isinstance(result[0], tuple)
        found.add(tuple(sorted(result) if pairs else result))
    assert found == may


@pytest.mark.parametrize("script, constants, words", [
    (dast, {"SHOTS": 0}, "without examples in the prompt L has no effect"),
    (dast, {"CUTS": (0.4, 0.7)}, "--cuts (0.4, 0.7)"),
    (dast, {"DRAWS_LIKE": "runs/x"}, "are for runs without P"),
    (dast, {"VARIANT": "L", "SIZE_LIKE": "runs/x"}, "runs/x/round_3/selection.jsonl: no such file"),
    (adastar, {"TRAIN_ON_ALL": True}, "--train-on-all needs --no-stop-at-beta"),
    (adastar, {"TRACES": 2}, "--traces 2 needs --no-retry"),
    (adastar, {"TRACES": 3, "RETRY": False}, "as many --k-samples"),
    (adastar, {"HINT": True, "K_SAMPLES": 1}, "--hint needs --k-samples above 1"),
    (hs_star, {"PRE_SAMPLES": 9}, "--pre-samples 9 must not exceed --budget 8"),
    (hs_star, {"PRM": ""}, "without --prm there are no rewards"),
    (hs_star, {"PRM": "", "DIFFICULTY": "accuracy", "PAIRING": "random", "REPORT_ONLY": True}, "nothing to report"),
    (hs_star, {"MODEL": "other"},
     "--tau-low 0.0 and --tau-high 0.0 for Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B with other"),
    (hs_star, {"TAU_LOW": 0.9}, "--tau-low 0.9 and --tau-high 0.65"),
    (sai_dpo, {"SELECT": "knowledge", "PREFER": "hardest"}, "--prefer hardest is for"),
])
def test_constants_that_contradict_are_refused_in_one_line(monkeypatch, capsys, script, constants, words):
    set_constants(monkeypatch, script, **constants)
    assert words in refusal_of(capsys, script.main)


# DAST -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, unit, constants", [
    ((0.98, 0.84), 10, {}), ((0.36, 1.44), 10, {}),  # GSM8K and MATH, as tests/studies/proportions.py says
    ((0.3, 0.35), 2, dast.TOY),  # the toy's levels, if its texts were all distinct (a problem of E has one or two)
])
def test_proportions_of_dast_give_hard_problems_more_than_vanilla(shape, unit, constants):
    rates = rng().beta(*shape, 2000)
    settings = vars(dast) | constants
    kept, _ = simulate(rates, settings["TARGETS"], settings["BUDGETS"], settings["K_PROBE"])
    vanilla, _ = simulate(rates, [unit] * 4, [unit] * 4, settings["K_PROBE"])
    assert kept[2] >= 2 * vanilla[2] and kept[3] >= 2 * vanilla[3]
    assert kept.sum() >= 0.95 * vanilla.sum()


def examples_drawn(problem, level, shots, seed):
    """Ids of the examples that are shown: of 9 easy problems, 3 of M, 2 of H and one unsolved."""
    solved = []
    for name, n in zip("EMHU", (9, 3, 2, 1)):
        solved += [{"id": f"{name}{i}", "problem": f"{name}{i}"} for i in range(n)]
    pools = dast.example_pools(solved, {p["id"]: p["id"][0] for p in solved}, shots)
    return [e["id"] for e in dast.draw_examples({"problem": problem}, pools[level], shots, rng(seed), bool)]



@pytest.mark.parametrize("problem, level, shots, n, levels", [
    ("E0", "E", 8, 8, "E"), ("M1", "M", 2, 2, "M"), ("H0", "H", 2, 2, "EMHU"), ("x", "U", 20, 15, "EMHU"),
])
def test_examples_of_dast_are_others_of_the_level_or_of_all_where_it_has_too_few(problem, level, shots, n, levels):
    seen = set()
    for seed in range(40):
        ids = examples_drawn(problem, level, shots, seed)
        seen.update(i[0] for i in ids)
        assert len(set(ids) - {problem}) == n == len(ids)
    assert seen == set(levels)


def test_examples_of_dast_that_overflow_the_context_give_way_to_the_next_shorter():
    pool = [{"id": str(n), "problem": str(n), "solution": "x" * n} for n in (10, 20, 30, 40, 50)]

    def drawn_with(room, problem="?", shots=2):
        examples = dast.draw_examples({"id": problem, "problem": problem}, pool, shots, rng(),
                                      lambda examples: sum(len(e["solution"]) for e in examples) <= room)
        return sorted(len(e["solution"]) for e in examples)

    first, second = drawn_with(10**6)
    assert drawn_with(first + second) == [first, second]
    shorter = [n for n in (10, 20, 30, 40) if n < second and n != first]
    assert drawn_with(first + second - 1) == sorted([first, shorter[-1]])
    assert drawn_with(30) == [10, 20] and drawn_with(10) == [10] and drawn_with(9) == []
    assert drawn_with(30, problem="20") == [10]  # never the problem itself


# AdaSTaR --------------------------------------------------------------------------------------------------------------

def iterate(numbers, betas, outcomes):
    """adastar.py's loop on recorded outcomes of problems, which stand in the file in the order of `numbers`.

    Returns of each iteration its selection, and what a golden trace says of it (alpha to rounding)."""
    problems = [{"id": number} for number in numbers]
    last, w = np.zeros(len(problems), int), np.zeros(len(problems))
    alpha = 0.5
    selections, traces = [], []
    for t, (beta, right) in enumerate(zip(betas, outcomes), 1):
        def draw(block):
            responses = {}
            for i in block:
                notes = ["r" if outcome else "x" for outcome in right[numbers[i]]]
                enough = adastar.RETRY and notes[0] == "r"
                responses[i] = drawn(*notes[:1] if enough else notes)
            return responses

        visited = adastar.walk(adastar.walk_order(last, w, rng(t)), beta, alpha, draw)
        selection = adastar.select(problems, visited, last, w, beta, rng(t))
        alpha = selection[0]["alpha"]
        trained = []
        for i, s in zip(visited, selection, strict=True):
            trained += [s["id"]] * len(s["chosen"])
            if s["committed"]:
                last[i], w[i] = t, s["win_rate"]
        selections.append(selection)
        traces.append({"visited": [s["id"] for s in selection], "trained": trained,
                       "alpha": pytest.approx(alpha, abs=1e-12),
                       "committed": [s["id"] for s in selection if s["committed"]],
                       "heap": [[int(last[i]), float(w[i]), numbers[i]] for i in adastar.walk_order(last, w, rng())]})
    return selections, traces


def by_name(n):
    """Problems in the order of the text of their names, which ties go by in the released program."""
    return sorted(range(n), key=lambda i: f"id_{i}")


def traces_of(*kinds):
    """Golden traces whose names begin so, as parameters; a skipped one where shared/ is absent."""
    path = SHARED / "traces" / "adastar.json"
    if not path.exists():
        return [pytest.param("", None, marks=pytest.mark.skip(reason=f"{path} is not on this machine"))]
    traces = json.loads(path.read_text())
    return [pytest.param(name, trace, id=name) for name, trace in traces.items() if name.startswith(kinds)]


BLOCKS = [1, 7, 10**9]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name, trace", traces_of("default", "power0", "exhausted", "paper"))
def test_walk_follows_the_golden_traces(monkeypatch, name, trace, block):
    """In "paper" both draws are made and all correct ones taken, and ties go by the name's text."""
    settings = trace["settings"]
    numbers = range(settings["n"])
    set_constants(monkeypatch, adastar, CURRICULUM_POWER=int(settings.get("power", 2)),
                  block_size=lambda missing, rate: block)
    if name.startswith("paper"):
        set_constants(monkeypatch, adastar, TRACES=0, RETRY=False)
        numbers = by_name(settings["n"])
    expected = [{name: iteration[name] for name in ("visited", "trained", "committed", "heap", "alpha")}
                for iteration in trace["iterations"]]
    assert iterate(numbers, settings["betas"], trace["outcomes"])[1] == expected


def released(n, betas, outcomes, batch, hint, whole=round, **_):
    """The released program on one process, in our words: generation in batches, retries first in the next,
    the stop looked at between them, `whole` numbers by rounding, ties by the text "id_<i>"."""
    last, won, tried = [0] * n, [0] * n, [0] * n
    found = []

    def key(i):
        return last[i], won[i] / tried[i] if tried[i] else 0, f"id_{i}"

    for t, (beta, right) in enumerate(zip(betas, outcomes), 1):
        fresh = iter(sorted(range(n), key=key))
        owed, visited, trained = [], [], []
        now = {}
        hits, tries = [0, 0], [0, 0]
        while sum(hits) < beta:
            todo = [(i, 1) for i in owed]
            while len(todo) < batch and (i := next(fresh, None)) is not None:
                todo.append((i, 0))
                visited.append(i)
                now[i] = [0, 0]
            if not todo:
                break
            owed = []
            for i, draw in todo:
                now[i][1] += 1
                tries[draw] += 1
                if right[i][draw]:
                    now[i][0] += 1
                    hits[draw] += 1
                    trained.append(i)
                elif draw == 0:
                    owed.append(i)
        alpha = sum(hits) / len(visited)
        if hint:
            first = hits[0] / len(visited)
            alpha = first + (1 - first) * (hits[1] / tries[1] if tries[1] else 0)
        committed = visited[:whole(len(visited) * alpha ** 2)]
        for i in committed:
            last[i], (won[i], tried[i]) = t, now[i]
        found.append({"visited": visited, "trained": trained[:beta], "alpha": alpha, "committed": committed,
                      "heap": [[*key(i)[:2], i] for i in sorted(range(n), key=key)]})
    return found


@pytest.mark.parametrize("name, trace", traces_of("released"))
def test_oracle_is_the_released_program(name, trace):
    """It agrees with recorded runs of it; so what differs there is understood."""
    found = released(outcomes=trace["outcomes"], **trace["settings"])
    for iteration, expected in zip(found, trace["iterations"], strict=True):
        expected["alpha"] = pytest.approx(expected["alpha"], abs=1e-12)
        assert iteration == {name: expected[name] for name in iteration}


@pytest.mark.parametrize("seed", range(20))
def test_walk_in_any_blocks_equals_the_released_program_one_at_a_time(monkeypatch, seed):
    """In batches of one, floor for round, on problems that get easier; in one iteration there are too few answers."""
    r = rng(seed)
    n = int(r.integers(10, 150))
    outcomes = [(r.random((n, 2)) < 0.1 + 0.15 * t).astype(int).tolist() for t in range(5)]
    betas = r.integers(1, n // 2, 5).tolist()
    betas[1] = 2 * n
    expected = released(n, betas, outcomes, 1, False, whole=lambda x: math.floor(x + 1e-9))
    selections = []
    for block in BLOCKS:
        set_constants(monkeypatch, adastar, block_size=lambda missing, rate: block)
        selection, traces = iterate(by_name(n), betas, outcomes)
        selections.append(selection)
        assert traces == expected
    assert selections[0] == selections[1] == selections[2]


@pytest.mark.parametrize("share, rate", [(0.02, 0.5), (0.3, 0.95), (0.5, 0.02), (0.9, 0.5), (0.9, 0.95)])
def test_walk_asks_in_order_in_few_blocks_for_little_more_than_it_needs(share, rate):
    """Whatever rate it guesses at first: by the rate so far a tenth more than what is missing, in whole batches."""
    order = rng(1).permutation(3000)
    right = rng(2).random(3000) < share
    blocks = []

    def draw(block):
        blocks.append(block.tolist())
        return {i: drawn("r" if right[i] else "x") for i in block}

    visited = list(adastar.walk(order, 200, rate, draw))
    asked = sum(blocks, [])
    assert asked == order[:len(asked)].tolist()
    assert visited == asked[:len(visited)]
    assert right[visited].sum() == min(200, right.sum())
    assert len(asked) <= max(1.2 * len(visited), 1.1 * 200 / max(rate, 0.1)) + common.GROUP
    assert len(blocks) <= 4


def test_walk_without_stop_visits_all(monkeypatch):
    set_constants(monkeypatch, adastar, STOP_AT_BETA=False)
    visited = adastar.walk(np.arange(100), 5, 0.5, lambda block: {i: drawn("r") for i in block})
    assert list(visited) == list(range(100))


def test_hint_changes_the_second_draws_alone_and_is_never_trained_on(tmp_path):
    drawn_by = {}
    for flag in "--hint", "--no-hint":
        launch(tmp_path, "adastar.py", "--toy", "--held-out", 0, "--n-test", 4, "--rounds", 1, "--n-train", 16,
               "--no-stop-at-beta", flag, "--name", flag[2:])
        run = tmp_path / "runs" / flag[2:]
        drawn_by[flag] = {(r["id"], r["draw"]): r["text"] for r in lines(run / "round_1/responses_0.jsonl")}
        assert not any("(Answer:" in e["prompt"] for e in lines(run / "round_1/train.jsonl"))
    hint, plain = drawn_by.values()
    differ = {draw for i, draw in hint.keys() & plain.keys() if hint[i, draw] != plain[i, draw]}
    assert differ == {1}


# HS-STaR --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("outcomes, rewards, phi_r, classes", [  # classes with both, accuracy, reward
    ([1, 1, 1], [0.7, 0.7, 0.7], 0.7, "iii"),
    ([1, 1, 1], [0.65, 0.65, 0.65], 0.65, "bib"),  # on the threshold is not above it
    ([1, 1, 1], [0.5, 0.7, 0.75], 0.65, "bib"),
    ([1, 1, 1], [0.1, 0.1, 0.1], 0.1, "bio"),
    ([1, 1, 0], [0.9, 0.9, 0.9], 0.9, "bbi"),
    ([1, 1, -1], [0.9, 0.9, 0.9], 0.9, "bbi"),  # cut is not correct
    ([0, 0, 0], [0.1, 0.1, 0.1], 0.1, "ooo"),
    ([0, -1, 0], [0.1, 0.1, 0.1], 0.1, "ooo"),
    ([0, 0, 0], [0.15, 0.15, 0.15], 0.15, "bob"),
    ([0, 0, 0], [0.05, 0.05, 0.9], 1 / 3, "bob"),
    ([0, 0, 0], [0.9, 0.9, 0.9], 0.9, "boi"),
    ([0, 1, 0], [0.1, 0.1, 0.1], 0.1, "bbo"),
])
def test_difficulty_of_hs_star(monkeypatch, outcomes, rewards, phi_r, classes):
    for way, name in zip(("both", "accuracy", "reward"), classes):
        set_constants(monkeypatch, hs_star, DIFFICULTY=way, TAU_LOW=0.15, TAU_HIGH=0.65)
        found = hs_star.difficulty_of(outcomes, rewards)
        assert found[:2] == (outcomes.count(1) / 3, pytest.approx(phi_r, abs=1e-15))
        assert found[2][0] == name, way


@pytest.mark.parametrize("n, pre", [(8, 3), (8, 1), (8, 8), (16, 4)])
@pytest.mark.parametrize("problems, boundary", [(1, 0), (1, 1), (7, 3), (101, 0), (101, 50), (101, 101)])
def test_budget_goes_to_the_boundary_alone_and_evenly(monkeypatch, n, pre, problems, boundary):
    """Spent is what was given: n N answers, or n_p N where there is no boundary."""
    set_constants(monkeypatch, hs_star, BUDGET=n, PRE_SAMPLES=pre)
    classes = rng().permutation(["boundary"] * boundary + ["inlier"] * (problems - boundary)).tolist()
    counts = hs_star.quotas(classes, rng())
    given = [count for count, name in zip(counts, classes, strict=True) if name == "boundary"]
    assert sum(counts) == sum(given) == ((n - pre) * problems if boundary else 0)
    assert not given or max(given) - min(given) <= 1


def test_slices_have_no_problem_in_common_while_the_problems_last(monkeypatch):
    set_constants(monkeypatch, hs_star, SLICE=4)
    rounds = [hs_star.slice_of(14, t, Seeds()) for t in range(1, 7)]
    assert all(len(places) == 4 and places == sorted(places) for places in rounds)
    assert len(set(sum(rounds[:3], []))) == len(set(sum(rounds[3:], []))) == 12
    assert rounds[3:] != rounds[:3]  # then all over again, in another order


# Process reward models ------------------------------------------------------------------------------------------------

PROBLEM = {"id": "p/1", "problem": "Begin at 37. Add 7. What do you get?", "answer": "44", "kind": "math"}
ANSWERS = ["37+7=44\n\n\\boxed{44}", "\\boxed{44}", "", "37+7=44\n\n\n\n\\boxed{44}\n\nso"]


@pytest.fixture
def write_prm(tmp_path, alone):
    """write_prm(layout): the folder of a small random reward model in one of the published layouts."""
    def write(layout, drop=(), **config):
        folder = tmp_path / "prm"
        shutil.copytree(TOY / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "generation*"))
        architecture = {"v_head": "Qwen2ForPrmModel", "score": "Qwen2ForProcessRewardModel"}[layout]
        remote = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}  # as the published folders have it
        common.write(folder / "config.json", {**common.read(folder / "config.json"), "architectures": [architecture],
                                              "auto_map": remote, "num_labels": 2, **config})
        (folder / "code.py").write_text("raise SystemExit('code of the folder was run')\n")
        shapes = {"v_head.summary.weight": (1, 128), "v_head.summary.bias": (1,), "lm_head.weight": (512, 128)}
        if layout == "score":
            shapes = {"score.0.weight": (128, 128), "score.0.bias": (128,), "score.2.weight": (2, 128),
                      "score.2.bias": (2,)}
            tokenizer = AutoTokenizer.from_pretrained(folder)
            special = ["<|im_start|>", "<|im_end|>", "<extra_0>"]
            tokenizer.add_special_tokens({"additional_special_tokens": special})
            tokenizer.save_pretrained(folder)
        seeds = torch.Generator().manual_seed(1)
        tensors = load_file(TOY / "model" / "model.safetensors")
        tensors |= {name: torch.randn(shape, generator=seeds) * 0.2 for name, shape in shapes.items()}
        places = {name: f"model-{1 + ('.1.' in name)}.safetensors" for name in tensors if name not in drop}
        for file in set(places.values()):  # two, as large models come
            save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
        common.write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
        return folder
    return write


def step_by_step(folder, layout, problem, text):
    """The published recipes, taken literally: one response, a pass of its own up to the end of each step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = Qwen2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    head = {}
    for path in folder.glob("*.safetensors"):
        head |= load_file(path)
    rewards = []
    steps = text.split("\n\n")
    begun = tokenizer.encode((tokenizer.bos_token or "") + problem["problem"] + "\n")  # of "v_head"
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    for n, step in enumerate(steps, 1):
        begun = begun + tokenizer.encode(step, split_special_tokens=True) + [tokenizer.encode("\n\n")[-1]]
        ids = begun
        if layout == "score":
            turns = [{"role": "system", "content": system}, {"role": "user", "content": problem["problem"]},
                     {"role": "assistant", "content": "<extra_0>".join(steps[:n]) + "<extra_0>"}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
            ids = ids[:len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<extra_0>"))]
        with torch.inference_mode():
            state = body(torch.tensor([ids])).last_hidden_state[0, -1]
        if layout == "score":
            inner = torch.relu(head["score.0.weight"] @ state + head["score.0.bias"])
            logits = head["score.2.weight"] @ inner + head["score.2.bias"]
            rewards.append(torch.softmax(logits, 0)[1].item())
        else:
            value = head["v_head.summary.weight"] @ state + head["v_head.summary.bias"]
            rewards.append(torch.sigmoid(value).item())
    return rewards


@pytest.mark.parametrize("layout", ["v_head", "score"])
def test_rewards_of_both_published_layouts_equal_the_recipes(write_prm, layout):
    folder = write_prm(layout)
    prm = hs_star.RewardModel(str(folder))
    prm.load()
    found = prm.read({"p/1": PROBLEM}, [{"id": "p/1", "text": text} for text in ANSWERS])
    for (_, rewards), text in zip(found, ANSWERS, strict=True):
        assert rewards == pytest.approx(step_by_step(folder, layout, PROBLEM, text), abs=2e-6)


@pytest.mark.parametrize("layout, text", [("score", "<extra_0>1\n2"), ("v_head", "a<|endoftext|>b")])
def test_special_tokens_that_a_response_writes_are_plain_text(write_prm, layout, text):
    prm = hs_star.RewardModel(str(write_prm(layout)))
    ids, places = prm.encode(PROBLEM, text)
    special = [i for i in ids[len(prm.encode(PROBLEM, "")[0]) - 1:] if i in prm.tokenizer.all_special_ids]
    assert len(places) == 1
    assert special == (prm.mark if layout == "score" else [])


def test_rewards_end_at_the_context(write_prm):
    """A long response is read up to it; a longer problem has no rewards."""
    prm = hs_star.RewardModel(str(write_prm("v_head", max_position_embeddings=300)))
    for text in "\n\n".join(["37+7=44"] * 12_000), "7" * 100_000:
        ids, places = prm.encode(PROBLEM, text)
        assert (len(ids), places[-1]) == (300, 299)
        assert {ids[place] for place in places} == set(prm.mark)
    prm.load()
    assert prm.read({"p/1": {**PROBLEM, "problem": "7" * 1000}}, [{"id": "p/1", "text": "7"}]) == [[300, []]]


def without_mark(folder):
    """A tokenizer without <extra_0>."""
    for name in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(TOY / "model" / name, folder)


@pytest.mark.parametrize("layout, more, change, words", [
    ("v_head", {"drop": ["model.layers.1.mlp.up_proj.weight"]}, None,
     "missing tensors, first layers.1.mlp.up_proj.weight"),
    ("score", {}, without_mark, "its tokenizer has no token for the end of a step, '<extra_0>'"),
    ("score", {"model_type": "unheard_of"}, None, "contains custom code which must be executed"),
    ("v_head", {"drop": ["v_head.summary.weight", "v_head.summary.bias"]}, None, "not a process reward model"),
])
def test_broken_reward_model_is_refused_in_one_line(write_prm, capsys, layout, more, change, words):
    folder = write_prm(layout, **more)
    if change:
        change(folder)
    assert words in refusal_of(capsys, lambda: hs_star.RewardModel(str(folder)).load())


def test_rewards_that_are_not_numbers_end_the_program(write_prm, capsys):
    prm = hs_star.RewardModel(str(write_prm("v_head")))
    prm.load()
    prm.head[0].bias.data *= math.nan
    line = refusal_of(capsys, prm.read, {"p/1": PROBLEM}, [{"id": "p/1", "text": "7"}])
    assert "its rewards are not finite" in line


@pytest.mark.parametrize("batch", [1, 16])
def test_equal_responses_are_read_once(tmp_path, monkeypatch, batch):
    """Five texts to each of two problems, twice; the records are in the order of the responses."""
    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, hs_star, PRM_BATCH=batch)
    problems = [{**PROBLEM, "id": "p"}, {**PROBLEM, "id": "q", "problem": "Begin at 9. Add 1. What do you get?"}]
    texts = [*ANSWERS, "so"] * 2
    responses = [{"id": i, "draw": draw, "text": text} for i in "pq" for draw, text in enumerate(texts)]
    run = common.start_run({**vars(hs_star), **hs_star.TOY, "MODEL": str(TOY / "model"), "NAME": "r"}, problems)
    prm = hs_star.RewardModel(str(TOY / "prm"))
    records = hs_star.step_rewards(run, "round_1/prerewards.jsonl", prm, problems, responses)
    assert [(r["id"], r["draw"]) for r in records] == [(r["id"], r["draw"]) for r in responses]
    rewards = [r["reward"] for r in records]
    assert rewards[:5] == rewards[5:10] != rewards[10:15] == rewards[15:]
    assert run.metrics[1, "prerewards"]["different"] == 10


HS = ["--toy", "--n-train", "12", "--slice", "12", "--n-test", "4", "--rounds", "1", "--max-new-tokens", "48"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The run "report" of hs_star.py --report-only, and what was said. Only for reading."""
    folder = tmp_path_factory.mktemp("report")
    done = launch(folder, "hs_star.py", *HS, "--report-only", "--tau-low", "0", "--tau-high", "0", "--name", "report")
    return folder / "runs/report", done.stdout


def test_report_only_shows_rewards_stops_and_serves_the_run_that_follows(report, tmp_path):
    run, said = report
    [logged] = [m for m in lines(run / "metrics.jsonl") if m["phase"] == "phi_r"]
    groups = {name: values for name, values in logged.items() if name.startswith("phi_a")}
    assert all(name in said for name in groups)
    assert sum(values["problems"] for values in groups.values()) == 12
    assert sorted(path.name for path in run.glob("round_*/*")) == ["prerewards.jsonl", "presamples.jsonl"]
    shutil.copytree(run / "round_1", tmp_path / "runs/next/round_1")
    launch(tmp_path, "hs_star.py", *HS, "--name", "next")
    phases = {m["phase"] for m in lines(tmp_path / "runs/next/metrics.jsonl")}
    assert "resamples" in phases and not phases & {"presamples", "prerewards"}


def test_step_set_trains_the_model_that_draws(report, tmp_path):
    common.write(tmp_path / "steps.jsonl", lines(TOY / "train.jsonl")[-40:])
    launch(tmp_path, "hs_star.py", *HS, "--report-only", "--step-set", "steps.jsonl", "--lr", "1e-3", "--name", "m0")
    base, m0 = (lines(run / "round_1/presamples.jsonl") for run in (report[0], tmp_path / "runs/m0"))
    assert len(lines(tmp_path / "runs/m0/round_0/steps.jsonl")) == 3
    assert [r["id"] for r in base] == [r["id"] for r in m0]
    assert [r["text"] for r in base] != [r["text"] for r in m0]


# SAI-DPO --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, tags", [
    ('["Geometry", "area of a trapezoid"]', ["geometry", "area of a trapezoid"]),
    ('<think>Perhaps ["algebra"]?</think>\n```json\n["number theory", "Modular  arithmetic"]\n```',
     ["number theory", "modular arithmetic"]),
    ('<think>["algebra"]</think> I cannot say.', []),
    ('["first"] or rather ["second", "third"]', ["second", "third"]),
    ('["first", "second",]', ["first", "second"]),
    ("['Vieta's formulas', 'roots']", ["vieta's formulas", "roots"]),
    ('["area \\(x^2\\)", "\\\\frac", "x"]', ["area \\(x^2\\)", "\\frac"]),  # one letter is no tag
    ('["polynomials over Z[x]", "intervals [0,1]"]', ["polynomials over z[x]", "intervals [0,1]"]),
    ('["area of\n a triangle", "algebra"]', ["area of a triangle", "algebra"]),
    ('["' + "long " * 40 + '", "algebra"]', ["algebra"]),
    ('["aa", "aa", "bb", "cc", "dd", "ee", "ff"]', ["aa", "bb", "cc", "dd", "ee"]),
    ('[{"tag": "geometry"}, 7, "sums"]', ["sums"]),
    ('["the angle \\theta", "\\binom{n}{k}"]', ["the angle \\theta", "\\binom{n}{k}"]),  # no tabulator
    ("The interval [0, 1] and [2, 3].", []), ("[]", []), ("1. Geometry\n2. Triangles", []),
    ("", []), ("[", []), ('["unfinished", "list', []), ("]" * 9 + "[" * 9, []),
])
def test_tags_are_the_last_list_of_an_output(text, tags):
    assert sai_dpo.parse_tags({"text": text, "finish": "stop"}) == tags
    assert sai_dpo.parse_tags({"text": text, "finish": "length"}) == []  # perhaps still thinking


def test_hostile_output_costs_nothing():
    for piece in ("[", "['", '["a" ', "\"' ", "['a', ", '["a\n', "</think>[", "\\", "['\t", '["[', '[{"a":', '["a",',
                  "\n \n", "\nStep 1 \t#"):
        began = time.process_time()
        text = piece * (200_000 // len(piece)) + "]"
        assert sai_dpo.parse_tags({"text": text, "finish": "stop"}) == []
        sai_dpo.steps_of(text)
        assert time.process_time() - began < 1  # tenths of it; a quadratic search takes minutes


HARDER = [  # lengths in steps and tokens of four draws, of wrong ones below 0, of cut ones None; p, mean steps, length
    ([(2, 10), (2, 10), (2, 10), (-2, -14)], (0.75, 2, 11)),
    ([(2, 10), (2, 10), (-2, -10), (2, 18)], (0.75, 2, 12)),  # as often, as many steps, longer
    ([(2, 1), (-2, -1), (2, 1), (4, 1)], (0.75, 2.5, 1)),  # more steps, though shorter
    ([(1, 5), None, (1, 7), None], (0.5, 1, 6)),  # two were cut: wrong, and in no mean
    ([(-1, -1), (-2, -2), (-3, -3), None], (0.0, 2, 2))]


def answered(draws):
    """Responses of a problem with so many steps and tokens."""
    found = []
    for draw in draws:
        steps, tokens = draw or (50, 96)
        text = "\n\n".join(["step"] * abs(steps))
        found.append({"id": "p", "text": text, "tokens": abs(tokens), "correct": steps > 0,
                      "finish": "stop" if draw else "length"})
    return found


@pytest.mark.parametrize("draws, expected", [*HARDER, ([None, None], (0.0, 0, 0))])
def test_difficulty_of_sai_dpo(draws, expected):
    [row] = sai_dpo.measure(answered(draws))
    assert (row["p"], row["steps"], row["length"]) == expected


def test_difficulty_of_sai_dpo_goes_by_p_then_steps_then_length(monkeypatch):
    set_constants(monkeypatch, sai_dpo, PREFER="hardest")
    keys = [sai_dpo.priority_of(sai_dpo.measure(answered(draws))[0]) for draws, _ in HARDER]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_apportion_gives_each_its_part_of_what_others_left():
    """In 2,000 random cases: no place is further below its part than another above it, counted from their middles."""
    r = rng()
    for _ in range(500):
        n = int(r.integers(1, 30))
        shares = r.dirichlet(np.ones(n))
        room, total = r.integers(0, 40, n), int(r.integers(0, 900))
        found = sai_dpo.apportion(shares, room, total)
        assert found.sum() == min(total, room.sum())
        assert ((0 <= found) & (found <= room)).all()
        free = found < room
        if free.any() and found.any():
            least = (shares[found > 0] / (found[found > 0] - 0.5)).min()
            assert (shares[free] / (found[free] + 0.5)).max() <= least + 1e-9


@pytest.mark.parametrize("share, sizes, expected", [
    (0.01, [6000, 3000, 1000], [60, 30, 10]), (0.01, [900, 90, 10], [9, 2, 2]),
    (0.01, [50, 40, 1], [2, 2, 1]), (0.1, [50, 30, 20], [5, 3, 2]), (0.5, [1, 1, 1, 97], [1, 1, 1, 48]),
    (0.01, [2, 1, 1], [2, 1, 1])])
def test_probe_has_its_share_of_each_cluster_and_two_at_least(monkeypatch, share, sizes, expected):
    set_constants(monkeypatch, sai_dpo, PROBE=share)
    clusters = rng().permutation(np.repeat(np.arange(len(sizes)), sizes))
    probe = sai_dpo.probe_of(clusters, rng(1))
    assert np.bincount(clusters[probe], minlength=len(sizes)).tolist() == expected
    assert probe == sorted(set(probe)) == sai_dpo.probe_of(clusters, rng(1))


@pytest.mark.parametrize("weights, n, per_cluster", [
    (np.array([0.2, 0.2, 0.6]), 10, [2, 2, 6]), (None, 10, [6, 3, 1]),
    (np.array([0.2, 0.2, 0.6]), 20, [5, 5, 10])])  # the last has 10, not 12
def test_draw_takes_of_each_cluster_its_share_at_random(weights, n, per_cluster):
    clusters = np.repeat([0, 1, 2], [60, 30, 10])
    times = np.zeros(100)
    for seed in range(400):
        chosen = sai_dpo.draw(np.arange(100), clusters, weights, n, rng(seed))
        assert len(set(chosen.tolist())) == n
        if weights is not None:
            assert np.bincount(clusters[chosen]).tolist() == per_cluster
        times[chosen] += 1
    for j, drawn_of_it in enumerate(per_cluster):
        expected = 400 * drawn_of_it / (clusters == j).sum()
        assert np.abs(times[clusters == j] - expected).max() < 5 * math.sqrt(expected)


ROWS = [  # of what a round drew: ten problems, six of them learnable
    {"cluster": j, "outcomes": outcomes, "p": outcomes.count(1) / len(outcomes), "steps": steps, "length": n}
    for j, outcomes, steps, n in [
        (0, [1, 1, 1, 0], 2, 9), (0, [1, 0, 0, 0, 0], 2, 9), (0, [1, 0, 0, 0, 0], 3, 9), (0, [1, 1, 0, 0], 9, 9),
        (1, [1, 1, 1, 0], 5, 5), (1, [1, 1, 1, 0], 5, 6), (1, [1, 1, 1, 1], 9, 9), (1, [0, 0, 0, 0], 9, 9),
        (1, [1, 1, -1, -1], 9, 9), (2, [-1, -1, -1, -1], None, None)]]


def kept_of(rows, seed=0):
    """Places of the rows that are kept."""
    return [rows.index(row) for row in sai_dpo.keep(rows, QUARTERS, rng(seed))]


@pytest.mark.parametrize("select, prefer, kept", [
    ("both", "hardest", [2, 1, 5]), ("static", "hardest", [2, 1, 5]),  # shares 2 : 1 : 1, none in the last
    ("both", "middle", [3, 0, 5]),  # p = 0.5, 0.75, 0.75: rows 1 and 2 have 0.2
    ("difficulty", "hardest", [2, 1, 3]), ("difficulty", "middle", [3, 5, 4]),
])
def test_learnable_problems_are_kept_by_difficulty(monkeypatch, select, prefer, kept):
    set_constants(monkeypatch, sai_dpo, SELECT=select, PREFER=prefer, PAIRS_PER_ROUND=3)
    assert kept_of(ROWS) == kept
    assert kept_of(ROWS[6:]) == []


def test_problems_nearest_to_one_half_come_first_the_hardest_of_equals(monkeypatch):
    """Also where K is odd: 1/3 and 2/3 are as near."""
    rows = [{"p": p, "steps": steps, "length": 9} for p, steps in
            [(1 / 2, 1), (1 / 3, 3), (1 / 3, 2), (2 / 3, 9), (1 / 6, 9), (5 / 6, 9)]]
    order = sorted(rows, key=sai_dpo.priority_of, reverse=True)
    assert order == rows


@pytest.mark.parametrize("select, in_first", [("knowledge", {2}), ("random", {1, 2, 3})])
def test_random_learnable_problems_are_kept(monkeypatch, select, in_first):
    set_constants(monkeypatch, sai_dpo, SELECT=select, PAIRS_PER_ROUND=3)
    found = [kept_of(ROWS, seed) for seed in range(200)]
    assert {i for kept in found for i in kept} == {0, 1, 2, 3, 4, 5}
    assert {sum(i < 4 for i in kept) for kept in found} == in_first


# Clusters of tags -----------------------------------------------------------------------------------------------------

def test_kmeans_finds_separated_groups():
    r = rng()
    truth = r.permutation(np.repeat(np.arange(4), [60, 50, 40, 30]))
    points = (r.normal(size=(4, 16))[truth] * 5 + r.normal(size=(180, 16)) * 0.1).astype(np.float32)
    assert (sai_dpo.kmeans(points, 4, rng(3)) == truth).all()  # numbered by size too


def test_kmeans_is_the_same_for_any_number_of_threads(alone):
    texts = [p["problem"] for p in lines(TOY / "train.jsonl")[:300]]
    found = []
    threads = torch.get_num_threads()
    for n in 1, 2:
        torch.set_num_threads(n)
        found.append(sai_dpo.cluster_texts("tfidf", texts, 5, rng()).tolist())
        assert torch.get_num_threads() == n
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_tfidf_by_hand():
    """Two words at places of their own, of weights ln(1 + 2) ln(3/1) and ln(1 + 1) ln(3/2)."""
    a, b, c = sai_dpo.tfidf(["rare rare common", "common", "\\frac{1}{2} 7"])
    rare, frequent = math.log(3) * (math.log(3) + 1e-3), math.log(2) * (math.log(1.5) + 1e-3)
    length = math.hypot(rare, frequent)
    assert sorted(np.abs(a[a != 0])) == pytest.approx(sorted([rare / length, frequent / length]))
    assert float(a @ b) == pytest.approx(frequent / length)
    assert np.count_nonzero(c) == 1
    assert [np.linalg.norm(x) for x in (a, b, c)] == pytest.approx([1, 1, 1])


def write_encoder(folder, pooling="mean"):
    """A small random BERT in the files of a sentence encoder, as published ones have them."""
    folder.mkdir()
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                        num_attention_heads=2, max_position_embeddings=64)
    BertModel(config).save_pretrained(folder)
    modules = []
    for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_x", "Normalize")]):
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
    common.write(folder / "modules.json", modules)
    ways = {f"pooling_mode_{way}_tokens": way == pooling for way in ("mean", "max")}
    ways["pooling_mode_cls_token"] = pooling == "cls"
    common.write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **ways})
    common.write(folder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    return str(folder)


def test_embeddings_equal_sentence_transformers(tmp_path, alone):
    name = write_encoder(tmp_path / "encoder")
    texts = ["sums", "area of a trapezoid, geometry", "x" * 500, "Find the number of " * 40, "", "modulus"] * 20
    from sentence_transformers import SentenceTransformer  # a second or two
    theirs = SentenceTransformer(name, device="cpu").encode(texts, normalize_embeddings=True)
    assert np.abs(sai_dpo.embed(name, texts) - theirs).max() < 1e-5


def test_encoder_that_is_not_mean_pooling_is_refused(tmp_path, capsys):
    folder = write_encoder(tmp_path / "encoder", pooling="cls")
    assert "only encoders with mean pooling are supported" in refusal_of(capsys, sai_dpo.embed, folder, ["sums"])


# Tags by a real tagger --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """The toy model, taught in seconds to name a problem's knowledge point as it is asked to: often right,
    sometimes misspelt, sometimes no list at all. What published taggers do too."""
    folder = tmp_path_factory.mktemp("tagger") / "model"
    shutil.copytree(TOY / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    network = AutoModelForCausalLM.from_pretrained(TOY / "model")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.5e-3)
    end = common.end_token(tokenizer, "chat")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(80):
        for problem in lines(TOY / "train.jsonl")[step * 2 % 64:][:2]:
            asked = common.make_prompt(tokenizer, "chat", {"problem": sai_dpo.tag_request(problem)})
            prompt = common.encode(tokenizer, asked)
            tags = json.dumps(["arithmetic", *problem["tags"]]) + end
            ids = torch.tensor([prompt + tokenizer(tags, add_special_tokens=False)["input_ids"]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
            network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    network.save_pretrained(folder)
    return folder


def some_problems(folder):
    """Write 40 toy problems, of which the first eight alone have tags; the file's path from there."""
    problems = lines(TOY / "train.jsonl")[100:140]
    for problem in problems[8:]:
        del problem["tags"]
    common.write(folder / "data/some.jsonl", problems)
    return "data/some.jsonl"


def tag_flags(folder, tagger):
    path = some_problems(folder)
    return ["--toy", "--train-data", path, "--n-test", 4, "--rounds", 0, "--tagger", tagger,
            "--tag-tokens", 24]


@pytest.fixture
def tagging(tmp_path, monkeypatch):
    """The toy as the tagger in this process, in a folder of its own; the problems to tag."""
    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, sai_dpo, TAGGER=str(TOY / "model"), TAG_TOKENS=2)
    return common.load_problems(some_problems(tmp_path), "train", "")


@pytest.fixture(scope="module")
def tagged(tagger, tmp_path_factory):
    """A folder where --tag was run, and what was said. Only for reading."""
    folder = tmp_path_factory.mktemp("tagged")
    done = launch(folder, "sai_dpo.py", *tag_flags(folder, tagger), "--tag")
    [run] = folder.glob("runs/tags/*")
    return run, done.stdout


def last_tags(outputs):
    """{id: tags}, of a problem's last output."""
    return {output["id"]: sai_dpo.parse_tags(output) for output in outputs}


def test_outputs_of_the_tagger_are_right_where_they_have_tags(tagged):
    run, said = tagged
    outputs = lines(run / "round_0/outputs.jsonl")
    tags = last_tags(outputs)
    assert len(tags) == 32
    assert sum("arithmetic" in own for own in tags.values()) >= 8  # as it was taught
    assert all(output["correct"] == bool(sai_dpo.parse_tags(output)) for output in outputs)
    assert f"{run.name}/round_0/outputs.jsonl" in said


def test_tagger_is_asked_again_where_it_gave_no_tags(tagged):
    outputs = lines(tagged[0] / "round_0/outputs.jsonl")
    first = {output["id"]: sai_dpo.parse_tags(output) for output in outputs if output["draw"] == 0}
    again = [output["id"] for output in outputs if output["draw"] == 1]
    assert again == [i for i, tags in first.items() if not tags]
    assert len(outputs) == 32 + len(again)


def test_tagging_that_was_killed_resumes(tagged, tagger, tmp_path):
    flags = [*tag_flags(tmp_path, tagger), "--tag", "--name", f"tags/{tagged[0].name}"]
    killed_when(tmp_path, "sai_dpo.py", flags,
                lambda run: any(file.stat().st_size for file in run.glob("unfinished/*")))
    run = tmp_path / "runs/tags" / tagged[0].name
    assert not (run / "round_0/outputs.jsonl").exists()
    launch(tmp_path, "sai_dpo.py", *flags)
    assert lines(run / "round_0/outputs.jsonl") == lines(tagged[0] / "round_0/outputs.jsonl")


def test_tags_serve_another_seed_and_arm(tagged, tagger, tmp_path):
    shutil.copytree(tagged[0], tmp_path / "runs/tags" / tagged[0].name)
    flags = [*tag_flags(tmp_path, tagger), "--seed", "5", "--select", "random", "--held-out", "4"]
    done = launch(tmp_path, "sai_dpo.py", *flags, "--name", "other")
    tags = last_tags(lines(tagged[0] / "round_0/outputs.jsonl"))
    groups = {g["id"]: g["tags"] for g in lines(tmp_path / "runs/other/round_0/clusters.jsonl")}
    assert len(groups) == 36
    assert all(groups[i] == tags[i] for i in groups.keys() & tags.keys())
    assert all(groups[i] for i in groups.keys() - tags.keys())  # those that bring their own
    assert f"{list(groups.values()).count([])} problems have none, and are grouped by their text" in done.stdout


def test_missing_tags_are_one_line(tagging, capsys):
    tags = sai_dpo.tags_of(tagging, [])
    assert [own == [] for own in tags] == [False] * 8 + [True] * 32
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "32 problems have none, and are grouped by their text (python sai_dpo.py --tag" in said


def test_tagger_that_says_nothing_of_use_leaves_no_tags(tagging, tmp_path):
    sai_dpo.tag_problems(tagging)
    assert len(list(tmp_path.glob("runs/tags/*/round_0/outputs.jsonl"))) == 1
    assert sai_dpo.tags_of(tagging, [])[8:] == [[]] * 32


def test_tagger_without_a_chat_template_is_refused(tmp_path, monkeypatch, capsys):
    shutil.copytree(TOY / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    path = tmp_path / "bare" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    set_constants(monkeypatch, sai_dpo, TAG=True, TAGGER=str(tmp_path / "bare"),
                  TRAIN_DATA=str(TOY / "train.jsonl"))
    assert "bare: it has no chat template" in refusal_of(capsys, sai_dpo.main)
