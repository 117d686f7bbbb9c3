"""Helpers of the tests: real commands in a folder of their own, what they leave, and kills in the middle."""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # else what does not exist is asked for over and over
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is exact is exact on CPU; tests/studies/gpu_check.py is for the GPU
ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy"
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

SCRIPTS = ("dast.py", "adastar.py", "hs_star.py", "sai_dpo.py")
BRIEF = ["--toy", "--n-test", "4", "--max-new-tokens", "48", "--rounds", "2"]
SMALL = {  # two rounds in a few seconds
    "dast.py": [*BRIEF, "--n-train", "14", "--k-probe", "3", "--budgets", "2", "4", "6", "8"],
    "adastar.py": [*BRIEF, "--n-train", "84", "--held-out", "4", "--steps", "2"],
    "hs_star.py": [*BRIEF, "--n-train", "32", "--slice", "16"],
    "sai_dpo.py": [*BRIEF, "--n-train", "48", "--n-clusters", "3", "--samples-per-round", "20",
                   "--k-samples", "4"]}
SMOKE = ["--toy", "--n-train", "18", "--n-test", "12", "--k-probe", "3", "--rounds", "1"]  # of dast.py


def pytest_collection_modifyitems(items):
    """The long files first: two processes that take a file each then end together."""
    long = ["test_vllm", "test_scripts"]
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


# Starting scripts -----------------------------------------------------------------------------------------------------

def environment():
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


@functools.cache
def fork_server():
    program = str(ROOT / "tests" / "fork_server.py")
    return subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, env=environment())


class Started:
    """A script at work, in a process group of its own, which `pid` leads: in a fork of a process that has the
    libraries (see fork_server.py), or by torchrun, ten seconds longer."""

    def __init__(self, folder, script, *flags, processes=0, torchrun=False, bytes=0, **variables):
        if not (folder / "tests").exists():
            (folder / "tests").symlink_to(ROOT / "tests")  # --toy names its files from the project's root
        self.command = [str(ROOT / script), *map(str, flags)]
        self.out = folder / "stdout.txt"
        self.err = folder / "stderr.txt"
        self.out.write_text("")
        self.err.write_text("")
        self.torchrun = None
        if torchrun:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            with open(self.out, "w") as out, open(self.err, "w") as err:
                self.torchrun = subprocess.Popen([*start, *self.command], cwd=folder, stdout=out, stderr=err,
                                                 env=environment() | variables, start_new_session=True)
            self.pid = self.torchrun.pid
        else:
            request = {"folder": str(folder), "command": self.command, "out": str(self.out),
                       "err": str(self.err), "bytes": bytes, "processes": processes, "variables": variables}
            print(json.dumps(request), file=fork_server().stdin, flush=True)
            self.pid = int(fork_server().stdout.readline())

    def ended(self):
        """Whether the process that leads has ended; it may still wait for its parent."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def wait(self):
        status = self.torchrun.wait(600) if self.torchrun else int(fork_server().stdout.readline())
        done = subprocess.CompletedProcess(self.command, status, self.out.read_text(), self.err.read_text())
        self.out.unlink()
        self.err.unlink()
        return done


def launch(folder, script, *flags, check=True, **options):
    """Run a script of the project in `folder`, where its runs/ will be, to its end.

    processes: 0 is plain python, without a process group of torchrun's. torchrun: the real one. bytes: the
    largest file it may write. Other options are variables of its environment."""
    done = Started(folder, script, *flags, **options).wait()
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def killed_when(folder, script, flags, there, one=False, how=signal.SIGKILL, **options):
    """Start a script, and kill all its processes as soon as there(run folder) is true; the finished process.

    one: only the last rank is killed, and the others have to end by themselves. how: another signal."""
    flags = [str(flag) for flag in flags]
    run = folder / "runs" / (flags[flags.index("--name") + 1] if "--name" in flags else f"{Path(script).stem}-0")
    started = Started(folder, script, *flags, **options)
    end = time.monotonic() + 300
    while not (run.exists() and there(run)):
        if started.ended() or time.monotonic() > end:
            done = started.wait()
            raise AssertionError(f"it ended before the kill: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        time.sleep(0.002)
    if one:
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(children[-1]), how)
    else:
        os.killpg(started.pid, how)
    done = started.wait()
    assert done.returncode != 0, done.stdout[-3000:]
    return done


# What they leave ------------------------------------------------------------------------------------------------------

def lines(path):
    """The records of a .jsonl file."""
    return [json.loads(line) for line in open(path)]


def files(run):
    """{name: bytes} of what must be the same after a kill: not times, the machine, or copies of the code."""
    apart = ("constants.json", "metrics.jsonl", "steps.jsonl", "lock", "error.log")
    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in apart and path.suffix != ".py":
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def counts(run):
    """The lines of metrics.jsonl without what a clock measured."""
    return [{name: value for name, value in line.items() if not name.endswith("seconds") and name != "mfu"}
            for line in lines(run / "metrics.jsonl")]


def error_of(done, status=1):
    """The one line that a refused command leaves."""
    [line] = done.stderr.strip().splitlines()
    assert done.returncode == status, line
    assert "Traceback" not in done.stdout + done.stderr
    return line


def refusal_of(capsys, function, *arguments):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit):
        function(*arguments)
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def forget(run, *names):
    """Take files and folders that are there away from a run, so that a rerun makes them again."""
    for name in names:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


@pytest.fixture
def shared():
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with the finished run "one": dast.py with SMOKE. Only for reading: see `copy_of`."""
    folder = tmp_path_factory.mktemp("finished")
    launch(folder, "dast.py", *SMOKE, "--name", "one")
    return folder


@pytest.fixture
def copy_of(finished, tmp_path):
    """A folder of the test's own with the finished run "one"."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture
def alone():
    """The process group of this test process alone, for calling common's functions directly."""
    import common
    common.setup()
    return common
