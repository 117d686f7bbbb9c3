"""HS-STaR: hierarchical sampling for self-taught reasoners (Xiong et al. 2025, https://arxiv.org/abs/2505.19866).

A model answers training problems and learns from its right and wrong answers. HS-STaR finds out with a few answers to
each problem where the model is at the edge of what it can do, and spends the rest of a fixed budget there.

  M_0 writes its solutions in steps, divided by blank lines. In round t = 1..3, each on its own N problems:
  1. Pre-sample n_p answers to each problem. A checker says which are right, a process reward model (PRM) how good the
     steps of each look: S(r) = min over its steps. phi_a = share right, phi_r = mean of S. The problem is an
       inlier   if phi_a = 1 and phi_r > tau_high        (solved, and soundly)
       outlier  if phi_a = 0 and phi_r < tau_low         (hopeless for now)
       boundary otherwise.
  2. Re-sample: the remaining (n - n_p) N answers of the budget go to the boundary problems, evenly.
  3. Pairs, per boundary problem: K = min(right, wrong); the K best-looking right answers against the K best-looking
     wrong ones, by S.  M_t = DPO of M_{t-1} on them, which is the reference too.

Of the paper we could read the abstract, its first lines and a figure; its code lacks the programs that sample and
train, and so the loss: plain DPO is ours. The rules above, thresholds and settings are the code's, where marked so.
Differs from the code in: M_0 is MODEL as it is, unless there is a STEP_SET (solutions with blank lines between steps);
phi_r is a mean over all n_p answers, not over the different ones; exactly the budget is drawn, where the code draws
more and drops it; an answer that was cut counts as wrong, and is in no pair; answers are checked by math-verify, and
never read off as the last number; AIME24 and AMC23 are for eval.py (--samples 32, and SYSTEM's words as --first).

  torchrun hs_star.py --toy                                   2 CPU cores: 1 min, 1.1 GB, 58 % (measured)
  torchrun hs_star.py --model Qwen/Qwen2.5-7B                 one GPU: not measured yet
  torchrun --nproc-per-node 8 hs_star.py                      eight GPUs: not measured yet
"""
from pathlib import Path

import numpy as np

from common import (RewardModel, at_once, by_problem, fail, load_problems, load_tokenizer, make_example, make_prompt,
                    mean_of, outcomes_of, override_from_cli, sample, say, sequence_logprobs, spread_evenly, start_run,
                    step_rewards, train)
from eval import end_round, evaluate, final_table, hold_out, show_answers, worked_examples
import torch.nn.functional as F  # behind common, which keeps torch's threads from spinning

# What to run
MODEL = "Qwen/Qwen2.5-7B"  # M_0, or the base that is trained on STEP_SET first: a Hub name or a folder (code)
START = "previous"  # "previous" | "base": what each round trains from, and its reference; "base" is M_0 (code)
PRM = "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B"  # Hub name or folder; empty is none: for arms without rewards (code)
STEP_SET = ""  # solutions in steps, to train M_0 on first; empty: MODEL is M_0 (ours; code: MATH's, rewritten)
TRAIN_DATA = "gsm8k,math"  # names of sets, .jsonl or .json files, owner/name of the Hub (ours; code: NuminaMath-1.5)
TEST_DATA = "gsm8k,math500,minerva_math,olympiadbench,college_math"  # scored greedily; may be empty (code)
N_TRAIN = 0  # problems of each training set; 0 is all (ours)
N_TEST = 0  # problems of each test set; 0 is all (code)
HELD_OUT = 0  # training problems put aside, and scored like a test set; 0 is none (ours)
SLICE = 4900  # N: problems of a round, no round's the same while they last (ours; 7,500 in the code)
ROUNDS = 3  # after round 0 (code)
SEED = 0  # of everything random (ours)

# The method: tests/results.md has the values that make the other arms
BUDGET = 8  # n: answers per problem in a round, on average (code)
PRE_SAMPLES = 3  # n_p: of them before anything is decided; as many as BUDGET is uniform iterative DPO (code)
DIFFICULTY = "both"  # "both" | "accuracy" | "reward": what tells them apart: phi_a and phi_r, or one (paper: both)
TAU_LOW = 0.0  # below it phi_r is low; 0 takes the known one of TAUS (code)
TAU_HIGH = 0.0  # above it phi_r is high; 0 takes the known one of TAUS (code)
REPORT_ONLY = False  # pre-sample round 1, show phi_r by phi_a, and stop: to choose thresholds by (ours)
PAIRING = "hard"  # "hard" | "random": by S, or at random (code: hard)
BETA = 0.1  # of DPO: how strongly the policy is held to the model it starts from (ours)
NLL_WEIGHT = 0.0  # of the chosen answers' own log-likelihood in the loss; 0 is plain DPO (ours)

