"""SAI-DPO: dynamic sampling that adapts, self-aware iterative DPO (Rao et al. 2025, https://arxiv.org/abs/2505.16176).

A model answers training problems and learns from its right and wrong answers. SAI-DPO asks before each round what the
model is weak at: it probes a few problems of every kind, and draws the round's problems to match.

  Once: a tagger names the knowledge points T(x) of each problem x, a sentence encoder turns them into a vector, and
  K-Means groups the vectors into clusters C_j. 1 % of the problems, some of each cluster, are its probe S_j.
  In round t = 1..5, with K answers of pi_{t-1} to a problem, of which the share p(x) is right:
  1. Probe. Error mass of a cluster, where A_j are its problems not drawn yet, in units of the probe; and its share:
       m(j) = |A_j| / |S_j| * sum over S_j of (1 - p(x)),     q(j) = (m(j) + a) / sum of all (m + a)
  2. Draw 20,000 problems, none twice, so that P(x) ~ q(j) / |A_j|: of each cluster its share, inside it at random.
  3. Roll out. Self-aware difficulty is the key (1 - p, mean steps, mean length), compared in that order. Of the
     learnable problems, answered both right and wrong, the hardest fill the shares again.
  4. Pairs: one random right answer against one random wrong one.  pi_t = DPO of pi_{t-1}, its reference too, on them.

The paper's body could not be read. Its abstract and reviews tell of the tagger, embedding and K-Means; a representative
1 % probe; clusters with errors drawn more; 20,000 samples a round; K = 8; the three indicators in this order; problems
too easy or too hard left out; random pairs: (paper). The formulas, the second use of the shares, hardest first and all
else are ours, or (proxy): Online-DPO-R1's, whose 20,000 prompts a round these seem to be, or an author's later paper's.
Differs from the paper in what cannot be known, and in: no probe problem is trained on, so that probes compare; all arms
probe each round, so that they cost the same; an answer that was cut counts as wrong, and is in no pair.

  python sai_dpo.py --toy                                     2 CPU cores: 1.3 min, 61 % (measured)
  python sai_dpo.py --tag && python sai_dpo.py                one GPU: not measured yet
  torchrun --nproc-per-node 8 sai_dpo.py                      eight GPUs: not measured yet
"""
import math
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from common import (MACHINE, by_problem, device, end_round, evaluate, fail, final_table, launch, load_network,
                    load_problems, load_tokenizer, local_folder, make_example, make_prompt, outcomes_of, prepare, rank,
                    read, report, sample, say, seed_of, sequence_logprobs, show_answers, start_run, train,
                    worked_examples)
import torch  # behind common, which keeps torch's threads from spinning
import torch.nn.functional as F
from transformers import AutoModel

# What to run
MODEL = "Qwen/Qwen2.5-Math-7B"  # pi_0: a Hub name or a folder (paper)
START = "previous"  # "base" | "previous": what each round trains from, and its reference; "base" is pi_0 (proxy)
TRAIN_DATA = "zwhe99/DeepMath-103K"  # sets by name, file or owner/name on the Hub, comma-separated (ours; not known)
TEST_DATA = "gsm8k,math,minerva_math,gaokao2023en,olympiadbench,college_math,aime24,amc23"  # scored each round (proxy)
N_TRAIN = 0  # problems of each training set; 0 is all (ours)
N_TEST = 0  # problems of each test set; 0 is all (ours)
HELD_OUT = 0  # training problems put aside, scored in a table of their own (TEST_DATA may be empty); 0 is none (ours)
ROUNDS = 5  # after round 0 (ours)
SEED = 0  # of everything random (ours)

