"""Long runs whose results stand in README: arms and seeds, outside CI. Each run is resumable, and those of head_to_head
and real leave a line each in head_to_head.jsonl and real_model.jsonl here, so that nothing is run twice.

  python tests/studies/study.py NAME           with three seeds, where there are any
  python tests/studies/study.py dast --seeds 0   with one

  dast           DAST against vanilla self-training at the same number of draws
  dast-dpo       the same with --loss dpo
  adastar        AdaSTaR, its ablations and baselines, accuracy at equal FLOPs
  hs_star        HS-STaR, uniform DPO and the ablations at the same budget
  sai_dpo        SAI-DPO, its arms, random and static, at the same answers and pairs
  head_to_head   base, controls, the four methods and their ablations at the same tokens
  real           the same on SmolLM2-135M, after tests/studies/real_model.py runs/real
  kills          SIGKILL in each phase of small runs of the four scripts, on 1 and 2 processes
  fuzz           texts made at random through all of checking
  soak           hundreds of short iterations: memory, open files, threads, temporary files
  disk           disks that run full at many moments (root only: it mounts them)
  exact          how often vLLM's answers differ from run to run
"""
import argparse
import json
import re
import shlex
import subprocess
import sys

import numpy as np

import withstand

from pieces import ROOT, lines

sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import eval as evaluation  # noqa: E402


def run(script, name, *flags):
    """One real run, as a user starts it, if the same command has not been to its end yet. The run folder."""
    command = [sys.executable, script, "--name", name, *map(str, flags)]
    folder = ROOT / "runs" / name
    ended = folder / "study.txt"  # the command that ended well
    if not ended.exists() or ended.read_text() != " ".join(command[1:]):
        print(f"== {name}", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        ended.write_text(" ".join(command[1:]))
        return folder
    for source in (script, "common.py"):
        if (folder / source).read_bytes() != (ROOT / source).read_bytes():
            print(f"== {name}: as it was made, by another {source}", flush=True)
    return folder


def name_of(arm):
    """An arm's name as part of a folder's."""
    return re.sub("[^a-z]+", "-", arm.lower()).strip("-")


def correct(folder, path):
    """{problem id: 0 or 1} of one eval.json."""
    return json.loads((folder / path).read_text())["correct"]


def difference(scores, others):
    """Mean difference of two arms, a {problem id: 0..1} per seed each, in points, with its 95% interval."""
    if scores is others:
        return "-"
    ids = [i for i in scores[0] if all(i in of for of in (*scores, *others))]
    gain, half = evaluation.gain_of(evaluation.table_of(scores, ids), evaluation.table_of(others, ids))
    return f"{gain:+.1f} [{gain - half:+.1f}, {gain + half:+.1f}]"


def dast(seeds, loss):
    """Base and round 0, DAST (PL), vanilla at DAST's draws, and vanilla at its number of examples (pairs)
    too."""
    study = "study" if loss == "sft" else f"study-{loss}"
    arms = {arm: [] for arm in ("base", "base, examples in prompt", "round 0", "DAST", "vanilla, same draws",
                                "vanilla, same draws and size")}
    for seed in seeds:
        flags = ["--toy", "--seed", seed, "--loss", loss]
        one = run("dast.py", f"{study}-dast-{seed}", *flags)
        flags += ["--variant", "", "--draws-like", f"runs/{one.name}"]
        vanilla = run("dast.py", f"{study}-vanilla-{seed}", *flags)
        sized = run("dast.py", f"{study}-sized-{seed}", *flags, "--size-like", f"runs/{one.name}")
        arms["base"].append(correct(one, "round_0/eval_base.json"))
        arms["base, examples in prompt"].append(correct(one, "round_0/eval_examples.json"))
        arms["round 0"].append(correct(one, "round_0/eval.json"))
        arms["DAST"].append(correct(one, "round_3/eval.json"))
        arms["vanilla, same draws"].append(correct(vanilla, "round_3/eval.json"))
        arms["vanilla, same draws and size"].append(correct(sized, "round_3/eval.json"))
    bases = ("base", "base, examples in prompt")
    better = max(bases, key=lambda arm: sum(sum(scores.values()) for scores in arms[arm]))
    for reference in (better, "round 0", "vanilla, same draws"):
        print_arms("after three rounds", arms, reference)


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
    "STaR-Acc-Full-K": (3, ["--order", "random", "--no-stop-at-beta", "--train-on-all", "--k-samples", 5,
                            "--no-retry", "--traces", 0]),
    "ReST-EM": (2, ["--order", "random", "--no-stop-at-beta", "--start", "base", "--train-on-all",
                    "--k-samples", 11, "--no-retry", "--traces", 3]),
}


