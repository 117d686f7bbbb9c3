"""Score models on problem sets: accuracy, pass@k and maj@k with 95 % intervals, by level and subject.

  python eval.py --model tests/toy/model --sets tests/toy/test.jsonl --max-new-tokens 96
  torchrun --nproc-per-node 8 eval.py --model runs/dast-0/round_0/model,runs/dast-0/round_3/model --sets gsm8k,math500
  python eval.py --model Qwen/Qwen2.5-1.5B --sets gsm8k --prompt few_shot --samples 16 --temperature 0.7
  python eval.py --regrade responses.jsonl
  python eval.py --compare runs/dast-0 runs/adastar-*

Greedy by default. Writes every answer to runs/<name>/<model>/<set>.jsonl and the scores to runs/<name>/eval.json; a
rerun resumes where the last one stopped. --regrade checks stored answers, of any origin: lines {answer, text} (and
choices, where the answer is a letter); or with the id of a problem of --sets in place of its answer. It writes the same
lines with `correct` and `reason` to responses.graded.jsonl. --compare prints what runs of the method scripts reached,
and what it cost, and draws it (with matplotlib). The method scripts score each round with `evaluate`.
"""
import functools
import json
import math
import re
from collections import Counter, defaultdict, deque
from fractions import Fraction
from pathlib import Path

import numpy as np

from common import (MAY_DIFFER, YES_NO, Checker, accuracy, bar, by_problem, fail, final_answer, hold_out, label_of,
                    launch, letter_of, load_problems, load_solved, load_tokenizer, make_prompt, normalize, piece_of, print_row,
                    print_table, rank, read, read_problem, sample, say, score, seed_of, setup, start_run,
                    threads_per_process, wilson_interval, worked_examples)

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
PROMPT = "zero_shot"  # "few_shot" | "zero_shot" | "chat": form of the prompts
EXAMPLES_FROM = ""  # with few_shot: a set's train split or a file whose solutions are shown; empty shows our own
SHOTS = 8  # with few_shot: how many at most
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only
FIRST = ""  # what stands before every prompt, for models that were trained so (by hs_star.py); empty is nothing
SAMPLES = 1  # answers per problem; with more than one also pass@k and maj@k
TEMPERATURE = 0.0  # 0 is greedy
TOP_P = 1.0  # 1: off
MAX_NEW_TOKENS = 1024  # an answer is cut there
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that

# Machine: may differ when a run resumes
NAME = ""  # the folder under runs/; empty is made from the names of models and sets
DATA = "data"  # folder of the known problem sets, as data/gsm8k/test.jsonl
ENGINE = ""  # "" | "vllm" | "transformers": what samples; empty is vLLM on a GPU, else transformers
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower
SEEDED = True  # a seed for each of vLLM's answers; without, they may come faster, and are others each time
GPU_MEMORY = 0.9  # share of a GPU that vLLM may fill
KEEP = False  # resume a folder that was made by other code: what is finished there stays
WANDB = False  # log to Weights & Biases too

# What is legal: the values, or the least one (of other numbers 0)
LEGAL = dict(SPLIT=("test", "train"), PROMPT=("few_shot", "zero_shot", "chat"), SAMPLES=1, MAX_NEW_TOKENS=1,
             ENGINE=("", "vllm", "transformers"))


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


