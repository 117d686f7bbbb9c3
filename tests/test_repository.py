"""The ceilings of the design, the agreed list of files, and README: every command and file that it names exists."""
import ast
import re
import subprocess

import pytest

from conftest import ROOT

CEILINGS = {"dast.py": 350, "adastar.py": 350, "hs_star.py": 350, "sai_dpo.py": 370, "common.py": 2777, "eval.py": 711,
            "README.md": 300}
TOP = {*CEILINGS, "requirements.txt", "LICENSE", "tests"}
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PYTHON = [name for name in TRACKED if name.endswith(".py")]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / "tests" / name).read_text() for name in ("results.md", "details.md"))


def test_top_level():
    assert "common.py" in TRACKED
    assert {name.split("/")[0] for name in TRACKED if not name.startswith(".")} <= TOP


@pytest.mark.parametrize("name", [name for name in CEILINGS if (ROOT / name).exists()])
def test_ceilings(name):
    lines = (ROOT / name).read_text().split("\n# Worked examples")[0].splitlines()
    assert len(lines) <= CEILINGS[name]


@pytest.mark.parametrize("name", PYTHON)
def test_lines_and_functions_are_short(name):
    text = (ROOT / name).read_text()
    assert not [line for line in text.splitlines() if len(line) > 120]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (90 if node.name == "main" else 60), node.name
    for node in ast.parse(text).body if "/" not in name else []:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main" and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.end_lineno - node.lineno < 4, f"{node.name} has no docstring"


def flags_of(script):
    constants = re.findall(r"^([A-Z][A-Z0-9_]*) = ", (ROOT / script).read_text(), re.M)
    flags = {"--" + name.lower().replace("_", "-") for name in constants}
    return flags | {flag.replace("--", "--no-", 1) for flag in flags} | {"--toy", "--help"}


def test_readme_names_what_exists():
    lines = re.findall(r"^(?:torchrun|python|pip|srun).*", README.replace("\\\n", " "), re.M)
    lines += re.findall(r"`((?:torchrun|python) [^`]+)`", PAGES)
    commands = [command.strip() for line in lines for command in line.split("&&")]
    assert any(c == "torchrun dast.py --toy" for c in commands) and any("pytest" in c for c in commands)
    for command in commands:
        script = re.search(r"\S+\.py\b", command)
        if script:
            assert (ROOT / script[0]).exists(), command
            after = command[script.end():]
            if "/" not in script[0]:
                assert set(re.findall(r"--[a-z][\w-]*", after)) <= flags_of(script[0]), command
    for name in re.findall(r"`((?:tests/|\.ci/)?[\w/]+\.(?:py|md|txt|jsonl|png))`", PAGES):
        of_a_run = name in ("selection.jsonl", "presamples.jsonl", "responses.jsonl", "metrics.jsonl", "clusters.jsonl",
                            "round_0/tagger.jsonl")
        assert (ROOT / name).exists() or of_a_run or name.startswith(("gsm8k/", "math/", "data/")), name
    for name, anchor in re.findall(r"\]\(([\w/.]*)(#[\w-]+)?\)", README):
        heading = f"## {anchor[1:].replace('-', ' ')}\n"
        assert (ROOT / name).is_file() if name else heading in README.lower(), name + anchor
    for flag in re.findall(r"`(--[a-z][\w-]*)", PAGES):
        known = set().union(*map(flags_of, ("dast.py", "adastar.py", "hs_star.py", "sai_dpo.py", "eval.py")))
        assert flag in known | {"--run-path"}, flag  # torchrun's


def test_methods_share_their_losses():
    """The same loss in two scripts is the same text."""
    losses = {}
    for name in ("dast.py", "adastar.py", "hs_star.py", "sai_dpo.py"):
        if (ROOT / name).exists():
            text = (ROOT / name).read_text()
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss"):
                    code = ast.get_source_segment(text, node)
                    assert losses.setdefault(node.name, code) == code, f"{node.name} of {name}"
    assert "sft_loss" in losses


@pytest.mark.parametrize("name", ["dast.py", "adastar.py", "hs_star.py", "sai_dpo.py", "tests/fork_server.py"])
def test_common_comes_before_torch(name):
    """It tells OpenMP not to spin, which counts only before torch is loaded: else two runs side by side crawl."""
    imported = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.parse((ROOT / name).read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "common" in imported
    assert not any(module.split(".")[0] in ("torch", "transformers") for module in imported[:imported.index("common")])
