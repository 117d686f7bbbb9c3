"""Score models on problem sets: accuracy, pass@k and maj@k with 95 % intervals, by level and subject.

  python eval.py --model tests/toy/model --sets tests/toy/test.jsonl --max-new-tokens 96
  torchrun --nproc-per-node 8 eval.py --model runs/dast-0/round_0/model,runs/dast-0/round_3/model --sets gsm8k,math500
  python eval.py --model Qwen/Qwen2.5-1.5B --sets gsm8k --prompt few_shot --samples 16 --temperature 0.7
  python eval.py --regrade responses.jsonl
  python eval.py --compare runs/dast-0 runs/adastar-*

Greedy by default. Writes every answer to runs/<run>/<model>/<set>.jsonl and the scores to runs/<run>/eval.json; a
rerun goes on where the last one stopped. --regrade checks stored answers, of any origin: lines {answer, text} (and
choices, where the answer is a letter); or with the id of a problem of --sets in place of its answer. It writes the same
lines with `correct` and `reason` to responses.graded.jsonl. --compare prints what runs of the method scripts reached,
and what it cost, and draws it (with matplotlib). The method scripts score each round with `evaluate`.
"""
import functools
import json
import math
import re
import time
from collections import Counter, defaultdict, deque
from fractions import Fraction
from pathlib import Path

import numpy as np

from common import (YES_NO, Checker, bar, by_problem, check_name, constants_of, fail, final_answer, label_of,
                    letter_of, load_problems, load_tokenizer, make_prompt, normalize, override_from_cli, piece_of, rank,
                    read, read_problem, sample, say, seed_of, setup, start_run, threads_per_process)

# What to score
MODEL = "Qwen/Qwen2.5-1.5B"  # Hub names or folders, comma-separated
SETS = "gsm8k,math"  # names of sets, .jsonl or .json files, owner/name of the Hub; comma-separated
SPLIT = "test"  # "test" | "train": of the sets known by name
N_TEST = 0  # problems of each set, drawn at random once and for all; 0 is all
HELD_OUT = 0  # score what a method put aside: its HELD_OUT, SEED, TRAIN_DATA (SETS), N_TRAIN (N_TEST); 0 scores all
SEED = 0  # of the draws, of which examples are shown, and of what is put aside
REGRADE = ""  # a .jsonl file of answers to check again; no model is used then
COMPARE = ()  # folders of runs to compare to the first; seeds of one (name-0, name-1) are pooled; no model is used then

# How
PROMPT = "zero_shot"  # "zero_shot" | "few_shot" | "chat": form of the prompts
EXAMPLES_FROM = ""  # with few_shot: a set's train split or a file whose solutions are shown; empty shows our own
SHOTS = 8  # with few_shot: how many at most
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only
FIRST = ""  # what stands before every prompt, for models that were trained so (by hs_star.py); empty is nothing
SAMPLES = 1  # answers per problem; with more than one also pass@k and maj@k
TEMPERATURE = 0.0  # 0 is greedy
TOP_P = 1.0  # 1: off
MAX_NEW_TOKENS = 1024  # an answer is cut there
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that

# Machine: may differ when a run goes on
ENGINE = ""  # "" | "vllm" | "transformers": what samples; empty is vLLM on a GPU, else transformers
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower
SEEDED = True  # a seed for each of vLLM's answers; without, they may come faster, and are others each time
GPU_MEMORY = 0.9  # share of a GPU that vLLM may fill
RUN = ""  # the folder under runs/; empty is made from the names of models and sets
DATA = "data"  # folder of the known problem sets, as data/gsm8k/test.jsonl
WANDB = False  # log to Weights & Biases too


def binomial_interval(right, n):
    """The exact (Clopper-Pearson) 95 % interval of a share, by bisection on the binomial distribution."""
    def at_least(k, p):  # P(X >= k)
        if p in (0.0, 1.0):
            return float(p == 1.0 or k == 0)
        ways = math.lgamma(n + 1)
        return math.fsum(math.exp(ways - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * math.log(p)
                                  + (n - j) * math.log1p(-p)) for j in range(k, n + 1))

    def where(share_is_too_low):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if share_is_too_low(middle) else (low, middle)
        return (low + high) / 2

    lower = 0.0 if right == 0 else where(lambda p: at_least(right, p) < 0.025)
    upper = 1.0 if right == n else where(lambda p: 1 - at_least(right + 1, p) > 0.025)
    return [lower, upper]


def pass_at(correct, k):
    """P(at least one of k answers is right) of each problem, (problems,), from correct (problems, n), 0 or 1, where c
    are right: unbiased, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1)."""
    n, c = correct.shape[1], correct.sum(1).astype(int)
    return np.array([1 - math.comb(n - right, k) / math.comb(n, k) for right in c])


def maj_at(votes, k):
    """Share right of the majority of k answers, of each problem, (problems,): the mean over the n // k groups of k
    consecutive draws. votes: for each problem n votes, True where right, None (no vote) or a wrong answer. Where
    answers tie, the right one counts as its share of them."""
    def majority(group):
        counts = Counter(vote for vote in group if vote is not None)
        first = [vote for vote, n in counts.items() if n == max(counts.values())]
        return (True in first) / len(first) if first else 0.0

    return np.array([np.mean([majority(row[at:at + k]) for at in range(0, len(row) - k + 1, k)]) for row in votes])


def vote_of(problem, response):
    """What a response votes for: all right answers are one, wrong ones are told apart by their value, if that is a
    plain number or a letter, else by their normalized text."""
    answer = True if response["correct"] else final_answer(response["text"])
    if answer in (True, None):
        return answer
    if problem["kind"] == "choice":
        return letter_of(answer, problem.get("choices", ())) or answer
    if problem["kind"] != "math":
        return label_of(answer, problem.get("choices", YES_NO)) or answer
    answer = normalize(piece_of(answer[:1000]))
    number = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", answer)
    plain = re.fullmatch(r"-?\d{1,20}(\.\d{1,20}|/0*[1-9]\d{0,19})?", number)
    return f"= {Fraction(number)}" if plain else answer


def mean_of(values, rng):
    """{accuracy, interval, n} of one number per problem; the 95 % interval is bootstrapped over problems."""
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return {"accuracy": float(values.mean()), "interval": np.quantile(means, [0.025, 0.975]).tolist(), "n": len(values)}


def accuracy(correct, rng):
    """{accuracy, interval, n} of correct (problems, samples), 0 or 1. The interval is exact for one sample."""
    if correct.shape[1] > 1:
        return mean_of(correct.mean(1), rng)
    return {"accuracy": float(correct.mean()), "interval": binomial_interval(int(correct.sum()), len(correct)),
            "n": len(correct)}