def score_samples(problems, responses, rng):
    """What is said of responses, as many to each problem: as common.score, and by_subject; of several to a problem also
    pass_at and maj_at {k: ...} for k = 1, 2, 4, ..., samples, and means over the problems in place of shares."""
    samples = len(responses) // len(problems)
    correct = np.array([r["correct"] for r in responses], dtype=float).reshape(len(problems), samples)

    def accuracy_of(rows):
        return mean_of(rows.mean(1), rng) if samples > 1 else accuracy(rows[:, 0].astype(int).tolist())

    found = score(problems, responses) | accuracy_of(correct) | {"samples": samples}
    groups = {"by_level": [[p["level"]] if "level" in p else [] for p in problems],
              "by_subject": [p.get("tags", []) for p in problems],
              "by_set": [[p["id"].rsplit("/", 1)[0]] for p in problems]}
    for by, names in groups.items():
        found[by] = {str(name): accuracy_of(correct[[name in own for own in names]])
                     for name in sorted({name for own in names for name in own})}
    if samples > 1:
        votes = [[vote_of(p, r) for r in responses[i * samples:(i + 1) * samples]] for i, p in enumerate(problems)]
        ks = sorted({2 ** i for i in range(samples.bit_length())} | {samples})
        found["pass_at"] = {str(k): mean_of(pass_at(correct, k), rng) for k in ks}
        found["maj_at"] = {str(k): mean_of(maj_at(votes, k), rng) for k in ks[1:]}
    return found | {"correct": {p["id"]: int(n) for p, n in zip(problems, correct.sum(1))}}


def print_subjects(scores):
    """Print the accuracy by subject of each set that has up to 30 of them."""
    for name, s in scores.items():
        if 1 < len(s["by_subject"]) <= 30:
            width = max(map(len, [name, *s["by_subject"]])) + 4
            say(f"\n{name:<{width}}problems  accuracy  95 % interval")
            for subject, of in s["by_subject"].items():
                print_row(subject, of, width)


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
    low, high = wilson_interval(right, count) if count else (0, 1)
    say(f"{right:,} of {count:,} correct ({right / max(1, count):.1%}, 95 % interval {low:.1%} - {high:.1%}): "
        + ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common()) + f"; {graded}")


# Comparing runs -------------------------------------------------------------------------------------------------------

SECONDS = {"sampling": "(probe|presamples|resamples|responses(_\\d+)?)$", "rewards": "(pre|re)rewards$",
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
        return costs

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
        past, may_differ = Past(folder), MAY_DIFFER | {"SEED", "problems or models"}  # between seeds
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
        return accuracy(values[0].astype(int).tolist())
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
        + "; 95 % intervals: of one run Wilson's, of several\nbootstrapped over seeds and problems; "
        f"{amount:,}: the most tokens that all have generated; costs: means of the seeds, up to the\nround that is "
        "shown; trained on: tokens, prompts too; times: how often each problem that was trained on was, and the\n"
        "standard deviation)")
    try:
        import matplotlib
    except ImportError:
        return say("no pictures: they need matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    name = NAME or f"compare-{slug('-'.join(arms))[:100]}-{seed_of(*arms) % 10_000}"
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
            **{kind: f"{mean[kind]:.1f} s" for kind in SECONDS},
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
        examples = load_solved(EXAMPLES_FROM, DATA)
        if PROMPT != "few_shot":
            fail("--examples-from needs --prompt few_shot")
        examples = [examples[i] for i in np.random.default_rng(SEED).permutation(len(examples))[:SHOTS + 1]]
    name = NAME or f"eval-{slug(MODEL)}-{slug(SETS)}"[:200]
    run = start_run({**globals(), "NAME": name, "COMPARE": None}, *sets.values(), examples)

    scores = {model: {} for model in models}
    for model in models:
        def prompt(problem, draw):
            pool = examples or worked_examples(problem) if PROMPT == "few_shot" else []
            shown = [e for e in pool if e["problem"] != problem["problem"]][:SHOTS]
            text = make_prompt(tokenizers[model], PROMPT, problem, shown, SYSTEM)
            return f"{FIRST}\n\n{text}" if FIRST else text

        for name, problems in sets.items():
            responses = sample(run, f"{slug(model)}/{slug(name)}.jsonl", model, problems, SAMPLES, prompt, style=PROMPT,
                               temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=MAX_NEW_TOKENS)
            scores[model][name] = score_samples(problems, responses, run.rng(name))
    scores = run.once("eval.json", dict, scores)
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


if __name__ == "__main__":
    launch(main, globals())
