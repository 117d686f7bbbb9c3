"""Bad data, bad models and bad luck: one line that says what is wrong and where, for every script, and nothing is lost.

Each case runs with one of the five scripts, in turn; with EVERY_SCRIPT=1 (study.py bad) with all of them.
"""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SMOKE, TOY, launch
from test_runs import error_of, files, forget, killed, lines

SCRIPTS = ["dast.py", "adastar.py", "hs_star.py", "sai_dpo.py", "eval.py"]
GOOD = {"problem": "1+1?", "answer": "2"}


def with_each_script(cases):
    """Parameters, for each case its name and the script that has its turn; or, for each, all scripts."""
    return [pytest.param(case, script, id=f"{case}-{script[:-3]}") for number, case in enumerate(cases)
            for script in (SCRIPTS if "EVERY_SCRIPT" in os.environ else [SCRIPTS[number % len(SCRIPTS)]])]


def refused(folder, script, data="", model="", *flags):
    """The line with which a script refuses problems or a model; it has made nothing by then."""
    data, model = data or str(TOY / "train.jsonl"), model or str(TOY / "model")
    if script == "eval.py":
        start = ["--sets", data, "--max-new-tokens", "64", "--model", model]
    else:
        more = {"adastar.py": ["--held-out", 0], "sai_dpo.py": ["--tagger", ""]}.get(script, [])  # a set may be small
        start = ["--toy", "--train-data", data, "--model", model, *more]
    done = launch(folder, script, *start, "--run", "bad", *flags, check=False)
    line = error_of(done)
    assert not [p for p in folder.glob("runs/bad/round_*/*") if p.name not in ("clusters.jsonl", "model.part")], line
    return line


DATA = {  # name: (content of p.jsonl, words of the line)
    "empty": (b"", ["p.jsonl: no problem in it"]),
    "blank": (b"\n \n\n", ["p.jsonl: no problem in it"]),
    "cut": (b'{"problem": "1+1?", "answer": "2"}\n\n{"problem": "2+', ["p.jsonl:3: not valid JSON; mend or remove it"]),
    "nested": (b"[" * 100_000, ["p.jsonl:1: not valid JSON"]),
    "a list": (b"[1, 2]\n", ["p.jsonl:1: not a JSON object"]),
    "a number": (b"17\n", ["p.jsonl:1: not a JSON object"]),
    "no text": (b'{"answer": "2"}\n', ["p.jsonl:1: no text under 'problem'"]),
    "text of the wrong type": (b'{"problem": ["1+1?"], "answer": "2"}\n', ["p.jsonl:1: no text under 'problem'"]),
    "no text but blanks": (b'{"problem": " ", "answer": "2"}\n', ["p.jsonl:1: no text under 'problem'"]),
    "null": (b'{"problem": "1+1?", "answer": null}\n', ["p.jsonl:1: no 'answer'"]),
    "no answer": (b'{"problem": "1+1?"}\n', ["p.jsonl:1: no 'answer'"]),
    "answer of the wrong type": (b'{"problem": "1+1?", "answer": {"is": 2}}\n', ["p.jsonl:1: no 'answer'"]),
    "answer that is no number": (b'{"problem": "1+1?", "answer": NaN}\n', ["p.jsonl:1: no 'answer'"]),
    "only empty answers": (b'{"problem": "1+1?", "answer": " "}\n', ["p.jsonl: no problem in it"]),
    "wrong kind": (b'{"problem": "?", "answer": "2", "kind": "sum"}\n',
                   ["p.jsonl:1: 'kind' is 'sum', and not math, choice"]),
    "unknown kind": (b'{"problem": "1+1?", "answer": "2", "kind": ["math"]}\n', ["p.jsonl:1: 'kind' is ['math']"]),
    "choices of the wrong type": (b'{"problem": "?", "answer": "B", "choices": [1, 2]}\n', ["p.jsonl:1: 'choices'"]),
    "choices that are none": (b'{"problem": "?", "answer": "A", "choices": 5}\n',
                              ["p.jsonl:1: 'choices' is not a list"]),
    "choices without texts": (b'{"problem": "?", "answer": "B", "choices": {"text": 1, "label": 2}}\n',
                              ["p.jsonl:1: 'choices'"]),
    "answer of no choice": (b'{"problem": "?", "answer": "C", "choices": ["a", "b"]}\n', ["none of the choices"]),
    "Latin 1": ('{"problem": "caf\u00e9: 1+1?", "answer": "2"}\n'.encode("latin-1"), ["p.jsonl:1: not UTF-8"]),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), ["p.jsonl:1: not UTF-8"]),
    "half a character": (b'{"problem": "\\ud83d 1+1?", "answer": "2"}\n', ["p.jsonl:1: half a character"]),
    "half a character in a choice": (b'{"problem": "?", "answer": "a", "choices": ["a", "\\ud83d"]}\n',
                                     ["p.jsonl:1: half a character"]),
    "a picture": (bytes(range(256)) * 40, ["p.jsonl:1: not"]),
    "huge number": (b'{"problem": "9?", "answer": ' + b"9" * 1_000_000 + b"}\n", ["p.jsonl:1: Exceeds the limit"]),
    "huge problem": (json.dumps(GOOD | {"problem": "1+" * 20_000}).encode(), ["has ", "exceeds the context of 8,192"]),
    "solution of the wrong type": (b'{"problem": "1+1?", "answer": "2", "solution": 5}\n', ["p.jsonl:1: 'solution'"]),
    "huge level": (b'{"problem": "1+1?", "answer": "2", "level": "' + b"9" * 5000 + b'"}\n',
                   ["p.jsonl:1: Exceeds the limit"]),
}


