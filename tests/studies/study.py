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
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402


def run(script, name, *flags):
    """One real run, as a user starts it, if the same command has not been to its end yet. The run folder."""
    # "--" because torchrun would take --run for the beginning of its own --run-path
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--", script, "--toy", "--run", name]
    command, folder = [*command, *map(str, flags)], ROOT / "runs" / name
    ended = folder / "study.txt"  # the command that ended well
    if not ended.exists() or ended.read_text() != " ".join(command[5:]):
        print(f"== {name}", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        ended.write_text(" ".join(command[5:]))
    elif changed := [source for source in (script, "common.py") if (folder / source).read_bytes() != (
            ROOT / source).read_bytes()]:
        print(f"== {name}: as it was made, by another {' and '.join(changed)}", flush=True)
    return folder


def correct(folder, path):
    """{problem id: 0 or 1} of one eval.json."""
    return json.loads((folder / path).read_text())["correct"]


def difference(scores, others, rng):
    """Mean difference of two arms, a {problem id: 0..1} per seed each, in points, with its 95 % interval."""
    if scores is others:
        return "-"
    ids = [i for i in scores[0] if all(i in of for of in (*scores, *others))]
    both = [evaluation.table_of(of, ids) for of in (scores, others)]
    return evaluation.percent(evaluation.mean_over_seeds(both[0], rng, both[1]), sign="+")


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
              f"{difference(scores, arms['round 0'], rng):<26}"
              f"{difference(scores, arms['vanilla, same draws'], rng)}")


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


def at(past, flops):
    """{problem id: 0..1} of a run for so many FLOPs of the draws that count; None before its first iteration's end."""
    return past.at("flops", flops) if past.rounds[1]["flops"] <= flops else None


def chosen(past, flops):
    """That of the iteration with the best accuracy on held-out problems, of those that cost at most so much."""
    rounds = [r["round"] for r in past.rounds[1:] if r["flops"] <= flops]
    best = max(rounds, default=None,
               key=lambda t: sum(correct(past.folder, f"round_{t}/eval_held_out.json").values()))
    return past.rounds[best]["right"] if rounds else None


def print_arms(title, arms, reference):
    """A table of {arm: a {problem id: 0..1} per seed, or None}, with differences to one of them."""
    rng = np.random.default_rng(0)
    print(f"\n{title:<32}{'accuracy by seed':<26}{'mean':<8}against {reference}")
    for arm, scores in arms.items():
        if all(scores):
            accuracies = [np.mean(list(s.values())) for s in scores]
            print(f"{arm:<32}{' '.join(f'{a:.1%}' for a in accuracies):<26}{np.mean(accuracies):<8.1%}"
                  + difference(scores, arms[reference], rng) * (arm != reference))


def adastar(seeds):
    """The toy run against its first iteration and the control; then all arms at the FLOPs that all have reached, and
    at half of them (a seed's prompts show other examples, of other lengths: so each seed has its own amount)."""
    control = "random order, stop at beta"
    runs = {arm: [evaluation.Past(adastar_arm(arm, s)) for s in seeds] for arm in ADASTAR}
    mine, ends = runs["AdaSTaR"], [past.rounds[6]["flops"] for past in runs["AdaSTaR"]]  # --toy has six iterations
    toy = {"first iteration": [past.rounds[1]["right"] for past in mine],
           "AdaSTaR": [past.rounds[6]["right"] for past in mine],
           "AdaSTaR, chosen": [chosen(past, end) for past, end in zip(mine, ends)],
           control: [at(past, end) for past, end in zip(runs[control], ends)]}
    print_arms(f"--toy: {min(ends):.2g}-{max(ends):.2g} FLOPs", toy, "first iteration")
    print_arms("--toy", toy, control)
    most = [min(of_arm[s].rounds[-1]["flops"] for of_arm in runs.values()) for s in range(len(seeds))]
    print("\nall arms:", " ".join(f"{flops:.3g}" for flops in most), "FLOPs by seed")
    for title, part in ("half of that", 0.5), ("all of that", 1.0):
        print_arms(title, {arm: [at(past, part * flops) for past, flops in zip(of_arm, most)]
                           for arm, of_arm in runs.items()}, control)
    print_arms("the iteration chosen within it", {arm: [chosen(past, flops) for past, flops in zip(of_arm, most)]
                                                  for arm, of_arm in runs.items()}, control)
    print("\nproblems visited, by iteration; the first in which one is met again although it was committed")
    for place, seed in enumerate(seeds):
        folder = ROOT / "runs" / f"study-adastar-adastar-{seed}"
        rounds = range(1, len(mine[place].rounds))
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


# All from the same model, on the same 300 training problems, without examples in the prompt (but for L, which is about
# these), scored on all 600 test problems; in so many rounds that each generates 140,000 tokens or more
EQUAL = "--n-train 300 --n-test 0 --prompt zero_shot"
DAST, ADASTAR_EQUAL = f"dast.py {EQUAL} --rounds 3", f"adastar.py {EQUAL} --held-out 0 --rounds 16"
HS_STAR_EQUAL, SAI_DPO_EQUAL = (f"hs_star.py {EQUAL} --slice 150 --rounds 5",
                                f"sai_dpo.py {EQUAL} --samples-per-round 150 --rounds 5")
