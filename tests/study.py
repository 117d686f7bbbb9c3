"""Long runs whose results stand in README: seeds and arms, resumable (each run is), outside CI.

  python tests/study.py dast           DAST against vanilla self-training at the same number of draws, 3 seeds
  python tests/study.py dast-dpo       the same with --loss dpo
  python tests/study.py adastar        AdaSTaR, its ablations and baselines, accuracy at equal FLOPs, 3 seeds
  python tests/study.py hs_star        HS-STaR, uniform DPO and the ablations at the same budget, 3 seeds
  python tests/study.py sai_dpo        SAI-DPO, its arms, random and static, at the same answers and pairs, 3 seeds
  python tests/study.py head_to_head   base, controls, the four methods and their ablations at the same tokens, 3 seeds
  python tests/study.py dast --seeds 0   with one seed
  python tests/study.py kills          SIGKILL in each phase of small runs of the four scripts, on 1 and 2 processes
  python tests/study.py fuzz           texts made at random through all of checking
  python tests/study.py soak           hundreds of short iterations: memory, open files, threads, temporary files
  python tests/study.py disk           disks that run full at many moments (root only: it mounts them)
  python tests/study.py bad            the cases of tests/test_bad_input.py with each of the five scripts
  python tests/study.py exact          how often vLLM's answers differ from run to run
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import withstand

ROOT = Path(__file__).resolve().parent.parent


def run(script, name, *flags):
    """One real run, as a user starts it; a finished one is only read again. The run folder."""
    print(f"== {name}", flush=True)
    # "--" because torchrun would take --run for the beginning of its own --run-path
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--", script, "--toy", "--run", name]
    subprocess.run([*command, *map(str, flags)], cwd=ROOT, check=True)
    return ROOT / "runs" / name


def correct(folder, path):
    """{problem id: 0 or 1} of one eval.json."""
    return json.loads((folder / path).read_text())["correct"]


def difference(pairs, rng):
    """Mean difference in accuracy of [(a, b)], a pair of {id: 0 or 1} per seed, and its 95 % interval by bootstrap over
    seeds and, inside each, over problems (both models answered the same ones)."""
    deltas = [np.array([a[i] - b[i] for i in sorted(a)], dtype=float) for a, b in pairs]
    means = []
    for _ in range(4000):
        drawn = [deltas[s] for s in rng.integers(len(deltas), size=len(deltas))]
        means.append(np.mean([d[rng.integers(len(d), size=len(d))].mean() for d in drawn]))
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{np.mean([d.mean() for d in deltas]):+.1%} [{low:+.1%}, {high:+.1%}]"


def dast(seeds, loss):
    """Base and round 0, DAST (PL), vanilla at DAST's draws, and vanilla at its number of examples (pairs) too."""
    study, loss = "study" if loss == "sft" else f"study-{loss}", ("--loss", loss)
    arms = {arm: [] for arm in ("base, examples in prompt", "round 0", "DAST", "vanilla, same draws",
                                "vanilla, same draws and size")}
    for seed in seeds:
        one = run("dast.py", f"{study}-dast-{seed}", "--seed", seed, *loss)
        like = f"runs/{one.name}"
        vanilla = run("dast.py", f"{study}-vanilla-{seed}", "--seed", seed, *loss, "--variant", "", "--draws-like",
                      like)
        sized = run("dast.py", f"{study}-sized-{seed}", "--seed", seed, *loss, "--variant", "", "--draws-like", like,
                    "--size-like", like)
        arms["base, examples in prompt"].append(correct(one, "round_0/eval_base.json"))
        arms["round 0"].append(correct(one, "round_0/eval.json"))
        for arm, folder in zip(list(arms)[2:], (one, vanilla, sized)):
            arms[arm].append(correct(folder, "round_3/eval.json"))
    rng = np.random.default_rng(0)
    print(f"\n{'arm':<30}{'accuracy by seed':<26}{'mean':<8}{'against round 0':<26}against vanilla, same draws")
    for arm, scores in arms.items():
        accuracies = [np.mean(list(s.values())) for s in scores]
        print(f"{arm:<30}{' '.join(f'{a:.1%}' for a in accuracies):<26}{np.mean(accuracies):<8.1%}"
              f"{difference(list(zip(scores, arms['round 0'])), rng):<26}"
              f"{difference(list(zip(scores, arms['vanilla, same draws'])), rng)}")


