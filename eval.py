"""Score models on problem sets: accuracy, pass@k and maj@k with 95% intervals, by level and subject.

  python eval.py --model tests/toy/model --sets tests/toy/test.jsonl --max-new-tokens 96
  torchrun --nproc-per-node 8 eval.py --model runs/dast-0/round_0/model,runs/dast-0/round_3/model --sets gsm8k,math500
  python eval.py --model Qwen/Qwen2.5-1.5B --sets gsm8k --prompt few_shot --samples 16 --temperature 0.7
  python eval.py --regrade responses.jsonl
  python eval.py --compare runs/dast-0 runs/dast-1 runs/adastar-0 runs/adastar-1

Greedy by default. Every answer is written to runs/<name>/<model>/<set>.jsonl and the scores to runs/<name>/eval.json; a
rerun resumes where the last one stopped. --regrade checks stored answers from any source, one JSON object per line:
{text, answer}, with `kind` or `choices` if the answer is not mathematics, or {text, id} with the id of a problem in
--sets. An answer with `finish` "length" was cut and is wrong. The same lines with `correct` and `reason` are written to
responses.graded.jsonl. --compare prints what runs of the method scripts reached and what it cost, and plots it (with
matplotlib). Runs whose names differ only in the seed at the end are one arm; arms are compared with the first."""
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common import (MAY_DIFFER, Checker, accuracy, bar, canonical, constants_of, fail, final_answer, hold_out, launch,
                    load_problems, load_solved, load_tokenizer, make_prompt, print_rows, print_table, rank, read,
                    read_problem, sample, say, seed_of, setup, start_run, text_of, threads_per_process,
                    wilson_interval, worked_examples, write)

# What to score
MODEL = "Qwen/Qwen2.5-1.5B"  # Hub names or folders, comma-separated
SETS = "gsm8k,math"  # names of sets, files or owner/name on the Hub, comma-separated
SPLIT = "test"  # "test" | "train": of the sets known by name
N_TEST = 0  # problems from each set, a fixed random choice; 0 is all
HELD_OUT = 0  # score what a run held out: give its HELD_OUT and SEED, TRAIN_DATA as SETS, N_TRAIN as N_TEST; 0 is off
SEED = 0  # for the draws, the choice of examples to show, and what is held out
REGRADE = ""  # a .jsonl file of answers to check again, without a model
COMPARE = ()  # folders of runs to compare with the first, without a model

# How
PROMPT = "zero_shot"  # "few_shot" | "zero_shot" | "chat": form of the prompts
EXAMPLES_FROM = ""  # with few_shot: a set's train split or a file whose solutions are shown; empty shows our own
SHOTS = 8  # with few_shot: the most examples to show
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only
THINK = ""  # "" | "on" | "off": with "chat", whether to think before the answer; for templates that know it
FIRST = ""  # text before every prompt, for models trained that way (by hs_star.py); empty is none
SAMPLES = 1  # answers per problem; more than one also gives pass@k and maj@k
TEMPERATURE = 0.0  # 0 is greedy
TOP_P = 1.0  # 1: off
MAX_NEW_TOKENS = 1024  # longer answers are cut off
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason); empty is math-verify

# Machine: may differ when a run resumes
NAME = ""  # the folder under runs/; empty: made of models, sets and a hash of the other settings
DATA = "data"  # folder of the known problem sets, such as data/gsm8k/train.jsonl
ENGINE = ""  # "" | "vllm" | "transformers": sampling engine; empty is vLLM on a GPU, else transformers
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower
SEEDED = True  # give each vLLM answer a seed; without one, answers may come faster but differ each time
GPU_MEMORY = 0.9  # share of a GPU that vLLM may use
KEEP = False  # resume a folder made with different code; finished phases stay as they are
WANDB = False  # also log to Weights & Biases

# Legal values of each constant, or its minimum (0 for other numbers)
LEGAL = dict(SPLIT=("test", "train"), PROMPT=("few_shot", "zero_shot", "chat"), THINK=("", "on", "off"), SAMPLES=1,
             MAX_NEW_TOKENS=1, ENGINE=("", "vllm", "transformers"))


