"""hs_star.py's rules against tables worked out by hand, process reward models in both published layouts against a
step-by-step reference, and the records of real runs against a recomputation."""
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hs_star
from conftest import ROOT, TOY, launch
from test_runs import counts, error_of, files, killed, lines

sys.path.insert(0, str(TOY))
SMALL = ["--toy", "--n-train", "40", "--slice", "20", "--n-test", "10", "--rounds", "2"]
ONE = [*SMALL, "--rounds", "1", "--n-train", "12", "--slice", "12", "--n-test", "4", "--run", "one"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the finished run "one": hs_star.py, smoke-sized, on one process. Only for reading."""
    folder = tmp_path_factory.mktemp("small")
    launch(folder, "hs_star.py", *SMALL, "--run", "one", processes=1, torchrun=True)
    return folder


# Rules ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("outcomes, rewards, phi_r, classes", [  # classes with both, with accuracy, with reward only
    ([1, 1, 1], [0.7, 0.7, 0.7], 0.7, "iii"),
    ([1, 1, 1], [0.65, 0.65, 0.65], 0.65, "bib"),  # on the threshold is not above it
    ([1, 1, 1], [0.5, 0.7, 0.75], 0.65, "bib"),
    ([1, 1, 1], [0.1, 0.1, 0.1], 0.1, "bio"),
    ([1, 1, 0], [0.9, 0.9, 0.9], 0.9, "bbi"),
    ([1, 1, -1], [0.9, 0.9, 0.9], 0.9, "bbi"),  # cut is not correct
    ([0, 0, 0], [0.1, 0.1, 0.1], 0.1, "ooo"),
    ([0, -1, 0], [0.1, 0.1, 0.1], 0.1, "ooo"),
    ([0, 0, 0], [0.15, 0.15, 0.15], 0.15, "bob"),
    ([0, 0, 0], [0.05, 0.05, 0.9], 1 / 3, "bob"),
    ([0, 0, 0], [0.9, 0.9, 0.9], 0.9, "boi"),
    ([0, 1, 0], [0.1, 0.1, 0.1], 0.1, "bbo"),
])
def test_difficulty(monkeypatch, outcomes, rewards, phi_r, classes):
    for way, name in zip(("both", "accuracy", "reward"), classes):
        for constant, value in ("DIFFICULTY", way), ("TAU_LOW", 0.15), ("TAU_HIGH", 0.65):
            monkeypatch.setattr(hs_star, constant, value)
        found = hs_star.difficulty_of(outcomes, rewards)
        assert found[:2] == (outcomes.count(1) / 3, pytest.approx(phi_r, abs=1e-15)) and found[2][0] == name, way


def test_budget(monkeypatch):
    """All of it, to the boundary alone, as evenly as can be; who gets one more is a matter of chance."""
    rng, checked = np.random.default_rng(0), 0
    for n, pre in ((8, 3), (8, 1), (8, 7), (8, 8), (2, 1), (16, 4)):
        monkeypatch.setattr(hs_star, "BUDGET", n)
        monkeypatch.setattr(hs_star, "PRE_SAMPLES", pre)
        for problems in (1, 2, 7, 101):
            for size in {1, 2, problems // 2, problems}:
                classes = np.array(["inlier", "outlier"])[rng.integers(2, size=problems)].tolist()
                places = rng.permutation(problems)[:size]
                for i in places:
                    classes[i] = "boundary"
                counts = hs_star.quotas(classes, rng)
                assert not any(c for c, name in zip(counts, classes) if name != "boundary")
                assert sum(counts) == (n - pre) * problems * (len(places) > 0)
                given = [counts[i] for i in places]
                assert not given or max(given) - min(given) <= 1
                checked += 1
    assert checked > 70
    monkeypatch.setattr(hs_star, "BUDGET", 8)
    monkeypatch.setattr(hs_star, "PRE_SAMPLES", 3)
    classes = ["boundary"] * 56 + ["inlier"] * 45  # methods/hs_star.md: 55 problems get 9, one gets 10
    found = {tuple(hs_star.quotas(classes, np.random.default_rng(seed))) for seed in range(30)}
    assert all(sorted(c for c in counts if c) == [9] * 55 + [10] for counts in found) and len(found) > 10
    assert hs_star.quotas(["inlier"] * 3, rng) == [0, 0, 0]


def test_what_is_spent_is_what_was_given(monkeypatch):
    """Counted from the responses of a round, for many N, |B|, n and n_p: n N, or n_p N where there is no boundary."""
    def sample(run, model, problems, draws, prompt, **settings):
        return [{"id": p["id"], "draw": d} for p, n in zip(problems, draws, strict=True) for d in range(n)]

    monkeypatch.setattr(hs_star, "sample", sample)
    rng, seen = np.random.default_rng(1), set()
    for _ in range(300):
        n, size = int(rng.integers(1, 17)), int(rng.integers(1, 60))
        pre, boundary = int(rng.integers(1, n + 1)), int(rng.integers(0, size + 1))
        monkeypatch.setattr(hs_star, "BUDGET", n)
        monkeypatch.setattr(hs_star, "PRE_SAMPLES", pre)
        problems = [{"id": f"p/{i}"} for i in range(size)]
        classes = rng.permutation(["boundary"] * boundary + ["inlier"] * (size - boundary)).tolist()
        responses = hs_star.resample(None, None, "", problems, sample(None, "", problems, [pre] * size, None),
                                     hs_star.quotas(classes, rng), None, 1, {})
        assert len(responses) == (n if boundary else pre) * size
        counts = [0] * size
        for r in responses:  # in the order of problems and draws, each draw once
            assert r["draw"] == counts[int(r["id"][2:])]
            counts[int(r["id"][2:])] += 1
        assert [r["id"] for r in responses] == [p["id"] for p, c in zip(problems, counts) for _ in range(c)]
        assert all(c == pre for c, name in zip(counts, classes) if name == "inlier")
        seen.add((n == pre, boundary == 0, boundary == size))
    assert len(seen) == 6


@pytest.mark.parametrize("outcomes, rewards, right, wrong", [
    ([1, 0, 1, 0, 1], [0.2, 0.9, 0.8, 0.1, 0.5], {2, 4}, {1, 3}),  # K = 2: of three right ones the two best
    ([0, 1, 0, 0], [0.1, 0.0, 0.3, 0.2], {1}, {2}),  # the wrong one that looks best
    ([0, 1, 0], [0.5, 0.5, 0.5], {1}, {0}),  # of equals the first
    ([1, -1, 0], [0.1, 0.9, 0.2], {0}, {2}),  # a cut one is in no pair
    ([1, -1], [0.1, 0.9], set(), set()), ([1, 1], [0.1, 0.9], set(), set()), ([0], [0.1], set(), set()),
])
def test_pairs(monkeypatch, outcomes, rewards, right, wrong):
    for seed in range(5):
        pairs = hs_star.choose_pairs(outcomes, rewards, np.random.default_rng(seed))
        assert {a for a, _ in pairs} == right and {b for _, b in pairs} == wrong and len(pairs) == len(right)
    monkeypatch.setattr(hs_star, "PAIRING", "random")
    assert len(hs_star.choose_pairs(outcomes, rewards, np.random.default_rng(0))) == len(right)


def test_pairs_are_joined_at_random(monkeypatch):
    outcomes, rewards = [1, 1, 1, 0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    found = [hs_star.choose_pairs(outcomes, rewards, np.random.default_rng(seed)) for seed in range(60)]
    assert len({frozenset(pairs) for pairs in found}) == 6  # all ways to join three with three
    assert {b for pairs in found for _, b in pairs} == {4, 5, 6}
    monkeypatch.setattr(hs_star, "PAIRING", "random")
    found = [hs_star.choose_pairs(outcomes, rewards, np.random.default_rng(seed)) for seed in range(60)]
    assert {b for pairs in found for _, b in pairs} == {3, 4, 5, 6}


def test_slices(monkeypatch):
    """Disjoint while the problems last; then all over again in another order; the same whatever ROUNDS is."""
    monkeypatch.setattr(hs_star, "SLICE", 4)

    def rng(*key):
        return np.random.default_rng(len(repr(key)) * 1000 + key[-1])

    rounds = [hs_star.slice_of(14, t, rng) for t in range(1, 7)]
    assert all(len(s) == 4 and s == sorted(s) for s in rounds) and len({*rounds[0], *rounds[1], *rounds[2]}) == 12
    assert len({*rounds[3], *rounds[4], *rounds[5]}) == 12 and rounds[3:] != rounds[:3]
    monkeypatch.setattr(hs_star, "SLICE", 99)
    assert hs_star.slice_of(5, 1, rng) == hs_star.slice_of(5, 2, rng) == [0, 1, 2, 3, 4]


def test_reward_of_a_response_is_that_of_its_worst_step():
    assert hs_star.reward_of([0.9, 0.2, 0.8]) == 0.2 and hs_star.reward_of([]) == 0.0


def test_loss(monkeypatch):
    """Two pairs, by hand: chosen -1, -2 and -3 (one token), rejected -4 and -2, -2; the reference -3.5, -4, -3, -5."""
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -3.0, -2.0, -2.0], dtype=torch.float64, requires_grad=True)
    batch = {"counts": [2, 1, 1, 2], "example": torch.tensor([0, 0, 1, 1]),
             "reference": torch.tensor([-3.5, -4.0, -3.0, -5.0], dtype=torch.float64)}
    margins = [0.1 * 0.5, 0.1 * (0.0 - 1.0)]
    plain = sum(math.log1p(math.exp(-m)) for m in margins)
    for weight, nll in ((0.0, 0.0), (0.5, 0.5 * (1.5 + 3.0))):
        monkeypatch.setattr(hs_star, "NLL_WEIGHT", weight)
        loss, pairs, metrics = hs_star.dpo_nll_loss(logprobs, batch)
        assert loss.item() == pytest.approx(plain + nll, rel=1e-12) and pairs == 2
        assert metrics["preferred"] == 1 and metrics["margin"].item() == pytest.approx(sum(margins))
    loss.backward()
    assert logprobs.grad[3].item() == pytest.approx(-0.5 - 0.1 / (1 + math.exp(-0.1)))  # a chosen answer of one token


# Process reward models ------------------------------------------------------------------------------------------------

HIDDEN = 128
PROBLEM = {"id": "p/1", "problem": "Begin at 37. Add 7. What do you get?", "answer": "44", "kind": "math"}
ANSWERS = ["37+7=44\n\n\\boxed{44}", "\\boxed{44}", "", "37+7=44\n\n\n\n\\boxed{44}\n\nso", "<extra_0>1\n2"]


def write_prm(folder, layout, drop=(), **config):
    """A small random reward model in one of the published layouts (methods/hs_star.md, decision 9)."""
    shutil.copytree(TOY / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    seen = json.loads((folder / "config.json").read_text())
    architecture = {"v_head": "Qwen2ForPrmModel", "score": "Qwen2ForProcessRewardModel"}[layout]
    remote = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}  # as the published folders name code of theirs
    (folder / "config.json").write_text(json.dumps({**seen, "architectures": [architecture], "auto_map": remote,
                                                    "num_labels": 2, **config}))
    (folder / "code.py").write_text("raise SystemExit('code of the folder was run')\n")
    rng = torch.Generator().manual_seed(1)
    shapes = {"v_head": {"v_head.summary.weight": (1, HIDDEN), "v_head.summary.bias": (1,),
                         "lm_head.weight": (512, HIDDEN)},
              "score": {"score.0.weight": (HIDDEN, HIDDEN), "score.0.bias": (HIDDEN,),
                        "score.2.weight": (2, HIDDEN), "score.2.bias": (2,)}}[layout]
    tensors = load_file(TOY / "model" / "model.safetensors")
    tensors |= {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}
    tensors = {n: t for n, t in tensors.items() if n not in drop}
    files_of = {n: f"model-0000{1 + ('.1.' in n)}-of-00002.safetensors" for n in tensors}  # as large models come
    for name in sorted(set(files_of.values())):
        save_file({n: t for n, t in tensors.items() if files_of[n] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files_of}))
    if layout == "score":
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<extra_0>"]})
        tokenizer.save_pretrained(folder)
        assert len(tokenizer) <= 512  # rows of the embedding
    return folder


def step_by_step(folder, layout, problem, text):
    """The published recipes, taken literally: one response, and a pass of its own up to the end of each step."""
    from transformers import AutoTokenizer, Qwen2Model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = Qwen2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}

    def last_state(ids):
        with torch.inference_mode():
            return body(torch.tensor([ids])).last_hidden_state[0, -1]

    rewards, steps = [], text.split("\n\n")
    if layout == "v_head":
        ids = tokenizer.encode((tokenizer.bos_token or "") + problem["problem"] + "\n")
        for step in steps:
            ids = ids + tokenizer.encode(step, split_special_tokens=True) + [tokenizer.encode("\n\n")[-1]]
            value = tensors["v_head.summary.weight"] @ last_state(ids) + tensors["v_head.summary.bias"]
            rewards.append(torch.sigmoid(value).item())
        return rewards
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    for n in range(1, len(steps) + 1):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": problem["problem"]},
                 {"role": "assistant", "content": "<extra_0>".join(steps[:n]) + "<extra_0>"}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
        mark = tokenizer.convert_tokens_to_ids("<extra_0>")
        state = last_state(ids[:len(ids) - ids[::-1].index(mark)])
        inner = torch.relu(tensors["score.0.weight"] @ state + tensors["score.0.bias"])
        rewards.append(torch.softmax(tensors["score.2.weight"] @ inner + tensors["score.2.bias"], 0)[1].item())
    return rewards


@pytest.mark.parametrize("layout", ["v_head", "score"])
def test_both_published_layouts(alone, tmp_path, layout):
    prm = alone.RewardModel(write_prm(tmp_path / "prm", layout))
    assert prm.layout == layout
    prm.load()
    texts = ANSWERS if layout == "v_head" else ANSWERS[:4]  # the last writes a mark itself, which is no mark
    with torch.inference_mode():
        found = prm.logits([prm.encode(PROBLEM, text) for text in texts]).sigmoid().tolist()
    expected = [reward for text in texts for reward in step_by_step(tmp_path / "prm", layout, PROBLEM, text)]
    assert found == pytest.approx(expected, abs=2e-6) and len(set(expected)) > 5
    ids, places = prm.encode(PROBLEM, ANSWERS[4])
    assert len(places) == 1 and ids.count(prm.mark) == 1  # what a response writes is text


def test_beyond_the_context(alone, tmp_path):
    """100 kB are read up to the model's context, with a mark at its end; a problem that long has no reward."""
    prm = alone.RewardModel(write_prm(tmp_path / "prm", "v_head", max_position_embeddings=300))
    long = "\n\n".join(["37+7=44"] * 12_000)
    ids, places = prm.encode(PROBLEM, long)
    assert len(long) > 100_000 and len(ids) == 300 and places[-1] == 299 and {ids[p] for p in places} == {prm.mark}
    whole, all_places = prm.encode(PROBLEM, "\n\n".join(["37+7=44"] * 10))
    assert len(all_places) == 10 and ids[:len(whole)] == whole and places[:10] == all_places
    ids, places = prm.encode(PROBLEM, "7" * 100_000)  # in one step
    assert len(ids) == 300 and places == [299]
    ids, places = prm.encode({**PROBLEM, "problem": "7" * 1000}, "7")
    assert len(ids) == 300 and places == []
    prm.load()
    assert prm.logits([(ids, places)]).tolist() == []


def test_equal_responses_alone_and_in_company(alone, tmp_path, monkeypatch):
    """In whatever batches, rewards are the same to rounding; equal responses have equal ones; order is kept."""
    monkeypatch.chdir(tmp_path)
    texts = [p["problem"] for p in lines(TOY / "test.jsonl")[:9]]
    problems = [{**PROBLEM, "id": f"p/{n}", "problem": text} for n, text in enumerate(texts)]
    responses = [{"id": p["id"], "draw": d, "text": text} for p in problems for d, text in enumerate(ANSWERS + ANSWERS)]
    names = dict(MODEL=str(TOY / "model"), SEED=0, WANDB=False, ENGINE="transformers", GRADER="", MAX_NEW_TOKENS=9)
    (tmp_path / "script.py").write_text("".join(f"{n} = {v!r}\n" for n, v in {**names, "RUN": "r"}.items()))
    run = alone.start_run({**names, "RUN": "r", "__file__": str(tmp_path / "script.py")}, problems)
    found = {}
    calls, logits = [], alone.RewardModel.logits
    monkeypatch.setattr(alone.RewardModel, "logits", lambda *a: calls.append(a) or logits(*a))
    for size in (2**15, 64, 500):
        calls.clear()
        monkeypatch.setattr(alone, "REWARD_CHARACTERS", size)
        found[size] = alone.step_rewards(run, alone.RewardModel(TOY / "prm"), problems, responses, round=1,
                                         phase=f"reward{size}")
    assert len(calls) == 45 if size == 64 else 5 < len(calls) < 20
    for size in (64, 500):
        for a, b in zip(found[2**15], found[size], strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    for at, r in enumerate(responses):
        steps = found[64][at]
        assert len(steps) == len(r["text"].split("\n\n")) and steps == found[64][at - r["draw"] + r["draw"] % 5]
    # what was read is kept by what it holds: a rerun reads nothing, one that batches in another way only what it must
    [kept] = run.unfinished.glob("round_1-reward500@*")
    kept.write_text(kept.read_text()[:-40])  # a kill cut the last line short
    calls.clear()
    again = alone.step_rewards(run, alone.RewardModel(TOY / "prm"), problems, responses, round=1, phase="reward500")
    assert again == found[500] and len(calls) == 1
    monkeypatch.setattr(alone, "REWARD_CHARACTERS", 64)
    other = alone.step_rewards(run, alone.RewardModel(TOY / "prm"), problems, responses, round=1, phase="reward500")
    assert other == found[64]
    # beyond the context: read up to there; not at all where the problem is longer, and then S is 0
    prm = alone.RewardModel(TOY / "prm")
    prm.context = 40
    some = [{"id": "p/0", "text": "\\boxed{1}"}, {"id": "p/0", "text": "\n\n".join(["1+1=2"] * 50)}]
    short, long = alone.step_rewards(run, prm, problems, some, round=2, phase="long")
    assert len(short) == 1 and 1 < len(long) < 15 and run.metrics[2, "long"]["filled_context"] == 1
    prm.context = 10
    assert alone.step_rewards(run, prm, problems, some, round=3, phase="long") == [[], []]
    assert run.metrics[3, "long"]["unread"] == 2 and hs_star.reward_of([]) == 0
    metrics = run.metrics[1, "reward64"]
    assert metrics["responses"] == 90 and metrics["different"] == 45 and metrics["steps"] == 2 * 9 * 9


def break_prm(folder, what):
    """A folder that cannot be used as a reward model, in one of several ways."""
    if what == "missing":
        return write_prm(folder, "v_head", drop=["model.layers.1.mlp.up_proj.weight"])
    if what == "other":  # an architecture that only code of the folder knows
        return write_prm(folder, "score", model_type="unheard_of")
    if what == "blank":  # a blank line is two tokens to it
        write_prm(folder, "v_head")
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [m for m in merges if m not in (["\u010a", "\u010a"], "\u010a \u010a")]
        assert len(tokenizer["model"]["merges"]) < len(merges)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder
    if what == "head":
        return write_prm(folder, "score", drop=["score.2.bias"])
    write_prm(folder, "score")
    shutil.copy(TOY / "model" / "tokenizer.json", folder)  # which lacks <extra_0>
    shutil.copy(TOY / "model" / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize("flags, words", [
    (["--prm", "missing"], ["1 tensors of a qwen2 are missing: layers.1.mlp.up_proj.weight"]),
    (["--prm", "blank"], ["its tokenizer has no token for the end of a step, '\\n\\n'"]),
    (["--prm", "head"], ["head: ", "2.bias"]),
    (["--prm", "mark"], ["its tokenizer has no token for the end of a step, '<extra_0>'"]),
    (["--prm", str(TOY / "model")], ["no process reward model that is known here", "v_head or score"]),
    (["--prm", "no/such"], ["no/such: no such folder"]),
    (["--prm", ""], ["without --prm there are no rewards"]),
    (["--tau-low", "0"], ["no thresholds are known for tests/toy/prm with tests/toy/model", "--report-only"]),
    (["--prm", "other"], ["other: it brings code of its own"]),
    (["--tau-low", "0.9"], ["--tau-low 0.9 and --tau-high", "the second is the higher one"]),
    (["--pre-samples", "9"], ["--pre-samples 9 are more than --budget 8"]),
    (["--step-set", "p.jsonl"], ["--step-set p.jsonl: no problem in it has a solution"]),
])
def test_bad_input_is_one_line(tmp_path, flags, words):
    if flags[0] == "--prm" and flags[1] in ("missing", "head", "mark", "other", "blank"):
        break_prm(tmp_path / flags[1], flags[1])
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1?", "answer": 2}\n')
    line = error_of(launch(tmp_path, "hs_star.py", *SMALL, "--rounds", "1", "--pre-samples", "1", *flags, check=False))
    assert all(word in line for word in words), line


def test_the_toys_reward_model_tells_right_from_wrong(small):
    """Steps of drawn answers to problems that it has not seen, labelled by arithmetic."""
    import make_prm
    problems = {f"toy/train/{n}": p for n, p in enumerate(lines(TOY / "train.jsonl"), 1)}
    scores, labels = [], []
    for r in lines(small / "runs/one/round_1/responses.jsonl"):
        scores += r["step_rewards"]
        labels += make_prm.labels_of(problems[r["id"]], r["text"])
    assert 0.2 < np.mean(labels) < 0.8 and make_prm.area_under_curve(np.array(scores), labels) > 0.85


@pytest.mark.parametrize("text, labels", [
    ("12+7=19\n\n19-5=14\n\n\\boxed{14}", [1, 1, 1]), ("12+7-5=14\n\n\\boxed{14}", [1, 1]),
    ("12+7=18\n\n18-5=13\n\n\\boxed{13}", [0, 0, 0]), ("Add 7: 19\n\nTake away 5: 15\n\n\\boxed{14}", [1, 0, 1]),
    ("\\boxed{14}", [1]), ("12+7=19\n\n\\boxed{19}", [1, 0]), ("nothing\n\n", [0, 0]),
    ("12+7=19\n\n19-5=14\n\n14+1=15\n\n\\boxed{14}", [1, 1, 0, 1])])
def test_labels_of_steps(text, labels):
    import make_prm
    assert make_prm.labels_of({"problem": "Start with 12. Add 7. Go down by 5. What do you get?"}, text) == labels


def test_area_under_curve():
    import make_prm
    assert make_prm.area_under_curve(np.array([0.1, 0.4, 0.35, 0.8]), [0, 0, 1, 1]) == 0.75
    assert make_prm.area_under_curve(np.array([0.5, 0.5, 0.5]), [0, 1, 1]) == 0.5


# Real runs ------------------------------------------------------------------------------------------------------------

def check_round(run, t, low, high, budget=8, pre=3):
    """Everything that round t decided, once more from its responses; the selection."""
    selection, responses, before = (lines(run / f"round_{t}" / f"{name}.jsonl")
                                    for name in ("selection", "responses", "presamples"))
    places = {s["id"]: place for place, s in enumerate(selection)}
    order = [(places[r["id"]], r["draw"]) for r in responses]
    assert order == sorted(set(order)) and len(responses) <= budget * len(selection)
    assert before == [r for r in responses if r["draw"] < pre] and len(before) == pre * len(selection)
    boundary = [s for s in selection if s["class"] == "boundary"]
    assert len(responses) == (budget if boundary else pre) * len(selection)  # spent is given
    for s in selection:
        own = [r for r in responses if r["id"] == s["id"]]
        assert len(own) == pre + s["quota"] and s["rewards"] == [r["reward"] for r in own]
        assert s["outcomes"] == [int(r["correct"]) if r["finish"] == "stop" else -1 for r in own]
        assert all(r["reward"] == min(r["step_rewards"]) for r in own)
        assert all(len(r["step_rewards"]) == len(r["text"].split("\n\n")) for r in own)
        phi_a, phi_r = s["outcomes"][:pre].count(1) / pre, math.fsum(s["rewards"][:pre]) / pre
        assert s["phi_a"] == phi_a and s["phi_r"] == pytest.approx(phi_r, abs=1e-15)
        expected = "inlier" if phi_a == 1 and phi_r > high else "outlier" if phi_a == 0 and phi_r < low else "boundary"
        assert s["class"] == expected and (s["quota"] > 0) == (expected == "boundary" and budget > pre)
        sides = [sorted((r["reward"] for r in own if r["correct"] == ok and r["finish"] == "stop"), reverse=True)
                 for ok in (True, False)]
        k = min(map(len, sides)) if expected == "boundary" else 0
        assert len(s["pairs"]) == k
        for side, top in zip(zip(*s["pairs"]), sides):
            assert sorted((s["rewards"][draw] for draw in side), reverse=True) == top[:k] and len(set(side)) == k
    quotas = [s["quota"] for s in boundary]
    assert not quotas or max(quotas) - min(quotas) <= 1
    text = {(r["id"], r["draw"]): r["text"] for r in responses}
    train = lines(run / f"round_{t}" / "train.jsonl") if any(s["pairs"] for s in selection) else []
    assert [(e["id"], e["completions"]) for e in train] == [
        (s["id"], [text[s["id"], a], text[s["id"], b]]) for s in selection for a, b in s["pairs"]]
    return selection


def test_responses_alone_tell_every_decision(small):
    run = small / "runs" / "one"
    first, second = (check_round(run, t, hs_star.TOY["TAU_LOW"], hs_star.TOY["TAU_HIGH"]) for t in (1, 2))
    assert not {s["id"] for s in first} & {s["id"] for s in second}  # each round has problems of its own
    assert {s["class"] for s in first + second} == {"inlier", "boundary", "outlier"}
    metrics = {(m["round"], m["phase"]): m for m in lines(run / "metrics.jsonl")}
    assert [phase for t, phase in metrics if t == 1] == [
        "presample", "prereward", "phi_r", "resample", "rereward", "select", "train", "eval", "round"]
    train, select, report = (metrics[1, phase] for phase in ("train", "select", "phi_r"))
    assert train["first_loss"] == pytest.approx(math.log(2), rel=1e-7) and train["loss"] < 0.6932
    assert select["pairs"] == sum(len(s["pairs"]) for s in first) > 5
    assert sum(of["problems"] for of in report["by_phi_a"].values()) == 20
    for phi_a, of in report["by_phi_a"].items():
        values = [s["phi_r"] for s in first if f"{s['phi_a']:.3f}" == phi_a]
        assert of["problems"] == len(values) and of["quantiles"][2] == pytest.approx(np.median(values))
    whole, reward = metrics[1, "round"], metrics[1, "prereward"]
    assert reward["flops"] == 2 * reward["tokens"] * sum(
        t.numel() for n, t in load_file(TOY / "prm" / "model.safetensors").items() if n.startswith("model."))
    assert whole["flops"] == sum(metrics[1, p]["flops"] for p in ("presample", "prereward", "resample", "rereward",
                                                                  "train"))


SMALL_BATCHES = """
import sys; sys.path.insert(0, {root!r})
import common, hs_star
common.REWARD_CHARACTERS = 1000
common.override_from_cli(vars(hs_star))
hs_star.main()
"""


def test_two_processes_decide_the_same(small, tmp_path):
    """Drawn anew from M_0 the same answers, and from them the same rewards, classes, budget and pairs: those of one
    process; also where a round's answers are read in many batches."""
    one, names = small / "runs" / "one", ("presamples", "responses", "selection", "train")
    launch(tmp_path, "hs_star.py", *SMALL, "--rounds", "1", "--run", "two", processes=2)
    for name in names:
        two = tmp_path / "runs" / "two" / "round_1" / f"{name}.jsonl"
        assert (one / "round_1" / two.name).read_bytes() == two.read_bytes(), name
    (tmp_path / "many.py").write_text(SMALL_BATCHES.format(root=str(ROOT)))
    for processes in (1, 2):
        launch(tmp_path, tmp_path / "many.py", *ONE, "--run", f"many{processes}", processes=processes)
    for name in names:
        one, two = (tmp_path / f"runs/many{processes}/round_1/{name}.jsonl" for processes in (1, 2))
        assert one.read_bytes() == two.read_bytes(), name


PHASES = ["presamples.jsonl", "responses.jsonl", "selection.jsonl", "train.jsonl", "model", "eval.json"]


@pytest.mark.parametrize("phase, place, left, to_come", [
    ("presample", "Sampler._generate:1", "round_1-presample@0.jsonl", 0),
    ("prereward", "RewardModel.logits:1", "round_1-prereward@0.jsonl", 0),
    ("resample", "Draws.put:60", "round_1-resample@0.jsonl", 1),
    ("rereward", "RewardModel.logits:1", "round_1-rereward@0.jsonl", 1),
    ("select", "select:1", "", 2),
    ("train", "scale_and_clip:1", "round_1-reference.json", 4),
    ("eval", "Sampler._generate:1", "", 5),
])
def test_a_killed_run_goes_on(small, tmp_path, phase, place, left, to_come):
    """One SIGKILL in each phase of the first round; the rerun ends with the same files, bit for bit."""
    run = tmp_path / "runs" / "one"
    shutil.copytree(small / "runs" / "one", run, ignore=shutil.ignore_patterns("round_2"))
    for name in PHASES[to_come:]:
        shutil.rmtree(run / "round_1" / name) if name == "model" else (run / "round_1" / name).unlink()
    whole = [m for m in lines(run / "metrics.jsonl") if m["round"] < 2]
    at = [(m["round"], m["phase"]) for m in whole].index((1, phase))
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in whole[:at]))
    flags = [*SMALL, "--rounds", "1", "--run", "one", "--save-minutes", "0"]
    assert left in [*killed(tmp_path, "hs_star", place, *flags), ""]
    launch(tmp_path, "hs_star.py", *flags)
    assert files(run) == {name: text for name, text in files(small / "runs" / "one").items()
                          if not name.startswith("round_2")}
    assert counts(run) == [m for m in counts(small / "runs" / "one") if m["round"] < 2]


@pytest.mark.parametrize("flags, check", [
    (["--pre-samples", "8"],  # uniform iterative DPO
     lambda s: all(len(x["outcomes"]) == 8 and x["quota"] == 0 for x in s) and any(x["pairs"] for x in s)),
    (["--difficulty", "accuracy", "--pairing", "random", "--prm", ""],  # no reward model at all
     lambda s: all((x["class"] == "boundary") == (0 < x["phi_a"] < 1) and not any(x["rewards"]) for x in s)),
    (["--difficulty", "reward", "--tau-low", "0.3", "--tau-high", "0.6"],
     lambda s: all((x["class"] == "boundary") == (0.3 <= x["phi_r"] <= 0.6) for x in s)),
    (["--pairing", "random", "--nll-weight", "1", "--budget", "5"],
     lambda s: sum(len(x["outcomes"]) for x in s) == 60),
])
def test_arms(tmp_path, flags, check):
    """What the constants of the arms change, seen in the records."""
    launch(tmp_path, "hs_star.py", *ONE, *flags)
    assert check(lines(tmp_path / "runs/one/round_1/selection.jsonl"))


def test_start_and_prompt(small, tmp_path):
    """START: from which weights the second round trains. PROMPT and SYSTEM: drawn and trained with the same text."""
    one, base = small / "runs" / "one", tmp_path / "runs" / "base"
    shutil.copytree(one, base, ignore=shutil.ignore_patterns("constants.json", "metrics.jsonl", "eval.json"))
    shutil.rmtree(base / "round_2" / "model")
    launch(tmp_path, "hs_star.py", *SMALL, "--run", "base", "--start", "base")
    weights = [(r / "round_2/model/model.safetensors").read_bytes() for r in (one, base)]
    assert weights[0] != weights[1]
    (tmp_path / "odd.py").write_text("def grade(problem, text):\n    return len(text) % 2 == 1, 'odd'\n")
    launch(tmp_path, "hs_star.py", *ONE, "--prompt", "few_shot", "--shots", "3", "--system", "Think.", "--slice", "6",
           "--grader", "odd.py:grade")
    examples = lines(tmp_path / "runs/one/round_1/train.jsonl")
    assert examples and all(e["prompt"].startswith("Think.\n\nQuestion: ") and e["prompt"].count("Question:") == 4
                            for e in examples)
    metrics = [m for m in lines(tmp_path / "runs/one/metrics.jsonl") if m["phase"] == "presample"]
    assert metrics[0]["prompt_tokens"] > 18 * 300  # with the examples


def test_another_reward_model_is_refused(tmp_path):
    shutil.copytree(TOY / "prm", tmp_path / "prm")
    flags = [*ONE, "--prm", "prm", "--report-only"]
    launch(tmp_path, "hs_star.py", *flags)
    weights = load_file(tmp_path / "prm" / "model.safetensors")
    weights["v_head.summary.bias"] += 1
    save_file(weights, tmp_path / "prm" / "model.safetensors", {"format": "pt"})
    assert "contents" in error_of(launch(tmp_path, "hs_star.py", *flags, check=False))


def test_known_thresholds_are_taken_and_stored(tmp_path):
    prm, model = tmp_path / "Skywork-o1-Open-PRM-Qwen-2.5-1.5B", tmp_path / "Qwen2.5-7B"
    shutil.copytree(TOY / "prm", prm)
    shutil.copytree(TOY / "model", model)
    done = launch(tmp_path, "hs_star.py", *ONE, "--prm", prm, "--model", model, "--tau-low", "0", "--tau-high", "0",
                  "--rounds", "0")
    stored = json.loads((tmp_path / "runs/one/constants.json").read_text())["constants"]
    assert (stored["TAU_LOW"], stored["TAU_HIGH"]) == (0.25, 0.5) and "taus     0.25 and 0.5" in done.stdout


def test_rewards_that_are_not_numbers_stop_the_run(tmp_path):
    shutil.copytree(TOY / "prm", tmp_path / "prm")
    weights = load_file(tmp_path / "prm" / "model.safetensors")
    weights["v_head.summary.bias"] *= float("nan")
    save_file(weights, tmp_path / "prm" / "model.safetensors", {"format": "pt"})
    assert "its rewards are not numbers, in answers to toy/train/" in error_of(
        launch(tmp_path, "hs_star.py", *ONE, "--prm", "prm", check=False))


@pytest.mark.parametrize("verdict, name, flags", [
    (True, "inlier", ["--tau-high", "0.000001", "--tau-low", "0.0000001"]),
    (False, "outlier", ["--tau-low", "0.999999", "--tau-high", "0.9999999"])])
def test_an_empty_boundary(tmp_path, verdict, name, flags):
    """All inliers, or all outliers: nothing more is drawn, the model stays, status 0, and a line says so."""
    (tmp_path / "kind.py").write_text(f"def grade(problem, text):\n    return {verdict}, 'equal'\n")
    done = launch(tmp_path, "hs_star.py", *ONE, *flags, "--grader", "kind.py:grade", "--max-new-tokens", "200")
    run = tmp_path / "runs" / "one" / "round_1"
    selection = lines(run / "selection.jsonl")
    assert {s["class"] for s in selection} == {name} and len(lines(run / "responses.jsonl")) == 36
    assert "round 1  the boundary lacks a problem: no pair, the model stays as it is" in done.stdout
    assert not (run / "model").exists() and not (run / "train.jsonl").exists() and (run / "eval.json").exists()


def test_no_right_answer_in_the_boundary(tmp_path):
    (tmp_path / "kind.py").write_text("def grade(problem, text):\n    return False, 'no'\n")
    done = launch(tmp_path, "hs_star.py", *ONE, "--tau-low", "0.0000001", "--grader", "kind.py:grade")
    assert "the boundary lacks a right and a wrong answer to a problem of it: no pair" in done.stdout
    assert len(lines(tmp_path / "runs/one/round_1/responses.jsonl")) == 96
    assert json.loads((tmp_path / "runs/one/constants.json").read_text())["constants"]["TAU_LOW"] == 1e-7


def test_report_only_and_step_set(tmp_path):
    """The report needs no thresholds and ends the run; with STEP_SET a model M_0 is trained, and is what draws."""
    done = launch(tmp_path, "hs_star.py", *ONE, "--report-only", "--tau-low", "0", "--tau-high", "0", "--rounds", "2")
    assert "from round 2 on they come again: fewer than 2 times 12" in done.stdout
    assert "phi_r    by phi_a: problems, 5%, 25%, 50%, 75%, 95% quantile" in done.stdout
    [report] = [m for m in lines(tmp_path / "runs/one/metrics.jsonl") if m["phase"] == "phi_r"]
    assert sum(of["problems"] for of in report["by_phi_a"].values()) == 12
    assert sorted(p.name for p in (tmp_path / "runs/one").glob("round_*/*")) == ["presamples.jsonl"]
    (tmp_path / "steps.jsonl").write_text("".join(open(TOY / "train.jsonl").readlines()[-40:]))
    launch(tmp_path, "hs_star.py", *ONE, "--run", "m0", "--step-set", "steps.jsonl", "--lr", "1e-3")
    one, m0 = (lines(tmp_path / f"runs/{name}/round_1/presamples.jsonl") for name in ("one", "m0"))
    assert (tmp_path / "runs/m0/round_0/model").exists() and [r["id"] for r in one] == [r["id"] for r in m0]
    assert [r["text"] for r in one] != [r["text"] for r in m0]
    run = tmp_path / "runs" / "known"  # what the report has drawn serves the real run
    (run / "round_1").mkdir(parents=True)
    shutil.copy(tmp_path / "runs/one/round_1/presamples.jsonl", run / "round_1")
    launch(tmp_path, "hs_star.py", *ONE, "--run", "known")
    assert [r for r in lines(run / "round_1/responses.jsonl") if r["draw"] < 3] == one
    assert "presample" not in {m["phase"] for m in lines(run / "metrics.jsonl")}
    shutil.rmtree(run)
    (run / "round_1").mkdir(parents=True)
    shutil.copy(tmp_path / "runs/one/round_1/presamples.jsonl", run / "round_1")
    assert "presamples.jsonl was made with other problems" in error_of(
        launch(tmp_path, "hs_star.py", *ONE, "--run", "known", "--slice", "11", check=False))
