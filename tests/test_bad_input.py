"""Bad data, bad models and bad luck: one line that says what is wrong and where, and nothing is lost.

Each case runs with one of the five scripts, in turn; with EVERY_SCRIPT=1 with all of them. More of what a file of
problems may have in it: test_problems.py."""
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from conftest import SCRIPTS, SMALL, SMOKE, TOY, error_of, files, forget, launch, lines

GOOD = b'{"problem": "1+1?", "answer": "2"}\n'


def with_each_script(cases):
    """Parameters, for each case its name and the script that has its turn; or, for each, all scripts."""
    scripts = [*SCRIPTS, "eval.py"]
    parameters = []
    for number, case in enumerate(cases):
        turn = scripts if "EVERY_SCRIPT" in os.environ else [scripts[number % len(scripts)]]
        parameters += [pytest.param(case, script, id=f"{case}-{script[:-3]}") for script in turn]
    return parameters


def check_refused(folder, script, words, data=TOY / "train.jsonl", model=TOY / "model", flags=()):
    """A script refuses problems or a model in one line with these words; it has drawn and trained nothing by then."""
    if script == "eval.py":
        start = ["--sets", data, "--max-new-tokens", "64", "--model", model]
    else:
        more = ["--held-out", 0] if script == "adastar.py" else []  # a set may be small
        start = ["--toy", "--train-data", data, "--model", model, *more]
    line = error_of(launch(folder, script, *start, "--name", "bad", *flags, check=False))
    made = {path.name for path in folder.glob("runs/bad/round_*/*")}
    assert made <= {"clusters.jsonl", "model.part"} and len(line) < 500, line
    assert all(word in line for word in words), line


DATA = {  # name: (content of p.jsonl, words of the line)
    "empty": (b"", ["p.jsonl: no problem with an answer in it"]),
    "cut": (GOOD + b'\n{"problem": "2+', ["p.jsonl:3: ", "one problem in JSON"]),
    "a list": (b"[1, 2]\n", ["p.jsonl:1: not a JSON object"]),
    "no text": (b'{"answer": "2"}\n', ["p.jsonl:1: no text under 'problem'"]),
    "only empty answers": (b'{"problem": "1+1?", "answer": " "}\n', ["p.jsonl: no problem with an answer in it"]),
    "wrong kind": (b'{"problem": "?", "answer": "2", "kind": "sum"}\n', ["p.jsonl:1: 'kind' is 'sum'; it must be"]),
    "Latin 1": ('{"problem": "caf\u00e9: 1+1?", "answer": "2"}\n'.encode("latin-1"), ["p.jsonl:1: not UTF-8"]),
    "UTF-16": (GOOD.decode().encode("utf-16"), ["p.jsonl:1: ", "one problem in JSON"]),
    "half a character": (b'{"problem": "\\ud83d 1+1?", "answer": "2"}\n', ["p.jsonl:1: not UTF-8"]),
    "a picture": (bytes(range(256)) * 40, ["p.jsonl:1: ", "one problem in JSON"]),
    "huge problem": (GOOD.replace(b"1+1", b"1+" * 20_000), ["has ", "exceeds the context of 8,192"]),
}


@pytest.mark.parametrize("name, script", with_each_script(DATA))
def test_bad_problems(tmp_path, name, script):
    content, words = DATA[name]
    (tmp_path / "p.jsonl").write_bytes(content)
    check_refused(tmp_path, script, words, data="p.jsonl")