def adastar_arm(arm, seed):
    """One arm with one seed: its run folder."""
    rounds, flags = ADASTAR[arm]
    return run("adastar.py", f"study-adastar-{name_of(arm)}-{seed}", "--toy", "--seed", seed, "--rounds", rounds,
               *flags)


def at(past, flops):
    """{problem id: 0..1} of a run for so many FLOPs of the draws that count; None before its first
    iteration's end."""
    return past.at("flops", flops) if past.rounds[1]["flops"] <= flops else None


def chosen(past, flops):
    """That of the iteration with the best accuracy on held-out problems, of those that cost at most so
    much."""
    rounds = [r["round"] for r in past.rounds[1:] if r["flops"] <= flops]
    best = max(rounds, default=None,
               key=lambda t: sum(correct(past.folder, f"round_{t}/eval_held_out.json").values()))
    return past.rounds[best]["right"] if rounds else None


def print_arms(title, arms, reference):
    """A table of {arm: a {problem id: 0..1} per seed, or None}, with differences to one of them."""
    print(f"\n{title:<32}{'accuracy by seed':<26}{'mean':<8}against {reference}")
    for arm, scores in arms.items():
        if not all(scores):
            continue
        accuracies = [np.mean(list(s.values())) for s in scores]
        by_seed = " ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        print(f"{arm:<32}{by_seed:<26}{np.mean(accuracies):<8.1%}{difference(scores, arms[reference])}")


def adastar(seeds):
    """The toy run against its first iteration and the control; then all arms at the FLOPs that all have
    reached, and at half of them (a seed's prompts show other examples, of other lengths: so each seed has its
    own amount)."""
    control = "random order, stop at beta"
    runs = {}
    for arm in ADASTAR:
        runs[arm] = [evaluation.Past(adastar_arm(arm, seed)) for seed in seeds]
    mine = runs["AdaSTaR"]
    ends = [past.rounds[6]["flops"] for past in mine]  # --toy has six iterations
    toy = {"first iteration": [past.rounds[1]["right"] for past in mine],
           "AdaSTaR": [past.rounds[6]["right"] for past in mine],
           "AdaSTaR, chosen": [chosen(past, end) for past, end in zip(mine, ends)],
           control: [at(past, end) for past, end in zip(runs[control], ends)]}
    print_arms(f"--toy: {min(ends):.2g}-{max(ends):.2g} FLOPs", toy, "first iteration")
    print_arms("--toy", toy, control)
    most = [min(of_arm[s].rounds[-1]["flops"] for of_arm in runs.values()) for s in range(len(seeds))]
    print("\nall arms:", " ".join(f"{flops:.3g}" for flops in most), "FLOPs by seed")
    for title, part in (("half of that", 0.5), ("all of that", 1.0)):
        reached = {}
        for arm, of_arm in runs.items():
            reached[arm] = [at(past, part * flops) for past, flops in zip(of_arm, most)]
        print_arms(title, reached, control)
    best = {}
    for arm, of_arm in runs.items():
        best[arm] = [chosen(past, flops) for past, flops in zip(of_arm, most)]
    print_arms("the iteration chosen within it", best, control)
    print("\nproblems visited, by iteration; the first in which one is met again although it was committed")
    for past, seed in zip(mine, seeds):
        sizes = []
        again = None
        for t in range(1, len(past.rounds)):
            walk = lines(past.folder / f"round_{t}" / "selection.jsonl")
            sizes.append(len(walk))
            if again is None and any(s["last"] for s in walk):
                again = t
        print(f"seed {seed}:", *sizes, f"; iteration {again}")


HS_STAR = {"HS-STaR": [], "uniform": ["--pre-samples", 8], "accuracy only": ["--difficulty", "accuracy"],
           "reward only": ["--difficulty", "reward"], "random pairs": ["--pairing", "random"],
           "uniform, random pairs": ["--pre-samples", 8, "--pairing", "random"]}


def runs_of(script, arms, seeds):
    """{arm: its run folders, by seed}."""
    folders = {}
    for arm, flags in arms.items():
        name = f"study-{script.removesuffix('.py')}-{name_of(arm)}"
        folders[arm] = [run(script, f"{name}-{seed}", "--toy", "--seed", seed, *flags) for seed in seeds]
    return folders