def score(problems, responses, rng):
    """What is said of responses, as many to each problem: {accuracy, interval, n, samples, cut, by_level, by_subject,
    by_set, correct: {id: right answers}, level: {id: level}} and, of several, pass_at and maj_at {k: ...} for k = 1, 2,
    4, ..., samples."""
    samples = len(responses) // len(problems)
    correct = np.array([r["correct"] for r in responses], dtype=float).reshape(len(problems), samples)
    groups = {"by_level": [[p["level"]] if "level" in p else [] for p in problems],
              "by_subject": [p.get("tags", []) for p in problems],
              "by_set": [[p["id"].rsplit("/", 1)[0]] for p in problems]}
    found = {**accuracy(correct, rng), "samples": samples,
             "cut": sum(r["finish"] == "length" for r in responses) / len(responses)}
    for by, names in groups.items():
        found[by] = {str(name): accuracy(correct[[name in own for own in names]], rng)
                     for name in sorted({name for own in names for name in own})}
    if samples > 1:
        votes = [[vote_of(p, r) for r in responses[i * samples:(i + 1) * samples]] for i, p in enumerate(problems)]
        ks = sorted({2 ** i for i in range(samples.bit_length())} | {samples})
        found["pass_at"] = {str(k): mean_of(pass_at(correct, k), rng) for k in ks}
        found["maj_at"] = {str(k): mean_of(maj_at(votes, k), rng) for k in ks[1:]}
    return found | {"correct": {p["id"]: int(n) for p, n in zip(problems, correct.sum(1))},
                    "level": {p["id"]: p["level"] for p in problems if "level" in p}}


def hold_out(problems, n, seed):
    """(the others, n random problems that are put aside to be scored): the same for a seed, whatever else is read. A
    problem whose text occurs twice is on one side only, so the second list may be a little longer."""
    order = sorted({p["problem"] for p in problems}, key=lambda text: seed_of(seed, "held out", text))
    texts, kept = set(), Counter(p["problem"] for p in problems)
    for text in order:
        if sum(kept[t] for t in texts) >= n:
            break
        texts.add(text)
    if len(texts) == len(order):
        fail(f"--held-out {n} leaves nothing of the {len(problems)} problems")
    return [p for p in problems if p["problem"] not in texts], [p for p in problems if p["problem"] in texts]


def worked_examples(problem):
    """Problems with solutions to show before one like `problem`: ours, of its family."""
    family, words = problem["kind"], {"gsm8k", "adastar_gsm8k", "svamp", "adastar_svamp"}  # sets of word problems
    if family == "math":
        family = "grade-school" if words & {*problem["id"].split("/")} else "competition"
    return [{"problem": text, "solution": solution} for text, solution in EXAMPLES[family]]


def evaluate(run, file, model, problems, prompt, *, round, phase="eval", **settings):
    """Score a model by one greedy answer to each problem, once, in a file of the run: what a method script does after a
    round. What there is of each problem stays in the file: many rounds of many problems would fill the memory."""
    found = run.once(file, lambda: score(problems, sample(
        run, model, problems, 1, prompt, round=round, phase=phase, temperature=0.0, **settings), run.rng(phase)))
    return {what: values for what, values in found.items() if what not in ("correct", "level", "by_subject")}


def show_answers(problems, responses):
    """Print one right and one wrong response in full, so that a person sees what the numbers are made of."""
    text = {p["id"]: p for p in problems}
    for right in (True, False):
        shown = next((r for r in responses if r["correct"] == right), None)
        if shown:
            problem = text[shown["id"]]
            say(f"  {'right' if right else 'wrong'}: {problem['problem']}\n    " + shown["text"].replace("\n", "\n    ")
                + f"\n    (the answer is {problem['answer']})")


def print_table(scores, first):
    """Print {name: score} as rows: accuracy, its interval, accuracy by level; below a row its sets, if it has several,
    and pass@k and maj@k."""
    names = [name for score in scores.values() for name in ("  pass@", "  maj@", *score["by_set"])]
    width = max(len(first), *map(len, names), *map(len, scores)) + 4
    levels = sorted({level for s in scores.values() for level in s["by_level"]}, key=int)
    say(f"\n{first:<{width}}problems  accuracy  95 % interval    cut  "
        + "".join(f"level {n:<4}" for n in levels).rstrip())
    for name, s in scores.items():
        by_level = [f"{s['by_level'][n]['accuracy']:<10.1%}" if n in s["by_level"] else " " * 10 for n in levels]
        print_row(name, s, width, f"{s['cut']:>7.1%}  " + "".join(by_level).rstrip())
        for part, of in s["by_set"].items() if len(s["by_set"]) > 1 else ():
            print_row(f"  {part}", of, width)
        for at in ("pass_at", "maj_at"):
            for k, of in s.get(at, {}).items():
                print_row(f"  {at[:-3]}@{k}", of, width)


def print_row(name, score, width, more=""):
    low, high = score["interval"]
    say(f"{name:<{width}}{score['n']:>8,}{score['accuracy']:>10.1%}  {low:>5.1%} - {high:>5.1%}{more}")


def print_subjects(scores):
    """Print the accuracy by subject of each set that has up to 30 of them."""
    for name, s in scores.items():
        if 1 < len(s["by_subject"]) <= 30:
            width = max(map(len, [name, *s["by_subject"]])) + 4
            say(f"\n{name:<{width}}problems  accuracy  95 % interval")
            for subject, of in s["by_subject"].items():
                print_row(subject, of, width)


def end_round(run, t):
    """Log what round t cost: FLOPs of sampling, rewards and training (not of evaluation), in it and so far, and the
    seconds that went into none of these (not of the rounds at which a run was started again)."""
    of_round = [m for m in run.metrics.values() if m["round"] == t]
    phases, costs = [m for m in of_round if m["phase"] not in ("round", "reported")], {}
    before = [m for m in run.metrics.values() if m["phase"] == "round" and m["round"] < t]
    for name in ("flops", "padded_flops", "spent_flops"):
        costs[name] = sum(m.get(name, 0) for m in phases if not m["phase"].startswith("eval"))
        costs[f"total_{name}"] = costs[name] + sum(m[name] for m in before)
    for m in of_round:  # of a round that was closed before, the seconds stay
        costs |= {name: m[name] for name in ("seconds", "outside_seconds") if m["phase"] == "round" and name in m}
    whole = run.logged >= {m["phase"] for m in phases}  # all of it was made since the last start
    began, run.began, run.logged = run.began, time.time() if whole else None, set()
    if whole and began:
        costs["seconds"] = run.began - began
        costs["outside_seconds"] = costs["seconds"] - sum(m.get("seconds", 0) for m in phases)
    run.log(t, "round", **costs)


