"""How P of dast.py changes the proportions of D_a, simulated: no model, takes seconds.

  python tests/studies/proportions.py

Each of 7,473 problems (GSM8K's number) has a rate p at which the model answers it correctly, drawn from a Beta
distribution. Ten draws of a probe give its level. Then answers are drawn as in dast.py, by level with P, ten
to each problem without (vanilla), and correct ones are kept, all taken as distinct. "GSM8K-like" is
Beta(0.98, 0.84), fitted to what vanilla keeps with the authors' K = 10: 41,173 answers, 20,884 of E, 15,277 of M,
4,490 of H and 522 of U. "MATH-like" is Beta(0.36, 1.44): 14,835 of 75,000 draws are correct.

Why dast.py has its TARGETS and BUDGETS: P "increases data size" for challenging queries, so H and U should clearly
gain over vanilla, at least twofold, and the whole should not shrink. Targets of 1, 2, 3 and 4 (the first version)
discard most of what easy problems give, and D_a shrinks to a third. With 3, 6, 9 and 12 nothing shrinks; but they
want more of H and U than these can give, and U is drawn from 80 times for the last few answers, so on MATH most
draws are spent there. Targets of 5, 6, 7 and 8 keep D_a as large as vanilla's on GSM8K, so that only proportions
differ, and 40 draws per problem of U give most of what it has to give at half the price."""
import sys

import numpy as np

from pieces import ROOT

sys.path.insert(0, str(ROOT))
import dast  # noqa: E402

RATES = {"GSM8K-like": (0.98, 0.84), "MATH-like": (0.36, 1.44)}
VANILLA = ((10, 10, 10, 10), (10, 10, 10, 10))  # each of ten draws counts if it is correct
ARMS = {"vanilla": VANILLA, "dast.py": (dast.TARGETS, dast.BUDGETS),
        "first version": ((1, 2, 3, 4), (10, 20, 40, 80)), "three times that": ((3, 6, 9, 12), (10, 20, 40, 80)),
        "the same, U 80": (dast.TARGETS, (10, 20, 40, 80)), "E and M as vanilla": ((10, 10, 40, 80),) * 2}


def simulate(rates, targets, budgets, k_probe=10, seed=0):
    """Return (kept, draws): arrays by level, E to U, from (n,) rates at which problems are answered correctly."""
    rng = np.random.default_rng(seed)
    kept = np.zeros(4, int)
    draws = np.zeros(4, int)
    for p in rates:
        hardness = "EMHU".index(dast.level_of(rng.binomial(k_probe, p) / k_probe))
        correct = np.cumsum(rng.random(budgets[hardness]) < p)  # after each draw
        target = targets[hardness]
        kept[hardness] += min(target, correct[-1])
        draws[hardness] += min(len(correct), 1 + np.sum(correct < target))
    return kept, draws


def main():
    for name, shape in RATES.items():
        rates = np.random.default_rng(1).beta(*shape, 7473)
        print(f"\n{name:<22}{'kept: E':>9}{'M':>8}{'H':>8}{'U':>8}{'all':>9}{'of vanilla':>12}{'draws':>10}")
        reference, _ = simulate(rates, *VANILLA)
        for arm, (targets, budgets) in ARMS.items():
            kept, draws = simulate(rates, targets, budgets)
            by_level = f"{kept[0]:>9,}" + "".join(f"{n:>8,}" for n in kept[1:])
            print(f"{arm:<22}{by_level}{kept.sum():>9,}{kept.sum() / reference.sum():>12.0%}{draws.sum():>10,}")


if __name__ == "__main__":
    main()
