"""SAI-DPO: self-aware iterative DPO with dynamic sampling (Rao et al. 2025, https://arxiv.org/abs/2505.16176).

A model answers training problems and learns from its right and wrong answers. Before each round, SAI-DPO finds out what
the model is weak at: it probes a few problems of every kind, and draws the round's problems to match.

  Once: a tagger names the knowledge points T(x) of each problem x, a sentence encoder turns them into a vector, and
  K-Means groups the vectors into clusters C_j (paper). 1% of the problems (paper), some from each cluster, are its
  probe S_j. In round t = 1..5, with K = 8 answers (paper) by pi_{t-1} to a problem, p(x) the share right:
  1. Probe (paper). Error mass of a cluster, where A_j are its problems not yet drawn, and its share (formulas: ours):
       m(j) = |A_j| / |S_j| * sum over S_j of (1 - p(x)), in units of the probe,     q(j) = (m(j) + a) / sum of (m + a)
  2. Draw 20,000 problems, none twice: P(x) ~ q(j) d(j) / |A_j|, d(j) the mean over S_j of 4 p (1 - p) (formula: ours).
  3. Draw K answers to each. Self-aware difficulty is the key (1 - p, mean steps, mean length), compared in that order
     (paper). Of the learnable problems, answered both right and wrong, train on those nearest to p = 1/2, the hardest
     first among ties: at most 5,000, each cluster with its share q(j) (ours).
  4. Pairs: a random right answer against a random wrong one (paper). pi_t = DPO of pi_{t-1}, its reference too (proxy).

We had no access to the paper's body, and no code was released: (paper) is what its abstract and reviews say, (proxy) is
from Online-DPO-R1, with 20,000 prompts a round, or a later paper by one of the authors; all else is ours, with three
readings: a round's "20,000 training samples" are drawn before the filter (to train on as many: --pairs-per-round 20000,
and more --samples-per-round); P@K is the share right, as the abstract's "pass rates" suggest (a review: "at least one
of K"); the model's "frontier", not too easy or difficult, is p = 1/2, in draw and filter (by the key alone: --prefer
hardest --no-difficulty-before). Also ours: probe problems are never trained on, so that probes are comparable; all arms
probe, so that they cost the same; cut answers count as wrong and are in no pair; no label smoothing (proxies: 0.1).

  python sai_dpo.py --toy                                     2 CPU cores: 1.6 min, 62% (measured)
  python sai_dpo.py --tag && python sai_dpo.py                one GPU: not measured yet
  torchrun --nproc-per-node 8 sai_dpo.py                      eight GPUs: not measured yet"""
import math
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from common import (MACHINE, by_problem, device, end_round, evaluate, fail, final_table, launch, load_network,
                    load_problems, load_tokenizer, local_folder, make_example, make_prompt, outcomes_of, prepare, read,
                    report, sample, say, seed_of, sequence_logprobs, show_answers, start_run, train, worked_examples)
import torch  # after common, which keeps torch's threads from spinning
import torch.nn.functional as F
from transformers import AutoModel

# What to run
MODEL = "Qwen/Qwen2.5-Math-7B"  # pi_0: a Hub name or a folder (paper)
START = "previous"  # "base" | "previous": what each round trains from, and its reference; "base" is pi_0 (proxy)
TRAIN_DATA = "zwhe99/DeepMath-103K"  # names of sets, files or owner/name on the Hub, comma-separated (ours; not known)
TEST_DATA = "gsm8k,math,minerva_math,gaokao2023en,olympiadbench,college_math,aime24,amc23"  # scored each round (proxy)
N_TRAIN = 0  # problems from each training set; 0 is all (ours)
N_TEST = 0  # problems from each test set; 0 is all (ours)
HELD_OUT = 0  # training problems set aside, scored in a separate table (TEST_DATA may be empty); 0 is none (ours)
ROUNDS = 5  # after round 0 (ours)
SEED = 0  # for everything random (ours)

