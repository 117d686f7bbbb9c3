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

  torchrun sai_dpo.py --toy                                   2 CPU cores: 1.1 min, 0.8 GB, 58 % (measured)
  torchrun sai_dpo.py                                         one GPU: not measured yet
  torchrun --nproc-per-node 8 sai_dpo.py                      eight GPUs: not measured yet
"""
import math
import re

import numpy as np

from common import (apportion, by_problem, cluster_texts, fail, last_list, load_problems, load_tokenizer, make_example,
                    make_prompt, mean_of, outcomes_of, override_from_cli, read_encoder, sample, say, sequence_logprobs,
                    start_run, train, typical_words)
from eval import end_round, evaluate, final_table, hold_out, show_answers, worked_examples
import torch.nn.functional as F  # behind common, which keeps torch's threads from spinning

# What to run
MODEL = "Qwen/Qwen2.5-Math-7B"  # pi_0: a Hub name or a folder (paper)
START = "previous"  # "previous" | "base": what each round trains from, and its reference; "base" is pi_0 (proxy)
TRAIN_DATA = "zwhe99/DeepMath-103K"  # names of sets, .jsonl or .json files, owner/name of the Hub (ours; not known)
TEST_DATA = "gsm8k,math,minerva_math,gaokao2023en,olympiadbench,college_math,aime24,amc23"  # may be empty (proxy)
N_TRAIN = 0  # problems of each training set; 0 is all (ours)
N_TEST = 0  # problems of each test set; 0 is all (ours)
HELD_OUT = 0  # training problems put aside, and scored like a test set; 0 is none (ours)
ROUNDS = 5  # after round 0, which scores pi_0 (ours)
SEED = 0  # of everything random (ours)

# Knowledge points
TAGGER = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"  # names those of a problem; empty: its text serves (paper)
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
PROMPT = "chat"  # "chat" | "zero_shot" | "few_shot": one form for drawing, training and scoring (proxy)
SHOTS = 4  # worked examples of our own before a problem, with few_shot (ours)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # for "chat" only (ours)
TEMPERATURE = 1.0  # of all draws (proxy)
TOP_P = 1.0  # 1: off (proxy)
TOP_K = 0  # 0: off (proxy)
MAX_NEW_TOKENS = 3072  # an answer is cut there (ours; the proxy's 4096 leave Qwen2.5-Math no room for a prompt)
GRADER = ""  # file.py:function, (problem, text) -> (correct, reason), in place of math-verify; empty is that (ours)

# Training
LR_DPO = 5e-7  # of DPO, its peak; cosine to 0 (proxy)
WARMUP = 0.03  # share of the steps, or from 1 on their number; 0 is none (ours)
EPOCHS = 2  # passes over the pairs (proxy)
BATCH_SIZE = 128  # pairs per optimizer step, over all GPUs (proxy)
WEIGHT_DECAY = 0.0  # of AdamW; 0 is none (proxy)
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

TOY = dict(MODEL="tests/toy/model", TRAIN_DATA="tests/toy/train.jsonl", TEST_DATA="tests/toy/test.jsonl", N_TEST=300,
           ROUNDS=3, EMBEDDER="tfidf", N_CLUSTERS=5, PROBE=0.04, SAMPLES_PER_ROUND=350, PAIRS_PER_ROUND=100,
           PROMPT="zero_shot", MAX_NEW_TOKENS=96, LR_DPO=1e-4, BATCH_SIZE=16, EAGER=True, MAX_TOKENS=8192)


# The method -----------------------------------------------------------------------------------------------------------

def tag_request(problem):
    """What the tagger is asked."""
    return ("List the 1 to 5 mathematical knowledge points that are needed to solve this problem, as a JSON list of "
            f"short English phrases, the most general first. Do not solve it.\n\nProblem: {problem['problem']}")


def parse_tags(output):
    """The tags in a tagger's output {text, finish}: five of the last list behind its thoughts; none if it was cut."""
    return last_list(output["text"].rsplit("</think>", 1)[-1])[:5] if output["finish"] == "stop" else []