def final_table(run, scores):
    """Print the table of a run's rounds, and what they cost in FLOPs (without evaluation), and of their seconds those
    outside sampling, rewards and training."""
    print_table(scores, "model")
    say(f"\n{'FLOPs':<13}{'of it':>10}{'so far':>10}{'padded':>10}{'all drawn':>11}{'seconds':>9}{'outside':>9}")
    for m in run.metrics.values():
        if m["phase"] == "round":
            seconds = "".join(f"{m[n]:>9.1f}" if n in m else f"{'-':>9}" for n in ("seconds", "outside_seconds"))
            say(f"round {m['round']:<7}{m['flops']:>10.2e}{m['total_flops']:>10.2e}{m['total_padded_flops']:>10.2e}"
                f"{m['total_spent_flops']:>11.2e}{seconds}")
    say("(sampling, rewards and training; the first two of the draws that count; padded and all drawn: so far)")
    sampled = sum(m.get("spent_tokens", 0) for m in run.metrics.values())
    trained = sum(m["tokens"] for m in run.metrics.values() if m["phase"] == "train")
    seconds = sum(m.get("seconds", 0) for m in run.metrics.values() if m["phase"] != "round")
    say(f"{sampled:,} tokens sampled, {trained:,} trained on, {seconds:.0f} s; {run.folder}/metrics.jsonl")


def stored_problem(record, known):
    """The problem that a stored record {answer, text} (choices, kind) answers; one without `answer` is looked up by its
    id in `known`. ValueError if it cannot be used."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError("not a JSON object with a text under 'text'")
    if "answer" not in record:
        if str(record.get("id")) not in known:
            raise ValueError("no 'answer', and no problem of --sets has its id")
        return known[str(record["id"])]
    text = record.get("problem")
    problem = read_problem({"problem": text if isinstance(text, str) and text.strip() else "-", **{
        key: record[key] for key in ("answer", "choices", "kind") if key in record}})
    return {"id": str(record.get("id", "")), **(problem or {"answer": "", "problem": "", "kind": "math"})}


def stored_lines(path):
    """(number, text) of the lines of a file that are not blank."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def regrade(path):
    """Check the answers of a file of records again: the same records, with `correct` and `reason`, beside it."""
    if path.suffix != ".jsonl" or not path.is_file():
        fail(f"--regrade {path}: no such .jsonl file")
    known, count = {}, 0
    for number, line in stored_lines(path):  # all of it is looked at before any is checked
        try:
            record = json.loads(line)
            if isinstance(record, dict) and "answer" not in record and "id" in record and not known:
                known = {p["id"]: p for name in SETS.split(",") for p in load_problems(name, SPLIT, DATA)}
            stored_problem(record, known)
        except (ValueError, RecursionError) as error:
            fail(f"{path}:{number}: {error}; mend or remove the line")
        count += 1
    setup()
    if rank() > 0:
        return
    checker, waiting, reasons = Checker(threads_per_process(), GRADER), deque(), Counter()
    graded = path.with_suffix(".graded.jsonl")
    half = graded.with_name(graded.name + ".part")
    with open(half, "w") as out, bar(count, "checked") as progress:
        def write_known(most):
            """Write the verdicts that are known, in the order of the records, until at most `most` are awaited."""
            while waiting and (len(waiting) > most or waiting[0][1].done()):
                record, verdict = waiting.popleft()
                correct, reason = verdict.result()
                out.write(json.dumps({**record, "correct": correct, "reason": reason}) + "\n")
                reasons.update({reason: 1, True: correct})
                progress.set_postfix_str(f"{reasons[True] / max(1, progress.n):.1%} correct", refresh=False)
                progress.update()

        for _, line in stored_lines(path):
            record = json.loads(line)
            waiting.append((record, checker.submit(stored_problem(record, known), record["text"])))
            write_known(10_000)
        write_known(0)
    right = reasons.pop(True, 0)
    half.rename(graded)
    low, high = binomial_interval(right, count) if count else (0, 1)
    say(f"{right:,} of {count:,} correct ({right / max(1, count):.1%}, 95 % interval {low:.1%} - {high:.1%}): "
        + ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common()) + f"; {graded}")


# Comparing runs -------------------------------------------------------------------------------------------------------

SECONDS = {"sampling": "(probe|sample|presample|resample|rollout|tag)$", "rewards": "(pre|re)reward$",
           "training": "train$", "scoring": "eval"}  # kinds of phases