@pytest.mark.parametrize("name, script", with_each_script(DATA))
def test_bad_problems(tmp_path, name, script):
    content, words = DATA[name]
    (tmp_path / "p.jsonl").write_bytes(content)
    line = refused(tmp_path, script, "p.jsonl")
    assert all(word in line for word in words) and len(line) < 500, line


NAMES = {  # name: (data, words)
    "missing": ("none.jsonl", ["none.jsonl: no such file"]),
    "a folder": ("folder.jsonl", ["folder.jsonl: no such file"]),
    "twice": ("p.jsonl,p.jsonl", ["two problems have the id", "/p/1'"]),
    "same name": ("a/q.jsonl,b/a/q.jsonl", ["two problems have the id 'a/q/1'"]),
    "unknown": ("gsm9k", ["unknown problem set 'gsm9k'"]),
    "a pickle": ("p.pkl", ["unknown problem set 'p.pkl'"]),
    "no name": (",", ["no problem set is named"]),
    "not readable": ("secret.jsonl", ["secret.jsonl"]),
}


@pytest.mark.parametrize("name, script", [
    case for case in with_each_script(NAMES) if case.id != "same name-eval"])  # it keeps the answers in two files
def test_bad_names_of_sets(tmp_path, name, script):
    data, words = NAMES[name]
    for path in ("p.jsonl", "a/q.jsonl", "b/a/q.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "secret.jsonl").symlink_to("/proc/self/mem")  # where even root cannot read
    if script == "eval.py" and name in ("twice", "no name"):
        words = ["share a file"] if name == "twice" else ["a name is empty"]
    line = refused(tmp_path, script, data)
    assert all(word in line for word in words), line


def config_of(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not ...}))


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
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], [], ["m: no *.safetensors in it"]),
    "no configuration": (lambda f: (f / "config.json").unlink(), [], ["m: "]),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), [], ["m: ", "config.json"]),
    "unknown type": (lambda f: config_of(f, model_type="novel"), [], ["m: ", "novel"]),
    "code": (code, [], ["m: it brings code of its own, which is never run here"]),
    "a pickle": (pickle, [], ["m: "]),
    "an encoder": (lambda f: config_of(f, model_type="bert"), [], ["m: "]),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], [], ["m: there is no tokenizer in it"]),
    "cut tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 5000), [], ["m: "]),
    "no end token": (no_end, [], ["m: its tokenizer has no end token"]),
    "another tokenizer": (lambda f: config_of(f, vocab_size=300), [],
                          ["m: its tokenizer has 431 tokens, and the model only 300"]),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), ["--prompt", "chat"],
                         ["m has no chat template"]),
    "chat template that raises": (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no turns') }}"),
                                  ["--prompt", "chat"], ["m: ", "chat template", "no turns"]),
    "chat template with an error": (lambda f: (f / "chat_template.jinja").write_text("{% for %}"),
                                    ["--prompt", "chat"], ["m: ", "chat template"]),
    "chat template that breaks": (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].a.b + 1 / 0 }}"),
                                  ["--prompt", "chat"], ["m: ", "chat template"]),
    "chat template that reaches out": (lambda f: (f / "chat_template.jinja").write_text(
        "{{ messages.__class__.__base__.__subclasses__() }}"), ["--prompt", "chat"], ["m: ", "chat template"]),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 1_000_000), [], ["model.safetensors is damaged"]),
    "a missing shard": (sharded, [], ["model-00002-of-00002.safetensors is damaged or missing"]),
    "a missing tensor": (lambda f: weights_of(f, lambda w: w.pop("model.norm.weight")), [],
                         ["m: ", "model.norm.weight", "missing"]),
    "other shapes": (lambda f: config_of(f, intermediate_size=256), [], ["m: ", "mlp", "shape"]),
    "NaN": (lambda f: weights_of(f, lambda w: w["model.norm.weight"].fill_(float("nan"))), [],
            ["m: ", "model.norm.weight", "not finite"]),
    "infinite": (lambda f: weights_of(f, lambda w: w["model.layers.1.mlp.up_proj.weight"][3].fill_(float("inf"))), [],
                 ["m: ", "model.layers.1.mlp.up_proj.weight", "not finite"]),
    "short context": (lambda f: config_of(f, max_position_embeddings=20), [], ["exceeds the context of 20"]),
}


