"""HS-STaR: hierarchical sampling for self-taught reasoners (Xiong et al. 2025, https://arxiv.org/abs/2505.19866).

A model answers training problems and learns from its right and wrong answers. HS-STaR draws a few answers to each
problem to find those at the edge of what the model can do, and spends the rest of a fixed budget there.

  M_0 writes its solutions in steps, separated by blank lines. In round t = 1..3, each on its own N problems (code):
  1. Pre-sample n_p answers to each problem. A checker says which are right, a process reward model (PRM) how good the
     steps of each look: S(r) = min over its steps. phi_a = share right, phi_r = mean of S. The class is (code)
       inlier   if phi_a = 1 and phi_r > tau_high        (solved, and soundly)
       outlier  if phi_a = 0 and phi_r < tau_low         (hopeless for now)
       boundary otherwise.
  2. Re-sample: the remaining (n - n_p) N answers of the budget go to the boundary problems, evenly (paper, code).
  3. Pairs, per boundary problem: K = min(right, wrong); the K right answers with the highest S against the K wrong ones
     with the highest S (code).  M_t = DPO of M_{t-1} on them (code), with M_{t-1} as the reference (ours).

We had the paper's abstract, its first lines and a figure; its code lacks the programs for sampling and training, and so
the loss; plain DPO is our choice. Thresholds are known for one of the paper's three backbones, Qwen2.5-7B.
Differences from the code: M_0 is MODEL as it is, unless there is a STEP_SET (solutions with blank lines between steps);
phi_r is a mean over all n_p answers, not only the distinct ones; exactly the budget is drawn, while the code draws more
and drops the excess; a cut answer counts as wrong and is in no pair; in DPO, prompt and answer stay whole, while the
code caps both together at 2,048 tokens; answers are checked with math-verify, never taken from the last number;
AIME24 and AMC23 are for eval.py (--samples 32 with --temperature, and SYSTEM's text as --first).

  python hs_star.py --toy                                     2 CPU cores: 1 min, 57% (measured)
  python hs_star.py --model Qwen/Qwen2.5-7B                   one GPU: not measured yet
  torchrun --nproc-per-node 8 hs_star.py                      eight GPUs: not measured yet"""
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import (bar, by_problem, compute_dtype, context_of, device, encode, end_round, evaluate, fail, final_table,
                    gather, give_memory_back, hidden_states, launch, load_network, load_solved, load_tokenizer,
                    local_folder, make_example, make_prompt, outcomes_of, pack, packed_attention, phase, prepare, rank,
                    report, round_and_phase, sample, say, sequence_logprobs, show_answers, spread_evenly,
                    threads_per_process, torn_lines, train, weight_files, worked_examples, world_size, write_line)
import torch  # after common, which keeps torch's threads from spinning
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import AttentionInterface, AutoModel

# What to run
MODEL = "Qwen/Qwen2.5-7B"  # M_0, or the base to train on STEP_SET first: a Hub name or a folder (code)
START = "previous"  # "base" | "previous": what each round trains from, and its reference; "base" is M_0 (code)
PRM = "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B"  # Hub name or folder; empty is none, for arms without rewards (code)
STEP_SET = ""  # solutions in steps, to train M_0 on first; empty: MODEL is M_0 (ours; code: MATH's, rewritten)
TRAIN_DATA = "gsm8k,math"  # names of sets, files or owner/name on the Hub, comma-separated (ours; code: NuminaMath-1.5)
TEST_DATA = "gsm8k,math500,minerva_math,olympiadbench,college_math"  # scored each round (code)
N_TRAIN = 0  # problems from each training set; 0 is all (ours)
N_TEST = 0  # problems from each test set; 0 is all (code)
HELD_OUT = 0  # training problems set aside, scored in a separate table (TEST_DATA may be empty); 0 is none (ours)
SLICE = 4900  # N: problems per round, different in each round while they last (ours; 7,500 in the code)
ROUNDS = 3  # after round 0 (code)
SEED = 0  # for everything random (ours)

