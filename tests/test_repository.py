"""What holds for the files as they stand: their list, what the four scripts share, and what README names."""
import ast
import re
import subprocess

import pytest

import common
from conftest import ROOT, SCRIPTS

PROGRAMS = [*SCRIPTS, "eval.py"]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.md")))
OF_THE_METHOD = {"MODEL", "START", "HELD_OUT", "ROUNDS", "K_SAMPLES", "PROMPT", "SHOTS", "SYSTEM", "LR", "EPOCHS",
                 "BATCH_SIZE"}  # constants that mean something else in each method, and say what


def constants(script):
    """{name: its comment without the origin of the value at the end, in brackets}."""
    found = common.comments_of(ROOT / script)
    return {name: re.sub(r" \([^()]*\)$", "", comment) for name, (_, comment) in found.items() if comment}


def test_the_top_level_is_what_was_agreed():
    top = {name.split("/")[0] for name in TRACKED if not name.startswith(".")}
    assert top == {*PROGRAMS, "common.py", "README.md", "requirements.txt", "LICENSE", "tests"}


def test_no_file_names_a_folder_of_one_machine():
    for name in TRACKED:
        if name.endswith((".py", ".md", ".txt")):
            assert not re.findall(r"(?<![\w./])/(?:work|home|root|Users|mnt)/\w+", (ROOT / name).read_text()), name


def test_scripts_share_comments_losses_and_the_machine_group():
    """The same constant has the same comment, the same loss is the same text, and so are the machine's constants."""
    comments, losses, groups = {}, {}, set()
    for script in SCRIPTS:
        for name, comment in constants(script).items():
            if name not in OF_THE_METHOD:
                assert comments.setdefault(name, comment) == comment, f"{name} of {script}"
        text = (ROOT / script).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss"):
                code = ast.get_source_segment(text, node)
                assert losses.setdefault(node.name, code) == code, f"{node.name} of {script}"
        groups.add(text[text.index("# Machine: may differ"):text.index("# Legal values")])
    [group] = groups
    assert re.findall(r"(?m)^([A-Z_]+) = ", group) == list(common.MACHINE)
    assert len(comments) > 50 and {"sft_loss", "dpo_loss"} <= losses.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_constants_say_where_their_values_are_from(script):
    text = (ROOT / script).read_text()
    settings = text[text.index("# What to run"):text.index("# Legal values")]
    for line in re.findall(r"(?m)^[A-Z_]+ = .*$", settings):
        assert re.search(r"  # .*\([^()]*(paper|code|proxy|ours)[^()]*\)", line), line


@pytest.mark.parametrize("script", PROGRAMS)
def test_legal_values_are_of_constants_allow_theirs_and_are_those_that_comments_list(script):
    module = __import__(script.removesuffix(".py"))
    for name, legal in module.LEGAL.items():
        values = [getattr(module, name), getattr(module, "TOY", {}).get(name, getattr(module, name))]
        assert name in constants(script)
        assert all(value in legal if isinstance(legal, tuple) else value >= legal for value in values), name
    for name, comment in constants(script).items():
        listed = re.match(r'("\w*"(?: \| "\w*")+)', comment)
        assert not listed or set(module.LEGAL[name]) == set(re.findall(r'"(\w*)"', listed[1])), name


@pytest.mark.parametrize("name", [*SCRIPTS, "tests/fork_server.py"])
def test_common_comes_before_torch(name):
    """It tells OpenMP not to spin, which counts only before torch is loaded: else two runs side by side crawl."""
    modules = re.findall(r"(?m)^(?:import|from) (common|torch|transformers)\b", (ROOT / name).read_text())
    assert modules[0] == "common"


# README and the pages under tests/ ------------------------------------------------------------------------------------

def flags_of(script):
    flags = {common.flag_of(name) for name in common.comments_of(ROOT / script)}
    return flags | {flag.replace("--", "--no-", 1) for flag in flags} | {"--toy", "--help"}


PRINTED = "`rejection.py`"  # the script that README prints, which test_readme.py runs


def test_commands_name_scripts_and_flags_that_exist():
    """Those of README's blocks, and those in backquotes of all pages."""
    found = re.findall(r"(?m)^(?:torchrun|python|pip|srun).*", README.replace("\\\n", " "))
    found += re.findall(r"`((?:torchrun|python) [^`]+)`", PAGES)
    commands = [command.strip() for line in found for command in line.split("&&")]
    for command in commands:
        script = re.search(r"\S+\.py\b", command)
        if script:
            assert (ROOT / script[0]).exists() or f"`{script[0]}`" in PRINTED, command
        if script and script[0] in PROGRAMS:
            flags = set(re.findall(r"--[a-z][\w-]*", command[script.end():]))
            assert flags <= flags_of(script[0]), command
    assert "python dast.py --toy" in commands and any("pytest" in command for command in commands)


def test_flags_files_and_links_in_the_text_exist():
    known = set().union(*map(flags_of, PROGRAMS)) | {"--max-restarts", "--nproc-per-node", "--nnodes", "--node-rank"}
    for flag in re.findall(r"`(--[a-z][\w-]*)", PAGES):
        assert flag in known, flag
    of_a_run = re.compile(r"(round_\d/)?(selection|presamples|resamples|prerewards|rerewards|responses(_\d)?|probe|"
                          r"metrics|clusters|steps|train|eval(_base|_examples)?(_held_out)?|tags|outputs)\.jsonl?")
    for name in re.findall(r"`((?:tests/|\.ci/)?[\w/]+\.(?:py|md|txt|jsonl|png))`", PAGES):
        of_data = name.startswith(("gsm8k/", "math/", "data/"))
        assert (ROOT / name).exists() or of_a_run.fullmatch(name) or of_data or f"`{name}`" in PRINTED, name
    for name, anchor in re.findall(r"\]\(([\w/.]*)(#[\w-]+)?\)", README):
        heading = f"## {anchor[1:].replace('-', ' ')}\n"
        assert (ROOT / name).is_file() if name else heading in README.lower(), name + anchor