# Knowledge points
TAG = False  # have TAGGER name those of the training problems, for all later runs, and stop (paper: offline)
TAGGER = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"  # whose tags are used, where --tag was run; else the text (paper)
OWN_TAGS = True  # problems that bring tags keep them (MATH's: seven, so seven clusters), and skip the tagger (ours)
TAG_TOKENS = 2048  # of the tagger's output, thoughts included (ours)
EMBEDDER = "sentence-transformers/all-mpnet-base-v2"  # a Hub name or a folder, or tfidf (ours)
N_CLUSTERS = 20  # of the pool; fewer where fewer problems differ (ours)

# The method
SELECT = "both"  # "both" | "knowledge" | "difficulty" | "random" | "static": static: shares by probe 1 (ours)
PROBE = 0.01  # share of the problems that is probed (paper), at least 2 of each cluster (ours)
SAMPLES_PER_ROUND = 20000  # problems drawn (paper)
K_SAMPLES = 8  # K: answers to each problem, probed or drawn (paper)
SMOOTHING = 1.0  # a: mass that each cluster has besides its own; 0 draws only where the probe failed (ours)
DIFFICULTY_BEFORE = False  # weigh the draw by the probe's mean of 4 p (1 - p) in the cluster, at least 0.1 (ours)
PREFER = "hardest"  # "hardest" | "middle": by the key, or those with 0.25 <= p <= 0.75 before the others (ours)
PAIRS_PER_ROUND = 5000  # at most: about half of what is learnable with SELECT = "random" (ours)
BETA = 0.1  # of DPO: how strongly the policy is held to the model it starts from (proxy)

# Sampling
PROMPT = "chat"  # "few_shot" | "zero_shot" | "chat": one form for drawing, training and scoring (proxy)
SHOTS = 4  # worked examples of our own before a problem, with few_shot (ours)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
THINK = ""  # "" | "on" | "off": under "chat", to think before the answer; for templates that know it (ours)
TEMPERATURE = 1.0  # of all draws (proxy)
TOP_P = 1.0  # 1: off (proxy)
TOP_K = 0  # 0: off (proxy)
MAX_NEW_TOKENS = 3072  # an answer is cut there, and then not trained on (ours; 4096, the proxy's, leave no room)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that (ours)

# Training
LR_DPO = 5e-7  # of DPO, its peak; cosine to 0 (proxy)
WARMUP = 0.03  # share of the steps, or from 1 on their number; 0 is none (ours)
EPOCHS = 2  # passes over the pairs (proxy)
BATCH_SIZE = 128  # pairs per optimizer step, over all GPUs (proxy)
WEIGHT_DECAY = 0.0  # of AdamW; 0 is none (proxy)
CLIP = 1.0  # largest gradient norm (ours)
LORA_RANK = 0  # of the adapters that are trained in place of all weights; 0 is full fine-tuning (ours)
LORA_ALPHA = 32.0  # adapters count LORA_ALPHA / LORA_RANK times (ours)

# Machine: may differ when a run resumes
NAME = ""  # the folder under runs/; empty is script name and seed (ours)
DATA = "data"  # folder of the known problem sets, as data/gsm8k/train.jsonl (ours)
ENGINE = ""  # "" | "vllm" | "transformers": what samples; empty is vLLM on a GPU, else transformers (ours)
EAGER = False  # vLLM without CUDA graphs: starts a minute sooner and samples slower (ours)
SEEDED = True  # a seed for each of vLLM's answers; without, they may come faster, and are others each time (ours)
GPU_MEMORY = 0.85  # share of a GPU that vLLM may fill while it samples; asleep it gives it back (ours)
MAX_TOKENS = 16384  # of a micro-batch on one GPU: changes memory, never the result; on a CPU fewer if need be (ours)
RECOMPUTE = False  # make activations again in the backward pass: less memory, a third more time (ours)
SAVE_MINUTES = 30.0  # between saves inside a training, of 12 bytes a parameter; 0 is after each step (ours)
KEEP_MODELS = 0  # how many rounds' models stay on disk, besides those still needed; 0 is all (ours)
KEEP = False  # resume a folder that was made by other code: what is finished there stays (ours)
WANDB = False  # log to Weights & Biases too (ours)

