"""The cost of a round's decision in each method: METHODS and `measure`, for P9 of bench.py.

The decision is every pure function between the answers and selection.jsonl, called by its own name; no file is read
or written. Records are made up, with the keys that are read (hs_star: also reward), a separate id object each, as
after reading, and texts of one letter. Draws per problem follow the script's constants (dast.py up to 50, and
once as few as in its toy, 9 on average); the share of right answers is drawn for each problem from Beta(0.5, 0.5):
most are solved nearly always or hardly ever. In hs_star.py a third of the problems are the round's slice, in
sai_dpo.py 19 % are drawn.

Seconds are processor time of all threads, including garbage collection and the kernel's page faults. GiB are of
the whole process: first libraries (about 0.53) and records, then what the decision adds at its peak."""
import functools
import os
import resource
import time
from pathlib import Path


def gib():
    """Return the GiB that the process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


class Seeded:
    """What the decisions need of a run: a separate generator for each key, which has its price."""

    @staticmethod
    def rng(*key):
        import common
        import numpy as np
        return np.random.default_rng(common.seed_of(0, *key))


def record(k, draw, right):
    """Return a draw of problem k. As after reading, no other record shares its id object (which slows look-ups)."""
    return {"id": f"big/train/{k}", "draw": draw, "text": "abcdefgh"[draw % 8], "tokens": 100 + draw,
            "finish": "stop", "correct": right}


def problems_of(n):
    return [{"id": f"big/train/{k}", "solution": "s"} for k in range(n)]


def adastar(n):
    """A walk that visits all problems, with one or two draws to each."""
    import adastar
    import numpy as np
    rng = np.random.default_rng(0)
    problems = problems_of(n)
    last = rng.integers(0, 20, n)
    w = rng.integers(0, 3, n) / 2
    place = {p["id"]: k for k, p in enumerate(problems)}  # main() makes it once for the whole run
    first, second = (rng.random((2, n)) < rng.beta(0.5, 0.5, n)).tolist()
    responses = []
    for k in range(n):
        own = [record(k, 0, first[k])]
        if not first[k]:
            own.append(record(k, 1, second[k]))
        responses.append(own)

    def draw(block):
        return {k: responses[k] for k in block}

    def decide():
        order = adastar.walk_order(last, w, rng)
        visited = adastar.walk(order, n, 0.5, draw)
        selection = adastar.select(problems, visited, last, w, n // 2, rng)
        for s in selection:
            if s["committed"]:
                last[place[s["id"]]] = 1
                w[place[s["id"]]] = s["win_rate"]
        return selection
    return decide


def dast(n, **constants):
    """Ten draws of the probe, then draws until there are T distinct correct ones, or B: 29 records per problem."""
    import common
    import dast
    import numpy as np
    vars(dast).update(constants)
    rng = np.random.default_rng(0)
    problems = problems_of(n)
    shares = rng.beta(0.5, 0.5, n)
    hits = rng.random((n, dast.K_PROBE)) < shares[:, None]
    probe = [record(k, d, right) for k in range(n) for d, right in enumerate(hits[k].tolist())]
    responses = []
    for k, right in enumerate(hits.sum(1).tolist()):
        target, budget = dast.target_and_budget(dast.level_of(right / dast.K_PROBE))
        drawn = (rng.random(budget) < shares[k]).tolist()
        needed = [d for d, hit in enumerate(drawn) if hit][target - 1:target]
        responses += [record(k, d, hit) for d, hit in enumerate(drawn[:needed[0] + 1 if needed else budget])]
    level = {}  # once for all rounds
    for i, probed in common.by_problem(probe).items():
        level[i] = dast.level_of(dast.pass_rate(probed))

    def decide():
        budgets = dast.draw_budgets(Seeded, 1, problems, level)
        return dast.select(problems, probe, responses, budgets, Seeded, 1)
    return decide


def hs_star(n, rounds=3):
    """A slice of n / 3, the default's share of GSM8K and MATH: three pre-samples each, and five more on average."""
    import hs_star
    import numpy as np
    total = n
    n = n // rounds
    hs_star.TAU_LOW, hs_star.TAU_HIGH, hs_star.SLICE = 0.15, 0.65, n
    rng = np.random.default_rng(0)
    problems = problems_of(n)
    pre = hs_star.PRE_SAMPLES
    shares = rng.beta(0.5, 0.5, n)

    def draws(k, begin, count):
        rewards = (0.6 * shares[k] + 0.4 * rng.random(count)).tolist()
        hits = (rng.random(count) < shares[k]).tolist()
        return [{**record(k, begin + d, hits[d]), "reward": rewards[d]} for d in range(count)]

    def counts_of(difficulties):
        return hs_star.quotas([name for _, _, name in difficulties], Seeded.rng(1, "quotas"))

    presamples = []
    for k in range(n):
        presamples += draws(k, 0, pre)
    responses = []
    for k, count in enumerate(counts_of(hs_star.classify(problems, presamples))):
        responses += presamples[pre * k:pre * (k + 1)] + draws(k, pre, count)

    def decide():
        hs_star.slice_of(total, 1, Seeded)
        difficulties = hs_star.classify(problems, presamples)
        return hs_star.select(problems, difficulties, counts_of(difficulties), responses, Seeded, 1)
    return decide


