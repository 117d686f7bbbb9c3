"""DAST: difficulty-aware self-training (Xue et al. 2025, https://arxiv.org/abs/2503.09029).

A model answers each training problem several times and trains on the answers that a checker finds correct; DAST draws
more answers for hard problems, and has them written at greater length.

  1. Difficulty, once, on the base model M_0: draw K answers to each problem, p = share correct; level E, M, H or U.
  2. Round 0: M_1 = SFT of the base on D_o, the problems with their own worked solutions.
  3. Rounds t = 1..3, with the current model:
     a. draw answers: up to B_level of each problem, until T_level distinct correct ones are found   (P, proportion)
        from prompts whose worked examples are as hard as the problem, meant to lengthen answers     (L, length)
     b. D_a = these correct ones, anew each round; M_{t+1} = SFT of the base on D_u = D_a + D_o          (DAST-S)
        or DPO of M_1 on pairs of one of these and a wrong one to the same problem                       (DAST-D).

Of the paper we could read the abstract, part of the introduction and a caption, and the authors' unfinished code.
From the paper: four levels, measured once on M_0; D_u = D_o, then D_a + D_o; three rounds; the two controls. Ours: the
rules that make them work (draw until T; examples from D_o). Each constant says where its value is from.
Where it differs from the paper we cannot know, as we have not read the rest.

  torchrun dast.py --toy                                                 2 CPU cores: 2 min, 1.2 GB, 54 % (measured)
  torchrun dast.py --model Qwen/Qwen2.5-1.5B                             one GPU: not measured yet
  torchrun --nproc-per-node 8 dast.py --model meta-llama/Llama-3.1-8B    eight GPUs: not measured yet
"""
import functools
from pathlib import Path

from common import (at_once, by_problem, fail, load_problems, load_tokenizer, make_example, make_prompt,
                    override_from_cli, read, sample, say, sequence_logprobs, spread_evenly, start_run, train)
from eval import end_round, evaluate, final_table, hold_out, show_answers, worked_examples
import torch.nn.functional as F  # behind common, which keeps torch's threads from spinning

# What to run
MODEL = "meta-llama/Llama-3.1-8B"  # the base: a Hub name or a folder (paper)
START = "base"  # "base" | "previous": what each round trains from; with DPO, "base" is M_1 of round 0 (code: base)
TRAIN_DATA = "gsm8k,math"  # names of sets, .jsonl or .json files, owner/name of the Hub; comma-separated (paper)
TEST_DATA = "gsm8k,math"  # scored after each round, greedily; may be empty with HELD_OUT (paper)
N_TRAIN = 0  # problems of each training set; 0 is all (ours)
N_TEST = 0  # problems of each test set; 0 is all (ours)
HELD_OUT = 0  # training problems put aside, and scored like a test set; 0 is none (ours)
ROUNDS = 3  # after round 0 (paper)
SEED = 0  # of everything random (ours)

# The method
LOSS = "sft"  # "sft" | "dpo": DAST-S or DAST-D (paper)
VARIANT = "PL"  # "PL" | "P" | "L" | "": which controls are on; none is vanilla rejection-sampling self-training (paper)
K_PROBE = 10  # answers per problem that measure its difficulty (code)
CUTS = (0.7, 0.4)  # p > 0.7 is E, 0.4 <= p <= 0.7 is M, 0 < p < 0.4 is H, p = 0 is U (code)
M_TARGET = 1  # unit of the targets (ours)
TARGETS = (1, 2, 3, 4)  # distinct correct answers wanted at E, M, H, U, in units of M_TARGET (ours)
K_SAMPLES = 10  # answers per problem without P, and the unit of the budgets with P (code)
BUDGETS = (1, 2, 4, 8)  # draws allowed at E, M, H, U, in units of K_SAMPLES (ours)
BETA = 0.1  # of DPO: how strongly the policy is held to the model it starts from (code)
DRAWS_LIKE = ""  # a run folder: as many draws in each round as it made, spread evenly; not with P (ours)
SIZE_LIKE = ""  # a run folder: as many answers (pairs) trained on each round, by leaving out or repeating some (ours)

# Sampling
PROMPT = "few_shot"  # "few_shot" | "zero_shot" | "chat": of M_0's and the draws'; else no examples are shown (code)
SHOTS = 8  # worked examples before a problem; 0 is none (code)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
TEMPERATURE = 0.7  # of all draws (ours; the code's 0.2 leaves little variety)
TOP_P = 1.0  # 1: off (code)
TOP_K = 40  # 0: off (code)
MAX_NEW_TOKENS = 512  # an answer is cut there, and then not trained on (code)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that (ours)

