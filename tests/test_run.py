"""The run: flags are constants, the folder remembers, what is made is whole, draws depend on their seed only."""
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import common
import eval
from conftest import SMOKE, TOY, error_of, launch, lines, refusal_of

SCRIPT = '''"""What it does."""

# The method
K_SAMPLES = 10  # answers per problem, 100 % of them (paper)
LR = 2e-5  # peak
VARIANT = "PL"  # "PL" | "": controls
NAME = ""  # of anything
CUTS = (0.7, 0.4)  # two numbers
FOLDERS = ()  # any number of texts
SEEDED = True  # or not
N = 5  # at most; 0 is all
PLAIN = 1

LEGAL = dict(K_SAMPLES=1, VARIANT=("PL", ""))
TOY = dict(K_SAMPLES=2, NAME="toy")
'''
DEFAULTS = {"K_SAMPLES": 10, "LR": 2e-5, "VARIANT": "PL", "NAME": "", "CUTS": [0.7, 0.4], "FOLDERS": [],
            "SEEDED": True, "N": 5, "PLAIN": 1}


@pytest.fixture
def constants(alone, tmp_path, monkeypatch):
    """constants(flags): the constants of SCRIPT after a command line."""
    def parse(flags):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT)
        monkeypatch.setattr(sys, "argv", [str(path), *flags.split()])
        g = runpy.run_path(str(path))
        common.override_from_cli(g)
        return common.constants_of(g)
    return parse


@pytest.mark.parametrize("flags, changed", [
    ("", {}),
    ("--toy", {"K_SAMPLES": 2, "NAME": "toy"}),
    ("--k-samples 4 --toy --no-seeded", {"K_SAMPLES": 4, "NAME": "toy", "SEEDED": False}),
    ("--n 0 --lr 1e-3 --variant=", {"N": 0, "LR": 0.001, "VARIANT": ""}),
    ("--cuts 0.5 0.25", {"CUTS": [0.5, 0.25]}),
    ("--folders a b c --lr 0", {"FOLDERS": ["a", "b", "c"], "LR": 0.0}),
])
def test_flags_are_the_constants(constants, flags, changed):
    assert constants(flags) == DEFAULTS | changed


