"""Make the toy: a tiny Qwen2 that can do a little arithmetic in words, and the problems it has yet to learn.

The world. A problem is a chain of 1 to 6 operations on a number ("level" is how many), of one of five families (its
"tags"). A solution can be written in four ways, and a base model has seen all of them:
  careful  "12+7=19", a blank line, "19-5=14", ...   one operation a line
  named    "Go up by 7: 19", ...                     one operation a line, but the number must be looked up above
  brisk    "12+7-5=14", ...                          two operations a line: shorter, and more often wrong
  bare     only "\\boxed{14}"                         hopeless on long chains
It has also seen slips (a wrong line, and all that follows from it), few long chains, and hardly any remainders. So
there is something to learn from one's own checked answers: to write every operation down, to slip less, to go on for
longer. Documents are plain text with 0-4 worked examples before the last question, chats, and questions with the answer
as a hint; an author keeps to one way of writing, so the model copies the manner of its examples.

  python tests/toy/make.py            writes tests/toy/{model,train.jsonl,test.jsonl,deep.json}

Figures in README hang on these files: they are not made again without a reason that is worth measuring everything anew.
"""
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from common import make_example, make_prompt, override_from_cli, sample, say, start_run, train, write  # noqa
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa

# What to make
MODEL = ""  # a folder to go on from; empty is a new model with random weights
TRAIN_PROBLEMS = 1800  # for the methods to learn from
TEST_PROBLEMS = 600  # 100 of each level
DEPTHS = (30.0, 25.0, 15.0, 5.0, 0.6, 0.15)  # how often the base model saw chains of length 1..6
STYLES = (30, 12, 23, 35)  # how often it saw careful, named, brisk and bare solutions
LONG_STYLES = (8, 7, 40, 45)  # the same for chains of 4 and more: the longer, the lazier
WEAK = 0.02  # share of its problems that are remainders (an even share would be 0.2)
SLIP = 0.02  # chance that a line it saw is wrong

# Training
STEPS = 3000  # optimizer steps
BATCH_SIZE = 32  # documents a step
LR = 2.5e-3  # peak, cosine to 0
SEED = 0  # of everything

# Machine: may differ when a run goes on
RUN = "toy"  # name of the run folder
ENGINE = ""  # "" | "vllm" | "transformers": what samples
GRADER = ""  # a grader other than math-verify
SAVE_MINUTES = 30.0  # between saves inside the training
MAX_TOKENS = 8192  # tokens of a micro-batch
WANDB = False  # log to Weights & Biases too

# the words of each operation, its sign in an equation, and what it does
OPERATIONS = {
    "add": (["Add {}.", "Go up by {}."], "+{}", lambda x, n: x + n),
    "take": (["Take away {}.", "Go down by {}."], "-{}", lambda x, n: x - n),
    "times": (["Multiply by {}.", "Make it {} times as big."], "*{}", lambda x, n: x * n),
    "digits": (["Add up its digits.", "Sum its digits."], " digits", lambda x, n: sum(map(int, str(abs(x))))),
    "swap": (["Swap its digits.", "Turn its digits round."], " swap", lambda x, n: int(str(abs(x))[::-1])),
    "remainder": (["Keep the remainder by {}.", "Divide by {} and keep the rest."], " mod {}", lambda x, n: x % n),
}
FAMILIES = {"sums": "add", "multiples": "times", "digit sums": "digits", "swaps": "swap", "remainders": "remainder"}
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def operand(name, rng):
    return {"add": (2, 12), "take": (2, 12), "times": (2, 3), "remainder": (3, 7)}.get(name, (0, 0))