def steps_of(text):
    """How many steps a response has: its "Step k" markers, or where there are none, the blocks between blank lines."""
    marked = re.findall(r"(?im)^[ \t]*(?:#+ *)?(?:\*\*)?step[ \t]+\d+", text)
    return len(marked) or sum(bool(block.strip()) for block in re.split(r"\n[ \t\r]*\n", text))


def difficulty_of(outcomes, steps, tokens):
    """(p, mean steps, mean length) of a problem from its draws, parallel lists. A cut answer is wrong, but does not
    count in the means; where all were cut these are None."""
    whole = [draw for draw, o in enumerate(outcomes) if o >= 0]
    return (outcomes.count(1) / len(outcomes), mean_of(steps[d] for d in whole) if whole else None,
            mean_of(tokens[d] for d in whole) if whole else None)


def key_of(p, steps, length):
    """Self-aware difficulty, larger is harder: fewer right, then more steps, then longer answers."""
    return 1 - p, math.inf if steps is None else steps, math.inf if length is None else length


def probe_of(clusters, rng):
    """Places of the problems that are probed, in order: PROBE of all, of each cluster its part, but 2 at least (or all
    that it has). The problems come to the cluster that is furthest below its part, one after the other."""
    sizes = np.bincount(clusters)
    counts = np.minimum(2, sizes)
    total = max(round(PROBE * len(clusters)), counts.sum())
    while counts.sum() < total:
        counts[np.argmax(np.where(counts < sizes, sizes * total / len(clusters) - counts, -np.inf))] += 1
    return sorted(int(i) for j, n in enumerate(counts) for i in rng.permutation(np.flatnonzero(clusters == j))[:n])


def error_masses(rates, unused):
    """m(j) from the p of each cluster's probed problems and the number of its unused ones: what the probe failed at,
    carried over to these, and scaled so that the masses sum to the probe's errors, the sum of all 1 - p."""
    errors = np.array([sum(1 - p for p in of) for of in rates], dtype=float)
    masses = errors * unused / np.maximum(1, [len(of) for of in rates])
    return masses * (errors.sum() / masses.sum()) if masses.sum() else masses


def shares_of(masses):
    """q(j); they sum to one, and are all the same where nothing failed."""
    smoothed = masses + (SMOOTHING or not masses.any())
    return smoothed / smoothed.sum()


def difficulty_weights(rates):
    """Of each cluster, for DIFFICULTY_BEFORE: most where the model is right half of the time."""
    return np.array([max(0.1, mean_of(4 * p * (1 - p) for p in of)) if of else 0.1 for of in rates])


def draw(unused, clusters, weights, n, rng):
    """Places of n unused problems: by the weights of their clusters, at random inside these; None: all at random."""
    unused = rng.permutation(unused)
    if weights is None:
        return unused[:n]
    counts = apportion(weights, np.bincount(clusters[unused], minlength=len(weights)), n)
    return np.concatenate([unused[clusters[unused] == j][:count] for j, count in enumerate(counts)])


def draw_round(pool, used, clusters, weights, n, rng):
    """(places of a round's n problems, places used up to now): none twice, until all of the pool were drawn, the last
    few whatever the weights; then all but those of this round come again."""
    unused = np.setdiff1d(pool, used)
    drawn = draw(unused, clusters, weights, n, rng)
    if len(unused) < n:
        used = drawn
        drawn = np.append(drawn, draw(np.setdiff1d(pool, drawn), clusters, weights, n - len(drawn), rng))
    return np.sort(drawn), np.union1d(used, drawn)