# Knowledge points
TAG = False  # have TAGGER tag the training problems for all later runs, and stop (paper: offline)
TAGGER = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"  # its tags are used if --tag was run; else the text (paper)
OWN_TAGS = True  # problems with their own tags keep them (MATH: seven, so seven clusters) and skip the tagger (ours)
TAG_TOKENS = 2048  # the most tokens that the tagger may generate, thinking included (ours)
EMBEDDER = "sentence-transformers/all-mpnet-base-v2"  # a Hub name or a folder, or tfidf (ours)
N_CLUSTERS = 20  # of the training problems; fewer if fewer are distinct (ours)

# The method
SELECT = "both"  # "both" | "knowledge" | "difficulty" | "random" | "static": static: shares from probe 1 (ours)
PROBE = 0.01  # share of the problems to probe (paper), at least 2 of each cluster (ours)
SAMPLES_PER_ROUND = 20000  # problems drawn, before the filter (paper; this reading: ours)
K_SAMPLES = 8  # K: answers to each problem, probed or drawn; p is the share right (paper)
SMOOTHING = 1.0  # a: mass added to each cluster; 0 draws only where the probe failed, while there are any (ours)
DIFFICULTY_BEFORE = True  # weight the draw by the probe's mean of 4 p (1 - p) in the cluster, at least 0.1 (ours)
PREFER = "middle"  # "middle" | "hardest": take the learnable nearest to p = 1/2, or the hardest by the key (ours)
PAIRS_PER_ROUND = 5000  # at most: about half of what is learnable with SELECT = "random" (ours)
BETA = 0.1  # of DPO: how strongly the policy is held to its starting model (proxy)

# Sampling
PROMPT = "chat"  # "few_shot" | "zero_shot" | "chat": one form for drawing, training and scoring (proxy)
SHOTS = 4  # our own worked examples before a problem, with few_shot (ours)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
THINK = ""  # "" | "on" | "off": with "chat", whether to think before the answer; for templates that know it (ours)
TEMPERATURE = 1.0  # for all draws (proxy)
TOP_P = 1.0  # 1: off (proxy)
TOP_K = 0  # 0: off (proxy)
MAX_NEW_TOKENS = 3072  # longer answers are cut off and not trained on (ours; the proxy's 4096 would fill the context)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason); empty is math-verify (ours)

# Training
LR_DPO = 5e-7  # peak for DPO; cosine decay to 0 (proxy)
WARMUP = 0.03  # share of the steps if below 1, else their number; 0 is none (ours)
EPOCHS = 2  # passes over the pairs (proxy)
BATCH_SIZE = 128  # pairs per optimizer step, over all GPUs (proxy)
WEIGHT_DECAY = 0.0  # for AdamW; 0 is none (proxy)
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
ARMS = {"both": ("clusters", "difficulty"), "static": ("clusters", "difficulty"), "knowledge": ("clusters",),
        "difficulty": ("difficulty",), "random": ()}  # for each SELECT: what it draws and keeps by
LEGAL = dict(START=("base", "previous"), TAG_TOKENS=1, N_CLUSTERS=1, SELECT=tuple(ARMS), SAMPLES_PER_ROUND=1,
             K_SAMPLES=1, PREFER=("middle", "hardest"), PAIRS_PER_ROUND=1, PROMPT=("few_shot", "zero_shot", "chat"),
             THINK=("", "on", "off"), MAX_NEW_TOKENS=1, EPOCHS=1, BATCH_SIZE=1, MAX_TOKENS=1,
             ENGINE=("", "vllm", "transformers"))

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TEST=300,
           ROUNDS=3, EMBEDDER="tfidf", N_CLUSTERS=5, PROBE=0.04, SAMPLES_PER_ROUND=350, PAIRS_PER_ROUND=100,
           PROMPT="zero_shot", MAX_NEW_TOKENS=96, LR_DPO=1e-4, BATCH_SIZE=16, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def steps_of(text):
    """Count the steps of a response: its "Step k" markers, or where there are none, the blocks between blank lines."""
    marked = re.findall(r"(?im)^[ \t]*(?:#+ *)?(?:\*\*)?step[ \t]+\d+", text)
    blocks = re.split(r"\n\s*\n", text.strip())
    return len(marked) or len(blocks)


