"""Every check that needs a GPU, in three commands of under ten minutes each on a machine with a GPU:

  python tests/studies/gpu_check.py --only machine,attention,step,rewards,updates
  python tests/studies/gpu_check.py --only toy_dast,toy_adastar,toy_hs_star,toy_sai_dpo
  python tests/studies/gpu_check.py --only train_1.5b,switch_1.5b,smollm2

then --only compile_1.5b, and on a GPU of 141 GB --only train_7b,switch_7b. More flags:

  --bundle vllm.tar.xz   if there is no network: an archive of packages to unpack and put on the path first
  --smollm2 FOLDER       the output of tests/studies/real_model.py [runs/real] (else smollm2 is left out)
  --cpu                  see how far the checks themselves get without a GPU (with vLLM's CPU build)

Each check is a separate process with a time limit, so that one that fails does not hide the others. Prints a line
and writes gpu_check/report.json after each ($OUT/report.json if $OUT is set). Output of passed checks goes to
passed.log, that of each other check to its own file. Status 0 if all passed."""
import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pieces import ROOT, TOY, lines, model_of, open_run, training_figures

LIMITS = {"machine": 40, "attention": 40, "step": 80, "rewards": 80, "updates": 240,
          "toy_dast": 140, "toy_adastar": 120, "toy_hs_star": 130, "toy_sai_dpo": 130,
          "train_1.5b": 170, "switch_1.5b": 170, "smollm2": 200, "train_7b": 260, "switch_7b": 280,
          "compile_1.5b": 240}  # seconds
COMMAND_SECONDS = 540  # all limits of one command together


def on_gpu():
    import common
    return common.device().type == "cuda"


