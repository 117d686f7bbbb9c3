"""Speed of what is ours: python tests/bench.py checking [../shared], selection, rewards [../shared], clusters
[../shared], or training [problems] (which needs: pip install trl accelerate).

checking: MATH test solutions as responses to their own problem (right) and to the next one (wrong), and model outputs,
judged by plain math-verify (parse and verify, as its README says) and by the Checker, in turn, in processes of their
own. Seconds are of the processor, all processes together, starts left out: their ratio is one per core. Verdicts that
differ are printed, and how the wall time falls with the number of workers.

selection: what adastar.py decides in an iteration over 1,000,000 problems if it visits all of them: seconds of the
processor, and memory with all libraries.

rewards: the toy's reward model reads 1,600 answers that the toy model draws, the toy's training solutions (all are
different) and 300 MATH solutions (long ones): by common.step_rewards, which reads the model from disk each time, and by
a plain Hugging Face loop, padded batches of 4 in the order of the file. Wall seconds on all cores, medians of 5 in
turn, tokenizing on both sides; and the largest difference of a reward.

clusters: what sai_dpo.py does with 400,000 problems (halves of two of MATH's training problems each) before and after a
probe: tf-idf, k-means, the probe's choice, and a draw of 20,000; seconds with one thread; memory with all libraries.

training: an epoch of the toy model over 960 of its problems, in steps of 32 answers or pairs, by common.train with
dast.py's losses, by the Hugging Face Trainer with padding, and by TRL's trainers as they come (DPO with the reference
computed before), all with AdamW in float32. Wall seconds from the model in memory on, medians of 3 in turn, tokenizing
left out on both sides; ours writes the model too.
"""
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def responses(shared, n):
    """{what it is: [(problem, text)]}."""
    import common
    problems = common.load_problems("math", "test", shared / "data", n)
    cases = map(json.loads, open(shared / "graders" / "cases.jsonl"))
    return {"model outputs": [({"id": c["id"], "answer": c["gold"]}, c["response_or_answer"]) for c in cases
                              if "Qwen2.5-Math" in c["source"]],
            "wrong answers": [(p, q["solution"]) for p, q in zip(problems, problems[1:])],
            "reference solutions": [(p, p["solution"]) for p in problems]}


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plainly(pairs):
    from math_verify import parse, verify
    parse("\\boxed{1}")
    began = processor_seconds(os.getpid())
    verdicts = [verify(parse(f"\\boxed{{{problem['answer']}}}"), parse(text)) for problem, text in pairs]
    return verdicts, processor_seconds(os.getpid()) - began, 0


def by_checker(pairs, workers=1):
    import common
    checker = common.Checker(workers)
    ready = [checker.submit({"answer": "3"}, f"\\boxed{{\\frac{{{i}}}{{2}}}}") for i in range(50 * workers)]
    verdicts = [future.result()[0] for future in ready]  # now all workers that are needed run
    assert not any(verdicts[:6])
    threads = Path("/proc/self/task").iterdir()  # each lists the workers that it has started
    pids = [os.getpid(), *(pid for thread in threads for pid in (thread / "children").read_text().split())]
    began, wall = sum(map(processor_seconds, pids)), time.time()
    verdicts = [future.result()[0] for future in [checker.submit(*pair) for pair in pairs]]
    wall = time.time() - wall
    return verdicts, sum(map(processor_seconds, pids)) - began, wall


def checking(shared):
    for what, pairs in responses(shared, 2000).items():
        totals = [0.0, 0.0]
        for _ in range(3):
            for i, way in enumerate((plainly, by_checker)):
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    verdicts, seconds, _ = fresh.apply(way, (pairs,))
                totals[i] += seconds / 3
                plain, ours = (verdicts, None) if i == 0 else (plain, verdicts)
        print(f"{what}: {len(pairs):,} responses, plain {totals[0]:.2f} s, ours {totals[1]:.2f} s, "
              f"ratio {totals[0] / totals[1]:.1f}, {sum(p != o for p, o in zip(plain, ours))} verdicts differ")
        for (problem, text), p, o in zip(pairs, plain, ours):
            if p != o:
                print(f"  {problem['id']}: plain {p}, ours {o}, gold {problem['answer']!r}")
    pairs = responses(shared, 2000)["wrong answers"]
    for workers in range(1, os.cpu_count() + 1):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            print(f"wrong answers, {workers} workers: {fresh.apply(by_checker, (pairs, workers))[2]:.1f} s")