def measure(responses):
    """Return [{id, outcomes, p, steps, length}] of problems, probed or drawn, from K answers each: p is the share
    right, steps and length are means. A cut answer is wrong and in neither mean; if all were cut, both are 0."""
    rows = []
    for i, drawn in by_problem(responses).items():
        outcomes = outcomes_of(drawn)
        whole = [r for r in drawn if r["finish"] == "stop"]
        steps = [steps_of(r["text"]) for r in whole]
        lengths = [r["tokens"] for r in whole]
        rows.append({"id": i, "outcomes": outcomes, "p": outcomes.count(1) / len(outcomes),
                     "steps": statistics.fmean(steps or [0]), "length": statistics.fmean(lengths or [0])})
    return rows


def probe_of(clusters, rng):
    """Return the indices of the problems to probe, in order: PROBE of each cluster, at least 2 (or all if fewer)."""
    probe = []
    for cluster, size in enumerate(np.bincount(clusters)):
        members = rng.permutation(np.flatnonzero(clusters == cluster))
        probe += members[:max(2, round(PROBE * size))].tolist()
    return sorted(probe)


def mean_by(clusters, values):
    """Return the mean of each cluster (k,) from values (m,) and their clusters (m,)."""
    return np.bincount(clusters, values) / np.bincount(clusters)


def error_masses(rates, clusters, unused):
    """Return m(j), (k,), from p and cluster (m,) of the probed problems and the number of unused ones in each cluster
    (k,): the probe's error rates carried over to these, and scaled to sum to the probe's errors."""
    masses = unused * mean_by(clusters, 1 - rates)
    return masses * sum(1 - rates) / max(masses.sum(), 1e-12)  # 0 where nothing failed


def shares_of(masses):
    """Return q(j), (k,): they sum to one, and are all equal if nothing failed."""
    smoothed = masses + max(SMOOTHING, 1e-12)
    return smoothed / smoothed.sum()


def weights_of(shares, rates, clusters):
    """Return the weights to draw clusters by, (k,), from p and cluster (m,) of the probe; None: all problems alike."""
    if "clusters" not in ARMS[SELECT]:
        return None
    if not DIFFICULTY_BEFORE or "difficulty" not in ARMS[SELECT]:
        return shares
    weights = shares * np.maximum(0.1, mean_by(clusters, 4 * rates * (1 - rates)))
    return weights / weights.sum()


def take(clusters, weights, n):
    """Return the indices of n problems: the first of each cluster, by the clusters' weights (k,); None: the first n."""
    if weights is None:
        return np.arange(len(clusters))[:n]
    room = np.bincount(clusters, minlength=len(weights))
    taken = []
    for cluster, count in enumerate(apportion(weights, room, n)):
        taken.append(np.flatnonzero(clusters == cluster)[:count])
    return np.concatenate(taken)


def draw(unused, clusters, weights, n, rng):
    """Draw n unused problems, as indices: by the clusters' weights, at random within a cluster; None: all at random."""
    unused = rng.permutation(unused)
    return np.sort(unused[take(clusters[unused], weights, n)])


def is_learnable(row):
    """Return whether a problem was answered both right and wrong, so that there is a pair."""
    return 1 in row["outcomes"] and 0 in row["outcomes"]


def priority_of(row):
    """Return a learnable problem's priority, largest first: nearest to p = 1/2, among ties the hardest."""
    key = 1 - row["p"], row["steps"], row["length"]  # self-aware difficulty, larger is harder
    if PREFER == "hardest":
        return key
    return -round(abs(row["p"] - 0.5), 9), key  # rounded, so that 1/3 and 2/3 tie


