"""Two nodes: network namespaces of this machine, joined by a cable of their own, where that is allowed (root
on Linux); else two agents of torchrun on loopback."""
import os
import shutil
import subprocess
import sys
import threading

import pytest
from safetensors.torch import load_file

import common
from conftest import ROOT, SMOKE, environment, refusal_of

RUN = [*SMOKE, "--name", "nodes"]


def ip(arguments):
    return subprocess.run(["ip", *arguments.split()], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def nodes():
    """[(what comes before a command, so that it runs there; the address of node 0)] of both."""
    names = [f"scripts-{os.getpid()}-{n}" for n in (0, 1)]
    try:
        made = all(ip(f"netns add {name}") for name in names) and ip(
            f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for n, name in enumerate(names, 1):
            for command in (f"addr add 10.77.0.{n}/24 dev eth0", "link set eth0 up", "link set lo up"):
                made = made and ip(f"-n {name} {command}")
    except FileNotFoundError:  # no such program
        made = False
    try:
        before = [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"] for name in names]
        yield [(command, "10.77.0.1") for command in before] if made else [([], "127.0.0.1")] * 2
    finally:
        for name in names if shutil.which("ip") else ():
            ip(f"netns del {name}")


def launch(nodes, folder, *flags):
    """dast.py on both nodes, by README's command; flags: of each. (status, what it said) of each."""
    (folder / "tests").symlink_to(ROOT / "tests")  # --toy names its files from the project's root
    started = []
    for number, ((before, address), own) in enumerate(zip(nodes, flags)):
        command = [*before, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                   "--node-rank", str(number), "--nproc-per-node", "1", "--master-addr", address,
                   "--master-port", str(20000 + os.getpid() % 9999), str(ROOT / "dast.py"), *own]
        with open(folder / f"node{number}.txt", "w") as said:
            started.append(subprocess.Popen(command, cwd=folder, env=environment(), stdout=said, stderr=said))
    try:
        return [(process.wait(timeout=300), (folder / f"node{number}.txt").read_text())
                for number, process in enumerate(started)]
    finally:
        for process in started:
            process.kill()


def test_node_started_with_another_constant_is_refused(nodes, tmp_path):
    for status, said in launch(nodes, tmp_path, RUN, [*RUN, "--lr", "0.1"]):
        [line] = [line for line in said.splitlines() if line.startswith("dast.py: error")]
        assert status == 1
        assert "with different constants or code than " in line and "LR " in line
        assert "all nodes need the same command" in line
    assert not list(tmp_path.glob("runs/*/round_*"))


def test_two_nodes_make_what_one_process_does(nodes, finished, tmp_path):
    assert [status for status, _ in launch(nodes, tmp_path, RUN, RUN)] == [0, 0]
    one = finished / "runs" / "one"
    two = tmp_path / "runs" / "nodes"
    for name in ("round_0/probe.jsonl", "round_0/eval_base.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (load_file(run / "round_0" / "model" / "model.safetensors") for run in (one, two))
    for name in first:
        assert (first[name] - second[name]).norm() <= 1e-4 * first[name].norm(), name
    assert common.read(two / "constants.json")["machine"].startswith("2 x CPU")
    assert (two / "round_1" / "eval.json").exists()


def test_file_that_another_node_made_is_awaited(tmp_path, capsys):
    """A network's disk shows it late; a disk of the node's own never does."""
    late = threading.Timer(0.3, (tmp_path / "late").touch)
    late.start()
    common.await_file(tmp_path / "late")
    late.join()
    assert "never: rank 0 has made it" in refusal_of(capsys, common.await_file, tmp_path / "never", 0)
