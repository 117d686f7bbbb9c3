"""DAST: difficulty-aware self-training (Xue et al. 2025, https://arxiv.org/abs/2503.09029).

A model answers each training problem several times and trains on the answers that a checker finds correct. DAST draws
more answers to hard problems and prompts for longer ones.

  1. Difficulty, once, with the base model M_0: draw K answers to each problem, p = share correct; level E, M, H or U.
  2. Round 0: M_1 = SFT of the base on D_o, the problems with their own worked solutions.
  3. Rounds t = 1..3, with the current model:
     a. draw answers: up to B_level per problem, until T_level distinct correct ones are found       (P, proportion)
        from prompts whose worked examples are as hard as the problem, meant to lengthen answers     (L, length)
     b. D_a = the correct ones, new in each round; M_{t+1} = SFT of the base on D_u = D_a + D_o          (DAST-S)
        or DPO of M_1 on pairs of one of these and a wrong answer to the same problem                    (DAST-D).

We had the paper's abstract, part of its introduction, a caption and summaries, and the authors' unfinished code. From
the paper: four levels, measured once on M_0; D_u = D_o, then D_a + D_o; three rounds; the names S, D, P and L; that P
increases data size and L lengthens answers, both for challenging queries. From the code: K, prompts and the settings of
SFT, but not its repetition penalty of 1.1 or its limit of 200 new tokens for GSM8K. Ours: what the four names mean in
detail. T and B give H and U at least twice as many answers as without P, and D_a is no smaller
(tests/studies/proportions.py). L also shows E and M problems examples of their own level.
We cannot say where this differs from the rest of the paper, which we have not read.

  python dast.py --toy                                                   2 CPU cores: 2 min, from 47 to 56% (measured)
  python dast.py --model Qwen/Qwen2.5-1.5B                               one GPU: not measured yet
  torchrun --nproc-per-node 8 dast.py --model meta-llama/Llama-3.1-8B    eight GPUs: not measured yet"""
from collections import Counter
from pathlib import Path

from common import (by_problem, end_round, evaluate, fail, final_table, launch, make_example, make_prompt, prepare,
                    read, report, sample, say, sequence_logprobs, show_answers, spread_evenly, text_of, train,
                    worked_examples)
import torch.nn.functional as F  # after common, which keeps torch's threads from spinning

# What to run
MODEL = "meta-llama/Llama-3.1-8B"  # the base: a Hub name or a folder (paper)
START = "base"  # "base" | "previous": what each round trains from; with DPO, "base" is M_1 of round 0 (code: base)
TRAIN_DATA = "gsm8k,math"  # names of sets, files or owner/name on the Hub, comma-separated (paper)
TEST_DATA = "gsm8k,math"  # scored each round (paper; also, out of domain, tal_scq, college_math and theoremqa)
N_TRAIN = 0  # problems from each training set; 0 is all (ours)
N_TEST = 0  # problems from each test set; 0 is all (ours)
HELD_OUT = 0  # training problems set aside, scored in a separate table (TEST_DATA may be empty); 0 is none (ours)
ROUNDS = 3  # after round 0 (paper)
SEED = 0  # for everything random (ours)

# The method
LOSS = "sft"  # "sft" | "dpo": DAST-S or DAST-D (paper)
VARIANT = "PL"  # "PL" | "P" | "L" | "": which controls are on; none is vanilla rejection-sampling self-training (paper)
K_PROBE = 10  # draws per problem to measure its difficulty (code)
CUTS = (0.7, 0.4)  # p > 0.7 is E, from 0.4 on M, above 0 H, and 0 U (ours; two of the cuts of the code's older levels)
K_SAMPLES = 10  # draws per problem without P (code)
TARGETS = (5, 6, 7, 8)  # with P: distinct correct answers wanted at E, M, H, U (ours)
BUDGETS = (10, 20, 40, 40)  # with P: draws allowed at E, M, H, U; tests/studies/proportions.py says why (ours)
BETA = 0.1  # of DPO: how strongly the policy is held to its starting model (code)
DRAWS_LIKE = ""  # a run folder: make as many draws per round as count in it, spread evenly; not with P (ours)
SIZE_LIKE = ""  # a run folder: train on as many answers (pairs) per round as it did, dropping or repeating some (ours)