def keep(rows, shares, rng):
    """Return the learnable rows to train on, at most PAIRS_PER_ROUND: by priority (at random in arms that ignore
    difficulty), of each cluster its share (in arms that use clusters)."""
    learnable = [row for row in rows if is_learnable(row)]
    rng.shuffle(learnable)
    if "difficulty" in ARMS[SELECT]:
        learnable.sort(key=priority_of, reverse=True)
    clusters = np.array([row["cluster"] for row in learnable], dtype=int)
    by = shares if "clusters" in ARMS[SELECT] else None
    return [learnable[i] for i in take(clusters, by, PAIRS_PER_ROUND)]


def choose_pair(outcomes, rng):
    """Return [draw to prefer, draw to reject]: a random right one and a random wrong one."""
    right = [draw for draw, outcome in enumerate(outcomes) if outcome == 1]
    wrong = [draw for draw, outcome in enumerate(outcomes) if outcome == 0]
    return [int(rng.choice(right)), int(rng.choice(wrong))]


def dpo_loss(logprobs, batch):
    """L = - log sigmoid(beta (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x))), averaged over the pairs of
    the step (Rafailov et al. 2023, eq. 7): y_w is the chosen answer, y_l the rejected one, ref the initial policy."""
    gain = sequence_logprobs(logprobs, batch) - batch["reference"]  # of y_w, y_l, y_w, y_l, ...
    margin = BETA * (gain[0::2] - gain[1::2])
    metrics = {"margin": margin.detach().sum(), "preferred": (margin > 0).sum()}
    return -F.logsigmoid(margin).sum(), len(margin), metrics


# Knowledge points: tags from a language model, clusters of tags -------------------------------------------------------

def tag_request(problem):
    """Return the request to the tagger."""
    return ("List the 1 to 5 mathematical knowledge points that are needed to solve this problem, as a JSON list of "
            f"short English phrases, the most general first. Do not solve it.\n\nProblem: {problem['problem']}")


def parse_tags(output):
    """Return the tags in a tagger's output {text, finish}: the first five distinct phrases, in lower case, of the last
    list of quoted strings after its thinking; none if it was cut."""
    if output["finish"] != "stop":
        return []
    text = output["text"].rpartition("</think>")[2][-2000:]
    # Not read as JSON, because models write single quotes, extra commas, and LaTeX such as \frac
    lists = ["", *re.findall(r"""\[(?=\s*["'{])(?:[^]["]|"[^"]{0,200}")*\]""", text)]
    phrases = re.findall(r"""(?s)(?<=[\[,])\s*["'](.{1,80}?)["'](?=\s*[,\]])""", lists[-1])
    phrases = [" ".join(phrase.replace("\\\\", "\\").lower().split()) for phrase in phrases]
    phrases = [phrase for phrase in phrases if re.search(r"[^\W\d_]{2}", phrase)]
    return list(dict.fromkeys(phrases))[:5]


def tags_name(problems):
    """Return the folder under runs/ for the tags of these problems, held-out ones too; all seeds and arms share it."""
    requests = sorted((problem["id"], tag_request(problem)) for problem in problems)
    return f"tags/{seed_of(TAGGER, TAG_TOKENS, requests):x}"


def tag_problems(problems):
    """Have TAGGER name the knowledge points of problems, in at most two tries each. Resume like any run."""
    tagger = load_tokenizer(TAGGER, "chat")
    constants = {name: globals()[name] for name in MACHINE}
    constants |= {"MODEL": TAGGER, "SEED": 0, "GRADER": "", "NAME": tags_name(problems), "__file__": __file__}
    run = start_run(constants, problems)
    untagged = [p for p in problems if not (OWN_TAGS and p.get("tags"))]
    if not untagged:
        fail("--tag: all problems already have tags (--no-own-tags ignores these)")

    def request(problem, draw):
        return make_prompt(tagger, "chat", {"problem": tag_request(problem)})

    def enough(outputs):
        return outputs[-1]["correct"]

    def grade(problem, output):
        return parse_tags(output) != [], "tags"

    outputs = sample(run, "round_0/outputs.jsonl", TAGGER, untagged, 2, request, enough, grade, style="chat",
                     temperature=0.6, top_p=0.95, max_new_tokens=TAG_TOKENS)
    show_answers(run, 0, untagged, outputs)
    say(f"outputs with tags count as correct; runs on these problems use them: {run.folder}/round_0/outputs.jsonl")