def selection(n=1_000_000):
    import numpy as np

    import adastar
    rng = np.random.default_rng(0)
    last, w, ids = rng.integers(0, 20, n), rng.integers(0, 3, n) / 2, [f"big/train/{i}" for i in range(n)]
    outcomes = [[1] if drawn < 1 else [0, int(drawn < 2)] for drawn in rng.integers(0, 3, n)]
    began = processor_seconds(os.getpid())
    order = adastar.walk_order(last, w, rng)
    selected = adastar.select([ids[i] for i in order], last[order], w[order], outcomes, n, rng)
    committed = sum(s["committed"] for s in selected)
    print(f"{n:,} problems ordered, {len(selected):,} decided, {committed:,} committed: "
          f"{processor_seconds(os.getpid()) - began:.1f} s, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def padded_loop(prm, model, pairs):
    """Rewards of each step as a plain Hugging Face program finds them."""
    import torch
    found = []
    for at in range(0, len(pairs), 4):
        rows = [prm.encode(problem, text) for problem, text in pairs[at:at + 4]]
        batch = prm.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
            rewards = torch.sigmoid(prm.head["summary"](hidden))[..., 0]
        found += [rewards[i, places].tolist() for i, (_, places) in enumerate(rows)]
    return found


def rewards(shared):
    import common
    import numpy as np
    from transformers import AutoModel
    script, folder = ROOT / "hs_star.py", ROOT / "tests" / "toy"
    toy = [json.loads(line) for line in open(folder / "train.jsonl")]
    math = common.load_problems("math", "test", shared / "data", 300)
    constants = dict(MODEL=str(folder / "model"), RUN="bench-rewards", SEED=0, WANDB=False, ENGINE="transformers",
                     GRADER="", __file__=str(script))
    constants = {**{name: 0 for name in common.constants_of(script)}, **constants, "PRM": ""}
    os.chdir(tempfile.mkdtemp())
    run, common.say = common.start_run(constants), lambda *_: None
    tokenizer = common.load_tokenizer(folder / "model", "")
    drawn = common.sample(run, str(folder / "model"), [{"id": str(n), "kind": "math", **toy[n]} for n in range(200)], 8,
                          lambda p, d: common.make_prompt(tokenizer, "zero_shot", p), round=0, phase="draw",
                          style="zero_shot", temperature=0.7, max_new_tokens=96)
    prm, plain = common.RewardModel(folder / "prm"), AutoModel.from_pretrained(folder / "prm").eval()
    by_id = {p["id"]: p for p in math} | {str(n): {"id": str(n), **p} for n, p in enumerate(toy)}
    solutions = [{"id": p["id"], "text": p["solution"]} for p in by_id.values()]
    for what, responses in {"drawn answers": drawn, "toy solutions": [r for r in solutions if r["id"].isdigit()],
                            "MATH solutions": [r for r in solutions if not r["id"].isdigit()]}.items():
        problems, pairs = list(by_id.values()), [(by_id[r["id"]], r["text"]) for r in responses]
        seconds, found = ([], []), [None, None]
        for turn in range(6):
            for way in (0, 1):
                began = time.time()
                found[way] = padded_loop(prm, plain, pairs) if way == 0 else common.step_rewards(
                    run, prm, problems, responses, round=turn, phase=what.split()[0])
                seconds[way].append(time.time() - began)
        theirs, ours = (float(np.median(s[1:])) for s in seconds)  # the first is to warm up
        off = max(abs(a - b) for pair in zip(*found, strict=True) for a, b in zip(*pair, strict=True))
        print(f"{what}: ratio {theirs / ours:.1f}; {len(pairs):,} responses, {sum(map(len, found[0])):,} steps, padded "
              f"batches of 4 {theirs:.2f} s, packed {ours:.2f} s, rewards differ by {off:.1g}")


def clusters(shared, n=400_000):
    import common
    import numpy as np

    import sai_dpo
    rng, words = np.random.default_rng(0), [p["problem"].split(" ") for p in common.load_problems(
        "math", "train", shared / "data")]
    texts = [" ".join(a[:len(a) // 2] + b[len(b) // 2:]) for a, b in (
        (words[i], words[j]) for i, j in rng.integers(0, len(words), (n, 2)))]
    began = [time.time()]
    points = common.tfidf(texts)
    began.append(time.time())
    found, _ = common.kmeans(points, sai_dpo.N_CLUSTERS, rng)
    began.append(time.time())
    probe = sai_dpo.probe_of(found, rng)
    rates = [[float(rng.random() < 0.5) for i in probe if found[i] == j] for j in range(max(found) + 1)]
    pool = np.setdiff1d(np.arange(n), probe)
    shares = sai_dpo.shares_of(sai_dpo.error_masses(rates, np.bincount(found[pool])))
    drawn, _ = sai_dpo.draw_round(pool, pool[:100_000], found, shares, sai_dpo.SAMPLES_PER_ROUND, rng)
    began.append(time.time())
    seconds = np.diff(began)
    print(f"{n:,} problems: tf-idf {seconds[0]:.0f} s, {len(rates)} clusters {seconds[1]:.0f} s, a probe of "
          f"{len(probe):,} and a draw of {len(drawn):,} {seconds[2]:.1f} s, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def ours(what, rows, run, turn):
    """Seconds of common.train on rows (prompt, right, wrong)."""
    import common
    import dast
    examples = [{"id": str(i), "prompt": prompt, "completions": [right, wrong][:1 + (what == "dpo")],
                 "end": "<|endoftext|>"} for i, (prompt, right, wrong) in enumerate(rows)]
    common.train(run, str(ROOT / "tests/toy/model"), examples, vars(dast)[f"{what}_loss"], Path(tempfile.mkdtemp()),
                 round=turn, lr=1e-5, warmup=0, epochs=1, batch_size=32, max_tokens=8192, weight_decay=0.0, clip=1.0,
                 decay=False, reference=what == "dpo")
    shutil.rmtree(run.unfinished, ignore_errors=True)  # as Run.once does
    return run.metrics[turn, "train"]["seconds"]


def theirs(way, rows):
    """Seconds of a Trainer on the same rows: "trainer" (padded, SFT), "sft" or "dpo" (TRL's)."""
    import datasets
    import transformers
    import trl
    datasets.disable_progress_bars()
    model, before = str(ROOT / "tests/toy/model"), 0.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    plain = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=32, num_train_epochs=1, learning_rate=1e-5,
                 lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0, bf16=False, use_cpu=True,
                 report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True)
    if way == "trainer":
        data = []
        for prompt, right, _ in rows:
            ids, answer = (tokenizer(text)["input_ids"] for text in (prompt, right + "<|endoftext|>"))
            data.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})
        trainer = transformers.Trainer(network, transformers.TrainingArguments(**plain), train_dataset=data,
                                       data_collator=transformers.DataCollatorForSeq2Seq(tokenizer))
    elif way == "sft":
        data = datasets.Dataset.from_list([{"prompt": p, "completion": right} for p, right, _ in rows])
        trainer = trl.SFTTrainer(network, trl.SFTConfig(**plain, gradient_checkpointing=False), train_dataset=data,
                                 processing_class=tokenizer)
    else:
        data = datasets.Dataset.from_list([{"prompt": p, "chosen": right, "rejected": wrong}
                                           for p, right, wrong in rows])
        for precompute in (False, True):  # which it does as it is made, after tokenizing
            made = time.time()
            trainer = trl.DPOTrainer(network, args=trl.DPOConfig(
                **plain, gradient_checkpointing=False, precompute_ref_log_probs=precompute, beta=0.1),
                train_dataset=data, processing_class=tokenizer)
            before = time.time() - made - before
    began = time.time()
    with contextlib.redirect_stdout(None):
        trainer.train()
    return time.time() - began + before


