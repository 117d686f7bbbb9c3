"""Speed, measured by this project's targets P1 to P10: both sides in one run, medians.

  python tests/studies/bench.py                           every row that this machine can show (half an hour)
  python tests/studies/bench.py P2 P7                     some rows
  python tests/studies/bench.py P1 P4 --shape 7b          on a GPU: a random model of Qwen2.5-7B's shape
  python tests/studies/bench.py profile                   where the seconds of a round of dast.py go
  python tests/studies/bench.py toys walk --against OLD   against a different checkout of this project, in turn

The rows print a table, the ratio first (ours against theirs; more is better):
  P1 P2  SFT in tokens per second against TRL's SFTTrainer and the padded Hugging Face Trainer (GPU: and MFU)
  P3     DPO in pairs per second against TRL's DPOTrainer, with its reference computed before training
  P4     peak memory of SFT against TRL's (each in its own process; a GPU only)
  P5     answers drawn and checked, in tokens per second, against plain LLM.generate on the same engine (if vLLM is
         installed), with and without a seed for each, and transformers.generate in batches of the same size
  P6     seconds from the last optimizer step to the first new token
  P7     checking, processor seconds, against plain math-verify, on one core and more
  P8     the part of a round that is neither sampling nor training steps
  P9     processor seconds and memory of a round's decisions for 1,000,000 problems, each method
  P10    the same round on 1, 2 and 4 processes: are the files the same?
  rewards, clusters   the reward model against padded batches of 4; 400,000 problems in clusters
  toys   --toy of each script: wall time, processor time, final accuracy
  walk   AdaSTaR's draws, tokens, seconds, and how much of the cores is unused while it samples

P1 to P4 need: pip install accelerate; their TRL part needs: pip install trl."""
import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pieces import ROOT, TOY, family, lines, model_of, open_run, quiet, training_figures

SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared"))  # real problems, and graders' cases


def row(name, ratio, target, text):
    print(f"{name:<5} {ratio:>8}  {target:<9} {text}", flush=True)


def alone(function, *arguments):
    """Return the result of a function run in its own process."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(function, arguments)


def race(turns, **ways):
    """Return {way: median seconds} of functions of the turn's number, run in turn; the first turn is a warm-up."""
    seconds = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, of_way in seconds.items():
            of_way.append(ways[way](turn))
    return {way: float(np.median(of_way[1:])) for way, of_way in seconds.items()}


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def installed(package):
    return importlib.util.find_spec(package) is not None


def problems_of(data, n):
    """Return [(prompt, its solution, that of a different problem)]: the toy's own, or MATH's."""
    import common
    problems = lines(TOY / "train.jsonl")
    if data == "math":  # rare longer ones would cost the padded side most of its time
        problems = [p for p in common.load_problems("math", "train", SHARED / "data", 2 * n)
                    if len(p["problem"] + p["solution"]) <= 2000]
    return [(f"Question: {p['problem']}\nAnswer:\n", p["solution"], q["solution"])
            for p, q in zip(problems[:n], problems[1:n + 1])]


# P1 to P4: training -----------------------------------------------------------------------------------------

def ours(what, rows, run, model, turn):
    """Return the seconds of common.train on rows (prompt, right, wrong), without saving."""
    import common
    import dast
    examples = []
    for i, (prompt, right, wrong) in enumerate(rows):
        completions = [right, wrong] if what == "dpo" else [right]
        examples.append({"id": str(i), "prompt": prompt, "completions": completions, "ids": [None] * len(completions),
                         "end": "<|endoftext|>"})
    with quiet():
        common.train(run, f"round_{turn}/model", str(model), examples, vars(dast)[f"{what}_loss"], lr=1e-5,
                     warmup=0, epochs=1, batch_size=32, weight_decay=0.0, clip=1.0, decay=False,
                     reference=what == "dpo")
    figures = training_figures(run, turn)
    run.metrics[turn, "train"] |= figures  # for the row
    shutil.rmtree(run.folder / f"round_{turn}")
    return figures["seconds"] - figures["save_seconds"]


