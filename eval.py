"""Score models on problem sets: accuracy, pass@k and maj@k with 95 % intervals, by level and subject.

  python eval.py --model tests/toy/model --sets tests/toy/test.jsonl --max-new-tokens 96
  torchrun --nproc-per-node 8 eval.py --model runs/dast-0/round_0/model,runs/dast-0/round_3/model --sets gsm8k,math500
  python eval.py --model Qwen/Qwen2.5-1.5B --sets gsm8k --prompt few_shot --samples 16 --temperature 0.7
  python eval.py --regrade responses.jsonl

Greedy by default. Writes every answer to runs/<run>/<model>/<set>.jsonl and the scores to runs/<run>/eval.json; a
rerun goes on where the last one stopped. --regrade checks stored answers, of any origin: lines {answer, text} (and
choices, where the answer is a letter); or with the id of a problem of --sets in place of its answer. It writes the same
lines with `correct` and `reason` to responses.graded.jsonl. The method scripts score each round with `evaluate`.
"""
import json
import math
import re
from collections import Counter, deque
from fractions import Fraction
from pathlib import Path

import numpy as np

from common import (YES_NO, Checker, bar, fail, final_answer, hold_out, label_of, letter_of, load_problems,
                    load_tokenizer, local_folder, make_prompt, normalize, override_from_cli, piece_of, rank, read,
                    read_problem, sample, say, setup, start_run, threads_per_process, worked_examples)

# What to score
MODEL = "Qwen/Qwen2.5-1.5B"  # Hub names or folders, comma-separated
SETS = "gsm8k,math"  # names of sets, .jsonl or .json files, owner/name of the Hub; comma-separated
SPLIT = "test"  # "test" | "train": of the sets known by name
N_TEST = 0  # problems of each set, drawn at random once and for all; 0 is all
HELD_OUT = 0  # score what a method put aside: its HELD_OUT, SEED, TRAIN_DATA (SETS), N_TRAIN (N_TEST); 0 scores all
SEED = 0  # of the draws, of which examples are shown, and of what is put aside
REGRADE = ""  # a .jsonl file of answers to check again; no model is used then

# How
PROMPT = "zero_shot"  # "zero_shot" | "few_shot" | "chat": form of the prompts
EXAMPLES_FROM = ""  # with few_shot: a set's train split or a file whose solutions are shown; empty shows our own
SHOTS = 8  # with few_shot: how many at most
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only
SAMPLES = 1  # answers per problem; with more than one also pass@k and maj@k
TEMPERATURE = 0.0  # 0 is greedy
TOP_P = 1.0  # 1: off
MAX_NEW_TOKENS = 1024  # an answer is cut there
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that

# Machine: may differ when a run goes on
ENGINE = ""  # "" | "vllm" | "transformers": what samples; empty is vLLM on a GPU, else transformers
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower
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
    by_set, correct: {id: right answers}} and, of several, pass_at and maj_at {k: ...} for k = 1, 2, 4, ..., samples."""
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
    return found | {"correct": {p["id"]: int(n) for p, n in zip(problems, correct.sum(1))}}


def evaluate(run, model, problems, prompt, *, round, phase="eval", **settings):
    """Score a model by one greedy answer to each problem: what a method script does after a round."""
    responses = sample(run, model, problems, 1, prompt, round=round, phase=phase, temperature=0.0, **settings)
    return score(problems, responses, run.rng(phase))


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


def difference(score, other, rng):
    """(difference of two models' accuracies on the same problems, its 95 % interval by bootstrap over problems)."""
    values = np.array([score["correct"][i] / score["samples"] - other["correct"][i] / other["samples"]
                       for i in score["correct"]])
    found = mean_of(values, rng)
    return found["accuracy"], found["interval"]


def final_table(run, scores):
    """Print the table of a run's rounds, and what the run cost."""
    print_table(scores, "model")
    total = Counter()
    for metrics in run.metrics:
        total.update({key: metrics.get(key, 0) for key in ("spent_tokens", "flops", "seconds")})
        total["trained"] += metrics["tokens"] if metrics["phase"] == "train" else 0
    say(f"{total['spent_tokens']:,} tokens sampled, {total['trained']:,} trained on, {total['flops']:.2e} FLOPs, "
        f"{total['seconds']:.0f} s; {run.folder}/metrics.jsonl")


def architecture(model):
    """What of a model's configuration an engine is built for: it can be given other weights, but no other shape."""
    config = read(Path(local_folder(model)) / "config.json")
    other = "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id"
    return json.dumps({name: value for name, value in config.items() if name not in other}, sort_keys=True)


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


def main():
    if REGRADE:
        return regrade(Path(REGRADE))
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
    tokenizers = {model: load_tokenizer(model, PROMPT) for model in models}
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
    run = start_run({**globals(), "RUN": RUN or f"eval-{slug(MODEL)}-{slug(SETS)}"[:200]}, *sets.values(), examples)

    if run.engine == "vllm" and len(set(map(architecture, models))) > 1:
        fail("--model: vLLM takes several models in one call if their config.json agrees; score the others in another")

    scores = {}
    for place, model in enumerate(models):
        def prompt(problem, draw):
            pool = examples or worked_examples(problem) if PROMPT == "few_shot" else []
            shown = [e for e in pool if e["problem"] != problem["problem"]][:SHOTS]
            return make_prompt(tokenizers[model], PROMPT, problem, shown, SYSTEM)

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
            gain, (low, high) = difference(scores[model][name], scores[models[0]][name], run.rng(name, "difference"))
            say(f"{name}: {model} {gain:+.1%} [{low:+.1%}, {high:+.1%}] against {models[0]}")
    say(f"{run.folder}/eval.json")


def slug(name):
    """A model's or set's name as a file name: letters, digits, '.', '-' and '_'."""
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".jsonl").removesuffix(".json")).strip("-.")


if __name__ == "__main__":
    override_from_cli(globals())
    main()
