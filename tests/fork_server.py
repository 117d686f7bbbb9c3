"""Runs scripts in forks of one process that has imported their libraries: spares each run seven seconds.

A line of JSON in, {"folder", "command", "out", "err", "bytes", "processes", "variables"}; out come the id of
the process (it leads a process group, so that all it starts can be killed) and, when it has ended, its exit
status. `bytes` limits the size of files (0: no limit), as a full disk would; `variables` are of the
environment. With `processes` it does what torchrun does: that many, a store to meet at, and an end of all when
one fails.
"""
import contextlib
import json
import os
import resource
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402, F401  it computes nothing, so that forks have no threads to lose
import eval  # noqa: E402, F401
import torch.distributed as dist  # noqa: E402


def run(folder, command, out, err, bytes, variables):
    """In the fork: become the script, as far as the script can tell."""
    os.environ |= variables
    os.chdir(folder)
    for number, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    if bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))
    signal.alarm(600)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, such as tests, ignore it
    sys.argv = command
    status = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def torchrun(processes, **request):
    """In the fork: start the processes, and wait for them; status 1 if one fails."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children, status = set(), 0
    for number in map(str, range(processes)):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": number, "LOCAL_RANK": number, "MASTER_ADDR": "localhost",
                           "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
            run(**request)
        children.add(child)
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    while children:
        child, ended = os.wait()
        children.remove(child)
        if ended and not status:
            status = 1
            for other in children:
                os.kill(other, signal.SIGKILL)
    del store
    os._exit(status)


for line in sys.stdin:
    request = json.loads(line)
    processes = request.pop("processes")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        torchrun(processes, **request) if processes else run(**request)
    with contextlib.suppress(OSError):  # it has ended
        os.setpgid(child, child)  # whoever of the two comes first
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
