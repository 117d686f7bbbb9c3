"""Everything that needs a GPU to be checked, in two commands of under ten minutes on a machine with one GPU:

  python tests/gpu_check.py                             where requirements.txt is installed
  python tests/gpu_check.py --bundle vllm.tar.xz        where there is no network: an archive of packages to unpack and
                                                        put on the path first (vLLM 0.26.0 and what it needs)
  python tests/gpu_check.py --only train_1.5b,switch_1.5b,train_7b,switch_7b   speed and memory: another ten minutes
  python tests/gpu_check.py --only attention,step       some of the checks
  python tests/gpu_check.py --cpu --only step,updates   how far the checks themselves go without a GPU

Each check is a process of its own with a time limit, so that one that fails does not hide the others. Prints a line and
writes gpu_check/report.json after each ($OUT/report.json where $OUT is set). Status 0 if all passed.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(ROOT))
LIMITS = {"machine": 40, "attention": 35, "step": 65, "updates": 95, "rewards": 30, "toy_dpo": 75, "toy_adastar": 75,
          "toy_hs_star": 75, "toy_sai_dpo": 105, "train_1.5b": 90, "switch_1.5b": 120, "train_7b": 180,
          "switch_7b": 200}  # seconds
SPEED = ("train_1.5b", "switch_1.5b", "train_7b", "switch_7b")  # not done unless asked for


def machine():
    """What is here, and whether vLLM can be imported."""
    from importlib.metadata import version

    import torch
    import transformers
    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__,
             "transformers": transformers.__version__, "python": sys.version.split()[0], "cuda": torch.version.cuda}
    import common  # noqa: F401  on a CPU: vLLM cannot be imported before it has seen to torchvision
    try:
        import vllm
        found["vllm"] = vllm.__version__
    except Exception as error:
        found["vllm"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found | {"passed": not found["vllm"].count(":"), "math-verify": version("math-verify")}


def attention():
    """packed_attention and its gradients, bfloat16 on GPU, against float64 on CPU, sequence by sequence."""
    import common
    import torch
    lengths, heads, kv_heads, size = [1, 7, 130, 64, 513], 14, 2, 64
    total, rng = sum(lengths), torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(1, h, total, size, generator=rng, dtype=torch.float64)
                   for h in (heads, kv_heads, kv_heads, heads))
    reference, parts = [x.clone().requires_grad_() for x in (q, k, v)], []
    for start, length in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths):
        mine = [x[:, :, start:start + length] for x in reference]
        parts.append(torch.nn.functional.scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=True))
    expected = torch.cat(parts, 2).transpose(1, 2)
    expected.backward(up.transpose(1, 2))
    dtype = common.compute_dtype()
    ours = [x.to(common.device(), dtype).requires_grad_() for x in (q, k, v)]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=common.device())
    out, _ = common.packed_attention(None, *ours, None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    out.backward(up.transpose(1, 2).to(common.device(), dtype))
    errors = {name: float((mine.detach().cpu().double() - theirs).norm() / theirs.norm()) for name, mine, theirs in [
        ("out", out, expected.detach()), *((f"d{n}", a.grad, b.grad) for n, a, b in zip("qkv", ours, reference))]}
    return {"relative_error": errors, "passed": max(errors.values()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)}


SHAPES = {  # of Qwen2: hidden size, intermediate size, layers, heads, key-value heads, vocabulary, tied embeddings
    "tagger": (896, 2432, 4, 14, 2, 512, True),  # the toy tokenizer's vocabulary, and another shape
    "0.04b": (896, 2432, 4, 14, 2, 4096, True),
    "0.1b": (768, 3072, 12, 12, 4, 512, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),  # Qwen2.5-1.5B
    "7b": (3584, 18944, 28, 28, 4, 152064, False),  # Qwen2.5-7B
}


def model_of(shape):
    """A folder with a model of random weights in one of SHAPES, in bfloat16 from 1.5b on, with the toy's tokenizer; or
    the toy. Made once."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    folder = TOY / "model" if shape == "toy" else Path(tempfile.gettempdir()) / f"random-{shape}"
    if not folder.exists():
        hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
        torch.manual_seed(0)
        config = Qwen2Config(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                             num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                             tie_word_embeddings=tied, max_position_embeddings=32768)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.set_default_dtype(torch.bfloat16 if vocabulary > 10**5 else torch.float32)
            model = Qwen2ForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        half = folder.with_suffix(f".{os.getpid()}")
        model.save_pretrained(half)
        AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(half)
        half.rename(folder)
    return folder