def scores_of(folders, first, base):
    """{arm: accuracies after round 3, a {problem id: 0 or 1} per seed}, and before them those of round 0."""
    arms = {base: [correct(folder, "round_0/eval.json") for folder in folders[first]]}
    for arm, of_arm in folders.items():
        arms[arm] = [correct(folder, "round_3/eval.json") for folder in of_arm]
    return arms


def hs_star(seeds):
    """M_0, and all arms after the toy run's three rounds, with as many answers drawn by each."""
    folders = runs_of("hs_star.py", HS_STAR, seeds)
    arms = scores_of(folders, "HS-STaR", "M_0")
    for reference in ("M_0", "uniform", "uniform, random pairs"):
        print_arms("after three rounds", arms, reference)
    print(f"\n{'by seed':<24}{'answers':<22}{'pairs':<20}boundary problems, by round")
    for arm, of_arm in folders.items():
        answers = []
        pairs = []
        boundary = []
        for folder in of_arm:
            rounds = [lines(folder / f"round_{t}" / "selection.jsonl") for t in (1, 2, 3)]
            answers.append(sum(len(s["outcomes"]) for selection in rounds for s in selection))
            pairs.append(sum(len(s["pairs"]) for selection in rounds for s in selection))
            boundary.append([sum(s["class"] == "boundary" for s in selection) for selection in rounds])
        print(f"{arm:<24}{str(answers)[1:-1]:<22}{str(pairs)[1:-1]:<20}{str(boundary)[1:-1]}")


SAI_DPO = {"SAI-DPO": [], "knowledge only": ["--select", "knowledge"], "difficulty only": ["--select",
                                                                                           "difficulty"],
           "static": ["--select", "static"], "random": ["--select", "random"], "hardest first": ["--prefer",
                                                                                                 "hardest"]}


def sai_dpo(seeds):
    """pi_0, and all arms after the toy run's three rounds; what each drew of the skill that was planted
    weak."""
    folders = runs_of("sai_dpo.py", SAI_DPO, seeds)
    arms = scores_of(folders, "SAI-DPO", "pi_0")
    for reference in ("pi_0", "random", "static"):
        print_arms("after three rounds", arms, reference)
    costs = set()  # answers and pairs of a run: of all the same
    print(
        f"\n{'by seed':<20}{'answers':<22}{'pairs':<16}of 'remainders', by round: error in the probe, drawn")
    for arm, of_arm in folders.items():
        answers = []
        pairs = []
        weak = []
        for folder in of_arm:
            metrics = lines(folder / "metrics.jsonl")
            rounds = []
            for m in metrics:
                if m["phase"] == "select":
                    rounds.append([c for name, c in m.items() if name.startswith("cluster ")])
            answers.append(sum(m["draws"] for m in metrics if m["phase"] in ("probe", "responses")))
            pairs.append(sum(c["kept"] for clusters in rounds for c in clusters))
            found = [c for clusters in rounds for c in clusters if c["tags"] == "remainders"]
            weak.append(" ".join(f"{c['error']:.0%} {c['drawn']}" for c in found))
        costs.update(zip(answers, pairs))
        assert len(costs) == 1, f"the arms are not at equal cost: {costs}"
        print(f"{arm:<20}{str(answers)[1:-1]:<22}{str(pairs)[1:-1]:<16}{'; '.join(weak)}")