# The method: README's table of commands lists the flags for other arms
BUDGET = 8  # n: answers per problem in a round, on average (code)
PRE_SAMPLES = 3  # n_p: how many of them come before the decision; as many as BUDGET is uniform iterative DPO (code)
DIFFICULTY = "both"  # "both" | "accuracy" | "reward": what to classify by: phi_a and phi_r, or only one (paper: both)
TAU_LOW = 0.0  # phi_r is low below it; 0 takes the known value from TAUS (code)
TAU_HIGH = 0.0  # phi_r is high above it; 0 takes the known value from TAUS (code)
REPORT_ONLY = False  # pre-sample round 1, show phi_r by phi_a and stop, to choose thresholds (ours)
PAIRING = "hard"  # "hard" | "random": by S, or at random (code: hard)
BETA = 0.1  # of DPO: how strongly the policy is held to its starting model (ours)
NLL_WEIGHT = 0.0  # weight of the chosen answers' log-likelihood in the loss; 0 is plain DPO (ours)

# Sampling
PROMPT = "zero_shot"  # "few_shot" | "zero_shot" | "chat": one form for drawing, training and scoring (code)
SHOTS = 4  # our own worked examples before a problem, with few_shot (ours)
SYSTEM = "Reason in steps divided by blank lines, and put the final answer within \\boxed{}."  # before prompts (ours)
THINK = ""  # "" | "on" | "off": with "chat", whether to think before the answer; for templates that know it (ours)
TEMPERATURE = 0.7  # for all draws (code)
TOP_P = 0.95  # 1: off (code)
TOP_K = 0  # 0: off (code)
MAX_NEW_TOKENS = 2048  # longer answers are cut off and not trained on (code)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason); empty is math-verify (ours)

# Training
LR = 1e-6  # peak for SFT on STEP_SET; cosine decay to 0 (code)
LR_DPO = 5e-7  # peak for DPO; cosine decay to 0 (code)
WARMUP = 0.03  # share of the steps if below 1, else their number; 0 is none (code)
EPOCHS = 1  # passes over the pairs, and over STEP_SET (code)
BATCH_SIZE = 256  # pairs (answers) per optimizer step, over all GPUs (code)
WEIGHT_DECAY = 0.0  # for AdamW; 0 is none (code)
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
LEGAL = dict(START=("base", "previous"), SLICE=1, BUDGET=1, PRE_SAMPLES=1, DIFFICULTY=("both", "accuracy", "reward"),
             PAIRING=("hard", "random"), PROMPT=("few_shot", "zero_shot", "chat"), THINK=("", "on", "off"),
             MAX_NEW_TOKENS=1, EPOCHS=1, BATCH_SIZE=1, ENGINE=("", "vllm", "transformers"), MAX_TOKENS=1)