UNSOLVED = "--rounds 4 --train-data runs/toy/train.jsonl"  # the same without worked solutions
HEAD_TO_HEAD = {
    "vanilla rejection sampling": f"{DAST} {UNSOLVED} --variant= --k-probe 1 --k-samples 6",
    "vanilla iterative DPO": f"{HS_STAR_EQUAL} --prm= --difficulty accuracy --pre-samples 8 --pairing random",
    "DAST": f"{DAST} --prompt few_shot --k-samples 1",
    "DAST, P only": f"{DAST} --variant P --k-samples 1",
    "DAST, L only": f"{DAST} --variant L --prompt few_shot --k-samples 5",
    "DAST, neither": f"{DAST} --variant= --k-probe 1 --k-samples 6",
    "DAST, P only, without solutions": f"{DAST} {UNSOLVED} --variant P --k-samples 1",
    "DAST, DPO": f"{DAST} --prompt few_shot --loss dpo --k-samples 1",
    "AdaSTaR": ADASTAR_EQUAL,
    "AdaSTaR, no curriculum": f"{ADASTAR_EQUAL} --curriculum-power 0",
    "AdaSTaR, random order": f"{ADASTAR_EQUAL} --order random",
    "STaR-Acc": f"{ADASTAR_EQUAL} --order random --no-stop-at-beta",
    "HS-STaR": HS_STAR_EQUAL,
    "HS-STaR, accuracy only": f"{HS_STAR_EQUAL} --difficulty accuracy",
    "HS-STaR, random pairs": f"{HS_STAR_EQUAL} --pairing random",
    "HS-STaR, uniform": f"{HS_STAR_EQUAL} --pre-samples 8",
    "SAI-DPO": SAI_DPO_EQUAL,
    "SAI-DPO, static": f"{SAI_DPO_EQUAL} --select static",
    "SAI-DPO, knowledge only": f"{SAI_DPO_EQUAL} --select knowledge",
    "SAI-DPO, random": f"{SAI_DPO_EQUAL} --select random",
}
MAIN = ("vanilla rejection sampling", "vanilla iterative DPO", "DAST", "AdaSTaR", "HS-STaR", "SAI-DPO")
AGAINST = [  # a method and the control that lacks what sets it apart
    ("DAST", "DAST, neither"), ("DAST, P only", "DAST, neither"), ("DAST, L only", "DAST, neither"),
    ("DAST, P only, without solutions", "vanilla rejection sampling"), ("AdaSTaR", "AdaSTaR, random order"),
    ("AdaSTaR", "AdaSTaR, no curriculum"), ("AdaSTaR, random order", "STaR-Acc"), ("AdaSTaR", "STaR-Acc"),
    ("HS-STaR", "vanilla iterative DPO"), ("HS-STaR", "HS-STaR, uniform"),
    ("HS-STaR, random pairs", "vanilla iterative DPO"), ("HS-STaR", "HS-STaR, random pairs"),
    ("SAI-DPO", "SAI-DPO, random"), ("SAI-DPO", "SAI-DPO, static"), ("SAI-DPO, knowledge only", "SAI-DPO, random")]


def without_solutions():
    """The toy's training problems with answers only, under the same ids: runs/toy/train.jsonl."""
    file = ROOT / "runs/toy/train.jsonl"
    problems = [json.loads(line) for line in open(ROOT / "tests/toy/train.jsonl")]
    text = "".join(json.dumps({k: v for k, v in p.items() if k != "solution"}) + "\n" for p in problems)
    if not file.exists() or file.read_text() != text:  # another seed's study may be reading it
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


def head_to_head(seeds):
    """All arms at the most generated tokens that all have reached with all seeds; and pictures of the main ones."""
    without_solutions()
    arms = {arm: [] for arm in HEAD_TO_HEAD}
    for seed in seeds:
        for arm, (script, *flags) in ((arm, command.split()) for arm, command in HEAD_TO_HEAD.items()):
            name = f"head-{re.sub('[^a-z]+', '-', arm.lower()).strip('-')}-{seed}"
            arms[arm].append(evaluation.Past(run(script, name, *flags, "--seed", seed)))
    amount = min(past.rounds[-1]["generated"] for of in arms.values() for past in of)
    reached = {"base": [past.rounds[0]["right"] for past in arms["HS-STaR"]]} | {
        arm: [past.at("generated", amount) for past in of] for arm, of in arms.items()}
    rng = np.random.default_rng(0)
    print(f"\n{f'at {amount:,} generated tokens':<33}{'accuracy by seed':<39}{'mean':<20}{'trained on':<12}{'FLOPs':<9}"
          "against rejection sampling")
    for arm, scores in reached.items():
        by_seed = evaluation.table_of(scores, scores[0])
        mean = evaluation.percent(evaluation.mean_over_seeds(by_seed, rng))
        trained, flops = (np.mean([np.interp(amount, *([r[n] for r in past.rounds] for n in ("generated", what)))
                                   for past in arms.get(arm, [])] or [0]) for what in ("trained", "flops"))
        print(f"{arm:<33}{' '.join(f'{a:.1%}' for a in by_seed.mean(1)):<39}{mean:<20}{trained:<12,.0f}{flops:<9.2g}"
              + difference(scores, reached[MAIN[0]], rng))
    print("\ndifferences there")
    for arm, control in AGAINST:
        print(f"{arm:<33}{f'against {control}':<39}{difference(reached[arm], reached[control], rng)}")
    main, folder = {arm: arms[arm] for arm in MAIN}, ROOT / "runs" / "head_to_head"
    print("\ntimes trained on own answers, at the ends: problems with below 25 %, to 50 %, to 75 %, more right answers")
    for arm, (_, trained) in evaluation.effort(main).items():
        print(f"{arm:<33}" + "  ".join(f"{np.mean(times):.1f}" for times in trained))
    folder.mkdir(exist_ok=True)
    import matplotlib
    matplotlib.use("Agg")
    evaluation.draw_accuracy(main, amount, list(reached["base"][0]), folder / "accuracy.png")
    evaluation.draw_problems(main, folder / "problems.png")
    evaluation.draw_flow(main, folder / "flow.png")
    print(f"\n{folder}: accuracy.png, problems.png, flow.png")


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