# Sampling
PROMPT = "few_shot"  # "few_shot" | "zero_shot" | "chat": for the draws; training and scoring use no examples (code)
SHOTS = 8  # worked examples before a problem; 0 is none (code)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
THINK = ""  # "" | "on" | "off": with "chat", whether to think before the answer; for templates that know it (ours)
TEMPERATURE = 0.7  # for all draws (ours; the code's 0.2 leaves little variety)
TOP_P = 1.0  # 1: off (code)
TOP_K = 40  # 0: off (code)
MAX_NEW_TOKENS = 512  # longer answers are cut off and not trained on (code, for MATH)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason); empty is math-verify (ours)

# Training
LR = 2e-5  # peak for SFT; cosine decay to 0 (code)
LR_DPO = 1e-6  # peak for DPO; cosine decay to 0 (ours; the code's 2e-4 is for LoRA)
WARMUP = 0.05  # share of the steps if below 1, else their number; 0 is none (code)
EPOCHS = 1  # passes over D_u (code)
BATCH_SIZE = 32  # answers (pairs) per optimizer step, over all GPUs (code)
WEIGHT_DECAY = 0.01  # for AdamW; 0 is none (code)
CLIP = 0.3  # largest gradient norm; 0 is none (code)
LORA_RANK = 0  # of the adapters trained instead of all weights; 0 is full fine-tuning (ours)
LORA_ALPHA = 32.0  # adapters are scaled by LORA_ALPHA / LORA_RANK (ours)

# Machine: may differ when a run resumes
NAME = ""  # the folder under runs/; empty is script name and seed (ours)
DATA = "data"  # folder of the known problem sets, such as data/gsm8k/train.jsonl (ours)
ENGINE = ""  # "" | "vllm" | "transformers": sampling engine; empty is vLLM on a GPU, else transformers (ours)
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower (ours)
SEEDED = True  # give each vLLM answer a seed; without one, answers may come faster but differ each time (ours)
GPU_MEMORY = 0.85  # share of a GPU that vLLM may use while sampling; it is freed while vLLM sleeps (ours)
MAX_TOKENS = 16384  # per micro-batch on one GPU: affects memory and rounding only; fewer if they do not fit (ours)
RECOMPUTE = False  # recompute activations in the backward pass: less memory, a third more time (ours)
COMPILE = False  # torch.compile the blocks for training: a minute at the start, then a tenth faster on a CPU (ours)
SAVE_MINUTES = 30.0  # between saves during training, 12 bytes per parameter each; 0 is after each step (ours)
KEEP_MODELS = 0  # how many of the last rounds' models to keep on disk, plus any still needed; 0 is all (ours)
KEEP = False  # resume a folder made with different code; finished phases stay as they are (ours)
WANDB = False  # also log to Weights & Biases (ours)

# Legal values of each constant, or its minimum (0 for other numbers)
LEGAL = dict(START=("base", "previous"), LOSS=("sft", "dpo"), VARIANT=("PL", "P", "L", ""), K_PROBE=1, K_SAMPLES=1,
             PROMPT=("few_shot", "zero_shot", "chat"), THINK=("", "on", "off"), MAX_NEW_TOKENS=1, EPOCHS=1,
             BATCH_SIZE=1, ENGINE=("", "vllm", "transformers"), MAX_TOKENS=1)

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TRAIN=200,
           N_TEST=300, K_PROBE=5, K_SAMPLES=2, TARGETS=(1, 2, 3, 4), BUDGETS=(2, 4, 8, 8), SHOTS=2,
           MAX_NEW_TOKENS=96, LR=3e-4, LR_DPO=3e-5, EPOCHS=3, CLIP=1.0, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def pass_rate(responses):
    """Return the share of a problem's answers that are correct."""
    return sum(r["correct"] for r in responses) / len(responses)


def level_of(p):
    """Return a problem's difficulty from its pass rate p in the probe: "E", "M", "H" or "U" (unsolved)."""
    if p > CUTS[0]:
        return "E"
    if p >= CUTS[1]:
        return "M"
    return "H" if p > 0 else "U"