def machine():
    """Report what is here, and whether vLLM can be imported."""
    from importlib.metadata import version

    import torch
    import transformers
    import common  # on a CPU, vLLM cannot be imported before common has dealt with torchvision
    found = {"gpu": None, "processor": common.processor(), "torch": torch.__version__,
             "cuda": torch.version.cuda, "python": sys.version.split()[0],
             "transformers": transformers.__version__, "math-verify": version("math-verify")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gib"] = round(torch.cuda.mem_get_info()[1] / 2**30)
    try:
        import vllm
    except Exception as error:
        return found | {"passed": False, "vllm": f"{type(error).__name__}: {str(error)[:300]}"}
    return found | {"passed": True, "vllm": vllm.__version__}


def attention():
    """Compare packed_attention and its gradients, bfloat16 on GPU, with float64 on CPU, sequence by sequence."""
    import common
    import torch
    lengths = [1, 7, 130, 64, 513]
    heads, kv_heads, size = 14, 2, 64
    rng = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), size) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, up = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    parts = []
    start = 0
    for length in lengths:
        mine = [x[:, :, start:start + length] for x in exact]
        parts.append(torch.nn.functional.scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=True))
        start += length
    expected = torch.cat(parts, 2).transpose(1, 2)
    expected.backward(up.transpose(1, 2))
    dtype = common.compute_dtype()
    ours = [x.to(common.device(), dtype).requires_grad_() for x in (q, k, v)]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=common.device())
    out, _ = common.packed_attention(None, *ours, None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    out.backward(up.transpose(1, 2).to(common.device(), dtype))
    pairs = {"out": (out, expected)}
    for name, mine, theirs in zip(("dq", "dk", "dv"), ours, exact):
        pairs[name] = (mine.grad, theirs.grad)
    errors = {}
    for name, (mine, theirs) in pairs.items():
        errors[name] = float((mine.detach().cpu().double() - theirs.detach()).norm() / theirs.detach().norm())
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    return {"relative_error": errors, "passed": max(errors.values()) < bound}


def random_pairs(rng):
    """Return tokenized pairs of completions of random tokens, short and long."""
    import torch

    def tokens(n):
        return torch.randint(4096, (n,), generator=rng).tolist()

    pairs = []
    for prompt_size, chosen, rejected in ((90, 200, 60), (1, 5, 300), (400, 40, 41), (30, 1, 128)):
        prompt = tokens(prompt_size)
        pairs.append([(prompt, tokens(chosen)), (prompt, tokens(rejected))])
    return pairs


def step():
    """Compare loss and gradient of the SFT and the DPO loss on a packed batch with transformers in float64 on CPU."""
    import common
    import dast
    import torch
    from transformers import AutoModelForCausalLM
    folder = model_of("0.04b")
    run = open_run(folder, ENGINE="transformers")
    pairs = random_pairs(torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = []
    for pair in pairs:
        for prompt, completion in pair:
            logprobs = plain(torch.tensor([prompt + completion])).logits[0].log_softmax(1)
            places = range(len(prompt) - 1, len(prompt + completion) - 1)
            rows.append(logprobs[places, completion])
    exact = torch.cat(rows)
    bfloat16 = common.compute_dtype() == torch.bfloat16
    loss_bound, gradient_bound = (1e-2, 5e-2) if bfloat16 else (1e-5, 1e-4)
    found = {}
    passed = True
    for name, loss in (("sft", dast.sft_loss), ("dpo", dast.dpo_loss)):
        network, policy = common.load_for_training(run, str(folder))
        batch = common.pack(pairs)
        with torch.no_grad():
            reference = common.sequence_logprobs(policy(batch), batch)
        first, weight, _ = loss(policy(batch), batch | {"reference": reference})
        offset = torch.linspace(-20, 20, 8)  # a reference that is not the policy
        total, weight, _ = loss(policy(batch), batch | {"reference": reference + offset.to(reference)})
        (total / weight).backward()
        theirs = common.sequence_logprobs(exact, batch).detach() + offset.double()
        expected, weight, _ = loss(exact, batch | {"reference": theirs})
        plain.zero_grad()
        (expected / weight).backward(retain_graph=True)
        mine = {n: common.whole(p.grad).cpu().double() for n, p in network.named_parameters()}
        distance = 0.0
        norm = 0.0
        for parameter, tensor in plain.named_parameters():
            distance += float((mine[parameter] - tensor.grad).square().sum())
            norm += float(tensor.grad.square().sum())
        found[name] = {"loss": float(total.detach()) / weight, "float64": float(expected.detach()) / weight,
                       "first_loss": float(first.detach()) / weight,
                       "gradient_error": math.sqrt(distance / norm)}
        error = abs(found[name]["loss"] / found[name]["float64"] - 1)
        passed = passed and error < loss_bound and found[name]["gradient_error"] < gradient_bound
    return found | {"passed": passed and abs(found["dpo"]["first_loss"] - math.log(2)) < 1e-6}


def rewards():
    """Compare the toy's reward model, packed in the GPU's precision, and embeddings (of the toy model), padded in
    float32, with float64 on CPU, answer by answer and text by text."""
    import common
    import hs_star
    import sai_dpo
    import torch
    from transformers import AutoModel
    common.setup()
    problems = [{"id": str(i), **p} for i, p in enumerate(lines(TOY / "test.jsonl")[:200])]
    by_id = {p["id"]: p for p in problems}
    answers = [{"id": p["id"], "text": p["solution"]} for p in problems]
    prm = hs_star.RewardModel(str(TOY / "prm"))
    prm.load()
    found = []
    for at in range(0, len(answers), 50):
        found += [steps for _, steps in prm.read(by_id, answers[at:at + 50])]
    body = AutoModel.from_pretrained(TOY / "prm", dtype=torch.float64, attn_implementation="eager").eval()
    head = prm.head.cpu().double()
    errors = []
    for problem, steps in zip(problems, found, strict=True):
        ids, places = prm.encode(problem, problem["solution"])
        with torch.inference_mode():
            exact = head(body(torch.tensor([ids])).last_hidden_state[0, places])[:, -1].tolist()
        errors += [abs(a - b) for a, b in zip(steps, exact, strict=True)]
    encoder = AutoModel.from_pretrained(TOY / "model", dtype=torch.float64,
                                        attn_implementation="eager").eval()
    tokenizer = common.load_tokenizer(str(TOY / "model"), "")
    vectors = torch.from_numpy(sai_dpo.embed(str(TOY / "model"), [p["problem"] for p in problems])).double()
    far = 0.0
    for problem, vector in zip(problems, vectors):
        with torch.inference_mode():
            hidden = encoder(torch.tensor([tokenizer(problem["problem"])["input_ids"]])).last_hidden_state
        far = max(far, float((torch.nn.functional.normalize(hidden.mean(1)) - vector).norm()))
    mean = sum(errors) / len(errors)
    most, average = (0.2, 5e-3) if on_gpu() else (1e-5, 1e-6)
    return {"steps": len(errors), "mean_error": mean, "max_error": max(errors), "embedding_error": far,
            "passed": far < 1e-4 and max(errors) < most and mean < average}


def run_script(folder, *command):
    """Run a script in the given folder: (status, what it printed, seconds)."""
    began = time.time()
    (folder / "tests").symlink_to(ROOT / "tests")
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    said = done.stdout + done.stderr
    if done.returncode:
        for log in (*folder.glob("runs/*/error.log"), *folder.glob("error.log")):
            said += log.read_text()[-2000:]
    return done.returncode, said, time.time() - began


def engine_figures(metrics):
    """Return the figures of the engine and its self-test in the metrics of the phases that loaded a model."""
    figures = []
    for m in metrics:
        if "load_seconds" in m:
            names = [name for name in m if name in ("phase", "load_seconds", "tensors_equal")
                     or "logprob" in name]
            figures.append({name: m[name] for name in names})
    return figures


def updates():
    """Run the toy through real vLLM: sleep, new weights, the self-test, and three forgotten updates that must be
    caught."""
    folder = Path(tempfile.mkdtemp())
    status, said, seconds = run_script(folder, ROOT / "tests" / "studies" / "updates.py", TOY / "model")
    results = [line[7:] for line in said.splitlines() if line.startswith("RESULT ")]
    if not results:
        return {"passed": False, "status": status, "said": said[-3000:]}
    result = json.loads(results[0])
    metrics = lines(folder / "runs/updates/metrics.jsonl")
    asleep = [m["asleep_gib"] for m in metrics if "asleep_gib" in m]
    alike = result["same_as_transformers"] == 1 or on_gpu()  # in bfloat16 a token may differ
    passed = result["caught"] == [1, 1, 1] and result["only_nine"] and alike and max(asleep, default=0) < 8
    return {"passed": passed, **result, "asleep_gib": asleep, "seconds": seconds,
            "engine": engine_figures(metrics)}


def toy(script, *flags):
    """Run a script's whole `--toy`: on a GPU with vLLM in bfloat16, with sleep and new weights in each round."""
    folder = Path(tempfile.mkdtemp())
    status, said, seconds = run_script(folder, ROOT / f"{script}.py", "--toy", "--name", "toy", *flags)
    if status:
        return {"passed": False, "status": status, "said": said[-3000:]}
    run = folder / "runs" / "toy"
    scores = {}
    for path in sorted(run.glob("*/eval.json")):
        scores[path.parent.name] = json.loads(path.read_text())["accuracy"]
    metrics = lines(run / "metrics.jsonl")
    phases = []
    for m in metrics:
        phases.append({name: m[name] for name in m if name.endswith("seconds") or name in (
            "round", "phase", "mfu", "peak_gib", "tokens", "spent_tokens", "asleep_gib")})
    return {"passed": scores[max(scores)] > scores[min(scores)], "accuracy": scores, "seconds": seconds,
            "engine": engine_figures(metrics), "phases": phases}


def too_small(shape):
    """Whether this GPU cannot hold the training of a shape: 16 bytes for each of 7.6 billion parameters."""
    import torch
    return shape == "7b" and on_gpu() and torch.cuda.mem_get_info()[1] < 135 * 2**30


def train_shape(shape, cases):
    """Train three steps at a shape with common.train: tokens per second, MFU, peak memory. On answers (pairs) of 200 to
    1,000 random tokens. cases: (loss, constants). Without a GPU, one step of a small model."""
    import common
    import dast
    import numpy as np
    import torch
    if too_small(shape):
        return {"passed": True, "left_out": "this GPU is too small"}
    folder = model_of(shape if on_gpu() else "0.04b")
    rng = np.random.default_rng(0)
    run = open_run(folder, ENGINE="transformers")
    letters = list("abcdefghijklmnopqrstuvwxyz ")  # about a token each
    found = {}
    for number, (loss, constants) in enumerate(cases):
        examples = []
        for i in range(96 if on_gpu() else 8):
            sizes = rng.integers(200, 1000, 2 if loss == "dpo" else 1)
            completions = ["".join(rng.choice(letters, size)) for size in sizes]
            examples.append({"id": str(i), "prompt": "Question: ", "end": "<|endoftext|>",
                             "completions": completions, "ids": [None] * len(completions)})
        run.constants |= {"RECOMPUTE": False, "COMPILE": False, "LORA_RANK": 0, **constants}
        (run.folder / "max_tokens_1.json").unlink(missing_ok=True)
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        common.train(run, f"round_{number}/model", str(folder), examples, vars(dast)[f"{loss}_loss"], lr=1e-5,
                     warmup=0, epochs=1, batch_size=32, weight_decay=0.0, clip=1.0, reference=loss == "dpo",
                     lora_rank=run.constants["LORA_RANK"], lora_alpha=32)
        found[f"{loss} {constants}"] = training_figures(run, number)
        shutil.rmtree(run.folder / f"round_{number}")
        print(json.dumps(found), file=sys.stderr)
    return found | {"passed": all(np.isfinite(of_case["loss"]) for of_case in found.values())}


def switch_shape(shape):
    """Run `bench.py P6`: seconds from the last optimizer step to the first new token, with the engine's weights
    verified."""
    if too_small(shape):
        return {"passed": True, "left_out": "this GPU is too small"}
    bench = ROOT / "tests" / "studies" / "bench.py"
    done = subprocess.run([sys.executable, str(bench), "P6", "--shape", shape], capture_output=True,
                          text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    return {"passed": done.returncode == 0 and "open" not in done.stdout,
            "row": done.stdout.splitlines()[-1:]}


def kept_in_bfloat16(before, after):
    """Return the share of an update's norm that is left if both models are rounded to bfloat16."""
    from safetensors.torch import load_file
    start = load_file(Path(before) / "model.safetensors")
    end = load_file(Path(after) / "model.safetensors")
    whole = 0.0
    kept = 0.0
    for name, tensor in end.items():
        old = start[name].float()
        whole += float((tensor.float() - old).square().sum())
        kept += float((tensor.bfloat16().float() - old.bfloat16().float()).square().sum())
    return {"update": math.sqrt(whole), "kept_in_bfloat16": math.sqrt(kept / whole),
            "dtype": str(tensor.dtype)}


def smollm2():
    """Check a real model of 135M parameters in bfloat16: the self-test's figures after training, and how much of an
    update at DPO's learning rate would be lost if models were saved in bfloat16."""
    import common
    import dast
    folder = Path(os.environ["SMOLLM2"])
    if not (folder / "bfloat16").exists():
        return {"passed": True, "left_out": f"no {folder}/bfloat16 (tests/studies/real_model.py, --smollm2)"}
    base = str(folder / "bfloat16")
    run = open_run(base, ENGINE="vllm", EAGER=True, GPU_MEMORY=0.5, MAX_TOKENS=8192)
    problems = common.load_problems(str(folder / "train.jsonl"), "train", "")[:32]
    tokenizer = common.load_tokenizer(base, "chat")
    examples = [common.make_example(tokenizer, "chat", p, f"The answer is {p['answer']}.") for p in problems]

    def prompt(problem, draw):
        return common.make_prompt(tokenizer, "chat", problem)

    def correct(name, model):
        responses = common.sample(run, f"round_0/{name}.jsonl", model, problems, 1, prompt, style="chat",
                                  temperature=0.0, max_new_tokens=64)
        return sum(r["correct"] for r in responses)

    found = {"base": {"correct": correct("base", base)}}
    for number, lr in ((1, 5e-7), (2, 1e-5)):
        model = common.train(run, f"round_{number}/model", base, examples, dast.sft_loss, lr=lr, warmup=0,
                             epochs=1, batch_size=8, weight_decay=0.0, clip=1.0)
        found[f"lr {lr}"] = {"correct": correct(f"after_{number}", model), **kept_in_bfloat16(base, model)}
    figures = engine_figures(run.metrics.values())
    return found | {"problems": len(problems), "engine": figures, "passed": len(figures) == 3}


def train_1_5b():
    return train_shape("1.5b", [
        ("sft", {"MAX_TOKENS": 8192}), ("sft", {"MAX_TOKENS": 16384, "RECOMPUTE": True}),
        ("dpo", {"MAX_TOKENS": 8192}), ("sft", {"MAX_TOKENS": 8192, "LORA_RANK": 32})])


def compile_1_5b():
    return train_shape("1.5b", [("sft", {"MAX_TOKENS": 8192, "COMPILE": True})])


def train_7b():
    return train_shape("7b", [("sft", {"MAX_TOKENS": 8192, "RECOMPUTE": True}),
                              ("sft", {"MAX_TOKENS": 8192, "LORA_RANK": 32})])


CHECKS = {"machine": machine, "attention": attention, "step": step, "rewards": rewards, "updates": updates,
          "toy_dast": lambda: toy("dast", "--loss", "dpo"),  # its round 0 is SFT, so it covers both
          "toy_adastar": lambda: toy("adastar"), "toy_hs_star": lambda: toy("hs_star"),
          "toy_sai_dpo": lambda: toy("sai_dpo"), "train_1.5b": train_1_5b, "train_7b": train_7b,
          "compile_1.5b": compile_1_5b, "smollm2": smollm2,
          "switch_1.5b": lambda: switch_shape("1.5b"), "switch_7b": lambda: switch_shape("7b")}


def one_check(name, limit, environment, folder):
    """Run a check in its own process; return what it found. Its log goes to passed.log, or to its own file."""
    log = folder / f"{name}.log"
    with open(log, "w") as errors:
        check = subprocess.Popen([sys.executable, __file__, "--check", name], cwd=ROOT,
                                 stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                                 start_new_session=True)
        try:
            said, _ = check.communicate(timeout=limit)
            found = json.loads(said.splitlines()[-1]) if check.returncode == 0 else {"passed": False}
        except subprocess.TimeoutExpired:
            os.killpg(check.pid, signal.SIGKILL)  # and its child processes, which may hold the GPU
            found = {"passed": False, "late": limit}
    text = log.read_text(errors="replace")
    if not found["passed"]:
        return found | {"status": check.poll(), "log": text[-3000:]}
    with open(folder / "passed.log", "a") as passed:
        passed.write(f"== {name}\n{text}\n")
    log.unlink()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of checks, comma-separated")
    parser.add_argument("--bundle", help="an archive of packages, unpacked and put on the path")
    parser.add_argument("--smollm2", default=ROOT / "runs" / "real")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)  # one check in this process
    arguments = parser.parse_args()
    if arguments.check:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is not a result
        print(json.dumps(CHECKS[arguments.check]()), file=out, flush=True)
        os._exit(0)  # an engine's finalizers may abort
    names = (arguments.only or "").split(",")
    for name in names:
        if name not in CHECKS:
            parser.error(f"--only {name}: the checks are {', '.join(CHECKS)}")
    seconds = sum(LIMITS[name] for name in names)
    if seconds > COMMAND_SECONDS and not arguments.cpu:
        parser.error(f"these may take {seconds} s, and a command has {COMMAND_SECONDS}; use two")
    environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "SMOLLM2": str(Path(arguments.smollm2).resolve())}
    if arguments.bundle:
        site = tempfile.mkdtemp()
        shutil.unpack_archive(arguments.bundle, site)
        environment["PYTHONPATH"] = site
    folder = Path(os.environ.get("OUT", ROOT / "gpu_check"))
    folder.mkdir(exist_ok=True)
    report = {}
    for name in names:
        began = time.time()
        report[name] = one_check(name, LIMITS[name] * (10 if arguments.cpu else 1), environment, folder)
        report[name]["wall"] = round(time.time() - began, 1)
        print(f"{'passed' if report[name]['passed'] else 'FAILED'}  {name:<12} {json.dumps(report[name])}",
              flush=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        if name == "machine" and not report[name].get("gpu") and not arguments.cpu:
            sys.exit("no GPU here (--cpu runs the checks without one)")
    sys.exit(not all(check["passed"] for check in report.values()))


if __name__ == "__main__":
    main()