def make_problem(depth, family, rng):
    """{problem, answer, level, tags}, and for its solutions (start, [(wording, sign, function, operand)])."""
    while True:
        start = x = rng.randint(3, 60)
        special = FAMILIES[family]
        names = [special if rng.random() < 0.5 else rng.choice(["add", "take"]) for _ in range(depth)]
        names[rng.randrange(depth)] = special
        chain = []
        for name in names:
            words, sign, does = OPERATIONS[name]
            n = rng.randint(*operand(name, rng))
            x = does(x, n)
            chain.append((rng.choice(words).format(n), sign.format(n), does, n))
            if not 0 <= x <= 99:
                break
        else:
            begin = rng.choice(["Start with {}.", "Take the number {}.", "Begin at {}."]).format(start)
            text = " ".join([begin, *(c[0] for c in chain), "What do you get?"])
            return {"problem": text, "answer": str(x), "level": depth, "tags": [family]}, (start, chain)


def write_solution(start, chain, style, rng, slip=0.0):
    """A worked solution in one of the four ways; each line is wrong with chance `slip`, and the rest follows."""
    x, lines = start, []
    step = 2 if style == "brisk" else 1
    for at in range(0, len(chain), step):
        before, part = x, chain[at:at + step]
        for _, _, does, n in part:
            x = does(x, n)
        if style != "bare" and rng.random() < slip:
            x = max(0, x + rng.choice([-10, -2, -1, 1, 2, 10]))
        if style == "named":
            lines.append(f"{part[0][0][:-1]}: {x}")
        elif style != "bare":
            lines.append(f"{before}{''.join(c[1] for c in part)}={x}")
    return "\n\n".join([*lines, f"\\boxed{{{x}}}"])


def problem_set(count, seen, rng, shortest=1, longest=6):
    """`count` problems, as many of each level, none of them in `seen`; the solutions are by people, who do not slip and
    who write more of their work down the longer it is."""
    records = []
    while len(records) < count:
        depth = shortest + len(records) % (longest - shortest + 1)
        family = rng.choice(list(FAMILIES))
        problem, (start, chain) = make_problem(depth, family, rng)
        if problem["problem"] in seen:
            continue
        seen.add(problem["problem"])
        careful = 0.1 + 0.1 * depth
        style = rng.choices(["careful", "named", "brisk"], [careful * 0.7, careful * 0.3, 1 - careful])[0]
        records.append({**problem, "solution": write_solution(start, chain, style, rng)})
    return records


def deep_set():
    """120 problems of 7 and 8 operations, longer than any other: does what is learnt carry over?"""
    return problem_set(120, set(), random.Random(7), 7, 8)


def author_of(rng, bare):
    """How somebody writes (short chains, long chains): each in one of the four ways, never bare if `bare` is 0."""
    return [rng.choices(["careful", "named", "brisk", "bare"], [*weights[:3], weights[3] * bare])[0]
            for weights in (STYLES, LONG_STYLES)]


def document(tokenizer, seen, rng):
    """One training document of the base model, as an example of common.py's trainer."""
    shots, kind = rng.choices(range(5), [35, 20, 20, 15, 10])[0], rng.choices(["plain", "chat", "hint"], [77, 15, 8])[0]
    bare = 0 if kind == "hint" else 1  # who knows the answer shows the way
    author, turns = author_of(rng, bare), []
    while len(turns) <= (min(shots, 2) if kind == "chat" else shots):
        family = "remainders" if rng.random() < WEAK else rng.choice([f for f in FAMILIES if f != "remainders"])
        problem, (start, chain) = make_problem(rng.choices(range(1, 7), DEPTHS)[0], family, rng)
        if problem["problem"] in seen:
            continue
        if rng.random() < 0.1:
            author = author_of(rng, bare)  # people change now and then
        if kind == "hint":
            problem["problem"] += f" (Answer: {problem['answer']})"
        solution = write_solution(start, chain, author[problem["level"] >= 4], rng, SLIP)
        turns.append({**problem, "id": "", "solution": solution})
    if kind == "chat":
        system = SYSTEM if rng.random() < 0.5 else ""
        return {**make_example(tokenizer, "chat", turns[-1], turns[-1]["solution"]),
                "prompt": make_prompt(tokenizer, "chat", turns[-1], turns[:-1], system)}
    text = make_prompt(tokenizer, "few_shot", turns[-1], turns[:-1]) + turns[-1]["solution"]
    return {"id": "", "prompt": "", "completions": [text], "ids": [None], "end": tokenizer.eos_token}