# Means and their 95% intervals ----------------------------------------------------------------------------------------

def mean_of(values):
    """Return {accuracy, interval, n} of values between 0 and 1, (seeds, problems). The interval is Wilson's, for the
    number of zeros and ones whose mean has the same variance: with one greedy answer per problem, one per problem."""
    mean = values.mean()
    effective = values.shape[1]
    variance = values.mean(0).var() / effective + variance_between_seeds(values)
    if variance > 0:
        effective = mean * (1 - mean) / variance
    return {"accuracy": mean, "interval": wilson_interval(mean * effective, effective), "n": values.shape[1]}


def gain_of(values, others):
    """Return the paired mean difference of two arms (seeds, problems), in points: (gain, half of its 95% interval)."""
    gains = values.mean(0) - others.mean(0)
    variance = gains.var() / len(gains) + variance_between_seeds(values) + variance_between_seeds(others)
    return 100 * gains.mean(), 195.9964 * math.sqrt(variance)


def variance_between_seeds(values):
    """Return the part of the variance of the mean of values (seeds, problems) that is due to seeds; 0 for one seed."""
    return values.mean(1).var() / max(1, len(values) - 1)


def table_of(answers, ids):
    """Return the answers of several seeds, {problem id: 0..1} each, as an array (seeds, problems)."""
    return np.array([list(map(of_seed.get, ids)) for of_seed in answers], dtype=float)


def say_gains(tables):
    """Print how many points each of {name: values (seeds, problems)} is above the first."""
    [first, *others] = tables
    for name in others:
        gain, half = gain_of(tables[name], tables[first])
        say(f"{name}: {gain:+.1f} [{gain - half:+.1f}, {gain + half:+.1f}] points against {first}")


def score_of(values, problems):
    """Apply mean_of to values (seeds, problems), and to their parts by_level, by_subject and by_set."""
    parts = defaultdict(list)
    for i, problem in enumerate(problems):
        parts["by_set", set_of(problem["id"])].append(i)
        if problem.get("level") is not None:
            parts["by_level", problem["level"]].append(i)
        for tag in problem.get("tags", []):
            parts["by_subject", tag].append(i)
    found = mean_of(values) | {"by_level": {}, "by_subject": {}, "by_set": {}}
    for by, part in sorted(parts):
        found[by][part] = mean_of(values[:, parts[by, part]])
    return found


def set_of(problem_id):
    """Return the set, with its split, that a problem comes from."""
    return problem_id.rpartition("/")[0]


# Scoring models -------------------------------------------------------------------------------------------------------

def pass_at(correct, k):
    """Return P(at least one of k answers is right) per problem, (problems,), from correct (problems, n), 0 or 1.
    Unbiased: with c right answers, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1)."""
    n = correct.shape[1]
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(1)])


def majority(votes):
    """Return 1 if the right answer has the most votes, 1/n if it ties with n - 1 others, else 0."""
    counts = Counter(vote for vote in votes if vote is not None)
    first = [vote for vote in counts if counts[vote] == max(counts.values())]
    return (True in first) / max(1, len(first))


def vote_of(response):
    """Return a response's vote: True if it is right, None if it is cut or states nothing, else its answer as text."""
    if response["correct"]:
        return True
    answer = final_answer(response["text"])
    if answer is None or response["finish"] == "length":
        return None
    return canonical(answer)[0]


