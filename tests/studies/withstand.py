"""What the programs withstand, tested in long real runs: study.py starts these by name."""
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pieces import ROOT, family, lines

sys.path.insert(0, str(ROOT / "tests"))
from conftest import SMALL, counts, files  # noqa: E402  and no GPU: exactness holds on a CPU

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Results:
    """The results of a study, {what: how it went}, kept in a file, so that a rerun does only what is missing."""

    def __init__(self, study):
        self.path = ROOT / "runs" / f"{study}.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, what, make, *arguments):
        """Return what `make(*arguments)` gave, now or in an earlier run of the study."""
        if what not in self.found:
            self.found[what] = make(*arguments)
            self.path.write_text(json.dumps(self.found, indent=1))
        print(f"{what:<42}{self.found[what]}"[:1000], flush=True)
        return self.found[what]


def command_of(script, name, processes, *flags):
    """Return the command for a run as a user starts it: on one process without torchrun."""
    program = [sys.executable] if processes == 1 else [*TORCHRUN, processes]
    return list(map(str, [*program, ROOT / script, *flags, "--name", name]))


def start(script, name, processes):
    """Start a small run with its output in runs/<name>.out."""
    command = command_of(script, name, processes, *SMALL[script], "--save-minutes", 0)
    with open(ROOT / "runs" / f"{name}.out", "w") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)


def output(name):
    return (ROOT / "runs" / f"{name}.out").read_text()


def finish(script, name, processes):
    """Run to the end; return the run's folder."""
    assert start(script, name, processes).wait() == 0, output(name)
    return ROOT / "runs" / name


def same(run, other):
    """Whether two runs left the same files and counts."""
    return files(run) == files(other) and counts(run) == counts(other)


