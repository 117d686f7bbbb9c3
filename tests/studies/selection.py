"""What a round's decision costs each method: METHODS and `measure`, for P9 of bench.py.

The decision is each pure function between the answers and selection.jsonl, by its own name; no file is read or written.
Records are made up, with the keys that common.sample gives (hs_star: reward too), an id object each, as after reading,
and texts of one letter. Draws per problem are those of the script's constants (of dast.py up to 90, and once as few as
of its toy, 12 on average); the share of right answers is a problem's own, Beta(0.5, 0.5): most are solved nearly always
or hardly ever. In hs_star.py a third of the problems are the round's slice, in sai_dpo.py 19 % are drawn.

Seconds are of the processor, all threads, garbage collection and the kernel's page faults included. GiB are of the
whole process: first the libraries (about 0.53) and the records, then what the decision adds at the worst moment.
"""
import functools
import os
import resource
import time
from pathlib import Path


def gib():
    """What the process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def rng_of(*key):
    """As Run.rng: a generator of its own for each problem has its price."""
    import common
    import numpy as np
    return np.random.default_rng(common.seed_of(0, 1, *key))


def record(k, draw, right):
    """A draw of problem k; as after reading, its id is no other record's object (looking it up takes longer)."""
    return {"id": f"big/train/{k}", "draw": draw, "text": "abcdefgh"[draw % 8], "tokens": 100 + draw,
            "finish": "stop", "correct": right}