def theirs(way, rows, model, turn):
    """Return the seconds of a Trainer on the same rows: "trainer" (padded, SFT), "sft" or "dpo" (TRL's), with their
    defaults except for what makes them equal: AdamW, 32 a step, nothing cut, float32 on CPU and bfloat16 compute on a
    GPU. There TRL packs if flash attention is installed, and saves memory as it does by default; on CPU it keeps its
    activations."""
    import datasets
    import torch
    import transformers
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    flash = gpu and transformers.utils.is_flash_attn_2_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype="float32", attn_implementation="flash_attention_2" if flash else "sdpa")
    plain = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8 if gpu else 32,
                 gradient_accumulation_steps=4 if gpu else 1, num_train_epochs=1, learning_rate=1e-5,
                 bf16=gpu, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
                 use_cpu=not gpu, report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
                 gradient_checkpointing=gpu)
    seconds = 0.0
    if way == "trainer":
        data = []
        for prompt, right, _ in rows:
            ids = tokenizer(prompt)["input_ids"]
            answer = tokenizer(right + "<|endoftext|>")["input_ids"]
            data.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})
        trainer = transformers.Trainer(network, transformers.TrainingArguments(**plain), train_dataset=data,
                                       data_collator=transformers.DataCollatorForSeq2Seq(tokenizer))
    elif way == "sft":
        import trl
        data = datasets.Dataset.from_list([{"prompt": p, "completion": right} for p, right, _ in rows])
        trainer = trl.SFTTrainer(network, trl.SFTConfig(**plain, max_length=8192, packing=flash),
                                 processing_class=tokenizer, train_dataset=data)
    else:
        import trl
        data = datasets.Dataset.from_list([{"prompt": p, "chosen": r, "rejected": w} for p, r, w in rows])
        made = []
        for precompute in (False, True):  # which happens in its constructor, after tokenizing
            began = time.time()
            settings = trl.DPOConfig(**plain, max_length=8192, precompute_ref_log_probs=precompute, beta=0.1)
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                trainer = trl.DPOTrainer(network, args=settings, train_dataset=data,
                                         processing_class=tokenizer)
            made.append(time.time() - began)
        seconds = made[1] - made[0]
    began = time.time()
    with quiet():
        trainer.train()
    return seconds + time.time() - began


NAMES = {"trainer": "padded Hugging Face Trainer", "sft": "TRL SFTTrainer", "dpo": "TRL DPOTrainer"}


def training(name, what, others, target, shape, sets):
    """Print the rows of P1, P2 or P3."""
    import common
    model = model_of(shape)
    run = open_run(model, MAX_TOKENS=8192)
    for way in others:
        if way != "trainer" and not installed("trl"):
            row(name, "open", "", f"{NAMES[way]}: needs trl")
    others = [way for way in others if way == "trainer" or installed("trl")]
    for data, n in sets:
        rows = problems_of(data, n)
        ways = {way: functools.partial(theirs, way, rows, model) for way in others}
        medians = race(3, ours=functools.partial(ours, what, rows, run, model), **ways)
        log = run.metrics[3, "train"]
        for way in others:
            row(name, f"{medians[way] / medians['ours']:.1f}x", target,
                f"{shape}, {n} {'pairs' if what == 'dpo' else 'answers'} to {data} problems, "
                f"{log['tokens']:,} tokens: "
                f"{NAMES[way]} {medians[way]:.2f} s, ours {medians['ours']:.2f} s")
        if "mfu" in log:
            row(name, f"{log['mfu']:.0%}", "50-55%",
                f"MFU, {log['peak_gib']:.1f} GiB on {common.processor()}")


def peak_of(way, shape):
    """Return the peak GiB of a GPU, from torch, in an epoch of SFT on 64 of MATH's solutions."""
    import torch
    rows = problems_of("math", 64)
    model = model_of(shape)
    if way == "ours":
        ours("sft", rows, open_run(model, MAX_TOKENS=8192), model, 0)
    else:
        theirs(way, rows, model, 0)
    return torch.cuda.max_memory_allocated() / 2**30


def memory(shape):
    mine = alone(peak_of, "ours", shape)
    other = alone(peak_of, "sft", shape)
    row("P4", f"{mine / other:.2f}x", "<= 0.7x",
        f"{shape}: peak memory of SFT {mine:.1f} GiB, TRL {other:.1f} GiB")


# P5, P6: sampling -------------------------------------------------------------------------------------------

