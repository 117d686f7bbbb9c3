"""Runs scripts in forks of one process that has imported their libraries: spares each run the seven seconds of that.

A line of JSON in, {"folder", "command", "out", "err", "bytes"}; the exit status out. `bytes` limits the size of files
(0: no limit), as a full disk would.
"""
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402, F401  it computes nothing, so that forks have no threads to lose
import eval  # noqa: E402, F401


def run(folder, command, out, err, bytes):
    """In the fork: become the script, as far as the script can tell."""
    os.chdir(folder)
    for number, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    if bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))
    signal.alarm(600)
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


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
