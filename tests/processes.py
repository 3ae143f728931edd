"""Runs a script in several processes that know of each other, as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SECONDS = 120


class Ended(NamedTuple):
    code: int
    out: str
    error: str


def run_together(script: str, count: int, *arguments: str, folder: Path) -> list[Ended]:
    """Run Python `script` with `arguments` in `count` processes; every one ends within two minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = folder / "script.py"
    path.write_text(script)
    started = []
    for rank in range(count):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", "-W", "error", str(path), *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        ended = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]