class Drawing:
    """The same requests to our sampler and to plain generation: 8 answers to each of n toy problems."""

    def __init__(self, engine, shots, n, model=TOY / "model"):
        import common
        self.model = str(model)
        self.style = "few_shot" if shots else "zero_shot"
        self.run = open_run(model, ENGINE=engine, EAGER=Path(model) == TOY / "model")
        toy = lines(TOY / "train.jsonl")
        self.problems = [{"id": str(i), "kind": "math", **toy[i]} for i in range(n)]
        self.tokenizer = common.load_tokenizer(self.model, "")
        self.ends = common.end_ids(self.tokenizer, self.model)
        self.shown = toy[n:n + shots]
        self.tokens = None

    def prompt(self, problem, draw):
        import common
        return common.make_prompt(self.tokenizer, self.style, problem, self.shown)

    def rate(self, began, tokens):
        """Return the seconds for the number of tokens that our own first turn drew: answers are random, so their number
        differs a bit."""
        self.tokens = self.tokens or tokens
        return (time.time() - began) * self.tokens / tokens

    def forget(self):
        """Make vLLM compute each prompt anew."""
        if self.run.engine.streams and self.run.engine.llm:
            self.run.engine.llm.reset_prefix_cache()

    def ours(self, turn, seeded=True):
        import common
        self.forget()
        self.run.constants["SEEDED"] = seeded
        began = time.time()
        with quiet():
            answers = common.sample(self.run, f"round_{turn}/seeded_{seeded}.jsonl", self.model,
                                    self.problems, 8, self.prompt, style=self.style, temperature=0.7,
                                    max_new_tokens=96)
        return self.rate(began, sum(a["tokens"] for a in answers))

    def plain_vllm(self, turn, seeded=True):
        import common
        from vllm import SamplingParams
        self.forget()
        began = time.time()
        params = functools.partial(SamplingParams, temperature=0.7, max_tokens=96, stop=[common.STOP],
                                   stop_token_ids=self.ends)
        if seeded:
            prompts = [self.prompt(p, 0) for p in self.problems for _ in range(8)]
            params = [params(seed=1 + i) for i in range(len(prompts))]
        else:
            prompts = [self.prompt(p, 0) for p in self.problems]
            params = params(n=8)
        outputs = self.run.engine.llm.generate(prompts, params, use_tqdm=False)
        return self.rate(began, sum(len(answer.token_ids) for output in outputs for answer in output.outputs))

    @functools.cached_property
    def plain(self):
        """Return (tokenizer, model) as transformers loads them."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(self.model, padding_side="left")
        return tokenizer, AutoModelForCausalLM.from_pretrained(self.model).eval()

    def plain_transformers(self, turn):
        import common
        import torch
        tokenizer, model = self.plain
        began = time.time()
        tokens = 0
        prompts = [self.prompt(p, 0) for p in self.problems for _ in range(8)]
        for at in range(0, len(prompts), common.GROUP):
            batch = tokenizer(prompts[at:at + common.GROUP], padding=True, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(**batch, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=96,
                                     eos_token_id=self.ends, stop_strings=[common.STOP], tokenizer=tokenizer,
                                     pad_token_id=0)
            tokens += int((out[:, batch["input_ids"].shape[1]:] != 0).sum()) + len(out)
        return self.rate(began, tokens)


def sampling(engine, shots, turns=5):
    drawing = Drawing(engine, shots, 128)
    what = f"{engine}, {128 * 8:,} answers to prompts with {shots} examples"
    if engine == "transformers":
        medians = race(turns, ours=drawing.ours, plain=drawing.plain_transformers)
        row("P5", f"{medians['plain'] / medians['ours']:.2f}x", ">= 0.97x",
            f"{what}: plain generate {medians['plain']:.2f} s, ours {medians['ours']:.2f} s")
        return
    medians = race(turns, ours=drawing.ours, plain=drawing.plain_vllm,
                   ours_unseeded=functools.partial(drawing.ours, seeded=False),
                   plain_unseeded=functools.partial(drawing.plain_vllm, seeded=False))
    for kind, seeds in (("", "with seeds"), ("_unseeded", "without")):
        mine = medians["ours" + kind]
        other = medians["plain" + kind]
        row("P5", f"{other / mine:.2f}x", ">= 0.97x",
            f"{what} {seeds}: plain LLM.generate {other:.2f} s, ours {mine:.2f} s")
    row("", f"{medians['ours_unseeded'] / medians['ours']:.2f}x", "",
        f"{what}: a seed for each, against none")


def switch(shape):
    """Print P6, from the metrics of: draw, train one step, draw one token."""
    import common
    import dast
    drawing = Drawing("vllm", 0, 8, model_of(shape))
    drawing.ours(0)
    examples = [common.make_example(drawing.tokenizer, "zero_shot", p, p["solution"])
                for p in drawing.problems]
    with quiet():
        new = common.train(drawing.run, "round_1/model", drawing.model, examples, dast.sft_loss, lr=1e-5,
                           warmup=0, epochs=1, batch_size=8, weight_decay=0.0, clip=1.0)
        trained = time.time()
        common.sample(drawing.run, "round_1/first.jsonl", new, drawing.problems[:1], 1, drawing.prompt,
                      style="zero_shot", temperature=0.7, max_new_tokens=1)
    first = time.time() - trained
    log = drawing.run.metrics[1, "first"]
    train = drawing.run.metrics[1, "train"]
    target = "<= 10 s" if common.device().type == "cuda" else "(7B)"
    row("P6", f"{train['save_seconds'] + first:.1f} s", target, f"{shape} on {common.processor()}, from the "
        f"last step to the first new token: saving {train['save_seconds']:.1f} s, the engine's new weights "
        f"and their test {log['load_seconds']:.1f} s; training {train['seconds']:.1f} s")


# P7: checking -----------------------------------------------------------------------------------------------

def responses(n):
    """Return {what it is: [(problem, text)]}."""
    import common
    problems = common.load_problems("math", "test", SHARED / "data", n)
    outputs = []
    for case in lines(SHARED / "graders" / "cases.jsonl"):
        if "Qwen2.5-Math" in case["source"]:
            outputs.append(({"id": case["id"], "answer": case["gold"]}, case["response_or_answer"]))
    wrong = [(p, q["solution"]) for p, q in zip(problems, problems[1:])]
    return {"model outputs": outputs, "wrong answers": wrong,
            "reference solutions": [(p, p["solution"]) for p in problems]}


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
    verdicts = [future.result()[0] for future in ready]  # now all workers needed are running
    assert not any(verdicts[:6])
    pids = family(os.getpid())
    began = sum(map(processor_seconds, pids))
    wall = time.time()
    verdicts = [future.result()[0] for future in [checker.submit(*pair) for pair in pairs]]
    wall = time.time() - wall
    return verdicts, sum(map(processor_seconds, pids)) - began, wall


def checking(n=2000):
    """Check MATH test solutions as responses to their own problem (right) and to the next one (wrong), and model
    outputs."""
    cases = responses(n)
    for what, pairs in cases.items():
        totals = [0.0, 0.0]
        found = [None, None]
        for _ in range(3):
            for i, way in enumerate((plainly, by_checker)):
                found[i], seconds, _ = alone(way, pairs)
                totals[i] += seconds / 3
        plain, mine = found
        row("P7", f"{totals[0] / totals[1]:.1f}x", ">= 1.5x", f"{len(pairs):,} {what}: math-verify "
            f"{totals[0]:.2f} "
            f"processor seconds, ours {totals[1]:.2f}; {sum(p != o for p, o in zip(plain, mine))} verdicts "
            "differ")
        for (problem, _), p, o in zip(pairs, plain, mine):
            if p != o:
                print(f"       {problem['id']}: math-verify {p}, ours {o}, gold {problem['answer']!r}")
    pairs = cases["wrong answers"]
    cores = os.cpu_count()
    walls = [alone(by_checker, pairs, workers)[2] for workers in (1, cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:  # the most that this machine's cores give
        one = pool.apply(plainly, (pairs,))[1]
        began = time.time()
        pool.map(plainly, [pairs] * cores)
        machine = cores * one / (time.time() - began)
    row("P7", f"{walls[0] / walls[1]:.1f}x", "",
        f"{cores} workers against one, wall time; separate processes of plain "
        f"math-verify get {machine:.1f}x from this machine's {cores} cores")


# P8: the rest of a round; P9: decisions; P10: scale-out -----------------------------------------------------

def round_of(folder, script, *flags, processes=1):
    """Run a script in a folder, by torchrun; return its metrics."""
    (folder / "tests").symlink_to(ROOT / "tests")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), str(ROOT / script), "--toy", "--name", "r", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return lines(folder / "runs" / "r" / "metrics.jsonl")


def remainder(shape):
    flags = ["--rounds", 1, "--model", model_of(shape)]
    if shape != "toy":
        flags += ["--n-train", 64, "--n-test", 32, "--k-probe", 2, "--k-samples", 1]
    metrics = round_of(Path(tempfile.mkdtemp()), "dast.py", *flags)
    whole = sum(m["seconds"] for m in metrics if m["phase"] == "round")
    drawn = sum(m["seconds"] for m in metrics if "spent_draws" in m)
    trained = [m for m in metrics if m["phase"] == "train"]
    saving = sum(m["save_seconds"] for m in trained)
    steps = sum(m["seconds"] for m in trained) - saving
    row("P8", f"{1 - (drawn + steps) / whole:.1%}", "<= 5%" if shape in ("1.5b", "7b") else "(1.5B)",
        f"{shape}: of {whole:.1f} s of two rounds of dast.py sampling with checking {drawn:.1f} s, training "
        f"steps {steps:.1f} s, saving {saving:.1f} s, the rest {whole - steps - saving - drawn:.1f} s")


def decisions(n=1_000_000):
    import selection
    for method in selection.METHODS:
        quarter, _, _ = alone(selection.measure, method, n // 4)
        seconds, data, added = alone(selection.measure, method, n)
        row("P9", f"{seconds:.1f} s", "<= 10 s", f"{method}: {n:,} problems decided, {seconds / quarter:.1f} "
            f"times as long as a quarter of them; {added:.2f} GiB (<= 2) on top of {data:.1f} of records and "
            "libraries")


def scale_out():
    """Compare the first round of dast.py, and what depends on its answers, on 1, 2 and 4 processes."""
    from safetensors.torch import load_file
    rounds = {}
    for processes in (1, 2, 4):
        folder = Path(tempfile.mkdtemp())
        round_of(folder, "dast.py", "--n-train", 64, "--n-test", 40, "--k-probe", 3, "--rounds", 0,
                 processes=processes)
        rounds[processes] = folder / "runs" / "r" / "round_0"
    one = load_file(rounds[1] / "model" / "model.safetensors")
    for processes in (2, 4):
        many = load_file(rounds[processes] / "model" / "model.safetensors")
        same = True
        for name in ("probe.jsonl", "eval_base.json"):
            same = same and (rounds[1] / name).read_bytes() == (rounds[processes] / name).read_bytes()
        apart = max(float((many[name] - one[name]).norm() / one[name].norm()) for name in one)
        row("P10", "same" if same else "DIFFER", "same",
            f"answers and scores of {processes} processes and of "
            f"one; weights trained from them differ by {apart:.0e} (1e-4)")


# Against another checkout -----------------------------------------------------------------------------------

def watch(command, folder):
    """Run a command; return [(time, processor seconds of it and all its descendants)], ten times a second."""
    with open(folder / "output.txt", "w") as out:
        running = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
    seconds = {}
    series = [(time.time(), 0.0)]
    pids = []
    while running.poll() is None:
        if len(series) % 10 == 1:
            pids = family(running.pid)
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                seconds[pid] = processor_seconds(pid)
        series.append((time.time(), sum(seconds.values())))
        time.sleep(0.1)
    if running.returncode:
        sys.exit((folder / "output.txt").read_text()[-2000:])
    return np.array(series)


def toy_command(checkout, script, flags):
    """Return `--toy` of a script of a checkout, named "r"; the flag for the name was --run up to commit 7b3eeee."""
    named = "--name" if "\nNAME = " in (checkout / script).read_text() else "--run"
    return [sys.executable, str(checkout / script), "--toy", *flags, named, "r"]


def paired(script, against, flags, turns):
    """Return [(ours, theirs)], in turn A B A B: for each the run's folder and what `watch` saw."""
    found = []
    for _ in range(turns):
        pair = []
        for checkout in (ROOT, against):
            folder = Path(tempfile.mkdtemp())
            (folder / "tests").symlink_to(checkout / "tests")
            pair.append((folder / "runs" / "r", watch(toy_command(checkout, script, flags), folder)))
        found.append(pair)
    return found