def make_tokenizer(folder, texts):
    """A byte-level BPE with Qwen2's rules: digits stay single, the toy's own words become one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=specials, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def new_model(folder, texts):
    make_tokenizer(folder, texts)
    torch.manual_seed(SEED)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=8192, initializer_range=0.05,
        eos_token_id=0, bos_token_id=None, pad_token_id=0)).save_pretrained(folder)


def lm_loss(logprobs, batch):
    """Mean negative log-likelihood of all tokens."""
    return -logprobs.sum(), len(logprobs), {}


def report(run, model, problems, tokenizer, pool):
    """Accuracy by level and on remainders, by kind of prompt, greedy and drawn; how many answers are worked out."""
    rng = random.Random(1)
    shots = {p["id"]: rng.sample(pool, 2) for p in problems}
    prompts = {"two-shot": lambda p, d: make_prompt(tokenizer, "few_shot", p, shots[p["id"]]),
               "zero-shot": lambda p, d: make_prompt(tokenizer, "zero_shot", p),
               "chat": lambda p, d: make_prompt(tokenizer, "chat", p, system=SYSTEM)}
    for name, prompt in prompts.items():
        for temperature in (0.0, 0.7):
            style = "chat" if name == "chat" else "few_shot"
            answers = sample(run, model, problems, 1, prompt, round=1, phase=f"{name} {temperature}", style=style,
                             max_new_tokens=120, temperature=temperature)
            marks = [(p["level"], p["tags"][0], a["correct"]) for p, a in zip(problems, answers)]
            groups = {str(level): [c for n, _, c in marks if n == level] for level in range(1, 7)}
            groups |= {"all": [c for _, _, c in marks], "remainders": [c for _, tag, c in marks if tag == "remainders"],
                       "worked out": ["\n\n" in a["text"] for a in answers]}
            say(f"{name} at {temperature}: " + "  ".join(f"{key} {sum(c) / len(c):.2f}" for key, c in groups.items()))


def main():
    run = start_run(globals())
    rng, seen = random.Random(SEED), set()
    test, pool = problem_set(TEST_PROBLEMS, seen, rng), problem_set(TRAIN_PROBLEMS, seen, rng)
    plain = [make_problem(random.Random(i).randint(1, 6), list(FAMILIES)[i % 5], random.Random(i)) for i in range(3000)]
    texts = [f"Question: {p['problem']} (Answer: {p['answer']})\nAnswer:\n"
             + write_solution(*c, ["careful", "named", "brisk", "bare"][i % 4], rng) + "\n\n"
             for i, (p, c) in enumerate(plain)] + [SYSTEM, "system\nuser\nassistant\n"] * 500
    model = MODEL or run.once("round_0/model", lambda folder: new_model(folder, texts))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    documents = [document(tokenizer, seen, rng) for _ in range(STEPS * BATCH_SIZE)]
    say(f"{len(tokenizer)} tokens; first document:\n{documents[0]['prompt']}{documents[0]['completions'][0]}")
    model = run.once("round_1/model", lambda folder: train(
        run, model, documents, lm_loss, folder, round=1, lr=LR, warmup=0.05, epochs=1, batch_size=BATCH_SIZE,
        max_tokens=MAX_TOKENS, weight_decay=0.0, clip=1.0))
    report(run, model, [{**p, "id": str(i), "kind": "math"} for i, p in enumerate(test)], tokenizer, pool)
    if RUN == "toy":
        shutil.copytree(model, HERE / "model", dirs_exist_ok=True)
        write(HERE / "train.jsonl", pool)
        write(HERE / "test.jsonl", test)
        write(HERE / "deep.json", deep_set())


if __name__ == "__main__":
    override_from_cli(globals())
    main()