@pytest.mark.parametrize("flags, words", [
    ("--k-sample 4", ["--k-sample", "--help lists all flags"]), ("--toyy", ["--toyy"]),
    ("--k-samples many", ["--k-samples", "invalid int value: 'many'"]),
    ("--k-samples 0", ["--k-samples 0: must be finite and at least 1"]),
    ("--n -2", ["--n -2: must be finite and at least 0"]),
    ("--lr nan", ["--lr nan"]), ("--lr inf", ["--lr inf"]),
    ("--variant PLX", ["--variant 'PLX': choose from ('PL', '')"]),
    ("--cuts 0.5", ["--cuts", "expected 2 arguments"]),
    ("--cuts 0.5 x", ["--cuts", "invalid float value: 'x'"]),
])
def test_bad_flag_is_one_line_and_status_2(constants, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        constants(flags)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("script.py: error: ")
    assert all(word in line for word in words), line


def test_help_has_every_constant(constants, capsys):
    with pytest.raises(SystemExit) as stop:
        constants("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ["What it does.", "The method:", "100 % of them (paper) [10; toy 2]", "--no-seeded", "--toy",
                  "--folders", "--plain PLAIN         [1]"]:
        assert words in text, text


@pytest.fixture
def run(alone, tmp_path, monkeypatch):
    """A function that opens runs/r, as a script does at each start."""
    monkeypatch.chdir(tmp_path)
    return lambda: common.start_run({**vars(eval), "MODEL": str(TOY / "model"), "NAME": "r"})


def test_once_makes_a_file_once(run):
    first = run()
    assert first.once("round_1/a.jsonl", list, [{"id": "p"}, {"id": "q"}]) == [{"id": "p"}, {"id": "q"}]
    assert first.once("round_1/a.jsonl", list, [{"id": "other"}]) == [{"id": "p"}, {"id": "q"}]
    first.lock.close()
    again = run()  # another start, which has the file alone
    assert again.once("round_1/a.jsonl", list, []) == [{"id": "p"}, {"id": "q"}]


def test_once_makes_a_folder_under_another_name(run):
    """What a start that was killed has left half made is not in it."""
    half = Path("runs/r/round_1/model.part")
    half.mkdir(parents=True)
    (half / "old").touch()
    path = run().once("round_1/model", lambda: (half / "new").write_text("whole"))
    assert path == "runs/r/round_1/model" and not half.exists()
    assert [(file.name, file.read_text()) for file in Path(path).iterdir()] == [("new", "whole")]


def test_once_makes_nothing_and_keeps_unfinished_work_where_making_fails(run):
    one = run()
    one.unfinished.mkdir()
    for name in ("round_1/a.json", "round_1/model"):
        with pytest.raises(ZeroDivisionError):
            one.once(name, lambda: 1 / 0)
        assert not (one.folder / name).exists()
    assert one.unfinished.exists()
    one.once("round_1/a.json", dict)
    assert not one.unfinished.exists()


def test_metrics_of_a_phase_made_again_replace_its_line(run):
    one = run()
    for draws in (1, 2):
        one.log(1, "probe", draws=draws)
        one.log(1, "select", pairs=draws)
    expected = [{"round": 1, "phase": "probe", "draws": 2}, {"round": 1, "phase": "select", "pairs": 2}]
    assert lines("runs/r/metrics.jsonl") == expected


def test_write_is_what_read_reads_and_leaves_what_was_there_where_it_fails(alone, tmp_path):
    for name, value in ("a.jsonl", [{"text": "\ud800 é\n"}, [1.5, None]]), ("a.json", {"n": [1]}):
        path = tmp_path / "deep" / name
        common.write(path, value)
        with pytest.raises(TypeError):
            common.write(path, [2, {3, 4}])
        assert common.read(path) == value


def test_damaged_file_is_one_line(alone, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id"')
    line = refusal_of(capsys, common.read, tmp_path / "a.jsonl")
    assert "a.jsonl is damaged" in line and "remove it and what was made after it" in line


def test_line_cut_anywhere_costs_only_itself(alone, tmp_path):
    """A file of finished answers, cut at every byte, and then written on by the next start."""
    records = [{"id": "café", "draw": n} for n in range(3)]
    whole = "".join("\n" + json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    for size in range(len(whole)):
        (tmp_path / "a@0.jsonl").write_bytes(whole[:size])
        kept = whole[:size].count(b"}")
        with open(tmp_path / "a@0.jsonl", "a") as file:
            common.write_line(file, {"id": "new"})
        assert list(common.torn_lines(tmp_path, "a@*")) == [*records[:kept], {"id": "new"}]


def test_generator_depends_on_seed_and_key_only(run):
    assert common.seed_of(0, 1, "gsm8k/train/7", 3) != common.seed_of(0, 1, "gsm8k/train/73")
    assert common.seed_of(0) == 5254295370254170289  # the same on every machine, for ever
    one = run()
    numbers = one.rng(1, "pairs", "p").random(3)
    one.rng(1, "pairs", "q").random()
    assert (one.rng(1, "pairs", "p").random(3) == numbers).all()
    assert (one.rng(2, "pairs", "p").random(3) != numbers).all()


@pytest.mark.parametrize("cuts, expected", [
    ({}, [0.5, 0.3, 0.15, 0.05]), ({"top_k": 2}, [0.625, 0.375, 0, 0]), ({"top_p": 0.9}, [10 / 19, 6 / 19, 3 / 19, 0])])
def test_noise_draws_from_the_distribution(alone, cuts, expected):
    """200,000 draws at temperature 0.5, of probabilities that are squared there; by the seed alone."""
    logits = 0.5 * torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(200_000, 1)
    drawn = common.noise_of(7, temperature=0.5, **cuts)(None, logits).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - torch.tensor(expected)).abs().max() < 0.005 and shares[torch.tensor(expected) == 0].sum() == 0
    torch.rand(5)
    assert torch.equal(drawn, common.noise_of(7, temperature=0.5, **cuts)(None, logits).argmax(1))
    assert not torch.equal(drawn, common.noise_of(8, temperature=0.5, **cuts)(None, logits).argmax(1))


def test_greedy_answers_are_those_of_each_prompt_alone(alone):
    """Although transformers reads the examples that prompts share once for all."""
    engine = common.TransformersEngine(None)
    engine.use(str(TOY / "model"), "few_shot", 24, {"temperature": 0.0})
    solved = lines(TOY / "train.jsonl")[:3]
    requests = []
    for draw, problem in enumerate(lines(TOY / "test.jsonl")[:9]):
        ids = common.encode(engine.tokenizer, common.make_prompt(engine.tokenizer, "few_shot", problem, solved))
        requests.append(common.Request(problem, draw, ids, 0, False))
    assert len(engine.read_prefix([request.ids for request in requests])[0]) > 50
    answers = {request.draw: answer["text"] for request, answer in engine.answers(lambda: requests)}
    for request in requests:
        [[_, alone]] = engine.answers(lambda: [request])
        ids = torch.tensor([request.ids])
        row = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                                    eos_token_id=engine.ends, pad_token_id=engine.tokenizer.pad_token_id)
        text = engine.decode(row[0, ids.shape[1]:]).partition(common.STOP)[0].strip()
        assert answers[request.draw] == alone["text"] == text


def test_what_a_terminal_must_not_see_is_escaped(alone):
    """A model's text cannot move the cursor, set the title or hide what follows."""
    text = "caf\u00e9\t\u221e\n\x1b[2J\x1b]0;title\x07 back\rspace\x08 \x9b31m \u202etxt.exe"
    shown = common.printable(text)
    assert shown == "caf\u00e9\t\u221e\n\\x1b[2J\\x1b]0;title\\x07 back\\rspace\\x08 \\x9b31m \\u202etxt.exe"


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    script = "import common, sys\nLEGAL = {}\ndef main():\n    common.say('caf\\u00e9 \\u221e \\ud83d')\n"
    script += "sys.stdout.reconfigure(encoding='ascii')\ncommon.launch(main, globals())\n"
    (tmp_path / "mine.py").write_text(script)
    done = launch(tmp_path, tmp_path / "mine.py")
    assert done.stdout == "caf\\xe9 \\u221e \\ud83d\n"


@pytest.mark.parametrize("flags, words", [
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--test-data", "gsm9k"], ["gsm9k: no such file; name a file"]),
    (["--held-out", "18"], ["--held-out 18 leaves nothing of the 18 problems"]),
    (["--grader", "none.py:grade"], ["No such file or directory: 'none.py'"]),
    (["--model", "short"], ["the prompt of toy/train/", "exceeds the context of 200", "--shots"]),
])
def test_bad_input_of_a_run_is_one_line(tmp_path, flags, words):
    shutil.copytree(TOY / "model", tmp_path / "short")
    config = common.read(TOY / "model" / "config.json")
    common.write(tmp_path / "short" / "config.json", config | {"max_position_embeddings": 200})
    line = error_of(launch(tmp_path, "dast.py", *SMOKE, *flags, check=False))
    assert all(word in line for word in words), line


def test_exception_is_one_line_and_its_traceback_a_file(tmp_path):
    """Before there is a run, error.log is in the folder where the script was started."""
    script = "import common\nLEGAL = {}\ndef main():\n    return 1 / 0\ncommon.launch(main, globals())\n"
    (tmp_path / "mine.py").write_text(script)
    line = error_of(launch(tmp_path, tmp_path / "mine.py", check=False))
    assert line.startswith("mine.py: error: ZeroDivisionError: division by zero (error.log)")
    assert "in main\n    return 1 / 0" in (tmp_path / "error.log").read_text()