# Sampling
PROMPT = "zero_shot"  # "zero_shot" | "few_shot" | "chat": one form for drawing, training and scoring (code)
SHOTS = 4  # worked examples of our own before a problem, with few_shot (ours)
SYSTEM = "Reason in steps divided by blank lines, and put the final answer within \\boxed{}."  # before all (ours)
TEMPERATURE = 0.7  # of all draws (code)
TOP_P = 0.95  # 1: off (code)
TOP_K = 0  # 0: off (code)
MAX_NEW_TOKENS = 2048  # an answer is cut there (code)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that (ours)

# Training
LR = 1e-6  # of SFT on STEP_SET, its peak; cosine to 0 (code)
LR_DPO = 5e-7  # of DPO, its peak (code)
WARMUP = 0.03  # share of the steps, or from 1 on their number; 0 is none (code)
EPOCHS = 1  # passes over the pairs, and over STEP_SET (code)
BATCH_SIZE = 256  # pairs (answers) per optimizer step, over all GPUs (code)
WEIGHT_DECAY = 0.0  # of AdamW; 0 is none (code)
CLIP = 1.0  # largest gradient norm (ours)

# Machine: may differ when a run goes on
RUN = ""  # the folder under runs/; empty is script name and seed (ours)
DATA = "data"  # folder of the known problem sets, as data/gsm8k/train.jsonl (ours)
ENGINE = ""  # "" | "vllm" | "transformers": what samples; empty is vLLM on a GPU, else transformers (ours)
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower (ours)
SEEDED = True  # a seed for each of vLLM's answers; without, they may come faster, and are others each time (ours)
GPU_MEMORY = 0.85  # share of a GPU that vLLM may fill while it samples; asleep it gives it back (ours)
MAX_TOKENS = 16384  # of a micro-batch on one GPU: changes memory, never the result (ours)
SAVE_MINUTES = 30.0  # between saves inside a training, of 12 bytes a parameter; 0 is after each step (ours)
WANDB = False  # log to Weights & Biases too (ours)

