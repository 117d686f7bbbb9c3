"""Make the toy's process reward model: is a step of a worked answer right? Arithmetic itself says so, and teaches it.

A step is right if what it states is the value that the problem has reached after as many operations as have been
written down so far; the box is right if it holds the last value. A small transformer, which starts from the toy model's
weights, learns to tell: a linear head reads each step's mark, as in Skywork-o1-Open-PRM, and that is the layout in
which it is saved. It learns from two kinds of answers to new problems:
  slips     solutions that end at some line, which is wrong in half of them. The label is on that line alone, digit by
            digit. At first only these, of one operation, then of two and three: so it learns to check a line;
            from answers alone it learns to tell careless manners only.
  answers   of the toy model, at two temperatures, with all their steps; none to a problem of train or test.jsonl.

  python tests/toy/make_prm.py        writes tests/toy/prm (15 minutes on two cores), prints how well it tells (AUC)

The AUC is on answers to test.jsonl, but for the problems that were met among the slips, which are drawn without looking
(of one operation nearly all, hardly any of more than two). Figures in README hang on this model, so it is not made
again without a reason.
"""
import json
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from common import (RewardModel, bar, learning_rate_factor, load_problems, load_tokenizer, make_prompt,  # noqa: E402
                    override_from_cli, sample, say, start_run, step_rewards, write)
from make import FAMILIES, OPERATIONS, make_problem, write_solution  # noqa: E402

# What to make
MODEL = "tests/toy/model"  # answers, and is what the reward model starts from
PROBLEMS = 6000  # new ones, 1 to 6 operations
K_SAMPLES = 2  # answers to each at each temperature
TEMPERATURES = (0.7, 1.2)  # of the draws
MAX_NEW_TOKENS = 96  # an answer is cut there

# Training
STEPS = 2300  # optimizer steps
SLIP_STEPS = 900  # of them with slips alone
BATCH_SIZE = 64  # answers per optimizer step
LR = 1e-3  # stays until the answers come, then a half cosine to 0
SEED = 0  # of everything

# Machine: may differ when a run goes on
RUN = "toy-prm"  # name of the run folder
ENGINE = ""  # "" | "vllm" | "transformers": what samples
GRADER = ""  # a grader other than math-verify
WANDB = False  # log to Weights & Biases too

SIGNS = r"[-+*]\d+| mod \d+| digits| swap"  # of an operation in an equation


def values_of(problem):
    """[number at the start, after the first operation, after the second, ...] of a toy problem, from its words."""
    first, *sentences = re.findall(r"[^.?]+[.?]", problem["problem"])[:-1]
    values = [int(re.search(r"\d+", first)[0])]
    for sentence in map(str.strip, sentences):
        [does] = [does for words, _, does in OPERATIONS.values()
                  if any(re.fullmatch(re.escape(w).replace(r"\{\}", r"\d+"), sentence) for w in words)]
        values.append(does(values[-1], int((re.findall(r"\d+", sentence) or [0])[-1])))
    return values


def labels_of(problem, text):
    """[1 if right, 0 if wrong] of each step of an answer."""
    values, at, labels = values_of(problem), 0, []
    for step in text.split("\n\n"):
        boxed = re.fullmatch(r"\\boxed\{(-?\d+)\}", step)
        stated = re.search(r"(?:=|: )(-?\d+)$", step)
        if boxed:
            labels.append(int(int(boxed[1]) == values[-1]))
        else:
            at += len(re.findall(SIGNS, re.sub(r"^-?\d+", "", step.split("=")[0]))) if "=" in step else 1
            labels.append(int(bool(stated) and at < len(values) and int(stated[1]) == values[at]))
    return labels


def area_under_curve(scores, labels):
    """P(a right step's score is above a wrong one's), ties as one half: from the ranks (Mann-Whitney)."""
    order = np.sort(scores)
    ranks = (np.searchsorted(order, scores, "left") + np.searchsorted(order, scores, "right") + 1) / 2
    labels = np.asarray(labels, bool)
    right, wrong = labels.sum(), (~labels).sum()
    return (ranks[labels].sum() - right * (right + 1) / 2) / (right * wrong)


def new_problems():
    """Problems that are in neither file of the toy."""
    rng = random.Random(SEED)
    seen = {json.loads(line)["problem"] for name in ("train", "test") for line in open(HERE / f"{name}.jsonl")}
    found = []
    while len(found) < PROBLEMS:
        problem, _ = make_problem(1 + len(found) % 6, rng.choice(list(FAMILIES)), rng)
        if problem["problem"] not in seen:
            seen.add(problem["problem"])
            found.append({**problem, "id": f"new/{len(found)}", "kind": "math"})
    return found


def untrained(folder):
    """The toy model in Skywork's layout, with a head of zeros."""
    for path in Path(MODEL).iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForPrmModel"]}, indent=1))
    (folder / "generation_config.json").unlink()
    save(folder, {**load_file(Path(MODEL) / "model.safetensors"), "v_head.summary.weight": torch.zeros(1, 128),
                  "v_head.summary.bias": torch.zeros(1)})


