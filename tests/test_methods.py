"""The four methods' rules against tables worked out by hand, golden traces and oracles; reward models,
taggers and encoders against references; short real runs of what only one method has."""
import json
import math
import shutil
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
from conftest import SHARED, TOY, killed_when, launch, lines


def rng(seed=0):
    return np.random.default_rng(seed)


class Seeds:
    """What the rules need of a run: a generator for each key."""

    def rng(self, *key):
        return rng(common.seed_of(*key))


def set_constants(monkeypatch, script, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(script, name, value)


def refusal_of(capsys, function, *arguments):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit):
        function(*arguments)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("script, constants, words", [
    (dast, {"SHOTS": 0}, "without examples in the prompt L can do nothing"),
    (dast, {"CUTS": (0.4, 0.7)}, "--cuts (0.4, 0.7)"),
    (dast, {"DRAWS_LIKE": "runs/x"}, "make controls without P"),
    (dast, {"VARIANT": "L", "SIZE_LIKE": "runs/x"}, "runs/x/round_3/selection.jsonl: no such file"),
    (adastar, {"TRAIN_ON_ALL": True}, "--train-on-all needs --no-stop-at-beta"),
    (adastar, {"TRACES": 2}, "--traces 2 needs --no-retry"),
    (adastar, {"TRACES": 3, "RETRY": False}, "as many --k-samples"),
    (adastar, {"HINT": True, "K_SAMPLES": 1}, "--hint needs --k-samples above 1"),
    (hs_star, {"PRE_SAMPLES": 9}, "--pre-samples 9 are more than --budget 8"),
    (hs_star, {"PRM": ""}, "without --prm there are no rewards"),
    (hs_star, {"MODEL": "other"}, "no thresholds are known for"),
    (hs_star, {"TAU_LOW": 0.9}, "--tau-low 0.9 and --tau-high 0.65: the second is the higher one"),
    (sai_dpo, {"SELECT": "random", "DIFFICULTY_BEFORE": True}, "--difficulty-before is for"),
    (sai_dpo, {"SELECT": "knowledge", "PREFER": "middle"}, "--prefer middle is for"),
])
def test_constants_that_contradict_are_refused_in_one_line(monkeypatch, capsys, script, constants, words):
    set_constants(monkeypatch, script, **constants)
    assert words in refusal_of(capsys, script.main)


# DAST -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("correct, draws, level", [
    (10, 10, "E"), (8, 10, "E"), (7, 10, "M"), (5, 10, "M"), (4, 10, "M"), (3, 10, "H"), (1, 10, "H"),
    (0, 10, "U"), (5, 7, "E"), (2, 5, "M"), (1, 3, "H"), (1, 1, "E"), (0, 1, "U")])  # 0.7 and 0.4 are M
def test_levels_of_dast(correct, draws, level):
    assert dast.level_of(correct, draws) == level


def test_targets_and_budgets_rise_with_difficulty(monkeypatch):
    set_constants(monkeypatch, dast, K_SAMPLES=2)
    assert [dast.target_and_budget(level) for level in "EMHU"] == [(1, 2), (2, 4), (3, 8), (4, 16)]


def drawn(*notes):
    """Responses from notes: "x" is wrong, "cut:a" a correct text that was cut, all else is correct."""
    responses = []
    for draw, note in enumerate(notes):
        finish = "length" if note.startswith("cut:") else "stop"
        responses.append({"id": "p", "draw": draw, "text": note.removeprefix("cut:"), "finish": finish,
                          "correct": not note.endswith("x")})
    return responses


@pytest.mark.parametrize("notes, outcomes, target, chosen", [
    ("x a x x a x b c".split(), [0, 1, 0, 0, 1, 0, 2, 3], 3, [1, 6, 7]),  # the example of the method's notes
    ("a x x a x b c".split(), [1, 0, 0, 1, 0, 2, 3], 3, [0, 5, 6]),
    ("x x x x".split(), [0, 0, 0, 0], 4, []),
    (["a", " a\n", "A", "a b"], [1, 1, 2, 3], 2, [0, 2]),  # only blanks around it leave a text the same
    (["cut:a", "a", "cut:b"], [0, 1, 0], 4, [1]),  # a correct answer that did not end is not learnt
    ([], [], 1, []),
])
def test_choice_of_dast_takes_distinct_correct_answers(notes, outcomes, target, chosen):
    assert dast.distinct_of(drawn(*notes)) == outcomes
    assert dast.choose(outcomes, target) == chosen


@pytest.mark.parametrize("notes, solved, chosen, pairs", [
    ("x a x cut:b".split(), True, [1], [(1, {0, 2})]),  # a right one, and one of the two wrong ones
    ("x a b c".split(), False, [1, 2, 3], [(1, {0})]),  # each wrong one once: the rest have no partner
    ("a b".split(), False, [0, 1], []),
    ("x x".split(), True, [], [(None, {0, 1})]),  # unsolved: the worked solution is preferred
    ("x x".split(), False, [], []),
    ("x cut:a".split(), True, [], []),  # it was right, and cut: neither learnt nor replaced
    ("cut:x x a".split(), False, [2], [(2, {1})]),  # what was cut is not rejected as if it had ended
])
def test_pairs_of_dast(notes, solved, chosen, pairs):
    seen = set()
    for seed in range(20):
        found = dast.choose_pairs(drawn(*notes), chosen, solved, rng(seed))
        assert [better for better, _ in found] == [better for better, _ in pairs]
        seen.update(found)
    assert seen == {(better, worse) for better, allowed in pairs for worse in allowed}


def examples_drawn(problem, level, shots, seed):
    """Ids of the examples that are shown: of 9 easy problems, 3 of M, 2 of H and one unsolved."""
    pools = {}
    for name, n in zip("EMHU", (9, 3, 2, 1)):
        pools[name] = [{"id": f"{name}{i}", "problem": f"{name}{i}"} for i in range(n)]
    return [e["id"] for e in dast.draw_examples({"problem": problem}, level, pools, shots, rng(seed))]


@pytest.mark.parametrize("problem, level, shots, levels", [
    ("E0", "E", 8, "EEEEEEEE"), ("H0", "H", 8, "HMMMEEEE"), ("x", "E", 11, "EEEEEEEEEMM"),
    ("U0", "U", 20, "HHMMMEEEEEEEEE"),
])
def test_examples_of_dast_are_others_of_the_level_then_of_easier_ones(problem, level, shots, levels):
    for seed in range(20):
        ids = examples_drawn(problem, level, shots, seed)
        assert "".join(i[0] for i in ids) == levels
        assert len(set(ids) - {problem}) == len(ids)