# Training
LR = 2e-5  # of SFT, its peak; cosine to 0 (code)
LR_DPO = 1e-6  # of DPO, its peak (ours; the code's 2e-4 is for LoRA)
WARMUP = 0.05  # share of the steps, or from 1 on their number; 0 is none (code)
EPOCHS = 1  # passes over D_u (code)
BATCH_SIZE = 32  # answers (pairs) per optimizer step, over all GPUs (code)
WEIGHT_DECAY = 0.01  # of AdamW; 0 is none (code)
CLIP = 0.3  # largest gradient norm (code)

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

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TRAIN=200,
           N_TEST=300, K_PROBE=5, K_SAMPLES=2, SHOTS=2, MAX_NEW_TOKENS=96, LR=3e-4, LR_DPO=3e-5, EPOCHS=3, CLIP=1.0,
           EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def level_of(correct, draws):
    """Difficulty of a problem from its probe, by the share correct: "E", "M", "H" or "U" (unsolved)."""
    p = correct / draws
    return "E" if p > CUTS[0] else "M" if p >= CUTS[1] else "H" if p > 0 else "U"


def target_and_budget(level):
    """(T, B): how many distinct correct answers a problem of this level should give, in at most how many draws."""
    hardness = "EMHU".index(level)
    return M_TARGET * TARGETS[hardness], K_SAMPLES * BUDGETS[hardness]


def outcomes_of(responses):
    """One problem's draws as numbers: 0 is wrong (or cut by the length limit), k the k-th distinct correct text.

    Correct draws "a", "a ", "b" after a wrong one: [0, 1, 1, 2]; the exact text counts, without blanks around it.
    """
    seen = {}
    return [seen.setdefault(r["text"].strip(), len(seen) + 1) if r["correct"] and r["finish"] == "stop" else 0
            for r in responses]


def choose(outcomes, target):
    """The draws that enter D_a: the first of each distinct correct text, `target` of them at most."""
    return [draw for draw, k in enumerate(outcomes) if k and k not in outcomes[:draw]][:target]


def choose_pairs(responses, chosen, solved, rng):
    """DAST-D: [(draw to prefer, draw to reject)], each chosen draw with another wrong one, at random; -1 is the worked
    solution, which is preferred where no draw is right. Without a wrong draw (that has ended by itself) no pair."""
    wrong = [r["draw"] for r in responses if not r["correct"] and r["finish"] == "stop"]
    better = chosen or [-1] * (solved and not any(r["correct"] for r in responses))
    return list(zip(better, rng.permutation(wrong).tolist()))


def draw_examples(problem, level, pools, shots, rng):
    """L: `shots` worked solutions of other problems of the same level, drawn at random.

    pools: {level: problems with solutions}. What a level lacks comes from the next easier ones, then from harder ones.
    """
    hardness, examples = "EMHU".index(level), []
    for near in [*reversed("EMHU"[:hardness + 1]), *"EMHU"[hardness + 1:]]:
        pool, missing = pools.get(near, []), shots - len(examples)
        drawn = rng.choice(len(pool), min(missing + 1, len(pool)), replace=False) if missing and pool else []
        examples += [pool[i] for i in drawn if pool[i]["problem"] != problem["problem"]][:missing]
    return examples


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


# The loop -------------------------------------------------------------------------------------------------------------

def of_other_run(folder, t):
    """The selection that another run made in round t; ends the program if it has not got so far."""
    path = Path(folder) / f"round_{t}" / "selection.jsonl"
    if not path.exists():
        fail(f"{path}: no such file; that run must have finished round {t}")
    return read(path)


def fixed_examples(pool, shots, rng):
    """The examples of every prompt without L, blind to level: one more than needed, so that none meets itself."""
    return [pool[i] for i in rng.permutation(len(pool))[:shots + 1]]


def draw_limits(run, t, problems, level):
    """[(T, B)] of round t, parallel to problems: by level with P; else T = B: every distinct correct answer counts."""
    if "P" in VARIANT:
        return [target_and_budget(level[p["id"]]) for p in problems]
    if DRAWS_LIKE:
        draws = sum(len(s["outcomes"]) for s in of_other_run(DRAWS_LIKE, t))
        return [(n, n) for n in spread_evenly(draws, len(problems), run.rng(t, "draws"))]
    return [(K_SAMPLES, K_SAMPLES)] * len(problems)


