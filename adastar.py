"""AdaSTaR: adaptive data sampling for self-taught reasoners (Koh et al. 2025, https://arxiv.org/abs/2505.16322).

A model repeatedly answers training problems and trains on its correct answers (STaR). AdaSTaR first takes the problems
that have waited longest and were hardest, and stops drawing when it has enough. While the model is weak, it discards
most of what it has just measured, so that easier problems, seen before, come up again.

  State of each problem i: t~_i, the last iteration whose statistics were kept, and w_i, its share of correct draws.
  In iteration t = 1, 2, ... with the model pi_t:
  1. AdaD. Walk the problems in order of (t~_i, w_i), both ascending, without removing any. Draw an answer to each, and
     a second one if the first is wrong (with the answer shown, if HINT); stop at beta_t correct answers D+.
  2. Train pi_t on D+ to get pi_{t+1}.
  3. AdaC. alpha = problems solved / problems visited m. Only the first floor(m alpha^2) visited get t~_i = t and their
     new w_i; the others keep their place at the head of the line.

Differences from the paper: alpha is measured while sampling, because the paper leaves it open (code); beta_t is a whole
number of optimizer steps (code); one answer per problem is trained on, and if the problems give fewer than beta_t,
the answers are repeated to fill the steps (code); AdamW on float32 weights; our own prompts, and answers in a box; the
iteration to report is chosen on held-out training problems, not on the test set as in the paper.

  python adastar.py --toy                                     2 CPU cores: 1 min, from 47 to 61% (measured)
  python adastar.py --model Qwen/Qwen2.5-3B                   one GPU: not measured yet
  torchrun --nproc-per-node 8 adastar.py --model meta-llama/Llama-3.2-3B --train-data adastar_arc \\
      --test-data arc_challenge --hint                        eight GPUs: not measured yet"""
import numpy as np

from common import (GROUP, by_problem, costs_of, end_round, evaluate, fail, final_table, last_boxed, launch,
                    load_solved, make_example, make_prompt, prepare, report, sample, say, show_answers, train,
                    worked_examples)

# What to run
MODEL = "Qwen/Qwen2.5-3B"  # the base: a Hub name or a folder (paper: for gsm8k; Llama-3.2-3B for the others)
START = "previous"  # "base" | "previous": what each round trains from; STaR and ReST-EM use "base" (paper)
TRAIN_DATA = "gsm8k"  # names of sets, files or owner/name on the Hub, comma-separated (paper)
TEST_DATA = "gsm8k"  # scored each round (paper)
N_TRAIN = 0  # problems from each training set; 0 is all (paper)
N_TEST = 0  # problems from each test set; 0 is all (paper)
HELD_OUT = 200  # training problems set aside to choose the iteration to report; 0 reports the last (ours)
ROUNDS = 20  # iterations (ours; the paper reports its best iteration, between 2 and 23)
SEED = 0  # for everything random (ours)

# The method: tests/studies/results.md lists the values for STaR, STaR-Acc-Full-K, ReST-EM, AdaD and the other arms
ORDER = "adaptive"  # "adaptive" | "stale" | "hardest" | "random": by (t~, w), t~ alone, (w, t~), at random (paper)
STEPS = 40  # sigma_1: optimizer steps of the first iteration; beta_t is BATCH_SIZE times sigma_t (paper)
GROWTH = 1.2  # of the steps, per iteration (paper)
STOP_AT_BETA = True  # stop at beta_t correct answers; off: visit all (the order does not matter), take beta_t (paper)
TRAIN_ON_ALL = False  # train on all correct answers, not only beta_t: STaR-Full; needs STOP_AT_BETA off (paper)
K_SAMPLES = 2  # maximum draws per problem (paper)
RETRY = True  # draw again only after a wrong draw; off: make all K_SAMPLES draws, like STaR-Full-K (paper)
HINT = False  # show the answer in draws after the first (paper: on for choices, labels, yes/no; off for mathematics)
TRACES = 1  # correct answers per problem to train on; 0 is all; other values than 1 need RETRY off (code)
CURRICULUM_POWER = 2  # f(alpha) = alpha^2; 0 keeps all statistics: AdaD without AdaC (paper)
FILL_STEPS = True  # if the problems give fewer than beta_t, repeat these to fill up; off: train once on each (code)

