"""AdaSTaR: adaptive data sampling for self-taught reasoners (Koh et al. 2025, https://arxiv.org/abs/2505.16322).

A model answers training problems and trains on its correct answers, over and over (STaR). AdaSTaR takes the problems
that have waited longest and were hardest first, stops drawing when it has enough, and while the model is weak forgets
most of what it has just measured, so that easier problems, already met, come again.

  State of each problem i: t~_i, the last iteration whose statistics were kept, and w_i, its share of correct draws.
  In iteration t = 1, 2, ... with the model pi_t:
  1. AdaD. Walk the problems in order of (t~_i, w_i), both ascending, without removing any. To each draw an answer, and
     a second one where the first is wrong (shown the right answer, if HINT); stop at beta_t correct answers D+.
  2. Train pi_t on D+: pi_{t+1}.
  3. AdaC. alpha = problems solved / problems visited m. Only the first floor(m alpha^2) visited get t~_i = t and their
     new w_i; the others keep their place at the head of the line.

Differs from the paper in: alpha is measured while sampling, since the paper leaves it open (code); beta_t comes in
whole optimizer steps (code); one answer to a problem is trained on, and where the problems do not give beta_t of them
these are repeated to as many steps (code); AdamW on float32 weights; prompts of our own, and answers in a box; the
iteration to report is chosen on training problems that are held out for it, never on the test set as in the paper.

  torchrun adastar.py --toy                                   2 CPU cores: 1.1 min, 1.0 GB, 61 % (measured)
  torchrun adastar.py --model Qwen/Qwen2.5-3B                 one GPU: not measured yet
  torchrun --nproc-per-node 8 adastar.py --model meta-llama/Llama-3.2-3B --train-data adastar_arc \\
      --test-data arc_challenge --hint                        eight GPUs: not measured yet
"""
import numpy as np

from common import (Log, at_once, by_problem, claims, fail, last_boxed, load_problems, load_tokenizer, make_example,
                    make_prompt, override_from_cli, sample, say, start_run, train)
from eval import end_round, evaluate, final_table, hold_out, show_answers, worked_examples

# What to run
MODEL = "Qwen/Qwen2.5-3B"  # the base: a Hub name or a folder (paper: for gsm8k; Llama-3.2-3B for the others)
START = "previous"  # "previous" | "base": what each iteration trains from; "base" is STaR's and ReST-EM's way (paper)
TRAIN_DATA = "gsm8k"  # names of sets, .jsonl or .json files, owner/name of the Hub; comma-separated (paper)
TEST_DATA = "gsm8k"  # scored after each iteration, greedily; may be empty with HELD_OUT (paper)
N_TRAIN = 0  # problems of each training set; 0 is all (paper)
N_TEST = 0  # problems of each test set; 0 is all (paper)
HELD_OUT = 200  # training problems put aside, which choose the iteration to report; 0 reports the last (ours)
ROUNDS = 20  # iterations (ours; the paper reports the best of its own, between 2 and 23)
SEED = 0  # of everything random (ours)

# The method: tests/results.md has the values that make STaR, STaR-Acc-Full-K, ReST-EM, AdaD and the other arms
ORDER = "adaptive"  # "adaptive" | "stale" | "hardest" | "random": by (t~, w), t~ alone, (w, t~), chance (paper)
STEPS = 40  # sigma_1: optimizer steps of the first iteration; beta_t is BATCH_SIZE times sigma_t (paper)
GROWTH = 1.2  # of the steps, per iteration (paper)
STOP_AT_BETA = True  # stop at beta_t correct answers; off: visit all, in no order that matters, take beta_t (paper)
TRAIN_ON_ALL = False  # all correct answers rather than beta_t of them: STaR-Full; needs STOP_AT_BETA off (paper)
K_SAMPLES = 2  # draws per problem at most (paper)
RETRY = True  # draw again only after a wrong draw; off: all K_SAMPLES, as STaR-Full-K does (paper)
HINT = False  # show the answer in draws after the first: on for choices, labels, yes/no; off for mathematics (paper)
TRACES = 1  # correct answers to a problem that are trained on; 0 is all; other than 1 it needs RETRY off (code)
CURRICULUM_POWER = 2  # f(alpha) = alpha^2; 0 keeps all statistics: AdaD without AdaC (paper)
FILL_STEPS = True  # where the problems give fewer than beta_t, repeat them to as many; off: train once on each (code)