def step():
    """Loss and gradient of the SFT and the DPO loss on a packed batch, against transformers in float64 on CPU."""
    import common
    import dast
    import torch
    from transformers import AutoModelForCausalLM
    common.setup()
    folder = model_of("0.04b")
    rng = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(4096, (n,), generator=rng).tolist()  # noqa: E731
    pairs = [[(prompt, draw(c)), (prompt, draw(d))] for prompt, c, d in
             [(draw(p), c, d) for p, c, d in [(90, 200, 60), (1, 5, 300), (400, 40, 41), (30, 1, 128)]]]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = [(p, c, plain(torch.tensor([p + c])).logits[0].log_softmax(1)) for pair in pairs for p, c in pair]
    exact = torch.cat([x[range(len(p) - 1, len(p + c) - 1), c] for p, c, x in rows])
    found = {}
    for name, loss in ("sft", dast.sft_loss), ("dpo", dast.dpo_loss):
        network, policy, _ = common.load_for_training(folder)
        batch = common.pack(pairs)
        with torch.no_grad():
            reference = common.sequence_logprobs(policy(batch), batch)
        first = float(loss(policy(batch), batch | {"reference": reference})[0]) / (4 if name == "dpo" else 1)
        offset = torch.linspace(-20, 20, 8)  # some reference that is not the policy
        total, weight, _ = loss(policy(batch), batch | {"reference": reference + offset.to(reference)})
        (total / weight).backward()
        whole = {"counts": batch["counts"], "example": batch["example"], "targets": batch["targets"]}
        plain.zero_grad()
        theirs = common.sequence_logprobs(exact, whole).detach() + offset.double()
        expected, weight, _ = loss(exact, whole | {"reference": theirs})
        (expected / weight).backward(retain_graph=True)
        gradients = {n: p.grad for n, p in plain.named_parameters()}
        mine = {n: p.grad.full_tensor().cpu().double() for n, p in network.named_parameters()}
        distance = sum((mine[n] - g).square().sum() for n, g in gradients.items()).sqrt()
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        found[name] = {"loss": float(total.detach()) / weight, "float64": float(expected.detach()) / weight,
                       "gradient_error": float(distance / norm)}
        if name == "dpo":
            found["dpo"]["first_loss"] = first  # ln 2 = 0.6931472
    errors = [abs(f["loss"] / f["float64"] - 1) for f in found.values()]
    bounds = (1e-2, 5e-2) if common.compute_dtype() == torch.bfloat16 else (1e-5, 1e-4)
    return found | {"passed": max(errors) < bounds[0] and abs(found["dpo"]["first_loss"] - 0.69314718) < 1e-6
                    and max(f["gradient_error"] for f in found.values()) < bounds[1]}


def rewards():
    """The toy's reward model, packed in the GPU's precision, and embeddings (of the toy model), padded in float32,
    against float64 on CPU, answer by answer and text by text."""
    import common
    import torch
    common.setup()
    problems = [json.loads(line) for line in open(TOY / "test.jsonl")][:200]
    prm, found, exact = common.RewardModel(TOY / "prm"), [], []
    rows = [prm.encode(p, p["solution"]) for p in problems]
    prm.load()
    with torch.inference_mode():
        for at in range(0, len(rows), 50):
            found += prm.logits(rows[at:at + 50]).sigmoid().tolist()
        body = common.AutoModel.from_pretrained(TOY / "prm", dtype=torch.float64, attn_implementation="eager").eval()
        head = prm.head.cpu().double()
        for ids, places in rows:
            exact += head["summary"](body(torch.tensor([ids])).last_hidden_state[0, places])[:, 0].sigmoid().tolist()
    errors = [abs(a - b) for a, b in zip(found, exact, strict=True)]
    texts, encoder = [p["problem"] for p in problems], common.AutoModel.from_pretrained(
        TOY / "model", dtype=torch.float64, attn_implementation="eager").eval()
    vectors, far = torch.from_numpy(common.embed(str(TOY / "model"), texts)).double(), []
    with torch.inference_mode():
        for text, vector in zip(texts, vectors):
            ids = torch.tensor([prm.tokenizer(text)["input_ids"]])
            far.append(float((torch.nn.functional.normalize(encoder(ids).last_hidden_state.mean(1)) - vector).norm()))
    return {"steps": len(exact), "mean_error": sum(errors) / len(errors), "max_error": max(errors),
            "embedding_error": max(far), "passed": max(far) < 1e-4
            and max(errors) < (0.2 if common.compute_dtype() == torch.bfloat16 else 1e-5)
            and sum(errors) / len(errors) < (5e-3 if common.compute_dtype() == torch.bfloat16 else 1e-6)}