# All from the same model, on the same 300 training problems, without examples in the prompt (but for L, which
# is about these), scored on all 600 test problems; in so many rounds that each makes 140,000 tokens or more
EQUAL = "--toy --n-train 300 --n-test 0 --prompt zero_shot"
DAST = f"dast.py {EQUAL} --rounds 3"
VANILLA = f"{DAST} --variant= --k-probe 1 --k-samples 6"
ADASTAR_EQUAL = f"adastar.py {EQUAL} --held-out 0 --rounds 16"
HS_STAR_EQUAL = f"hs_star.py {EQUAL} --slice 150 --rounds 5"
SAI_DPO_EQUAL = f"sai_dpo.py {EQUAL} --samples-per-round 150 --rounds 5"
LORA = "--lora-rank 8 --lora-alpha 16 --lr 1e-3"  # with seed 100, 8 rounds: 64.8%; at 3e-3 59.5, at 1e-2 7.3
UNSOLVED = "--rounds 4 --train-data runs/toy/train.jsonl"  # the same without worked solutions
HEAD_TO_HEAD = {
    "vanilla rejection sampling": f"{VANILLA} {UNSOLVED}",
    "vanilla iterative DPO": f"{HS_STAR_EQUAL} --prm= --difficulty accuracy --pre-samples 8 --pairing random",
    "DAST": f"{DAST} --prompt few_shot",
    "DAST, P only": f"{DAST} --variant P",
    "DAST, L only": f"{DAST} --variant L --prompt few_shot --k-samples 5",
    "DAST, neither": VANILLA,
    "DAST, neither, size of P": f"{VANILLA} --size-like runs/head-dast-p-only-SEED",
    "DAST, P only, without solutions": f"{DAST} {UNSOLVED} --variant P",
    "vanilla, size of P": f"{VANILLA} {UNSOLVED} --size-like runs/head-dast-p-only-without-solutions-SEED",
    "DAST, DPO": f"{DAST} --prompt few_shot --loss dpo",
    "AdaSTaR": ADASTAR_EQUAL,
    "AdaSTaR, no curriculum": f"{ADASTAR_EQUAL} --curriculum-power 0",
    "AdaSTaR, random order": f"{ADASTAR_EQUAL} --order random",
    "AdaSTaR, LoRA": f"{ADASTAR_EQUAL} {LORA}",
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
    ("DAST", "DAST, neither"),
    ("DAST, P only", "DAST, neither"),
    ("DAST, L only", "DAST, neither"),
    ("DAST, P only", "DAST, neither, size of P"),
    ("DAST, P only, without solutions", "vanilla rejection sampling"),
    ("DAST, P only, without solutions", "vanilla, size of P"),
    ("AdaSTaR", "AdaSTaR, random order"),
    ("AdaSTaR", "AdaSTaR, no curriculum"),
    ("AdaSTaR", "STaR-Acc"),
    ("AdaSTaR, random order", "STaR-Acc"),
    ("AdaSTaR, LoRA", "AdaSTaR"),
    ("HS-STaR", "vanilla iterative DPO"),
    ("HS-STaR", "HS-STaR, uniform"),
    ("HS-STaR, random pairs", "vanilla iterative DPO"),
    ("HS-STaR", "HS-STaR, random pairs"),
    ("SAI-DPO", "SAI-DPO, random"),
    ("SAI-DPO", "SAI-DPO, static"),
    ("SAI-DPO, knowledge only", "SAI-DPO, random"),
]


def without_solutions():
    """The toy's training problems with answers only, under the same ids: runs/toy/train.jsonl."""
    file = ROOT / "runs/toy/train.jsonl"
    text = ""
    for problem in lines(ROOT / "tests/toy/train.jsonl"):
        problem.pop("solution")
        text += json.dumps(problem) + "\n"
    if not file.exists() or file.read_text() != text:  # another seed's study may be reading it
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


def spent_at(pasts, what, amount):
    """The mean over runs of what was spent when `amount` tokens were generated, between rounds on a straight
    line."""
    spent = []
    for past in pasts:
        generated = [r["generated"] for r in past.rounds]
        spent.append(np.interp(amount, generated, [r[what] for r in past.rounds]))
    return np.mean(spent)


def of_words(arms, words):
    """The arms whose names have one of the words; all, if there is no word."""
    return [arm for arm in arms if not words or any(word in arm for word in words)]


def head_to_head(seeds, words):
    """Arms on the toy whose names have one of the words (without words all)."""
    without_solutions()
    ids = ids_of("tests/toy/train.jsonl", 300, "tests/toy/test.jsonl")
    arms = stored("head_to_head.jsonl", "head", HEAD_TO_HEAD, seeds, words, ids)
    compare(arms, AGAINST, ROOT / "runs" / "head_to_head")


def ids_of(train, n_train, test):
    """The ids of the problems that all arms train on, and of those that score them."""
    train = common.load_problems(train, "train", "data", n_train)
    test = common.load_problems(test, "test", "data", 0)
    return {"train": [p["id"] for p in train], "test": [p["id"] for p in test]}


