"""``kvshare serve`` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import psutil

from tests.distributed.world import PATIENCE_SECONDS


class Served:
    """Started, and ready; ``errors`` is what it has written to standard error. Ends with the
    block."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "megatron_kvshare", "serve", "--hf", str(folder)]
        self._process = subprocess.Popen(
            [*command, "--port", "0", *flags],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors = ""
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r" at (http://\S+)", line)
        assert found, f"{line}\n{self.wait()}\n{self.errors}"
        self.url = found[1]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait()

    def _read_errors(self) -> None:
        for line in self._process.stderr or ():
            self.errors += line

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait(PATIENCE_SECONDS)
        self._reader.join()
        return code

    @property
    def resident_bytes(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    def metric(self, name: str) -> float:
        """The sum of all series whose text begins with ``name``."""
        lines = httpx2.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