def keep(rows, shares, rng):
    """Places of the rows that are trained on, at most PAIRS_PER_ROUND: of learnable ones the hardest (or with arms that
    do not look at difficulty, random ones), of each cluster its share (in arms that know of clusters)."""
    learnable = [i for i, row in enumerate(rows) if 1 in row["outcomes"] and 0 in row["outcomes"]]
    order = rng.permutation(learnable).tolist()
    if SELECT in ("both", "difficulty", "static"):
        keys = {i: key_of(*(rows[i][name] for name in ("p", "steps", "length"))) for i in learnable}
        middle = {i: PREFER == "middle" and 0.25 <= rows[i]["p"] <= 0.75 for i in learnable}
        order = sorted(order, key=lambda i: (middle[i], keys[i]), reverse=True)
    if SELECT in ("difficulty", "random"):
        return order[:PAIRS_PER_ROUND]
    room = np.bincount([rows[i]["cluster"] for i in learnable], minlength=len(shares))
    return [i for j, n in enumerate(apportion(shares, room, PAIRS_PER_ROUND))
            for i in [i for i in order if rows[i]["cluster"] == j][:n]]


def choose_pair(outcomes, rng):
    """[draw to prefer, draw to reject]: a random right one and a random wrong one."""
    return [int(rng.choice([draw for draw, o in enumerate(outcomes) if o == which])) for which in (1, 0)]


def dpo_loss(logprobs, batch):
    """L = - log sigmoid(beta (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x))), a mean over the pairs of the step
    (Rafailov et al. 2023, eq. 7): y_w is the chosen answer, y_l the rejected one, ref the policy at its start."""
    gain = sequence_logprobs(logprobs, batch) - batch["reference"]  # of y_w, y_l, y_w, y_l, ...
    margin = BETA * (gain[0::2] - gain[1::2])
    metrics = {"margin": margin.detach().sum(), "preferred": (margin > 0).sum()}
    return -F.logsigmoid(margin).sum(), len(margin), metrics


# The loop -------------------------------------------------------------------------------------------------------------

def group(problems, outputs, rng):
    """round_0/clusters.jsonl: {id, tags, cluster, probed} of each problem. Tags are its own, else the tagger's (its
    second try where the first had none), else none, and its text is embedded in their place."""
    tried = {i: [*map(parse_tags, rs)] for i, rs in by_problem(outputs).items()}
    tags = [p.get("tags") or next(filter(None, tried.get(p["id"], [])), []) for p in problems]
    texts = [", ".join(t) or p["problem"] for p, t in zip(problems, tags)]
    clusters = cluster_texts(EMBEDDER, texts, N_CLUSTERS, rng("clusters"))
    probed = set(probe_of(clusters, rng("probe")))
    return [{"id": p["id"], "tags": t, "cluster": int(j), "probed": i in probed}
            for i, (p, t, j) in enumerate(zip(problems, tags, clusters))]


def knowledge_points(run, problems, untagged, tagger):
    """What is asked once: round_0/tagger.jsonl, the tagger's outputs, and clusters.jsonl, which is returned."""
    def request(problem, draw):
        return make_prompt(tagger, "chat", {"problem": tag_request(problem)})

    outputs = run.once("round_0/tagger.jsonl", lambda: sample(
        run, TAGGER, untagged, 2, request, enough=lambda tries: tries[-1]["correct"], check=parse_tags, round=0,
        phase="tag", style="chat", temperature=0.6, top_p=0.95, max_new_tokens=TAG_TOKENS)) if untagged else []
    groups = run.once("round_0/clusters.jsonl", lambda: group(problems, outputs, run.rng))
    if {o["id"] for o in outputs} != {p["id"] for p in untagged} or [g["id"] for g in groups] != [
            p["id"] for p in problems]:
        fail(f"{run.folder}/round_0: what is copied there is of other problems; remove it")
    return groups


def select(problems, facts, shares, responses, rng):
    """selection.jsonl: for each problem of a round all that was decided, with the numbers it was decided from. facts:
    those of its cluster (`weight` is what was drawn by, null where at random), parallel to problems."""
    drawn, rows = by_problem(responses), []
    for problem, of_cluster in zip(problems, facts):
        own = drawn[problem["id"]]
        outcomes = outcomes_of(own)
        p, steps, length = difficulty_of(outcomes, [steps_of(r["text"]) for r in own], [r["tokens"] for r in own])
        rows.append({"id": problem["id"], **of_cluster, "outcomes": outcomes, "p": p, "steps": steps, "length": length,
                     "pair": None})
    for i in keep(rows, shares, rng("keep")):
        rows[i]["pair"] = choose_pair(rows[i]["outcomes"], rng("pair", rows[i]["id"]))
    return rows