# What is legal: the values, or the least one (of other numbers 0)
LEGAL = dict(START=("base", "previous"), TAG_TOKENS=1, N_CLUSTERS=1, SAMPLES_PER_ROUND=1, K_SAMPLES=1,
             SELECT=("both", "knowledge", "difficulty", "random", "static"), PREFER=("hardest", "middle"),
             PAIRS_PER_ROUND=1, PROMPT=("few_shot", "zero_shot", "chat"), THINK=("", "on", "off"), MAX_NEW_TOKENS=1,
             EPOCHS=1, BATCH_SIZE=1, ENGINE=("", "vllm", "transformers"), MAX_TOKENS=1)

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TEST=300,
           ROUNDS=3, EMBEDDER="tfidf", N_CLUSTERS=5, PROBE=0.04, SAMPLES_PER_ROUND=350, PAIRS_PER_ROUND=100,
           PROMPT="zero_shot", MAX_NEW_TOKENS=96, LR_DPO=1e-4, BATCH_SIZE=16, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def steps_of(text):
    """How many steps a response has: its "Step k" markers, or where there are none, the blocks between blank lines."""
    marked = re.findall(r"(?im)^[ \t]*(?:#+ *)?(?:\*\*)?step[ \t]+\d+", text)
    blocks = [block for block in re.split(r"\n[ \t\r]*\n", text) if block.strip()]
    return len(marked) or len(blocks)


def difficulty_of(outcomes, steps, tokens):
    """(p, mean steps, mean length) of a problem from its draws, parallel lists. A cut answer is wrong, but does not
    count in the means; where all were cut these are None."""
    p = outcomes.count(1) / len(outcomes)
    whole = [draw for draw, outcome in enumerate(outcomes) if outcome >= 0]
    if not whole:
        return p, None, None
    return p, statistics.fmean(steps[draw] for draw in whole), statistics.fmean(tokens[draw] for draw in whole)


def key_of(p, steps, length):
    """Self-aware difficulty, larger is harder: fewer right, then more steps, then longer answers."""
    if steps is None:  # all were cut
        return 1 - p, math.inf, math.inf
    return 1 - p, steps, length


def probe_of(clusters, rng):
    """Places of the problems that are probed, in order: PROBE of all, of each cluster its part, or 2 if that is more
    (or all that it has)."""
    sizes = np.bincount(clusters)
    parts = apportion(sizes / len(clusters), sizes, round(PROBE * len(clusters)))
    probe = []
    for cluster, count in enumerate(np.maximum(parts, np.minimum(2, sizes))):
        members = np.flatnonzero(clusters == cluster)
        probe += rng.permutation(members)[:count].tolist()
    return sorted(probe)


def error_masses(rates, unused):
    """m(j) from the p of each cluster's probed problems and the number of its unused ones: what the probe failed at,
    carried over to these, and scaled so that the masses sum to the probe's errors, the sum of all 1 - p."""
    errors = np.array([sum(1 - p for p in probed) for probed in rates], dtype=float)
    probed = np.array([len(probed) for probed in rates])
    masses = errors * unused / np.maximum(1, probed)
    if masses.any():
        masses *= errors.sum() / masses.sum()
    return masses


def shares_of(masses):
    """q(j); they sum to one, and are all the same where nothing failed."""
    smoothed = masses + SMOOTHING
    if not smoothed.any():
        smoothed = np.ones_like(masses)
    return smoothed / smoothed.sum()


def weights_of(shares, rates):
    """What clusters are drawn by, (k,), or None: all problems alike. With DIFFICULTY_BEFORE most where the model is
    right half of the time."""
    if SELECT in ("difficulty", "random"):
        return None
    if not DIFFICULTY_BEFORE:
        return shares
    learnable = [max(0.1, statistics.fmean(4 * p * (1 - p) for p in probed)) if probed else 0.1 for probed in rates]
    return shares * learnable / (shares * learnable).sum()


