"""README is true: its edits apply and work. What a run leaves is explained there: see test_scripts.py."""
import re
import shutil
import subprocess
import sys

import pytest

import common
from conftest import ROOT, SCRIPTS, SMALL, launch, lines
from test_repository import README

EDITS = re.findall(r"```diff\n--- (\S+)\n(.*?)```", README, re.S)


def small(folder, script, *flags):
    """One small round of a script (a path, or one of the project's); the run's folder."""
    name = str(script).rpartition("/")[2]
    launch(folder, script, *SMALL[name], "--rounds", "1", "--name", "small", *flags)
    return folder / "runs" / "small"


# Edits ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def project(tmp_path):
    """A copy of the project with all edits of README."""
    assert [name for name, _ in EDITS] == ["adastar.py", "common.py", "sai_dpo.py"]
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("common.py", *SCRIPTS):
        shutil.copy(ROOT / name, folder)
    for name, diff in EDITS:
        old = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " -")
        new = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " +")
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} has not, or not once:\n{old}"
        (folder / name).write_text(text.replace(old, new))
    return folder


def test_edit_of_a_rule_works(tmp_path, project):
    """Problems that are solved half of the time come before those that were never solved."""
    run = small(tmp_path, project / "adastar.py", "--rounds", "2", "--n-train", "20", "--steps", "1")
    keys = [(s["last"], abs(s["w"] - 0.5)) for s in lines(run / "round_2" / "selection.jsonl")]
    assert keys == sorted(keys) and any(last for last, _ in keys)


def test_edit_of_a_loss_works(tmp_path, project):
    """IPO's first loss is 1 / (2 beta), squared: no log-ratio differs from 0 yet."""
    run = small(tmp_path, project / "sai_dpo.py")
    assert lines(run / "round_1" / "steps.jsonl")[0]["loss"] == pytest.approx(25, rel=1e-3)


def test_edit_of_a_set_works(project):
    problem = {"problem": "What do you get if you add 2 and 3?", "answer": "5", "level": 1}
    common.write(project / "data/riddles/test.jsonl", [problem] * 3)
    code = "import common; print([p['id'] for p in common.load_problems('riddles', 'test', 'data')])"
    found = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "['riddles/test/1', 'riddles/test/2', 'riddles/test/3']"


def test_the_fifth_method_runs_as_printed(tmp_path):
    """It resumes, and --compare reads it."""
    [script] = re.findall(r"```python\n(\"\"\"Vanilla rejection.*?)```", README, re.S)
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "common.py", folder)
    (folder / "rejection.py").write_text(script)
    flags = ["--n-train", "20", "--n-test", "6", "--rounds"]
    for rounds in 1, 2:
        launch(tmp_path, folder / "rejection.py", *flags, rounds)
    phases = [(m["round"], m["phase"]) for m in lines(tmp_path / "runs/rejection-0/metrics.jsonl")]
    assert {(1, "responses"), (1, "train"), (2, "eval"), (2, "round")} <= set(phases)
    done = launch(tmp_path, "eval.py", "--compare", "runs/rejection-0")
    assert re.search(r"(?m)^rejection +6 ", done.stdout)