def kill(*pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def products(folder):
    """Return [(when, name)] of what a run has made, in that order: a rename sets the time of change."""
    made = [path for path in folder.glob("round_*/*") if path.suffix != ".part"]
    return sorted((path.stat().st_ctime, str(path.relative_to(folder))) for path in made)


def begin(folder):
    """Return when a run was started: it opens this file anew."""
    return (folder / "lock").stat().st_ctime


def wait_for(running, folder, before):
    """Wait until a run has made all of `before` and is at work; return whether it is still running then."""
    started = time.time()
    while running.poll() is None:
        at_work = (folder / "lock").exists() and begin(folder) >= started
        if at_work and all((folder / path).exists() for path in before):
            return True
        time.sleep(0.002)
    return False


def killed_in(script, name, processes, whole, number, rng):
    """Start a run, and kill all its processes at a random moment of the time in which the uninterrupted run `whole`
    made its product `number`. Return the product it was at, or None if it had ended."""
    folder = ROOT / "runs" / name
    made = products(whole)
    before = made[number - 1][0] if number else begin(whole)
    running = start(script, name, processes)
    at = None
    if wait_for(running, folder, [path for _, path in made[:number]]):
        time.sleep(rng.uniform(0, made[number][0] - before))
        if running.poll() is None:
            kill(*family(running.pid))
            there = {path for _, path in products(folder)}
            at = next((path for _, path in made if path not in there), "end")
    running.wait()
    return at


def killed_in_each_phase(script, processes, whole):
    """Kill a run in each phase, resume each time, and compare: [the phases in which it died], whether all files are the
    same."""
    name = f"kills-{script[:-3]}-{processes}"
    rng = random.Random(f"{script} {processes}")
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    died = []
    for number in range(len(products(whole))):
        at = killed_in(script, name, processes, whole, number, rng)
        if at is not None:
            died.append(at)
    return {"kills": died, "same": same(finish(script, name, processes), whole)}


def one_of_two_killed(script, whole):
    """Kill one process of two at a random moment. Return the seconds until the run ends, whether torchrun names the
    signal, and whether a rerun ends as if nothing had happened."""
    name = f"kills-{script[:-3]}-one-of-two"
    rng = random.Random(script)
    folder = ROOT / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    made = products(whole)
    running = start(script, name, 2)
    assert wait_for(running, folder, [path for _, path in made[:rng.randrange(len(made) // 2)]])
    time.sleep(rng.uniform(0, 1))
    assert running.poll() is None
    workers = [pid for pid in family(running.pid)
               if b"--save-minutes" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    victim = rng.choice([1, 2])  # after torchrun itself
    began = time.time()
    kill(workers[victim])
    status = running.wait()
    seconds = time.time() - began
    named = "Signal 9 (SIGKILL) received" in output(name)
    return {"rank": victim - 1, "status": status, "seconds": round(seconds, 1), "named": named,
            "same": same(finish(script, name, 2), whole)}


def other_numbers_of_processes(script, whole):
    """Kill once in each phase of the first round, and resume with 2, 3, 2, ..., finally 1 process. Return whether all
    files up to the first model are the same, and by how much its weights differ at most."""
    import torch
    from safetensors.torch import load_file
    name = f"kills-{script[:-3]}-other"
    rng = random.Random(script)
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    made = [path for _, path in products(whole)]
    model = next(i for i, path in enumerate(made) if path.endswith("model"))
    kills = 0
    for turn in range(model + 3):  # three kills in training, which ends with steps.jsonl and the model
        number = min(turn, model - 1)
        kills += killed_in(script, name, 2 + turn % 2, whole, number, rng) is not None
    folder = finish(script, name, 1)
    before = {path: (folder / path).read_bytes() == (whole / path).read_bytes() for path in made[:model - 1]}
    theirs, mine = (load_file(run / made[model] / "model.safetensors") for run in (whole, folder))
    off = 0.0
    for tensor, values in theirs.items():
        assert torch.isfinite(mine[tensor]).all()
        relative = (mine[tensor] - values).abs() / values.abs().clamp(min=1e-1)
        off = max(off, float(relative.max()))
    return {"kills": kills, "same": all(before.values()), "weights differ by": off}


def kills():
    """Do all of it, and print the sums."""
    results = Results("kills")
    whole = {}
    for script, processes in itertools.product(SMALL, (1, 2)):
        whole[script, processes] = finish(script, f"kills-{script[:-3]}-{processes}-whole", processes)
    found = []
    for (script, processes), run in whole.items():
        found.append(results.of(f"{script}, {processes} processes", killed_in_each_phase, script, processes,
                                run))
    one = [results.of(f"{script}, one of two", one_of_two_killed, script, whole[script, 2])
           for script in SMALL]
    for script in SMALL:
        results.of(f"{script}, 2, 3 and 1 processes", other_numbers_of_processes, script, whole[script, 1])
    phases = []
    for of_run in found:
        phases += [phase.split("/")[-1] for phase in of_run["kills"]]
    print(f"\n{len(phases)} kills, all files the same afterwards: {all(of['same'] for of in found)}; died in",
          ", ".join(f"{phase} {phases.count(phase)}" for phase in dict.fromkeys(phases)))
    print(f"one of two processes killed {len(one)} times: ended within {max(of['seconds'] for of in one)} s, "
          f"all files the same after the rerun: {all(of['same'] for of in one)}")


def fuzz():
    """Check texts from Hypothesis, in ten parts."""
    from fuzz import fuzz as check
    results = Results("fuzz")
    total = 0
    slowest = {}
    wrong = []
    for part in range(10):
        found = results.of(f"part {part}", check, 100)
        total += found["executions"]
        wrong += found["right"]
        slowest = {what: max(seconds, slowest.get(what, 0)) for what, seconds in found["slowest"].items()}
        assert found["alive"] and not found["files"] and not found["processes"]
    print(f"\n{total:,} executions; the slowest, in seconds: {slowest}; called right, and not the same text:")
    for gold, text in sorted(wrong, key=lambda pair: len(pair[0] + pair[1])):
        print(f"  {gold!r:<40} {text!r}"[:160])


SOAK = ["--toy", "--n-train", 80, "--held-out", 0, "--n-test", 4, "--steps", 1, "--growth", 1,
        "--max-new-tokens", 64]


def held(pid):
    """Return what a process holds: resident MB (its own, without mapped files), open files, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon",
                                                                                             "RssShmem")))
    return {"MB": kilobytes / 1024, "files": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task"))}


def growth(least, rounds):
    """Return the MB gained in 100 iterations: the median of the slopes between any two of {iteration: MB}, taken every
    25."""
    least = {t: min(mb for u, mb in least.items() if t <= u < t + 25) for t in least if t % 25 == 0
             and t < rounds - 1}
    slopes = [(mb - before) / (t - u) for (u, before), (t, mb) in itertools.combinations(least.items(), 2)]
    return {"MB in 100": round(100 * statistics.median(slopes), 2), "MB": [round(mb, 1)
                                                                           for mb in least.values()]}


def soaked(rounds, processes, *flags):
    """Run adastar.py once for `rounds` short iterations, watched all the time: how much each of its processes has
    grown in 100 iterations after the first 50 (from the least of 25 each, since leaked memory is never given back),
    and which numbers of files, threads and temporary files were seen."""
    name = f"soak-{processes}{''.join(flags)}"
    temporary = ROOT / "runs" / "soak-tmp"
    for folder in (ROOT / "runs" / name, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    command = command_of("adastar.py", name, processes, *SOAK, "--rounds", rounds, *flags)
    with open(ROOT / "runs" / f"{name}.out", "w") as out:
        running = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out,
                                   env=os.environ | {"TMPDIR": str(temporary)})
    seen = {}  # {process: {iteration: the least of what it held}}
    temporaries = set()
    t = 0
    while running.poll() is None:
        time.sleep(0.02)
        if (ROOT / "runs" / name / f"round_{t + 1}" / "eval.json").exists():
            t += 1
        temporaries.add(sum(len(names) for _, _, names in os.walk(temporary)))
        if not 50 <= t < rounds - 1:
            continue
        for pid in family(running.pid):
            try:
                program = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1].split("/")[-1]
                now = held(pid)
            except (OSError, IndexError):  # a worker that is being replaced
                continue
            of_process = seen.setdefault(f"{program} {pid}", {})
            least = of_process.setdefault(t, now)
            of_process[t] = {what: min(n, least[what]) for what, n in now.items()}
    assert running.returncode == 0, output(name)
    found = {"iterations": rounds, "temporary files": sorted(temporaries)}
    for process, of_process in seen.items():
        if len(of_process) > rounds / 4:  # seen more often than by chance
            found[process] = growth({t: now["MB"] for t, now in of_process.items()}, rounds)
            for what in ("files", "threads"):
                found[process][what] = sorted({now[what] for now in of_process.values()})
    return found


def soak():
    """Run on one and two processes, and with vLLM's CPU build if it is installed."""
    results = Results("soak")
    kinds = {"one process": (250, 1), "two processes": (200, 2), "vLLM": (200, 1, "--engine", "vllm")}
    for what, arguments in kinds.items():
        for process, of_process in results.of(what, soaked, *arguments).items():
            print(f"  {process}: {of_process}")


def full_disk(script, kilobytes, whole):
    """Run a small run on a disk of `kilobytes` kB (a tmpfs; needs root), and again when there is room: how it ended,
    the one line that it left, which product it was at, and whether all files are as they should be."""
    disk = ROOT / "runs" / "disk"
    command = command_of(script, "full", 1, *SMALL[script], "--save-minutes", 0)
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], check=True)
    try:
        (disk / "tests").symlink_to(ROOT / "tests")
        done = subprocess.run(command, cwd=disk, capture_output=True, text=True)
        there = {path for _, path in products(disk / "runs" / "full")}
        at = next((path for _, path in products(whole) if path not in there), "end")
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = subprocess.run(command, cwd=disk, capture_output=True, text=True)
        alike = again.returncode == 0 and same(disk / "runs" / "full", whole)
    finally:
        subprocess.run(["umount", disk], check=True)
    return {"status": done.returncode, "lines": done.stderr.strip().splitlines()[-3:], "at": at,
            "same": alike}


def disk():
    """Run on disks of many sizes, and print the sums."""
    results = Results("disk")
    found = []
    for script in SMALL:
        whole = finish(script, f"kills-{script[:-3]}-1-whole", 1)
        for kilobytes in (120, 800, 2500, 6000):
            found.append(results.of(f"{script}, {kilobytes} kB", full_disk, script, kilobytes, whole))
    full = [of for of in found if of["status"]]
    print(f"\n{len(full)} runs met a full disk, {sum(len(of['lines']) == 1 for of in full)} ended with one "
          f"line, {sum(of['same'] for of in found)} of {len(found)} had the same files after a rerun")


def exact():
    """Print how many of vLLM's answers differ from run to run, on the same number of processes and on two."""
    drawn = {}
    for name, processes in (("exact-1", 1), ("exact-1-again", 1), ("exact-2", 2)):
        command = command_of("dast.py", name, processes, "--toy", "--rounds", 0, "--engine", "vllm")
        subprocess.run(command, cwd=ROOT, check=True)
        probe = lines(ROOT / "runs" / name / "round_0" / "probe.jsonl")
        drawn[name] = {(r["id"], r["draw"]): r for r in probe}
    first = drawn["exact-1"]
    for name, answers in drawn.items():
        texts = sum(answers[key]["text"] != first[key]["text"] for key in first)
        verdicts = sum(answers[key]["correct"] != first[key]["correct"] for key in first)
        print(f"{name:<16}{len(answers):,} answers drawn; against exact-1 {texts} differ, {verdicts} in "
              "their verdict")