def run_script(folder, *command):
    """A script in a folder of its own: (status, what it printed, seconds)."""
    began = time.time()
    (folder / "tests").symlink_to(ROOT / "tests")
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    logs = "".join(f.read_text()[-1500:] for f in folder.glob("runs/*/vllm-*.log")) if done.returncode else ""
    return done.returncode, done.stdout + done.stderr + logs, time.time() - began


def updates():
    """The toy through real vLLM: sleep, new weights, the self-test, and three forgotten updates that must be caught."""
    folder = Path(tempfile.mkdtemp())
    status, said, seconds = run_script(folder, ROOT / "tests" / "updates.py", TOY / "model")
    result = next((json.loads(line[7:]) for line in said.splitlines() if line.startswith("RESULT ")), None)
    if result is None:
        return {"passed": False, "status": status, "said": said[-3000:]}
    metrics = [json.loads(line) for line in open(folder / "runs/updates/metrics.jsonl")]
    asleep = [m["asleep_gib"] for m in metrics if "asleep_gib" in m]
    passed = result["caught"] == [1, 1, 1] and result["same"] and result["only_nine"] and max(asleep + [0]) < 8
    return {"passed": passed, "asleep_gib": asleep, "seconds": seconds,
            **{key: result[key] for key in ("caught", "same", "stopped", "only_nine")},
            "engine": [{k: m[k] for k in m if k.endswith("_seconds") or k in ("tensors_equal", "logprob_error")}
                       for m in metrics if m["phase"] in ("before", "after")]}


def toy(script, *flags):
    """A script's `--toy` whole: on a GPU by vLLM in bfloat16, with sleep and new weights in each round. (Dast's round 0
    is SFT, so its DPO tells of both.)"""
    folder = Path(tempfile.mkdtemp())
    status, said, seconds = run_script(folder, ROOT / f"{script}.py", "--toy", *flags)
    if status:
        return {"passed": False, "status": status, "said": said[-3000:]}
    run = folder / "runs" / f"{script}-0"
    scores = {path.parent.name: json.loads(path.read_text())["accuracy"] for path in sorted(run.glob("*/eval.json"))}
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    return {"passed": max(scores) > "round_0" and scores[max(scores)] > scores["round_0"], "accuracy": scores,
            "seconds": seconds,
            "starts": sum("start_seconds" in m for m in metrics),
            "phases": [{k: v for k, v in m.items() if k.endswith("seconds") or k in (
                "round", "phase", "mfu", "tokens", "spent_tokens", "logprob_error", "tensors_equal", "asleep_gib")}
                for m in metrics]}


def toy_with_a_tagger():
    """sai_dpo.py's `--toy` with a tagger of another shape (and no sense): it starts again for a second engine."""
    found = toy("sai_dpo", "--no-own-tags", "--tagger", model_of("tagger"), "--tag-tokens", "8")
    return found | {"passed": found["passed"] and found.get("starts") == 2}