def target_and_budget(level):
    """Return (T, B): the distinct correct answers wanted from a problem of this level, and the draws allowed.

    Without P, T is None: take all correct answers of K_SAMPLES draws."""
    if "P" not in VARIANT:
        return None, K_SAMPLES
    hardness = "EMHU".index(level)
    return TARGETS[hardness], BUDGETS[hardness]


def distinct_of(responses):
    """Return one problem's draws as numbers: 0 is wrong (or cut at the length limit), k the k-th distinct correct text.

    Correct draws "a", "a ", "b" after a wrong one: [0, 1, 1, 2]; the exact text counts, without surrounding blanks."""
    seen = {}
    outcomes = []
    for response in responses:
        outcome = 0
        if response["correct"] and response["finish"] == "stop":
            outcome = seen.setdefault(response["text"].strip(), len(seen) + 1)
        outcomes.append(outcome)
    return outcomes


def choose(outcomes, target):
    """Return the draws that enter D_a: the first of each distinct correct text, at most `target`."""
    distinct = max(outcomes, default=0)
    return [outcomes.index(k) for k in range(1, distinct + 1)][:target]


def choose_pairs(responses, chosen, solved, rng):
    """DAST-D: return [(draw to prefer, draw to reject)], each chosen draw with a different wrong one, at random.

    If no draw is right and the problem is `solved` (level U, with a solution), its solution is preferred. Without a
    wrong draw that ended on its own there is no pair."""
    wrong = [r["draw"] for r in responses if not r["correct"] and r["finish"] == "stop"]
    if solved and not any(r["correct"] for r in responses):
        chosen = [None]  # the worked solution
    return list(zip(chosen, rng.permutation(wrong).tolist()))


def example_pools(solved, level, shots):
    """L: return {level: problems with worked solutions to show for it}: its own, or all if it has too few."""
    pools = {}
    for name in "EMHU":
        own = [p for p in solved if level[p["id"]] == name]
        pools[name] = own if len(own) > shots else solved  # one more, because one may be the problem itself
    return pools


def draw_examples(problem, pool, shots, rng, fits):
    """L: draw `shots` worked solutions of other problems from the pool at random. Until fits(examples), replace the
    longest by the next shorter one, or drop it if there is none."""
    def length(example):
        return len(example["solution"])

    drawn = rng.choice(len(pool), min(shots + 1, len(pool)), replace=False)
    examples = [pool[i] for i in drawn if pool[i]["problem"] != problem["problem"]][:shots]
    while examples and not fits(examples):
        longest = max(examples, key=length)
        examples.remove(longest)
        shorter = [e for e in pool if length(e) < length(longest) and e not in examples and e["id"] != problem["id"]]
        examples += sorted(shorter, key=length)[-1:]
    return examples


def sft_loss(logprobs, batch):
    """L = - sum_t log pi(y_t | x, y_<t), averaged over the step's answer tokens y; the prompts x are not learned."""
    return -logprobs.sum(), len(logprobs), {}


def dpo_loss(logprobs, batch):
    """L = - log sigmoid(beta (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x))), averaged over the pairs of
    the step (Rafailov et al. 2023, eq. 7): y_w is the chosen answer, y_l the rejected one, ref the initial policy."""
    gain = sequence_logprobs(logprobs, batch) - batch["reference"]  # of y_w, y_l, y_w, y_l, ...
    margin = BETA * (gain[0::2] - gain[1::2])
    metrics = {"margin": margin.detach().sum(), "preferred": (margin > 0).sum()}
    return -F.logsigmoid(margin).sum(), len(margin), metrics


# The loop -------------------------------------------------------------------------------------------------------------