# Thresholds depend on the PRM and the policy; only these are known, for M_0 trained from Qwen2.5-7B (code)
TAUS = {("Skywork-o1-Open-PRM-Qwen-2.5-7B", "Qwen2.5-7B"): (0.15, 0.65),
        ("Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "Qwen2.5-7B"): (0.25, 0.50),
        ("Qwen2.5-Math-PRM-7B", "Qwen2.5-7B"): (0.55, 0.99)}

TOY = dict(MODEL="tests/toy/model", PRM="tests/toy/prm", TRAIN_DATA="tests/toy/train.jsonl",
           TEST_DATA="tests/toy/test.jsonl", N_TEST=300, SLICE=200, TAU_LOW=0.1, TAU_HIGH=0.8, SYSTEM="",
           MAX_NEW_TOKENS=96, LR_DPO=1e-4, BATCH_SIZE=16, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def slice_of(n, t, run):
    """Return the indices of round t's problems among n: SLICE of them, in order.

    Rounds have none in common until fewer than SLICE are left; then they start over in a different order."""
    slices = max(1, n // SLICE)
    order = run.rng("slices", (t - 1) // slices).permutation(n)
    start = (t - 1) % slices * SLICE
    return sorted(order[start:start + SLICE].tolist())


def reward_of(steps):
    """Return S(r), the reward of a response: its lowest step reward, or 0 if the PRM could read no step."""
    return min(steps, default=0.0)


def difficulty_of(outcomes, rewards):
    """Return (phi_a, phi_r, class) of a problem from its n_p pre-samples: share correct, mean reward, and "inlier",
    "outlier" or "boundary". A value on a threshold is not beyond it; the mean is exact, so 0.65 three times is 0.65."""
    phi_a = outcomes.count(1) / len(outcomes)
    phi_r = statistics.mean(rewards)
    tau_low, tau_high = thresholds()
    by_reward = DIFFICULTY == "reward"
    by_accuracy = DIFFICULTY == "accuracy"
    if (phi_a == 1 or by_reward) and (phi_r > tau_high or by_accuracy):
        return phi_a, phi_r, "inlier"
    if (phi_a == 0 or by_reward) and (phi_r < tau_low or by_accuracy):
        return phi_a, phi_r, "outlier"
    return phi_a, phi_r, "boundary"


def thresholds():
    """Return (tau_low, tau_high): as given, else the known ones for this PRM and model, else zeros."""
    low, high = TAUS.get((Path(PRM).name, Path(MODEL).name), (0.0, 0.0))
    return TAU_LOW or low, TAU_HIGH or high


def quotas(classes, rng):
    """Return how many more answers each problem gets: the rest of the budget, spread evenly over the boundary, with the
    remainder at random. 101 problems, 56 of them boundary: of 505 answers, 55 problems get 9 and one gets 10."""
    total = (BUDGET - PRE_SAMPLES) * len(classes)
    counts = iter(spread_evenly(total, max(1, classes.count("boundary")), rng))
    return [next(counts) if name == "boundary" else 0 for name in classes]


def choose_pairs(outcomes, rewards, rng):
    """Return [(draw to prefer, draw to reject)]: K right and K wrong draws of a problem, K the smaller number, those
    with the highest reward (the first of ties), paired at random; so the rejected ones are hard to tell apart."""
    draws = sorted(range(len(outcomes)), key=lambda draw: -rewards[draw])
    if PAIRING == "random":
        draws = rng.permutation(draws).tolist()
    right = [draw for draw in draws if outcomes[draw] == 1]
    wrong = [draw for draw in draws if outcomes[draw] == 0]
    k = min(len(right), len(wrong))
    return list(zip(rng.permutation(right[:k]).tolist(), rng.permutation(wrong[:k]).tolist()))


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


def dpo_nll_loss(logprobs, batch):
    """dpo_loss + NLL_WEIGHT times - log pi(y_w|x) / |y_w|, which keeps the chosen answers likely (Pang et al. 2024)."""
    loss, pairs, metrics = dpo_loss(logprobs, batch)
    chosen = [part.mean() for part in logprobs.split(batch["counts"])[0:2 * pairs:2]]
    return loss - NLL_WEIGHT * sum(chosen), pairs, metrics


# Process rewards: how right each step of a response looks to a process reward model (PRM) -----------------------------

MARKS = {"v_head": "\n\n", "score": "<extra_0>"}  # what ends each step, by layout
PRM_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # what "score" was trained with
PRM_BATCH = 64  # responses read together; fixed, because the batch affects the last digits of the rewards


class RewardModel:
    """A PRM in one of two published layouts, recognized by the tensors of its head. Code in its folder is never run.

    "v_head", Skywork-o1-Open-PRM: a linear layer gives the logit of right. "score", Qwen2.5-Math-PRM: in a chat; two
    layers give the logits of wrong and right. (We could not download either; tests have small models of both forms.)"""

    def __init__(self, name):
        """Load all but the backbone from a folder or the Hub; end the program if it is not such a PRM."""
        self.folder = local_folder(name)
        self.tokenizer = load_tokenizer(name, "")
        self.context = context_of(name)
        tensors = {}
        for path in weight_files(name):
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    layout, _, rest = key.partition(".")
                    if layout in MARKS:
                        self.layout = layout
                        tensors[rest.replace("summary.", "0.")] = file.get_tensor(key)
        if not tensors:
            fail(f"{name} is not a process reward model of a known layout: it has no tensor v_head or score")
        size = tensors["0.weight"].shape[1]
        self.head = nn.Sequential(nn.Linear(size, 1), nn.Sigmoid())
        if self.layout == "score":
            self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2), nn.Softmax(1))
        self.head.load_state_dict(tensors)  # into float32
        mark = MARKS[self.layout]
        self.mark = self.tokenizer(mark, add_special_tokens=False)["input_ids"]
        if len(self.mark) != 1:
            fail(f"{name}: its tokenizer has no token for the end of a step, {mark!r}")

    def load(self):
        """Load the backbone onto this process's device."""
        AttentionInterface.register("packed", packed_attention)
        body = load_network(AutoModel, self.folder, dtype=compute_dtype(), attn_implementation="packed")
        self.body = body.to(device())
        self.head.to(device())

    def encode(self, problem, text):
        """Return a response's token ids, cut at the context, and the indices of the marks after its steps.

        Blank lines separate steps. A problem that leaves no room for a mark has none."""
        prompt = f"{self.tokenizer.bos_token or ''}{problem['problem']}\n"
        if self.layout == "score":
            prompt = make_prompt(self.tokenizer, "chat", problem, system=PRM_SYSTEM)
        ids = encode(self.tokenizer, prompt)[:self.context]
        places = []
        # A mark in the response itself is split into plain text
        steps = self.tokenizer(text.split("\n\n"), add_special_tokens=False, split_special_tokens=True)
        for step in steps["input_ids"]:
            if len(ids) < self.context:
                ids = (ids + step)[:self.context - 1] + self.mark
                places.append(len(ids) - 1)
        return ids, places

    @torch.inference_mode()
    def read(self, problems, responses):
        """Return [[tokens, rewards of the steps]] of a batch; end the program if a reward is not finite.

        problems: {id: problem}. The head reads every token in float32, which costs little."""
        rows = [self.encode(problems[r["id"]], r["text"]) for r in responses]
        batch = pack([[(ids, [])] for ids, _ in rows])
        batch["predict"] = slice(None)
        rewards = self.head(hidden_states(self.body, batch).float())[:, -1]
        if not rewards.isfinite().all():
            fail(f"{self.folder}: its rewards are not finite")
        parts = rewards.cpu().split([len(ids) for ids, _ in rows])
        return [[len(part), part[places].tolist()] for part, (_, places) in zip(parts, rows)]


def key_of(response):
    """Return the key of a response for the PRM: responses with the same key are read once."""
    return response["id"] + "\n" + response["text"]


def read_responses(run, name, prm, problems, responses):
    """Return {key_of(response): [tokens, rewards of its steps]}, read by all processes; resume from run.unfinished."""
    found = {}
    for part in torn_lines(run.unfinished, f"{name}@*"):
        found.update(part)
    by_id = {problem["id"]: problem for problem in problems}
    different = {key_of(response): response for response in responses}
    keys = sorted(different, key=len, reverse=True)
    batches = [keys[start:start + PRM_BATCH] for start in range(0, len(keys), PRM_BATCH)]
    due = [batch for batch in batches[rank()::world_size()] if batch[0] not in found]

    def read(batch):
        return dict(zip(batch, prm.read(by_id, [different[key] for key in batch])))

    run.unfinished.mkdir(parents=True, exist_ok=True)
    cores = 1 if device().type == "cuda" else threads_per_process()  # each reads its own batch, with one thread
    with (open(run.unfinished / f"{name}@{rank()}.jsonl", "a") as file, bar(len(due), name) as shown,
          ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool):
        for part in pool.map(read, due):
            found.update(part)
            write_line(file, part)
            shown.update()
    for part in gather(found):
        found.update(part)
    return found


@phase
def step_rewards(run, file, prm, problems, responses):
    """Return [{"id", "draw", "reward", "step_rewards"}] of responses, in order; file is round_<t>/<phase>.jsonl."""
    began = time.time()
    round, phase = round_and_phase(file)
    slept = run.engine.sleep()
    prm.load()
    found = read_responses(run, f"round_{round}-{phase}", prm, problems, responses)
    cost = 2.0 * prm.body.num_parameters()  # FLOPs of a token
    prm.body = None
    give_memory_back()
    records = []
    for response in responses:
        _, steps = found[key_of(response)]
        records.append({"id": response["id"], "draw": response["draw"], "reward": reward_of(steps),
                        "step_rewards": steps})
    steps = [record["step_rewards"] for record in records]
    lengths = [length for length, _ in found.values()]
    tokens = sum(lengths)
    report(run, round, phase, responses=len(responses), different=len(found), steps=sum(map(len, steps)),
           tokens=tokens, filled_context=lengths.count(prm.context), unread=steps.count([]), flops=cost * tokens,
           spent_flops=cost * tokens, seconds=time.time() - began, **slept)
    return records


# The loop -------------------------------------------------------------------------------------------------------------

def draw_and_read(run, file, prm, model, problems, draws, prompt, drawn):
    """Draw answers and have the PRM read them. Return them, each with its steps' rewards and S(r), 0 without a PRM.
    file: round_1/pre or round_1/re, to which "samples.jsonl" and "rewards.jsonl" are appended."""
    responses = sample(run, f"{file}samples.jsonl", model, problems, draws, prompt, **drawn)
    if not prm:
        return [response | {"reward": 0.0} for response in responses]
    rewards = step_rewards(run, f"{file}rewards.jsonl", prm, problems, responses)
    return [response | reward for response, reward in zip(responses, rewards)]


def classify(problems, presamples):
    """Return [(phi_a, phi_r, class)], parallel to problems, from their pre-samples."""
    by_id = by_problem(presamples)
    difficulties = []
    for problem in problems:
        drawn = by_id[problem["id"]]
        difficulties.append(difficulty_of(outcomes_of(drawn), [r["reward"] for r in drawn]))
    return difficulties


def select(problems, difficulties, counts, responses, run, t):
    """Make selection.jsonl: for each problem, everything that was decided and the numbers behind it; `quota` is the
    number of answers beyond its pre-samples, which come first in `outcomes` and `rewards`."""
    by_id = by_problem(responses)
    selection = []
    for problem, (phi_a, phi_r, name), quota in zip(problems, difficulties, counts):
        drawn = by_id[problem["id"]]
        outcomes = outcomes_of(drawn)
        rewards = [r["reward"] for r in drawn]
        pairs = []
        if name == "boundary" and 0 in outcomes and 1 in outcomes:
            pairs = choose_pairs(outcomes, rewards, run.rng(t, "pairs", problem["id"]))
        selection.append({"id": problem["id"], "phi_a": phi_a, "phi_r": phi_r, "class": name, "quota": quota,
                          "outcomes": outcomes, "rewards": rewards, "pairs": pairs})
    return selection


def report_rewards(run, t, difficulties):
    """Report quantiles of the problems' phi_r by phi_a, to choose thresholds from."""
    found = {}
    for phi_a in sorted({a for a, _, _ in difficulties}):
        phi_r = [r for a, r, _ in difficulties if a == phi_a]
        quantiles = {f"{q:.0%}": np.quantile(phi_r, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        found[f"phi_a {phi_a:.3f}"] = {"problems": len(phi_r), **quantiles}
    report(run, t, "phi_r", **found)


def report_selection(run, t, selection):
    """Report per class: problems, answers drawn, share right; and the pairs."""
    classes = {}
    for name in ("inlier", "boundary", "outlier"):
        outcomes = [s["outcomes"] for s in selection if s["class"] == name]
        drawn = sum(map(len, outcomes))
        correct = sum(o.count(1) for o in outcomes) / max(1, drawn)
        classes[name] = {"problems": len(outcomes), "draws": drawn, "correct": correct}
    report(run, t, "select", **classes, pairs=sum(len(s["pairs"]) for s in selection))


def check_constants():
    """End the program if constants contradict each other."""
    if PRE_SAMPLES > BUDGET:
        fail(f"--pre-samples {PRE_SAMPLES} must not exceed --budget {BUDGET}")
    if not PRM and (DIFFICULTY != "accuracy" or PAIRING != "random" or REPORT_ONLY):
        fail("without --prm there are no rewards and nothing to report; only --difficulty accuracy with --pairing "
             "random works without it")
    if DIFFICULTY == "accuracy" or REPORT_ONLY:
        return
    low, high = thresholds()
    if not 0 < low < high:
        fail(f"--tau-low {low} and --tau-high {high} for {PRM} with {MODEL}: if none are known, give both, with "
             "--tau-high above --tau-low; --report-only prints the numbers to choose them from")


def main():
    check_constants()
    prm = RewardModel(PRM) if PRM else None
    solved = load_solved(STEP_SET, DATA)
    run, tokenizer, problems, tests = prepare(globals(), solved, models=[PRM] if PRM else [])
    aside = {p["problem"] for p in tests.get("held_out", [])}
    solved = [p for p in solved if p["problem"] not in aside]
    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, clip=CLIP,
                    lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA)
    shots = SHOTS if PROMPT == "few_shot" else 0
    if prm:
        say(f"  taus     {thresholds()}")
    if ROUNDS * SLICE > len(problems):
        say("           there are fewer problems than --rounds times --slice, so some repeat")

    def ask(problem, draw=0):
        text = make_prompt(tokenizer, PROMPT, problem, worked_examples(problem)[:shots], SYSTEM, THINK)
        return f"{SYSTEM}\n\n{text}" if SYSTEM and PROMPT != "chat" else text

    def example(problem, *answers):
        return make_example(tokenizer, PROMPT, problem, *answers) | {"prompt": ask(problem)}

    def pre_sample(t, model):
        own = [problems[i] for i in slice_of(len(problems), t, run)]
        presamples = draw_and_read(run, f"round_{t}/pre", prm, model, own, PRE_SAMPLES, ask, drawn)
        difficulties = classify(own, presamples)
        if prm:
            report_rewards(run, t, difficulties)
        return own, presamples, difficulties

    # M_0: SFT of the base on solutions in steps
    m_0 = MODEL
    if solved:
        d_0 = [example(p, p["solution"]) for p in solved]
        m_0 = train(run, "round_0/model", MODEL, d_0, sft_loss, lr=LR, **training)
    if REPORT_ONLY:
        pre_sample(1, m_0)
        return say("now choose --tau-low, --tau-high and a different --name; nothing is drawn twice if you copy this "
                   "run's round_1/presamples.jsonl and prerewards.jsonl (and round_0/) there and change nothing else")
    scores = {"round 0" if solved else "base": evaluate(run, "round_0/eval", m_0, tests, ask, **greedy)}
    end_round(run, 0, keep=[m_0])

    model = m_0
    for t in range(1, ROUNDS + 1):
        # 1. Pre-sample n_p answers to each problem of the slice; phi_a and phi_r show where the boundary is
        own, presamples, difficulties = pre_sample(t, model)

        # 2. Re-sample: the remaining (n - n_p) N answers go to the boundary
        counts = quotas([name for _, _, name in difficulties], run.rng(t, "quotas"))
        more = draw_and_read(run, f"round_{t}/re", prm, model, own, counts, ask, drawn)
        responses = presamples + more

        # 3. Pairs of the boundary's answers; M_t = DPO of M_{t-1}
        selection = run.once(f"round_{t}/selection.jsonl", select, own, difficulties, counts, responses, run, t)
        report_selection(run, t, selection)
        show_answers(run, t, own, responses)
        answers_to = by_problem(responses)
        pairs = []
        for problem, s in zip(own, selection):
            for pair in s["pairs"]:
                answers = [answers_to[s["id"]][draw] for draw in pair]
                pairs.append(example(problem, *answers))
        if pairs:
            pairs = run.once(f"round_{t}/train.jsonl", list, pairs)
            start = model if START == "previous" else m_0
            model = train(run, f"round_{t}/model", start, pairs, dpo_nll_loss, lr=LR_DPO, reference=True, **training)
        else:
            say(f"  round {t}  no boundary problem has right and wrong answers: no pair, so the model stays as it is")
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval", model, tests, ask, **greedy)
        end_round(run, t, keep=[m_0, model])
    final_table(run, scores)


if __name__ == "__main__":
    launch(main, globals())