@pytest.mark.parametrize("data, script, words", [
    ("folder.jsonl", "dast.py", ["folder.jsonl: no such file"]),
    ("p.jsonl,p.jsonl", "adastar.py", ["two problems have the id", "/p/1'"]),
    ("a/q.jsonl,b/a/q.jsonl", "hs_star.py", ["two problems have the id 'a/q/1'"]),
    ("p.pkl", "sai_dpo.py", ["p.pkl: no such file; name a file"]),
    (",", "dast.py", ["no problem set is named"]),
    ("secret.jsonl", "hs_star.py", ["secret.jsonl"]),
    ("p.jsonl,p.jsonl", "eval.py", ["share a file"]),  # it keeps the answers to each set in one
])
def test_bad_names_of_sets(tmp_path, data, script, words):
    for path in ("p.jsonl", "a/q.jsonl", "b/a/q.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(GOOD)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "secret.jsonl").symlink_to("/proc/self/mem")  # where even root cannot read
    check_refused(tmp_path, script, words, data=data)


def config_of(folder, file="config.json", **values):
    common.write(folder / file, common.read(folder / file) | values)


def weights_of(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


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
    """The first of two shards is there."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(load_file(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    common.write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


NORM, UP_PROJ = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
MODELS = {  # name: (what is done to the toy's folder, words of the line)
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], []),
    "no configuration": (lambda f: (f / "config.json").unlink(), []),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["m: ", "config.json"]),
    "unknown type": (lambda f: config_of(f, model_type="novel"), ["m: ", "novel"]),
    "code": (code, ["m: ", "contains custom code which must be executed"]),
    "a pickle": (pickle, []),
    "an encoder": (lambda f: config_of(f, model_type="bert"), []),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["m: there is no tokenizer in it"]),
    "cut tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 5000), []),
    "no end token": (lambda f: config_of(f, "tokenizer_config.json", eos_token=None, pad_token=None),
                     ["m: its tokenizer has no end token"]),
    "another tokenizer": (lambda f: config_of(f, vocab_size=300),
                          ["m: its tokenizer has 431 tokens, but the model only 300"]),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 1_000_000), ["m: ", "incomplete metadata"]),
    "a missing shard": (sharded, ["m/model-00002-of-00002.safetensors"]),
    "a missing tensor": (lambda f: weights_of(f, lambda w: w.pop(NORM)), ["m: ", NORM, "missing"]),
    "other shapes": (lambda f: config_of(f, intermediate_size=256), ["m: ", "mlp", "shape"]),
    "NaN": (lambda f: weights_of(f, lambda w: w[NORM].fill_(float("nan"))), ["m: ", NORM, "not finite"]),
    "infinite": (lambda f: weights_of(f, lambda w: w[UP_PROJ][3].fill_(float("inf"))), ["m: ", UP_PROJ, "not finite"]),
    "short context": (lambda f: config_of(f, max_position_embeddings=20), ["exceeds the context of 20"]),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), ["m: it has no chat template"]),
    "chat template that raises": (template("{{ raise_exception('no turns') }}"), ["m: ", "chat template", "no turns"]),
    "chat template with an error": (template("{% for %}"), ["m: ", "chat template"]),
    "chat template of one turn": (template("{{ messages[0].content }}!!"), ["m: its chat template does not show"]),
    "chat template without end": (template("{{ messages[-1].content }} ### End"),
                                  ["m: its chat template ends an answer with '### End'"]),
}


@pytest.mark.parametrize("name, script", with_each_script(MODELS))
def test_bad_models(tmp_path, name, script):
    change, words = MODELS[name]
    shutil.copytree(TOY / "model", tmp_path / "m")
    change(tmp_path / "m")
    flags = ["--prompt", "chat"] if "chat" in name else []
    check_refused(tmp_path, script, words or ["m: "], model="m", flags=flags)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_cut_answer_is_never_trained_on(tmp_path, script):
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


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").symlink_to("/sys/kernel")  # where even root may not write
    assert "runs/dast-0" in error_of(launch(tmp_path, "dast.py", *SMOKE, check=False))


LATER = ["selection.jsonl", "train.jsonl", "model", "steps.jsonl", "eval.jsonl", "eval.json"]  # than the responses


@pytest.mark.parametrize("name, later", [
    ("constants.json", []), ("metrics.jsonl", []), ("round_1/responses.jsonl", [f"round_1/{name}" for name in LATER])])
def test_file_that_was_cut_is_named(finished, copy_of, name, later):
    """What the line says to remove makes the run resume to the same end."""
    run = copy_of / "runs" / "one"
    forget(run, *later)
    os.truncate(run / name, (run / name).stat().st_size * 2 // 3)
    line = error_of(launch(copy_of, "dast.py", *SMOKE, "--name", "one", check=False))
    assert f"runs/one/{name} is damaged" in line and "remove" in line, line
    forget(run, name)
    launch(copy_of, "dast.py", *SMOKE, "--name", "one")
    assert files(run) == files(finished / "runs" / "one")
