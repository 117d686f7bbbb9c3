"""Problem sets of all forms, what is put aside, prompts and their tokens, the worked examples."""
import json
import re
import shutil
import sys

import pytest

import common
from conftest import TOY

CHOICE = {"problem": "Which barks?\n(A) a cat\n(B) a dog", "answer": "B", "kind": "choice",
          "choices": ["a cat", "a dog"]}
RECORDS = [
    ({"question": "Which barks?", "answer": "a dog", "choices": ["a cat", "a dog"]}, CHOICE),  # one's own
    ({"problem": "Which barks?", "answer": "b", "choices": ["a cat", "a dog"]}, CHOICE),
    ({"question": "Which barks?", "answer": "B", "choices": {"A": "a cat", "B": "a dog"}}, CHOICE),
    ({"question": "Which barks?", "answerKey": "2",  # ARC
      "choices": {"text": ["a cat", "a dog"], "label": ["1", "2"]}}, CHOICE),
    ({"answerKey": "B", "question": {"stem": "Which barks?", "choices": [  # CommonsenseQA
        {"label": "A", "text": "a cat"}, {"label": "B", "text": "a dog"}]}}, CHOICE),
    ({"problem": "Which barks?", "answer_value": "B", "difficulty": "2", "knowledge_point_routes": ["x->y"],
      "answer_analysis": ["A dog barks. "],  # TAL-SCQ
      "answer_option_list": [[{"aoVal": "A", "content": "a cat "}], [{"aoVal": "B", "content": "a dog"}]]},
     {**CHOICE, "level": 2, "tags": ["x->y"], "solution": "A dog barks.\n\n\\boxed{B}"}),
    ({"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},  # ANLI
     {"problem": "Premise: It rains.\nHypothesis: It is wet.\nDoes the premise entail the hypothesis? Answer "
      "entailment, neutral or contradiction.", "answer": "neutral", "kind": "label",
      "choices": list(common.ENTAILMENT)}),
    ({"Body": "Ed has 2.", "Question": "How many?", "Answer": 2.0, "Type": "Sum"},  # SVAMP
     {"problem": "Ed has 2. How many?", "answer": "2", "kind": "math", "tags": ["Sum"]}),
    ({"Body": "Ed has 2.", "question": "How many?", "question_concat": "Ed has 2. How many?", "answer": "2"},
     {"problem": "Ed has 2. How many?", "answer": "2", "kind": "math"}),
    ({"question": "n?", "final_answer": ["$7$"], "solution": ["One.", "Two."]},  # OlympiadBench
     {"problem": "n?", "answer": "$7$", "kind": "math", "solution": "One.\n\nTwo.\n\n\\boxed{$7$}"}),
    ({"Question": "n?", "Answer": [0, 5]}, {"problem": "n?", "answer": "[0, 5]", "kind": "math"}),  # TheoremQA
    ({"Question": "n?", "Answer": False}, {"problem": "n?", "answer": "False", "kind": "yesno"}),
    ({"Question": "n?", "Answer": "(c)", "Answer_type": "option"},
     {"problem": "n?", "answer": "(c)", "kind": "choice"}),
    ({"question": "So?", "answer": "yes", "reasoning": "Let."},
     {"problem": "So?", "answer": "yes", "kind": "yesno", "solution": "Let.\n\n\\boxed{yes}"}),
    ({"problem": "x?", "expected_answer": "236", "reference_solution": None},
     {"problem": "x?", "answer": "236", "kind": "math"}),
    ({"problem": "x?", "answer": "no", "kind": "math"}, {"problem": "x?", "answer": "no", "kind": "math"}),
    ({"problem": "p", "answer": 1e-7, "tags": 3},
     {"problem": "p", "answer": "0.0000001", "kind": "math", "tags": ["3"]}),
    ({"question": "q", "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72.\n#### 1,072"},  # GSM8K
     {"problem": "q", "answer": "1,072", "kind": "math",
      "solution": "48/2 = 24 in May.\n\n48+24 = 72.\n\n\\boxed{1,072}"}),
    ({"problem": "m", "solution": "First \\boxed{1}, so \\boxed{\\frac{1}{2}}.", "level": "Level 5",  # MATH
      "type": "Algebra"},
     {"problem": "m", "answer": "\\frac{1}{2}", "kind": "math", "level": 5, "tags": ["Algebra"],
      "solution": "First \\boxed{1}, so \\boxed{\\frac{1}{2}}."})]


@pytest.mark.parametrize("record, problem", RECORDS)
def test_one_record_of_each_form(tmp_path, record, problem):
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "p.json").write_text(json.dumps([record]))
    for name in ("p.jsonl", "p.json"):
        assert common.load_problems(f"{tmp_path}/{name}", "test", "") == [
            {"id": f"{tmp_path.name}/p/1", **problem}]


