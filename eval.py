"""Score a model on one or several problem sets: accuracy with its 95 % interval, and by level where there are levels.

  python eval.py --model tests/toy/model --sets tests/toy/test.jsonl --max-new-tokens 96
  torchrun --nproc-per-node 8 eval.py --model runs/dast-0/round_3/model --sets gsm8k,math
  python eval.py --model Qwen/Qwen2.5-1.5B --sets gsm8k --prompt few_shot --examples-from data/gsm8k/train.jsonl

Greedy by default; --samples 8 --temperature 0.7 gives the mean over eight answers a problem. Writes every answer to
runs/<run>/<set>.jsonl and the scores to runs/<run>/eval.json; a rerun goes on after the last whole set. The method
scripts score each round with `evaluate` and end with `final_table`.
"""
import math
import re
from collections import Counter

import numpy as np

from common import fail, load_problems, load_tokenizer, make_prompt, override_from_cli, sample, say, start_run

# What to score
MODEL = "Qwen/Qwen2.5-1.5B"  # a Hub name or a folder
SETS = "gsm8k,math"  # problem sets or .jsonl files, comma-separated
SPLIT = "test"  # "test" | "train": of the sets known by name
N_TEST = 0  # problems of each set, drawn at random once and for all; 0 is all
SEED = 0  # of the draws, and of which examples are shown

# How
PROMPT = "zero_shot"  # "zero_shot" | "few_shot" | "chat": form of the prompts
EXAMPLES_FROM = ""  # with few_shot: a set's train split or a .jsonl file whose solutions are shown
SHOTS = 8  # with few_shot: how many
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only
SAMPLES = 1  # answers per problem
TEMPERATURE = 0.0  # 0 is greedy
MAX_NEW_TOKENS = 1024  # an answer is cut there

# Machine: may differ when a run goes on
ENGINE = ""  # "" | "vllm" | "transformers": what samples; empty is vLLM on a GPU, else transformers
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower
GPU_MEMORY = 0.9  # share of a GPU that vLLM may fill
RUN = ""  # the folder under runs/; empty is made from the names of model and sets
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


def accuracy(correct, rng):
    """{accuracy, interval, n} of correct (problems, samples), 0 or 1. The 95 % interval is exact for one sample, else
    bootstrapped over problems."""
    mean, n = correct.mean(), len(correct)
    if correct.shape[1] == 1:
        interval = binomial_interval(int(correct.sum()), n)
    else:
        means = correct.mean(1)[rng.integers(n, size=(2000, n))].mean(1)
        interval = np.quantile(means, [0.025, 0.975]).tolist()
    return {"accuracy": float(mean), "interval": interval, "n": n}


def score(problems, responses, rng):
    """What is said of a set: {accuracy, interval, n, samples, cut, by_level, correct: {id: right answers}}."""
    right, samples = Counter({p["id"]: 0 for p in problems}), len(responses) // len(problems)
    right.update(r["id"] for r in responses if r["correct"])
    correct = np.array([r["correct"] for r in responses], dtype=float).reshape(len(problems), samples)
    levels = np.array([p.get("level", -1) for p in problems])
    return {**accuracy(correct, rng), "samples": samples,
            "cut": sum(r["finish"] == "length" for r in responses) / len(responses),
            "by_level": {str(n): accuracy(correct[levels == n], rng) for n in sorted({*levels.tolist()} - {-1})},
            "correct": dict(right)}


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
    """Print {name: score} as rows: accuracy, its interval, accuracy by level."""
    width = max(len(first), *map(len, scores)) + 2
    levels = sorted({level for s in scores.values() for level in s["by_level"]}, key=int)
    say(f"\n{first:<{width}}problems  accuracy  95 % interval    cut  "
        + "".join(f"level {n:<4}" for n in levels))
    for name, s in scores.items():
        low, high = s["interval"]
        by_level = [f"{s['by_level'][n]['accuracy']:<10.1%}" if n in s["by_level"] else " " * 10 for n in levels]
        say(f"{name:<{width}}{s['n']:>8,}{s['accuracy']:>10.1%}  {low:>5.1%} - {high:>5.1%}{s['cut']:>7.1%}  "
            + "".join(by_level).rstrip())


def final_table(run, scores):
    """Print the table of a run's rounds, and what the run cost."""
    print_table(scores, "model")
    total = Counter()
    for metrics in run.metrics:
        total.update({key: metrics.get(key, 0) for key in ("spent_tokens", "flops", "seconds")})
        total["trained"] += metrics["tokens"] if metrics["phase"] == "train" else 0
    say(f"{total['spent_tokens']:,} tokens sampled, {total['trained']:,} trained on, {total['flops']:.2e} FLOPs, "
        f"{total['seconds']:.0f} s; {run.folder}/metrics.jsonl")


def main():
    if SAMPLES > 1 and TEMPERATURE == 0:
        fail("--samples above 1 needs --temperature above 0: greedy answers are all the same")
    if PROMPT == "few_shot" and not EXAMPLES_FROM:
        fail("--prompt few_shot needs --examples-from, a file of problems with solutions")
    tokenizer = load_tokenizer(MODEL, PROMPT)
    names = SETS.split(",")
    if len(set(map(slug, names))) < len(names):
        fail("--sets: two names that differ in punctuation only would share a file; rename one")
    sets = {name: load_problems(name, SPLIT, DATA, N_TEST) for name in names}
    examples = []
    if PROMPT == "few_shot":
        examples = [p for p in load_problems(EXAMPLES_FROM, "train", DATA) if "solution" in p]
        examples = [examples[i] for i in np.random.default_rng(SEED).permutation(len(examples))[:SHOTS + 1]]
    run = start_run({**globals(), "RUN": RUN or f"eval-{slug(MODEL)}-{slug(SETS)}"[:200]}, *sets.values(), examples)

    def prompt(problem, draw):
        shown = [e for e in examples if e["problem"] != problem["problem"]][:SHOTS]
        return make_prompt(tokenizer, PROMPT, problem, shown, SYSTEM)

    scores = {}
    for name, problems in sets.items():
        responses = run.once(f"{slug(name)}.jsonl", lambda: sample(
            run, MODEL, problems, SAMPLES, prompt, round=0, phase=slug(name), style=PROMPT, temperature=TEMPERATURE,
            max_new_tokens=MAX_NEW_TOKENS))
        scores[name] = score(problems, responses, run.rng(name))
    print_table(run.once("eval.json", lambda: scores), "set")
    say(f"{run.folder}/eval.json")


def slug(name):
    """A model's or set's name as a file name: letters, digits, '.', '-' and '_'."""
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".jsonl")).strip("-.")


if __name__ == "__main__":
    override_from_cli(globals())
    main()