ADASTAR = {  # arm: (iterations, flags); of each as many as spend about as much
    "AdaSTaR": (10, []),
    "random order, stop at beta": (10, ["--order", "random"]),
    "AdaD (no AdaC)": (10, ["--curriculum-power", 0]),
    "without w": (10, ["--order", "stale"]),
    "w first (PF)": (10, ["--order", "hardest"]),
    "STaR": (9, ["--order", "random", "--no-stop-at-beta", "--start", "base"]),
    "STaR-Acc": (9, ["--order", "random", "--no-stop-at-beta"]),
    "STaR-Full": (9, ["--order", "random", "--no-stop-at-beta", "--start", "base", "--train-on-all"]),
    "STaR-Acc-Full": (9, ["--order", "random", "--no-stop-at-beta", "--train-on-all"]),
    "STaR-Acc-Full-K": (3, ["--order", "random", "--no-stop-at-beta", "--train-on-all", "--k-samples", 5, "--no-retry",
                            "--traces", 0]),
    "ReST-EM": (2, ["--order", "random", "--no-stop-at-beta", "--start", "base", "--train-on-all", "--k-samples", 11,
                    "--no-retry", "--traces", 3]),
}


def adastar_arm(arm, seed):
    """One arm with one seed: its run folder."""
    rounds, flags = ADASTAR[arm]
    name = re.sub(r"[^a-z]+", "-", arm.lower()).strip("-")
    return run("adastar.py", f"study-adastar-{name}-{seed}", "--seed", seed, "--rounds", rounds, *flags)


class Curve:
    """What one run of adastar.py reached, and for how many FLOPs (sampling and training, of the draws that count)."""

    def __init__(self, folder):
        metrics = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        self.flops = [m["total_flops"] for m in metrics if m["phase"] == "round"]  # after iteration 0, 1, 2, ...
        self.correct, self.held_out = ([correct(folder, f"round_{t}/{name}.json") for t in range(len(self.flops))]
                                       for name in ("eval", "eval_held_out"))

    def at(self, flops):
        """{problem id: 0..1} for that much, on the straight line between two iterations; None before the first."""
        after = next(t for t, reached in enumerate(self.flops) if reached >= flops)
        part = (flops - self.flops[after - 1]) / (self.flops[after] - self.flops[after - 1])
        return {i: (1 - part) * self.correct[after - 1][i] + part * self.correct[after][i]
                for i in self.correct[0]} if after > 1 else None

    def chosen(self, flops):
        """That of the iteration with the best accuracy on held-out problems, of those that cost at most so much."""
        rounds = [t for t in range(1, len(self.flops)) if self.flops[t] <= flops]
        return self.correct[max(rounds, key=lambda t: sum(self.held_out[t].values()))] if rounds else None


def print_arms(title, arms, reference):
    """A table of {arm: a {problem id: 0..1} per seed, or None}, with differences to one of them."""
    rng = np.random.default_rng(0)
    print(f"\n{title:<32}{'accuracy by seed':<26}{'mean':<8}against {reference}")
    for arm, scores in arms.items():
        if all(scores):
            accuracies = [np.mean(list(s.values())) for s in scores]
            print(f"{arm:<32}{' '.join(f'{a:.1%}' for a in accuracies):<26}{np.mean(accuracies):<8.1%}"
                  + difference(list(zip(scores, arms[reference])), rng) * (arm != reference))


def adastar(seeds):
    """The toy run against its first iteration and the control; then all arms at the FLOPs that all have reached, and
    at half of them (a seed's prompts show other examples, of other lengths: so each seed has its own amount)."""
    control = "random order, stop at beta"
    curves = {arm: [Curve(adastar_arm(arm, s)) for s in seeds] for arm in ADASTAR}
    mine, ends = curves["AdaSTaR"], [c.flops[6] for c in curves["AdaSTaR"]]  # --toy has six iterations
    toy = {"first iteration": [c.correct[1] for c in mine], "AdaSTaR": [c.correct[6] for c in mine],
           "AdaSTaR, chosen": [c.chosen(end) for c, end in zip(mine, ends)],
           control: [c.at(end) for c, end in zip(curves[control], ends)]}
    print_arms(f"--toy: {min(ends):.2g}-{max(ends):.2g} FLOPs", toy, "first iteration")
    print_arms("--toy", toy, control)
    most = [min(of_arm[s].flops[-1] for of_arm in curves.values()) for s in range(len(seeds))]
    print("\nall arms:", " ".join(f"{flops:.3g}" for flops in most), "FLOPs by seed")
    for title, part in ("half of that", 0.5), ("all of that", 1.0):
        print_arms(title, {arm: [c.at(part * flops) for c, flops in zip(of_arm, most)]
                           for arm, of_arm in curves.items()}, control)
    print_arms("the iteration chosen within it", {arm: [c.chosen(flops) for c, flops in zip(of_arm, most)]
                                                  for arm, of_arm in curves.items()}, control)
    print("\nproblems visited, by iteration; the first in which one is met again although it was committed")
    for curve_seed, seed in enumerate(seeds):
        folder = ROOT / "runs" / f"study-adastar-adastar-{seed}"
        rounds = range(1, len(mine[curve_seed].flops))
        walks = [[json.loads(line) for line in open(folder / f"round_{t}" / "selection.jsonl")] for t in rounds]
        again = next((t for t, walk in zip(rounds, walks) if any(s["last"] for s in walk)), None)
        print(f"seed {seed}:", *(len(walk) for walk in walks), f"; iteration {again}")