def save(folder, tensors):
    """The weights of a reward model: tensors by their published names."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def slipped(prm, deepest, styles, met, rng):
    """((ids, places), labels) of a solution that ends at some line, wrong in half of them: its last number's digits
    (right so far?), what stands behind them, and the mark."""
    problem, chain = make_problem(rng.randint(1, deepest), rng.choice(list(FAMILIES)), rng)
    met.add(problem["problem"])
    lines = write_solution(*chain, rng.choice(styles), rng).split("\n\n")
    lines = lines[:rng.randint(1, len(lines))]
    before, right, behind = re.fullmatch(r"(.*?)(\d+)(\}?)", lines[-1]).groups()
    stated = str(max(0, int(right) + rng.choice([-10, -2, -1, 1, 2, 10]))) if rng.random() < 0.5 else right
    ids, _ = prm.encode(problem, "\n\n".join([*lines[:-1], before + stated + behind]))
    labels = [int(right.startswith(stated[:n + 1])) for n in range(len(stated))]
    labels += [int(stated == right)] * (1 + len(behind))
    return (ids, list(range(len(ids) - len(labels), len(ids)))), labels


def train_rewards(run, start, answers, folder):
    """Logistic regression at the places, through the whole transformer: a mean over those of a batch."""
    prm, rng, met = RewardModel(start), random.Random(SEED), set()
    whole = [(prm.encode(problem, text), labels) for problem, text, labels in answers]
    prm.load()
    parameters = [*prm.body.parameters(), *prm.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, betas=(0.9, 0.98))
    with bar(STEPS, "train") as shown:
        for step in range(STEPS):
            if step < SLIP_STEPS:
                deepest, styles, sampled = 1 + 3 * step // SLIP_STEPS, ["careful", "named"], 0
            else:
                deepest, styles, sampled = 6, ["careful", "named", "brisk"], 3 * BATCH_SIZE // 4
            batch = [slipped(prm, deepest, styles, met, rng) for _ in range(BATCH_SIZE - sampled)]
            batch += rng.sample(whole, sampled)
            labels = torch.tensor([float(n) for _, of in batch for n in of])
            loss = F.binary_cross_entropy_with_logits(prm.logits([row for row, _ in batch]), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LR * (min(1, (step + 1) / 50) if step < SLIP_STEPS else learning_rate_factor(
                    step - SLIP_STEPS, STEPS - SLIP_STEPS, 0, True))
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                say(f"step {step:,} of {STEPS:,}: loss {loss:.3f}")
            shown.update()
    write(run.folder / "met.json", sorted(met))
    shutil.copytree(start, folder, dirs_exist_ok=True)
    save(folder, {f"model.{n}": t for n, t in prm.body.state_dict().items()}
         | {f"v_head.{n}": t for n, t in prm.head.state_dict().items()})


def report(run, model, tests, draw):
    """AUC over the steps of drawn answers to the test problems, by kind of step and depth; and S of whole answers."""
    met = set(json.loads((run.folder / "met.json").read_text()))
    tests = [p for p in tests if p["problem"] not in met]
    say(f"{len(tests)} test problems were not met in training")
    responses = draw(tests, "test", 0.7, 4)
    rewards = step_rewards(run, RewardModel(model), tests, responses, round=1, phase="reward")
    by_id, rows = {p["id"]: p for p in tests}, []
    for r, of in zip(responses, rewards):
        steps, labels = r["text"].split("\n\n"), labels_of(by_id[r["id"]], r["text"])
        rows += [(reward, label, "box" if "boxed" in step else "line", by_id[r["id"]]["level"])
                 for reward, label, step in zip(of, labels, steps, strict=True)]
    for name, chosen in {"all steps": rows, "lines": [r for r in rows if r[2] == "line"],
                         "boxes": [r for r in rows if r[2] == "box"], "levels 1-3": [r for r in rows if r[3] <= 3],
                         "levels 4-6": [r for r in rows if r[3] > 3]}.items():
        scores, labels = np.array([r[0] for r in chosen]), np.array([r[1] for r in chosen])
        say(f"{name:<12}{len(chosen):>7,} steps, {labels.mean():.1%} right, AUC {area_under_curve(scores, labels):.3f}")
    worst, right = np.array([min(of) for of in rewards]), [r["correct"] for r in responses]
    say(f"answers, by S = min: AUC {area_under_curve(worst, right):.3f} against the checker")


def main():
    tests = load_problems(str(HERE / "test.jsonl"), "test", "")
    run, problems = start_run(globals(), tests), new_problems()
    tokenizer = load_tokenizer(MODEL, "zero_shot")

    def draw(problems, name, temperature, samples):
        return sample(run, MODEL, problems, samples, lambda p, d: make_prompt(tokenizer, "zero_shot", p), round=1,
                      phase=name, style="zero_shot", temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)

    by_id, answers = {p["id"]: p for p in problems}, []
    for number, temperature in enumerate(TEMPERATURES):
        responses = run.once(f"round_1/responses_{number}.jsonl", lambda: draw(
            problems, f"sample{number}", temperature, K_SAMPLES))
        for text, i in dict.fromkeys((r["text"], r["id"]) for r in responses if r["finish"] == "stop"):
            answers.append((by_id[i], text, labels_of(by_id[i], text)))
    labels = [label for *_, of in answers for label in of]
    say(f"{len(answers):,} different answers of {len(labels):,} steps, {np.mean(labels):.1%} of them right")
    start = run.once("round_1/untrained", untrained)
    model = run.once("round_1/model", lambda folder: train_rewards(run, start, answers, folder))
    report(run, model, tests, draw)
    if RUN == "toy-prm":
        shutil.copytree(model, HERE / "prm", dirs_exist_ok=True)


if __name__ == "__main__":
    override_from_cli(globals())
    main()
