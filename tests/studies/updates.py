"""The engine before and after training, and with updates that are forgotten: what test_vllm.py and gpu_check.py run.

  python tests/updates.py MODEL        in an empty folder; prints one line, RESULT and JSON
"""
import json
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dast  # noqa: E402

MODEL = sys.argv[1]
RUN = "updates"
SEED = 0
WANDB = False
ENGINE = "vllm"
GRADER = ""
EAGER = True
SEEDED = True
GPU_MEMORY = 0.5
SAVE_MINUTES = 10.0


def draw(model, phase, draws=2, enough=None):
    return common.sample(run, model, problems, draws, lambda p, d: common.make_prompt(tokenizer, "zero_shot", p),
                         round=0, phase=phase, enough=enough, style="zero_shot", temperature=0.7, max_new_tokens=24)


def train(start, name, lr):
    return run.once(name, lambda to: common.train(
        run, start, examples, dast.sft_loss, to, round=0, lr=lr, warmup=0.0, epochs=2, batch_size=6, max_tokens=9999,
        weight_decay=0.0, clip=1.0))


def packed_away(folder, model):
    """(how many, names of those that differ): matrices that the CPU build packs, seen through an identity matrix."""
    sent, found, wrong = dict(common.read_weights(folder)), 0, []
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, layer in model.named_modules():
        if getattr(layer, "weight", None) is not None and layer.weight.numel() == 0:
            last = name.split(".")[-1]
            weight = torch.cat([sent[name.replace(last, part) + ".weight"] for part in fused.get(last, (last,))])
            mine = layer.quant_method.apply(layer, torch.eye(weight.shape[1]), None).T
            found, wrong = found + 1, wrong + [name] * (not torch.equal(mine, weight))
    return found, wrong


def same_requests():
    """Whether vLLM is asked what transformers is asked: the same prompts, a group's seed that of its first request."""
    asked, groups = {}, []
    engine, request = run.sampler.llm.llm_engine, run.sampler.llm.llm_engine.add_request
    engine.add_request = lambda name, prompt, params: (
        asked.update({params.seed: prompt["prompt_token_ids"]}), request(name, prompt, params))[1]
    draw(MODEL, "same")
    del engine.add_request
    common.barrier()
    shutil.rmtree(run.unfinished, ignore_errors=True)  # else the answers that it keeps would be taken
    common.barrier()
    vllm, run.sampler = run.sampler, common.Sampler(run)
    answer = run.sampler._generate
    run.sampler._generate = lambda rows, seed: (groups.append((seed, rows)), answer(rows, seed))[1]
    draw(MODEL, "same")
    run.sampler = vllm
    everyone = {seed: ids for part in common.gather(asked) for seed, ids in part.items()}
    groups = [group for part in common.gather(groups) for group in part]
    rows = [row for _, rows in groups for row in rows]
    return len(everyone) == 12 and sorted(rows) == sorted(everyone.values()) and all(
        everyone[seed] == rows[0] for seed, rows in groups)


def unseeded():
    """Whether no request has a seed with --no-seeded."""
    engine, request, seeds = run.sampler.llm.llm_engine, run.sampler.llm.llm_engine.add_request, []
    engine.add_request = lambda name, prompt, params: (seeds.append(params.seed), request(name, prompt, params))[1]
    run.constants["SEEDED"] = False
    draw(MODEL, "unseeded")
    run.constants["SEEDED"] = True
    del engine.add_request
    return sum(common.gather(len(seeds))) == 12 and not any(seeds)


def cancelled():
    """How many requests are stopped because the draws before them were enough, and whether nine of 16 count."""
    engine, abort, stopped = run.sampler.llm.llm_engine, run.sampler.llm.llm_engine.abort_request, []
    engine.abort_request = lambda names: (stopped.extend(names), abort(names))[1]
    responses = draw(MODEL, "enough", 16, lambda answers: len(answers) >= 9)
    del engine.abort_request
    drawn = {p["id"]: [r["draw"] for r in responses if r["id"] == p["id"]] for p in problems}
    left = engine.get_num_unfinished_requests()
    return sum(common.gather(len(stopped))), left == 0 and all(d == list(range(9)) for d in drawn.values())


def refused(model, phase):
    """The exit status of a run whose engine should have this model and has another."""
    try:
        draw(model, phase)
    except SystemExit as stop:
        return stop.code
    return "not noticed"


if __name__ == "__main__":
    run = common.start_run(globals())
    problems = common.load_problems(str(ROOT / "tests/toy/train.jsonl"), "train", "")[:6]
    tokenizer = common.load_tokenizer(MODEL, "zero_shot")
    examples = [common.make_example(tokenizer, "zero_shot", p, p["solution"]) for p in problems]
    before = draw(MODEL, "before")
    same, (stopped, only_nine) = same_requests() and unseeded(), cancelled()
    new = train(MODEL, "round_0/new", 1e-3)
    after = draw(new, "after")
    found, wrong = run.sampler.llm.apply_model(lambda model: packed_away(new, model))[0]
    small, large = train(new, "round_0/small", 5e-7), train(new, "round_0/large", 1e-2)
    send = common.VllmSampler._send
    common.VllmSampler._send = lambda self, folder: send(self, new)  # the update is forgotten: it keeps what it had
    common.time.sleep = lambda seconds: None
    caught = [refused(small, "small"), refused(large, "large")]
    common.compare_weights = lambda folder, model: (1, [])  # and by the log-probabilities alone
    caught.append(refused(large, "logprobs"))
    common.say("RESULT " + json.dumps(dict(same=same, stopped=stopped, only_nine=only_nine, found=found, wrong=wrong,
                                           caught=caught, before=before, after=after)))
