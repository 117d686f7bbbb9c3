"""What holds for the files as they stand: their list, what the four scripts share, and what README names."""
import ast
import re
import subprocess

import pytest

import common
from conftest import ROOT, SCRIPTS

PROGRAMS = [*SCRIPTS, "eval.py"]
TOP = {*PROGRAMS, "common.py", "README.md", "requirements.txt", "LICENSE", "tests"}
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
TEXTS = [name for name in TRACKED if name.endswith((".py", ".md", ".txt", ".gitignore", "run"))]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.md")))


def test_the_top_level_is_what_was_agreed():
    assert {name.split("/")[0] for name in TRACKED if not name.startswith(".")} == TOP


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_names_a_folder_of_one_machine(name):
    text = (ROOT / name).read_text()
    assert not re.findall(r"(?<![\w./])/(?:work|home|root|Users|mnt)/\w+", text)


def is_code(comment):
    """Whether a comment is a statement that was commented out, by its form: prose is no Python, or only a name."""
    try:
        [statement] = ast.parse(comment).body
    except (SyntaxError, ValueError):
        return False
    call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    return call or isinstance(statement, (ast.Assign, ast.Import, ast.ImportFrom, ast.Return, ast.Assert))


@pytest.mark.parametrize("name", [name for name in TRACKED if name.endswith(".py")])
def test_no_code_is_commented_out(name):
    comments = re.findall(r"(?m)^\s*# ?(.+)$", (ROOT / name).read_text())
    assert not [comment for comment in comments if is_code(comment.strip())]


# What the scripts share -----------------------------------------------------------------------------------------------

OF_THE_METHOD = {"MODEL", "START", "HELD_OUT", "ROUNDS", "K_SAMPLES", "PROMPT", "SHOTS", "SYSTEM", "LR", "EPOCHS",
                 "BATCH_SIZE"}  # constants that mean something else in each method, and say what


def constants(script):
    """{name: its comment without the origin of the value at the end, in brackets}."""
    return {name: re.sub(r" \([^()]*\)$", "", comment)
            for name, comment in common.comments_of(ROOT / script).items() if comment}


def test_a_constant_has_the_same_comment_in_all_scripts():
    comments = {}
    for script in SCRIPTS:
        for name, comment in constants(script).items():
            if name not in OF_THE_METHOD:
                assert comments.setdefault(name, comment) == comment, f"{name} of {script}"
    assert len(comments) > 50


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_constant_says_where_its_value_is_from(script):
    text = (ROOT / script).read_text()
    settings = text[text.index("# What to run"):text.index("# What is legal")]
    for line in re.findall(r"(?m)^[A-Z_]+ = .*$", settings):
        assert re.search(r"  # .*\([^()]*(paper|code|proxy|ours)[^()]*\)", line), line


def test_the_machine_group_is_the_same_text_in_all_scripts():
    groups = set()
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        groups.add(text[text.index("# Machine: may differ"):text.index("# What is legal")])
    [group] = groups
    assert re.findall(r"(?m)^([A-Z_]+) = ", group) == list(common.MACHINE)
    shared = set(common.MACHINE) - {"NAME", "GPU_MEMORY"}  # eval.py names its folder otherwise, and never trains
    of_scripts, of_eval = constants("dast.py"), constants("eval.py")
    assert all(of_scripts[name] == of_eval[name] for name in shared & of_eval.keys())


def test_each_machine_constant_is_read_on_every_machine():
    """By its name as a key: a script that lacks one then fails on a laptop too, and not only on a GPU."""
    text = (ROOT / "common.py").read_text()
    read = set(re.findall(r'(?:constants|g)\["([A-Z_]+)"\]', text))
    assert set(common.MACHINE) <= read


@pytest.mark.parametrize("script", PROGRAMS)
def test_what_is_legal_is_about_constants_and_allows_their_values(script):
    module = __import__(script.removesuffix(".py"))
    for name, legal in module.LEGAL.items():
        values = [getattr(module, name), *[toy[name] for toy in [getattr(module, "TOY", {})] if name in toy]]
        assert name in constants(script)
        assert all(value in legal if isinstance(legal, tuple) else value >= legal for value in values), name