def draw(unused, clusters, weights, n, rng):
    """Places of n unused problems: by the weights of their clusters, at random inside these; None: all at random."""
    unused = rng.permutation(unused)
    if weights is None:
        return unused[:n]
    room = np.bincount(clusters[unused], minlength=len(weights))
    drawn = []
    for cluster, count in enumerate(apportion(weights, room, n)):
        drawn.append(unused[clusters[unused] == cluster][:count])
    return np.concatenate(drawn)


def draw_round(pool, used, clusters, weights, n, rng):
    """(places of a round's n problems, places used up to now): none twice, until all of the pool were drawn, the last
    few whatever the weights; then all but those of this round come again."""
    unused = np.setdiff1d(pool, used)
    drawn = draw(unused, clusters, weights, n, rng)
    if len(unused) < n:
        used = drawn
        again = draw(np.setdiff1d(pool, drawn), clusters, weights, n - len(drawn), rng)
        drawn = np.append(drawn, again)
    return np.sort(drawn), np.union1d(used, drawn)


def keep(rows, shares, rng):
    """Places of the rows that are trained on, at most PAIRS_PER_ROUND: of learnable ones the hardest (or with arms that
    do not look at difficulty, random ones), of each cluster its share (in arms that know of clusters)."""
    learnable = [i for i, row in enumerate(rows) if 1 in row["outcomes"] and 0 in row["outcomes"]]
    order = rng.permutation(learnable).tolist()

    def hardness(i):
        row = rows[i]
        in_the_middle = PREFER == "middle" and 0.25 <= row["p"] <= 0.75
        return in_the_middle, key_of(row["p"], row["steps"], row["length"])

    if SELECT in ("both", "difficulty", "static"):
        order.sort(key=hardness, reverse=True)
    if SELECT in ("difficulty", "random"):
        return order[:PAIRS_PER_ROUND]
    room = np.bincount([rows[i]["cluster"] for i in learnable], minlength=len(shares))
    kept = []
    for cluster, count in enumerate(apportion(shares, room, PAIRS_PER_ROUND)):
        kept += [i for i in order if rows[i]["cluster"] == cluster][:count]
    return kept


def rates_of(answers, groups, k):
    """p(x) of the probed problems of each of k clusters."""
    cluster = {g["id"]: g["cluster"] for g in groups}
    rates = [[] for _ in range(k)]
    for i, drawn in by_problem(answers).items():
        outcomes = outcomes_of(drawn)
        rates[cluster[i]].append(outcomes.count(1) / len(outcomes))
    return rates


def choose_pair(outcomes, rng):
    """[draw to prefer, draw to reject]: a random right one and a random wrong one."""
    outcomes = np.array(outcomes)
    preferred = rng.choice(np.flatnonzero(outcomes == 1))
    rejected = rng.choice(np.flatnonzero(outcomes == 0))
    return [int(preferred), int(rejected)]


def dpo_loss(logprobs, batch):
    """L = - log sigmoid(beta (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x))), a mean over the pairs of the step
    (Rafailov et al. 2023, eq. 7): y_w is the chosen answer, y_l the rejected one, ref the policy at its start."""
    gain = sequence_logprobs(logprobs, batch) - batch["reference"]  # of y_w, y_l, y_w, y_l, ...
    margin = BETA * (gain[0::2] - gain[1::2])
    metrics = {"margin": margin.detach().sum(), "preferred": (margin > 0).sum()}
    return -F.logsigmoid(margin).sum(), len(margin), metrics


# Knowledge points: tags by a language model, clusters of tags ---------------------------------------------------------

TFIDF_SIZE = 512  # numbers in a tf-idf vector
EMBED_BATCH = 64  # texts that the encoder reads at once


