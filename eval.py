"""Score a model on one or several problem sets: accuracy with its 95 % interval, and by level where the problems have one.

  python eval.py --model tests/toy/model --sets tests/toy/test.jsonl --max-new-tokens 96
  torchrun --nproc-per-node 8 eval.py --model runs/dast-0/round_3/model --sets gsm8k,math
  python eval.py --model Qwen/Qwen2.5-1.5B --sets gsm8k --prompt few_shot --examples-from data/gsm8k/train.jsonl

Greedy by default; --samples 8 --temperature 0.7 gives the mean over eight answers a problem. Writes runs/<run>/eval.json and
every answer to runs/<run>/<set>.jsonl; a rerun goes on after the last whole set.
"""
import re

import numpy as np

from common import (binomial_interval, fail, load_problems, load_tokenizer, make_prompt, override_from_cli, sample, say,
                    start_run)

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
RUN = ""  # the folder under runs/; empty is made from the model's name
DATA = "data"  # folder of the known problem sets, as data/gsm8k/test.jsonl
WANDB = False  # log to Weights & Biases too


def accuracy(correct, rng):
    """{accuracy, interval, n} of correct (problems, samples), 0 or 1: the interval is exact for one sample, else bootstrapped
    over problems."""
    mean, n = correct.mean(), len(correct)
    if correct.shape[1] == 1:
        interval = binomial_interval(int(correct.sum()), n)
    else:
        means = correct.mean(1)[rng.integers(n, size=(2000, n))].mean(1)
        interval = np.quantile(means, [0.025, 0.975]).tolist()
    return {"accuracy": float(mean), "interval": interval, "n": n}


def score(problems, responses, samples, rng):
    """What eval.json says of one set: all problems, and those of each level."""
    correct = np.array([r["correct"] for r in responses], dtype=float).reshape(len(problems), samples)
    levels = np.array([p.get("level", -1) for p in problems])
    return {**accuracy(correct, rng), "samples": samples,
            "cut": sum(r["finish"] == "length" for r in responses) / len(responses),
            "by_level": {str(level): accuracy(correct[levels == level], rng) for level in sorted({*levels.tolist()} - {-1})}}


def main():
    if SAMPLES > 1 and TEMPERATURE == 0:
        fail("--samples above 1 needs --temperature above 0: greedy answers are all the same")
    if PROMPT == "few_shot" and not EXAMPLES_FROM:
        fail("--prompt few_shot needs --examples-from, a file of problems with solutions")
    tokenizer = load_tokenizer(MODEL, PROMPT)
    names = [name for name in SETS.split(",") if name]
    sets = {name: load_problems(name, SPLIT, DATA, N_TEST) for name in names} or fail("--sets names no problem set")
    examples = []
    if PROMPT == "few_shot":
        examples = [p for p in load_problems(EXAMPLES_FROM, "train", DATA) if "solution" in p]
        examples = [examples[i] for i in np.random.default_rng(SEED).permutation(len(examples))[:SHOTS + 1]]
    run = start_run({**globals(), "RUN": RUN or "eval-" + re.sub(r"[^\w.-]+", "-", MODEL).strip("-.")})

    def prompt(problem, draw):
        shown = [e for e in examples if e["problem"] != problem["problem"]][:SHOTS]
        return make_prompt(tokenizer, PROMPT, problem, shown, SYSTEM)

    scores = {}
    for name in names:
        stem = re.sub(r"[^\w.-]+", "-", name.removesuffix(".jsonl")).strip("-.")
        responses = run.once(f"{stem}.jsonl", lambda: sample(
            run, MODEL, sets[name], SAMPLES, prompt, round=0, phase=stem, style=PROMPT, temperature=TEMPERATURE,
            max_new_tokens=MAX_NEW_TOKENS))
        scores[name] = score(sets[name], responses, SAMPLES, run.rng(name))
    scores = run.once("eval.json", lambda: scores)
    say(f"\n{'set':<28}{'problems':>9}  accuracy   95 % interval   cut")
    for name, s in scores.items():
        rows = [(name, s), *((f"  level {level}", part) for level, part in s["by_level"].items())]
        for label, row in rows:
            low, high = row["interval"]
            say(f"{label:<28}{row['n']:>9,}{row['accuracy']:>10.1%}   {low:.1%} - {high:.1%}".ljust(66)
                + (f"{row['cut']:.1%}" if "cut" in row else ""))
    say(f"{run.folder}/eval.json")


if __name__ == "__main__":
    override_from_cli(globals())
    main()