def tags_of(problems, held_out):
    """Return the tags of each problem: its own, else those found by --tag, else none."""
    path = Path(f"runs/{tags_name(problems + held_out)}/round_0/outputs.jsonl")
    found = {}
    if path.exists():
        found = {output["id"]: parse_tags(output) for output in read(path)}
    if OWN_TAGS:
        found |= {p["id"]: p["tags"] for p in problems if p.get("tags")}
    tags = [found.get(p["id"], []) for p in problems]
    if [] in tags:
        say(f"  tags     {tags.count([]):,} problems have none, and are grouped by their text (python sai_dpo.py "
            "--tag with the same data tags them first)")
    return tags


def group(problems, tags, run):
    """Group problems by their tags, or by their text if they have none: {id, tags, cluster, probed} of each."""
    texts = [", ".join(own) or p["problem"] for p, own in zip(problems, tags)]
    clusters = cluster_texts(EMBEDDER, texts, N_CLUSTERS, run.rng("clusters"))
    probed = set(probe_of(clusters, run.rng("probe")))
    groups = []
    for i, problem in enumerate(problems):
        groups.append({"id": problem["id"], "tags": tags[i], "cluster": int(clusters[i]), "probed": i in probed})
    return groups


def apportion(shares, room, total):
    """Divide `total` in proportion to `shares` (k,), at most `room` (k,) each: one by one, to the one most short."""
    counts = np.zeros(len(room), dtype=int)
    for _ in range(min(total, room.sum())):
        missing = np.where(counts < room, shares / (2 * counts + 1), -1)  # Webster's method
        counts[np.argmax(missing)] += 1
    return counts


def cluster_texts(encoder, texts, k, rng):
    """Return the cluster of each text (n,), at most k, 0 the largest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in a fixed order, so the number of cores does not change the clusters
    vectors = tfidf(texts) if encoder == "tfidf" else embed(encoder, texts)
    clusters = kmeans(vectors, k, rng)
    torch.set_num_threads(threads)
    return clusters


def tfidf(texts, size=512):
    """Return unit tf-idf vectors (n, size) of texts, hashed: a hash of each word gives its index."""
    counts = np.zeros((len(texts), size), dtype="float32")
    for row, text in zip(counts, texts):
        for word in re.findall(r"\\?[^\W\d_]{2,}", text.lower()):  # two or more letters, or a LaTeX command
            row[seed_of(word) % size] += 1
    texts_with = np.maximum(1, np.count_nonzero(counts, axis=0))
    rarity = np.log(len(texts) / texts_with) + 1e-3  # not quite 0 for a word in all texts
    return F.normalize(torch.from_numpy(np.log1p(counts) * rarity)).numpy()


def read_encoder(name):
    """Return a sentence encoder's tokenizer, set to its length limit; fail unless the encoder uses mean pooling."""
    folder = Path(local_folder(name))
    tokenizer = load_tokenizer(name, "")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.exists():  # a plain model has none, and its mean is used too
        how = read(pooling)
        if not how.get("pooling_mode_mean_tokens") and how.get("pooling_mode") != "mean":  # old or new format
            fail(f"{name}: only encoders with mean pooling are supported")
        settings = read(folder / "sentence_bert_config.json")
        tokenizer.model_max_length = settings.get("max_seq_length") or tokenizer.model_max_length
    return tokenizer


