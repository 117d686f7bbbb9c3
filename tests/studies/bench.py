"""Speed, by the targets P1 to P10 that this project has set itself: both sides in one run, a warm-up, medians.

  python tests/bench.py                   every row that this machine can show (half an hour on two cores)
  python tests/bench.py P2 P7             some rows
  python tests/bench.py P1 P4 --shape 7b  on a GPU: a random model of the shape of Qwen2.5-7B (else 1.5b, on CPU toy)
  python tests/bench.py profile           where the seconds of a round of dast.py go: the toy, and a 0.1b shape

The rows print a table, the ratio first (ours against theirs; more is better):
  P1 P2  SFT in tokens per second against TRL's SFTTrainer and the padded Hugging Face Trainer (on a GPU also MFU)
  P3     DPO in pairs per second against TRL's DPOTrainer, with its reference computed before training
  P4     peak memory of SFT against TRL's (each in a process of its own; a GPU only)
  P5     answers drawn and checked, in tokens per second, against plain LLM.generate on the same engine (where vLLM is
         installed), with and without a seed for each, and against transformers.generate in batches of as many
  P6     seconds from the last optimizer step to the first new token
  P7     checking, processor seconds, against plain math-verify, on one core and more
  P8     what of a round is neither sampling nor training steps
  P9     processor seconds and memory of a round's decisions for 1,000,000 problems, each method
  P10    the same round on 1, 2 and 4 processes: the same files? and what coordination costs by their number
  rewards, clusters   the reward model against padded batches of 4; 400,000 problems in clusters

P1 to P4 need: pip install trl accelerate.
"""
import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared"))  # real problems, and graders' cases


def row(name, ratio, target, text):
    print(f"{name:<4} {ratio:>8}  {target:<9} {text}", flush=True)


def alone(function, *arguments):
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(function, arguments)


def race(turns, **ways):
    """{way: median seconds} of functions of the turn's number, in turn; the first turn is to warm up."""
    import numpy as np
    seconds = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, of in seconds.items():
            of.append(ways[way](turn))
    return {way: float(np.median(of[1:])) for way, of in seconds.items()}


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_run(model, script="dast.py", **constants):
    """A run folder as the script would open it, in a temporary folder, silent."""
    import common
    os.chdir(tempfile.mkdtemp())
    constants = {**{name: 0 for name in common.constants_of(ROOT / script)}, "MODEL": str(model), "RUN": "bench",
                 "SEED": 0, "WANDB": False, "GRADER": "", "ENGINE": "", "SAVE_MINUTES": 30.0, "GPU_MEMORY": 0.85,
                 "EAGER": False, "PRM": "", "__file__": str(ROOT / script), **constants}
    say, common.say = common.say, lambda *_: None
    run = common.start_run(constants)
    common.say = say
    return run


def problems_of(data, n):
    """[(problem, its solution, another's)]: the toy's own, or MATH's."""
    import common
    problems = [json.loads(line) for line in open(TOY / "train.jsonl")] if data == "toy" else [
        p for p in common.load_problems("math", "train", SHARED / "data", 2 * n)
        if len(p["problem"] + p["solution"]) <= 2000]  # longer ones, rare, would cost the padded side most of its time
    return [(f"Question: {p['problem']}\nAnswer:\n", p["solution"], q["solution"])
            for p, q in zip(problems[:n], problems[1:n + 1])]


# P1 to P4: training ---------------------------------------------------------------------------------------------------