def adastar(n):
    """A walk that visits all, with one draw or two to each problem."""
    import adastar
    import common
    import numpy as np
    rng, ids = np.random.default_rng(0), [f"big/train/{i}" for i in range(n)]
    last, w = rng.integers(0, 20, n), rng.integers(0, 3, n) / 2
    place = {i: k for k, i in enumerate(ids)}  # main() has it for the whole run
    first, second = (rng.random((2, n)) < rng.beta(0.5, 0.5, n)).tolist()
    responses = []
    for k in np.lexsort((w, last)).tolist():
        responses.append(record(k, 0, first[k]))
        if not first[k]:
            responses.append(record(k, 1, second[k]))

    def decide():
        adastar.walk_order(last, w, rng)
        visited = common.by_problem(responses)
        before = [place[i] for i in visited]
        outcomes = [adastar.outcomes_of(rs) for rs in visited.values()]
        selection = adastar.select(list(visited), last[before], w[before], outcomes, n // 2, rng)
        for s in selection:
            if s["committed"]:
                last[place[s["id"]]], w[place[s["id"]]] = 1, s["win_rate"]
        return selection
    return decide


def dast(n, **constants):
    """Ten draws of the probe, then draws until there are T distinct correct ones, or B: 28 records to a problem."""
    import common
    import dast
    import numpy as np
    vars(dast).update(constants)
    rng, problems = np.random.default_rng(0), [{"id": f"big/train/{i}", "solution": "s"} for i in range(n)]
    shares = rng.beta(0.5, 0.5, n)
    hits = rng.random((n, dast.K_PROBE)) < shares[:, None]
    probe = [record(k, d, right) for k in range(n) for d, right in enumerate(hits[k].tolist())]
    responses = []
    for k, right in enumerate(hits.sum(1).tolist()):
        target, budget = dast.target_and_budget(dast.level_of(right, dast.K_PROBE))
        drawn = (rng.random(budget) < shares[k]).tolist()
        needed = [d for d, hit in enumerate(drawn) if hit][target - 1:target]
        responses += [record(k, d, hit) for d, hit in enumerate(drawn[:needed[0] + 1 if needed else budget])]

    level = {i: dast.level_of(sum(r["correct"] for r in rs), len(rs))  # once and for all rounds
             for i, rs in common.by_problem(probe).items()}

    def decide():
        limits = dast.draw_limits(None, 1, problems, level)
        return dast.select(problems, probe, responses, limits, 0, rng_of)
    return decide


def hs_star(n, rounds=3):
    """A slice of n / 3, as the default is of GSM8K and MATH: three pre-samples each, and five more on average."""
    import hs_star
    import numpy as np
    total, n = n, n // rounds
    hs_star.TAU_LOW, hs_star.TAU_HIGH, hs_star.SLICE = 0.15, 0.65, n
    rng, problems, pre = np.random.default_rng(0), [{"id": f"big/train/{i}"} for i in range(n)], hs_star.PRE_SAMPLES
    shares = rng.beta(0.5, 0.5, n)

    def draws(k, begin, count):
        rewards = (0.6 * shares[k] + 0.4 * rng.random(count)).tolist()
        return [{**record(k, begin + d, hit), "reward": rewards[d]}
                for d, hit in enumerate((rng.random(count) < shares[k]).tolist())]

    presamples = [r for k in range(n) for r in draws(k, 0, pre)]
    counts = hs_star.quotas([name for *_, name in hs_star.classify(None, problems, presamples)], rng_of("quotas"))
    responses = []
    for k, count in enumerate(counts):
        responses += presamples[pre * k:pre * (k + 1)] + draws(k, pre, count)

    def decide():
        hs_star.slice_of(total, 1, rng_of)
        difficulties = hs_star.classify(None, problems, presamples)
        counts = hs_star.quotas([name for *_, name in difficulties], rng_of("quotas"))
        return hs_star.select(problems, difficulties, counts, responses, rng_of)
    return decide


def sai_dpo(n):
    """20 clusters; of n problems 1 % are probed, and as many drawn and kept as the defaults are of 103,000."""
    import common
    import numpy as np
    import sai_dpo
    drawn, sai_dpo.PAIRS_PER_ROUND = n * sai_dpo.SAMPLES_PER_ROUND // 103_000, n * sai_dpo.PAIRS_PER_ROUND // 103_000
    rng, problems = np.random.default_rng(0), [{"id": f"big/train/{i}"} for i in range(n)]
    clusters = rng.integers(0, sai_dpo.N_CLUSTERS, n)
    shares_right = rng.beta(0.5, 0.5, n)

    def answers(places):
        hits = rng.random((len(places), sai_dpo.K_SAMPLES)) < shares_right[places][:, None]
        return [record(k, d, hit) for k, row in zip(places, hits) for d, hit in enumerate(row.tolist())]

    def before_draws(probed):
        rates = [[] for _ in range(sai_dpo.N_CLUSTERS)]
        for k, rs in zip(probe, common.by_problem(probed).values()):
            rates[clusters[k]].append(common.outcomes_of(rs).count(1) / sai_dpo.K_SAMPLES)
        masses = sai_dpo.error_masses(rates, np.bincount(clusters[np.setdiff1d(pool, used)]))
        shares = sai_dpo.shares_of(masses)
        return masses, shares, sai_dpo.draw_round(pool, used, clusters, shares, drawn, rng_of("draw"))[0]

    probe = sai_dpo.probe_of(clusters, rng_of("probe"))
    pool = np.setdiff1d(np.arange(n), probe)
    used, probed = pool[:n // 5], answers(probe)
    responses = answers(before_draws(probed)[2])  # the same places are drawn again below

    def decide():
        sai_dpo.probe_of(clusters, rng_of("probe"))
        masses, shares, chosen = before_draws(probed)
        facts = [{"cluster": j, "mass": masses[j], "share": shares[j], "weight": shares[j]} for j in range(len(shares))]
        own = [problems[i] for i in chosen]
        return sai_dpo.select(own, [facts[j] for j in clusters[chosen]], shares, responses, rng_of)
    return decide


METHODS = {"adastar": adastar, "dast, the toy's numbers of draws": functools.partial(dast, K_PROBE=5, K_SAMPLES=2),
           "dast": dast, "dast --loss dpo": functools.partial(dast, LOSS="dpo"), "hs_star": hs_star, "sai_dpo": sai_dpo}


def measure(method, n):
    """(processor seconds, GiB of libraries and records, GiB that the decision adds to them), in this very process."""
    decide = METHODS[method](n)
    before, began = gib(), time.process_time()
    selection = decide()
    seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert selection
    return seconds, before, peak - before