def tag_request(problem):
    """What the tagger is asked."""
    return ("List the 1 to 5 mathematical knowledge points that are needed to solve this problem, as a JSON list of "
            f"short English phrases, the most general first. Do not solve it.\n\nProblem: {problem['problem']}")


def parse_tags(output):
    """The tags in a tagger's output {text, finish}: five of the last list behind its thoughts; none if it was cut."""
    if output["finish"] != "stop":
        return []
    return last_list(output["text"].rpartition("</think>")[2])[:5]


def tags_name(problems):
    """The folder under runs/ that keeps the tags of these problems, held-out ones too: all seeds and arms share it."""
    requests = sorted((problem["id"], tag_request(problem)) for problem in problems)
    return f"tags/{seed_of(TAGGER, TAG_TOKENS, requests):x}"


def tag_problems(problems):
    """Have TAGGER name the knowledge points of problems, at most two tries each; resumes like any run."""
    tagger = load_tokenizer(TAGGER, "chat")
    constants = {name: globals()[name] for name in MACHINE}
    constants |= {"MODEL": TAGGER, "SEED": 0, "GRADER": "", "NAME": tags_name(problems), "__file__": __file__}
    run = start_run(constants, problems)
    untagged = [p for p in problems if not (OWN_TAGS and p.get("tags"))]
    if not untagged:
        fail("--tag: all problems have tags (--no-own-tags ignores those that they bring)")

    def request(problem, draw):
        return make_prompt(tagger, "chat", {"problem": tag_request(problem)})

    def enough(outputs):
        return any(output["correct"] for output in outputs)

    def grade(problem, output):
        return parse_tags(output) != [], "tags"

    outputs = sample(run, "round_0/outputs.jsonl", TAGGER, untagged, 2, request, enough, grade, style="chat",
                     temperature=0.6, top_p=0.95, max_new_tokens=TAG_TOKENS)
    useless = [output["text"] for output in outputs if not output["correct"]]
    if 2 * len(useless) > len(outputs):
        say(f"warning: {len(useless):,} of {len(outputs):,} outputs have no list of tags, such as:\n{useless[0]}")
    say(f"correct are outputs with tags; runs on these problems use them: {run.folder}/round_0/outputs.jsonl")


def tags_of(problems, held_out):
    """The tags of each problem: its own, else those that --tag has found, else none."""
    path = Path("runs") / tags_name(problems + held_out) / "round_0" / "outputs.jsonl"
    found = {}
    if path.exists():
        found = {output["id"]: parse_tags(output) for output in read(path)}
    if OWN_TAGS:
        found |= {problem["id"]: problem["tags"] for problem in problems if "tags" in problem}
    tags = [found.get(problem["id"], []) for problem in problems]
    if [] in tags:
        say(f"  tags     {tags.count([]):,} problems have none, and are grouped by their text (python sai_dpo.py "
            "--tag, with the same data, has them tagged first)")
    return tags


def group(problems, tags, run):
    """round_0/clusters.jsonl: {id, tags, cluster, probed} of each problem. Where there are no tags, the text of the
    problem is embedded in their place."""
    texts = [", ".join(own) or p["problem"] for p, own in zip(problems, tags)]
    clusters = cluster_texts(EMBEDDER, texts, N_CLUSTERS, run.rng("clusters"))
    probed = set(probe_of(clusters, run.rng("probe")))
    groups = []
    for i, problem in enumerate(problems):
        groups.append({"id": problem["id"], "tags": tags[i], "cluster": int(clusters[i]), "probed": i in probed})
    return groups


def apportion(shares, room, total):
    """Divide `total` in proportion to `shares` (n,), by largest remainders, but at most `room` (n,) each.

    What a full place cannot take goes to the others; a place with no share gets nothing.
    """
    room = np.where(shares > 0, room, 0)
    total = min(total, room.sum())
    targets = np.zeros(len(room))
    while total - targets.sum() > 1e-6:
        free = np.where(targets < room, shares, 0)
        targets = np.minimum(room, targets + (total - targets.sum()) * free / free.sum())
    counts = np.zeros(len(room), dtype=int)
    for _ in range(total):
        counts[np.argmax(targets - counts)] += 1
    return counts


