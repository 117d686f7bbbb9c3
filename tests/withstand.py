"""What the programs withstand, by real runs that take long: see study.py, which starts these by their names."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from test_runs import counts, files  # noqa: E402

SMALL = {  # two rounds in 10 to 25 s, saved after each training step
    "dast.py": ["--n-train", 40, "--n-test", 12, "--k-probe", 3, "--rounds", 2],
    "adastar.py": ["--n-train", 170, "--held-out", 10, "--n-test", 10, "--steps", 5, "--rounds", 2],
    "hs_star.py": ["--n-train", 40, "--slice", 20, "--n-test", 10, "--rounds", 2],
    "sai_dpo.py": ["--n-train", 150, "--samples-per-round", 16, "--pairs-per-round", 5, "--n-test", 8, "--rounds", 2]}


class Results:
    """{what: how it went} of a study, kept in a file, so that a rerun does only what is missing."""

    def __init__(self, study):
        self.path = ROOT / "runs" / f"{study}.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, what, make, *arguments):
        """What `make(*arguments)` gave, now or in an earlier run of the study."""
        if what not in self.found:
            self.found[what] = make(*arguments)
            self.path.write_text(json.dumps(self.found, indent=1))
        print(f"{what:<42}{self.found[what]}"[:1000], flush=True)
        return self.found[what]


def start(script, name, processes):
    """Start a small run, its output in runs/<name>.out; on one process without torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--"]
    command = [*(torchrun if processes > 1 else [sys.executable]), script, "--toy", *SMALL[script], "--save-minutes", 0,
               "--run", name]
    with open(ROOT / "runs" / f"{name}.out", "w") as out:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=out, stderr=out, start_new_session=True)


def output(name):
    return (ROOT / "runs" / f"{name}.out").read_text()


def finish(script, name, processes):
    """The folder of a run that is run to its end."""
    assert start(script, name, processes).wait() == 0, output(name)
    return ROOT / "runs" / name