def sai_dpo(n):
    """20 clusters; of n problems 1 % are probed, and the defaults' shares of 103,000 are drawn and kept."""
    import numpy as np
    import sai_dpo
    size = n * sai_dpo.SAMPLES_PER_ROUND // 103_000
    sai_dpo.PAIRS_PER_ROUND = n * sai_dpo.PAIRS_PER_ROUND // 103_000
    rng = np.random.default_rng(0)
    k = sai_dpo.N_CLUSTERS
    clusters = rng.integers(0, k, n)
    shares_right = rng.beta(0.5, 0.5, n)
    probe = sai_dpo.probe_of(clusters, Seeded.rng("probe"))
    pool = np.setdiff1d(np.arange(n), probe)
    used = pool[:n // 5]

    def answers(places):
        hits = rng.random((len(places), sai_dpo.K_SAMPLES)) < shares_right[places][:, None]
        return [record(i, d, hit) for i, row in zip(places, hits) for d, hit in enumerate(row.tolist())]

    def before_draws(probe_answers):
        rates = np.array([row["p"] for row in sai_dpo.measure(probe_answers)])
        unused = np.setdiff1d(pool, used)
        masses = sai_dpo.error_masses(rates, clusters[probe], np.bincount(clusters[unused], minlength=k))
        shares = sai_dpo.shares_of(masses)
        weights = sai_dpo.weights_of(shares, rates, clusters[probe])
        chosen = sai_dpo.draw(unused, clusters, weights, size, Seeded.rng(1, "draw"))
        return masses, shares, weights, chosen

    probe_answers = answers(probe)
    responses = answers(before_draws(probe_answers)[-1])  # the same places are drawn again below

    def decide():
        sai_dpo.probe_of(clusters, Seeded.rng("probe"))
        masses, shares, weights, chosen = before_draws(probe_answers)
        return sai_dpo.select(clusters[chosen], masses, shares, weights, responses, Seeded, 1)
    return decide


METHODS = {"adastar": adastar, "dast, the toy's numbers of draws": functools.partial(
               dast, K_PROBE=5, TARGETS=(1, 2, 3, 4), BUDGETS=(2, 4, 8, 8)),
           "dast": dast, "dast --loss dpo": functools.partial(dast, LOSS="dpo"), "hs_star": hs_star,
           "sai_dpo": sai_dpo}


def measure(method, n):
    """Return (processor seconds, GiB of libraries and records, GiB that the decision adds), all in this process."""
    decide = METHODS[method](n)
    before = gib()
    began = time.process_time()
    selection = decide()
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert selection
    return seconds, before, peak - before