@at_once()
def select(problems, probe, responses, limits, size, rng):
    """selection.jsonl: for each problem all that was decided, with the numbers it was decided from.

    `copies` says how often each chosen answer (with DPO each pair) is trained on: once; with SIZE_LIKE, `size` of them
    spread over all. rng(*key): a generator for what is random.
    """
    probe, responses = by_problem(probe), by_problem(responses)
    selection = []
    for problem, (target, budget) in zip(problems, limits):
        probed, drawn = probe[problem["id"]], responses[problem["id"]]
        right, outcomes = sum(r["correct"] for r in probed), outcomes_of(drawn)
        level, chosen = level_of(right, len(probed)), choose(outcomes, target)
        solved = level == "U" and "solution" in problem
        paired = LOSS == "dpo" and 0 in outcomes and (chosen or solved)  # else spare the generator, which takes longest
        pairs = choose_pairs(drawn, chosen, solved, rng("pairs", problem["id"])) if paired else []
        selection.append({"id": problem["id"], "probe_correct": right, "probe_draws": len(probed),
                          "pass_rate": right / len(probed), "level": level, "target": target, "budget": budget,
                          "outcomes": outcomes, "chosen": chosen, "pairs": pairs,
                          "copies": [1] * len(pairs if LOSS == "dpo" else chosen)})
    total = sum(len(s["copies"]) for s in selection)
    if SIZE_LIKE and total:
        copies = iter(spread_evenly(size, total, rng("size")))
        for s in selection:
            s["copies"] = [next(copies) for _ in s["copies"]]
    return selection


def make_examples(tokenizer, selection, by_id, responses):
    """D_a: the chosen answers as training examples, or the pairs (preferred, rejected)."""
    text = {(r["id"], r["draw"]): r["text"] for r in responses}
    text |= {(i, -1): problem.get("solution") for i, problem in by_id.items()}
    trained = {s["id"]: s["pairs"] if LOSS == "dpo" else [[draw] for draw in s["chosen"]] for s in selection}
    return [make_example(tokenizer, PROMPT, by_id[s["id"]], *(text[s["id"], draw] for draw in draws), system=SYSTEM)
            for s in selection for draws, n in zip(trained[s["id"]], s["copies"]) for _ in range(n)]


def report_selection(run, t, selection, responses):
    """Per level: problems, draws, share correct, mean answer length in tokens (is L at work?), answers chosen."""
    level = {s["id"]: s["level"] for s in selection}
    rows, values = [], {}
    for name in "EMHU":
        chosen = sum(len(s["chosen"]) for s in selection if s["level"] == name)
        drawn = [r for r in responses if level[r["id"]] == name]
        right, tokens = (sum(r[key] for r in drawn) / max(1, len(drawn)) for key in ("correct", "tokens"))
        values[name] = {"problems": sum(v == name for v in level.values()), "draws": len(drawn), "correct": right,
                        "mean_tokens": tokens, "chosen": chosen}
        rows.append(f"{name} {values[name]['problems']:,} problems {right:.0%} of {len(drawn):,}, {tokens:.0f} tokens, "
                    f"{chosen:,} kept")
    run.log(t, "select", levels=values, augmented=sum(sum(s["copies"]) for s in selection))
    say(f"  round {t}  select   " + " | ".join(rows))


