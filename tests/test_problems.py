"""Problem sets of all forms, what is put aside, prompts, the worked examples."""
import json
import re
import sys

import pytest

import common
import eval
from conftest import TOY


def problems_of(tmp_path, *records, name="p.jsonl"):
    text = json.dumps(list(records)) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / name).write_text(text)
    return [{k: v for k, v in p.items() if k != "id"} for p in common.load_problems(str(tmp_path / name), "test",
        "data")]


CHOICE = {"problem": "Which barks?\n(A) a cat\n(B) a dog", "answer": "B", "kind": "choice", "choices": ["a cat",
    "a dog"]}


@pytest.mark.parametrize("record, problem", [
    ({"question": "Which barks?", "answer": "a dog", "choices": ["a cat", "a dog"]}, CHOICE),  # one's own
    ({"problem": "Which barks?", "answer": "b", "choices": ["a cat", "a dog"]}, CHOICE),
    ({"question": "Which barks?", "choices": {"text": ["a cat", "a dog"], "label": ["1", "2"]}, "answerKey": "2"},
    CHOICE),
    ({"question": {"stem": "Which barks?", "choices": [{"label": "A", "text": "a cat"}, {"label": "B",
    "text": "a dog"}]},
      "answerKey": "B"}, CHOICE),  # CommonsenseQA; above ARC, below TAL-SCQ
    ({"problem": "Which barks?", "answer_value": "B", "difficulty": "2", "knowledge_point_routes": ["x->y"],
      "answer_analysis": ["A dog barks. "], "answer_option_list": [[{"aoVal": "A", "content": "a cat "}],
                                                                   [{"aoVal": "B", "content": "a dog"}]]},
     {**CHOICE, "level": 2, "tags": ["x->y"], "solution": "A dog barks.\n\n\\boxed{B}"}),
    ({"question": "Which barks?", "answer": "B", "choices": {"A": "a cat", "B": "a dog"}}, CHOICE),
    ({"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},
     {"problem": "Premise: It rains.\nHypothesis: It is wet.\nDoes the premise entail the hypothesis? Answer "
      "entailment, neutral or contradiction.", "answer": "neutral", "kind": "label",
      "choices": list(common.ENTAILMENT)}),
    ({"Body": "Ed has 2.", "Question": "How many?", "Answer": 2.0, "Type": "Sum"},
     {"problem": "Ed has 2. How many?", "answer": "2", "kind": "math", "tags": ["Sum"]}),
    ({"Body": "Ed has 2.", "question": "How many?", "question_concat": "Ed has 2. How many?", "answer": "2"},
     {"problem": "Ed has 2. How many?", "answer": "2", "kind": "math"}),
    ({"question": "n?", "final_answer": ["$7$"], "solution": ["One.", "Two."]},
     {"problem": "n?", "answer": "$7$", "kind": "math", "solution": "One.\n\nTwo.\n\n\\boxed{$7$}"}),
    ({"Question": "n?", "Answer": [0, 5]}, {"problem": "n?", "answer": "[0, 5]", "kind": "math"}),
    ({"Question": "n?", "Answer": False}, {"problem": "n?", "answer": "False", "kind": "yesno"}),
    ({"Question": "n?", "Answer": "(c)", "Answer_type": "option"}, {"problem": "n?", "answer": "(c)",
    "kind": "choice"}),
    ({"question": "So?", "answer": "yes", "reasoning": "Let."},
     {"problem": "So?", "answer": "yes", "kind": "yesno", "solution": "Let.\n\n\\boxed{yes}"}),
    ({"problem": "x?", "expected_answer": "236", "reference_solution": None}, {"problem": "x?", "answer": "236",
    "kind": "math"}),
    ({"problem": "x?", "answer": "no", "kind": "math"}, {"problem": "x?", "answer": "no", "kind": "math"})])
def test_one_record_of_each_form(tmp_path, record, problem):
    assert problems_of(tmp_path, record) == [problem] == problems_of(tmp_path, record, name="p.json")


def test_json_files(tmp_path, capsys):
    (tmp_path / "d.json").write_text(json.dumps({"data": [{"problem": "1?", "answer": 1}]}))
    assert [p["id"] for p in common.load_problems(f"{tmp_path}/d.json", "test", "")] == [f"{tmp_path.name}/d/1"]
    for text, words in {"{": "not valid JSON", '{"a": 1}': "neither a list of problems",
        "[3]": "d.json:1: not a JSON ob"}.items():
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(SystemExit):
            common.load_problems(f"{tmp_path}/d.json", "test", "")
        assert words in capsys.readouterr().err


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
FAILS = {"tal_scq5k/en_train/2974"}  # its solution's box is "(\rm B) \textasciitilde A\textasciitilde makes ..."


def test_every_set_and_its_golds(shared, capsys):
    """Counts as data/MANIFEST.md has them; each gold is right, and each solution as a response, but those named."""
    checker, failed = common.Checker(2), set()
    for name, (n, kinds, solutions) in SETS.items():
        problems = common.load_problems(*name.split("/"), shared / "data")
        assert (len(problems), " ".join(sorted({p["kind"] for p in problems}))) == (n, kinds), name
        assert len({p["id"] for p in problems}) == n and sum("solution" in p for p in problems) == solutions, name
        responses = [(p, f"\\boxed{{{p['answer']}}}") for p in problems]
        responses += [(p, p["solution"]) for p in problems if "solution" in p]
        failed |= {p["id"] for (p, _), verdict in zip(responses, [checker.submit(*r) for r in responses])
                   if not verdict.result()[0]}
    assert failed == FAILS
    assert capsys.readouterr().out.count("2 problems with an empty answer dropped") == 2  # MATH train, gaokao2023en
    for split in ("train", "test"):  # GSM8K in the file's own form: the answer behind ####
        for problem, line in zip(common.load_problems("gsm8k", split, shared / "data"),
                                 open(shared / "data" / "gsm8k" / f"{split}.jsonl")):
            assert common.judge(problem, json.loads(line)["answer"]) == ((True, "equal"), None), problem["id"]
    assert {p.get("level") for p in common.load_problems("math", "train", shared / "data")} == {1, 2, 3, 4, 5, None}
    for path in (shared / "data").glob("*/*.jsonl"):  # and every other file there can be read by its path
        assert common.load_problems(str(path), "test", "")


def test_names_that_are_not_there_or_not_here(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    for name, split, words in [("math500", "train", "math500 has no train split, only test"),
                               ("math500", "test", "pip install datasets"), ("acme/sums:hard@dev", "test",
                               "pip install datasets"),
                               ("adastar_gsm8k", "test", "adastar_gsm8k/test.jsonl: no such file"), ("acme", "test",
                               "unknown")]:
        with pytest.raises(SystemExit):
            common.load_problems(name, split, "nowhere")
        [line] = capsys.readouterr().err.strip().splitlines()
        assert words in line, line


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
        (tmp_path / "acme" / "sums" / f"{split}.jsonl").write_text("".join(
            json.dumps({"question": f"{i}+1?", "answer": f"It is.\n#### {i + 1}"}) + "\n" for i in range(n)))
    found = common.load_problems("acme/sums", "train", "")
    assert [p["id"] for p in found] == [f"acme/sums/train/{i}" for i in (1, 2, 3)]
    found = common.load_problems("acme/sums@validation", "train", "")
    assert [(p["id"], p["answer"]) for p in found] == [("acme/sums/validation/1", "1"), ("acme/sums/validation/2", "2")]
    with pytest.raises(SystemExit):
        common.load_problems("acme/products", "train", "")
    assert "acme/products is not to be had from the Hub" in capsys.readouterr().err


def test_hold_out():
    problems = [{"id": f"s/{i}", "problem": f"text {i % 40}"} for i in range(50)]  # ten of the texts stand there twice
    kept, aside = eval.hold_out(problems, 15, 0)
    assert len(aside) in (15, 16) and sorted(p["id"] for p in kept + aside) == sorted(p["id"] for p in problems)
    assert not {p["problem"] for p in kept} & {p["problem"] for p in aside}
    again = eval.hold_out(problems[::-1], 15, 0)[1]
    assert {p["id"] for p in again} == {p["id"] for p in aside} != {p["id"] for p in eval.hold_out(problems, 15,
        1)[1]}
    assert eval.hold_out(problems, 0, 0) == (problems, [])
    with pytest.raises(SystemExit):
        eval.hold_out(problems, 50, 0)


def test_worked_examples_are_in_the_form_that_is_to_be_learnt():
    kinds = {"grade-school": "math", "competition": "math"}
    for family, examples in eval.EXAMPLES.items():
        assert len(examples) >= 6 and len({problem for problem, _ in examples}) == len(examples)
        for problem, solution in examples:
            *steps, last = solution.split("\n\n")
            assert steps and "boxed" not in "".join(steps) and last == f"\\boxed{{{common.last_boxed(solution)}}}"
            answer, options = common.last_boxed(solution), re.findall(r"\n\(([A-Z])\) ", problem)
            assert options == sorted(options) and (answer in options) == (family == "choice")
            assert family != "label" or answer in common.ENTAILMENT
            assert family != "yesno" or answer in common.YES_NO
        like = {"id": "gsm8k/test/1" if family == "grade-school" else "math/test/1", "kind": kinds.get(family, family)}
        assert [e["problem"] for e in eval.worked_examples(like)] == [problem for problem, _ in examples]


def test_end_tokens_are_those_of_the_base_and_of_the_chat(tmp_path):
    tokenizer = common.load_tokenizer(str(TOY / "model"), "few_shot")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert common.end_ids(tokenizer, TOY / "model") == sorted([ids["<|endoftext|>"], ids["<|im_end|>"]])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|im_start|>"], 0]}))
    assert common.end_ids(tokenizer, tmp_path) == sorted(ids.values())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert common.end_ids(tokenizer, TOY / "model") == [ids["<|endoftext|>"]]