def final_accuracy(run):
    """Return the accuracy of a run's last round on its test problems."""
    last = max(run.glob("round_*/eval.json"), key=lambda path: int(path.parent.name[6:]))
    return json.loads(last.read_text())["accuracy"]


def toys(against, flags, turns):
    """Print seconds of --toy, both wall and processor time, medians of pairs."""
    for script in ("dast.py", "adastar.py", "hs_star.py", "sai_dpo.py"):
        runs = paired(script, against, flags, turns)
        walls = []
        processor = []
        for pair in runs:
            walls.append([series[-1, 0] - series[0, 0] for _, series in pair])
            processor.append([series[-1, 1] for _, series in pair])
        wall, wall_before = np.median(walls, 0)
        cpu, cpu_before = np.median(processor, 0)
        accuracy, accuracy_before = [final_accuracy(run) for run, _ in runs[0]]
        row("toys", f"{wall_before / wall:.2f}x", "", f"{script}: {wall:.1f} s, there {wall_before:.1f} s; "
            f"of the processor {cpu:.1f} s, there {cpu_before:.1f} s ({cpu_before / cpu:.2f}x); in the end "
            f"{accuracy:.1%}, there {accuracy_before:.1%}")


def walk_of(run, series):
    """Sum over a run's walks: draws that count, all draws, their tokens, phases, seconds, core-seconds not used while
    sampling, and those of them after the last moment at which all cores were busy."""
    cores = os.cpu_count()
    times, processor = series.T
    busy = np.diff(processor) / np.diff(times) > cores - 0.5
    sums = dict(draws=0, spent_draws=0, spent_tokens=0, phases=0, seconds=0.0, unused=0.0, at_ends=0.0)
    for m in lines(run / "metrics.jsonl"):
        if not re.fullmatch(r"sample|responses_\d+", m["phase"]):
            continue
        name = "responses" if m["phase"] == "sample" else m["phase"]
        end = (run / f"round_{m['round']}" / f"{name}.jsonl").stat().st_ctime
        begin = end - m["seconds"]
        used = np.diff(np.interp([begin, end], times, processor))[0]
        last_busy = max(times[1:][busy & (times[1:] < end)], default=begin)
        last_busy = max(last_busy, begin)
        used_at_end = np.diff(np.interp([last_busy, end], times, processor))[0]
        values = dict(draws=m["draws"], spent_draws=m["spent_draws"], spent_tokens=m["spent_tokens"],
                      phases=1, seconds=m["seconds"], unused=cores * m["seconds"] - used,
                      at_ends=cores * (end - last_busy) - used_at_end)
        for what, value in values.items():
            sums[what] += value
    return sums