def main():
    for other in filter(None, (DRAWS_LIKE, SIZE_LIKE)):
        if "P" in VARIANT:
            fail("--draws-like and --size-like make controls without P; with it, levels decide both")
        for t in range(1, ROUNDS + 1):
            of_other_run(other, t)
    if (PROMPT == "zero_shot" or SHOTS == 0) and "L" in VARIANT:
        fail("without examples in the prompt L can do nothing; take --variant P or ''")
    if not 1 > CUTS[0] >= CUTS[1] > 0:
        fail(f"--cuts {CUTS}: the first, above which a problem is easy, is the higher one; both are between 0 and 1")
    tokenizer = load_tokenizer(MODEL, PROMPT, SYSTEM)
    problems = load_problems(TRAIN_DATA, "train", DATA, N_TRAIN)
    problems, held_out = hold_out(problems, HELD_OUT, SEED)
    tests = held_out + (load_problems(TEST_DATA, "test", DATA, N_TEST) if TEST_DATA or not held_out else [])
    run = start_run(globals(), problems, tests)
    solved, by_id = [p for p in problems if "solution" in p], {p["id"]: p for p in problems}
    say(f"  data     {len(problems):,} training problems, {len(solved):,} with solutions; {len(tests):,} test problems")

    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, max_tokens=MAX_TOKENS,
                    weight_decay=WEIGHT_DECAY, clip=CLIP)
    loss, lr = (sft_loss, LR) if LOSS == "sft" else (dpo_loss, LR_DPO)
    shots = SHOTS if PROMPT != "zero_shot" else 0
    blind = fixed_examples(solved, shots, run.rng("examples"))

    def few_shot(problem, draw):
        pool = blind if len(solved) > shots else worked_examples(problem)
        examples = [e for e in pool if e["problem"] != problem["problem"]][:shots]
        return make_prompt(tokenizer, PROMPT, problem, examples, SYSTEM)

    def zero_shot(problem, draw):
        return make_prompt(tokenizer, "chat" if PROMPT == "chat" else "zero_shot", problem, system=SYSTEM)

    # 1. Difficulty: K answers of the base M_0 to each problem, once and for all (caption of Figure 1)
    probe = run.once("round_0/probe.jsonl", lambda: sample(
        run, MODEL, problems, K_PROBE, few_shot, round=0, phase="probe", **drawn))
    level = {i: level_of(sum(r["correct"] for r in rs), len(rs)) for i, rs in by_problem(probe).items()}
    pools = {name: [p for p in solved if level[p["id"]] == name] for name in "EMHU"}
    say("  levels   " + "  ".join(f"{name} {list(level.values()).count(name):,}" for name in "EMHU"))
    scores = {"base": evaluate(run, "round_0/eval_base.json", MODEL, tests, few_shot, round=0, phase="eval_base",
                               **greedy)}

    # 2. Round 0: M_1 = SFT of the base on D_u = D_o
    model = MODEL
    d_o = [make_example(tokenizer, PROMPT, p, p["solution"], system=SYSTEM) for p in solved]
    if d_o:
        model = run.once("round_0/model", lambda to: train(run, MODEL, d_o, sft_loss, to, round=0, lr=LR, **training))
        scores["round 0"] = evaluate(run, "round_0/eval.json", model, tests, zero_shot, round=0, **greedy)
    else:
        say("  round 0  skipped, and L off: the problems have answers but no worked solutions, so D_o is empty")
    end_round(run, 0)

    first = model
    for t in range(1, ROUNDS + 1):
        # 3a. Draw answers: with P until T distinct correct ones or B draws; with L from examples of the problem's level
        limits = draw_limits(run, t, problems, level)
        target = {p["id"]: limit for p, (limit, _) in zip(problems, limits)}

        def same_level(problem, draw):
            rng = run.rng(t, "examples", problem["id"], draw)
            examples = draw_examples(problem, level[problem["id"]], pools, shots, rng)
            return make_prompt(tokenizer, PROMPT, problem, examples, SYSTEM)

        def enough(responses):
            return max(outcomes_of(responses)) >= target[responses[0]["id"]]  # distinct correct ones so far

        responses = run.once(f"round_{t}/responses.jsonl", lambda: sample(
            run, model, problems, [b for _, b in limits], same_level if "L" in VARIANT and solved else few_shot,
            enough=enough if "P" in VARIANT else None, round=t, phase="sample", **drawn))

        # 3b. D_a = the chosen answers; M_{t+1} = SFT of the base on D_u = D_a + D_o, or DPO of M_1 on pairs
        size = sum(sum(s["copies"]) for s in of_other_run(SIZE_LIKE, t)) if SIZE_LIKE else 0
        selection = run.once(f"round_{t}/selection.jsonl", lambda: select(
            problems, probe, responses, limits, size, functools.partial(run.rng, t)))
        report_selection(run, t, selection, responses)
        show_answers(problems, responses)
        d_a = make_examples(tokenizer, selection, by_id, responses)
        if d_a:
            d_u = run.once(f"round_{t}/train.jsonl", lambda: d_a + d_o if LOSS == "sft" else d_a)
            start = model if START == "previous" else MODEL if LOSS == "sft" else first
            model = run.once(f"round_{t}/model", lambda to: train(
                run, start, d_u, loss, to, round=t, lr=lr, reference=LOSS == "dpo", **training))
        else:
            say(f"  round {t}  {len(responses):,} answers and D_a is empty, the model stays as it is")
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval.json", model, tests, zero_shot, round=t, **greedy)
        end_round(run, t)
    final_table(run, scores)


if __name__ == "__main__":
    override_from_cli(globals())
    main()
