"""Command line, problem files, prompts, the checker, the run folder."""
import io
import json
import runpy
import shutil
import sys

import pytest
import torch

from conftest import TOY

SCRIPT = '''"""What it does."""

# The method
K_SAMPLES = 10  # answers per problem, 100 % of them (paper)
LR = 2e-5  # peak
VARIANT = "PL"  # "PL" | "": controls
NAME = ""  # of anything
CUTS = (0.7, 0.4)  # two numbers
SEEDED = True  # or not
N = 5  # at most; 0 is all

TOY = dict(K_SAMPLES=2, NAME="toy")
'''


@pytest.fixture
def constants(alone, tmp_path, monkeypatch):
    """A function: command line -> the script's constants after override_from_cli."""
    def parse(*flags):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT)
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        g = runpy.run_path(str(path))
        alone.override_from_cli(g)
        return [g[name] for name in ("K_SAMPLES", "LR", "VARIANT", "NAME", "CUTS", "SEEDED")]
    return parse


@pytest.mark.parametrize("flags, expected", [
    ([], [10, 2e-05, "PL", "", (0.7, 0.4), True]),
    (["--toy"], [2, 2e-05, "PL", "toy", (0.7, 0.4), True]),
    (["--k-samples", "4", "--toy", "--no-seeded"], [4, 2e-05, "PL", "toy", (0.7, 0.4), False]),
    (["--n", "0", "--lr", "1e-3", "--variant", "", "--cuts", "0.5,0.25"], [10, 0.001, "", "", (0.5, 0.25), True]),
])
def test_flags_are_the_constants(constants, flags, expected):
    assert constants(*flags) == expected