CLASSES = {"not met yet": "#cccccc", "unsolved (none right)": "#d55e00", "hard (below 40 %)": "#e69f00",
           "medium (to 70 %)": "#56b4e9", "easy (above)": "#0072b2"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe's and Ito's


class Past:
    """What a run of a method script left: of each round that is finished, its answers to the test problems and what was
    spent up to its end; and of each training problem, what became of it."""

    def __init__(self, folder):
        self.folder, self.rounds, self.levels = Path(folder), [], {}
        for name in ("constants.json", "metrics.jsonl"):
            if not (self.folder / name).is_file():
                fail(f"--compare {folder}: no {name} in it; it takes folders of runs, such as runs/dast-0")
        self.constants, self.metrics = read(self.folder / "constants.json"), read(self.folder / "metrics.jsonl")
        self.constants = self.constants.get("constants", {})
        for t in sorted(m["round"] for m in self.metrics if m["phase"] == "round"):
            files = [self.folder / f"round_{t}" / f"eval{which}.json" for which in ("", "_base", "_held_out")]
            if scored := next((read(file) for file in files if file.exists()), None):
                self.rounds.append({"round": t, "right": scored["correct"], **self.spent(t)})
                self.levels = scored.get("level", {})
        if not self.rounds or "SEED" not in self.constants:
            fail(f"--compare {folder}: no round of it is finished and scored")
        reported = [m["iteration"] for m in self.metrics if m["phase"] == "reported"]  # by adastar.py
        self.end = next((r for r in self.rounds if [r["round"]] == reported), self.rounds[-1])

    def spent(self, t):
        """Up to the end of round t, without scoring: tokens generated (in draws that count, and in all that were
        drawn), tokens trained on (prompts too), FLOPs, and seconds by kind of phase."""
        until = [m for m in self.metrics if m["round"] <= t]
        phases = [m for m in until if not re.match("eval|round|reported", m["phase"])]
        costs = {"generated": sum(m["tokens"] for m in phases if "draws" in m),
                 "drawn": sum(m["spent_tokens"] for m in phases if "draws" in m),
                 "trained": sum(m["tokens"] for m in phases if m["phase"] == "train"),
                 "flops": sum(m.get("flops", 0) for m in phases)}
        costs |= {kind: sum(m.get("seconds", 0) for m in until if re.match(names, m["phase"]))
                  for kind, names in SECONDS.items()}
        return costs | {"outside": sum(m.get("outside_seconds", 0) for m in until)}

    def at(self, what, amount):
        """{problem id: 0..1}, the answers when so much of `what` was spent: on the straight line between two rounds."""
        late = next((i for i, r in enumerate(self.rounds) if r[what] >= amount), None)
        if late is None or not late and self.rounds[0][what] > amount:
            return None
        before, after = self.rounds[max(0, late - 1)], self.rounds[late]
        part = (amount - before[what]) / ((after[what] - before[what]) or 1)
        return {i: (1 - part) * before["right"][i] + part * right for i, right in after["right"].items()}

    @functools.cached_property
    def problems(self):
        """{id: {round: (draws, right ones, times trained on)}} of the training problems that were met, up to the round
        that is shown, probes too (DAST's in round 0); trained on: with own answers, in all epochs."""
        found = defaultdict(dict)
        for t in (r["round"] for r in self.rounds if r["round"] <= self.end["round"]):
            probe, selection = (self.folder / f"round_{t}" / f"{name}.jsonl" for name in ("probe", "selection"))
            for i, drawn in by_problem(read(probe) if probe.exists() else []).items():
                found[i][t] = len(drawn), sum(r["correct"] for r in drawn), 0
            for s in read(selection) if selection.exists() else ():
                used = sum(s["copies"]) if "copies" in s else len(s["pairs"]) if "pairs" in s else bool(s["pair"])
                if s["outcomes"]:
                    found[s["id"]][t] = (len(s["outcomes"]), sum(o > 0 for o in s["outcomes"]),
                                         used * self.constants.get("EPOCHS", 1))
        return found


def arms_of(folders):
    """{name: runs} of run folders, in their order. Those of one name, but for the seed at its end, that differ in
    nothing else that counts are seeds of one arm."""
    arms = defaultdict(dict)
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        past, may_differ = Past(folder), {"SEED", "ROUNDS", "contents"}  # between seeds; and what is about the machine
        may_differ |= {n for source in folder.glob("*.py") for n, (group, _) in constants_of(source).items()
                       if group.startswith("Machine")}
        seed, same = f"-{past.constants['SEED']}", {n: v for n, v in past.constants.items() if n not in may_differ}
        same |= {n: same[n].removesuffix(seed) for n in ("DRAWS_LIKE", "SIZE_LIKE") if n in same}
        arms[str(folder).removesuffix(seed), json.dumps(same)][past.constants["SEED"]] = past
    names = {key: f"{key[0]}-{','.join(map(str, sorted(of)))}" if len(of) > 1 else str([*of.values()][0].folder)
             for key, of in arms.items()}
    return {names[key].removeprefix("runs/"): [of[seed] for seed in sorted(of)] for key, of in arms.items()}


def mean_over_seeds(values, rng, others=None):
    """{accuracy, interval, n} of values (seeds, problems), 0..1, or of their difference to `others`, another arm's on
    the same problems.

    The 95 % interval is bootstrapped over seeds, of each arm for itself, and over the problems, which all seeds share:
    if these were drawn for each seed on its own, their noise would seem to shrink with the number of seeds. For greedy
    answers of one run it is exact."""
    if others is None and len(values) == 1 and {*np.unique(values)} <= {0, 1}:
        return accuracy(values.T, rng)
    drawn = []
    for _ in range(2000):
        per_problem = values[rng.integers(len(values), size=len(values))].mean(0)
        if others is not None:
            per_problem = per_problem - others[rng.integers(len(others), size=len(others))].mean(0)
        drawn.append(per_problem[rng.integers(len(per_problem), size=len(per_problem))].mean())
    return {"accuracy": float(values.mean() - (0 if others is None else others.mean())), "n": values.shape[1],
            "interval": np.quantile(drawn, [0.025, 0.975]).tolist()}


def table_of(answers, ids):
    """Answers of an arm's seeds, [{problem id: 0..1}], as an array (seeds, problems)."""
    return np.array([[of[i] for i in ids] for of in answers], dtype=float)


def compare(folders):
    """Print what runs reached and what it cost, at their ends and at the most tokens that all have generated, and draw
    it: runs/<name>/accuracy.png, problems.png and flow.png."""
    setup()
    if rank() > 0:
        return
    arms, rng = arms_of(folders), np.random.default_rng(SEED)
    runs, first = [past for arm in arms.values() for past in arm], next(iter(arms))
    ids = [i for i in runs[0].end["right"] if all(i in past.end["right"] for past in runs)]
    if not ids:
        fail("--compare: there is no problem that all these runs were scored on")
    amount = min([past.rounds[-1]["generated"] for past in runs if past.rounds[-1]["generated"]] or [0])
    print_texts("accuracy, %", {name: accuracies(arm, ids, rng) for name, arm in arms.items()})
    if len(arms) > 1:
        print_texts(f"the same, against {first}", {name: differences(arm, arms[first], amount, ids, rng)
                                                   for name, arm in arms.items()})
    print_texts("what it cost", {name: costs(arm) for name, arm in arms.items()})
    left_out = len({i for past in runs for i in past.end["right"]}) - len(ids)
    say(f"(on the {len(ids):,} problems that all were scored on" + f", without {left_out:,} others" * (left_out > 0)
        + "; 95 % intervals, for one run exact, for several\nbootstrapped over seeds and problems; "
        f"{amount:,}: the most tokens that all have generated; costs: means of the seeds, up to the\nround that is "
        "shown; trained on: tokens, prompts too; times: how often each problem that was trained on was, and the\n"
        "standard deviation)")
    try:
        import matplotlib
    except ImportError:
        return say("no pictures: they need matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    name = RUN or f"compare-{slug('-'.join(arms))[:100]}-{seed_of(*arms) % 10_000}"
    check_name(name)
    folder = Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    draw_accuracy(arms, amount, ids, folder / "accuracy.png")
    draw_problems(arms, folder / "problems.png")
    draw_flow(arms, folder / "flow.png")
    say(f"{folder}: accuracy.png, problems.png, flow.png")


def percent(found, digits=1, sign=""):
    """53.2 [50.1, 56.3]: an accuracy in per cent, or with "+" a difference in points, and its interval."""
    return "{} [{}, {}]".format(*(f"{100 * value:{sign}.{digits}f}" for value in (
        found["accuracy"], *found["interval"])))


def accuracies(arm, ids, rng):
    """{column: text}: accuracy at the end on all problems, on each set, if there are several, and on each level."""
    levels, sets = arm[0].levels, {i: i.rsplit("/", 1)[0] for i in ids}
    parts = {"all": ids} | {name: [i for i in ids if sets[i] == name] for name in dict.fromkeys(sets.values())
                            if len({*sets.values()}) > 1}
    parts |= {f"level {level}": [i for i in ids if levels.get(i) == level]
              for level in sorted({levels[i] for i in ids if i in levels})}
    ends = [past.end["right"] for past in arm]
    return {name: percent(mean_over_seeds(table_of(ends, of), rng), digits=int(not name.startswith("level")))
            for name, of in parts.items()}


def differences(arm, other, amount, ids, rng):
    """{column: text} of an arm against another: paired differences in points at the end, and where `amount` tokens were
    generated, with the accuracy there."""
    ends, others = ([past.end["right"] for past in of] for of in (arm, other))
    there, others_there = ([past.at("generated", amount) for past in of] for of in (arm, other))
    def gain(of, against):
        if arm is other or not all(of + against):
            return "-"
        return percent(mean_over_seeds(table_of(of, ids), rng, table_of(against, ids)), sign="+")

    reached = percent(mean_over_seeds(table_of(there, ids), rng)) if all(there) else "-"
    return {"at the end": gain(ends, others), f"accuracy at {amount:,} tokens": reached,
            "difference there": gain(there, others_there)}


def costs(arm):
    """{column: text}, what an arm spent up to the round that is shown: the means of its seeds; and how often the
    problems that were trained on were, as in AdaSTaR's Table 2."""
    mean = {what: np.mean([past.end[what] for past in arm]) for what in arm[0].end if what != "right"}
    times = [sum(used for _, _, used in of.values()) for past in arm for of in past.problems.values()]
    times = np.array([n for n in times if n] or [0])
    names = {"generated": "generated", "all drawn": "drawn", "trained on": "trained"}
    return {"round": ",".join(map(str, sorted({past.end["round"] for past in arm}))),
            **{name: f"{mean[what]:,.0f}" for name, what in names.items()}, "FLOPs": f"{mean['flops']:.2e}",
            **{kind: f"{mean[kind]:.1f} s" for kind in (*SECONDS, "outside")},
            "problems": f"{np.count_nonzero(times) / len(arm):,.0f}",
            "times": f"{times.mean():.1f} ({times.std():.1f})"}


def print_texts(title, rows):
    """Print {name: {column: text}} as a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = [[title, *columns], *([name, *(row.get(column, "-") for column in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*table)]
    say()
    for name, *cells in table:
        say(f"{name:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])))


def figure(panels, height=3.4, columns=3):
    """A figure with so many panels in rows of `columns`: (figure, its axes in order)."""
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#e8e8e8", "axes.axisbelow": True, "axes.titlesize": 9, "legend.frameon": False})
    rows = -(-panels // columns)
    drawn, axes = plt.subplots(rows, min(columns, panels), figsize=(11, height * rows), squeeze=False,
                               layout="constrained")
    for axis in axes.flat[panels:]:
        axis.axis("off")
    return drawn, axes.flat[:panels]


def looks(i):
    """How the i-th arm is drawn: seven colours and marks, which come again with other lines."""
    again, place = divmod(i, len(COLOURS))
    return {"color": COLOURS[place], "marker": "osD^vPX"[place], "linestyle": ("-", "--", ":", "-.")[again % 4],
            "markersize": 3.5, "linewidth": 1.4}


def draw_accuracy(arms, amount, ids, file):
    """Accuracy against rounds, generated tokens and FLOPs, with its 95 % intervals."""
    from matplotlib.ticker import EngFormatter, MaxNLocator
    (drawn, axes), rng = figure(3), np.random.default_rng(SEED)
    for i, (name, arm) in enumerate(arms.items()):
        rounds = list(zip(*(past.rounds for past in arm)))  # those that all seeds have finished
        scores = [mean_over_seeds(table_of([r["right"] for r in of], ids), rng) for of in rounds]
        y = 100 * np.array([score["accuracy"] for score in scores])
        bars = abs(100 * np.array([score["interval"] for score in scores]).T - y)
        for axis, what in zip(axes, ("round", "generated", "flops")):
            x = [np.mean([r[what] for r in of]) for of in rounds]
            axis.errorbar(x, y, bars, label=name, elinewidth=0.5, capsize=1.5, **looks(i))
    for axis, label in zip(axes, ("round", "tokens generated", "FLOPs, without scoring")):
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter())
    axes[0].set_ylabel("accuracy on the test problems, %")
    axes[1].axvline(amount, color="#999999", linestyle=":", linewidth=1)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawn.suptitle("Accuracy, with 95 % intervals (dotted: the most tokens that all have generated)")
    drawn.savefig(file, dpi=150)


def effort(arms):
    """{arm: (times sampled, times trained on)}, each a list of the problems' means over seeds for each of four bins: by
    how often all runs together answered them rightly, below 25 %, to 50 %, to 75 %, above."""
    totals, bins = defaultdict(lambda: np.zeros(2)), [[], [], [], []]
    for i, of in (item for arm in arms.values() for past in arm for item in past.problems.items()):
        totals[i] += np.array([*of.values()]).sum(0)[:2]
    for i, (draws, right) in totals.items():
        bins[min(3, int(4 * right / draws))].append(i)
    return {name: [[[np.mean([sum(of[part] for of in past.problems.get(i, {}).values()) for past in arm]) for i in ids]
                    for ids in bins] for part in (0, 2)] for name, arm in arms.items()}


def draw_problems(arms, file):
    """How often problems were sampled and trained on, by how often they were answered rightly by all runs together."""
    drawn, axes = figure(2, 4.2)
    for place, (name, counts) in enumerate(effort(arms).items()):
        for axis, bins in zip(axes, counts):
            some = [k for k, of in enumerate(bins) if len(of) >= 5]  # of fewer an average says little
            axis.errorbar([k + 0.05 * (place - len(arms) / 2) for k in some], [np.mean(bins[k]) for k in some],
                          [1.96 * np.std(bins[k]) / len(bins[k]) ** 0.5 for k in some], label=name,
                          elinewidth=0.6, capsize=1.5, **looks(place))
    shown = [f"{label}\n{len(of):,}" for label, of in zip(("below 25 %", "to 50 %", "to 75 %", "above"), bins)]
    for axis, what in zip(axes, ("sampled", "trained on")):
        axis.set_xticks(range(4), shown)
        axis.set_xlabel("right answers to a problem, of all by these runs; number of problems")
        axis.set(ylabel=f"times {what}, mean of the problems", xlim=(-0.4, 3.4), ylim=(0, None))
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawn.suptitle("Hard problems left, easy ones right; trained on own answers (bars: 95 % intervals of the means)")
    drawn.savefig(file, dpi=150)


def class_of(draws, right):
    """The place in CLASSES of a problem by its draws in a round: DAST's levels, here for all methods."""
    p = right / draws
    return 1 if p == 0 else 2 if p < 0.4 else 3 if p <= 0.7 else 4


def draw_flow(arms, file):
    """Who moved from unsolved to easy: the class that each training problem was last seen in, from round to round."""
    drawn, axes = figure(len(arms))
    for axis, (name, arm) in zip(axes, arms.items()):
        history = arm[0].problems
        rounds = sorted({t for of in history.values() for t in of})
        classes, columns = dict.fromkeys(history, 0), []
        for t in rounds:
            classes |= {i: class_of(*of[t][:2]) for i, of in history.items() if t in of}
            columns.append([*classes.values()])
        if rounds and rounds[0] > 0:
            rounds, columns = [0, *rounds], [[0] * len(history), *columns]
        shown = [t if len(rounds) < 12 or t % 2 == 0 else "" for t in rounds]
        draw_bands(axis, columns)
        axis.set(xticks=range(len(rounds)), xticklabels=shown, xlabel="round", ylabel="problems met",
                 ylim=(0, len(history) or 1), title=name + f": seed {arm[0].constants['SEED']}" * (len(arm) > 1))
        axis.grid(False)
    handles = [axes[0].fill_between([], [], color=colour, label=name) for name, colour in CLASSES.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=5)
    drawn.suptitle("Problems by the share of right answers in the round that met them last (of as many as it drew)")
    drawn.savefig(file, dpi=150)


def draw_bands(axis, columns):
    """A stack of CLASSES for each column, and bands from each class to each of the next column; columns: lists of
    places in CLASSES, parallel to the problems."""
    x, colours = np.linspace(0, 1, 30), [*CLASSES.values()]
    floors = [np.cumsum([0, *np.bincount(column, minlength=len(colours))]) for column in columns]
    for place, floor in enumerate(floors):
        axis.bar([place] * len(colours), np.diff(floor), 0.3, bottom=floor[:-1], color=colours)
    for place, (before, after) in enumerate(zip(columns, columns[1:])):
        left, right, flows = floors[place].copy(), floors[place + 1].copy(), Counter(zip(before, after))
        for (a, b), n in sorted(flows.items()):
            low = left[a] + (right[b] - left[a]) * x * x * (3 - 2 * x)
            axis.fill_between(place + 0.15 + 0.7 * x, low, low + n, color=colours[a], alpha=0.35, linewidth=0)
            left[a] += n
            right[b] += n


def main():
    if REGRADE:
        return regrade(Path(REGRADE))
    if COMPARE:
        return compare(COMPARE)
    if SAMPLES > 1 and TEMPERATURE == 0:
        fail("--samples above 1 needs --temperature above 0: greedy answers are all the same")
    models, names = MODEL.split(","), SETS.split(",")
    for flag, of in (("--model", models), ("--sets", names)):
        if not all(map(slug, of)):
            fail(f"{flag} {','.join(of)!r}: a name is empty, or has no letter or digit to name a file by")
        if len(set(map(slug, of))) < len(of):
            fail(f"{flag}: two names that are the same, or differ in punctuation only, would share a file; rename one")
    if HELD_OUT and SPLIT == "test" and not all(name.endswith((".json", ".jsonl")) for name in names):
        fail("--held-out is of training problems: with it take --split train")
    tokenizers = {model: load_tokenizer(model, PROMPT, SYSTEM) for model in models}
    sets = {name: load_problems(name, SPLIT, DATA, N_TEST) for name in names}
    if HELD_OUT:
        load_problems(SETS, SPLIT, DATA, N_TEST)  # refuses two problems of one id
        sets = {"held out": hold_out([p for problems in sets.values() for p in problems], HELD_OUT, SEED)[1]}
    examples = []
    if EXAMPLES_FROM:
        examples = [p for p in load_problems(EXAMPLES_FROM, "train", DATA) if "solution" in p]
        if PROMPT != "few_shot" or not examples:
            fail("--examples-from needs --prompt few_shot, and problems with solutions")
        examples = [examples[i] for i in np.random.default_rng(SEED).permutation(len(examples))[:SHOTS + 1]]
    name = RUN or f"eval-{slug(MODEL)}-{slug(SETS)}"[:200]
    run = start_run({**globals(), "RUN": name, "COMPARE": None}, *sets.values(), examples)

    scores = {}
    for place, model in enumerate(models):
        def prompt(problem, draw):
            pool = examples or worked_examples(problem) if PROMPT == "few_shot" else []
            shown = [e for e in pool if e["problem"] != problem["problem"]][:SHOTS]
            text = make_prompt(tokenizers[model], PROMPT, problem, shown, SYSTEM)
            return f"{FIRST}\n\n{text}" if FIRST else text

        for name, problems in sets.items():
            phase = f"{slug(model)}/{slug(name)}"
            responses = run.once(f"{phase}.jsonl", lambda: sample(
                run, model, problems, SAMPLES, prompt, round=place, phase=slug(name), style=PROMPT,
                temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=MAX_NEW_TOKENS))
            scores.setdefault(model, {})[name] = score(problems, responses, run.rng(name))
    scores = run.once("eval.json", lambda: scores)
    for model, of_sets in scores.items():
        print_table(of_sets, model)
        print_subjects(of_sets)
    for model in models[1:]:
        for name in sets:
            own, first = (table_of([scores[m][name]["correct"]], scores[model][name]["correct"]) / SAMPLES
                          for m in (model, models[0]))
            gain = mean_over_seeds(own, run.rng(name, "difference"), first)
            say(f"{name}: {model} {percent(gain, sign='+')} points against {models[0]}")
    say(f"{run.folder}/eval.json")


def slug(name):
    """A model's or set's name as a file name: letters, digits, '.', '-' and '_'."""
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".jsonl").removesuffix(".json")).strip("-.")