def cluster_texts(encoder, texts, k, rng):
    """Return the cluster of each text (n,), at most k, 0 the largest; zeros on ranks other than 0."""
    if rank() > 0:
        return np.zeros(len(texts), dtype=int)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same clusters however many cores there are
    vectors = tfidf(texts) if encoder == "tfidf" else embed(encoder, texts)
    clusters = kmeans(vectors, k, rng)
    torch.set_num_threads(threads)
    return clusters


def tfidf(texts):
    """Return unit tf-idf vectors (n, TFIDF_SIZE) of texts, hashed (Weinberger et al. 2009)."""
    # Words of two letters or more, and LaTeX commands
    counts = [Counter(re.findall(r"\\?[^\W\d_]{2,}", text.lower())) for text in texts]
    texts_with = Counter()
    for words in counts:
        texts_with.update(words.keys())
    vectors = torch.zeros(len(texts), TFIDF_SIZE)
    for vector, words in zip(vectors.numpy(), counts):
        for word, count in words.items():
            seed = seed_of(word)
            sign = 1 if seed % 2 else -1  # words that share a place then cancel out on average
            rarity = math.log(len(texts) / texts_with[word]) + 1e-3  # not quite 0 for a word that all texts have
            vector[seed // 2 % TFIDF_SIZE] += sign * (1 + math.log(count)) * rarity
    return F.normalize(vectors).numpy()


def read_encoder(name):
    """Return a sentence encoder's tokenizer, set to its longest text; fail unless it takes the mean of its tokens."""
    folder = Path(local_folder(name))
    tokenizer = load_tokenizer(name, "")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.exists():  # a plain model has none, and its mean is taken too
        how = read(pooling)
        if not how.get("pooling_mode_mean_tokens") and how.get("pooling_mode") != "mean":  # old files or new
            fail(f"{name}: only mean pooling encoders are read here")
        settings = read(folder / "sentence_bert_config.json")
        tokenizer.model_max_length = settings.get("max_seq_length") or tokenizer.model_max_length
    return tokenizer


@torch.inference_mode()
def embed(name, texts):
    """Return unit vectors (n, H) of texts by mean pooling (Reimers & Gurevych 2019)."""
    tokenizer = read_encoder(name)
    encoder = load_network(AutoModel, local_folder(name), dtype=torch.float32).to(device())
    vectors = torch.zeros(len(texts), encoder.config.hidden_size)
    order = torch.tensor([len(text) for text in texts]).argsort(stable=True)
    for places in order.split(EMBED_BATCH):  # of like length, so that there is little padding
        batch = tokenizer([texts[i] for i in places], padding=True, truncation=True, return_tensors="pt").to(device())
        hidden = encoder(**batch).last_hidden_state * batch["attention_mask"][:, :, None]
        vectors[places] = hidden.sum(1).cpu()  # the direction is that of the mean
    if not vectors.isfinite().all():
        fail(f"{name}: its vectors are not finite")
    return F.normalize(vectors).numpy()


def first_centres(points, k, rng):
    """Return at most k different points as centres (k, H), each next one with a chance in proportion to its squared
    distance to those before (k-means++; Arthur & Vassilvitskii 2007)."""
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
    """Return the cluster of each point (n,), 0 the largest, at most k, of points (n, H): Lloyd's algorithm; of all
    starts that with the smallest sum of squared distances to the centres."""
    points = torch.from_numpy(points)
    best = math.inf
    for _ in range(starts):
        centres = first_centres(points, k, rng)
        before = None
        for _ in range(steps):
            distances, closest = torch.cdist(points, centres).min(1)
            if before is not None and torch.equal(closest, before):
                break
            before = closest
            sizes = torch.bincount(closest, minlength=len(centres))[:, None]
            sums = torch.zeros_like(centres).index_add_(0, closest, points)
            centres = torch.where(sizes > 0, sums / sizes, centres)
        inertia = float(distances.square().sum())
        if inertia < best:
            best = inertia
            clusters = closest
    by_size = torch.bincount(clusters).argsort(descending=True, stable=True)
    return by_size.argsort()[clusters].numpy()


def last_list(text):
    """Return the different phrases, in lower case, of the last list of quoted strings in a text, or []."""
    for found in reversed(re.findall(r"""\[(?=\s*["'{])(?:[^]["]|"[^"]{0,200}")*\]""", text[-2000:])):
        # Not read as JSON: models write single quotes, one comma too many, and LaTeX such as \frac
        found = re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), found)
        phrases = re.findall(r"""(?s)(?<=[\[,])\s*["'](.{1,80}?)["'](?=\s*[,\]])""", found)
        phrases = [" ".join(phrase.replace("\\\\", "\\").lower().split()) for phrase in phrases]
        phrases = [phrase for phrase in phrases if re.search(r"[^\W\d_]{2}", phrase)]
        if phrases:
            return list(dict.fromkeys(phrases))
    return []


