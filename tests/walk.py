"""The golden traces through the real sampling code, with engines that answer from the traces, in any order.

  python tests/walk.py TRACES.json 4        in an empty folder, on 4 processes; prints one line, RESULT and JSON

Everything is real but the model: the two samplers' loops, the shared log, the checker, adastar's rules. Each process
finishes requests in a random order of its own and at a random pace. They are forks, which spares their imports.
"""
import json
import os
import random
import socket
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adastar  # noqa: E402
import common  # noqa: E402

MODEL = str(ROOT / "tests" / "toy" / "model")
RUN = "walk"
SEED = 0
WANDB = False
ENGINE = "transformers"
GRADER = ""
SEEDED = True


def answer_to(text):
    """The answer that the trace has for the prompt "problem draw"."""
    i, draw = map(int, text.split())
    return "so \\boxed{1}" if outcomes[i][draw] else "so \\boxed{0}"


class Replay(common.Sampler):
    parameters = 1

    def read_tokenizer(self, folder, **settings):
        if not hasattr(self, "tokenizer"):  # once is enough
            common.Sampler.read_tokenizer(self, folder, **settings)

    def load(self, folder):
        return {}

    def _generate(self, rows, seed):
        time.sleep(rng.random() * 0.004)
        return [(3, answer_to(self.tokenizer.decode(row)), "stop") for row in rows]


class Engine:
    """What of vLLM's engine the sampler talks to: any requests may end in a step, or none."""

    def __init__(self, tokenizer):
        self.tokenizer, self.flying, self.aborted, self.output_processor = tokenizer, {}, 0, SimpleNamespace(
            request_states={})

    def add_request(self, name, prompt, params):
        assert name not in self.flying
        self.flying[name] = prompt["prompt_token_ids"]
        self.output_processor.request_states[name] = SimpleNamespace(
            detokenizer=SimpleNamespace(num_output_tokens=lambda: 1), is_prefilling=False, prompt_len=2)
        return name

    def abort_request(self, names):
        self.aborted += len(names)
        for name in names:
            del self.flying[name]

    def step(self):
        time.sleep(rng.random() * 0.002)
        for name in rng.sample(sorted(self.flying), min(len(self.flying), rng.randrange(4))):
            ids = self.flying.pop(name)
            yield SimpleNamespace(finished=True, request_id=name, prompt_token_ids=ids, outputs=[SimpleNamespace(
                token_ids=[0, 0, 0], text=answer_to(self.tokenizer.decode(ids)), finish_reason="stop")])


class VllmReplay(common.VllmSampler):
    parameters, read_tokenizer = 1, Replay.read_tokenizer

    def load(self, folder):
        if self.llm is None:
            self.llm, self.parameters_of = SimpleNamespace(llm_engine=Engine(self.tokenizer)), dict
        assert not self.llm.llm_engine.flying  # what the phase before did not need is gone
        return {}


def iteration(t, engine, name, problems, last, w, beta, all_draws):
    """One iteration of adastar.py's loop, without training: what the trace says of it."""
    order = adastar.walk_order(last, w, None)
    responses = common.sample(
        run, MODEL, [problems[i] for i in order], 2, lambda p, d: f"{p['number']} {d}",
        enough=None if all_draws else lambda rs: adastar.outcomes_of(rs)[-1] == 1,
        walk=adastar.Walk(len(problems), beta, 0.5), round=t, phase=f"{engine}-{name}", style="zero_shot",
        temperature=1.0, max_new_tokens=4)
    visited, place = adastar.by_problem(responses), {p["id"]: i for i, p in enumerate(problems)}
    before = [place[i] for i in visited]
    selection = adastar.select(list(visited), last[before], w[before],
                               [adastar.outcomes_of(rs) for rs in visited.values()], beta, None)
    for s in selection:
        if s["committed"]:
            last[place[s["id"]]], w[place[s["id"]]] = t, s["win_rate"]
    number = {p["id"]: p["number"] for p in problems}
    return {"visited": [number[s["id"]] for s in selection],
            "trained": [number[s["id"]] for s in selection for _ in s["chosen"]], "alpha": selection[0]["alpha"],
            "committed": [number[s["id"]] for s in selection if s["committed"]],
            "heap": [[int(last[i]), float(w[i]), problems[i]["number"]] for i in adastar.walk_order(last, w, None)]}


def main():
    """All traces with both samplers, on this process; rank 0 prints what came out."""
    global run, rng, outcomes
    common.GROUP, common.say, adastar.FILL_STEPS = 4, lambda *_: None, False
    run, rng, found = common.start_run(globals(), []), random.Random(os.environ["RANK"]), {}
    for engine, run.sampler in ("transformers", Replay(run)), ("vllm", VllmReplay(run)):
        for name, trace in json.loads(Path(sys.argv[1]).read_text()).items():
            if name.startswith("released"):
                continue
            settings, all_draws = trace["settings"], name.startswith("paper")
            adastar.TRACES, adastar.CURRICULUM_POWER = 0 if all_draws else 1, int(settings.get("power", 2))
            # ties by the place in the file; in paper_* by the text of the name, so such a file it is
            numbers = sorted(range(settings["n"]), key=lambda i: f"id_{i}" if all_draws else i)
            problems = [{"id": f"p/{i}", "number": i, "problem": "?", "answer": "1", "kind": "math"} for i in numbers]
            last, w = np.zeros(len(problems), int), np.zeros(len(problems))
            for t, (beta, outcomes) in enumerate(zip(settings["betas"], trace["outcomes"]), 1):
                found.setdefault(f"{engine} {name}", []).append(
                    iteration(t, engine, name, problems, last, w, beta, all_draws))
    everyone = common.gather(found)
    aborted = common.gather(run.sampler.llm.llm_engine.aborted)
    spent = [m["spent_draws"] - m["draws"] for m in run.metrics.values() if "draws" in m]
    if common.rank() == 0:
        print("RESULT", json.dumps({"same": all(f == found for f in everyone), "ahead": sum(spent),
                                    "aborted": sum(aborted), "found": found}))


if __name__ == "__main__":
    with socket.create_server(("localhost", 0)) as free:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": sys.argv[2],
                       "LOCAL_WORLD_SIZE": sys.argv[2]}
    children = []
    for number in range(int(sys.argv[2])):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
            try:
                main()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