def train_shape(shape, losses=("sft", "dpo")):
    """Three steps of training by common.train at a shape: tokens per second, MFU, peak memory, recomputed blocks. On
    answers (pairs) of 200 to 1,000 random tokens, in micro-batches of 16,384 tokens, all states in float32."""
    import common
    import dast
    import numpy as np
    import torch
    from bench import open_run
    if shape == "7b" and torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 135 * 2**30:
        return {"passed": True, "left_out": "16 bytes for each of 7.6 billion parameters do not fit into this GPU"}
    folder, rng, found = model_of(shape), np.random.default_rng(0), {}
    run, words = open_run(folder, ENGINE="transformers"), list("abcdefghijklmnopqrstuvwxyz ")
    text = lambda: "".join(rng.choice(words, rng.integers(200, 1000)))  # noqa: E731  about a token a letter
    for number, name in enumerate(losses):
        examples = [{"id": str(i), "prompt": "Question: ", "end": "<|endoftext|>",
                     "completions": [text() for _ in range(2 if name == "dpo" else 1)]} for i in range(96)]
        to = Path(tempfile.mkdtemp())
        common.train(run, str(folder), examples, vars(dast)[f"{name}_loss"], to, round=number, lr=1e-5, warmup=0,
                     epochs=1, batch_size=32, max_tokens=16384, weight_decay=0.0, clip=1.0, reference=name == "dpo")
        shutil.rmtree(to)
        shutil.rmtree(run.unfinished, ignore_errors=True)
        log = run.metrics[number, "train"]
        found[name] = {"tokens_per_second": log["tokens"] / (log["seconds"] - log["save_seconds"]), **{
            key: log[key] for key in ("mfu", "peak_gib", "recomputed", "save_seconds", "first_loss", "loss")
            if key in log}}
    return found | {"passed": all(np.isfinite(f["loss"]) for f in found.values())}


def switch_shape(shape):
    """`bench.py P6`: seconds from the last optimizer step to the first new token, the engine's weights proven."""
    import torch
    if shape == "7b" and torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 135 * 2**30:
        return {"passed": True, "left_out": "this GPU is too small to train 7.6 billion parameters"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "P6", "--shape", shape],
                          capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    return {"passed": done.returncode == 0, "row": done.stdout.splitlines()[-1:]}


CHECKS = {"machine": machine, "attention": attention, "step": step, "updates": updates,
          "rewards": rewards, "toy_dpo": lambda: toy("dast", "--loss", "dpo"), "toy_adastar": lambda: toy("adastar"),
          "toy_hs_star": lambda: toy("hs_star"), "toy_sai_dpo": toy_with_a_tagger,
          "train_1.5b": lambda: train_shape("1.5b"), "train_7b": lambda: train_shape("7b", ["sft"]),
          "switch_1.5b": lambda: switch_shape("1.5b"), "switch_7b": lambda: switch_shape("7b")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="an archive of packages, unpacked and put on the path")
    usual = ",".join(name for name in CHECKS if name not in SPEED)
    parser.add_argument("--only", default=usual, help="names of checks, comma-separated")
    parser.add_argument("--cpu", action="store_true", help="without a GPU, which is not what this is for")
    parser.add_argument("--check", choices=CHECKS, help="one check in this process; its result is the last line")
    arguments = parser.parse_args()
    if arguments.check:
        print(json.dumps(CHECKS[arguments.check]()))
        return
    environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if arguments.bundle:
        site = tempfile.mkdtemp()
        shutil.unpack_archive(arguments.bundle, site)
        environment["PYTHONPATH"] = site
    folder = Path(os.environ.get("OUT", ROOT / "gpu_check"))
    folder.mkdir(exist_ok=True)
    report = {}
    for name in arguments.only.split(","):
        if name not in CHECKS:
            parser.error(f"--only {name}: the checks are {', '.join(CHECKS)}")
        began, log = time.time(), folder / f"{name}.log"
        with open(log, "w") as errors:
            check = subprocess.Popen([sys.executable, __file__, "--check", name], cwd=ROOT, stdout=subprocess.PIPE,
                                     stderr=errors, text=True, env=environment, start_new_session=True)
            try:
                said, _ = check.communicate(timeout=LIMITS[name] * (10 if arguments.cpu else 1))
                report[name] = json.loads(said.splitlines()[-1]) if check.returncode == 0 else {"passed": False}
            except subprocess.TimeoutExpired as late:
                os.killpg(check.pid, signal.SIGKILL)  # and what it has started, which may hold the GPU
                report[name] = {"passed": False, "late": late.timeout}
        if not report[name]["passed"]:
            report[name] |= {"status": check.poll(), "log": log.read_text()[-3000:]}
        if name == "machine" and "gpu" in report[name] and not report[name]["gpu"] and not arguments.cpu:
            sys.exit("no GPU here")
        report[name]["wall"] = round(time.time() - began, 1)
        print(f"{'passed' if report[name]['passed'] else 'FAILED'}  {name:<10} {json.dumps(report[name])}", flush=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    sys.exit(not all(check["passed"] for check in report.values()))


if __name__ == "__main__":
    main()