def typical_tags(groups, k, n=4):
    """Return the n most frequent tags of each of k clusters."""
    counts = [Counter() for _ in range(k)]
    for g in groups:
        counts[g["cluster"]].update(g["tags"])
    return [[tag for tag, _ in count.most_common(n)] for count in counts]


# The loop -------------------------------------------------------------------------------------------------------------

def select(problems, clusters, masses, shares, weights, responses, run, t):
    """selection.jsonl: for each problem of a round all that was decided, with the numbers it was decided from.

    clusters: that of each problem; masses, shares, weights: of each cluster (weights None: drawn at random)."""
    by_id = by_problem(responses)
    rows = []
    for problem, j in zip(problems, clusters.tolist()):
        drawn = by_id[problem["id"]]
        outcomes = outcomes_of(drawn)
        steps = [steps_of(r["text"]) for r in drawn]
        p, mean_steps, length = difficulty_of(outcomes, steps, [r["tokens"] for r in drawn])
        rows.append({"id": problem["id"], "cluster": j, "mass": masses[j], "share": shares[j],
                     "weight": None if weights is None else weights[j], "outcomes": outcomes, "p": p,
                     "steps": mean_steps, "length": length, "pair": None})
    for i in keep(rows, shares, run.rng(t, "keep")):
        rows[i]["pair"] = choose_pair(rows[i]["outcomes"], run.rng(t, "pair", rows[i]["id"]))
    return rows


def report_clusters(run, t, names, sizes, rates, selection):
    """Per cluster: problems, share in the draw, drawn, learnable, trained on, error in the probe, typical tags."""
    clusters = {}
    for j, tags in enumerate(names):
        drawn = [s for s in selection if s["cluster"] == j]
        learnable = [s for s in drawn if 0 in s["outcomes"] and 1 in s["outcomes"]]
        clusters[f"cluster {j}"] = {"problems": int(sizes[j]), "probed": len(rates[j]),
                                    "error": 1 - statistics.fmean(rates[j]), "drawn": len(drawn),
                                    "learnable": len(learnable), "kept": sum(s["pair"] is not None for s in drawn),
                                    "tags": ", ".join(tags)}
    pairs = sum(s["pair"] is not None for s in selection)
    report(run, t, "select", **clusters, pairs=pairs)
    if pairs == sum(c["learnable"] for c in clusters.values()):
        say("           all that is learnable is kept, so its order has no say (--pairs-per-round)")


def check_constants():
    """End the program where constants do not go together."""
    if DIFFICULTY_BEFORE and SELECT not in ("both", "static"):
        fail(f"--difficulty-before is for --select both or static, not {SELECT}")
    if PREFER == "middle" and SELECT in ("knowledge", "random"):
        fail(f"--prefer middle is for a --select that looks at difficulty, not {SELECT}")