def test_blank_lines_and_empty_answers_shift_no_id(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('\ufeff{"problem": "1+1?", "answer": 2.0}\n\n{"problem": "q", "answer": " "}\n'
                                      '{"problem": "r", "answer": "3"}\n')
    found = common.load_problems(f"{tmp_path}/p.jsonl", "test", "")
    assert [(p["id"].rsplit("/", 1)[1], p["answer"]) for p in found] == [("1", "2"), ("4", "3")]
    assert "1 problem with an empty answer dropped" in capsys.readouterr().out


def test_json_with_the_problems_under_data(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"data": [{"problem": "1?", "answer": 1}]}))
    assert [p["id"] for p in common.load_problems(f"{tmp_path}/d.json", "test", "")] == [f"{tmp_path.name}/d/1"]


SETS = {  # name/split: (problems, kinds, with a solution)
    "gsm8k/train": (7473, "math", 7473), "gsm8k/test": (1319, "math", 1319), "math/train": (7498, "math", 7498),
    "math/test": (5000, "math", 5000), "math500/test": (500, "math", 500), "aime24/test": (30, "math", 30),
    "aime25/test": (30, "math", 29), "aime_1983_2023/train": (975, "math", 975), "amc23/test": (40, "math", 0),
    "olympiadbench/test": (675, "math", 675), "minerva_math/test": (272, "math", 272),
    "college_math/test": (2818, "math yesno", 0), "gaokao2023en/test": (383, "math", 0),
    "theoremqa/test": (800, "choice math yesno", 0), "tal_scq/train": (3000, "choice", 3000),
    "tal_scq/test": (2000, "choice", 948), "svamp/test": (1000, "math", 0), "adastar_svamp/train": (800, "math", 0),
    "adastar_svamp/test": (200, "math", 0), "adastar_gsm8k/test": (500, "math", 500),
    "arc_challenge/train": (1119, "choice", 0), "arc_challenge/test": (1172, "choice", 0),
    "commonsenseqa/train": (9741, "choice", 0), "commonsenseqa/test": (1221, "choice", 0),
    "anli_r1/test": (1000, "label", 0), "cladder/test": (500, "yesno", 500),
    "adastar_arc/train": (1418, "choice", 0), "adastar_arc/test": (500, "choice", 0)}
MOST_FAILING = 90  # solutions with several boxes ("5 or 7"), or mathematics glued to theirs ("\\boxed{19}x^3")


def test_every_set_and_its_golds(shared, capsys):
    """Counts as data/MANIFEST.md has them; each gold is right, and each solution as a response, but 1 in 400."""
    checker = common.Checker(2)
    failed = set()
    for name, (n, kinds, solutions) in SETS.items():
        problems = common.load_problems(*name.split("/"), shared / "data")
        assert (len(problems), " ".join(sorted({p["kind"] for p in problems}))) == (n, kinds), name
        assert len({p["id"] for p in problems}) == n and sum("solution" in p for p in problems) == solutions, name
        responses = [(p, f"\\boxed{{{p['answer']}}}") for p in problems]
        responses += [(p, p["solution"]) for p in problems if "solution" in p]
        verdicts = [checker.submit(*response) for response in responses]
        right = [verdict.result()[0] for verdict in verdicts]
        assert all(right[:n]), name
        failed |= {p["id"] for (p, _), correct in zip(responses, right) if not correct}
    assert len(failed) <= MOST_FAILING
    assert capsys.readouterr().out.count("2 problems with an empty answer dropped") == 2  # MATH train, gaokao2023en
    assert {p.get("level") for p in common.load_problems("math", "train", shared / "data")} == {1, 2, 3, 4, 5, None}