def walks(against, flags, turns):
    """Compare the cost of AdaSTaR's walk in blocks with the walk of a different checkout. (If other programs use the
    cores, what they take counts as not used.)"""
    both = [[], []]
    for pair in paired("adastar.py", against, flags, turns):
        for of_checkout, (run, series) in zip(both, pair):
            of_checkout.append(walk_of(run, series))
    medians = []
    for of_checkout in both:
        medians.append({what: float(np.median([sums[what] for sums in of_checkout]))
                        for what in of_checkout[0]})
    ours, theirs = medians
    for name, found in (("ours", ours), ("theirs", theirs)):
        row("walk", f"{theirs['seconds'] / found['seconds']:.2f}x", "",
            f"{name}: {found['draws']:,.0f} draws count of {found['spent_draws']:,.0f}, "
            f"{found['spent_tokens']:,.0f} "
            f"tokens in all, {found['phases']:.0f} phases in {found['seconds']:.1f} s; core-seconds not used "
            f"{found['unused']:.1f}, at the ends of phases {found['at_ends']:.1f}")


# Where the time goes ----------------------------------------------------------------------------------------

def profile_of(shape):
    """Print the five largest items of rounds 0 and 1 of dast.py, by operation, on one core."""
    import common
    import dast
    from torch.profiler import profile
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    common.torch.set_num_threads(1)
    small = dict(ROUNDS=1, N_TRAIN=100)
    if shape != "toy":
        small = dict(ROUNDS=1, N_TRAIN=8, N_TEST=4, K_PROBE=1, K_SAMPLES=1, MAX_NEW_TOKENS=16)
    vars(dast).update(dast.TOY | small, MODEL=str(model_of(shape)))
    os.chdir(tempfile.mkdtemp())
    Path("tests").symlink_to(ROOT / "tests")
    options = common.torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(acc_events=True, experimental_config=options) as profiled, quiet():
        dast.main()
    rows = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    operations = sum(e.self_cpu_time_total for e in rows) / 1e6
    print(f"{shape}: rounds 0 and 1 of dast.py, one core, {operations:.1f} s in torch's operations")
    for event in rows[:5]:
        print(f"  {event.self_cpu_time_total / 1e6:6.1f} s  "
              f"{event.self_cpu_time_total / 1e6 / operations:4.0%}  "
              f"{event.count:8,} x {event.key}", flush=True)