@pytest.mark.parametrize("flags, words", [
    (["--k-sample", "4"], ["--k-sample", "did you mean --k-samples?"]),
    (["--k-samples", "many"], ["--k-samples", "not a whole number: 'many'"]),
    (["--k-samples", "0"], ["--k-samples", "out of range: '0'"]),
    (["--k-samples", "-2"], ["--k-samples", "out of range: '-2'"]),
    (["--lr", "nan"], ["--lr", "out of range: 'nan'"]),
    (["--variant", "PLX"], ["--variant", "'PLX'", "PL"]),
    (["--cuts", "0.5"], ["--cuts", "not 2 of them: '0.5'"]),
    (["--cuts", "0.5,x"], ["--cuts", "not 2 of them: '0.5,x'"]),
    (["--toyy"], ["--toyy"]),
])
def test_bad_flag_is_one_line_and_status_2(constants, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        constants(*flags)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("script.py: error: ") and all(w in line for w in words), line


def test_help_has_every_constant(constants, capsys):
    with pytest.raises(SystemExit):
        constants("--help")
    words = ["What it does.", "--k-samples", "(paper) [10]", "--no-seeded", "--toy"]
    text = capsys.readouterr().out
    assert all(word in text for word in words), text


def problems_from(common, tmp_path, capsys, *lines):
    """load_problems on a file of these lines: (problems, None), or (None, the error line)."""
    (tmp_path / "p.jsonl").write_text("".join(line + "\n" for line in lines))
    try:
        return common.load_problems(str(tmp_path / "p.jsonl"), "train", "data"), None
    except SystemExit as stop:
        assert stop.code == 1
        [line] = capsys.readouterr().err.strip().splitlines()
        return None, line


GOOD = '{"problem": "1+1?", "answer": 2.0}'


@pytest.mark.parametrize("names, words", [
    ("gsm9k", ["unknown problem set 'gsm9k'", "gsm8k, math"]), ("no/such.jsonl", ["no/such.jsonl: no such file"]),
    ("gsm8k", ["nowhere/gsm8k/train.jsonl: no such file", "--data"]), ("", ["no problem set"])])
def test_missing_set_is_one_line(alone, capsys, names, words):
    with pytest.raises(SystemExit):
        alone.load_problems(names, "train", "nowhere")
    [line] = capsys.readouterr().err.strip().splitlines()
    assert all(w in line for w in words), line


def test_records_of_every_form(alone, tmp_path, capsys):
    problems, _ = problems_from(
        alone, tmp_path, capsys, "\ufeff" + GOOD, '{"problem": "p", "answer": 1e-7, "tags": 3}', "",
        '{"question": "q", "answer": " "}',
        json.dumps({"question": "q", "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72.\n#### 1,072"}),
        json.dumps({"problem": "m", "solution": "First \\boxed{1}, so \\boxed{\\frac{1}{2}}.", "level": "Level 5",
                    "type": "Algebra"}))
    folder = tmp_path.name
    assert problems == [
        {"id": f"{folder}/p/1", "problem": "1+1?", "answer": "2", "kind": "math"},
        {"id": f"{folder}/p/2", "problem": "p", "answer": "0.0000001", "kind": "math", "tags": ["3"]},
        {"id": f"{folder}/p/5", "problem": "q", "answer": "1,072", "kind": "math",
         "solution": "48/2 = 24 in May.\n\n48+24 = 72.\n\n\\boxed{1,072}"},
        {"id": f"{folder}/p/6", "problem": "m", "answer": "\\frac{1}{2}", "kind": "math", "level": 5,
         "tags": ["Algebra"], "solution": "First \\boxed{1}, so \\boxed{\\frac{1}{2}}."}]
    assert "1 problem with an empty answer dropped" in capsys.readouterr().out


def test_a_name_on_the_hub_is_its_folder_here(alone, tmp_path, monkeypatch, capsys):
    """As the Hub's client leaves it; without network, a name that was never fetched is one clear line."""
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(TOY / "model", snapshot)
    (tmp_path / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "main").write_text("0" * 40)
    assert alone.local_folder("acme/tiny") == str(snapshot) and alone.local_folder(TOY) == str(TOY)
    assert alone.load_tokenizer("acme/tiny", "chat").eos_token == "<|endoftext|>"
    with pytest.raises(SystemExit):
        alone.local_folder("acme/other")
    assert "acme/other: no such folder here, and not to be had from the Hub" in capsys.readouterr().err


def test_a_limit_takes_the_same_random_problems_every_time(alone):
    some = [alone.load_problems(str(TOY / "train.jsonl"), "train", "", 60) for _ in range(2)]
    assert some[0] == some[1] and len(some[0]) == 60 and {p["level"] for p in some[0]} == set(range(1, 7))
    lines = [int(p["id"].rsplit("/", 1)[1]) for p in some[0]]
    assert lines == sorted(lines) and lines[0] > 0


def test_prompts(alone):
    tokenizer = alone.load_tokenizer(str(TOY / "model"), "chat")
    p, e = {"id": "a", "problem": "1+1?"}, {"problem": "2+2?", "solution": "\\boxed{4}"}
    assert alone.make_prompt(tokenizer, "zero_shot", p) == "Question: 1+1?\nAnswer:\n"
    assert alone.make_prompt(tokenizer, "few_shot", p, [e]) == (
        "Question: 2+2?\nAnswer:\n\\boxed{4}\n\nQuestion: 1+1?\nAnswer:\n")
    assert alone.make_prompt(tokenizer, "chat", p, [e], "Think.") == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "\\boxed{4}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert [alone.end_token(tokenizer, prompt) for prompt in ("few_shot", "chat")] == ["<|endoftext|>", "<|im_end|>"]
    example = alone.make_example(tokenizer, "few_shot", p, "2<|im_end|>")
    assert example == {"id": "a", "prompt": "Question: 1+1?\nAnswer:\n", "completions": ["2<|im_end|>"],
                       "end": "<|endoftext|>"}
    [(prompt, completion)] = alone.tokenize(tokenizer, example)
    specials = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer.decode(prompt) == example["prompt"] and completion[-1] == specials[0]
    assert specials[1] not in completion  # a response that spells the end token has not ended


def test_tokens_at_both_ends_where_a_tokenizer_adds_a_beginning(alone):
    """As Llama's does: the end token of a chat is not the beginning, and a chat that brings one does not get two."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = alone.load_tokenizer(str(TOY / "model"), "chat")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    chat = alone.make_prompt(tokenizer, "chat", {"problem": "1+1?"})
    assert alone.end_token(tokenizer, "chat") == "<|im_end|>"
    assert alone.encode(tokenizer, "1+1?")[0] == start != alone.encode(tokenizer, "1+1?")[1]
    assert chat.startswith("<|im_start|>") and alone.encode(tokenizer, chat).count(start) == 2  # user's and assistant's


def test_tokenizer_round_trips(alone):
    tokenizer = alone.load_tokenizer(str(TOY / "model"), "few_shot")
    solutions = [json.loads(line)["solution"] for line in open(TOY / "test.jsonl")]
    for text in ["Add 12.\n\n 3 * 4 =\t12  \\boxed{12}", "naïve ½ 数学 🙂\r\n", *solutions]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("right, n, low, high", [  # Clopper-Pearson, from tables
    (5, 10, 0.1871, 0.8129), (0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (1, 30, 0.0008, 0.1722)])
def test_binomial_interval(right, n, low, high):
    from eval import binomial_interval
    assert binomial_interval(right, n) == pytest.approx([low, high], abs=2e-4)


def test_seeds_and_generators_depend_on_the_key_only(alone):
    assert alone.seed_of(0, 1, "gsm8k/train/7", 3) != alone.seed_of(0, 1, "gsm8k/train/73")
    assert alone.seed_of(0) == 5254295370254170289  # the same on every machine, for ever


@pytest.mark.parametrize("cuts, expected", [({}, [0.5, 0.3, 0.15, 0.05]), ({"top_k": 2}, [0.625, 0.375, 0, 0]),
                                            ({"top_p": 0.9}, [10 / 19, 6 / 19, 3 / 19, 0])])
def test_noise_draws_from_the_distribution(alone, cuts, expected):
    """200,000 draws at temperature 0.5, of probabilities that are squared there; again with the same seed: the same,
    whatever else draws meanwhile."""
    logits = 0.5 * torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(200_000, 1)
    drawn = alone.Noise(7, temperature=0.5, **cuts)(None, logits).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - torch.tensor(expected)).abs().max() < 0.005 and shares[torch.tensor(expected) == 0].sum() == 0
    torch.rand(5)
    assert torch.equal(drawn, alone.Noise(7, temperature=0.5, **cuts)(None, logits).argmax(1))
    assert not torch.equal(drawn, alone.Noise(8, temperature=0.5, **cuts)(None, logits).argmax(1))


def test_what_a_terminal_must_not_see_is_escaped(alone, monkeypatch):
    """A model's text cannot move the cursor, set the title or hide what follows; an old terminal shows what it can."""
    text = "caf\u00e9\t\u221e\n\x1b[2J\x1b]0;title\x07 back\rspace\x08 \x9b31m \u202etxt.exe"
    shown = alone.printable(text)
    assert shown == "caf\u00e9\t\u221e\n\\x1b[2J\\x1b]0;title\\x07 back\\rspace\\x08 \\x9b31m \\u202etxt.exe"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert alone.printable(text).startswith("caf\u00e9\t\\u221e\n") and alone.printable("\ud83d") == "\\ud83d"
    alone.say(text + "\u20ac")