@torch.inference_mode()
def embed(name, texts, batch_size=64):
    """Return unit vectors (n, H) of texts by mean pooling (Reimers & Gurevych 2019)."""
    tokenizer = read_encoder(name)
    encoder = load_network(AutoModel, local_folder(name), dtype=torch.float32).to(device())
    sums = []
    for start in range(0, len(texts), batch_size):
        own = texts[start:start + batch_size]
        batch = tokenizer(own, padding=True, truncation=True, return_tensors="pt").to(device())
        hidden = encoder(**batch).last_hidden_state * batch["attention_mask"][:, :, None]
        sums.append(hidden.sum(1).cpu())
    return F.normalize(torch.cat(sums)).numpy()  # the sum has the same direction as the mean


def first_centres(points, k, rng):
    """Return at most k distinct points as centres (k, H), by k-means++ (Arthur & Vassilvitskii 2007)."""
    centres = points[[rng.integers(len(points))]]
    while len(centres) < k:
        squares = torch.cdist(points, centres).min(1).values.double().square()
        squares[squares < 1e-5] = 0  # rounding
        if not squares.any():
            break
        chosen = rng.choice(len(points), p=(squares / squares.sum()).numpy())
        centres = torch.cat([centres, points[[chosen]]])
    return centres


def kmeans(points, k, rng, starts=10, steps=100):
    """Return the clusters (n,) of points (n, H), at most k, 0 the largest: Lloyd's algorithm, the best of `starts`."""
    points = torch.from_numpy(points)
    smallest = math.inf
    for _ in range(starts):
        centres = first_centres(points, k, rng)
        for _ in range(steps):
            distances, closest = torch.cdist(points, centres).min(1)
            sizes = torch.bincount(closest, minlength=len(centres)).clamp(min=1)
            means = torch.zeros_like(centres).index_add_(0, closest, points) / sizes[:, None]
            if torch.equal(means, centres):
                break
            centres = means
        inertia = distances.square().sum()
        if inertia < smallest:
            smallest = inertia
            clusters = closest
    by_size = torch.bincount(clusters).argsort(descending=True, stable=True)
    return by_size.argsort()[clusters].numpy()


# The loop -------------------------------------------------------------------------------------------------------------

def select(clusters, masses, shares, weights, responses, run, t):
    """Make selection.jsonl: for each problem of a round, everything that was decided and the numbers behind it.
    clusters: of each problem; masses, shares, weights: of each cluster (weights None: drawn at random)."""
    rows = measure(responses)
    for row, j in zip(rows, clusters.tolist()):
        row |= {"cluster": j, "mass": masses[j], "share": shares[j],
                "weight": None if weights is None else weights[j], "pair": None}
    for row in keep(rows, shares, run.rng(t, "keep")):
        row["pair"] = choose_pair(row["outcomes"], run.rng(t, "pair", row["id"]))
    return rows


def report_clusters(run, t, groups, errors, selection):
    """Report per cluster: problems, probed ones, error in the probe, drawn, learnable, trained on, typical tags."""
    clusters = {}
    for j, error in enumerate(errors):
        members = [g for g in groups if g["cluster"] == j]
        drawn = [s for s in selection if s["cluster"] == j]
        tags = Counter()
        for g in members:
            tags.update(g["tags"])
        clusters[f"cluster {j}"] = {"problems": len(members), "probed": sum(g["probed"] for g in members),
                                    "error": error, "drawn": len(drawn), "learnable": sum(map(is_learnable, drawn)),
                                    "kept": sum(s["pair"] is not None for s in drawn),
                                    "tags": ", ".join(tag for tag, _ in tags.most_common(4))}
    pairs = sum(s["pair"] is not None for s in selection)
    report(run, t, "select", **clusters, pairs=pairs)
    if pairs < PAIRS_PER_ROUND:
        say("           fewer are learnable than --pairs-per-round, so their order does not matter")


def check_constants():
    """End the program if constants contradict each other."""
    if PREFER == "hardest" and "difficulty" not in ARMS[SELECT]:
        fail(f"--prefer hardest is for a --select that uses difficulty, not {SELECT}")


