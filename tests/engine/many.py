"""Several processes as torchrun would start them, but as forks of this one: a test costs no import."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
import traceback

import torch

from m3bsr.engine import distributed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(num, function, folder):
    """Fork ``num`` processes that run ``function(rank)`` and leave its result in ``folder``; their process ids."""
    port, pids = free_port(), []
    sys.stdout.flush(), sys.stderr.flush()
    for rank in range(num):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                torch.set_num_threads(1)  # the pool of threads did not come along
                output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1), os.dup2(output, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                result = function(rank)
                (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
                code = result if isinstance(result, int) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait(pids, timeout_s=60.0):
    """Exit codes of processes; whoever is late is killed and has None."""
    codes, deadline = {}, time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
            elif pid not in codes and time.monotonic() > deadline:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run(num, function, folder, timeout_s=60.0):
    """Results of ``function(rank)`` in ``num`` processes; every one of them must come to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = wait(start(num, function, folder), timeout_s)
    output = "\n".join((folder / f"output-{rank}.txt").read_text() for rank in range(num))
    assert all(code not in (None, 99) and code >= 0 for code in codes), f"exit codes {codes}\n{output}"
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(num)]


def run_together(num, function, folder, timeout_s=60.0):
    """:func:`run` of ``function()`` in processes that make one run; they give up on each other before we do on them."""

    def as_one_of(rank):
        with distributed.processes(torch.device("cpu"), timeout_s=0.8 * timeout_s):
            return function()

    return run(num, as_one_of, folder, timeout_s)


def assert_close(found, expected, atol=2e-5):
    """Two sets of weights by name."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
