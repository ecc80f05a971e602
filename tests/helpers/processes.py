"""Processes that find everything imported: a server, which imports once, forks them."""

import faulthandler
import gc
import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["killed", "layer_shards", "runs", "sharded", "shared_out", "worker", "transformers.trainer"]
)
event = _context.Event


def start(function, *arguments, errors: Path | None = None, daemon: bool = True, **environment: str):
    """A process that runs a function of one of the modules above; what it says on stderr is appended to a file."""
    process = _context.Process(target=_run, args=(function, arguments, errors, environment), daemon=daemon)
    process.start()
    return process


def ranks(number: int, function, *arguments, folder: Path, timeout: float = 600):
    """Runs a function in so many processes of one group; fails where one of them does, with what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(number)}
    group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
    said = [folder / f"stderr.{rank}" for rank in range(number)]
    processes = [
        start(function, *arguments, errors=said[rank], RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in range(number)
    ]
    ends = time.monotonic() + timeout
    try:
        while any(one.is_alive() for one in processes) and not any(one.exitcode for one in processes):
            assert time.monotonic() < ends, "the processes do not end"
            multiprocessing.connection.wait([one.sentinel for one in processes if one.is_alive()], timeout=1)
    finally:
        for one in processes:
            one.kill()
            one.join()
    codes = [one.exitcode for one in processes]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(path.read_text()[-3000:] for path in said)


def watched(number: int, function, *arguments, folder: Path, timeout: float = 600) -> tuple[int | None, str]:
    """Runs a function in so many processes as `torchrun` does; returns the exit code, and what all said on stderr."""
    said = folder / "stderr"
    agent = start(_agent, number, function, *arguments, errors=said, daemon=False)
    agent.join(timeout)
    agent.kill()
    return agent.exitcode, said.read_text()


def _agent(number, function, *arguments):
    """Torch's agent starts processes, and ends the others where one ends without a result."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, number, max_restarts=0, start_method="fork", **rendezvous)
    elastic_launch(config, _saying)(function, *arguments)


def _saying(function, *arguments):
    """Each process says its own error at once; the agent tells of the one that it sees first."""
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise


def _run(function, arguments, errors, environment):
    gc.freeze()  # as in conftest.py
    os.environ.update(environment)
    if errors is not None:
        sys.stderr.flush()
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        faulthandler.enable(file=2)
    function(*arguments)