def select(problems, probe, responses, budgets, run, t):
    """Return the records of selection.jsonl: each problem's decisions and the numbers behind them."""
    probe = by_problem(probe)
    responses = by_problem(responses)
    selection = []
    for problem, budget in zip(problems, budgets):
        i = problem["id"]
        p = pass_rate(probe[i])
        level = level_of(p)
        target = target_and_budget(level)[0]
        outcomes = distinct_of(responses[i])
        chosen = choose(outcomes, target)
        pairs = []
        if LOSS == "dpo":
            solved = level == "U" and "solution" in problem
            pairs = choose_pairs(responses[i], chosen, solved, run.rng(t, "pairs", i))
        selection.append({"id": i, "pass_rate": p, "level": level, "target": target, "budget": budget,
                          "outcomes": outcomes, "chosen": chosen, "pairs": pairs})
    return selection


def make_examples(tokenizer, problems, selection, responses):
    """Return D_a: the chosen answers as training examples, or the pairs (preferred, rejected)."""
    by_draw = {(r["id"], r["draw"]): r for r in responses}
    examples = []
    for problem, s in zip(problems, selection):
        by_draw[s["id"], None] = problem.get("solution")
        trained = s["pairs"] if LOSS == "dpo" else [[draw] for draw in s["chosen"]]
        for draws in trained:
            answers = [by_draw[s["id"], draw] for draw in draws]
            examples.append(make_example(tokenizer, PROMPT, problem, *answers, system=SYSTEM, think=THINK))
    return examples


def report_selection(run, t, selection, level, responses, augmented):
    """Report per level: problems, draws, share correct, mean answer length in tokens (does L work?), answers chosen."""
    levels = {}
    for name in "EMHU":
        decided = [s for s in selection if s["level"] == name]
        drawn = [r for r in responses if level[r["id"]] == name]
        draws = max(1, len(drawn))
        levels[name] = {"problems": len(decided), "draws": len(drawn),
                        "correct": sum(r["correct"] for r in drawn) / draws,
                        "mean_tokens": sum(r["tokens"] for r in drawn) / draws,
                        "chosen": sum(len(s["chosen"]) for s in decided)}
    report(run, t, "select", **levels, augmented=augmented)


def check_constants():
    """End the program if constants contradict each other."""
    if (PROMPT == "zero_shot" or SHOTS == 0) and "L" in VARIANT:
        fail("without examples in the prompt L has no effect; choose --variant P or ''")
    if not 1 > CUTS[0] >= CUTS[1] > 0:
        fail(f"--cuts {CUTS}: both must be between 0 and 1, the higher one first")
    for other in filter(None, (DRAWS_LIKE, SIZE_LIKE)):
        if "P" in VARIANT:
            fail("--draws-like and --size-like are for runs without P; with P, the levels determine both")
        if ROUNDS:
            of_other_run(other, ROUNDS)


