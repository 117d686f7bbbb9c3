"""Bad data, bad models and bad luck: one line that says what is wrong and where, and nothing is lost.

Each case runs with one of the five scripts, in turn; with EVERY_SCRIPT=1 (study.py bad) with all of them.
"""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SCRIPTS, SMALL, SMOKE, TOY, error_of, files, forget, launch, lines

PROGRAMS = [*SCRIPTS, "eval.py"]
GOOD = {"problem": "1+1?", "answer": "2"}


def with_each_script(cases, scripts=PROGRAMS):
    """Parameters, for each case its name and the script that has its turn; or, for each, all scripts."""
    parameters = []
    for number, case in enumerate(cases):
        turn = scripts if "EVERY_SCRIPT" in os.environ else [scripts[number % len(scripts)]]
        parameters += [pytest.param(case, script, id=f"{case}-{script[:-3]}") for script in turn]
    return parameters


def refused(folder, script, data="", model="", *flags):
    """The line with which a script refuses problems or a model; it has drawn and trained nothing by then."""
    data = data or str(TOY / "train.jsonl")
    model = model or str(TOY / "model")
    if script == "eval.py":
        start = ["--sets", data, "--max-new-tokens", "64", "--model", model]
    else:
        more = ["--held-out", 0] if script == "adastar.py" else []  # a set may be small
        start = ["--toy", "--train-data", data, "--model", model, *more]
    line = error_of(launch(folder, script, *start, "--name", "bad", *flags, check=False))
    made = {path.name for path in folder.glob("runs/bad/round_*/*")}
    assert made <= {"clusters.jsonl", "model.part"} and len(line) < 500, line
    return line


DATA = {  # name: (content of p.jsonl, words of the line)
    "empty": (b"", ["p.jsonl: no problem in it"]),
    "cut": (b'{"problem": "1+1?", "answer": "2"}\n\n{"problem": "2+', ["p.jsonl:3: ", "one problem in JSON"]),
    "a list": (b"[1, 2]\n", ["p.jsonl:1: not a JSON object"]),
    "no text": (b'{"answer": "2"}\n', ["p.jsonl:1: no text under 'problem'"]),
    "no text but blanks": (b'{"problem": " ", "answer": "2"}\n', ["p.jsonl:1: no text under 'problem'"]),
    "no answer": (b'{"problem": "1+1?"}\n', ["p.jsonl: no problem in it"]),
    "answer of the wrong type": (b'{"problem": "1+1?", "answer": {"is": 2}}\n', ["p.jsonl:1: ", "neither a text"]),
    "only empty answers": (b'{"problem": "1+1?", "answer": " "}\n', ["p.jsonl: no problem in it"]),
    "wrong kind": (b'{"problem": "?", "answer": "2", "kind": "sum"}\n',
                   ["p.jsonl:1: 'kind' is 'sum', and not math, choice"]),
    "choices of the wrong type": (b'{"problem": "?", "answer": "B", "choices": [1, null]}\n',
                                  ["p.jsonl:1: 'None' is neither a text"]),
    "answer of no choice": (b'{"problem": "?", "answer": "C", "choices": ["a", "b"]}\n', ["none of the choices"]),
    "Latin 1": ('{"problem": "caf\u00e9: 1+1?", "answer": "2"}\n'.encode("latin-1"), ["p.jsonl:1: not UTF-8"]),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), ["p.jsonl:1: ", "one problem in JSON"]),
    "half a character": (b'{"problem": "\\ud83d 1+1?", "answer": "2"}\n', ["p.jsonl:1: not UTF-8"]),
    "a picture": (bytes(range(256)) * 40, ["p.jsonl:1: ", "one problem in JSON"]),
    "huge problem": (json.dumps(GOOD | {"problem": "1+" * 20_000}).encode(), ["has ", "exceeds the context of 8,192"]),
    "solution of the wrong type": (b'{"problem": "1+1?", "answer": "2", "solution": 5}\n', ["p.jsonl:1: 'solution'"]),
    "LaTeX with one backslash": (b'{"problem": "?", "answer": "\\frac{1}{2}"}\n', ["p.jsonl:1: ", "one backslash"]),
}


@pytest.mark.parametrize("name, script", with_each_script(DATA))
def test_bad_problems(tmp_path, name, script):
    content, words = DATA[name]
    (tmp_path / "p.jsonl").write_bytes(content)
    line = refused(tmp_path, script, "p.jsonl")
    assert all(word in line for word in words), line


NAMES = {  # name: (data, words)
    "a folder": ("folder.jsonl", ["folder.jsonl: no such file"]),
    "twice": ("p.jsonl,p.jsonl", ["two problems have the id", "/p/1'"]),
    "same name": ("a/q.jsonl,b/a/q.jsonl", ["two problems have the id 'a/q/1'"]),
    "a pickle": ("p.pkl", ["p.pkl: no such file, nor one of the sets"]),
    "no name": (",", ["no problem set is named"]),
    "not readable": ("secret.jsonl", ["secret.jsonl"]),
}