def report_clusters(run, t, names, sizes, rates, facts, selection):
    """Per cluster: problems, probed, share, drawn, learnable, trained on; error in the probe of each round; tags."""
    drawn = by_problem({**s, "id": s["cluster"]} for s in selection)
    found = [{"tags": tags, "problems": int(sizes[j]), "probed": len(rates[j]), "share": facts[j]["weight"],
              "drawn": len(drawn[j]), "learnable": sum({0, 1} <= {*s["outcomes"]} for s in drawn[j]),
              "kept": sum(bool(s["pair"]) for s in drawn[j]), "error": 1 - mean_of(rates[j])}
             for j, tags in enumerate(names)]
    run.log(t, "select", clusters=found)
    past = [run.metrics[s, "select"]["clusters"] for s in range(1, t + 1)]
    say(f"  round {t}  select  cluster " + " ".join(f"{name:>9}" for name in list(found[0])[1:-1])
        + "  error, by round; typical tags")
    for j, c in enumerate(found):
        errors = " ".join(f"{of[j]['error']:>4.0%}" for of in past)
        share = f"{c['share']:.1%}" if c["share"] is not None else "random"
        say(f"{j:>24} {c['problems']:>9,} {c['probed']:>9,} {share:>9} {c['drawn']:>9,} {c['learnable']:>9,} "
            f"{c['kept']:>9,}  {errors}  {', '.join(c['tags'])}"[:160])
    if sum(c["learnable"] for c in found) == sum(c["kept"] for c in found):
        say("           all that is learnable is kept, so its order has no say (--pairs-per-round)")