def main():
    check_constants()
    run, tokenizer, problems, tests = prepare(globals())
    solved = [p for p in problems if "solution" in p]
    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, clip=CLIP,
                    lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA)
    shots = 0 if PROMPT == "zero_shot" else SHOTS
    order = run.rng("examples").permutation(len(solved))
    fixed = [solved[i] for i in order[:shots + 1]]  # one more than needed, so that no problem is shown itself

    def few_shot(problem, draw):
        pool = fixed if len(solved) > shots else worked_examples(problem)
        examples = [e for e in pool if e["problem"] != problem["problem"]]
        return make_prompt(tokenizer, PROMPT, problem, examples[:shots], SYSTEM, THINK)

    def zero_shot(problem, draw):
        return make_prompt(tokenizer, "chat" if PROMPT == "chat" else "zero_shot", problem, (), SYSTEM, THINK)

    # 1. Difficulty: K answers by the base M_0 to each problem, once for all rounds (caption of Figure 1)
    probe = sample(run, "round_0/probe.jsonl", MODEL, problems, K_PROBE, few_shot, **drawn)
    level = {i: level_of(pass_rate(probed)) for i, probed in by_problem(probe).items()}
    pools = example_pools(solved, level, shots)
    say(f"  levels   {text_of(Counter(sorted(level.values(), key='EMHU'.index)))}")
    scores = {"base": evaluate(run, "round_0/eval_base", MODEL, tests, zero_shot, **greedy)}
    if shots:
        scores["base, examples in prompt"] = evaluate(run, "round_0/eval_examples", MODEL, tests, few_shot, **greedy)

    # 2. Round 0: M_1 = SFT of the base on D_u = D_o
    model = MODEL
    d_o = [make_example(tokenizer, PROMPT, p, p["solution"], system=SYSTEM, think=THINK) for p in solved]
    if d_o:
        model = train(run, "round_0/model", MODEL, d_o, sft_loss, lr=LR, **training)
        scores["round 0"] = evaluate(run, "round_0/eval", model, tests, zero_shot, **greedy)
    else:
        say("  round 0  no training and no L, because the problems have no worked solutions: D_o is empty")
    m_1 = model
    end_round(run, 0, keep=[m_1])

    for t in range(1, ROUNDS + 1):
        # 3a. Draw answers: with P until T distinct correct ones or B draws; with L from examples of the problem's level
        budgets = draw_budgets(run, t, problems, level)

        def same_level(problem, draw):
            def prompt(examples):
                return make_prompt(tokenizer, PROMPT, problem, examples, SYSTEM, THINK)

            pool = pools[level[problem["id"]]]
            rng = run.rng(t, "examples", problem["id"], draw)
            return prompt(draw_examples(problem, pool, shots, rng, lambda examples: run.engine.fits(prompt(examples))))

        def enough(responses):
            return max(distinct_of(responses)) >= target_and_budget(level[responses[0]["id"]])[0]

        responses = sample(run, f"round_{t}/responses.jsonl", model, problems, budgets,
                           same_level if "L" in VARIANT and solved else few_shot,
                           enough=enough if "P" in VARIANT else None, **drawn)

        # 3b. D_a = the chosen answers; M_{t+1} = SFT of the base on D_u = D_a + D_o, or DPO of M_1 on pairs
        selection = run.once(f"round_{t}/selection.jsonl", select, problems, probe, responses, budgets, run, t)
        d_a = make_examples(tokenizer, problems, selection, responses)
        if SIZE_LIKE and d_a:
            d_a = resized(d_a, run, t)
        report_selection(run, t, selection, level, responses, len(d_a))
        show_answers(run, t, problems, responses)
        if not d_a:
            say(f"  round {t}  {len(responses):,} answers, but D_a is empty, so the model stays as it is")
        elif LOSS == "sft":
            d_u = run.once(f"round_{t}/train.jsonl", list, d_a + d_o)
            start = model if START == "previous" else MODEL
            model = train(run, f"round_{t}/model", start, d_u, sft_loss, lr=LR, **training)
        else:
            d_u = run.once(f"round_{t}/train.jsonl", list, d_a)
            start = model if START == "previous" else m_1
            model = train(run, f"round_{t}/model", start, d_u, dpo_loss, lr=LR_DPO, reference=True, **training)
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval", model, tests, zero_shot, **greedy)
        end_round(run, t, keep=[m_1, model])
    final_table(run, scores)


# Controls of a study: arms without P that draw or train on as much as another run -------------------------------------

def of_other_run(folder, t):
    """Return the selection that a different run made in round t; end the program if it has not got that far."""
    path = Path(folder) / f"round_{t}" / "selection.jsonl"
    if not path.exists():
        fail(f"{path}: no such file; that run must have finished round {t}")
    return read(path)


def draw_budgets(run, t, problems, level):
    """Return the draws allowed in round t, parallel to problems: by level with P, or as many as DRAWS_LIKE made."""
    if DRAWS_LIKE:
        draws = sum(len(s["outcomes"]) for s in of_other_run(DRAWS_LIKE, t))
        return spread_evenly(draws, len(problems), run.rng(t, "draws"))
    return [target_and_budget(level[p["id"]])[1] for p in problems]


def resized(d_a, run, t):
    """Return D_a with examples dropped or repeated to match the size in SIZE_LIKE's round t."""
    trained = "pairs" if LOSS == "dpo" else "chosen"
    size = sum(len(s[trained]) for s in of_other_run(SIZE_LIKE, t))
    copies = spread_evenly(size, len(d_a), run.rng(t, "size"))
    examples = []
    for example, times in zip(d_a, copies):
        examples += [example] * times
    return examples


if __name__ == "__main__":
    launch(main, globals())