def score_samples(problems, responses):
    """Score responses, in the order of problems, the same number each: score_of, the share cut and the number correct;
    with several per problem also maj@k of all and pass@k, for k = 2, 4, ... (the accuracy is pass@1)."""
    correct = np.array([int(r["correct"]) for r in responses]).reshape(len(problems), -1)
    samples = correct.shape[1]
    found = score_of(correct.mean(1)[None], problems)
    found["samples"] = samples
    found["cut"] = np.mean([r["finish"] == "length" for r in responses])
    found["correct"] = {problem["id"]: int(n) for problem, n in zip(problems, correct.sum(1))}
    if samples > 1:
        votes = [vote_of(r) for r in responses]
        shares = [majority(votes[start:start + samples]) for start in range(0, len(votes), samples)]
        ks = sorted({2 ** i for i in range(1, samples.bit_length())} | {samples})
        found["pass_at"] = {k: mean_of(pass_at(correct, k)[None]) for k in ks}
        found["maj_at"] = {samples: mean_of(np.array([shares]))}
    return found


def rows_of(scores):
    """Return the rows of a table for {set: score}: all of a set, its pass@k and maj@k, and subjects if at most 30."""
    rows = {}
    for name, score in scores.items():
        rows[name] = score
        for kind, title in (("pass_at", "pass@"), ("maj_at", "maj@"), ("by_subject", "")):
            parts = score.get(kind, {})
            if len(parts) <= 30:
                for part in parts:
                    rows[f"  {title}{part} of {name}"] = parts[part]
    return rows


def score_model(run, model, tokenizer, sets, examples):
    """Score a model on each set: {set: score}. The accuracies also go to the metrics."""
    def prompt(problem, draw):
        pool = []
        if PROMPT == "few_shot":
            pool = examples or worked_examples(problem)
        shown = [e for e in pool if e["problem"] != problem["problem"]][:SHOTS]
        text = make_prompt(tokenizer, PROMPT, problem, shown, SYSTEM, THINK)
        return f"{FIRST}\n\n{text}" if FIRST else text

    scores = {}
    for name, problems in sets.items():
        phase = f"{slug(model)}/{slug(name)}"
        responses = sample(run, f"{phase}.jsonl", model, problems, SAMPLES, prompt, style=PROMPT,
                           temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=MAX_NEW_TOKENS)
        scores[name] = score_samples(problems, responses)
        run.log(**run.metrics[0, phase] | {"accuracy": scores[name]["accuracy"]})
    return scores


def slug(name):
    """Return a model's or set's name as a file name: letters, digits, '.', '-' and '_'."""
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".jsonl").removesuffix(".json")).strip("-.")


# Checking stored answers again ----------------------------------------------------------------------------------------