# AdaSTaR ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order, places", [
    ("adaptive", [4, 2, 5, 0, 3, 1]),  # t~ 0: w 0, .5, .5 in the order of the file; then t~ 1: w 0; then t~ 3
    ("stale", [2, 4, 5, 0, 1, 3]), ("hardest", [4, 0, 3, 2, 5, 1])])
def test_order_of_the_walk(monkeypatch, order, places):
    set_constants(monkeypatch, adastar, ORDER=order)
    last, w = np.array([1, 3, 0, 3, 0, 0]), np.array([0.0, 1.0, 0.5, 0.0, 0.0, 0.5])
    assert adastar.walk_order(last, w, rng()).tolist() == places


def test_random_order_of_the_walk_is_another_in_each_iteration(monkeypatch):
    set_constants(monkeypatch, adastar, ORDER="random")
    nothing = np.zeros(50, int)
    orders = {tuple(adastar.walk_order(nothing, nothing, rng(t)).tolist()) for t in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_beta_follows_the_papers_schedule():
    betas = [320, 384, 456, 552, 656, 792, 952, 1144, 1368, 1648, 1976, 2376, 2848, 3416, 4104, 4928]
    assert [adastar.beta_of(t) for t in range(1, 17)] == betas


@pytest.mark.parametrize("visited, solved, power, commits", [
    (8, 4, 2, 2), (6, 5, 2, 4), (7, 7, 2, 7), (9, 8, 2, 7), (198, 66, 2, 22), (12, 0, 2, 0), (1, 1, 2, 1),
    (49, 7, 2, 1),  # 49 * (7 / 49)^2 is 0.999... in floating point
    (8, 4, 0, 8), (5, 0, 0, 5), (8, 4, 1, 4), (10, 9, 3, 7)])
def test_commitment_of_adastar(monkeypatch, visited, solved, power, commits):
    set_constants(monkeypatch, adastar, CURRICULUM_POWER=power)
    assert adastar.to_commit(visited, solved) == commits


@pytest.mark.parametrize("traces, outcomes, chosen", [
    (1, [0, 1], [1]), (1, [1], [0]), (1, [1, 1], [0]), (1, [0, 0], []), (0, [1, 1, 0, 1], [0, 1, 3]),
    (2, [0, 1, 1, 1], [1, 2])])
def test_choice_of_adastar(monkeypatch, traces, outcomes, chosen):
    set_constants(monkeypatch, adastar, TRACES=traces)
    assert adastar.choose(outcomes) == chosen


def test_outcomes_of_adastar_count_a_cut_answer_as_wrong():
    assert adastar.outcomes_of(drawn("cut:a", "a", "x")) == [0, 1, 0]


@pytest.mark.parametrize("total, beta, constants, copies", [
    (3, 3, {}, [1, 1, 1]),
    (3, 8, {}, [3, 3, 2]),  # too few: repeated from the front
    (3, 8, {"FILL_STEPS": False}, [1, 1, 1]),
    (0, 8, {}, []),
    (4, 3, {}, [1, 1, 1, 1]),  # with all traces of a problem there may be one more
    (4, 3, {"STOP_AT_BETA": False, "TRAIN_ON_ALL": True}, [1, 1, 1, 1]),
    (3, 8, {"STOP_AT_BETA": False, "TRAIN_ON_ALL": True}, [1, 1, 1]),
    (3, 8, {"STOP_AT_BETA": False}, [3, 3, 2]),
])
def test_copies_of_adastar(monkeypatch, total, beta, constants, copies):
    set_constants(monkeypatch, adastar, **constants)
    assert adastar.spread(total, beta, rng()) == copies


def test_copies_of_a_walk_without_stop_are_cut_at_random(monkeypatch):
    set_constants(monkeypatch, adastar, STOP_AT_BETA=False)
    found = {tuple(adastar.spread(5, 2, rng(seed))) for seed in range(60)}
    assert len(found) == 10
    assert all(sum(copies) == 2 for copies in found)


@pytest.mark.parametrize("problem, text", [
    ({"problem": "1+1?", "answer": "2"}, "1+1? (Answer: 2)"),
    ({"problem": "1+1?", "solution": "so \\boxed{2}"}, "1+1? (Answer: 2)"),
    ({"problem": "1+1?\n(A) 2", "answer": "A"}, "1+1?\n(A) 2\n(Answer: A)")])
def test_hints_show_the_answer_behind_the_question(problem, text):
    assert adastar.hinted(problem)["problem"] == text


def iterate(numbers, betas, outcomes):
    """adastar.py's loop on recorded outcomes of problems, which stand in the file in the order of `numbers`.

    Returns selection.jsonl of each iteration, and (t~, w, number) in the order of the next walk."""
    problems = [{"id": number} for number in numbers]
    last, w = np.zeros(len(problems), int), np.zeros(len(problems))
    alpha = 0.5
    found = []
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
        for i, s in zip(visited, selection, strict=True):
            if s["committed"]:
                last[i], w[i] = t, s["win_rate"]
        order = adastar.walk_order(last, w, rng())
        found.append((selection, [[int(last[i]), float(w[i]), numbers[i]] for i in order]))
    return found


def comparable(iterations):
    """Iterations of a golden trace without their numbers, alpha to rounding."""
    return [{**{name: iteration[name] for name in ("visited", "trained", "committed", "heap")},
             "alpha": pytest.approx(iteration["alpha"], abs=1e-12)} for iteration in iterations]


def as_traces(found):
    """What a golden trace says of iterations."""
    traces = []
    for selection, heap in found:
        trained = []
        for s in selection:
            trained += [s["id"]] * len(s["chosen"])
        committed = [s["id"] for s in selection if s["committed"]]
        traces.append({"visited": [s["id"] for s in selection], "trained": trained, "committed": committed,
                       "heap": heap, "alpha": selection[0]["alpha"]})
    return traces


def by_name(n):
    """Problems in the order of the text of their names, which ties go by in the released program."""
    return sorted(range(n), key=lambda i: f"id_{i}")


def traces_of(*kinds):
    """Golden traces whose names begin so, as parameters; a skipped one where shared/ is absent."""
    path = SHARED / "traces" / "adastar.json"
    if not path.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{path} is not on this machine"))]
    traces = json.loads(path.read_text())
    return [pytest.param(trace, id=name) for name, trace in traces.items() if name.startswith(kinds)]


BLOCKS = [1, 7, 10**9]


def check_trace(monkeypatch, trace, block, numbers):
    """Compare adastar.py on recorded outcomes with what must come out."""
    settings = trace["settings"]
    set_constants(monkeypatch, adastar, CURRICULUM_POWER=int(settings.get("power", 2)),
                  block_size=lambda missing, rate: block)
    found = iterate(numbers, settings["betas"], trace["outcomes"])
    assert as_traces(found) == comparable(trace["iterations"])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("trace", traces_of("default", "power0", "exhausted"))
def test_walk_follows_the_golden_traces(monkeypatch, trace, block):
    check_trace(monkeypatch, trace, block, range(trace["settings"]["n"]))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("trace", traces_of("paper"))
def test_walk_with_all_traces_follows_the_golden_traces(monkeypatch, trace, block):
    """Both draws are made and all correct ones taken; ties by the text of the name, so such a file it is."""
    set_constants(monkeypatch, adastar, TRACES=0, RETRY=False)
    check_trace(monkeypatch, trace, block, by_name(trace["settings"]["n"]))


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


@pytest.mark.parametrize("trace", traces_of("released"))
def test_oracle_is_the_released_program(trace):
    """It agrees with recorded runs of it; so what differs there is understood."""
    assert released(outcomes=trace["outcomes"], **trace["settings"]) == comparable(trace["iterations"])


def recorded(seed):
    """Outcomes of five iterations on 10 to 150 problems that get easier, and what each asks for."""
    r = rng(seed)
    n = int(r.integers(10, 150))
    outcomes = [(r.random((n, 2)) < 0.1 + 0.15 * t).astype(int).tolist() for t in range(5)]
    return n, [int(beta) for beta in r.integers(1, n // 2, 5)], outcomes


@pytest.mark.parametrize("seed", range(20))
def test_walk_equals_the_released_program_one_at_a_time(monkeypatch, seed):
    """In batches of one, floor for round: then nothing differs but the blocks."""
    n, betas, outcomes = recorded(seed)
    expected = released(n, betas, outcomes, 1, False, whole=lambda x: math.floor(x + 1e-9))
    set_constants(monkeypatch, adastar, block_size=lambda missing, rate: 7)
    assert as_traces(iterate(by_name(n), betas, outcomes)) == comparable(expected)


@pytest.mark.parametrize("seed", range(20))
def test_walk_does_not_depend_on_the_blocks(monkeypatch, seed):
    """Visited problems, D+ with its copies and what is committed, too few answers included."""
    n, betas, outcomes = recorded(seed)
    betas[1] = 2 * n
    expected = iterate(range(n), betas, outcomes)
    for block in BLOCKS:
        set_constants(monkeypatch, adastar, block_size=lambda missing, rate: block)
        assert iterate(range(n), betas, outcomes) == expected


@pytest.mark.parametrize("share, rate", [(0.02, 0.5), (0.3, 0.3), (0.5, 0.02), (0.9, 0.5), (0.9, 0.95)])
def test_walk_draws_what_the_block_rule_says(share, rate):
    """In order, no problem twice, nothing behind the block where it ends; a block is what should give the
    missing answers at the rate so far (at least a tenth), and a tenth more, in whole batches."""
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
    assert len(visited) > len(asked) - len(blocks[-1])
    known = []
    for block in blocks:
        expected = 1.1 * (200 - right[known].sum()) / max(0.1, right[known].mean() if known else rate)
        assert expected <= len(block) < expected + common.GROUP + 1 or len(known + block) == 3000
        known += block


def test_walk_without_stop_draws_all_at_once(monkeypatch):
    set_constants(monkeypatch, adastar, STOP_AT_BETA=False)
    asked = []

    def draw(block):
        asked.append(len(block))
        return {i: drawn("r") for i in block}

    assert len(adastar.walk(np.arange(100), 5, 0.5, draw)) == 100
    assert asked == [100]


TINY = ["--toy", "--train-data", "p.jsonl", "--held-out", "0", "--n-test", "4", "--steps", "2", "--rounds", 1]


def easy_problems(path, n, wrong=()):
    """Write n problems of one operation, which the toy can do; those at `wrong` with a wrong answer."""
    easy = [p for p in lines(TOY / "train.jsonl") if p["level"] == 1 and "Go" in p["problem"]][:n]
    for i in wrong:
        easy[i]["answer"] = "-1"
    common.write(path, [{"problem": p["problem"], "answer": p["answer"]} for p in easy])


@pytest.mark.parametrize("flag, said, steps", [
    ("--fill-steps", "repeated to 16", 2), ("--no-fill-steps", "each trained on once", 1)])
def test_problems_that_give_too_few_answers_are_all_visited(tmp_path, flag, said, steps):
    easy_problems(tmp_path / "p.jsonl", 12, range(0, 12, 3))
    done = launch(tmp_path, "adastar.py", *TINY, flag, "--name", "few")
    selection = lines(tmp_path / "runs/few/round_1/selection.jsonl")
    answers = [s["id"] for s in selection if s["chosen"]]
    assert len(selection) == 12
    assert f"gave {len(answers)} correct answers of 16: {said}" in done.stdout
    assert {e["id"] for e in lines(tmp_path / "runs/few/round_1/train.jsonl")} == set(answers)
    assert len(lines(tmp_path / "runs/few/round_1/steps.jsonl")) == steps


def test_no_correct_answer_leaves_the_model_as_it_is(tmp_path):
    easy_problems(tmp_path / "p.jsonl", 3, range(3))
    done = launch(tmp_path, "adastar.py", *TINY, "--rounds", "2", "--name", "none")
    assert done.stdout.count("6 answers and none is correct: D+ is empty, the model stays as it is") == 2
    assert not (tmp_path / "runs/none/round_1/model").exists()
    assert not any(s["committed"] for s in lines(tmp_path / "runs/none/round_2/selection.jsonl"))


def test_hint_changes_the_second_draws_alone_and_is_never_trained_on(tmp_path):
    shutil.copy(TOY / "train.jsonl", tmp_path / "p.jsonl")
    drawn_by = {}
    for flag in "--hint", "--no-hint":
        launch(tmp_path, "adastar.py", *TINY, flag, "--no-stop-at-beta", "--n-train", 16, "--name", flag[2:])
        run = tmp_path / "runs" / flag[2:]
        drawn_by[flag] = {(r["id"], r["draw"]): r["text"] for r in lines(run / "round_1/responses_0.jsonl")}
        assert not any("(Answer:" in e["prompt"] for e in lines(run / "round_1/train.jsonl"))
    hint, plain = drawn_by.values()
    differ = {draw for i, draw in hint.keys() & plain.keys() if hint[i, draw] != plain[i, draw]}
    assert differ == {1}


# HS-STaR ----------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("n, pre", [(8, 3), (8, 1), (8, 7), (8, 8), (2, 1), (16, 4)])
def test_budget_goes_to_the_boundary_alone_and_evenly(monkeypatch, n, pre):
    """Spent is what was given: n N answers, or n_p N where there is no boundary."""
    set_constants(monkeypatch, hs_star, BUDGET=n, PRE_SAMPLES=pre)
    for problems in 1, 2, 7, 101:
        for boundary in {0, 1, problems // 2, problems}:
            classes = ["boundary"] * boundary + ["inlier", "outlier"] * problems
            classes = rng(boundary).permutation(classes[:problems]).tolist()
            counts = hs_star.quotas(classes, rng())
            given = [count for count, name in zip(counts, classes, strict=True) if name == "boundary"]
            assert sum(counts) == sum(given) == ((n - pre) * problems if boundary else 0)
            assert not given or max(given) - min(given) <= 1


def test_budget_that_is_left_over_goes_to_random_problems():
    """By hand: of 505 answers 55 problems get 9, one gets 10."""
    classes = ["boundary"] * 56 + ["inlier"] * 45
    found = {tuple(hs_star.quotas(classes, rng(seed))) for seed in range(30)}
    assert len(found) > 10
    assert all(sorted(counts) == [0] * 45 + [9] * 55 + [10] for counts in found)


@pytest.mark.parametrize("outcomes, rewards, right, wrong", [
    ([1, 0, 1, 0, 1], [0.2, 0.9, 0.8, 0.1, 0.5], {2, 4}, {1, 3}),  # K = 2: of three right ones the two best
    ([0, 1, 0, 0], [0.1, 0.0, 0.3, 0.2], {1}, {2}),  # the wrong one that looks best
    ([0, 1, 0], [0.5, 0.5, 0.5], {1}, {0}),  # of equals the first
    ([1, -1, 0], [0.1, 0.9, 0.2], {0}, {2}),  # a cut one is in no pair
    ([1, -1], [0.1, 0.9], set(), set()), ([1, 1], [0.1, 0.9], set(), set()), ([0], [0.1], set(), set()),
])
def test_pairs_of_hs_star_are_the_best_looking(outcomes, rewards, right, wrong):
    for seed in range(5):
        pairs = hs_star.choose_pairs(outcomes, rewards, rng(seed))
        assert {preferred for preferred, _ in pairs} == right
        assert {rejected for _, rejected in pairs} == wrong
        assert len(pairs) == len(right)


@pytest.mark.parametrize("pairing, rejected, ways", [("hard", {4, 5, 6}, 6), ("random", {3, 4, 5, 6}, 24)])
def test_pairs_of_hs_star_are_joined_at_random(monkeypatch, pairing, rejected, ways):
    """All ways to join three right answers with three wrong ones; with "random" with three of all four."""
    set_constants(monkeypatch, hs_star, PAIRING=pairing)
    outcomes, rewards = [1, 1, 1, 0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    found = [hs_star.choose_pairs(outcomes, rewards, rng(seed)) for seed in range(300)]
    assert {draw for pairs in found for _, draw in pairs} == rejected
    assert len({frozenset(pairs) for pairs in found}) == ways


def test_slices_have_no_problem_in_common_while_the_problems_last(monkeypatch):
    set_constants(monkeypatch, hs_star, SLICE=4)
    rounds = [hs_star.slice_of(14, t, Seeds()) for t in range(1, 7)]
    assert all(len(places) == 4 and places == sorted(places) for places in rounds)
    assert len(set(sum(rounds[:3], []))) == len(set(sum(rounds[3:], []))) == 12
    assert rounds[3:] != rounds[:3]  # then all over again, in another order
    assert hs_star.slice_of(3, 1, Seeds()) == hs_star.slice_of(3, 2, Seeds()) == [0, 1, 2]


def test_known_thresholds_are_taken_by_the_names_of_folders(monkeypatch):
    set_constants(monkeypatch, hs_star, PRM="x/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", MODEL="y/Qwen2.5-7B")
    assert hs_star.thresholds() == (0.25, 0.5)


def test_reward_of_a_response_is_that_of_its_worst_step():
    assert hs_star.reward_of([0.9, 0.2, 0.8]) == 0.2
    assert hs_star.reward_of([]) == 0


# Process reward models --------------------------------------------------------------------------------------

PROBLEM = {"id": "p/1", "problem": "Begin at 37. Add 7. What do you get?", "answer": "44", "kind": "math"}
ANSWERS = ["37+7=44\n\n\\boxed{44}", "\\boxed{44}", "", "37+7=44\n\n\n\n\\boxed{44}\n\nso"]


def write_prm(folder, layout, drop=(), **config):
    """A small random reward model in one of the published layouts."""
    shutil.copytree(TOY / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "generation*"))
    architecture = {"v_head": "Qwen2ForPrmModel", "score": "Qwen2ForProcessRewardModel"}[layout]
    remote = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}  # as the published folders have it
    seen = json.loads((folder / "config.json").read_text())
    config = {**seen, "architectures": [architecture], "auto_map": remote, "num_labels": 2, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('code of the folder was run')\n")
    shapes = {"v_head.summary.weight": (1, 128), "v_head.summary.bias": (1,), "lm_head.weight": (512, 128)}
    if layout == "score":
        shapes = {"score.0.weight": (128, 128), "score.0.bias": (128,)}
        shapes |= {"score.2.weight": (2, 128), "score.2.bias": (2,)}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = ["<|im_start|>", "<|im_end|>", "<extra_0>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.save_pretrained(folder)
    seeds = torch.Generator().manual_seed(1)
    tensors = load_file(TOY / "model" / "model.safetensors")
    tensors |= {name: torch.randn(shape, generator=seeds) * 0.2 for name, shape in shapes.items()}
    places = {name: f"model-{1 + ('.1.' in name)}.safetensors" for name in tensors if name not in drop}
    for file in sorted(set(places.values())):  # two, as large models come
        own = {name: tensors[name] for name in places if places[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def step_by_step(folder, layout, problem, text):
    """The published recipes, taken literally: one response, a pass of its own up to the end of each step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = Qwen2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)

    def last_state(ids):
        with torch.inference_mode():
            return body(torch.tensor([ids])).last_hidden_state[0, -1]

    rewards = []
    steps = text.split("\n\n")
    if layout == "v_head":
        ids = tokenizer.encode((tokenizer.bos_token or "") + problem["problem"] + "\n")
        for step in steps:
            ids = ids + tokenizer.encode(step, split_special_tokens=True) + [tokenizer.encode("\n\n")[-1]]
            value = tensors["v_head.summary.weight"] @ last_state(ids) + tensors["v_head.summary.bias"]
            rewards.append(torch.sigmoid(value).item())
        return rewards
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    for n in range(1, len(steps) + 1):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": problem["problem"]},
                 {"role": "assistant", "content": "<extra_0>".join(steps[:n]) + "<extra_0>"}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
        mark = tokenizer.convert_tokens_to_ids("<extra_0>")
        state = last_state(ids[:len(ids) - ids[::-1].index(mark)])
        inner = torch.relu(tensors["score.0.weight"] @ state + tensors["score.0.bias"])
        logits = tensors["score.2.weight"] @ inner + tensors["score.2.bias"]
        rewards.append(torch.softmax(logits, 0)[1].item())
    return rewards


@pytest.mark.parametrize("layout", ["v_head", "score"])
def test_rewards_of_both_published_layouts_equal_the_recipes(tmp_path, alone, layout):
    prm = hs_star.RewardModel(str(write_prm(tmp_path / "prm", layout)))
    prm.load()
    found = prm.read({"p/1": PROBLEM}, [{"id": "p/1", "text": text} for text in ANSWERS])
    for (_, rewards), text in zip(found, ANSWERS, strict=True):
        assert rewards == pytest.approx(step_by_step(tmp_path / "prm", layout, PROBLEM, text), abs=2e-6)


@pytest.mark.parametrize("layout, text", [("score", "<extra_0>1\n2"), ("v_head", "a<|endoftext|>b")])
def test_special_tokens_that_a_response_writes_are_plain_text(tmp_path, layout, text):
    prm = hs_star.RewardModel(str(write_prm(tmp_path / "prm", layout)))
    ids, places = prm.encode(PROBLEM, text)
    special = [i for i in ids[len(prm.encode(PROBLEM, "")[0]) - 1:] if i in prm.tokenizer.all_special_ids]
    assert len(places) == 1
    assert special == (prm.mark if layout == "score" else [])


@pytest.mark.parametrize("text", ["\n\n".join(["37+7=44"] * 12_000), "7" * 100_000])
def test_response_beyond_the_context_is_read_up_to_it(tmp_path, text):
    prm = hs_star.RewardModel(str(write_prm(tmp_path / "prm", "v_head", max_position_embeddings=300)))
    ids, places = prm.encode(PROBLEM, text)
    assert len(ids) == 300
    assert places[-1] == 299
    assert {ids[place] for place in places} == set(prm.mark)


def test_problem_beyond_the_context_has_no_rewards(tmp_path, alone):
    prm = hs_star.RewardModel(str(write_prm(tmp_path / "prm", "v_head", max_position_embeddings=300)))
    prm.load()
    long = {**PROBLEM, "problem": "7" * 1000}
    assert prm.read({"p/1": long}, [{"id": "p/1", "text": "7"}]) == [[300, []]]


def without_blank_line(folder):
    """A tokenizer to which a blank line is two tokens."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [m for m in merges if m not in (["\u010a", "\u010a"], "\u010a \u010a")]
    assert len(tokenizer["model"]["merges"]) < len(merges)
    path.write_text(json.dumps(tokenizer))


def without_mark(folder):
    """A tokenizer without <extra_0>."""
    shutil.copy(TOY / "model" / "tokenizer.json", folder)
    shutil.copy(TOY / "model" / "tokenizer_config.json", folder)


@pytest.mark.parametrize("layout, more, change, words", [
    ("v_head", {"drop": ["model.layers.1.mlp.up_proj.weight"]}, None, "missing tensors, first layers.1.mlp.up_proj.weight"),
    ("v_head", {}, without_blank_line, "its tokenizer has no token for the end of a step, '\\n\\n'"),
    ("score", {}, without_mark, "its tokenizer has no token for the end of a step, '<extra_0>'"),
    ("score", {"model_type": "unheard_of"}, None, "contains custom code which must be executed"),
    ("v_head", {"drop": ["v_head.summary.weight", "v_head.summary.bias"]}, None, "no process reward model"),
])
def test_broken_reward_model_is_refused_in_one_line(tmp_path, capsys, alone, layout, more, change, words):
    folder = write_prm(tmp_path / "prm", layout, **more)
    if change:
        change(folder)
    assert words in refusal_of(capsys, lambda: hs_star.RewardModel(str(folder)).load())


def test_rewards_that_are_not_numbers_end_the_program(tmp_path, capsys, alone):
    prm = hs_star.RewardModel(str(write_prm(tmp_path / "prm", "v_head")))
    prm.load()
    prm.head[0].bias.data *= math.nan
    line = refusal_of(capsys, prm.read, {"p/1": PROBLEM}, [{"id": "p/1", "text": "7"}])
    assert "its rewards are not numbers, in answers to p/1" in line


@pytest.mark.parametrize("batch", [1, 16])
def test_equal_responses_are_read_once(tmp_path, monkeypatch, batch):
    """Five texts to each of nine problems, twice; the records are in the order of the responses."""
    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, hs_star, PRM_BATCH=batch)
    problems = [{**p, "id": str(n)} for n, p in enumerate(lines(TOY / "test.jsonl")[:9])]
    responses = []
    for problem in problems:
        for draw, text in enumerate([*ANSWERS, "so"] * 2):
            responses.append({"id": problem["id"], "draw": draw, "text": text})
    model = str(TOY / "model")
    run = common.start_run({**vars(hs_star), **hs_star.TOY, "MODEL": model, "NAME": "r"}, problems)
    prm = hs_star.RewardModel(str(TOY / "prm"))
    records = hs_star.step_rewards(run, "round_1/prerewards.jsonl", prm, problems, responses)
    assert [(r["id"], r["draw"]) for r in records] == [(r["id"], r["draw"]) for r in responses]
    rewards = [r["reward"] for r in records]
    assert rewards == [rewards[place - place % 10 + place % 5] for place in range(90)]
    assert run.metrics[1, "prerewards"]["different"] == 45


HS = ["--toy", "--n-train", "12", "--slice", "12", "--n-test", "4", "--rounds", "1"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with the run "report" of hs_star.py --report-only, and what was said. Only for reading."""
    folder = tmp_path_factory.mktemp("report")
    flags = [*HS, "--report-only", "--tau-low", "0", "--tau-high", "0", "--name", "report"]
    done = launch(folder, "hs_star.py", *flags)
    return folder, done.stdout


def test_report_only_shows_rewards_and_stops(report):
    folder, said = report
    run = folder / "runs/report"
    [logged] = [m for m in lines(run / "metrics.jsonl") if m["phase"] == "phi_r"]
    groups = {name: values for name, values in logged.items() if name.startswith("phi_a")}
    assert all(name in said for name in groups)
    assert sum(values["problems"] for values in groups.values()) == 12
    assert sorted(path.name for path in run.glob("round_*/*")) == ["prerewards.jsonl", "presamples.jsonl"]


def test_report_only_serves_the_run_that_follows(report, tmp_path):
    shutil.copytree(report[0] / "runs/report/round_1", tmp_path / "runs/next/round_1")
    launch(tmp_path, "hs_star.py", *HS, "--name", "next")
    phases = {m["phase"] for m in lines(tmp_path / "runs/next/metrics.jsonl")}
    assert "resamples" in phases
    assert not phases & {"presamples", "prerewards"}
    selection = lines(tmp_path / "runs/next/round_1/selection.jsonl")
    assert sum(len(s["outcomes"]) for s in selection) == 12 * 8


def test_step_set_trains_the_model_that_draws(report, tmp_path):
    common.write(tmp_path / "steps.jsonl", lines(TOY / "train.jsonl")[-40:])
    flags = [*HS, "--report-only", "--step-set", "steps.jsonl", "--lr", "1e-3", "--name", "m0"]
    launch(tmp_path, "hs_star.py", *flags)
    texts = []
    for run in report[0] / "runs/report", tmp_path / "runs/m0":
        texts.append([(r["id"], r["text"]) for r in lines(run / "round_1/presamples.jsonl")])
    assert len(lines(tmp_path / "runs/m0/round_0/steps.jsonl")) == 3
    assert [i for i, _ in texts[0]] == [i for i, _ in texts[1]]
    assert texts[0] != texts[1]


# SAI-DPO ----------------------------------------------------------------------------------------------------

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
    ('[{"tag": "geometry"}, 7, "sums"]', ["sums"]), ('["caf\\u00e9s"]', ["cafés"]),
    ('["the angle \\theta", "\\binom{n}{k}"]', ["the angle \\theta", "\\binom{n}{k}"]),  # no tabulator
    ("The interval [0, 1] and [2, 3].", []), ("[]", []), ("1. Geometry\n2. Triangles", []),
    ("", []), ("[", []), ('["unfinished", "list', []), ("]" * 9 + "[" * 9, []),
])
def test_tags_are_the_last_list_of_an_output(text, tags):
    assert sai_dpo.parse_tags({"text": text, "finish": "stop"}) == tags
    assert sai_dpo.parse_tags({"text": text, "finish": "length"}) == []  # perhaps still thinking


@pytest.mark.parametrize("piece", [
    "[", "['", '["a" ', "\"' ", "['a', ", '["a\n', "</think>[", "\\", "['\t", '["[', '[{"a":', '["a",',
    "\n \n", "\nStep 1 \t#"])
def test_hostile_output_costs_nothing(piece):
    began = time.process_time()
    text = piece * (200_000 // len(piece)) + "]"
    assert sai_dpo.parse_tags({"text": text, "finish": "stop"}) == []
    sai_dpo.steps_of(text)
    assert time.process_time() - began < 1  # tenths of it; a quadratic search takes minutes


@pytest.mark.parametrize("text, steps", [
    ("", 0), ("\\boxed{4}", 1), ("a\nb", 1), ("a\n\nb", 2), ("a\n \t\nb\n\n\n\nc\n", 3), ("a\r\n\r\nb", 2),
    ("Step 1: a\nStep 2: b\n\nso\n\nand so", 2),  # markers count where there are any
    ("**Step 1** a\n\n## Step 2\n\n  step 3. b", 3),
    ("In step 2 we\n\nsaw Step 1", 2),  # only at the start of a line
])
def test_steps_of_a_response(text, steps):
    assert sai_dpo.steps_of(text) == steps


HARDER = [  # outcomes, steps, tokens of four draws; p, mean steps, mean length; the easiest first
    ([1, 1, 1, 1], [9, 9, 9, 9], [99, 99, 99, 99], (1.0, 9, 99)),  # whatever its length
    ([1, 1, 1, 0], [2, 2, 2, 2], [10, 10, 10, 14], (0.75, 2, 11)),
    ([1, 1, 0, 1], [2, 2, 2, 2], [10, 10, 10, 18], (0.75, 2, 12)),  # as often, as many steps, longer
    ([1, 0, 1, 1], [2, 2, 2, 4], [1, 1, 1, 1], (0.75, 2.5, 1)),  # more steps, though shorter
    ([1, -1, 1, -1], [1, 50, 1, 50], [5, 96, 7, 96], (0.5, 1, 6)),  # two were cut: wrong, and in no mean
    ([0, 0, 0, -1], [1, 2, 3, 9], [1, 2, 3, 96], (0.0, 2, 2)),
    ([-1, -1, -1, -1], [9, 9, 9, 9], [96, 96, 96, 96], (0.0, None, None)),  # all were cut: hardest
]


@pytest.mark.parametrize("outcomes, steps, tokens, expected", HARDER)
def test_difficulty_of_sai_dpo(outcomes, steps, tokens, expected):
    assert sai_dpo.difficulty_of(outcomes, steps, tokens) == expected


def test_difficulty_of_sai_dpo_goes_by_p_then_steps_then_length():
    keys = [sai_dpo.key_of(*numbers) for *_, numbers in HARDER]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


RATES = [[1.0, 0.5], [0.0, 0.0], [1.0]]  # of the probed problems of three clusters: errors 0.5, 2 and 0


@pytest.mark.parametrize("rates, unused, masses", [
    (RATES, [10, 20, 5], [2.5 / 9, 20 / 9, 0]),  # 2.5, 20 and 0, times 2.5 / 22.5
    (RATES, [10, 0, 5], [2.5, 0, 0]),  # one is used up
    ([[1.0], [1.0]], [3, 4], [0, 0])])  # no failure at all
def test_error_masses(rates, unused, masses):
    assert sai_dpo.error_masses(rates, np.array(unused)) == pytest.approx(masses)


@pytest.mark.parametrize("smoothing, masses, shares", [
    (1.0, [1.0, 2.5, 0.0], [2 / 6.5, 3.5 / 6.5, 1 / 6.5]), (1.0, [0.0] * 4, [0.25] * 4),
    (0.0, [1.0, 4.0, 0.0], [0.2, 0.8, 0.0]), (0.0, [0.0] * 4, [0.25] * 4)])  # nothing to go by
def test_shares(monkeypatch, smoothing, masses, shares):
    set_constants(monkeypatch, sai_dpo, SMOOTHING=smoothing)
    assert sai_dpo.shares_of(np.array(masses)) == pytest.approx(shares)


@pytest.mark.parametrize("select, before, weights", [
    ("both", False, [0.5, 0.25, 0.25]), ("static", False, [0.5, 0.25, 0.25]),
    ("knowledge", False, [0.5, 0.25, 0.25]), ("difficulty", False, None), ("random", False, None),
    ("both", True, [10 / 15, 1 / 15, 4 / 15])])  # means of 4 p (1 - p): 0.5, 0.1 at least, 0.4
def test_weights_of_the_draw(monkeypatch, select, before, weights):
    set_constants(monkeypatch, sai_dpo, SELECT=select, DIFFICULTY_BEFORE=before)
    p = (1 - math.sqrt(0.6)) / 2
    found = sai_dpo.weights_of(np.array([0.5, 0.25, 0.25]), [[1.0, 0.5], [0.0, 0.0], [p]])
    assert found is None if weights is None else found == pytest.approx(weights)


@pytest.mark.parametrize("shares, room, total, counts", [
    ([0.5, 0.3, 0.2], [99, 99, 99], 10, [5, 3, 2]),
    ([0.5, 0.3, 0.2], [2, 99, 99], 10, [2, 5, 3]),  # 8 left, at 3 : 2 -> 4.8 and 3.2
    ([0.5, 0.3, 0.2], [2, 3, 99], 10, [2, 3, 5]),  # and on to the next
    ([0.5, 0.3, 0.2], [2, 3, 4], 10, [2, 3, 4]),  # 9 are all there are
    ([1 / 3, 1 / 3, 1 / 3], [9, 9, 9], 8, [3, 3, 2]),  # of equal remainders the first
    ([0.6, 0.25, 0.15], [9, 9, 9], 3, [2, 1, 0]),  # 1.8, 0.75, 0.45
    ([0.7, 0.0, 0.3], [3, 9, 3], 9, [3, 0, 3]),  # without a share nothing, even so
    ([0.0, 0.0], [9, 9], 5, [0, 0]), ([0.9, 0.1], [0, 0], 5, [0, 0]), ([1.0], [7], 0, [0]),
])
def test_apportion_by_hand(shares, room, total, counts):
    assert sai_dpo.apportion(np.array(shares), np.array(room), total).tolist() == counts


def test_apportion_gives_each_its_part_of_what_others_left():
    """To one, in 2,000 random cases."""
    r = rng()
    for _ in range(2000):
        n = int(r.integers(1, 30))
        shares = r.dirichlet(np.ones(n)) * (r.random(n) < 0.9)
        room, total = r.integers(0, 40, n), int(r.integers(0, 900))
        found = sai_dpo.apportion(shares, room, total)
        assert found.sum() == min(total, room[shares > 0].sum())
        assert ((0 <= found) & (found <= room)).all()
        free = (found < room) & (shares > 0)
        if free.any():
            parts = shares[free] / shares[free].sum() * found[free].sum()
            assert np.abs(parts - found[free]).max() < 1 + 1e-6


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


CLUSTERS = np.repeat([0, 1, 2], [60, 30, 10])  # of 100 problems
WEIGHTS = np.array([0.2, 0.2, 0.6])


@pytest.mark.parametrize("n, per_cluster", [(10, [2, 2, 6]), (20, [5, 5, 10])])  # the last has 10, not 12
def test_draw_takes_of_each_cluster_its_share(n, per_cluster):
    chosen = sai_dpo.draw(np.arange(100), CLUSTERS, WEIGHTS, n, rng())
    assert np.bincount(CLUSTERS[chosen]).tolist() == per_cluster
    assert len(set(chosen.tolist())) == n


@pytest.mark.parametrize("weights, per_cluster", [(WEIGHTS, [2, 2, 6]), (None, [6, 3, 1])])
def test_draw_is_at_random_inside_a_cluster(weights, per_cluster):
    times = np.zeros(100)
    for seed in range(400):
        times[sai_dpo.draw(np.arange(100), CLUSTERS, weights, 10, rng(seed))] += 1
    assert np.bincount(CLUSTERS, times) / 400 == pytest.approx(per_cluster, abs=0.2)
    for j, n in enumerate(per_cluster):
        expected = 400 * n / (CLUSTERS == j).sum()
        assert np.abs(times[CLUSTERS == j] - expected).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("weights", [np.array([0.1, 0.2, 0.7]), None])
def test_draw_has_no_problem_twice_until_all_were_drawn(weights):
    clusters, pool = np.arange(60) % 3, np.arange(5, 60)  # 55 problems: 3 rounds of 16, and 7
    used = pool[:0]
    rounds = []
    for t in range(1, 5):
        chosen, used = sai_dpo.draw_round(pool, used, clusters, weights, 16, rng(t))
        rounds.append(chosen.tolist())
        assert len(set(rounds[-1])) == 16
    first = set(sum(rounds[:3], []))
    assert len(first) == 48
    assert set(pool.tolist()) - first < set(rounds[3]) < set(pool.tolist())  # the last 7, and then others
    assert used.tolist() == rounds[3]  # those of the new pass


ROWS = [  # of what a round drew: ten problems, six of them learnable
    {"cluster": j, "outcomes": outcomes, "p": outcomes.count(1) / len(outcomes), "steps": steps, "length": n}
    for j, outcomes, steps, n in [
        (0, [1, 1, 1, 0], 2, 9), (0, [1, 0, 0, 0, 0], 2, 9), (0, [1, 0, 0, 0, 0], 3, 9),
        (0, [1, 1, 0, 0], 9, 9), (1, [1, 1, 1, 0], 5, 5), (1, [1, 1, 1, 0], 5, 6), (1, [1, 1, 1, 1], 9, 9),
        (1, [0, 0, 0, 0], 9, 9),
        (1, [1, 1, -1, -1], 9, 9), (2, [-1, -1, -1, -1], None, None)]]
SHARES = np.array([0.5, 0.25, 0.25])


@pytest.mark.parametrize("select, prefer, kept", [
    ("both", "hardest", [2, 1, 5]), ("static", "hardest", [2, 1, 5]),  # shares 2 : 1 : 1, none in the last
    ("both", "middle", [3, 0, 5]),  # rows 1 and 2 have p = 0.2: behind the others
    ("difficulty", "hardest", [2, 1, 3]), ("difficulty", "middle", [3, 5, 4]),
])
def test_hardest_problems_are_kept(monkeypatch, select, prefer, kept):
    set_constants(monkeypatch, sai_dpo, SELECT=select, PREFER=prefer, PAIRS_PER_ROUND=3)
    assert sai_dpo.keep(ROWS, SHARES, rng()) == kept


@pytest.mark.parametrize("select, in_first", [("knowledge", {2}), ("random", {1, 2, 3})])
def test_random_learnable_problems_are_kept(monkeypatch, select, in_first):
    set_constants(monkeypatch, sai_dpo, SELECT=select, PAIRS_PER_ROUND=3)
    found = [sai_dpo.keep(ROWS, SHARES, rng(seed)) for seed in range(200)]
    assert {i for kept in found for i in kept} == {0, 1, 2, 3, 4, 5}
    assert sai_dpo.keep(ROWS[6:], SHARES, rng()) == []
    assert {sum(i < 4 for i in kept) for kept in found} == in_first


def test_pair_of_sai_dpo_is_a_random_right_and_a_random_wrong_answer():
    found = {tuple(sai_dpo.choose_pair([1, 0, -1, 1, 0], rng(seed))) for seed in range(60)}
    assert found == {(0, 1), (0, 4), (3, 1), (3, 4)}  # never the cut one


# Clusters of tags -------------------------------------------------------------------------------------------


def inertia_of(points, clusters):
    """The sum of squared distances to the centres of the clusters."""
    groups = [points[clusters == j] for j in range(max(clusters) + 1)]
    return sum(np.square(group - group.mean(0)).sum() for group in groups)


def test_kmeans_finds_separated_groups():
    r = rng()
    truth = r.permutation(np.repeat(np.arange(4), [60, 50, 40, 30]))
    points = (r.normal(size=(4, 16))[truth] * 5 + r.normal(size=(180, 16)) * 0.1).astype(np.float32)
    assert (sai_dpo.kmeans(points, 4, rng(3)) == truth).all()  # numbered by size too


def test_kmeans_is_as_good_as_scikit_learns(shared):
    """On tf-idf of MATH's problems."""
    from sklearn.cluster import KMeans
    problems = common.load_problems("math", "train", str(shared / "data"), 1000)
    points = sai_dpo.tfidf([problem["problem"] for problem in problems])
    theirs = KMeans(20, n_init=10, random_state=0).fit(points).inertia_
    assert inertia_of(points, sai_dpo.kmeans(points, 20, rng())) < 1.01 * theirs


@pytest.mark.parametrize("texts, expected", [
    (["sums"] * 4 + ["digit sums"] * 3 + ["", "7 + 8"], [0] * 4 + [1] * 3 + [2] * 2),  # no words
    (["one text"] * 3, [0, 0, 0])])
def test_kmeans_of_few_different_points_has_as_many_clusters(texts, expected):
    assert sai_dpo.kmeans(sai_dpo.tfidf(texts), 20, rng()).tolist() == expected


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
    """Two words at places of their own, of weights (1 + ln 2) ln(3/1) and ln(3/2)."""
    a, b, c = sai_dpo.tfidf(["rare rare common", "common", "\\frac{1}{2} 7"])
    rare, frequent = (1 + math.log(2)) * (math.log(3) + 1e-3), math.log(1.5) + 1e-3
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
    (folder / "1_Pooling").mkdir()
    modules = []
    for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_x", "Normalize")]):
        kind = f"sentence_transformers.models.{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    ways = {f"pooling_mode_{way}_tokens": way == pooling for way in ("mean", "max")}
    ways["pooling_mode_cls_token"] = pooling == "cls"
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **ways}))
    settings = {"max_seq_length": 24, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


TEXTS = ["sums", "area of a trapezoid, geometry", "x" * 500, "Find the number of " * 40, "", "modulus"] * 20


@pytest.mark.parametrize("published", [False, True])
def test_embeddings_equal_sentence_transformers(tmp_path, alone, published):
    """Of a small random encoder, and of all-mpnet-base-v2 where it is on this machine."""
    name = "sentence-transformers/all-mpnet-base-v2"
    if not published:
        name = str(write_encoder(tmp_path / "encoder"))
    else:
        try:
            common.snapshot_download(name, local_files_only=True)
        except Exception as error:
            pytest.skip(f"{name} is not on this machine ({type(error).__name__})")
    from sentence_transformers import SentenceTransformer  # a second or two
    theirs = SentenceTransformer(name, device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert np.abs(sai_dpo.embed(name, TEXTS) - theirs).max() < 1e-5


def test_encoder_that_is_not_mean_pooling_is_refused(tmp_path, monkeypatch, capsys):
    """Before anything else is done."""
    folder = write_encoder(tmp_path / "encoder", pooling="cls")
    set_constants(monkeypatch, sai_dpo, EMBEDDER=str(folder))
    monkeypatch.chdir(tmp_path)
    assert "only mean pooling encoders are read here" in refusal_of(capsys, sai_dpo.main)
    assert not (tmp_path / "runs").exists()


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
    useless = sum(not output["correct"] for output in outputs)
    assert (f"warning: {useless} of {len(outputs)} outputs have no list of tags" in said) == (2 * useless > len(outputs))


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
    assert f"({list(groups.values()).count([])} problems without a tag, by their text)" in done.stdout


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
