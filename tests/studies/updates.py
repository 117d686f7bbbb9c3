"""The engine before and after training, and with forgotten updates, with real vLLM, for gpu_check.py.

  python tests/studies/updates.py MODEL        in an empty folder; prints one line, RESULT and JSON
  python tests/studies/updates.py MODEL 20     20 healthy updates at 5e-7 in a row, then a forgotten one

A forgotten update is vLLM's own: it is told to load new weights but loads the old ones again."""
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dast  # noqa: E402

MODEL = sys.argv[1]
run = common.start_run({**vars(dast), "MODEL": MODEL, "NAME": "updates", "ENGINE": "vllm", "EAGER": True,
                        "GPU_MEMORY": 0.5})
problems = common.load_problems(str(ROOT / "tests/toy/train.jsonl"), "train", "")[:6]
tokenizer = common.load_tokenizer(MODEL, "zero_shot")
examples = [common.make_example(tokenizer, "zero_shot", p, p["solution"]) for p in problems]


def prompt(problem, draw):
    return common.make_prompt(tokenizer, "zero_shot", problem)


def draw(name, model, draws=2, temperature=0.7, enough=None):
    return common.sample(run, f"round_0/{name}.jsonl", model, problems, draws, prompt, enough,
                         style="zero_shot", temperature=temperature, max_new_tokens=24)


def train(name, start, lr, epochs=2):
    return common.train(run, f"round_0/{name}", start, examples, dast.sft_loss, lr=lr, warmup=0.0, epochs=epochs,
                        batch_size=6, weight_decay=0.0, clip=1.0)


def status_of(name, model):
    """Return the exit status of a run whose engine should have this model but has a different one."""
    try:
        draw(name, model)
    except SystemExit as stop:
        return stop.code
    return "not noticed"


def forget_updates(old):
    """From now on, make vLLM load the weights of the folder `old`, whatever it is told to load."""
    rpc = run.engine.llm.collective_rpc

    def forget(method, *arguments, **options):
        if method == "reload_weights":
            options["kwargs"] = {"weights_iterator": common.read_weights(old)}
        return rpc(method, *arguments, **options)

    run.engine.llm.collective_rpc = forget


def texts(responses):
    return [r["text"] for r in responses]


def main():
    draw("before", MODEL)
    new = train("new", MODEL, 1e-3)
    draw("after", new)
    nine = draw("enough", new, 16, enough=lambda responses: len(responses) >= 9)
    only_nine = [r["draw"] for r in nine] == 6 * [*range(9)]
    greedy = texts(draw("greedy", new, 1, temperature=0.0))
    small = train("small", new, 5e-7)
    large = train("large", new, 1e-2)
    forget_updates(new)
    caught = [status_of("forgotten_small", small), status_of("forgotten_large", large)]
    common.compare_weights = lambda folder, model: (1, [])  # and with the log-probabilities alone
    caught.append(status_of("forgotten_logprobs", large))
    run.engine.sleep()
    run.engine = common.TransformersEngine(run)
    other = texts(draw("transformers", new, 1, temperature=0.0))
    same = sum(a == b for a, b in zip(greedy, other)) / len(greedy)
    common.say("RESULT " + json.dumps({"caught": caught, "only_nine": only_nine,
                                       "same_as_transformers": same}))


def many(n):
    """Make n healthy updates of one small step each, which must pass, and a forgotten one, which must not."""
    model = MODEL
    figures = []
    for k in range(n):
        new = train(f"healthy_{k}", model, 5e-7, epochs=1)
        if model != MODEL:
            shutil.rmtree(model)
        model = new
        draw(f"drawn_{k}", model, 1)
        figures.append(run.metrics[0, f"drawn_{k}"])
    forgotten = train("forgotten", model, 5e-7, epochs=1)
    forget_updates(model)
    common.say("RESULT " + json.dumps({
        "healthy": n, "tensors_compared": figures[0]["tensors_equal"], "caught": status_of("drawn", forgotten),
        "largest_error": max(f["logprob_error"] for f in figures),
        "load_seconds": sum(f["load_seconds"] for f in figures) / n}))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        many(int(sys.argv[2]))
    else:
        main()
    os._exit(0)  # vLLM's finalizers may abort after a successful run