@pytest.mark.parametrize("script", PROGRAMS)
def test_values_that_a_comment_lists_are_the_legal_ones(script):
    module = __import__(script.removesuffix(".py"))
    for name, comment in constants(script).items():
        listed = re.match(r'("\w*"(?: \| "\w*")+)', comment)
        if listed:
            assert set(module.LEGAL[name]) == set(re.findall(r'"(\w*)"', listed[1])), name


def test_methods_share_their_losses():
    """The same loss in two scripts is the same text."""
    losses = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss"):
                code = ast.get_source_segment(text, node)
                assert losses.setdefault(node.name, code) == code, f"{node.name} of {script}"
    assert {"sft_loss", "dpo_loss"} <= losses.keys()


@pytest.mark.parametrize("name", [*SCRIPTS, "tests/fork_server.py"])
def test_common_comes_before_torch(name):
    """It tells OpenMP not to spin, which counts only before torch is loaded: else two runs side by side crawl."""
    imported = []
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            imported.append(node.module)
        elif isinstance(node, ast.Import):
            imported.append(node.names[0].name)
    before = imported[:imported.index("common")]
    assert not {module.split(".")[0] for module in before} & {"torch", "transformers"}


# README and the pages under tests/ --------------------------------------------------------------------------------------

def flags_of(script):
    flags = {common.flag_of(name) for name in common.comments_of(ROOT / script)}
    return flags | {flag.replace("--", "--no-", 1) for flag in flags} | {"--toy", "--help"}


def commands():
    """The commands of README's blocks, and those in backquotes of all pages."""
    lines = re.findall(r"(?m)^(?:torchrun|python|pip|srun).*", README.replace("\\\n", " "))
    lines += re.findall(r"`((?:torchrun|python) [^`]+)`", PAGES)
    return [command.strip() for line in lines for command in line.split("&&")]


def test_readme_has_the_commands_to_begin_with():
    assert any(re.fullmatch(r"(?:python|torchrun) dast\.py --toy", command) for command in commands())
    assert any("pytest" in command for command in commands())


def test_commands_name_scripts_and_flags_that_exist():
    for command in commands():
        script = re.search(r"\S+\.py\b", command)
        if script:
            assert (ROOT / script[0]).exists(), command
        if script and script[0] in PROGRAMS:
            flags = set(re.findall(r"--[a-z][\w-]*", command[script.end():]))
            assert flags <= flags_of(script[0]), command


def test_flags_in_the_text_exist():
    known = set().union(*map(flags_of, PROGRAMS))
    of_torchrun = {"--max-restarts", "--nproc-per-node", "--nnodes", "--node-rank"}
    for flag in re.findall(r"`(--[a-z][\w-]*)", PAGES):
        assert flag in known | of_torchrun | {"--run"}, flag  # results.md tells of a flag that had this name


def test_files_in_the_text_exist():
    of_a_run = re.compile(r"(round_\d/)?(selection|presamples|resamples|prerewards|rerewards|responses(_\d)?|probe|"
                          r"metrics|clusters|steps|train|eval(_base|_examples)?(_held_out)?|tags|outputs)\.jsonl?")
    for name in re.findall(r"`((?:tests/|\.ci/)?[\w/]+\.(?:py|md|txt|jsonl|png))`", PAGES):
        of_data = name.startswith(("gsm8k/", "math/", "data/"))
        assert (ROOT / name).exists() or of_a_run.fullmatch(name) or of_data, name


def test_links_lead_somewhere():
    for name, anchor in re.findall(r"\]\(([\w/.]*)(#[\w-]+)?\)", README):
        heading = f"## {anchor[1:].replace('-', ' ')}\n"
        assert (ROOT / name).is_file() if name else heading in README.lower(), name + anchor
