"""Parts shared by several studies: models of random weights in real shapes, runs opened without a script,
processes and files."""
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(ROOT))

SHAPES = {  # of Qwen2: hidden, intermediate size, layers, heads, key-value heads, vocabulary, tied embeddings
    "0.04b": (896, 2432, 4, 14, 2, 4096, True),
    "0.1b": (768, 3072, 12, 12, 4, 512, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),  # Qwen2.5-1.5B
    "7b": (3584, 18944, 28, 28, 4, 152064, False),  # Qwen2.5-7B
}


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16


def training_figures(run, round):
    """Return the figures of a training in this process: tokens a second, share of the GPU's FLOPs (6 per parameter and
    token) and its peak memory. The first step, a warm-up, counts only if there is no other."""
    import common
    log = run.metrics[round, "train"]
    seconds = [s["seconds"] for s in lines(run.folder / f"round_{round}" / "steps.jsonl")]
    later = seconds[1:] or seconds
    rate = log["tokens"] / len(seconds) / (sum(later) / len(later))
    figures = {"tokens_per_second": rate, "step_seconds": seconds, "seconds": log["seconds"],
               "save_seconds": log["save_seconds"], "first_loss": log["first_loss"], "loss": log["loss"]}
    parameters = log["flops"] / (6 * log["tokens"] + 2 * log["reference_tokens"])
    for name, peak in PEAK_FLOPS.items():
        if name in common.processor():
            figures |= {"mfu": 6 * parameters * rate / peak, "peak_gib": log["peak_gib"]}
    return figures


def model_of(shape):
    """Return a folder with a model of random weights in one of SHAPES, in bfloat16 from 1.5b on, with the toy's
    tokenizer; or the toy. It is made once."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    if shape == "toy":
        return TOY / "model"
    folder = Path(tempfile.gettempdir()) / f"random-{shape}"
    if folder.exists():
        return folder
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                         tie_word_embeddings=tied, max_position_embeddings=32768)
    if vocabulary > 10**5:
        torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    half = folder.with_suffix(f".{os.getpid()}")
    model.save_pretrained(half)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(half)
    half.rename(folder)
    return folder


def lines(path):
    """Return the records of a .jsonl file."""
    return [json.loads(line) for line in open(path)]


def family(pid):
    """Return a process and all its descendants, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def quiet():
    """Return a context that hides what the product prints."""
    return contextlib.redirect_stdout(io.StringIO())


def open_run(model, **constants):
    """Open a run folder as dast.py does, in a temporary folder, silently; only one in a process."""
    import common
    import dast
    os.chdir(tempfile.mkdtemp())
    with quiet():
        return common.start_run({**vars(dast), "MODEL": str(model), "NAME": "study", **constants})