@pytest.mark.parametrize("name, script", with_each_script(MODELS))
def test_bad_models(tmp_path, name, script):
    change, flags, words = MODELS[name]
    shutil.copytree(TOY / "model", tmp_path / "m")
    change(tmp_path / "m")
    line = refused(tmp_path, script, "", "m", *flags)
    assert all(word in line for word in words) and len(line) < 500, line
    assert not list(Path(tmp_path).rglob("pwned"))


def small(script, *more):
    """Flags of a short run of one round."""
    sizes = {"dast.py": ["--n-train", 12, "--k-probe", 1],
             "adastar.py": ["--n-train", 40, "--held-out", 0, "--steps", 2],
             "hs_star.py": ["--n-train", 12, "--slice", 12],
             "sai_dpo.py": ["--n-train", 30, "--samples-per-round", 10, "--pairs-per-round", 5, "--k-samples", 4]}
    return ["--toy", *sizes[script], "--n-test", 4, "--rounds", 1, "--run", "r", *more]


def graded(folder, verdict):
    (folder / "mine.py").write_text(f"def grade(problem, text):\n    return {verdict}, 'mine'\n")
    return ["--grader", "mine.py:grade"]


METHODS = SCRIPTS[:4] if "EVERY_SCRIPT" in os.environ else ["adastar.py"]