# Thresholds belong to a PRM and a policy; these are all that are known, for M_0 trained from Qwen2.5-7B (code)
TAUS = {("Skywork-o1-Open-PRM-Qwen-2.5-7B", "Qwen2.5-7B"): (0.15, 0.65),
        ("Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "Qwen2.5-7B"): (0.25, 0.50),
        ("Qwen2.5-Math-PRM-7B", "Qwen2.5-7B"): (0.55, 0.99)}

TOY = dict(MODEL="tests/toy/model", PRM="tests/toy/prm", TRAIN_DATA="tests/toy/train.jsonl",
           TEST_DATA="tests/toy/test.jsonl", N_TEST=300, SLICE=200, TAU_LOW=0.1, TAU_HIGH=0.8, SYSTEM="",
           MAX_NEW_TOKENS=96, LR_DPO=1e-4, BATCH_SIZE=16, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def slice_of(n, t, rng):
    """The places of round t's problems among n: SLICE of them. Rounds have none in common until fewer than SLICE are
    left; then it begins anew, in another order. rng(*key): a generator for what is random."""
    before, place = divmod(t - 1, max(1, n // SLICE))
    return sorted(rng("slices", before).permutation(n)[place * SLICE:(place + 1) * SLICE].tolist())


def reward_of(steps):
    """S(r): the reward of a response is that of its worst step; 0 where the PRM could not read any."""
    return min(steps, default=0.0)


def difficulty_of(outcomes, rewards):
    """(phi_a, phi_r, class) of a problem, from its n_p pre-samples: share correct, mean reward, and "inlier", "outlier"
    or "boundary". On a threshold is not beyond it: the mean is exact, so that 0.65 three times is 0.65."""
    phi_a, phi_r = outcomes.count(1) / len(outcomes), mean_of(rewards)
    solved, failed, sound, poor = phi_a == 1, phi_a == 0, phi_r > TAU_HIGH, phi_r < TAU_LOW
    inlier = {"both": solved and sound, "accuracy": solved, "reward": sound}[DIFFICULTY]
    outlier = {"both": failed and poor, "accuracy": failed, "reward": poor}[DIFFICULTY]
    return phi_a, phi_r, "inlier" if inlier else "outlier" if outlier else "boundary"


def quotas(classes, rng):
    """How many more answers each problem gets: the rest of the budget, spread over the boundary, one more for random
    ones. 101 problems, 56 of them boundary: of 505 answers 55 problems get 9, and one gets 10."""
    boundary = [i for i, name in enumerate(classes) if name == "boundary"]
    counts = [0] * len(classes)
    if boundary:
        for i, n in zip(boundary, spread_evenly((BUDGET - PRE_SAMPLES) * len(classes), len(boundary), rng)):
            counts[i] = n
    return counts


def choose_pairs(outcomes, rewards, rng):
    """[(draw to prefer, draw to reject)] of a problem: K of its right and K of its wrong draws, K the smaller number,
    those with the highest reward (of equals the first), joined at random: so the rejected ones are hard to tell."""
    sides = [[draw for draw, o in enumerate(outcomes) if o == which] for which in (1, 0)]
    k = min(map(len, sides))
    if PAIRING == "hard":
        sides = [sorted(draws, key=lambda draw: -rewards[draw])[:k] for draws in sides]
    right, wrong = (rng.permutation(draws)[:k].tolist() for draws in sides)
    return list(zip(right, wrong))


def sft_loss(logprobs, batch):
    """L = - sum_t log pi(y_t | x, y_<t), a mean over the answer tokens y of the step; the prompts x are not learnt."""
    return -logprobs.sum(), len(logprobs), {}


def dpo_loss(logprobs, batch):
    """L = - log sigmoid(beta (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x))), a mean over the pairs of the step
    (Rafailov et al. 2023, eq. 7): y_w is the chosen answer, y_l the rejected one, ref the policy at its start."""
    gain = sequence_logprobs(logprobs, batch) - batch["reference"]  # of y_w, y_l, y_w, y_l, ...
    margin = BETA * (gain[0::2] - gain[1::2])
    metrics = {"margin": margin.detach().sum(), "preferred": (margin > 0).sum()}
    return -F.logsigmoid(margin).sum(), len(margin), metrics


def dpo_nll_loss(logprobs, batch):
    """dpo_loss + NLL_WEIGHT times - log pi(y_w|x) / |y_w|, which keeps the chosen answers likely (Pang et al. 2024)."""
    loss, pairs, metrics = dpo_loss(logprobs, batch)
    chosen = [part.mean() for part in logprobs.split(batch["counts"])[0:2 * pairs:2]]
    return loss - NLL_WEIGHT * sum(chosen), pairs, metrics


# The loop -------------------------------------------------------------------------------------------------------------

def thresholds():
    """(tau_low, tau_high): as given, or the known ones of this PRM and model; ends the program where there are none."""
    known = TAUS.get((Path(PRM).name, Path(MODEL).name), (0.0, 0.0))
    low, high = TAU_LOW or known[0], TAU_HIGH or known[1]
    if DIFFICULTY == "accuracy" or REPORT_ONLY:
        return low, high
    if not (low and high):
        fail(f"no thresholds are known for {PRM} with {MODEL}: give --tau-low and --tau-high; --report-only draws what "
             "they can be chosen by")
    if low >= high:
        fail(f"--tau-low {low} and --tau-high {high}: the second is the higher one")
    return low, high


def rewarded(run, prm, problems, responses, **phase):
    """Responses with the reward of each step and S(r), where there is a PRM."""
    if prm is None:
        return responses
    steps = step_rewards(run, prm, problems, responses, **phase)
    return [{**r, "reward": reward_of(s), "step_rewards": s} for r, s in zip(responses, steps)]


@at_once()
def classify(run, problems, presamples):
    """[(phi_a, phi_r, class)], parallel to problems, from their pre-samples; ends the program if these, which may have
    been copied from a report, are not what would have been drawn here."""
    due = [(p["id"], draw) for p in problems for draw in range(PRE_SAMPLES)]
    if due != [(r["id"], r["draw"]) for r in presamples] or not all(("reward" in r) == bool(PRM) for r in presamples):
        fail(f"{run.folder}: presamples.jsonl was made with other problems, --pre-samples or --prm; remove it")
    drawn = by_problem(presamples)
    return [difficulty_of(outcomes_of(drawn[p["id"]]), [r.get("reward", 0.0) for r in drawn[p["id"]]])
            for p in problems]


@at_once()
def select(problems, difficulties, counts, responses, rng):
    """selection.jsonl: for each problem all that was decided, with the numbers it was decided from; `quota` is how many
    answers it got beyond its pre-samples, which come first in `outcomes` and `rewards`."""
    drawn, selection = by_problem(responses), []
    for problem, (phi_a, phi_r, name), quota in zip(problems, difficulties, counts):
        outcomes = outcomes_of(drawn[problem["id"]])
        rewards = [r.get("reward", 0.0) for r in drawn[problem["id"]]]
        mixed = name == "boundary" and {0, 1} <= {*outcomes}  # else spare the generator, which takes longest
        pairs = choose_pairs(outcomes, rewards, rng("pairs", problem["id"])) if mixed else []
        selection.append({"id": problem["id"], "phi_a": phi_a, "phi_r": phi_r, "class": name, "quota": quota,
                          "outcomes": outcomes, "rewards": rewards, "pairs": pairs})
    return selection


def resample(run, prm, model, problems, presamples, counts, ask, t, drawn):
    """All answers of round t: the pre-samples, and behind a problem's own the `counts` more that it gets."""
    more = [(p, n) for p, n in zip(problems, counts) if n]
    if not more:
        return presamples
    own, counts = map(list, zip(*more))
    found = rewarded(run, prm, own, sample(run, model, own, counts, ask, round=t, phase="resample", **drawn),
                     round=t, phase="rereward")
    again = by_problem({**r, "draw": r["draw"] + PRE_SAMPLES} for r in found)
    return [r for i, own in by_problem(presamples).items() for r in own + again[i]]


def report_rewards(run, t, difficulties):
    """phi_r of the problems by phi_a, as quantiles: what thresholds can be chosen by."""
    levels, found = (0.05, 0.25, 0.5, 0.75, 0.95), {}
    say(f"  round {t}  phi_r    by phi_a: problems, " + ", ".join(f"{q:.0%}" for q in levels) + " quantile")
    for phi_a in sorted({a for a, _, _ in difficulties}):
        phi_r = [r for a, r, _ in difficulties if a == phi_a]
        quantiles = np.quantile(phi_r, levels).tolist()
        found[f"{phi_a:.3f}"] = {"problems": len(phi_r), "quantiles": quantiles}
        say(f"           phi_a {phi_a:.3f} {len(phi_r):>7,}  " + "  ".join(f"{q:.3f}" for q in quantiles))
    run.log(t, "phi_r", levels=levels, by_phi_a=found)


def report_selection(run, t, selection):
    """Per class: problems, answers drawn, share right; and the pairs."""
    rows, values = [], {}
    for name in ("inlier", "boundary", "outlier"):
        outcomes = [s["outcomes"] for s in selection if s["class"] == name]
        drawn = sum(map(len, outcomes))
        right = sum(o.count(1) for o in outcomes) / max(1, drawn)
        values[name] = {"problems": len(outcomes), "draws": drawn, "correct": right}
        rows.append(f"{name} {len(outcomes):,} problems {right:.0%} of {drawn:,}")
    pairs = sum(len(s["pairs"]) for s in selection)
    run.log(t, "select", classes=values, pairs=pairs)
    say(f"  round {t}  select   " + " | ".join(rows) + f" | {pairs:,} pairs")


def main():
    if PRE_SAMPLES > BUDGET:
        fail(f"--pre-samples {PRE_SAMPLES} are more than --budget {BUDGET}")
    if not PRM and (DIFFICULTY != "accuracy" or PAIRING != "random"):
        fail("without --prm there are no rewards: only --difficulty accuracy with --pairing random can do without")
    global TAU_LOW, TAU_HIGH  # so that start_run stores those in use
    TAU_LOW, TAU_HIGH = thresholds()
    tokenizer, prm = load_tokenizer(MODEL, PROMPT, SYSTEM), RewardModel(PRM) if PRM else None
    problems = load_problems(TRAIN_DATA, "train", DATA, N_TRAIN)
    problems, held_out = hold_out(problems, HELD_OUT, SEED)
    tests = held_out + (load_problems(TEST_DATA, "test", DATA, N_TEST) if TEST_DATA or not held_out else [])
    solved = [p for p in load_problems(STEP_SET, "train", DATA) if "solution" in p] if STEP_SET else []
    solved = [p for p in solved if p["problem"] not in {h["problem"] for h in held_out}]
    if STEP_SET and not solved:
        fail(f"--step-set {STEP_SET}: no problem in it has a solution")
    run = start_run(globals(), problems + solved, tests, models=[PRM] * bool(PRM))
    by_id, fresh = {p["id"]: p for p in problems}, max(1, len(problems) // SLICE)
    say(f"  data     {len(problems):,} training problems, {min(SLICE, len(problems)):,} a round; {len(tests):,} test "
        f"problems\n  taus     {TAU_LOW} and {TAU_HIGH}")
    if ROUNDS > fresh:
        say(f"           from round {fresh + 1} on they come again: fewer than {ROUNDS} times {SLICE:,} (--slice)")

    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, max_tokens=MAX_TOKENS,
                    weight_decay=WEIGHT_DECAY, clip=CLIP)

    def ask(problem, draw=0):
        shown = [e for e in worked_examples(problem) if e["problem"] != problem["problem"]]
        text = make_prompt(tokenizer, PROMPT, problem, shown[:SHOTS * (PROMPT == "few_shot")], SYSTEM)
        return f"{SYSTEM}\n\n{text}" if SYSTEM and PROMPT != "chat" else text

    def example(problem, *texts):
        return make_example(tokenizer, PROMPT, problem, *texts) | {"prompt": ask(problem)}

    # M_0: SFT of the base on solutions in steps
    model = MODEL
    if solved:
        d_0 = [example(p, p["solution"]) for p in solved]
        model = run.once("round_0/model", lambda to: train(run, MODEL, d_0, sft_loss, to, round=0, lr=LR, **training))
    m_0, scores = model, {}
    if not REPORT_ONLY:
        scores["round 0" if solved else "base"] = evaluate(run, "round_0/eval.json", m_0, tests, ask, round=0, **greedy)
    end_round(run, 0)

    for t in range(1, ROUNDS + 1):
        # 1. Pre-sample n_p answers to each problem of the slice; phi_a and phi_r tell where the boundary is
        own = [problems[i] for i in slice_of(len(problems), t, run.rng)]
        presamples = run.once(f"round_{t}/presamples.jsonl", lambda: rewarded(run, prm, own, sample(
            run, model, own, PRE_SAMPLES, ask, round=t, phase="presample", **drawn), round=t, phase="prereward"))
        difficulties = classify(run, own, presamples)
        if prm:
            report_rewards(run, t, difficulties)
        if REPORT_ONLY:
            say("now choose --tau-low and --tau-high, and another --run; with this round_1/presamples.jsonl (and "
                "round_0/) copied there, and all else the same, nothing is drawn twice")
            return

        # 2. Re-sample: the remaining (n - n_p) N answers go to the boundary
        counts = quotas([name for _, _, name in difficulties], run.rng(t, "quotas"))
        responses = run.once(f"round_{t}/responses.jsonl", lambda: resample(
            run, prm, model, own, presamples, counts, ask, t, drawn))

        # 3. Pairs of the boundary's answers; M_t = DPO of M_{t-1}
        selection = run.once(f"round_{t}/selection.jsonl", lambda: select(
            own, difficulties, counts, responses, lambda *key: run.rng(t, *key)))
        report_selection(run, t, selection)
        show_answers(own, responses)
        text = {(r["id"], r["draw"]): r["text"] for r in responses}
        pairs = [example(by_id[s["id"]], *(text[s["id"], draw] for draw in pair))
                 for s in selection for pair in s["pairs"]]
        if pairs:
            pairs = run.once(f"round_{t}/train.jsonl", lambda: pairs)
            start = model if START == "previous" else m_0
            model = run.once(f"round_{t}/model", lambda to: train(
                run, start, pairs, dpo_nll_loss, to, round=t, lr=LR_DPO, reference=True, **training))
        else:
            some = any(s["class"] == "boundary" for s in selection)
            why = "a right and a wrong answer to a problem of it" if some else "a problem"
            say(f"  round {t}  the boundary lacks {why}: no pair, the model stays as it is")
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval.json", model, tests, ask, round=t, **greedy)
        end_round(run, t)
    final_table(run, scores)


if __name__ == "__main__":
    override_from_cli(globals())
    main()