HS_STAR = {"HS-STaR": [], "uniform": ["--pre-samples", 8], "accuracy only": ["--difficulty", "accuracy"],
           "reward only": ["--difficulty", "reward"], "random pairs": ["--pairing", "random"],
           "uniform, random pairs": ["--pre-samples", 8, "--pairing", "random"]}


def hs_star(seeds):
    """M_0, and all arms after the toy run's three rounds, with as many answers drawn by each."""
    folders = {arm: [run("hs_star.py", f"study-hs_star-{re.sub('[^a-z]+', '-', arm.lower())}-{seed}", "--seed", seed,
                         *flags) for seed in seeds] for arm, flags in HS_STAR.items()}
    rounds = range(1, 4)
    arms = {"M_0": [correct(folder, "round_0/eval.json") for folder in folders["HS-STaR"]]}
    arms |= {arm: [correct(folder, "round_3/eval.json") for folder in of_arm] for arm, of_arm in folders.items()}
    for reference in ("M_0", "uniform", "uniform, random pairs"):
        print_arms("after three rounds", arms, reference)
    print(f"\n{'by seed':<24}{'answers':<22}{'pairs':<20}boundary problems, by round")
    for arm, of_arm in folders.items():
        lines = [[[json.loads(line) for line in open(folder / f"round_{t}" / f"{name}.jsonl")] for t in rounds]
                 for name in ("responses", "selection") for folder in of_arm]
        drawn, chosen = lines[:len(seeds)], lines[len(seeds):]
        print(f"{arm:<24}{' '.join(str(sum(map(len, r))) for r in drawn):<22}"
              f"{' '.join(str(sum(len(s['pairs']) for of in r for s in of)) for r in chosen):<20}"
              + "; ".join(" ".join(str(sum(s["class"] == "boundary" for s in of)) for of in r) for r in chosen))


SAI_DPO = {"SAI-DPO": [], "knowledge only": ["--select", "knowledge"], "difficulty only": ["--select", "difficulty"],
           "static": ["--select", "static"], "random": ["--select", "random"],
           "middle first": ["--prefer", "middle"]}