def test_gsm8k_answers_in_their_own_form_are_right(shared):
    """The answer behind ####."""
    for split in ("train", "test"):
        with open(shared / "data" / "gsm8k" / f"{split}.jsonl") as file:
            for problem, line in zip(common.load_problems("gsm8k", split, shared / "data"), file):
                verdict = common.grade(problem, json.loads(line)["answer"], equal=None)
                assert verdict == (True, "equal"), problem["id"]


def test_every_file_of_data_can_be_read_by_its_path(shared):
    for path in (shared / "data").glob("*/*.jsonl"):
        assert common.load_problems(str(path), "test", "")


@pytest.mark.parametrize("name, split, words", [
    ("gsm9k", "train", ["unknown problem set 'gsm9k'", "gsm8k, math"]),
    ("no/such.jsonl", "train", ["no/such.jsonl: no such file"]),
    ("gsm8k", "train", ["nowhere/gsm8k/train.jsonl: no such file", "--data"]),
    ("", "train", ["no problem set"]),
    ("math500", "train", ["math500 has no train split, only test"]),
    ("math500", "test", ["pip install datasets"]),
    ("acme/sums:hard@dev", "test", ["pip install datasets"]),
    ("adastar_gsm8k", "test", ["adastar_gsm8k/test.jsonl: no such file"]),
])
def test_a_set_that_is_not_there_is_one_line(capsys, monkeypatch, name, split, words):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(SystemExit):
        common.load_problems(name, split, "nowhere")
    [line] = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line


def test_a_set_of_the_hub(tmp_path, monkeypatch, capsys):
    """By the real library, from a folder of that name (it looks there first); a name that is nowhere is one line."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "sums").mkdir(parents=True)
    for split, n in (("train", 3), ("validation", 2)):
        records = [{"question": f"{i}+1?", "answer": f"It is.\n#### {i + 1}"} for i in range(n)]
        (tmp_path / f"acme/sums/{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = common.load_problems("acme/sums", "train", "")
    assert [p["id"] for p in found] == [f"acme/sums/train/{i}" for i in (1, 2, 3)]
    found = common.load_problems("acme/sums@validation", "train", "")
    assert [(p["id"], p["answer"]) for p in found] == [("acme/sums/validation/1", "1"), ("acme/sums/validation/2", "2")]
    with pytest.raises(SystemExit):
        common.load_problems("acme/products", "train", "")
    assert "acme/products" in capsys.readouterr().err


def test_a_limit_takes_the_same_random_problems_every_time():
    some = [common.load_problems(str(TOY / "train.jsonl"), "train", "", 60) for _ in range(2)]
    assert some[0] == some[1] and len(some[0]) == 60 and {p["level"] for p in some[0]} == set(range(1, 7))
    lines = [int(p["id"].rsplit("/", 1)[1]) for p in some[0]]
    assert lines == sorted(lines) and lines[0] > 0


def test_what_is_held_out_does_not_depend_on_the_order():
    problems = [{"id": f"s/{i}", "problem": f"text {i % 40}"} for i in range(50)]  # ten of the texts occur twice
    kept, aside = common.hold_out(problems, 15, 0)
    assert len(aside) in (15, 16) and sorted(p["id"] for p in kept + aside) == sorted(p["id"] for p in problems)
    assert not {p["problem"] for p in kept} & {p["problem"] for p in aside}
    ids = {p["id"] for p in aside}
    assert {p["id"] for p in common.hold_out(problems[::-1], 15, 0)[1]} == ids
    assert {p["id"] for p in common.hold_out(problems, 15, 1)[1]} != ids
    assert common.hold_out(problems, 0, 0) == (problems, [])
    with pytest.raises(SystemExit):
        common.hold_out(problems, 50, 0)


@pytest.mark.parametrize("family", common.EXAMPLES)
def test_worked_examples_are_in_the_form_that_is_to_be_learnt(family):
    examples = common.EXAMPLES[family]
    assert len(examples) >= 6 and len({problem for problem, _ in examples}) == len(examples)
    for problem, solution in examples:
        *steps, last = solution.split("\n\n")
        answer = common.last_boxed(solution)
        assert steps and "boxed" not in "".join(steps) and last == f"\\boxed{{{answer}}}"
        options = re.findall(r"\n\(([A-Z])\) ", problem)
        assert options == sorted(options) and (answer in options) == (family == "choice")
        assert family != "label" or answer in common.ENTAILMENT
        assert family != "yesno" or answer in common.YES_NO


@pytest.mark.parametrize("family, problem", [
    ("grade-school", {"id": "gsm8k/test/1", "kind": "math"}), ("competition", {"id": "math/test/1", "kind": "math"}),
    *((kind, {"id": "a/b/1", "kind": kind}) for kind in ("choice", "label", "yesno"))])
def test_worked_examples_are_of_the_problem_s_family(family, problem):
    shown = [e["problem"] for e in common.worked_examples(problem)]
    assert shown == [text for text, _ in common.EXAMPLES[family]]


# Prompts and tokens ---------------------------------------------------------------------------------------------------

@pytest.fixture
def tokenizer():
    return common.load_tokenizer(str(TOY / "model"), "chat")


def test_prompts(tokenizer):
    p, e = {"id": "a", "problem": "1+1?"}, {"problem": "2+2?", "solution": "\\boxed{4}"}
    assert common.make_prompt(tokenizer, "zero_shot", p) == "Question: 1+1?\nAnswer:\n"
    assert common.make_prompt(tokenizer, "few_shot", p, [e]) == (
        "Question: 2+2?\nAnswer:\n\\boxed{4}\n\nQuestion: 1+1?\nAnswer:\n")
    assert common.make_prompt(tokenizer, "chat", p, [e], "Think.") == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "\\boxed{4}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_examples_end_in_the_end_token_and_in_no_other(tokenizer):
    """A response that spells the end token has not ended there."""
    example = common.make_example(tokenizer, "few_shot", {"id": "a", "problem": "1+1?"}, "2<|im_end|>")
    assert example == {"id": "a", "prompt": "Question: 1+1?\nAnswer:\n", "completions": ["2<|im_end|>"],
                       "end": "<|endoftext|>"}
    [(prompt, completion)] = common.tokenize(tokenizer, example)
    end, spelled = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer.decode(prompt) == example["prompt"]
    assert completion[-1] == end and spelled not in completion


def test_tokens_at_both_ends_where_a_tokenizer_adds_a_beginning(tokenizer):
    """As Llama's does: the end token of a chat is not the beginning, and a chat that brings one does not get two."""
    from tokenizers.processors import TemplateProcessing
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    chat = common.make_prompt(tokenizer, "chat", {"problem": "1+1?"})
    assert common.end_token(tokenizer, "chat") == "<|im_end|>"
    assert common.encode(tokenizer, "1+1?")[0] == start != common.encode(tokenizer, "1+1?")[1]
    assert chat.startswith("<|im_start|>") and common.encode(tokenizer, chat).count(start) == 2  # user, assistant