def main():
    check_constants()
    if TAG:
        return tag_problems(load_problems(TRAIN_DATA, "train", DATA, N_TRAIN))
    run, tokenizer, problems, tests = prepare(globals(), models=[] if EMBEDDER == "tfidf" else [EMBEDDER])
    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, clip=CLIP,
                    lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA)
    shots = SHOTS if PROMPT == "few_shot" else 0

    def ask(problem, draw=0):
        return make_prompt(tokenizer, PROMPT, problem, worked_examples(problem)[:shots], SYSTEM, THINK)

    def example(problem, *answers):
        return make_example(tokenizer, PROMPT, problem, *answers) | {"prompt": ask(problem)}

    # Once: knowledge points, their clusters, and the probe
    tags = tags_of(problems, tests.get("held_out", []))
    groups = run.once("round_0/clusters.jsonl", group, problems, tags, run)
    clusters = np.array([g["cluster"] for g in groups])
    k = 1 + max(clusters)
    probe = [i for i, g in enumerate(groups) if g["probed"]]
    probed = [problems[i] for i in probe]
    texts = {p["problem"] for p in probed}  # never trained on, and neither are their duplicates
    pool = [i for i, p in enumerate(problems) if p["problem"] not in texts]
    if not pool:
        fail("the probe takes all problems, at least 2 of each cluster; lower --n-clusters or --probe")
    n = min(SAMPLES_PER_ROUND, len(pool))
    say(f"  clusters {k}, with {len(probe):,} problems in the probe")
    if ROUNDS * n > len(pool):
        say(f"           from round {len(pool) // n + 1} on some problems are drawn again")
    scores = {"base": evaluate(run, "round_0/eval", MODEL, tests, ask, **greedy)}
    end_round(run, 0)

    model = MODEL
    unused = pool
    for t in range(1, ROUNDS + 1):
        # 1. Probe: where does the policy fail?
        answers = sample(run, f"round_{t}/probe.jsonl", model, probed, K_SAMPLES, ask, **drawn)
        rates = np.array([row["p"] for row in measure(answers)])
        if t == 1 or SELECT != "static":
            seen = rates  # with "static", those of the first probe
        if len(unused) < n:  # start over
            unused = pool
        masses = error_masses(seen, clusters[probe], np.bincount(clusters[unused], minlength=k))
        shares = shares_of(masses)

        # 2. Draw problems to match
        weights = weights_of(shares, seen, clusters[probe])
        chosen = draw(unused, clusters, weights, n, run.rng(t, "draw"))
        unused = np.setdiff1d(unused, chosen)
        own = [problems[i] for i in chosen]

        # 3. Draw answers, filter, order
        responses = sample(run, f"round_{t}/responses.jsonl", model, own, K_SAMPLES, ask, **drawn)
        selection = run.once(f"round_{t}/selection.jsonl", select, clusters[chosen], masses, shares, weights,
                             responses, run, t)
        report_clusters(run, t, groups, mean_by(clusters[probe], 1 - rates), selection)
        show_answers(run, t, own, responses)

        # 4. pi_t = DPO of pi_{t-1} on the pairs
        answers_to = by_problem(responses)
        pairs = []
        for problem, s in zip(own, selection):
            if s["pair"]:
                answers = [answers_to[s["id"]][draw] for draw in s["pair"]]
                pairs.append(example(problem, *answers))
        if pairs:
            pairs = run.once(f"round_{t}/train.jsonl", list, pairs)
            start = model if START == "previous" else MODEL
            model = train(run, f"round_{t}/model", start, pairs, dpo_loss, lr=LR_DPO, reference=True, **training)
        else:
            say(f"  round {t}  no problem was answered both right and wrong: no pair, the model stays as it is")
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval", model, tests, ask, **greedy)
        end_round(run, t, keep=[model])
    final_table(run, scores)


if __name__ == "__main__":
    launch(main, globals())