def main():
    if DIFFICULTY_BEFORE and SELECT not in ("both", "static"):
        fail(f"--difficulty-before is for --select both or static, not {SELECT}")
    if PREFER == "middle" and SELECT in ("knowledge", "random"):
        fail(f"--prefer middle is for a --select that looks at difficulty, not {SELECT}")
    tokenizer, problems = load_tokenizer(MODEL, PROMPT, SYSTEM), load_problems(TRAIN_DATA, "train", DATA, N_TRAIN)
    problems, held_out = hold_out(problems, HELD_OUT, SEED)
    tests = held_out + (load_problems(TEST_DATA, "test", DATA, N_TEST) if TEST_DATA or not held_out else [])
    problems = [p if OWN_TAGS else {**p, "tags": []} for p in problems]
    untagged = [p for p in problems if TAGGER and not p.get("tags")]
    tagger = load_tokenizer(TAGGER, "chat") if untagged else None
    read_encoder(EMBEDDER)  # ends the program if it cannot serve
    models = [TAGGER] * bool(untagged) + [EMBEDDER] * (EMBEDDER != "tfidf")
    run, by_id = start_run(globals(), problems, tests, models=models), {p["id"]: p for p in problems}
    say(f"  data     {len(problems):,} training problems, {len(untagged):,} to be tagged; {len(tests):,} test problems")

    greedy = dict(style=PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    drawn = dict(**greedy, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K)
    training = dict(warmup=WARMUP, epochs=EPOCHS, batch_size=BATCH_SIZE, max_tokens=MAX_TOKENS,
                    weight_decay=WEIGHT_DECAY, clip=CLIP)

    def ask(problem, draw=0):
        shown = [e for e in worked_examples(problem) if e["problem"] != problem["problem"]]
        return make_prompt(tokenizer, PROMPT, problem, shown[:SHOTS * (PROMPT == "few_shot")], SYSTEM)

    def example(problem, *texts):
        return make_example(tokenizer, PROMPT, problem, *texts) | {"prompt": ask(problem)}

    # Once: knowledge points, their clusters, and the probe
    groups = knowledge_points(run, problems, untagged, tagger)
    clusters = np.array([g["cluster"] for g in groups])
    names = typical_words((g["tags"] or {*re.findall(r"[^\W\d_]{4,}", p["problem"].lower())}
                           for p, g in zip(problems, groups)), clusters)
    probe = [i for i, g in enumerate(groups) if g["probed"]]
    held = {problems[i]["problem"] for i in probe}  # never trained on, nor what says the same
    pool = np.array([i for i, p in enumerate(problems) if p["problem"] not in held], dtype=int)
    if not len(pool):
        fail("the probe takes all problems, 2 of each cluster at least; lower --n-clusters, or --probe")
    n = min(SAMPLES_PER_ROUND, len(pool))
    say(f"  clusters {len(names)} ({sum(not g['tags'] for g in groups):,} problems without a tag, by their text), with "
        f"{len(probe):,} problems in the probe" + f"; from round {len(pool) // n + 1} on some are drawn again"
        * (ROUNDS * n > len(pool)))
    model, used, first = MODEL, pool[:0], None
    scores = {"base": evaluate(run, "round_0/eval.json", MODEL, tests, ask, round=0, **greedy)}
    end_round(run, 0)

    for t in range(1, ROUNDS + 1):
        # 1. Probe: where does the policy fail?
        answers = run.once(f"round_{t}/probe.jsonl", lambda: sample(
            run, model, [problems[i] for i in probe], K_SAMPLES, ask, round=t, phase="probe", **drawn))
        outcomes = {i: outcomes_of(rs) for i, rs in by_problem(answers).items()}
        rates = [[outcomes[problems[i]["id"]].count(1) / K_SAMPLES for i in probe if clusters[i] == j]
                 for j in range(len(names))]
        first = first or rates
        seen = first if SELECT == "static" else rates
        unused = np.setdiff1d(pool, used)
        masses = error_masses(seen, np.bincount(clusters[unused if len(unused) >= n else pool], minlength=len(names)))
        shares = shares_of(masses)

        # 2. Draw problems to match
        weights = shares * (difficulty_weights(seen) if DIFFICULTY_BEFORE else 1)
        weights = None if SELECT in ("difficulty", "random") else weights / weights.sum()
        chosen, used = draw_round(pool, used, clusters, weights, n, run.rng(t, "draw"))
        own, facts = [problems[i] for i in chosen], [
            {"cluster": j, "mass": masses[j], "share": shares[j], "weight": None if weights is None else weights[j]}
            for j in range(len(names))]

        # 3. Roll out, filter, order
        responses = run.once(f"round_{t}/responses.jsonl", lambda: sample(
            run, model, own, K_SAMPLES, ask, round=t, phase="rollout", **drawn))
        selection = run.once(f"round_{t}/selection.jsonl", lambda: select(
            own, [facts[j] for j in clusters[chosen]], shares, responses, lambda *key: run.rng(t, *key)))
        report_clusters(run, t, names, np.bincount(clusters), rates, facts, selection)
        show_answers(own, responses)

        # 4. pi_t = DPO of pi_{t-1} on the pairs
        text = {(r["id"], r["draw"]): r["text"] for r in responses}
        pairs = [example(by_id[s["id"]], *(text[s["id"], draw] for draw in s["pair"])) for s in selection if s["pair"]]
        if pairs:
            pairs = run.once(f"round_{t}/train.jsonl", lambda: pairs)
            start = model if START == "previous" else MODEL
            model = run.once(f"round_{t}/model", lambda to: train(
                run, start, pairs, dpo_loss, to, round=t, lr=LR_DPO, reference=True, **training))
        else:
            say(f"  round {t}  no problem was answered both right and wrong: no pair, the model stays as it is")
        scores[f"round {t}"] = evaluate(run, f"round_{t}/eval.json", model, tests, ask, round=t, **greedy)
        end_round(run, t)
    final_table(run, scores)


if __name__ == "__main__":
    override_from_cli(globals())
    main()
