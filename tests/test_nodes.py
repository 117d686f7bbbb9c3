"""Two nodes: network namespaces of this machine, joined by a cable of their own, where that is allowed (root on Linux);
else two agents of torchrun on loopback."""
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import common
from conftest import ROOT, SMOKE, environment

RUN = [*SMOKE, "--run", "nodes"]


def ip(arguments):
    return subprocess.run(["ip", *arguments.split()], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def nodes():
    """[(what comes before a command, so that it runs there; the address of node 0)] of both."""
    names = [f"scripts-{os.getpid()}-{n}" for n in (0, 1)]
    try:
        made = all(ip(f"netns add {name}") for name in names) and ip(
            f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        made = made and all(ip(f"-n {name} addr add 10.77.0.{n}/24 dev eth0") and ip(f"-n {name} link set eth0 up")
                            and ip(f"-n {name} link set lo up") for n, name in enumerate(names, 1))
    except FileNotFoundError:  # no such program
        made = False
    try:
        there = [(["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"], "10.77.0.1") for name in names]
        yield there if made else [([], "127.0.0.1")] * 2
    finally:
        for name in names if shutil.which("ip") else ():
            ip(f"netns del {name}")


def launch(nodes, folder, *flags):
    """dast.py on both nodes, by README's command; flags: of each. (status, what it said) of each."""
    started = []
    for number, ((before, address), own) in enumerate(zip(nodes, flags)):
        command = [*before, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number),
                   "--nproc-per-node", "1", "--master-addr", address, "--master-port", str(20000 + os.getpid() % 9999),
                   "--", str(ROOT / "dast.py"), *own]
        with open(folder / f"node{number}.txt", "w") as said:
            started.append(subprocess.Popen(command, cwd=folder, env=environment(), stdout=said, stderr=said))
    try:
        return [(process.wait(timeout=300), (folder / f"node{number}.txt").read_text())
                for number, process in enumerate(started)]
    finally:
        for process in started:
            process.kill()


def test_two_nodes_make_what_one_does(nodes, finished, tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for status, said in launch(nodes, tmp_path, RUN, [*RUN, "--lr", "0.1"]):  # somebody forgot one of the nodes
        lines = [line for line in said.splitlines() if line.startswith("dast.py: error")]
        assert status == 1 and len(lines) == 1 and "rank 1 on " in lines[0] and "LR 0.1, not 0.0003" in lines[0], said
    assert not list(tmp_path.glob("runs/*/round_*"))
    assert [status for status, _ in launch(nodes, tmp_path, RUN, RUN)] == [0, 0]
    one, two = finished / "runs" / "one", tmp_path / "runs" / "nodes"
    for name in ("round_0/probe.jsonl", "round_0/eval_base.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (load_file(run / "round_0" / "model" / "model.safetensors") for run in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)
    assert '"processes": 2' in (two / "constants.json").read_text() and (two / "round_1" / "eval.json").exists()


def test_a_file_that_another_node_made(tmp_path, capsys):
    """A network's disk shows it late; a disk of the node's own never does."""
    late = threading.Thread(target=lambda: (time.sleep(0.3), (tmp_path / "late").touch()))
    late.start()
    common.await_file(tmp_path / "late")
    late.join()
    (tmp_path / "old").write_text("of an earlier run")  # on the node's own disk
    for name, text in (("never", ""), ("old", "of this run")):
        with pytest.raises(SystemExit):
            common.await_file(tmp_path / name, text, seconds=0)
        assert f"{name}: rank 0 has made it" in capsys.readouterr().err
    common.await_file(tmp_path / "old", "of an earlier run", seconds=0)