# Sampling
PROMPT = "few_shot"  # "few_shot" | "zero_shot" | "chat": of the draws, and the base's score; no examples else (paper)
SHOTS = 8  # worked examples before a problem, of our own: 8 for mathematics, 6 for other families; 0 is none (code)
EXAMPLES_FROM = ""  # a set whose solutions are shown instead; empty is our own (ours)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
TEMPERATURE = 1.0  # of all draws (paper)
TOP_P = 1.0  # 1: off (paper; 0.9 in the code)
TOP_K = 0  # 0: off (paper; 50 in the code, a default of its library)
MAX_NEW_TOKENS = 512  # an answer is cut there, and then counts as wrong (ours)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that (ours)

# Training
LR = 1e-5  # constant after the warm-up (paper; constant: code)
WARMUP = 100.0  # steps; below 1 their share; 0 is none (paper; anew in each iteration, and none for gsm8k: code)
BATCH_SIZE = 8  # answers per optimizer step, over all GPUs (paper)
WEIGHT_DECAY = 0.01  # of AdamW; 0 is none (paper; not applied in the code)
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

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TRAIN=500,
           N_TEST=300, HELD_OUT=100, ROUNDS=6, STEPS=10, SHOTS=2, EXAMPLES_FROM="tests/toy/train.jsonl",
           MAX_NEW_TOKENS=96, LR=1e-4, WARMUP=5.0, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def walk_order(last, w, rng):
    """The places of the problems in the order of the walk, from t~ (n,) and w (n,); ties in the order of the file.

    The paper keeps a heap and peeks through it; since a walk removes nothing, to sort once gives the same order.
    """
    if ORDER == "random":
        return rng.permutation(len(last))
    keys = {"adaptive": (last, w), "stale": (last,), "hardest": (w, last)}[ORDER]
    return np.lexsort(keys[::-1])  # its last key comes first


def wanted(t):
    """beta_t: how many correct answers iteration t asks for."""
    return BATCH_SIZE * int(STEPS * GROWTH ** (t - 1))


def outcomes_of(responses):
    """One problem's draws as numbers: 1 is correct, 0 wrong (or cut by the length limit)."""
    return [int(r["correct"] and r["finish"] == "stop") for r in responses]


def choose(outcomes):
    """The draws that enter D+: the correct ones, the first TRACES of them."""
    return [draw for draw, right in enumerate(outcomes) if right][:TRACES or None]