def family(pid):
    """A process and all that descend from it, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill(*pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def products(folder):
    """[(when, name)] of what a run has made, in that order: a rename sets the time of change."""
    made = [path for path in folder.glob("round_*/*") if path.suffix != ".part"]
    return sorted((path.stat().st_ctime, str(path.relative_to(folder))) for path in made)


def wait_for(running, name, before):
    """Wait until a run is at work and has made all of `before`; whether it still runs then."""
    while running.poll() is None:
        if "  data " in output(name) and all((ROOT / "runs" / name / path).exists() for path in before):
            return True
        time.sleep(0.002)
    return False


def killed_in_each_phase(script, processes, whole):
    """Kill a run with all its processes at a random moment of each phase of the uninterrupted run `whole`, go on each
    time, and compare: [the phases in which it died], whether all files and counts are the same."""
    name, rng, died = f"kills-{script[:-3]}-{processes}", random.Random(f"{script} {processes}"), []
    folder, made = ROOT / "runs" / name, products(whole)
    subprocess.run(["rm", "-rf", folder], check=True)
    began = (whole / "constants.json").stat().st_ctime
    for number, (ended, phase) in enumerate(made):
        seconds, began = ended - began, ended
        running = start(script, name, processes)
        if wait_for(running, name, [path for _, path in made[:number]]):
            time.sleep(rng.uniform(0, seconds))
            kill(*family(running.pid))
            there = {path for _, path in products(folder)}
            died.append(next((path for _, path in made if path not in there), "end"))
        running.wait()
    finish(script, name, processes)
    return {"kills": died, "same": files(folder) == files(whole) and counts(folder) == counts(whole)}


def one_of_two_killed(script, whole):
    """Kill one process of two at a random moment: seconds until the run ends, what it says, whether a rerun is as if
    nothing had been."""
    name, rng = f"kills-{script[:-3]}-one-of-two", random.Random(script)
    subprocess.run(["rm", "-rf", ROOT / "runs" / name], check=True)
    made, running = products(whole), start(script, name, 2)
    wait_for(running, name, [path for _, path in made[:rng.randrange(len(made) - 1)]])
    time.sleep(rng.uniform(0, 1))
    assert running.poll() is None
    workers = [pid for pid in family(running.pid) if b"--save-minutes" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    victim, began = rng.choice([1, 2]), time.time()  # after torchrun itself
    kill(workers[victim])
    status, seconds = running.wait(), time.time() - began
    lines = output(name)
    said = [word for word in ("stopped by SIGTERM", "Signal 9 (SIGKILL) received") if word in lines]
    folder = finish(script, name, 2)
    return {"rank": victim - 1, "status": status, "seconds": round(seconds, 1), "said": said,
            "same": files(folder) == files(whole) and counts(folder) == counts(whole)}


def other_numbers_of_processes(script, whole):
    """Killed once in each phase of the first round, and gone on with 2, 3, 1, ... processes: whether all up to the
    first model is the same, and by how much its weights differ at most."""
    import torch
    from safetensors.torch import load_file
    name, rng = f"kills-{script[:-3]}-other", random.Random(script)
    folder, made = ROOT / "runs" / name, products(whole)
    subprocess.run(["rm", "-rf", folder], check=True)
    model = next(i for i, (_, path) in enumerate(made) if path.endswith("model"))
    for turn in range(model + 3):  # three times in training
        number, running = min(turn, model), start(script, name, 2 + turn % 2)
        wait_for(running, name, [path for _, path in made[:number]])
        seconds = made[number][0] - (made[number - 1][0] if number else (whole / "constants.json").stat().st_ctime)
        time.sleep(rng.uniform(0, seconds))
        kill(*family(running.pid))
        running.wait()
    finish(script, name, 1)
    theirs, mine = (load_file(run / made[model][1] / "model.safetensors") for run in (whole, folder))
    off = max(float(((mine[n] - theirs[n]).abs() / theirs[n].abs().clamp(min=1e-1)).max()) for n in theirs)
    assert all(torch.isfinite(t).all() for t in mine.values())
    return {"same": all((folder / path).read_bytes() == (whole / path).read_bytes() for _, path in made[:model]),
            "weights differ by": off}


def kills():
    """All of it, and the sums."""
    results = Results("kills")
    whole = {(script, n): finish(script, f"kills-{script[:-3]}-{n}-whole", n) for script in SMALL for n in (1, 2)}
    found = [results.of(f"{script}, {n} processes", killed_in_each_phase, script, n, run)
             for (script, n), run in whole.items()]
    one = [results.of(f"{script}, one of two", one_of_two_killed, script, whole[script, 2]) for script in SMALL]
    for script in SMALL:
        results.of(f"{script}, 2, 3 and 1 processes", other_numbers_of_processes, script, whole[script, 1])
    phases = [phase.split("/")[1] for of in found for phase in of["kills"]]
    print(f"\n{len(phases)} kills, all files the same afterwards: {all(of['same'] for of in found)}; died in",
          ", ".join(f"{phase} {phases.count(phase)}" for phase in dict.fromkeys(phases)))
    print(f"one of two processes killed {len(one)} times: ended within {max(of['seconds'] for of in one)} s, all files "
          f"the same after the rerun: {all(of['same'] for of in one)}")


def fuzz():
    """Hypothesis' texts, in ten parts."""
    from fuzz import fuzz as check
    results, total, slowest, wrong = Results("fuzz"), 0, {}, []
    for part in range(10):
        found = results.of(f"part {part}", check, 100)
        total += found["executions"]
        wrong += found["right"]
        slowest = {what: max(seconds, slowest.get(what, 0)) for what, seconds in found["slowest"].items()}
        assert found["alive"] and not found["files"] and not found["processes"]
    print(f"\n{total:,} executions; the slowest, in seconds: {slowest}; called right, and not the same text:")
    for gold, text in sorted(wrong, key=lambda pair: len(pair[0] + pair[1])):
        print(f"  {gold!r:<40} {text!r}"[:160])