# Worked examples of our own, for prompts where the problems bring no solutions: by family, in the form that answers
# should take

EXAMPLES = {
    "grade-school": [
        ("Nora buys 3 notebooks at $2.50 each and a pen for $1.75. She pays with a $20 bill. How many dollars of "
         "change does she get?",
         "The notebooks cost 3*2.50 = 7.50 dollars.\n\nWith the pen she spends 7.50 + 1.75 = 9.25 dollars.\n\n"
         "Her change is 20 - 9.25 = 10.75 dollars.\n\n\\boxed{10.75}"),
        ("A ferry leaves at 9:40 am. It needs 35 minutes to cross, waits 15 minutes, and needs 40 minutes to come "
         "back. How many minutes before noon is it back?",
         "The trip takes 35 + 15 + 40 = 90 minutes.\n\nFrom 9:40 am to noon there are 140 minutes.\n\n"
         "It is back 140 - 90 = 50 minutes before noon.\n\n\\boxed{50}"),
        ("A 900-litre tank already holds 240 litres. One pump adds 18 litres a minute and another adds 12 litres a "
         "minute. How many minutes do both pumps together need to fill the tank?",
         "The tank still needs 900 - 240 = 660 litres.\n\nTogether the pumps add 18 + 12 = 30 litres a minute.\n\n"
         "Filling takes 660/30 = 22 minutes.\n\n\\boxed{22}"),
        ("Omar is 4 times as old as his niece. In 6 years he will be 3 times as old as she will be then. How old is "
         "Omar now?",
         "Let the niece be n years old, so Omar is 4n.\n\nIn 6 years, 4n + 6 = 3(n + 6) = 3n + 18.\n\n"
         "So n = 12, and Omar is 4*12 = 48.\n\n\\boxed{48}"),
        ("A coat is priced at $80. It is reduced by 25%, and then a 5% tax is added to the reduced price. How many "
         "dollars does the coat cost in the end?",
         "The reduction is 0.25*80 = 20 dollars, so the reduced price is 80 - 20 = 60 dollars.\n\n"
         "The tax is 0.05*60 = 3 dollars.\n\nThe final cost is 60 + 3 = 63 dollars.\n\n\\boxed{63}"),
        ("A farmer picks 240 melons. She sells 3/8 of them at the market and gives 1/5 of the rest to neighbors. How "
         "many melons does she have left?",
         "She sells 240*3/8 = 90 melons, which leaves 240 - 90 = 150.\n\nShe gives away 150/5 = 30 melons.\n\n"
         "She has 150 - 30 = 120 melons left.\n\n\\boxed{120}"),
        ("Kai's average on his first 4 quizzes is 81 points. What must he score on the fifth quiz so that the average "
         "of all 5 is exactly 83 points?",
         "The first 4 quizzes sum to 4*81 = 324 points.\n\nAll 5 must sum to 5*83 = 415 points.\n\n"
         "He needs 415 - 324 = 91 points.\n\n\\boxed{91}"),
        ("A painter mixes blue and white paint in the ratio 2 to 7 and gets 36 litres in all. How many more litres of "
         "white than of blue does the mix hold?",
         "There are 2 + 7 = 9 equal parts, so one part is 36/9 = 4 litres.\n\nWhite exceeds blue by 7 - 2 = 5 "
         "parts.\n\nThat is 5*4 = 20 litres.\n\n\\boxed{20}"),
    ],
    "competition": [
        ("Find the remainder when $x^5 + 2x^3 - 7$ is divided by $x^2 - 3$.",
         "Modulo $x^2 - 3$ we may replace $x^2$ by $3$.\n\nThen $x^5 = (x^2)^2 x = 9x$ and $2x^3 = 2 \\cdot 3x = "
         "6x$.\n\nThe remainder is $9x + 6x - 7 = 15x - 7$.\n\n\\boxed{15x - 7}"),
        ("What is the remainder when $7^{53}$ is divided by $18$?",
         "$7^2 = 49 \\equiv 13 \\pmod{18}$ and $7^3 \\equiv 7 \\cdot 13 = 91 \\equiv 1 \\pmod{18}$.\n\n"
         "Since $53 = 3 \\cdot 17 + 2$, $7^{53} \\equiv 1^{17} \\cdot 7^2 \\equiv 13 \\pmod{18}$.\n\n\\boxed{13}"),
        ("A bag holds $4$ red, $5$ green and $3$ blue marbles. Three marbles are drawn at random without replacement. "
         "What is the probability that all three colors are drawn? Give a fraction in lowest terms.",
         "There are $\\binom{12}{3} = 220$ equally likely draws.\n\nOne marble of each color can be drawn in "
         "$4 \\cdot 5 \\cdot 3 = 60$ ways.\n\nThe probability is $\\frac{60}{220} = \\frac{3}{11}$.\n\n"
         "\\boxed{\\frac{3}{11}}"),
        ("In triangle $PQR$, $PQ = 6$, $PR = 10$ and $\\angle P = 60^\\circ$. Find $QR$ in simplest radical form.",
         "By the law of cosines, $QR^2 = 6^2 + 10^2 - 2 \\cdot 6 \\cdot 10 \\cdot \\cos 60^\\circ$.\n\n"
         "This is $36 + 100 - 60 = 76 = 4 \\cdot 19$.\n\nHence $QR = 2\\sqrt{19}$.\n\n\\boxed{2\\sqrt{19}}"),
        ("Find all real $x$ with $\\frac{2x - 7}{x + 3} \\le 1$. Answer in interval notation.",
         "Subtract $1$ from both sides: $\\frac{2x - 7 - (x + 3)}{x + 3} = \\frac{x - 10}{x + 3} \\le 0$.\n\n"
         "The quotient is negative exactly for $-3 < x < 10$.\n\n"
         "It is $0$ at $x = 10$ and undefined at $x = -3$.\n\n\\boxed{(-3, 10]}"),
        ("Find the point $(x, y)$ on the line $3x + 4y = 50$ that is nearest to the origin.",
         "The nearest point lies on the normal through the origin, so $(x, y) = (3t, 4t)$ for some $t$.\n\n"
         "Then $9t + 16t = 50$, so $t = 2$.\n\nThe point is $(6, 8)$.\n\n\\boxed{(6, 8)}"),
        ("Write $\\frac{(2 + i)^3}{1 - i}$ in the form $a + bi$ with real $a$ and $b$.",
         "$(2 + i)^2 = 3 + 4i$, so $(2 + i)^3 = (3 + 4i)(2 + i) = 2 + 11i$.\n\nMultiply top and bottom by $1 + i$: "
         "$\\frac{(2 + 11i)(1 + i)}{2} = \\frac{-9 + 13i}{2}$.\n\n\\boxed{-\\frac{9}{2} + \\frac{13}{2}i}"),
        ("Let $A = \\begin{pmatrix} 2 & 1 \\\\ 0 & 2 \\end{pmatrix}$. Find $A^4$.",
         "Squaring gives $A^2 = \\begin{pmatrix} 4 & 4 \\\\ 0 & 4 \\end{pmatrix}$.\n\nSquaring again, the diagonal "
         "entries are $4 \\cdot 4 = 16$.\n\nThe upper right entry is $4 \\cdot 4 + 4 \\cdot 4 = 32$, and the lower "
         "left entry stays $0$.\n\n\\boxed{\\begin{pmatrix} 16 & 32 \\\\ 0 & 16 \\end{pmatrix}}"),
    ],
    "choice": [
        ("A closed glass bottle filled to the brim with water cracks overnight in a freezer. What best explains this?\n"
         "(A) Glass melts in the cold\n(B) Water expands as it freezes\n(C) Cold air dissolves glass\n"
         "(D) Ice weighs more than the water it formed from",
         "The water in the freezer turns to ice.\n\nIce takes up more room than the same mass of water, and a full "
         "bottle has no room to spare.\n\nSo the growing ice breaks the glass.\n\n\\boxed{B}"),
        ("Tom wants soup to stay hot on a two-hour walk to a friend. What should he carry it in?\n(A) a paper cup\n"
         "(B) an open glass bowl\n(C) a thin plastic bag\n(D) a closed vacuum flask\n(E) a metal plate",
         "Soup stays hot if little heat can leave it.\n\nA cup, an open bowl, a thin bag and a plate all lose heat "
         "quickly.\n\nA closed vacuum flask is made to hold heat in.\n\n\\boxed{D}"),
        ("Two equal towels are equally wet. One hangs spread out in a dry wind and the other lies folded in a closed "
         "box. Why does the hanging towel dry sooner?\n(A) More of its surface meets dry moving air\n"
         "(B) It held less water at the start\n(C) Sound from the wind heats it\n(D) The box makes new water",
         "Water leaves a towel by evaporating from its surface.\n\nSpreading it out gives more surface, and dry wind "
         "carries the vapor away.\n\nIn the box little surface is open and the air soon becomes damp.\n\n\\boxed{A}"),
        ("One machine makes 7 parts every 4 minutes and another makes 5 parts every 6 minutes. How many parts do they "
         "make together in 2 hours?\n(A) 220\n(B) 250\n(C) 280\n(D) 300\n(E) 310",
         "Two hours are 120 minutes.\n\nThe first makes 120/4*7 = 210 parts and the second 120/6*5 = 100 parts.\n\n"
         "Together they make 210 + 100 = 310 parts.\n\n\\boxed{E}"),
        ("Ines set her plug-in clock to ring at 6:00. She woke at 8:00 in a silent room, and the clock's display was "
         "dark. What most likely happened?\n(A) She had set the clock to ring at 8:00\n(B) Noisy neighbors woke her\n"
         "(C) The clock lost power in the night\n(D) The clock ran too fast",
         "A dark display means that the clock has no power.\n\nWithout power it could not ring at 6:00.\n\n"
         "The other options do not explain a dark display.\n\n\\boxed{C}"),
        ("Two equal lamps are connected in parallel to one ideal battery. One lamp is unscrewed. What happens to the "
         "other lamp?\n(A) It goes out\n(B) It becomes dimmer\n(C) It becomes brighter\n(D) It stays just as bright",
         "In parallel, each lamp is connected to the full battery voltage.\n\nAn ideal battery keeps that voltage when "
         "one lamp is removed.\n\nSo the current in the other lamp does not change.\n\n\\boxed{D}"),
    ],
    "label": [
        ("Premise: The town library opened a second reading room after a gift from a retired teacher.\n"
         "Hypothesis: The retired teacher had once worked in the town.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "The premise says that a retired teacher gave a gift to the library.\n\nIt does not say where the teacher had "
         "worked, so the hypothesis may be true or false.\n\n\\boxed{neutral}"),
        ("Premise: Nine climbers set out, and exactly three of them reached the summit before the storm.\n"
         "Hypothesis: Six of the climbers who set out did not reach the summit before the storm.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "Exactly three of nine climbers reached the summit before the storm.\n\n"
         "The other 9 - 3 = 6 did not, as the hypothesis says.\n\n\\boxed{entailment}"),
        ("Premise: The corner bakery has been closed all day on every Monday since it opened in 2010.\n"
         "Hypothesis: Customers bought bread in the corner bakery on a Monday in 2015.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "Every Monday in 2015 falls after the opening, so the bakery was closed on all of them.\n\n"
         "Customers cannot have bought bread there on such a day.\n\n\\boxed{contradiction}"),
        ("Premise: Ada's third novel was translated into Dutch before it was printed in her own country.\n"
         "Hypothesis: Ada has written more than one novel.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "The premise speaks of Ada's third novel, so she has written at least three.\n\n"
         "Three is more than one, so the hypothesis must be true.\n\n\\boxed{entailment}"),
        ("Premise: The violinist played the concerto from memory, and the audience stood and clapped.\n"
         "Hypothesis: The violinist had played the concerto in public before.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "Playing from memory shows that the violinist knew the piece well.\n\nThat could come from practice alone, so "
         "an earlier concert is possible but not certain.\n\n\\boxed{neutral}"),
        ("Premise: The bridge was finished in March 1931, and the first train crossed it exactly two years later.\n"
         "Hypothesis: A train crossed the bridge in 1932.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "The first train crossed in March 1933.\n\nNo train can have crossed before the first one, so none crossed in "
         "1932.\n\n\\boxed{contradiction}"),
    ],
    "yesno": [
        ("Half of all patients are mild cases and half are severe. Severity is the only common cause of taking a drug "
         "and of recovery. Mild cases recover in 90% with the drug and 85% without; severe cases in 50% with and 40% "
         "without. Of those who take the drug 20% are mild; of the others 80% are mild.\n"
         "Does taking the drug raise the chance of recovery over all patients?",
         "Severity is a confounder, so we weigh both groups by their share of all patients.\n\n"
         "If all took the drug: 0.5*0.90 + 0.5*0.50 = 0.70. If none did: 0.5*0.85 + 0.5*0.40 = 0.625.\n\n"
         "0.70 > 0.625, so the drug raises the chance.\n\n\\boxed{yes}"),
        ("In a school 30% of pupils are good at music and 30% are good at chess, independently. A club has as members "
         "exactly the pupils who are good at music, at chess, or at both.\n"
         "Among club members, are those good at music more likely to be good at chess than members overall?",
         "A pupil is a member with chance 1 - 0.7*0.7 = 0.51. Among members the chance of chess is 0.3/0.51, about "
         "0.59.\n\nAll who are good at music are members, so among them the chance of chess is still 0.30.\n\n"
         "0.30 < 0.59: membership is a collider and makes the skills compete.\n\n\\boxed{no}"),
        ("Frost comes on 20% of nights. A warning lamp lights on 90% of frost nights and on 10% of other nights. The "
         "lamp has no effect on the weather. Tonight Ben switches the lamp on by hand, without knowing the weather.\n"
         "Is the chance of frost tonight now higher than 20%?",
         "Seeing the lamp light by itself would give 0.18/(0.18 + 0.08), about 0.69.\n\n"
         "But Ben sets the lamp, which cuts its link with frost.\n\nThe chance of frost stays at 0.20.\n\n\\boxed{no}"),
        ("A pump runs exactly when the mains or a generator gives power. The mains is on 90% of days and the generator "
         "on 30% of days, independently. Today both were on and the pump ran.\n"
         "Had the mains been off today, all else as it was, would the pump have run?",
         "We know that the generator was on today, so its chance today is 1 and not 0.30.\n\n"
         "Switching off the mains does not change the generator.\n\nThe generator alone makes the pump run.\n\n"
         "\\boxed{yes}"),
        ("A fertilizer raises the chance that a plant grows tall from 30% to 60%. Tall plants fall over in 50% of "
         "cases, other plants in 10%. The fertilizer acts on falling only through height, and nothing else affects "
         "both.\nDoes the fertilizer lower the chance that a plant falls over?",
         "With fertilizer the chance of falling is 0.6*0.5 + 0.4*0.1 = 0.34.\n\n"
         "Without it the chance is 0.3*0.5 + 0.7*0.1 = 0.22.\n\n0.34 > 0.22, so it raises the chance.\n\n\\boxed{no}"),
        ("A fair coin decides who of many pupils gets a letter about a course. With the letter 60% go and 71% pass a "
         "test; without it 20% go and 63% pass. The letter affects passing only through the course and keeps nobody "
         "away.\nFor pupils who go only if they get the letter, does the course raise the chance of passing?",
         "The coin is random, so the letter raises passing by 0.71 - 0.63 = 0.08 and going by 0.60 - 0.20 = 0.40.\n\n"
         "Only the pupils whom the letter sends to the course can change, so their gain is 0.08/0.40 = 0.20.\n\n"
         "A gain of 0.20 is positive.\n\n\\boxed{yes}"),
    ],
}


if __name__ == "__main__":
    override_from_cli(globals())
    main()