def test_tokenizer_round_trips(tokenizer):
    solutions = [json.loads(line)["solution"] for line in open(TOY / "test.jsonl")]
    for text in ["Add 12.\n\n 3 * 4 =\t12  \\boxed{12}", "naïve ½ 数学 🙂\r\n", *solutions]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_end_tokens_are_those_of_the_base_and_of_the_chat(tokenizer, tmp_path):
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert [common.end_token(tokenizer, form) for form in ("few_shot", "chat")] == ["<|endoftext|>", "<|im_end|>"]
    assert common.end_ids(tokenizer, TOY / "model") == sorted([ids["<|endoftext|>"], ids["<|im_end|>"]])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|im_start|>"], 0]}))
    assert common.end_ids(tokenizer, tmp_path) == sorted(ids.values())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert common.end_ids(tokenizer, TOY / "model") == [ids["<|endoftext|>"]]


def test_a_model_of_the_hub_is_its_folder_here(tmp_path, monkeypatch, capsys):
    """As the Hub's client leaves it; without network, a name that was never fetched is one clear line."""
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(TOY / "model", snapshot)
    (tmp_path / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "main").write_text("0" * 40)
    assert common.local_folder("acme/tiny") == str(snapshot) and common.local_folder(TOY) == str(TOY)
    assert common.load_tokenizer("acme/tiny", "chat").eos_token == "<|endoftext|>"
    with pytest.raises(SystemExit):
        common.local_folder("acme/other")
    assert "acme/other: no such folder here" in capsys.readouterr().err