def ours(what, rows, run, model, turn):
    """Seconds of common.train on rows (prompt, right, wrong), saving left out."""
    import common
    import dast
    examples = [{"id": str(i), "prompt": prompt, "completions": [right, wrong][:1 + (what == "dpo")],
                 "end": "<|endoftext|>"} for i, (prompt, right, wrong) in enumerate(rows)]
    folder, say, common.say = Path(tempfile.mkdtemp()), common.say, lambda *_: None
    common.train(run, str(model), examples, vars(dast)[f"{what}_loss"], folder, round=turn, lr=1e-5, warmup=0, epochs=1,
                 batch_size=32, max_tokens=8192, weight_decay=0.0, clip=1.0, decay=False, reference=what == "dpo")
    common.say = say
    shutil.rmtree(folder)
    shutil.rmtree(run.unfinished, ignore_errors=True)  # as Run.once does
    log = run.metrics[turn, "train"]
    return log["seconds"] - log["save_seconds"]


def theirs(way, rows, model, turn):
    """Seconds of a Trainer on the same rows: "trainer" (padded, SFT), "sft" or "dpo" (TRL's), as they come but for what
    makes them equal: AdamW, 32 a step, nothing cut, float32 on CPU and bfloat16 compute on a GPU. There TRL packs where
    flash attention is installed, and saves memory as it does by default; on CPU it keeps its activations."""
    import datasets
    import torch
    import transformers
    import trl
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    gpu, flash = torch.cuda.is_available(), transformers.utils.is_flash_attn_2_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype="float32", attn_implementation="flash_attention_2" if flash and gpu else "sdpa")
    plain = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=32 // (4 if gpu else 1),
                 gradient_accumulation_steps=4 if gpu else 1, num_train_epochs=1, learning_rate=1e-5, bf16=gpu,
                 lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0, use_cpu=not gpu,
                 report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
                 gradient_checkpointing=gpu)
    pairs = {"prompt": [p for p, _, _ in rows], "chosen": [r for _, r, _ in rows], "rejected": [w for *_, w in rows]}
    made = []
    if way == "trainer":
        data = []
        for prompt, right, _ in rows:
            ids, answer = (tokenizer(text)["input_ids"] for text in (prompt, right + "<|endoftext|>"))
            data.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})
        trainer = transformers.Trainer(network, transformers.TrainingArguments(**plain), train_dataset=data,
                                       data_collator=transformers.DataCollatorForSeq2Seq(tokenizer))
    elif way == "sft":
        trainer = trl.SFTTrainer(
            network, trl.SFTConfig(**plain, max_length=8192, packing=flash and gpu), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": pairs["prompt"], "completion": pairs["chosen"]}))
    else:
        for precompute in (False, True):  # which it does as it is made, after tokenizing
            began = time.time()
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                trainer = trl.DPOTrainer(network, args=trl.DPOConfig(
                    **plain, max_length=8192, precompute_ref_log_probs=precompute, beta=0.1),
                    train_dataset=datasets.Dataset.from_dict(pairs), processing_class=tokenizer)
            made.append(time.time() - began)
    began = time.time()
    with contextlib.redirect_stdout(None):
        trainer.train()
    return time.time() - began + (made[1] - made[0] if made else 0)


NAMES = {"trainer": "padded Hugging Face Trainer", "sft": "TRL SFTTrainer", "dpo": "TRL DPOTrainer"}


def training(name, what, others, target, shape, sets):
    """Rows of P1, P2 or P3."""
    import common
    from gpu_check import model_of
    model = model_of(shape)
    run = open_run(model)
    for data, n in sets:
        rows = problems_of(data, n)
        medians = race(3, ours=functools.partial(ours, what, rows, run, model), **{
            way: functools.partial(theirs, way, rows, model) for way in others})
        log = run.metrics[3, "train"]
        for way in others:
            row(name, f"{medians[way] / medians['ours']:.1f}x", target,
                f"{shape}, {n} {'pairs' if what == 'dpo' else 'answers'} to {data} problems, {log['tokens']:,} tokens: "
                f"{NAMES[way]} {medians[way]:.2f} s, ours {medians['ours']:.2f} s")
        if common.device().type == "cuda":
            row(name, f"{log['mfu']:.0%}", "50-55 %", f"MFU, {log['recomputed']} blocks recomputed, "
                f"{log['peak_gib']:.1f} GiB on {common.processor()}")


def peak_of(way, shape):
    """Peak GiB of a GPU, by torch, of an epoch of SFT on 64 of MATH's solutions."""
    import torch
    from gpu_check import model_of
    rows, model = problems_of("math", 64), model_of(shape)
    if way == "ours":
        run = open_run(model)
        ours("sft", rows, run, model, 0)
        return run.metrics[0, "train"]["peak_gib"]
    theirs(way, rows, model, 0)
    return torch.cuda.max_memory_allocated() / 2**30


def memory(shape):
    mine, other = alone(peak_of, "ours", shape), alone(peak_of, "sft", shape)
    row("P4", f"{mine / other:.2f}x", "<= 0.7x", f"{shape}: peak memory of SFT {mine:.1f} GiB, TRL {other:.1f} GiB")


# P5, P6: sampling -----------------------------------------------------------------------------------------------------

class Drawing:
    """The same requests to our sampler and to plain generation: 8 answers to each of n toy problems."""

    def __init__(self, engine, shots, n, model=TOY / "model"):
        import common
        self.common, self.model, self.style = common, str(model), "few_shot" if shots else "zero_shot"
        self.run = open_run(model, ENGINE=engine, SEEDED=True, EAGER=Path(model) == TOY / "model")
        toy = [json.loads(line) for line in open(TOY / "train.jsonl")]
        self.problems = [{"id": str(i), "kind": "math", **toy[i]} for i in range(n)]
        self.tokenizer, self.shown = common.load_tokenizer(self.model, ""), toy[n:n + shots]
        self.tokens = None

    def prompt(self, problem, draw):
        return self.common.make_prompt(self.tokenizer, self.style, problem, self.shown)

    def rate(self, began, tokens):
        """Seconds for as many tokens as our own first turn drew: answers are random, so their number differs a bit."""
        self.tokens = self.tokens or tokens
        return (time.time() - began) * self.tokens / tokens

    def forget(self):
        shutil.rmtree(self.run.unfinished, ignore_errors=True)
        if self.run.engine == "vllm" and self.run.sampler:
            self.run.sampler.llm.reset_prefix_cache()

    def ours(self, turn, seeded=True):
        self.forget()
        self.run.constants["SEEDED"] = seeded
        say, self.common.say, began = self.common.say, lambda *_: None, time.time()
        answers = self.common.sample(self.run, self.model, self.problems, 8, self.prompt, round=turn, phase="bench",
                                     style=self.style, temperature=0.7, max_new_tokens=96)
        self.common.say = say
        return self.rate(began, sum(a["tokens"] for a in answers))

    def plain_vllm(self, turn, seeded=True):
        from vllm import SamplingParams
        self.forget()
        sampler, began = self.run.sampler, time.time()
        params = functools.partial(SamplingParams, temperature=0.7, max_tokens=96, stop=sampler.stops,
                                   stop_token_ids=sampler.ends)
        prompts = [self.prompt(p, 0) for p in self.problems for _ in range(8 if seeded else 1)]
        params = [params(seed=1 + i) for i in range(len(prompts))] if seeded else params(n=8)
        outputs = sampler.llm.generate(prompts, params, use_tqdm=False)
        return self.rate(began, sum(len(o.token_ids) for out in outputs for o in out.outputs))

    def plain_transformers(self, turn):
        import torch
        sampler, began, tokens = self.run.sampler, time.time(), 0
        prompts = [self.prompt(p, 0) for p in self.problems for _ in range(8)]
        for at in range(0, len(prompts), self.common.GROUP):
            batch = sampler.tokenizer(prompts[at:at + self.common.GROUP], padding=True, return_tensors="pt")
            with torch.inference_mode():
                out = sampler.model.generate(**batch.to(sampler.model.device), do_sample=True, temperature=0.7, top_k=0,
                                             max_new_tokens=96, eos_token_id=sampler.ends, stop_strings=sampler.stops,
                                             tokenizer=sampler.tokenizer, pad_token_id=0)
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
                   **{way: functools.partial(getattr(drawing, of), seeded=False) for way, of in
                      (("ours_unseeded", "ours"), ("plain_unseeded", "plain_vllm"))})
    for kind, seeds in ("", "with seeds"), ("_unseeded", "without"):
        mine, other = medians["ours" + kind], medians["plain" + kind]
        row("P5", f"{other / mine:.2f}x", ">= 0.97x", f"{what} {seeds}: plain LLM.generate {other:.2f} s, ours "
            f"{mine:.2f} s")
    row("", f"{medians['ours_unseeded'] / medians['ours']:.2f}x", "", f"{what}: a seed for each, against none")