def regrade(path):
    """Check the answers in a .jsonl file; write the records with their verdicts to a file next to it."""
    if not path.is_file():
        fail(f"--regrade {path}: no such .jsonl file")
    records = []
    problems = []
    known = {}  # problems by id, for records without an answer
    for number, line in enumerate(open(path, encoding="utf-8-sig", errors="surrogateescape"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
                problems.append(stored_problem(records[-1], known))
            except Exception as error:  # JSON of any form
                fail(f"{path}:{number}: {error}; fix or remove the line")
    if not records:
        fail(f"--regrade {path}: no answers in it")
    checker = Checker(threads_per_process(), GRADER)
    verdicts = []
    for problem, record in zip(problems, records):
        verdicts.append(checker.submit(problem, record["text"], record.get("finish")))
    with bar(len(records), "checked") as progress:
        for record, verdict in zip(records, verdicts):
            record["correct"], record["reason"] = verdict.result()
            progress.update()
    graded = path.with_suffix(".graded.jsonl")
    write(graded, records)
    print_table({str(graded): accuracy([int(record["correct"]) for record in records])}, "answers")
    say(text_of(Counter(record["reason"] for record in records)))


def stored_problem(record, known):
    """Return the problem that a stored record answers; fill `known` if needed. ValueError says what is missing."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError("not a JSON object with a text under 'text'")
    if "answer" in record:
        problem = read_problem({"problem": "-"} | record)  # only your own grader reads its text
        return {"id": record.get("id", "")} | (problem or {"problem": "-", "answer": ""})
    if "id" in record and not known:
        say(f"some records have no 'answer': looking up their 'id' in the {SPLIT} problems of --sets {SETS}")
        known |= {problem["id"]: problem for problem in load_problems(SETS, SPLIT, DATA)}
    if str(record.get("id")) not in known:
        raise ValueError(f"no 'answer', and no 'id' of a problem of --sets {SETS}")
    return known[str(record["id"])]


# Comparing runs -------------------------------------------------------------------------------------------------------

COSTS = {"generated": 0, "trained": 0, "flops": 0.0, "seconds": 0.0}  # generated, trained: tokens
INPUTS = ("MODEL", "TRAIN_DATA", "N_TRAIN", "HELD_OUT", "TEST_DATA", "N_TEST")  # the same in a fair comparison


class Past:
    """The results of a past run.

    problems  {training problem: [times sampled, right answers, times trained on]}, probes included
    rounds    the base, if it was scored, and each finished round: `right` {test problem: 0 or 1}, and its costs
    end       the round that the script reported as its choice (adastar.py does), else the last"""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "metrics.jsonl").is_file():
            fail(f"--compare {folder}: no metrics.jsonl in it; give folders of runs, such as runs/dast-0")
        self.constants = read(self.folder / "constants.json")["constants"]
        self.metrics = read(self.folder / "metrics.jsonl")
        kind = "" if list(self.folder.glob("round_*/eval.json")) else "_held_out"
        files = {-1: f"round_0/eval_base{kind}.json"}  # nothing was spent before it
        for m in self.metrics:
            if m["phase"] == "round":
                files[m["round"]] = f"round_{m['round']}/eval{kind}.json"
        self.rounds = []
        for t, file in files.items():
            if (self.folder / file).exists():
                score = read(self.folder / file)
                self.levels = score["level"]
                self.rounds.append(self.spent(t) | {"round": max(0, t), "right": score["correct"]})
        if not self.rounds:
            fail(f"--compare {folder}: no round of it is finished and scored")
        self.end = self.rounds[-1]
        for m in self.metrics:
            if m["phase"] == "reported":
                self.end = [r for r in self.rounds if r["round"] == m["iteration"]][-1]
        self.problems = defaultdict(lambda: np.zeros(3))
        for response in self.read_records("probe"):
            self.problems[response["id"]] += [1, response["correct"], 0]
        for decision in self.read_records("selection"):
            outcomes = decision.get("outcomes", [])
            self.problems[decision["id"]] += [len(outcomes), sum(outcome > 0 for outcome in outcomes), 0]
        for example in self.read_records("train"):
            self.problems[example["id"]] += [0, 0, self.constants.get("EPOCHS", 1)]

    def read_records(self, name):
        """Yield the records of a file, such as probe.jsonl, from all rounds that have it."""
        for path in sorted(self.folder.glob(f"round_*/{name}.jsonl")):
            yield from read(path)

    def spent(self, until):
        """Add up the costs to the end of a round, without scoring: tokens generated (in draws that count) and trained
        on (prompts too), FLOPs, seconds."""
        costs = dict(COSTS)
        for m in self.metrics:
            if m["round"] <= until and not m["phase"].startswith("eval"):
                costs["seconds"] += m.get("seconds", 0)
                costs["flops"] += m.get("flops", 0)
                if "draws" in m:
                    costs["generated"] += m["tokens"]
                if m["phase"] == "train":
                    costs["trained"] += m["tokens"]
        return costs

    def at(self, what, amount):
        """Return {problem id: 0..1} where `amount` of a cost was spent, interpolated between rounds, or None beyond."""
        spent = [r[what] for r in self.rounds]
        if not spent[0] <= amount <= spent[-1]:
            return None
        answers = {}
        for i in self.end["right"]:
            answers[i] = np.interp(amount, spent, [r["right"][i] for r in self.rounds])
        return answers


def arms_of(folders):
    """Return {name: runs} of run folders; those whose names differ only in the seed at the end are one arm."""
    arms = defaultdict(list)
    for folder in dict.fromkeys(map(Path, folders)):
        past = Past(folder)
        arms[str(folder).removeprefix("runs/").removesuffix(f"-{past.constants['SEED']}")].append(past)
    return arms


def warn_of_differences(arms):
    """Print which runs have different inputs from the first, and which seeds of an arm have different constants."""
    [first, *_] = arms.values()
    for arm in arms.values():
        for past in arm:
            other = arm[0]
            names = past.constants.keys() - MAY_DIFFER - {"SEED", "problems or models"}
            if past is other:
                other = first[0]
                names = INPUTS
            unlike = [name for name in sorted(names) if past.constants.get(name) != other.constants.get(name)]
            if unlike:
                say(f"warning: {past.folder} and {other.folder} differ in {', '.join(unlike)}")


def compare(folders):
    """Print what runs reached at their ends and at the same number of generated tokens, and what it cost; plot it."""
    arms = arms_of(folders)
    warn_of_differences(arms)
    runs = sum(arms.values(), [])
    shared = set.intersection(*[set(past.end["right"]) for past in runs])
    if not shared:
        fail("--compare: no problem was scored in all of these runs")
    trained_on = set().union(*[map(set_of, past.problems) for past in runs])
    tests = {i for i in shared if set_of(i) not in trained_on}
    ids = sorted(tests or shared)  # held-out problems, from a set that is trained on, count only if there are no others
    most = min(past.rounds[-1]["generated"] for past in runs)
    print_accuracy(arms, ids, "at the end")
    print_accuracy(arms, ids, f"at {most:,} tokens", most)
    say(f"\n{len(ids):,} problems were scored in all runs; {most:,} is the most tokens that all have generated.\n"
        "The interval of an arm with one run covers the choice of problems, not that of the seed. An end is the last\n"
        "round, or the one that adastar.py chose on held-out problems. Ends, and mean costs up to there, without\n"
        "scoring (tokens generated and trained on, FLOPs, seconds):")
    costs = {}
    for name, arm in arms.items():
        costs[name] = {"round": str([past.end["round"] for past in arm])}
        for what in COSTS:
            costs[name][what] = sum(past.end[what] for past in arm) // len(arm)
    print_rows(costs)
    draw(arms, ids, Path("runs") / (NAME or f"compare-{slug('-'.join(arms))[:100]}"))


def print_accuracy(arms, ids, moment, amount=None):
    """Print the accuracy of each arm, at its end or where it had generated `amount` tokens, and the gains."""
    tables = {}
    scores = {}
    for name, arm in arms.items():
        answers = [past.end["right"] if amount is None else past.at("generated", amount) for past in arm]
        problems = [{"id": i, "level": arm[0].levels.get(i)} for i in ids]
        if None not in answers:
            tables[name] = table_of(answers, ids)
            scores[name] = score_of(tables[name], problems)
    print_table(scores, moment)
    say_gains(tables)


# Plots ----------------------------------------------------------------------------------------------------------------

def draw(arms, ids, folder):
    """Write accuracy.png and problems.png to a folder."""
    try:
        from matplotlib import figure, style
    except ImportError:
        return say("no plots: they need matplotlib (pip install matplotlib)")
    style.use("petroff10")
    folder.mkdir(parents=True, exist_ok=True)
    for file, panels, draw_in in (("accuracy.png", 3, draw_accuracy), ("problems.png", 2, draw_problems)):
        picture = figure.Figure(figsize=(11, 4), layout="constrained")
        axes = picture.subplots(1, panels)
        draw_in(axes, arms, ids)
        picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        picture.savefig(folder / file, dpi=150)
        say(f"{folder}/{file}")


def draw_accuracy(axes, arms, ids):
    """Plot accuracy against rounds, generated tokens and FLOPs, with a bar for the 95% interval at the end."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
    axes[0].set_ylabel(f"accuracy on {len(ids):,} problems (bars: 95%)")
    for i, (name, arm) in enumerate(arms.items()):
        points = []
        for seeds in zip(*[past.rounds for past in arm]):  # rounds that all seeds have finished
            point = mean_of(table_of([r["right"] for r in seeds], ids))
            for what in ("round", "generated", "flops"):
                point[what] = np.mean([r[what] for r in seeds])
            points.append(point)
        for axis, what in zip(axes, ("round", "generated", "flops")):
            x = [point[what] for point in points]
            axis.plot(x, [point["accuracy"] for point in points], "o-", label=name, color=f"C{i}")
            axis.vlines(x[-1], *points[-1]["interval"], color=f"C{i}", alpha=0.4, linewidth=4)
    for axis, label in zip(axes, ("round", "tokens generated", "FLOPs, without scoring")):
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def effort(arms):
    """Return (bins, {arm: counts}): each training problem's bin, 0 to 3, by its share of right answers in all runs, and
    its counts as in Past.problems, (problems, 3), averaged over the seeds."""
    ids = sorted(set().union(*[past.problems for past in sum(arms.values(), [])]))
    counts = dict.fromkeys(arms, 0)
    for name, arm in arms.items():
        for past in arm:
            counts[name] += np.reshape([past.problems[i] for i in ids], (len(ids), 3)) / len(arm)
    sampled, right, _ = sum(counts.values()).T
    return np.minimum(3, 4 * right // np.maximum(1, sampled)), counts


def draw_problems(axes, arms, ids):
    """Plot how often training problems were sampled and trained on, by how often they were answered correctly."""
    bins, counts = effort(arms)
    shown = np.unique(bins)
    for axis, column, what in zip(axes, (0, 2), ("sampled", "trained on")):
        for i, name in enumerate(counts):
            means = [counts[name][bins == b, column].mean() for b in shown]
            axis.plot(shown, means, "o-", label=name, color=f"C{i}")
        axis.set_xticks(range(4), ("below 25%", "25 to 50%", "50 to 75%", "75% or more"))
        axis.set(xlim=(-0.5, 3.5), xlabel="share of a problem's answers that are right, in all runs",
                 ylim=(0, None), ylabel=f"times {what}, mean of training problems")


def main():
    if REGRADE or COMPARE:
        setup()
        if rank() > 0:
            return
        if REGRADE:
            return regrade(Path(REGRADE))
        return compare(COMPARE)
    models = MODEL.split(",")
    names = SETS.split(",")
    for listed in (models, names):
        files = set(map(slug, listed))
        if "" in files or len(files) < len(listed):
            fail(f"{','.join(listed)}: two names would share a file, or one has no letter or digit to name a file by")
    if SAMPLES > 1 and TEMPERATURE == 0:
        fail("--samples above 1 needs --temperature above 0, because greedy answers are all the same")
    if EXAMPLES_FROM and PROMPT != "few_shot":
        fail("--examples-from needs --prompt few_shot")
    tokenizers = {model: load_tokenizer(model, PROMPT, SYSTEM, THINK) for model in models}
    if HELD_OUT:
        sets = {"held-out": hold_out(load_problems(SETS, "train", DATA, N_TEST), HELD_OUT, SEED)[1]}
    else:
        sets = {name: load_problems(name, SPLIT, DATA, N_TEST) for name in names}
    examples = np.random.default_rng(SEED).permutation(load_solved(EXAMPLES_FROM, DATA))[:SHOTS + 1].tolist()
    settings = {name: value for name, value in constants_of(globals()).items() if name not in MAY_DIFFER}
    name = NAME or f"eval-{slug(MODEL)}-{slug(SETS)}"[:200] + f"-{seed_of(settings) % 10_000}"
    run = start_run(globals() | {"NAME": name}, *sets.values(), examples)
    scores = {model: score_model(run, model, tokenizers[model], sets, examples) for model in models}
    scores = run.once("eval.json", dict, scores)
    for model in models:
        print_table(rows_of(scores[model]), model)
    for name in sets:
        tables = {}
        for model in models:
            correct = scores[model][name]["correct"]
            tables[f"{model} on {name}"] = table_of([correct], correct) / SAMPLES
        say_gains(tables)
    say(f"{run.folder}/eval.json")


if __name__ == "__main__":
    launch(main, globals())
