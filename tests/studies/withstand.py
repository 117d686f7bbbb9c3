"""What the programs withstand, by real runs that take long: see study.py, which starts these by their names."""
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
    shutil.rmtree(folder, ignore_errors=True)
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
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
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
    shutil.rmtree(folder, ignore_errors=True)
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
    phases = [phase.split("/")[-1] for of in found for phase in of["kills"]]
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


SOAK = ["--toy", "--n-train", 80, "--held-out", 0, "--n-test", 4, "--steps", 1, "--growth", 1, "--max-new-tokens", 64]


def held(pid):
    """What a process has: resident MB (its own, without files that are mapped), open files, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))
    return {"MB": kilobytes / 1024, "files": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task"))}


def soaked(rounds, processes, *flags):
    """One run of adastar.py of so many short iterations, looked at all the time: how much each of its processes has
    grown in 100 iterations after the first 50 (of the least of 25 each, since what has leaked is never given back, the
    median of the slopes between any two), and what numbers of files, threads and temporary files were seen."""
    name, temporary = f"soak-{processes}{''.join(flags)}", ROOT / "runs" / "soak-tmp"
    for folder in (ROOT / "runs" / name, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--"]
    command = [*(torchrun if processes > 1 else [sys.executable]), "adastar.py", *SOAK, "--rounds", rounds, *flags,
               "--run", name]
    with open(ROOT / "runs" / f"{name}.out", "w") as out:
        running = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=out, stderr=out,
                                   env=os.environ | {"TMPDIR": str(temporary)})
    seen, temporaries, t = {}, set(), 0
    while running.poll() is None:
        time.sleep(0.02)
        t += (ROOT / "runs" / name / f"round_{t + 1}" / "eval.json").exists()
        for pid in family(running.pid) if 50 <= t < rounds - 1 else ():
            try:
                program = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1].split("/")[-1]
                now = held(pid)
            except (OSError, IndexError):  # a worker that is being replaced
                continue
            least = seen.setdefault(f"{program} {pid}", {}).setdefault(t, now)
            seen[f"{program} {pid}"][t] = {what: min(n, least[what]) for what, n in now.items()}
        temporaries.add(sum(len(files) for _, _, files in os.walk(temporary)))
    assert running.returncode == 0, output(name)
    found = {"iterations": rounds, "temporary files": sorted(temporaries)}
    for process, of in seen.items():
        if len(of) > rounds / 4:  # looked at more often than by chance
            least = {t: min(of[u]["MB"] for u in of if t <= u < t + 25) for t in of if t % 25 == 0 and t < rounds - 1}
            slopes = [(mb - before) / (t - u) for (u, before), (t, mb) in itertools.combinations(least.items(), 2)]
            found[process] = {"MB in 100": round(100 * statistics.median(slopes), 2),
                              "MB": [round(mb, 1) for mb in least.values()],
                              **{what: sorted({h[what] for h in of.values()}) for what in ("files", "threads")}}
    return found


def soak():
    """On one and two processes, and with vLLM's CPU build where it is installed."""
    results = Results("soak")
    kinds = {"one process": (250, 1), "two processes": (200, 2), "vLLM": (200, 1, "--engine", "vllm")}
    for what, arguments in kinds.items():
        for process, of in results.of(what, soaked, *arguments).items():
            print(f"  {process}: {of}")


def full_disk(script, kilobytes, whole):
    """A small run on a disk of so many kB (a tmpfs; it takes root), and again when there is room: how it ended, the one
    line that it left, what it was at, and whether all files are as they should be."""
    disk, command = ROOT / "runs" / "disk", [sys.executable, str(ROOT / script), "--toy", *map(str, SMALL[script]),
                                             "--save-minutes", "0", "--run", "full"]
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], check=True)
    try:
        (disk / "tests").symlink_to(ROOT / "tests")
        done = subprocess.run(command, cwd=disk, capture_output=True, text=True)
        there = {path for _, path in products(disk / "runs" / "full")}
        at = next((path for _, path in products(whole) if path not in there), "end")
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = subprocess.run(command, cwd=disk, capture_output=True, text=True)
        same = again.returncode == 0 and files(disk / "runs" / "full") == files(whole)
    finally:
        subprocess.run(["umount", disk], check=True)
    return {"status": done.returncode, "lines": done.stderr.strip().splitlines()[-3:], "at": at, "same": same}


def disk():
    """Disks of many sizes, and the sums."""
    results, found = Results("disk"), []
    for script in SMALL:
        whole = finish(script, f"kills-{script[:-3]}-1-whole", 1)
        for kilobytes in (120, 800, 2500, 6000):
            found.append(results.of(f"{script}, {kilobytes} kB", full_disk, script, kilobytes, whole))
    full = [of for of in found if of["status"]]
    print(f"\n{len(full)} runs met a full disk, {sum(len(of['lines']) == 1 for of in full)} ended with one line, "
          f"{sum(of['same'] for of in found)} of {len(found)} had the same files after a rerun")


def bad():
    """Pytest says how many cases there were."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--durations", "5", "tests/test_bad_input.py"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"EVERY_SCRIPT": "1"}, check=True)


def exact():
    """Design, section 4 (e): how many of vLLM's answers differ from run to run, on as many processes and on two."""
    drawn = {}
    for name, processes in ("exact-1", 1), ("exact-1-again", 1), ("exact-2", 2):
        folder = ROOT / "runs" / name
        if not (folder / "round_0" / "eval.json").exists():
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            flags = ["--toy", "--rounds", "0", "--engine", "vllm", "--run", name]
            subprocess.run([*torchrun, str(processes), "--", "dast.py", *flags], cwd=ROOT, check=True)
        probe = [json.loads(line) for line in open(folder / "round_0" / "probe.jsonl")]
        drawn[name] = {(r["id"], r["draw"]): r for r in probe}
    first = drawn["exact-1"]
    for name, of in drawn.items():
        texts, verdicts = (sum(of[key][what] != first[key][what] for key in first) for what in ("text", "correct"))
        print(f"{name:<16}{len(of):,} answers drawn; against exact-1 {texts} differ, {verdicts} in their verdict")