class Walk:
    """A walk at work: when do the problems, in their order, have given `goal` correct answers?

    All processes draw ahead, and tell one another what their problems gave. That decides what is worth asking for, and
    what can be cancelled, but not the result: in the end everything before `end` is known, and nothing else counts.
    """

    def __init__(self, n, goal, rate):
        self.goal, self.total, self.asked, self.log = goal, 0, 0, Log()
        self.gave, self.known = np.zeros(n, int), np.zeros(n, bool)  # answers of a problem to train on; is it done?
        self.end, self.far = n, goal / max(rate, 0.1)  # from `end` on no problem can matter, from `far` on not likely
        self.expected = self.far  # at the rate of the last iteration; what is known counts for more and more
        self.claims, self.held = None, None

    def exchange(self, finished):
        """Tell the others of problems that are finished here, {place: responses}, and hear of theirs."""
        if finished:
            self.log.append([(place, len(choose(outcomes_of(rs)))) for place, rs in finished.items()])
        news = [item for entry in self.log.new() for item in entry]
        for place, answers in news:
            self.gave[place], self.known[place] = answers, True
        if news:
            self.asked = max(self.asked, 1 + max(place for place, _ in news))
            sums, done = self.gave[:self.asked].cumsum(), self.known.sum()
            self.total = int(sums[-1])
            if self.total >= self.goal:  # maybe with gaps before it; what they give can only bring the end nearer
                self.end = self.far = int(np.searchsorted(sums, self.goal)) + 1
            else:  # never short of the first that is unknown, or nobody would take it
                needed = self.goal * (done + self.expected) / (self.total + self.goal)
                self.far = max(done + 1, 1.1 * needed)

    def take(self, size=1):
        """The first of the next `size` places for this process to see to; None where there are none, or not yet."""
        self.claims = self.claims or claims(-(-len(self.gave) // size))
        self.held = next(self.claims, None) if self.held is None else self.held
        if self.held is None or self.held * size >= self.far:
            return None
        place, self.held = self.held * size, None
        return place

    def over(self):
        """Whether all that can matter is known."""
        return self.known[:self.end].all()


def spread(total, beta, rng):
    """How often each of `total` correct answers is trained on, in the order of the walk, for beta_t of them in all."""
    if total < beta and FILL_STEPS and not TRAIN_ON_ALL:
        return [beta // total + (place < beta % total) for place in range(total)]
    if STOP_AT_BETA or TRAIN_ON_ALL or total <= beta:
        return [1] * total
    taken = set(rng.permutation(total)[:beta].tolist())
    return [int(place in taken) for place in range(total)]


def to_commit(visited, solved):
    """AdaC: floor(m alpha^p) of m visited problems, alpha = solved / m; whole numbers, in which it is exact."""
    return visited * solved ** CURRICULUM_POWER // visited ** CURRICULUM_POWER


@at_once()
def select(visited, last, w, outcomes, beta, rng):
    """selection.jsonl: for each visited problem, in the order of the walk, all that was decided, and from what.

    visited: ids; last and w: their t~ and w before; outcomes: of their draws. `chosen` are the draws that enter D+,
    `copies` says how often each is trained on, `committed` whether (t, win_rate) replaces (last, w).
    """
    chosen = list(map(choose, outcomes))
    copies = iter(spread(sum(map(len, chosen)), beta, rng))
    solved = sum(map(any, outcomes))
    alpha, commits = solved / len(visited), to_commit(len(visited), solved)
    rows = zip(range(len(visited)), visited, last.tolist(), w.tolist(), outcomes, chosen)
    return [{"id": i, "visit": visit, "last": before, "w": w_before, "outcomes": draws, "alpha": alpha,
             "win_rate": sum(draws) / len(draws), "chosen": kept, "copies": [next(copies) for _ in kept],
             "committed": visit < commits} for visit, i, before, w_before, draws, kept in rows]


def hinted(problem):
    """Rationalization (Zelikman et al. 2022): the problem, or a worked example, with its answer behind the question."""
    answer = problem.get("answer") or last_boxed(problem["solution"])
    apart = "\n" if "\n" in problem["problem"] else " "
    return {**problem, "problem": f"{problem['problem']}{apart}(Answer: {answer})"}


def sft_loss(logprobs, batch):
    """L = - sum_t log pi(y_t | x, y_<t), a mean over the answer tokens y of the step; the prompts x are not learnt."""
    return -logprobs.sum(), len(logprobs), {}


# The loop -------------------------------------------------------------------------------------------------------------

def make_examples(tokenizer, selection, by_id, responses):
    """D+: the chosen answers as training examples, in the order of the walk."""
    text = {(r["id"], r["draw"]): r["text"] for r in responses}
    return [make_example(tokenizer, PROMPT, by_id[s["id"]], text[s["id"], draw], system=SYSTEM)
            for s in selection for draw, n in zip(s["chosen"], s["copies"]) for _ in range(n)]


def report_selection(run, t, selection, beta, n):
    """How far the walk went and what it gave; where all problems gave less than beta_t, what becomes of that."""
    values = {"beta": beta, "visited": len(selection), "solved": sum(any(s["outcomes"]) for s in selection),
              "solved_at_once": sum(s["outcomes"][0] for s in selection), "alpha": selection[0]["alpha"],
              "committed": sum(s["committed"] for s in selection),
              "answers": sum(len(s["chosen"]) for s in selection), "trained": sum(sum(s["copies"]) for s in selection)}
    run.log(t, "select", **values)
    say(f"  round {t}  {'select':<9} {values['visited']:>7,} of {n:,} visited, {values['solved']:,} solved "
        f"({values['solved_at_once']:,} at once), alpha {values['alpha']:.2f}, {values['committed']:,} committed; "
        f"beta {beta:,}, {values['trained']:,} trained on")
    if 0 < values["answers"] < beta and not TRAIN_ON_ALL:
        fate = f"repeated to {values['trained']:,}" if values["trained"] > values["answers"] else "each trained on once"
        say(f"  round {t}  all problems are visited and gave {values['answers']:,} correct answers of {beta:,}: {fate}")


def report_iteration(run, scores, validation):
    """The iteration to report: the best on the held-out problems (the first of equals); without them the last."""
    names = [name for name in validation or scores if name != "base"]
    if names:
        name = max(names, key=lambda name: validation[name]["accuracy"]) if validation else names[-1]
        t = int(name.split()[1])
        found = {where: scored[name]["accuracy"] for where, scored in (("held_out", validation), ("test", scores))
                 if scored} | {"total_flops": run.metrics[t, "round"]["total_flops"]}
        run.log(0, "reported", iteration=t, **found)
        say(f"reported: {name}, " + ("the best on the held-out problems" if validation else "the last") + "".join(
            f"; {where.replace('_', ' ')} {found[where]:.1%}" for where in ("held_out", "test") if where in found)
            + f"; {found['total_flops']:.2e} FLOPs")


def main():
    if TRAIN_ON_ALL and STOP_AT_BETA:
        fail("--train-on-all needs --no-stop-at-beta: a walk that stops has no more than beta_t")
    if TRACES != 1 and RETRY or TRACES > K_SAMPLES:
        fail(f"--traces {TRACES} needs --no-retry and as many --k-samples: else a problem has fewer correct answers")
    if HINT and K_SAMPLES == 1:
        fail("--hint needs --k-samples above 1: it is for draws after the first")
    if GROWTH < 1:
        fail(f"--growth {GROWTH}: the steps shrink, in the end to none; 1 keeps them as they are")
    tokenizer = load_tokenizer(MODEL, PROMPT, SYSTEM)
    problems = load_problems(TRAIN_DATA, "train", DATA, N_TRAIN)
    problems, held_out = hold_out(problems, HELD_OUT, SEED)
    tests = load_problems(TEST_DATA, "test", DATA, N_TEST) if TEST_DATA or not held_out else []
    examples = [p for p in load_problems(EXAMPLES_FROM, "train", DATA) if "solution" in p] if EXAMPLES_FROM else []
    if EXAMPLES_FROM and not examples:
        fail(f"--examples-from {EXAMPLES_FROM}: no problem in it has a solution")
    run = start_run(globals(), problems, held_out, tests)
    examples = [examples[i] for i in run.rng("examples").permutation(len(examples))[:SHOTS + 1]]
    place = {p["id"]: i for i, p in enumerate(problems)}
    by_id = {p["id"]: p for p in problems}
    say(f"  data     {len(problems):,} training problems, {len(held_out):,} held out; {len(tests):,} test problems")

    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)

    def few_shot(problem, draw):
        shown = [e for e in examples or worked_examples(problem) if e["problem"] != problem["problem"]]
        shown = shown[:SHOTS if PROMPT != "zero_shot" else 0]
        if HINT and draw > 0:
            problem, shown = hinted(problem), [hinted(e) for e in shown]
        return make_prompt(tokenizer, PROMPT, problem, shown, SYSTEM)

    def zero_shot(problem, draw):
        return make_prompt(tokenizer, "chat" if PROMPT == "chat" else "zero_shot", problem, system=SYSTEM)

    def score(t, model, name, prompt):
        """Greedy accuracy on the test problems and on those held out."""
        for into, suffix, those in ((scores, "", tests), (validation, "_held_out", held_out)):
            if those:
                into[name] = evaluate(run, f"round_{t}/eval{suffix}.json", model, those, prompt, round=t,
                                      phase=f"eval{suffix}", **greedy)

    model, scores, validation = MODEL, {}, {}
    score(0, model, "base", few_shot)
    end_round(run, 0)
    last, w, alpha = np.zeros(len(problems), int), np.zeros(len(problems)), 0.5  # t~, w, and at first a guess
    for t in range(1, ROUNDS + 1):
        # 1. AdaD (Alg. 1, lines 5-12): walk from the stalest and hardest until beta_t correct answers are there
        beta, order = wanted(t), walk_order(last, w, run.rng(t, "order"))
        responses = run.once(f"round_{t}/responses.jsonl", lambda: sample(
            run, model, [problems[i] for i in order], K_SAMPLES, few_shot,
            enough=(lambda draws: outcomes_of(draws)[-1] == 1) if RETRY else None,
            walk=Walk(len(problems), beta, alpha) if STOP_AT_BETA else None, round=t, phase="sample", **drawn))
        visited = by_problem(responses)
        before = [place[i] for i in visited]
        outcomes = [outcomes_of(rs) for rs in visited.values()]
        selection = run.once(f"round_{t}/selection.jsonl", lambda: select(
            list(visited), last[before], w[before], outcomes, beta, run.rng(t, "cut")))
        report_selection(run, t, selection, beta, len(problems))
        show_answers(problems, responses)

        # 2. Train(pi_t, D+) (line 14): with a fresh optimizer
        d_plus = make_examples(tokenizer, selection, by_id, responses)
        if d_plus:
            d_plus = run.once(f"round_{t}/train.jsonl", lambda: d_plus)
            start = model if START == "previous" else MODEL
            model = run.once(f"round_{t}/model", lambda to: train(
                run, start, d_plus, sft_loss, to, round=t, lr=LR, warmup=WARMUP, decay=False, epochs=1,
                batch_size=BATCH_SIZE, max_tokens=MAX_TOKENS, weight_decay=WEIGHT_DECAY, clip=CLIP))
        else:
            say(f"  round {t}  {len(responses):,} answers and none is correct: D+ is empty, the model stays as it is")

        # 3. AdaC (lines 15-19): the first floor(m alpha^2) visited have now been seen; the others stay where they are
        alpha = selection[0]["alpha"]
        for s in selection:
            if s["committed"]:
                last[place[s["id"]]], w[place[s["id"]]] = t, s["win_rate"]
        score(t, model, f"round {t}", zero_shot)
        end_round(run, t)
    final_table(run, scores or validation)
    report_iteration(run, scores, validation)


if __name__ == "__main__":
    override_from_cli(globals())
    main()
