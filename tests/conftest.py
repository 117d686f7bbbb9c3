"""Helpers of the tests: real commands in a folder of their own, and the shared material where it is."""
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # else what is not to be had is asked for over and over
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is exact is exact on CPU; tests/gpu_check.py is for the GPU
ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy"
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

SMOKE = ["--toy", "--n-train", "18", "--n-test", "12", "--k-probe", "3", "--rounds", "1"]  # the whole loop in seconds


def pytest_collection_modifyitems(items):
    """The long files first: two processes that take a file each then end together."""
    long = ["test_vllm", "test_runs", "test_adastar", "test_hs_star", "test_sai_dpo"]
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


def launch(folder, script, *flags, processes=0, torchrun=False, check=True, bytes=0, **variables):
    """Run a script of the project in `folder`, where its runs/ will be.

    In forks of a process that has the libraries (see fork_server.py), or as a user does, by torchrun, which takes ten
    seconds longer. processes: 0 is without a process group. bytes: the largest file it may write. variables:
    of its environment.
    """
    if not (folder / "tests").exists():
        (folder / "tests").symlink_to(ROOT / "tests")  # --toy names its files from the project's root
    command = [str(ROOT / script), *map(str, flags)]
    if torchrun:
        # "--" because torchrun would take --run for the beginning of its own --run-path
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run([*start, "--", *command], cwd=folder, capture_output=True, text=True, timeout=600,
                              env=environment())
    else:
        out, err = folder / "stdout.txt", folder / "stderr.txt"
        out.write_text("")
        err.write_text("")
        server = fork_server()
        print(json.dumps({"folder": str(folder), "command": command, "out": str(out), "err": str(err),
                          "bytes": bytes, "processes": processes, "variables": variables}),
              file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        done = subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def environment():
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


@functools.cache
def fork_server():
    program = str(ROOT / "tests" / "fork_server.py")
    return subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=environment())


@pytest.fixture
def shared():
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with the finished run "one": dast.py, smoke-sized, on one process. Only for reading: see `copy_of`."""
    folder = tmp_path_factory.mktemp("finished")
    launch(folder, "dast.py", *SMOKE, "--run", "one", processes=1, torchrun=True)
    return folder


@pytest.fixture
def copy_of(finished, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture
def alone():
    """The process group of this test process alone, for calling common's functions directly."""
    import common
    common.setup()
    return common