def sai_dpo(seeds):
    """pi_0, and all arms after the toy run's three rounds; what each drew of the skill that was planted weak."""
    folders = {arm: [run("sai_dpo.py", f"study-sai_dpo-{re.sub('[^a-z]+', '-', arm.lower())}-{seed}", "--seed", seed,
                         *flags) for seed in seeds] for arm, flags in SAI_DPO.items()}
    arms = {"pi_0": [correct(folder, "round_0/eval.json") for folder in folders["SAI-DPO"]]}
    arms |= {arm: [correct(folder, "round_3/eval.json") for folder in of_arm] for arm, of_arm in folders.items()}
    for reference in ("pi_0", "random", "static"):
        print_arms("after three rounds", arms, reference)
    costs = set()  # answers and pairs of a run: of all the same
    print(f"\n{'by seed':<20}{'answers':<22}{'pairs':<16}of 'remainders', by round: error in the probe, drawn")
    for arm, of_arm in folders.items():
        metrics = [[json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in of_arm]
        answers = [sum(m["draws"] for m in of if m["phase"] in ("probe", "rollout")) for of in metrics]
        clusters = [[m["clusters"] for m in of if m["phase"] == "select"] for of in metrics]
        kept = [[sum(c["kept"] for c in of) for of in rounds] for rounds in clusters]
        costs.update((n, *of) for n, of in zip(answers, kept))
        assert len(costs) == 1, f"the arms are not at equal cost: {costs}"
        weak = [[next(c for c in of if c["tags"] == ["remainders"]) for of in rounds] for rounds in clusters]
        print(f"{arm:<20}{' '.join(map(str, answers)):<22}"
              f"{' '.join(str(sum(of)) for of in kept):<16}"
              + "; ".join(" ".join(f"{c['error']:.0%} {c['drawn']}" for c in rounds) for rounds in weak))


HEAD_TO_HEAD = {  # arm: (script, flags), as many rounds as generate about 150,000 tokens
    "vanilla rejection sampling": ("dast.py", "--variant= --train-data {unsolved} --k-probe 1 --k-samples 6 --rounds 4"),
    "vanilla iterative DPO": ("hs_star.py", "--prm= --difficulty accuracy --pre-samples 8 --pairing random"),
    "DAST": ("dast.py", "--prompt few_shot --k-samples 1"),
    "DAST, P only": ("dast.py", "--variant P --k-samples 1"),
    "DAST, L only": ("dast.py", "--variant L --prompt few_shot --k-samples 5"),
    "DAST, neither": ("dast.py", "--variant= --k-probe 1 --k-samples 6"),
    "DAST, P only, without solutions": ("dast.py", "--variant P --train-data {unsolved} --k-samples 1 --rounds 4"),
    "DAST, DPO": ("dast.py", "--prompt few_shot --loss dpo --k-samples 1"),
    "AdaSTaR": ("adastar.py", ""),
    "AdaSTaR, no curriculum": ("adastar.py", "--curriculum-power 0"),
    "AdaSTaR, random order": ("adastar.py", "--order random"),
    "STaR-Acc": ("adastar.py", "--order random --no-stop-at-beta"),
    "HS-STaR": ("hs_star.py", ""),
    "HS-STaR, accuracy only": ("hs_star.py", "--difficulty accuracy"),
    "HS-STaR, random pairs": ("hs_star.py", "--pairing random"),
    "HS-STaR, uniform": ("hs_star.py", "--pre-samples 8"),
    "SAI-DPO": ("sai_dpo.py", ""),
    "SAI-DPO, static": ("sai_dpo.py", "--select static"),
    "SAI-DPO, knowledge only": ("sai_dpo.py", "--select knowledge"),
    "SAI-DPO, random": ("sai_dpo.py", "--select random"),
}
ON_EQUAL_TERMS = {  # the same 300 training problems without examples in the prompt, and all 600 test problems
    "dast.py": "--rounds 3", "adastar.py": "--held-out 0 --rounds 16", "hs_star.py": "--slice 150 --rounds 5",
    "sai_dpo.py": "--samples-per-round 150 --rounds 5"}


def head_to_head(seeds):
    """All arms from the same model, on the same training and test problems; each reads at the same generated tokens."""
    unsolved = ROOT / "runs/toy/train.jsonl"  # problems and answers only, with the same ids
    unsolved.parent.mkdir(exist_ok=True)
    unsolved.write_text("".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "solution"}) + "\n"
                                for line in open(ROOT / "tests/toy/train.jsonl")))
    folders = {arm: [] for arm in HEAD_TO_HEAD}
    for seed in seeds:
        for arm, (script, flags) in HEAD_TO_HEAD.items():
            name = f"head-{re.sub('[^a-z]+', '-', arm.lower()).strip('-')}-{seed}"
            folders[arm].append(run(script, name, *"--n-train 300 --n-test 0 --prompt zero_shot --seed".split(), seed,
                                    *ON_EQUAL_TERMS[script].split(),
                                    *flags.format(unsolved="runs/toy/train.jsonl").split()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"dast": lambda: dast(numbers, "sft"), "dast-dpo": lambda: dast(numbers, "dpo"),
               "adastar": lambda: adastar(numbers), "hs_star": lambda: hs_star(numbers),
               "sai_dpo": lambda: sai_dpo(numbers), "head_to_head": lambda: head_to_head(numbers),
               "kills": withstand.kills, "fuzz": withstand.fuzz,
               "soak": withstand.soak, "disk": withstand.disk, "bad": withstand.bad, "exact": withstand.exact}
    parser.add_argument("name", choices=list(studies))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated, of the first five [0,1,2]")
    arguments = parser.parse_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    numbers = list(map(int, arguments.seeds.split(",")))
    studies[arguments.name]()
