"""One round of each script, told with its records: tests/studies/one_round.md.

  python tests/studies/one_round.py    runs what is missing (runs/one-round-*, ten minutes on two cores)

Shows two problems of each run: the first with a draw that is trained on, and the first without."""
import json
import re
import subprocess
import sys

from pieces import ROOT, lines

PAGE = ROOT / "tests" / "studies" / "one_round.md"
HEAD = """# One round, told with real records

Made by `python tests/studies/one_round.py` from round 1 of each script's `--toy`, seed 0. It follows two problems of
each run: the first with a draw that is trained on, and the first without. In the tables of draws, `/` is a new line.
The keys of a decision are explained in [details](details.md).
"""
DRAWN = {  # script: what is drawn for a decision, and what happens there
    "dast.py": (["round_0/probe", "round_1/responses"],
                "The base answers each problem five times (the probe), which gives its level. Harder problems then get "
                "more draws, to find more distinct correct answers. The first of each distinct correct text "
                "is trained on, and so is the problem's own solution (the last below, which may be the same text). "
                "Accuracy dips before it rises."),
    "adastar.py": (["round_1/responses_0"],
                   "Problems are visited in the order of (`last`, `w`); in the first round all are equal. A problem "
                   "gets a second draw if the first is wrong. The walk stops when there are enough correct answers, "
                   "and of m visited problems the first floor(m alpha^2) are marked as seen (`committed`), where alpha "
                   "is the share solved."),
    "hs_star.py": (["round_1/presamples", "round_1/resamples"],
                   "A few answers to each problem give `phi_a`, the share correct, and `phi_r`, the mean reward; the "
                   "rest of the budget goes to boundary problems. The right and the wrong answers with the highest "
                   "rewards make pairs."),
    "sai_dpo.py": (["round_1/responses"],
                   "Clusters in which the probe failed more often (`share`) are drawn from more often (`weight`). Of "
                   "the problems answered both right and wrong, those with p nearest to 1/2 are trained on, as a "
                   "random pair of a right and a wrong answer."),
}


def one_line(text):
    return text.replace("\n\n", "\n").replace("\n", " / ").replace("|", "\\|")


def told(run, script, problem, decision, trained):
    """Return the part of the page on one problem."""
    text = [f"### {problem['problem']}\n", f"The answer is {problem['answer']}.\n", "| drawn | answer | verdict |",
            "|---|---|---|"]
    for name in DRAWN[script][0]:
        for response in lines(run / f"{name}.jsonl"):
            if response["id"] == problem["id"]:
                phase = name.partition("/")[2]
                text.append(f"| {phase} {response['draw']} | {one_line(response['text'])} | {response['reason']} |")
    shown = re.sub(r"(\d\.\d{3})\d+", r"\1", json.dumps(decision))  # fewer digits
    text += ["\nThe decision (`selection.jsonl`):\n", "```json", shown, "```\n"]
    if not trained:
        text.append("It is not trained on.\n")
        return text
    text += ["Trained on (`train.jsonl`), after the prompt", "\n```", trained[0]["prompt"].rstrip("\n"), "```\n"]
    for example in trained:
        text.append("- " + " rather than ".join(f"`{one_line(completion)}`" for completion in example["completions"]))
    return [*text, ""]


def page():
    text = [HEAD]
    for script, (_, what) in DRAWN.items():
        run = ROOT / "runs" / f"one-round-{script.removesuffix('.py')}"
        if not (run / "round_1" / "eval.json").exists():
            command = [sys.executable, script, "--toy", "--rounds", "1", "--name", run.name]
            subprocess.run(command, cwd=ROOT, check=True)
        problems = {}
        for number, problem in enumerate(lines(ROOT / "tests/toy/train.jsonl"), 1):
            problems[f"toy/train/{number}"] = {**problem, "id": f"toy/train/{number}"}
        selection = lines(run / "round_1" / "selection.jsonl")
        examples = {}
        for example in lines(run / "round_1" / "train.jsonl"):
            examples.setdefault(example["id"], []).append(example)
        chosen = [s["id"] for s in selection if s.get("chosen") or s.get("pairs") or s.get("pair")]
        others = [s["id"] for s in selection if s["id"] not in chosen]
        before = "eval_base.json" if (run / "round_0/eval_base.json").exists() else "eval.json"
        accuracy = []
        for path in (f"round_0/{before}", "round_1/eval.json"):
            accuracy.append(json.loads((run / path).read_text())["accuracy"])
        text += [f"## {script}\n", what + "\n",
                 f"This round: {len(selection)} problems, {len(chosen)} of them with draws trained on; greedy accuracy "
                 f"on 300 test problems from {accuracy[0]:.1%} to {accuracy[1]:.1%}.\n"]
        for i in (chosen[0], others[0]):
            [decision] = [s for s in selection if s["id"] == i]
            text += told(run, script, problems[i], decision, examples.get(i, []))
    return "\n".join(text).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(PAGE.read_text().split())} words")