# Sampling
PROMPT = "few_shot"  # "few_shot" | "zero_shot" | "chat": for the draws; training and scoring use no examples (paper)
SHOTS = 8  # worked examples before a problem; 0 is none (code; 6 for ARC, 7 for CommonsenseQA; ours are 6 for these)
EXAMPLES_FROM = ""  # the set whose solutions are shown as worked examples; empty is our own (ours)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
THINK = ""  # "" | "on" | "off": with "chat", whether to think before the answer; for templates that know it (ours)
TEMPERATURE = 1.0  # for all draws (paper)
TOP_P = 1.0  # 1: off (paper; 0.9 in the code)
TOP_K = 0  # 0: off (paper; 50 in the code, a default of its library)
MAX_NEW_TOKENS = 512  # longer answers are cut off and not trained on (ours)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason); empty is math-verify (ours)

# Training
LR = 1e-5  # constant after the warm-up (paper; constant: code)
WARMUP = 100.0  # share of the steps if below 1, else their number; 0 is none (paper; code: none for gsm8k)
BATCH_SIZE = 8  # answers per optimizer step, over all GPUs (paper)
WEIGHT_DECAY = 0.01  # for AdamW; 0 is none (paper; not applied in the code)
CLIP = 1.0  # largest gradient norm; 0 is none (ours)
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
LEGAL = dict(START=("base", "previous"), ORDER=("adaptive", "stale", "hardest", "random"), STEPS=1, GROWTH=1.0,
             K_SAMPLES=1, PROMPT=("few_shot", "zero_shot", "chat"), THINK=("", "on", "off"), MAX_NEW_TOKENS=1,
             BATCH_SIZE=1, ENGINE=("", "vllm", "transformers"), MAX_TOKENS=1)

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TRAIN=500,
           N_TEST=300, HELD_OUT=100, ROUNDS=6, STEPS=10, SHOTS=2, EXAMPLES_FROM="tests/toy/train.jsonl",
           MAX_NEW_TOKENS=96, LR=1e-4, WARMUP=5.0, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def walk_order(last, w, rng):
    """Return the places of the problems in the order of the walk, from t~ (n,) and w (n,); ties in file order (in the
    code by ids as text: 0, 1, 10, 100, ...).

    The paper keeps a heap and peeks through it; since a walk removes nothing, sorting once gives the same order."""
    if ORDER == "random":
        return rng.permutation(len(last))
    keys = {"adaptive": (last, w), "stale": (last,), "hardest": (w, last)}[ORDER]
    return np.lexsort(keys[::-1])  # sorts by its last key first


def beta_of(t):
    """Return beta_t: how many correct answers iteration t asks for."""
    return BATCH_SIZE * int(STEPS * GROWTH ** (t - 1))


def outcomes_of(responses):
    """Return one problem's draws as numbers: 1 is correct, 0 wrong (or cut off at the length limit)."""
    return [int(r["correct"] and r["finish"] == "stop") for r in responses]


def choose(outcomes):
    """Return the draws that enter D+: the first TRACES correct ones."""
    correct = [draw for draw, outcome in enumerate(outcomes) if outcome == 1]
    return correct[:TRACES or None]


def walk(order, beta, rate, draw):
    """AdaD (Algorithm 1, lines 5-12): visit problems in `order` until there are beta_t correct answers.

    draw(block) -> {problem: responses} draws for a block of problems at once, which keeps the sampler busy. Draws past
    the end are dropped, so the size of the blocks does not bias the result. rate: a guess of the answers to train on
    per problem, for the first block. Return {problem: responses} of the visited problems, in order."""
    visited = {}
    collected = 0  # |D+|
    while len(visited) < len(order):
        size = block_size(beta - collected, rate)
        block = order[len(visited):len(visited) + size]
        for i, responses in draw(block).items():  # the stalest and hardest first
            visited[i] = responses
            collected += len(choose(outcomes_of(responses)))
            if STOP_AT_BETA and collected >= beta:
                return visited
        rate = collected / len(visited)
    return visited


def block_size(missing, rate):
    """Return how many problems to draw at once: enough for the missing answers, plus a tenth, in whole batches."""
    if not STOP_AT_BETA:
        return 10**9  # all
    expected = 1.1 * missing / max(rate, 0.1)
    return GROUP * int(np.ceil(round(expected / GROUP, 6)))