def training(n=960):
    import common
    import numpy as np
    problems = [json.loads(line) for line in open(ROOT / "tests" / "toy" / "train.jsonl")][:n + 1]
    rows = [(f"Question: {p['problem']}\nAnswer:\n", p["solution"], q["solution"])
            for p, q in zip(problems, problems[1:])]
    constants = dict(MODEL=str(ROOT / "tests/toy/model"), RUN="bench-training", SEED=0, WANDB=False, GRADER="",
                     ENGINE="transformers", SAVE_MINUTES=30.0, __file__=str(ROOT / "dast.py"))
    os.chdir(tempfile.mkdtemp())
    run = common.start_run({**{name: 0 for name in common.constants_of(ROOT / "dast.py")}, **constants})
    common.say = lambda *_: None
    for what, others in (("sft", ("trainer", "sft")), ("dpo", ("dpo",))):
        seconds = {way: [] for way in ("ours", *others)}
        for turn in range(4):
            for way, of in seconds.items():
                of.append(ours(what, rows, run, turn) if way == "ours" else theirs(way, rows))
        mine, *rest = (float(np.median(of[1:])) for of in seconds.values())  # the first is to warm up
        for way, other in zip(others, rest):
            name = {"trainer": "padded Hugging Face Trainer", "sft": "TRL SFTTrainer", "dpo": "TRL DPOTrainer"}[way]
            print(f"{what}: ratio {other / mine:.1f}; {name} {other:.2f} s, ours {mine:.2f} s, {len(rows):,} "
                  f"{'pairs' if what == 'dpo' else 'answers'}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["checking"]:
        checking(Path(sys.argv[2] if sys.argv[2:] else ROOT.parent / "shared"))
    elif sys.argv[1:] == ["selection"]:
        selection()
    elif sys.argv[1:2] == ["training"]:
        training(*map(int, sys.argv[2:]))
    elif sys.argv[1:2] in (["rewards"], ["clusters"]):
        globals()[sys.argv[1]](Path(sys.argv[2] if sys.argv[2:] else ROOT.parent / "shared"))
    else:
        sys.exit(__doc__)
