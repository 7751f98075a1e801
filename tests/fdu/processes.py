"""Several processes of torch.distributed on this machine, each of which runs the same code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended."""

    returncode: int
    error: str


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run(code: str, processes: int, *arguments: str, timeout: float = 250) -> list[Ended]:
    """Run Python code in so many processes, and wait for all of them."""
    port = free_port()
    running = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", code, *arguments]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        errors = [process.communicate(timeout=timeout)[1].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, error) for process, error in zip(running, errors, strict=True)]