def main():
    check_constants()
    if TAG:
        return tag_problems(load_problems(TRAIN_DATA, "train", DATA, N_TRAIN))
    if EMBEDDER != "tfidf":
        read_encoder(EMBEDDER)  # ends the program if it cannot serve
    run, tokenizer, problems, tests = prepare(globals(), models=[] if EMBEDDER == "tfidf" else [EMBEDDER])
    by_id = {p["id"]: p for p in problems}
    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, clip=CLIP,
                    lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA)
    shots = SHOTS if PROMPT == "few_shot" else 0

    def ask(problem, draw=0):
        examples = [e for e in worked_examples(problem) if e["problem"] != problem["problem"]]
        return make_prompt(tokenizer, PROMPT, problem, examples[:shots], SYSTEM, THINK)

    def example(problem, *answers):
        return make_example(tokenizer, PROMPT, problem, *answers) | {"prompt": ask(problem)}

    # Once: knowledge points, their clusters, and the probe
    tags = tags_of(problems, tests.get("held_out", []))
    groups = run.once("round_0/clusters.jsonl", group, problems, tags, run)
    clusters = np.array([g["cluster"] for g in groups])
    k = 1 + max(clusters)
    names = typical_tags(groups, k)
    probe = [i for i, g in enumerate(groups) if g["probed"]]
    probed_texts = {problems[i]["problem"] for i in probe}  # never trained on, nor what says the same
    pool = np.array([i for i, p in enumerate(problems) if p["problem"] not in probed_texts], dtype=int)
    if len(pool) == 0:
        fail("the probe takes all problems, 2 of each cluster at least; lower --n-clusters, or --probe")
    n = min(SAMPLES_PER_ROUND, len(pool))
    untagged = sum(g["tags"] == [] for g in groups)
    say(f"  clusters {k} ({untagged:,} problems without a tag, by their text), with {len(probe):,} problems in the "
        "probe")
    if ROUNDS * n > len(pool):
        say(f"           from round {len(pool) // n + 1} on some problems are drawn again")
    scores = {"base": evaluate(run, "round_0/eval", MODEL, tests, ask, **greedy)}
    end_round(run, 0)

    model = MODEL
    used = pool[:0]
    for t in range(1, ROUNDS + 1):
        # 1. Probe: where does the policy fail?
        answers = sample(run, f"round_{t}/probe.jsonl", model, [problems[i] for i in probe], K_SAMPLES, ask, **drawn)
        rates = rates_of(answers, groups, k)
        if t == 1 or SELECT != "static":
            seen = rates  # with "static" those of the first probe
        unused = np.setdiff1d(pool, used)
        masses = error_masses(seen, np.bincount(clusters[unused if len(unused) >= n else pool], minlength=k))
        shares = shares_of(masses)

        # 2. Draw problems to match
        weights = weights_of(shares, seen)
        chosen, used = draw_round(pool, used, clusters, weights, n, run.rng(t, "draw"))
        own = [problems[i] for i in chosen]

        # 3. Roll out, filter, order
        responses = sample(run, f"round_{t}/responses.jsonl", model, own, K_SAMPLES, ask, **drawn)
        selection = run.once(f"round_{t}/selection.jsonl", select, own, clusters[chosen], masses, shares, weights,
                             responses, run, t)
        report_clusters(run, t, names, np.bincount(clusters), rates, selection)
        show_answers(own, responses)

        # 4. pi_t = DPO of pi_{t-1} on the pairs
        by_draw = {(r["id"], r["draw"]): r for r in responses}
        pairs = []
        for s in selection:
            if s["pair"]:
                preferred, rejected = s["pair"]
                pairs.append(example(by_id[s["id"]], by_draw[s["id"], preferred], by_draw[s["id"], rejected]))
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