@pytest.mark.parametrize("script", SCRIPTS[:4])
def test_a_cut_answer_is_never_trained_on(tmp_path, script):
    """All answers count as right, and nearly all are cut: what is trained on has ended by itself."""
    launch(tmp_path, script, *small(script, "--max-new-tokens", 9, *graded(tmp_path, True)))
    drawn = [r for path in tmp_path.glob("runs/r/round_1/*samples.jsonl") for r in lines(path)]
    drawn += lines(tmp_path / "runs/r/round_1/responses.jsonl")
    cut = {r["text"] for r in drawn if r["finish"] == "length"}
    assert cut and all(r["correct"] and r["tokens"] == 9 for r in drawn if r["text"] in cut)
    path = tmp_path / "runs/r/round_1/train.jsonl"
    assert not cut & {text for e in (lines(path) if path.exists() else ()) for text in e["completions"]}


@pytest.mark.parametrize("script", METHODS)
def test_no_answer_is_correct(tmp_path, script):
    """The model stays what it was, a line says so, and the run goes on to its end."""
    done = launch(tmp_path, script, *small(script, *graded(tmp_path, False)))
    assert "the model stays as it is" in done.stdout and (tmp_path / "runs/r/round_1/eval.json").exists()
    assert not (tmp_path / "runs/r/round_1/model").exists()


@pytest.mark.parametrize("script", METHODS)
def test_a_loss_that_is_no_number(tmp_path, script):
    """The step and its examples are named; what was made before stays, and nothing of this training."""
    lr = "--lr-dpo" if script in ("hs_star.py", "sai_dpo.py") else "--lr"
    line = error_of(launch(tmp_path, script, *small(script, lr, "1e30", "--batch-size", 2), check=False))
    assert ", training step " in line and "the last good model stays. The step's examples: toy/train/" in line
    assert (tmp_path / "runs/r/metrics.jsonl").exists() and not list(tmp_path.glob("runs/r/round_*/model"))


def cut_short(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


STEP = "unfinished/round_1-step_0000002"


@pytest.mark.parametrize("name, last, again", [  # the last phase that the run has finished by then, and with what kept
    ("constants.json", 7, ["constants.json"]),
    ("metrics.jsonl", 5, ["metrics.jsonl"]),
    ("round_0/probe.jsonl", 0, ["round_0/probe.jsonl"]),
    ("round_0/model/model.safetensors", 2, ["round_0/model", "round_0/eval.json"]),
    ("round_1/responses.jsonl", 3, ["round_1/responses.jsonl"]),
    (f"{STEP}/shard-00001-model-00002-of-00005.safetensors", 5, [STEP]),
    (f"{STEP}/progress.json", 5, [STEP]),
])
def test_a_file_that_a_dead_machine_left_cut(finished, copy_of, name, last, again):
    """It is noticed, named, and what the line says to remove makes the run go on to the same end."""
    run = copy_of / "runs" / "one"
    forget(run, last)
    if "unfinished" in name:
        killed(copy_of, "dast", "Progress.save:2", *SMOKE, "--run", "one", "--save-minutes", "0")
    os.truncate(run / name, (run / name).stat().st_size * 2 // 3)
    line = error_of(launch(copy_of, "dast.py", *SMOKE, "--run", "one", check=False))
    assert f"runs/one/{name} is damaged" in line and "remove" in line, line
    for path in again:
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    launch(copy_of, "dast.py", *SMOKE, "--run", "one")
    assert files(run) == files(finished / "runs" / "one")


def test_lines_that_a_dead_machine_left_broken(finished, copy_of):
    """Of the answers that a phase has so far, those that can be read are kept: zeros, half a line, half a character."""
    run = copy_of / "runs" / "one"
    forget(run, 2)
    flags = [*SMOKE, "--run", "one"]
    [left] = killed(copy_of, "dast", "Draws.put:60", *flags)
    with open(run / "unfinished" / left, "ab") as file:
        file.write(b'\n{"id": "toy/train/3", "draw": 0, "text": "caf\xc3\n' + bytes(4096) + b"\n17\n[]\n{}\n\xff\xfe")
    launch(copy_of, "dast.py", *flags)
    assert files(run) == files(finished / "runs" / "one")