def spread(total, beta, rng):
    """Return how often to train on each of `total` correct answers, in the order of the walk, for beta_t in all."""
    if total < beta and FILL_STEPS and not TRAIN_ON_ALL:
        return [beta // total + (place < beta % total) for place in range(total)]
    if STOP_AT_BETA or TRAIN_ON_ALL or total <= beta:
        return [1] * total
    copies = [0] * total
    for place in rng.permutation(total)[:beta]:
        copies[place] = 1
    return copies


def to_commit(visited, solved):
    """AdaC: return floor(m alpha^p) of m visited problems, alpha = solved / m; exact, because it uses whole numbers."""
    return visited * solved ** CURRICULUM_POWER // visited ** CURRICULUM_POWER


def select(problems, visited, last, w, beta, rng):
    """Return the records of selection.jsonl: each visited problem's decisions and why, in the order of the walk.

    visited: {place of a problem: its responses}; last and w: t~ (n,) and w (n,) before. `chosen` are the draws that
    enter D+, `copies` says how often each is trained on, `committed` whether (t, win_rate) replaces (last, w)."""
    outcomes = [outcomes_of(responses) for responses in visited.values()]
    chosen = [choose(draws) for draws in outcomes]
    copies = iter(spread(sum(len(draws) for draws in chosen), beta, rng))
    solved = sum(any(draws) for draws in outcomes)
    commits = to_commit(len(visited), solved)
    selection = []
    for visit, i in enumerate(visited):
        draws = outcomes[visit]
        selection.append({"id": problems[i]["id"], "visit": visit, "last": int(last[i]), "w": float(w[i]),
                          "outcomes": draws, "alpha": solved / len(visited), "win_rate": sum(draws) / len(draws),
                          "chosen": chosen[visit], "copies": [next(copies) for _ in chosen[visit]],
                          "committed": visit < commits})
    return selection


def hinted(problem):
    """Rationalization (Zelikman et al. 2022): put the answer after the question of a problem or a worked example."""
    answer = problem.get("answer") or last_boxed(problem["solution"])
    apart = "\n" if "\n" in problem["problem"] else " "
    return {**problem, "problem": f"{problem['problem']}{apart}(Answer: {answer})"}


def sft_loss(logprobs, batch):
    """L = - sum_t log pi(y_t | x, y_<t), averaged over the step's answer tokens y; the prompts x are not learned."""
    return -logprobs.sum(), len(logprobs), {}


# The loop -------------------------------------------------------------------------------------------------------------

def make_examples(tokenizer, selection, by_id, responses):
    """Return D+: the chosen answers as training examples, in the order of the walk."""
    by_draw = {(r["id"], r["draw"]): r for r in responses}
    examples = []
    for s in selection:
        for draw, copies in zip(s["chosen"], s["copies"]):
            response = by_draw[s["id"], draw]
            examples += [make_example(tokenizer, PROMPT, by_id[s["id"]], response, system=SYSTEM, think=THINK)] * copies
    return examples


def report_selection(run, t, selection, beta):
    """Report how far the walk went and what it gave; if it gave fewer than beta_t, say how these are used."""
    answers = sum(len(s["chosen"]) for s in selection)
    trained = sum(sum(s["copies"]) for s in selection)
    report(run, t, "select", visited=len(selection), solved=sum(any(s["outcomes"]) for s in selection),
           solved_at_once=sum(s["outcomes"][0] for s in selection), alpha=selection[0]["alpha"],
           committed=sum(s["committed"] for s in selection), beta=beta, answers=answers, trained=trained)
    if 0 < answers < beta and not TRAIN_ON_ALL:
        fate = f"repeated to {trained:,}" if trained > answers else "each trained on once"
        say(f"  round {t}  all problems together gave only {answers:,} of {beta:,} correct answers, {fate}")


def best_round(scores):
    """Return the iteration to report: the best on the held-out problems (the first of ties); without them the last."""
    rounds = [name for name in scores if name.startswith("round")]
    if "held_out" not in scores["base"]:
        return rounds[-1]
    return max(rounds, key=lambda name: scores[name]["held_out"]["accuracy"])


def report_iteration(run, scores):
    """Log and print the iteration to report."""
    name = best_round(scores)
    t = int(name.split()[1])
    values = {"iteration": t, "total_flops": float(run.metrics[t, "round"]["total_flops"])}
    for kind, score in scores[name].items():
        values[kind] = score["accuracy"]
    say("the best on the held-out problems:" if "held_out" in values else "the last:")
    report(run, 0, "reported", **values)


def check_constants():
    """End the program if constants contradict each other."""
    if TRAIN_ON_ALL and STOP_AT_BETA:
        fail("--train-on-all needs --no-stop-at-beta: a walk that stops gives no more than beta_t")
    if (TRACES != 1 and RETRY) or TRACES > K_SAMPLES:
        fail(f"--traces {TRACES} needs --no-retry and as many --k-samples; else a problem has fewer correct answers")
    if HINT and K_SAMPLES == 1:
        fail("--hint needs --k-samples above 1, because it is for draws after the first")


def main():
    check_constants()
    examples = load_solved(EXAMPLES_FROM, DATA)
    run, tokenizer, problems, tests = prepare(globals(), examples)
    by_id = {p["id"]: p for p in problems}
    place = {p["id"]: i for i, p in enumerate(problems)}
    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=1, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, clip=CLIP,
                    lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA, decay=False)
    shots = 0 if PROMPT == "zero_shot" else SHOTS
    order = run.rng("examples").permutation(len(examples))
    fixed = [examples[i] for i in order[:shots + 1]]  # one more than needed, so that no problem is shown itself

    def few_shot(problem, draw):
        pool = fixed or worked_examples(problem)
        shown = [e for e in pool if e["problem"] != problem["problem"]][:shots]
        if HINT and draw > 0:
            problem = hinted(problem)
            shown = [hinted(e) for e in shown]
        return make_prompt(tokenizer, PROMPT, problem, shown, SYSTEM, THINK)

    def zero_shot(problem, draw):
        return make_prompt(tokenizer, "chat" if PROMPT == "chat" else "zero_shot", problem, (), SYSTEM, THINK)

    def enough(responses):
        return 1 in outcomes_of(responses)

    model = MODEL
    scores = {"base": evaluate(run, "round_0/eval", MODEL, tests, zero_shot, **greedy)}
    if shots:
        scores["base, examples in prompt"] = evaluate(run, "round_0/eval_examples", MODEL, tests, few_shot, **greedy)
    end_round(run, 0)
    last = np.zeros(len(problems), int)  # t~: the last iteration whose statistics were kept
    w = np.zeros(len(problems))  # share of correct draws then
    alpha = 0.5  # problems solved / visited; a guess at first
    models = {}
    for t in range(1, ROUNDS + 1):
        # 1. AdaD (Alg. 1, lines 5-12): walk from the stalest and hardest until there are beta_t correct answers
        blocks = []

        def draw(block):
            responses = sample(run, f"round_{t}/responses_{len(blocks)}.jsonl", model, [problems[i] for i in block],
                               K_SAMPLES, few_shot, enough=enough if RETRY else None, **drawn)
            blocks.append(responses)
            return {place[i]: own for i, own in by_problem(responses).items()}

        beta = beta_of(t)
        visited = walk(walk_order(last, w, run.rng(t, "order")), beta, alpha, draw)
        responses = [r for block in blocks for r in block if place[r["id"]] in visited]
        counted = [r for r in blocks[-1] if place[r["id"]] in visited]  # draws past the end are only spent
        metrics = run.metrics.get((t, f"responses_{len(blocks) - 1}"))
        if metrics:  # a file copied from elsewhere has none
            metrics.update(costs_of(counted, metrics["parameters"]))
        selection = run.once(f"round_{t}/selection.jsonl", select, problems, visited, last, w, beta, run.rng(t, "cut"))
        report_selection(run, t, selection, beta)
        show_answers(run, t, problems, responses)

        # 2. Train(pi_t, D+) (line 14): with a fresh optimizer
        d_plus = make_examples(tokenizer, selection, by_id, responses)
        if d_plus:
            d_plus = run.once(f"round_{t}/train.jsonl", list, d_plus)
            start = model if START == "previous" else MODEL
            model = train(run, f"round_{t}/model", start, d_plus, sft_loss, lr=LR, **training)
        else:
            say(f"  round {t}  {len(responses):,} answers, none correct: D+ is empty, so the model stays as it is")

        # 3. AdaC (lines 15-19): the first floor(m alpha^2) visited now count as seen; the others stay where they are
        alpha = selection[0]["alpha"]
        for s in selection:
            if s["committed"]:
                last[place[s["id"]]] = t
                w[place[s["id"]]] = s["win_rate"]
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval", model, tests, zero_shot, **greedy)
        models[f"round {t}"] = model
        end_round(run, t, keep=[model, models[best_round(scores)]])
    final_table(run, scores)
    if ROUNDS:
        report_iteration(run, scores)


if __name__ == "__main__":
    launch(main, globals())