def stored(file, study, arms, seeds, words, ids):
    """{arm: a Stored for each seed}. A run whose command has a line in `file` is not made again; the others are made
    now, in folders whose names begin with `study`. So take a line out to have its run made again (with those of
    --size-like and --draws-like, which read its folder)."""
    file = ROOT / "tests/studies" / file
    pasts = {arm: [] for arm in of_words(arms, words)}
    for seed in seeds:
        for arm in pasts:
            command = f"{arms[arm].replace('SEED', str(seed))} --seed {seed}"
            if command not in [line["command"] for line in lines(file)]:
                script, *flags = shlex.split(command)
                commit = commit_of_code()
                past = evaluation.Past(run(script, f"{study}-{name_of(arm)}-{seed}", *flags))
                others = [line for line in lines(file) if (line["arm"], line["seed"]) != (arm, seed)]
                line = {"arm": arm, "seed": seed, "command": command, "commit": commit} | packed(past, ids)
                common.write(file, [*others, line])
            [line] = [line for line in lines(file) if line["command"] == command]
            pasts[arm].append(Stored(line, ids))
    return pasts


def packed(past, ids):
    """Return what a Past has, in few letters."""
    rounds = []
    for r in past.rounds:
        right = "".join(str(r["right"][i]) for i in ids["test"])
        rounds.append(r | {"seconds": round(r["seconds"]), "flops": float(f"{r['flops']:.4g}"), "right": right})
    counts = np.array([past.problems[i] for i in ids["train"]], dtype=int).T.tolist()
    return {"rounds": rounds, **dict(zip(("sampled", "correct", "trained"), counts))}


def commit_of_code():
    """Return the last commit that touched code, and whether code has changed since."""
    commit = output_of("git", "log", "-1", "--format=%h", "--", "*.py")
    changed = output_of("git", "status", "--porcelain", "--", "*.py")
    return f"{commit}, changed" if changed else commit


def output_of(*command):
    """Return what a command prints."""
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


class Stored(evaluation.Past):
    """A run's line, unpacked."""

    def __init__(self, line, ids):
        self.rounds = []
        for r in line["rounds"]:
            self.rounds.append(r | {"right": dict(zip(ids["test"], map(int, r["right"])))})
        self.end = self.rounds[-1]
        counts = np.array([line["sampled"], line["correct"], line["trained"]]).T
        self.problems = dict(zip(ids["train"], counts))


def compare(arms, against, folder):
    """Print arms, a Past per seed each, at the most generated tokens that all runs have reached, and each at its own
    end; (method, control) pairs at the most that both have reached. Draw the main arms."""
    everyone = sum(arms.values(), [])
    most = most_tokens(everyone)
    print_at(f"at {most:,} generated tokens", arms, dict.fromkeys(arms, most))
    print_at("at the end of each", arms, {arm: most_tokens(of_arm) for arm, of_arm in arms.items()})
    print("\ndifferences at the tokens that both have reached")
    for arm, control in against:
        if arm not in arms or control not in arms:
            continue
        amount = most_tokens(arms[arm] + arms[control])
        gain = difference(*[[past.at("generated", amount) for past in arms[name]] for name in (arm, control)])
        print(f"{arm:<33}{f'against {control}':<39}{gain:<20} at {amount:,}")
    main = {arm: arms[arm] for arm in MAIN if arm in arms} or arms
    print("\ntimes trained on, at the ends: problems with below 25%, to 50%, to 75%, more right")
    bins, counts = evaluation.effort(main)
    for arm, of_arm in counts.items():
        print(f"{arm:<33}" + "  ".join(f"{of_arm[bins == b, 2].mean():.1f}" for b in range(4)))
    evaluation.draw(main, list(everyone[0].end["right"]), folder)


def print_at(title, arms, amounts):
    """A table of arms, each where it had generated {arm: tokens}, against the first."""
    first = next(iter(arms))
    reached = {"base": [past.rounds[0]["right"] for past in arms[first]]}
    for arm, of_arm in arms.items():
        reached[arm] = [past.at("generated", amounts[arm]) for past in of_arm]
    print(f"\n{title:<33}{'accuracy by seed':<39}{'mean':<22}{'generated':<12}{'trained on':<12}{'FLOPs':<9}"
          f"{'minutes':<9}against {first}")
    for arm, scores in reached.items():
        table = evaluation.table_of(scores, scores[0])
        by_seed = " ".join(f"{accuracy:.1%}" for accuracy in table.mean(1))
        score = evaluation.mean_of(table)
        mean = "{:.1%} [{:.1%}, {:.1%}]".format(score["accuracy"], *score["interval"])
        spent = f"{'':<42}"
        if arm in arms:
            trained = spent_at(arms[arm], "trained", amounts[arm])
            flops = spent_at(arms[arm], "flops", amounts[arm])
            minutes = spent_at(arms[arm], "seconds", amounts[arm]) / 60
            spent = f"{amounts[arm]:<12,}{trained:<12,.0f}{flops:<9.2g}{minutes:<9.1f}"
        print(f"{arm:<33}{by_seed:<39}{mean:<22}{spent}{difference(scores, reached[first])}")