@pytest.mark.parametrize("name, script", with_each_script(NAMES, SCRIPTS))
def test_bad_names_of_sets(tmp_path, name, script):
    data, words = NAMES[name]
    for path in ("p.jsonl", "a/q.jsonl", "b/a/q.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "secret.jsonl").symlink_to("/proc/self/mem")  # where even root cannot read
    line = refused(tmp_path, script, data)
    assert all(word in line for word in words), line


def test_two_sets_of_one_name_would_share_a_file(tmp_path):
    """eval.py keeps the answers to each set in a file."""
    (tmp_path / "p.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert "share a file" in refused(tmp_path, "eval.py", "p.jsonl,p.jsonl")


def config_of(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def weights_of(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_end(folder):
    config_of(folder, "tokenizer_config.json", eos_token=None, pad_token=None)


def code(folder):
    config_of(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text("open('pwned', 'w')\n")


def pickle(folder):
    """Weights as a pickle that writes a file when it is read, beside safetensors of another name."""
    class Evil:
        def __reduce__(self):
            return open, ("pwned", "w")
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")


def sharded(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
        name: f"model-0000{1 + (name == 'model.norm.weight')}-of-00002.safetensors" for name in names}}))


MODELS = {  # name: (what is done to the toy's folder, flags, words of the line)
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], [], ["m: "]),
    "no configuration": (lambda f: (f / "config.json").unlink(), [], ["m: "]),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), [], ["m: ", "config.json"]),
    "unknown type": (lambda f: config_of(f, model_type="novel"), [], ["m: ", "novel"]),
    "code": (code, [], ["m: ", "contains custom code which must be executed"]),
    "a pickle": (pickle, [], ["m: "]),
    "an encoder": (lambda f: config_of(f, model_type="bert"), [], ["m: "]),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], [], ["m: there is no tokenizer in it"]),
    "cut tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 5000), [], ["m: "]),
    "no end token": (no_end, [], ["m: its tokenizer has no end token"]),
    "another tokenizer": (lambda f: config_of(f, vocab_size=300), [],
                          ["m: its tokenizer has 431 tokens, and the model only 300"]),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), ["--prompt", "chat"],
                         ["m: it has no chat template"]),
    "chat template that raises": (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no turns') }}"),
                                  ["--prompt", "chat"], ["m: ", "chat template", "no turns"]),
    "chat template with an error": (lambda f: (f / "chat_template.jinja").write_text("{% for %}"),
                                    ["--prompt", "chat"], ["m: ", "chat template"]),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 1_000_000), [], ["m: ", "incomplete metadata"]),
    "a missing shard": (sharded, [], ["m/model-00002-of-00002.safetensors"]),
    "a missing tensor": (lambda f: weights_of(f, lambda w: w.pop("model.norm.weight")), [],
                         ["m: ", "model.norm.weight", "missing"]),
    "other shapes": (lambda f: config_of(f, intermediate_size=256), [], ["m: ", "mlp", "shape"]),
    "NaN": (lambda f: weights_of(f, lambda w: w["model.norm.weight"].fill_(float("nan"))), [],
            ["m: ", "model.norm.weight", "not finite"]),
    "infinite": (lambda f: weights_of(f, lambda w: w["model.layers.1.mlp.up_proj.weight"][3].fill_(float("inf"))), [],
                 ["m: ", "model.layers.1.mlp.up_proj.weight", "not finite"]),
    "short context": (lambda f: config_of(f, max_position_embeddings=20), [], ["exceeds the context of 20"]),
    "chat template of the first turn": (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}!!"),
                                        ["--prompt", "chat"], ["m: its chat template does not show"]),
    "chat template without end": (lambda f: (f / "chat_template.jinja").write_text("{{ messages[-1].content }} ### End"),
                                  ["--prompt", "chat"], ["m: its chat template ends an answer with '### End'"]),
}


@pytest.mark.parametrize("name, script", with_each_script(MODELS))
def test_bad_models(tmp_path, name, script):
    change, flags, words = MODELS[name]
    shutil.copytree(TOY / "model", tmp_path / "m")
    change(tmp_path / "m")
    line = refused(tmp_path, script, "", "m", *flags)
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_cut_answer_is_never_trained_on(tmp_path, script):
    """All others count as right: what is trained on has ended by itself."""
    (tmp_path / "kind.py").write_text("def grade(problem, text):\n    return True, 'kind'\n")
    launch(tmp_path, script, *SMALL[script], "--rounds", "1", "--name", "cut", "--max-new-tokens", "9",
           "--grader", "kind.py:grade")
    run = tmp_path / "runs" / "cut"
    drawn = []
    for path in run.glob("round_1/*s*.jsonl"):
        drawn += [r for r in lines(path) if "text" in r]
    cut = {r["text"] for r in drawn if r["finish"] == "length"}
    trained = lines(run / "round_1/train.jsonl") if (run / "round_1/train.jsonl").exists() else []
    assert cut and not any(r["correct"] for r in drawn if r["finish"] == "length")
    assert not cut & {text for example in trained for text in example["completions"]}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").symlink_to("/sys/kernel")  # where even root may not write
    assert "runs/dast-0" in error_of(launch(tmp_path, "dast.py", *SMOKE, check=False))


LATER = ["selection.jsonl", "train.jsonl", "model", "steps.jsonl", "eval.jsonl", "eval.json"]  # than the responses


@pytest.mark.parametrize("name, later", [
    ("constants.json", []), ("metrics.jsonl", []), ("round_1/responses.jsonl", [f"round_1/{name}" for name in LATER])])
def test_a_file_that_was_cut_is_named(finished, copy_of, name, later):
    """What the line says to remove makes the run resume to the same end."""
    run = copy_of / "runs" / "one"
    forget(run, *later)
    os.truncate(run / name, (run / name).stat().st_size * 2 // 3)
    line = error_of(launch(copy_of, "dast.py", *SMOKE, "--name", "one", check=False))
    assert f"runs/one/{name} is damaged" in line and "remove" in line, line
    forget(run, name)
    launch(copy_of, "dast.py", *SMOKE, "--name", "one")
    assert files(run) == files(finished / "runs" / "one")