def switch(shape):
    """P6, from the metrics of: draw, train one step, draw one token."""
    import common
    import torch
    from gpu_check import model_of
    drawing = Drawing("vllm", 0, 8, model_of(shape))
    drawing.ours(0)
    examples = [common.make_example(drawing.tokenizer, "zero_shot", p, p["solution"]) for p in drawing.problems]
    import dast
    say, common.say, began = common.say, lambda *_: None, time.time()
    new = drawing.run.once("new", lambda to: common.train(
        drawing.run, drawing.model, examples, dast.sft_loss, to, round=1, lr=1e-5, warmup=0, epochs=1, batch_size=8,
        max_tokens=8192, weight_decay=0.0, clip=1.0))
    trained = time.time()
    common.sample(drawing.run, new, drawing.problems[:1], 1, drawing.prompt, round=1, phase="first", style="zero_shot",
                  temperature=0.7, max_new_tokens=1)
    common.say, first, log = say, time.time() - trained, drawing.run.metrics[1, "first"]
    saved = drawing.run.metrics[1, "train"]["save_seconds"]
    on_gpu = torch.cuda.is_available()
    row("P6", f"{saved + first:.1f} s", "<= 10 s" if on_gpu else "(7B)", f"{shape} on {common.processor()}, from the "
        f"last step to the first new token: saving {saved:.1f} s, the engine's new weights "
        f"{log['load_seconds']:.1f} s, its self-test {log['test_seconds']:.1f} s; training {trained - began:.1f} s")


