"""README is true: its edits work as they stand there, every key of metrics.jsonl and selection.jsonl is explained."""
import json
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, launch
from test_repository import README

EDITS = re.findall(r"```diff\n--- (\S+)\n(.*?)```", README, re.S)
SMALL = {"dast.py": ["--n-train", "12", "--k-probe", "2"],
         "adastar.py": ["--n-train", "20", "--held-out", "4", "--steps", "1"],
         "hs_star.py": ["--n-train", "12", "--slice", "12", "--budget", "4", "--pre-samples", "2"],
         "sai_dpo.py": ["--n-train", "40", "--samples-per-round", "20", "--n-clusters", "3", "--k-samples", "4"]}


def small(folder, script, *flags):
    """A short run of a script (a path, or one of the project's); its folder."""
    name = str(script).rsplit("/", 1)[-1]
    launch(folder, script, "--toy", "--n-test", "10", "--rounds", "1", *SMALL[name], "--run", "small", *flags)
    return folder / "runs" / "small"


@pytest.mark.parametrize("script", SMALL)
def test_every_key_is_explained(script, tmp_path):
    run = small(tmp_path, script)
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", README[README.index("Keys of `metrics.jsonl`"):], re.M))
    for line in open(run / "metrics.jsonl"):
        metrics = json.loads(line)
        row = next(text for phases, text in rows.items() if metrics["phase"] in re.findall(r"\w+", phases))
        nested = [value for value in metrics.values() if isinstance(value, (dict, list))]
        keys = set(metrics) - {"round", "phase", "seconds"}
        for inner in nested:
            for item in inner.values() if isinstance(inner, dict) else inner:
                keys |= set(item) if isinstance(item, dict) else set()
        flops = {"flops", "padded_flops", "spent_flops"} if "the three FLOPs" in row else set()
        missing = keys - flops - set(re.findall(r"`(\w+)`", row))
        assert not missing, f"{metrics['phase']}: {missing}"
    explained = README[README.index("`selection.jsonl` has every"):README.index("Keys of `metrics.jsonl`")]
    known = set(re.findall(r"`(\w+)`", explained)) | {"id", "visit", "probe_correct", "probe_draws"}
    for line in open(run / "round_1" / "selection.jsonl"):
        assert set(json.loads(line)) <= known, set(json.loads(line)) - known


def edited(folder):
    """A copy of the project in `folder`, with all edits of README."""
    for name in ("common.py", "eval.py", *SMALL):
        shutil.copy(ROOT / name, folder)
    for name, lines in EDITS:
        old, new = ("".join(line[1:] + "\n" for line in lines.splitlines() if line[0] in kept) for kept in (" -", " +"))
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} has not, or not once:\n{old}"
        (folder / name).write_text(text.replace(old, new))


def test_the_edits_work(tmp_path):
    assert [name for name, _ in EDITS] == ["adastar.py", "common.py", "sai_dpo.py"]
    project = tmp_path / "project"
    project.mkdir()
    edited(project)
    selection = [json.loads(line) for line in open(
        small(tmp_path, project / "adastar.py", "--rounds", "2") / "round_2" / "selection.jsonl")]
    keys = [(s["last"], abs(s["w"] - 0.5)) for s in selection]
    assert keys == sorted(keys) and any(s["last"] for s in selection)
    (tmp_path / "ipo").mkdir()
    metrics = open(small(tmp_path / "ipo", project / "sai_dpo.py") / "metrics.jsonl")
    losses = [m["first_loss"] for m in map(json.loads, metrics) if m["phase"] == "train"]
    assert losses == [pytest.approx(25, rel=1e-3)]  # 1 / (2 beta), squared: no log-ratio differs from 0 yet


def test_the_new_set_is_known_by_its_name(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    edited(project)
    (project / "data" / "riddles").mkdir(parents=True)
    for split in ("train", "test"):
        (project / "data" / "riddles" / f"{split}.jsonl").write_text(
            '{"problem": "What do you get if you add 2 and 3?", "answer": "5", "level": 1}\n' * 3)
    code = "import common; print([p['id'] for p in common.load_problems('riddles', 'test', 'data')])"
    found = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['riddles/test/1', 'riddles/test/2', 'riddles/test/3']"


def test_the_table_of_methods():
    """Their lines are counted."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    counted = {name: len((ROOT / name).read_text().splitlines()) for name in (*SMALL, "common.py")}
    assert dict(rows) == {name: str(counted[name]) for name in SMALL}
    assert f"`common.py` ({counted['common.py']:,} lines" in README