def most_tokens(pasts):
    """The most generated tokens that all of some runs have reached."""
    return min(past.rounds[-1]["generated"] for past in pasts)


# The same with SmolLM2-135M, on problems with answers only and no examples in the prompt, about a quarter of an hour a
# run on two cores. Rates were chosen with seed 100, one round each: SFT 1e-5 40.7%, 3e-5 48.8% (324 problems, 3
# answers to each); DPO 1e-5 29.9%, 5e-5 31.2%, but with a loss that rises (72 problems, 8 answers to each).
REAL_TRAIN = 216  # problems
REAL = ("--model runs/real/float32 --train-data runs/real/train.jsonl --test-data runs/real/test.jsonl --prompt chat "
        f"--n-train {REAL_TRAIN} --system 'Answer in one short sentence that ends with the number.' "
        "--max-new-tokens 80 --temperature 0.7 --top-p 1 --top-k 0 --batch-size 16 --warmup 0.05 --clip 1 "
        "--grader tests/studies/last_number.py:last_number --engine vllm --eager --keep-models 1")
REAL_DAST = f"dast.py {REAL} --lr 3e-5 --shots 0"
REAL_ADASTAR = f"adastar.py {REAL} --lr 3e-5 --shots 0 --held-out 0 --steps 4 --rounds 7"
REAL_DPO = f"{REAL} --batch-size 8 --lr-dpo 1e-5"
REAL_HS_STAR = f"hs_star.py {REAL_DPO} --prm= --difficulty accuracy --pairing random --slice 72 --rounds 3"
REAL_SAI_DPO = f"sai_dpo.py {REAL_DPO} --embedder tfidf --n-clusters 9 --k-samples 6 --samples-per-round 60 --rounds 4"
REAL_ARMS = {
    "vanilla rejection sampling": f"{REAL_DAST} --variant= --k-probe 1 --k-samples 3 --rounds 3",
    "DAST": f"{REAL_DAST} --variant P --k-probe 3 --targets 1 2 3 3 --budgets 1 2 4 4 --rounds 2",
    "DAST, draws spread evenly": f"{REAL_DAST} --variant= --k-probe 3 --draws-like runs/real-dast-SEED --rounds 2",
    "AdaSTaR": REAL_ADASTAR,
    "AdaSTaR, random order": f"{REAL_ADASTAR} --order random",
    "vanilla iterative DPO": f"{REAL_HS_STAR} --pre-samples 8",
    "HS-STaR": REAL_HS_STAR,
    "SAI-DPO": REAL_SAI_DPO,
    "SAI-DPO, random problems": f"{REAL_SAI_DPO} --select random",
}
REAL_AGAINST = [("DAST", "DAST, draws spread evenly"), ("AdaSTaR", "AdaSTaR, random order"),
                ("HS-STaR", "vanilla iterative DPO"), ("SAI-DPO", "SAI-DPO, random problems")]


def real(seeds, words):
    """Arms on the real model whose names have one of the words (without words all)."""
    ids = ids_of("runs/real/train.jsonl", REAL_TRAIN, "runs/real/test.jsonl")
    arms = stored("real_model.jsonl", "real", REAL_ARMS, seeds, words, ids)
    compare(arms, REAL_AGAINST, ROOT / "runs" / "real_model")


def main():
    studies = {"dast": dast, "adastar": adastar, "hs_star": hs_star, "sai_dpo": sai_dpo}
    others = {"kills": withstand.kills, "fuzz": withstand.fuzz, "soak": withstand.soak,
              "disk": withstand.disk, "exact": withstand.exact}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*studies, "dast-dpo", "head_to_head", "real", *others])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated, of the first five [0,1,2]")
    parser.add_argument("--arms", default="",
                        help="of head_to_head and real: words in their names, comma-separated [all]")
    arguments = parser.parse_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    seeds = list(map(int, arguments.seeds.split(",")))
    if arguments.name in others:
        others[arguments.name]()
    elif arguments.name in ("head_to_head", "real"):
        words = [word for word in arguments.arms.split(",") if word]
        {"head_to_head": head_to_head, "real": real}[arguments.name](seeds, words)
    elif arguments.name.startswith("dast"):
        dast(seeds, "dpo" if arguments.name == "dast-dpo" else "sft")
    else:
        studies[arguments.name](seeds)


if __name__ == "__main__":
    main()