# P7: checking ---------------------------------------------------------------------------------------------------------

def responses(n):
    """{what it is: [(problem, text)]}."""
    import common
    problems = common.load_problems("math", "test", SHARED / "data", n)
    cases = map(json.loads, open(SHARED / "graders" / "cases.jsonl"))
    return {"model outputs": [({"id": c["id"], "answer": c["gold"]}, c["response_or_answer"]) for c in cases
                              if "Qwen2.5-Math" in c["source"]],
            "wrong answers": [(p, q["solution"]) for p, q in zip(problems, problems[1:])],
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
    verdicts = [future.result()[0] for future in ready]  # now all workers that are needed run
    assert not any(verdicts[:6])
    threads = Path("/proc/self/task").iterdir()  # each lists the workers that it has started
    pids = [os.getpid(), *(pid for thread in threads for pid in (thread / "children").read_text().split())]
    began, wall = sum(map(processor_seconds, pids)), time.time()
    verdicts = [future.result()[0] for future in [checker.submit(*pair) for pair in pairs]]
    wall = time.time() - wall
    return verdicts, sum(map(processor_seconds, pids)) - began, wall


def checking():
    """MATH test solutions as responses to their own problem (right) and to the next one (wrong), and model outputs."""
    for what, pairs in responses(2000).items():
        totals, found = [0.0, 0.0], [None, None]
        for _ in range(3):
            for i, way in enumerate((plainly, by_checker)):
                found[i], seconds, _ = alone(way, pairs)
                totals[i] += seconds / 3
        plain, mine = found
        row("P7", f"{totals[0] / totals[1]:.1f}x", ">= 2x", f"{len(pairs):,} {what}: math-verify {totals[0]:.2f} "
            f"processor seconds, ours {totals[1]:.2f}; {sum(p != o for p, o in zip(plain, mine))} verdicts differ")
        for (problem, text), p, o in zip(pairs, plain, mine):
            if p != o:
                print(f"       {problem['id']}: math-verify {p}, ours {o}, gold {problem['answer']!r}")
    pairs = responses(2000)["wrong answers"]
    walls = [alone(by_checker, pairs, workers)[2] for workers in (1, os.cpu_count())]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:  # what this machine's cores give at all
        one = pool.apply(plainly, (pairs,))[1]
        began = time.time()
        pool.map(plainly, [pairs] * os.cpu_count())
        machine = os.cpu_count() * one / (time.time() - began)
    row("P7", f"{walls[0] / walls[1]:.1f}x", "", f"{os.cpu_count()} workers against one, wall time; separate processes "
        f"of plain math-verify get {machine:.1f}x from this machine's {os.cpu_count()} cores")


# P8: the rest of a round; P9: decisions; P10: scale-out ---------------------------------------------------------------

def round_of(folder, script, *flags, processes=1):
    """A real run of a script in a folder, by torchrun; its metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "tests").exists() or (folder / "tests").symlink_to(ROOT / "tests")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--",
               str(ROOT / script), "--toy", "--run", "r", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return [json.loads(line) for line in open(folder / "runs" / "r" / "metrics.jsonl")]


def remainder(shape):
    from gpu_check import model_of
    metrics = round_of(Path(tempfile.mkdtemp()), "dast.py", "--rounds", 1, "--model", model_of(shape), *(
        [] if shape == "toy" else ["--n-train", 64, "--n-test", 32, "--k-probe", 2, "--k-samples", 1]))
    whole = sum(m["seconds"] for m in metrics if m["phase"] == "round")
    drawn = sum(m["seconds"] for m in metrics if "spent_draws" in m)
    trained = [m for m in metrics if m["phase"] == "train"]
    steps = sum(m["seconds"] - m["save_seconds"] for m in trained)
    row("P8", f"{1 - (drawn + steps) / whole:.1%}", "<= 5 %" if shape in ("1.5b", "7b") else "(1.5B)",
        f"{shape}: of {whole:.1f} s of two rounds of dast.py sampling with checking {drawn:.1f} s, training steps "
        f"{steps:.1f} s, saving {sum(m['save_seconds'] for m in trained):.1f} s, the rest "
        f"{whole - sum(m['seconds'] for m in trained) - drawn:.1f} s")


def decisions():
    import selection
    for method in selection.METHODS:
        (quarter, _, _), (seconds, data, added) = (alone(selection.measure, method, n) for n in (250_000, 1_000_000))
        row("P9", f"{seconds:.1f} s", "<= 10 s", f"{method}: 1,000,000 problems decided, {seconds / quarter:.1f} times "
            f"as long as 250,000; {added:.2f} GiB (<= 2) beside {data:.1f} of records and libraries")


def coordination(number, processes, folder, answers=20_000):
    """In one of several processes: seconds of its processor for claims, an adastar log and a gather of answers."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes), "MASTER_PORT": "29517",
                   "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    import common
    common.setup()
    common.gather(0)
    began = processor_seconds(os.getpid())
    mine = list(common.claims(answers))
    log = common.Log()
    for at in range(number, answers // 64, processes):
        log.append([(64 * at + i, 1) for i in range(64)])
        list(log.new())
    common.barrier()
    everything = common.gather([{"id": f"set/train/{i}", "draw": 0, "text": "x" * 500} for i in mine])
    assert sum(map(len, everything)) == answers
    spent = common.gather(processor_seconds(os.getpid()) - began)
    if number == 0:
        Path(folder, str(processes)).write_text(json.dumps(spent))


def scale_out():
    """The first round of dast.py, and what depends on its answers, with 1, 2 and 4 processes."""
    from safetensors.torch import load_file
    folders, small = {}, ("--n-train", 64, "--n-test", 40, "--k-probe", 3, "--rounds", 0)
    for processes in (1, 2, 4):
        folders[processes] = Path(tempfile.mkdtemp())
        round_of(folders[processes], "dast.py", *small, processes=processes)
    for processes in (2, 4):
        one, many = (folders[p] / "runs" / "r" / "round_0" for p in (1, processes))
        same = [(one / name).read_bytes() == (many / name).read_bytes() for name in ("probe.jsonl", "eval_base.json")]
        weights = [load_file(f / "model" / "model.safetensors") for f in (one, many)]
        apart = max(float((b - a).norm() / a.norm()) for a, b in zip(weights[0].values(), weights[1].values()))
        row("P10", "same" if all(same) else "DIFFER", "same", f"answers and scores of {processes} processes and of "
            f"one; weights trained from them differ by {apart:.0e} (1e-4)")
    folder, first = tempfile.mkdtemp(), None
    for processes in (1, 2, 4, 8):
        running = [multiprocessing.get_context("spawn").Process(target=coordination, args=(n, processes, folder))
                   for n in range(processes)]
        [process.start() for process in running]
        [process.join() for process in running]
        spent = json.loads(Path(folder, str(processes)).read_text())
        first = first or max(spent)
        row("P10", f"{max(spent) / first:.1f}x", "", f"processor time of the busiest of {processes} processes to hand "
            f"out 20,000 requests, to tell one another and to collect the answers: {max(spent):.2f} s")


# Where the time goes --------------------------------------------------------------------------------------------------

class Here:
    """In the place of a ThreadPoolExecutor: the profiler sees one thread only."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def profile_of(shape):
    """The five largest items of a round of dast.py, by operation, in one thread."""
    import common
    import runpy
    from torch.profiler import profile
    from gpu_check import model_of
    small = ["--n-train", "100"] if shape == "toy" else ["--n-train", "8", "--n-test", "4", "--k-probe", "1",
                                                         "--k-samples", "1", "--max-new-tokens", "16"]
    os.chdir(tempfile.mkdtemp())
    Path("tests").symlink_to(ROOT / "tests")
    sys.argv = [str(ROOT / "dast.py"), "--toy", "--rounds", "1", "--model", str(model_of(shape)), *small]
    common.threads_per_process, common.ThreadPoolExecutor = lambda: 1, Here
    common.torch.set_num_threads(1)
    with profile(acc_events=True) as profiled, contextlib.redirect_stdout(None):
        runpy.run_path(sys.argv[0], run_name="__main__")
    rows = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    operations = sum(e.self_cpu_time_total for e in rows) / 1e6
    print(f"{shape}: rounds 0 and 1 of dast.py, one thread, {operations:.1f} s in torch's operations")
    for event in rows[:5]:
        print(f"  {event.self_cpu_time_total / 1e6:6.1f} s  {event.self_cpu_time_total / 1e6 / operations:4.0%}  "
              f"{event.count:8,} x {event.key}", flush=True)


# More -----------------------------------------------------------------------------------------------------------------

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


def rewards():
    """The toy's reward model reads 1,600 answers that the toy draws, the toy's solutions and 300 of MATH's."""
    import common
    from transformers import AutoModel
    toy = [json.loads(line) for line in open(TOY / "train.jsonl")]
    math = common.load_problems("math", "test", SHARED / "data", 300)
    run, common.say = open_run(TOY / "model", "hs_star.py", ENGINE="transformers"), lambda *_: None
    tokenizer = common.load_tokenizer(TOY / "model", "")
    drawn = common.sample(run, str(TOY / "model"), [{"id": str(n), "kind": "math", **toy[n]} for n in range(200)], 8,
                          lambda p, d: common.make_prompt(tokenizer, "zero_shot", p), round=0, phase="draw",
                          style="zero_shot", temperature=0.7, max_new_tokens=96)
    prm, plain = common.RewardModel(TOY / "prm"), AutoModel.from_pretrained(TOY / "prm").eval()
    by_id = {p["id"]: p for p in math} | {str(n): {"id": str(n), **p} for n, p in enumerate(toy)}
    solutions = [{"id": p["id"], "text": p["solution"]} for p in by_id.values()]
    for what, responses in {"drawn answers": drawn, "toy solutions": [r for r in solutions if r["id"].isdigit()],
                            "MATH solutions": [r for r in solutions if not r["id"].isdigit()]}.items():
        problems, pairs, found = list(by_id.values()), [(by_id[r["id"]], r["text"]) for r in responses], {}

        def timed(way, turn):
            began = time.time()
            found[way] = padded_loop(prm, plain, pairs) if way == "theirs" else common.step_rewards(
                run, prm, problems, responses, round=turn, phase=what.split()[0])
            return time.time() - began

        medians = race(5, **{way: functools.partial(timed, way) for way in ("theirs", "ours")})
        off = max(abs(a - b) for pair in zip(*found.values(), strict=True) for a, b in zip(*pair, strict=True))
        row("", f"{medians['theirs'] / medians['ours']:.1f}x", "", f"{len(pairs):,} {what}: rewards of steps in padded "
            f"batches of 4 {medians['theirs']:.2f} s, packed {medians['ours']:.2f} s; they differ by {off:.1g}")


def clusters(n=400_000):
    import common
    import numpy as np

    import sai_dpo
    rng, words = np.random.default_rng(0), [p["problem"].split(" ") for p in common.load_problems(
        "math", "train", SHARED / "data")]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="P1 ... P10, profile, rewards, clusters; none: P1 to P10")
    parser.add_argument("--shape", choices=("toy", "0.1b", "1.5b", "7b"), help="1.5b on a GPU, else toy")
    arguments = parser.parse_args()
    import common
    gpu, has_vllm = common.torch.cuda.is_available(), common.importlib.util.find_spec("vllm") is not None
    shape = arguments.shape or ("1.5b" if gpu else "toy")
    sets = (("math", 512),) if gpu else (("math", 64), ("toy", 640))
    pairs = (("math", 512),) if gpu else (("math", 32), ("toy", 320))
    rows = {  # name: (what it needs, if that is not here; what to do)
        "P1": ("" if gpu else "a GPU", lambda: training("P1", "sft", ("sft", "trainer"), ">= 1.3x", shape, sets)),
        "P2": ("a CPU" if gpu else "", lambda: training("P2", "sft", ("trainer", "sft"), ">= 2x", shape, sets)),
        "P3": ("", lambda: training("P3", "dpo", ("dpo",), ">= 1.5x", shape, pairs)),
        "P4": ("" if gpu else "a GPU", lambda: memory(shape)),
        "P5": ("", lambda: [alone(sampling, engine, shots) for engine in
                            ["transformers"] * (not gpu) + ["vllm"] * has_vllm for shots in (0, 4)]),
        "P6": ("" if has_vllm else "vLLM", lambda: alone(switch, shape)),
        "P7": ("", checking), "P8": ("", lambda: remainder(shape)), "P9": ("", decisions), "P10": ("", scale_out),
        "profile": ("", lambda: [alone(profile_of, s) for s in ("toy", "0.1b")]),
        "rewards": ("", rewards), "clusters": ("", clusters)}
    if unknown := {*arguments.rows} - {*rows}:
        parser.error(f"no such row: {', '.join(unknown)}")
    print(f"row     ratio  target    what ({common.processor()}, {os.cpu_count()} cores)", flush=True)
    for name in arguments.rows or [name for name in rows if name[0] == "P"]:
        missing, measure = rows[name]
        row(name, "open", "", f"needs {missing}") if missing else measure()


if __name__ == "__main__":
    main()