# More -------------------------------------------------------------------------------------------------------

def padded_loop(prm, model, pairs):
    """Return the rewards of each step as a plain Hugging Face program computes them."""
    import torch
    found = []
    for at in range(0, len(pairs), 4):
        rows = [prm.encode(problem, text) for problem, text in pairs[at:at + 4]]
        batch = prm.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, padding_side="right",
                                  return_tensors="pt")
        with torch.inference_mode():
            rewards = prm.head(model(**batch).last_hidden_state)[..., -1]
        found += [rewards[i, places].tolist() for i, (_, places) in enumerate(rows)]
    return found


def rewards(turns=5):
    """Read 1,600 answers that the toy draws, the toy's solutions and 300 of MATH's with the toy's reward model."""
    import common
    import hs_star
    from transformers import AutoModel
    toy = [{"id": str(n), "kind": "math", **p} for n, p in enumerate(lines(TOY / "train.jsonl"))]
    math = common.load_problems("math", "test", SHARED / "data", 300)
    run = open_run(TOY / "model", ENGINE="transformers")
    tokenizer = common.load_tokenizer(TOY / "model", "")

    def prompt(problem, draw):
        return common.make_prompt(tokenizer, "zero_shot", problem)

    with quiet():
        drawn = common.sample(run, "round_0/draw.jsonl", str(TOY / "model"), toy[:200], 8, prompt,
                              style="zero_shot", temperature=0.7, max_new_tokens=96)
    prm = hs_star.RewardModel(str(TOY / "prm"))
    plain = AutoModel.from_pretrained(TOY / "prm").eval()
    by_id = {p["id"]: p for p in math + toy}
    sets = {"drawn answers": drawn}
    for what, problems in (("toy solutions", toy), ("MATH solutions", math)):
        sets[what] = [{"id": p["id"], "draw": 0, "text": p["solution"]} for p in problems]
    for what, read in sets.items():
        pairs = [(by_id[r["id"]], r["text"]) for r in read]
        found = {}

        def ours(turn):
            began = time.time()
            with quiet():
                records = hs_star.step_rewards(run, f"round_{turn}/{what.split()[0]}.jsonl", prm, math + toy,
                                               read)
            found["ours"] = [record["step_rewards"] for record in records]
            return time.time() - began

        def theirs(turn):
            began = time.time()
            found["theirs"] = padded_loop(prm, plain, pairs)
            return time.time() - began

        medians = race(turns, theirs=theirs, ours=ours)
        off = 0.0
        for mine, other in zip(found["ours"], found["theirs"], strict=True):
            off = max(off, float(np.abs(np.subtract(mine, other)).max(initial=0.0)))
        row("", f"{medians['theirs'] / medians['ours']:.1f}x", "", f"{len(pairs):,} {what}: rewards of steps "
            f"in padded batches of 4 {medians['theirs']:.2f} s, packed {medians['ours']:.2f} s; they differ "
            f"by {off:.1g}")


def clusters(n=400_000):
    import common
    import sai_dpo
    rng = np.random.default_rng(0)
    words = [p["problem"].split(" ") for p in common.load_problems("math", "train", SHARED / "data")]
    texts = []
    for i, j in rng.integers(0, len(words), (n, 2)):
        texts.append(" ".join(words[i][:len(words[i]) // 2] + words[j][len(words[j]) // 2:]))
    common.torch.set_num_threads(1)
    began = [time.time()]
    points = sai_dpo.tfidf(texts)
    began.append(time.time())
    found = sai_dpo.kmeans(points, sai_dpo.N_CLUSTERS, rng)
    began.append(time.time())
    probe = sai_dpo.probe_of(found, rng)
    rates = rng.integers(0, 2, len(probe))
    unused = np.setdiff1d(np.arange(n), probe)
    shares = sai_dpo.shares_of(sai_dpo.error_masses(rates, found[probe], np.bincount(found[unused])))
    drawn = sai_dpo.draw(unused, found, shares, n // 20, rng)
    began.append(time.time())
    seconds = np.diff(began)
    print(f"{n:,} problems: tf-idf {seconds[0]:.0f} s, {len(shares)} clusters {seconds[1]:.0f} s, a probe of "
          f"{len(probe):,} and a draw of {len(drawn):,} {seconds[2]:.1f} s, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="as above; default: P1 to P10")
    parser.add_argument("--shape", choices=("toy", "0.1b", "1.5b", "7b"), help="1.5b on a GPU, else toy")
    parser.add_argument("--quick", action="store_true",
                        help="a tenth of the problems, to see that a row runs")
    parser.add_argument("--against", type=Path, help="toys, walk: the checkout to compare with")
    parser.add_argument("--turns", type=int, default=2, help="toys, walk: pairs of runs [2]")
    parser.add_argument("--flags", default="", help="toys, walk: more flags for both, in one string")
    arguments = parser.parse_args()
    import common
    gpu = common.torch.cuda.is_available()
    shape = arguments.shape or ("1.5b" if gpu else "toy")
    part = 10 if arguments.quick else 1
    sets = (("math", 512 // part),) if gpu else (("math", 80 // part), ("toy", 640 // part))
    pairs = (("math", 512 // part),) if gpu else (("math", 40 // part), ("toy", 320 // part))
    other = (arguments.against and arguments.against.resolve(), arguments.flags.split(), arguments.turns)
    needs_gpu = "" if gpu else "a GPU"
    needs_cpu = "a CPU" if gpu else ""
    needs_vllm = "" if installed("vllm") else "vLLM"
    needs_other = "" if arguments.against else "--against FOLDER"

    def sampling_rows():
        for engine in ("transformers", "vllm"):
            if engine == "vllm" and needs_vllm or engine == "transformers" and gpu:
                continue
            for shots in (0, 4):
                alone(sampling, engine, shots, 1 if arguments.quick else 5)

    def profiles():
        for one in ("toy", "0.1b"):
            alone(profile_of, one)

    rows = {  # name: (what is missing here to run it; what to do)
        "P1": (needs_gpu, lambda: training("P1", "sft", ("sft", "trainer"), ">= 1.3x", shape, sets)),
        "P2": (needs_cpu, lambda: training("P2", "sft", ("trainer", "sft"), ">= 2x", shape, sets)),
        "P3": ("", lambda: training("P3", "dpo", ("dpo",), ">= 1.5x", shape, pairs)),
        "P4": (needs_gpu, lambda: memory(shape)),
        "P5": ("", sampling_rows),
        "P6": (needs_vllm, lambda: alone(switch, shape)),
        "P7": ("", lambda: checking(2000 // part)),
        "P8": ("", lambda: remainder(shape)),
        "P9": ("", lambda: decisions(1_000_000 // part)),
        "P10": ("", scale_out),
        "profile": ("", profiles),
        "rewards": ("", lambda: alone(rewards, 1 if arguments.quick else 5)),
        "clusters": ("", lambda: alone(clusters, 400_000 // part)),
        "toys": (needs_other, lambda: toys(*other)),
        "walk": (needs_other, lambda: walks(*other)),
    }
    unknown = {*arguments.rows} - {*rows}
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    print(f"row      ratio  target    what ({common.processor()}, {os.cpu_count()} cores)", flush=True)
    for name in arguments.rows or [name for name in rows if name[0] == "P"]:
        missing, measure = rows[name]
        if missing:
            row(name, "open", "", f"needs {missing}")
        else:
            measure()


if __name__ == "__main__":
    main()
