"""The ranks of a job answer one by one, and nobody waits for ever.

A key-value store on the first rank is all that is needed: it works before a process group does, and
where GPUs or the network between them do not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from megatron_kvshare.config.launch import launched
from megatron_kvshare.errors import Fault, KVShareError, LostError, runs

Judge = Callable[[Sequence[Any]], KVShareError | None]
"""From the answers of all ranks to what is wrong with them."""

_SLACK_SECONDS = 10.0
"""How much longer than the first rank the others wait: it has to collect, judge and tell."""
_LEAVING_SECONDS = 5.0
_PAUSE_SECONDS = 0.1


class RollCall:
    """One rank's side of the calls; all ranks make the same calls in the same order."""

    def __init__(self, timeout_seconds: float) -> None:
        """Meet at ``MASTER_ADDR:MASTER_PORT``; rank and world size are the launcher's.

        Raises:
            ConfigError: the launcher's variables cannot be true.
            LostError: the first rank is not there in time.
        """
        self.rank, self.world_size, _ = launched()
        self._timeout = timeout_seconds
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = int(os.environ.get("MASTER_PORT", 0))
        self._where = f"{host}:{port}"
        # torchrun's own process already serves the port.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.rank and not self._wait(lambda: _listens(host, port), timeout_seconds):
            raise _no_first_rank(self.rank, self._where, timeout_seconds)
        self._store = TCPStore(
            host,
            port,
            is_master=self.rank == 0 and not served,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,  # the process group will share it
        )

    def share(self, name: str, value: str = "") -> str:
        """A word of the first rank, for all."""
        if self.rank == 0:
            self._store.set(name, value)
            return value
        return str(self._store.get(name).decode())

    def settle(self, name: str, mine: Any, judge: Judge) -> list[Any]:
        """Everybody answers, the first rank judges, all go on or none does.

        Args:
            name: of this question, another for each.
            mine: this rank's answer; anything that JSON can hold.
            judge: is asked on the first rank when all have answered.

        Returns:
            The answers in the order of ranks; nothing on other ranks than the first.

        Raises:
            LostError: on the first rank, when ranks have not answered in time; on another, when
                the first has not.
            KVShareError: on the first rank, what ``judge`` returned.
            SystemExit: on the other ranks, with the exit code of that error.
        """
        self._store.set(_key(name, self.rank), json.dumps([socket.gethostname(), mine]))
        if self.rank:
            self._heed(name)
            return []
        given = self._collect(name)
        answers = [answer for _, answer in given.values()]
        error = judge(answers) if len(given) == self.world_size else self._missing(given)
        self._store.set(f"{name}/verdict", str(error.exit_code if error else 0))
        if error is not None:
            # The store goes with this process: the others read the verdict first.
            self._wait(lambda: self._readers(name) >= len(given) - 1, _LEAVING_SECONDS)
            raise error
        return answers

    def _collect(self, name: str) -> dict[int, tuple[str, Any]]:
        """Host and answer by rank, of those that answer in time."""
        keys = [_key(name, rank) for rank in range(self.world_size)]
        self._wait(lambda: self._store.check(keys), self._timeout)
        present = {rank: key for rank, key in enumerate(keys) if self._store.check([key])}
        return {rank: json.loads(self._store.get(key)) for rank, key in present.items()}

    def _heed(self, name: str) -> None:
        key = f"{name}/verdict"
        try:
            told = self._wait(lambda: self._store.check([key]), self._timeout + _SLACK_SECONDS)
            code = int(self._store.get(key)) if told else None
            self._store.add(f"{name}/read", 1)
        except DistError:  # the first rank has gone
            code = None
        if code is None:
            raise _no_first_rank(self.rank, self._where, self._timeout)
        if code:
            raise SystemExit(code)

    def _readers(self, name: str) -> int:
        return int(self._store.add(f"{name}/read", 0))

    @staticmethod
    def _wait(done: Callable[[], bool], seconds: float) -> bool:
        """Ask again and again: the store's own wait complains on stderr when it is in vain."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        return True

    def _missing(self, given: dict[int, tuple[str, Any]]) -> LostError:
        missing = [rank for rank in range(self.world_size) if rank not in given]
        hosts = ", ".join(dict.fromkeys(host for host, _ in given.values()))
        rule = (
            f"these of {self.world_size} ranks did not answer within {self._timeout:g} s: their"
            f" node is down or has no way to the first one, or the process ended; nodes that"
            f" answered: {hosts}"
        )
        fix = "look at the logs of these ranks; start again, without their node if it stays away"
        return LostError(Fault("ranks", runs(missing), rule, fix))


def _key(name: str, rank: int) -> str:
    return f"{name}/{rank}"


def _listens(host: str, port: int) -> bool:
    """Whether the store is there: torch's own attempts print pages when they fail."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _no_first_rank(rank: int, where: str, timeout_seconds: float) -> LostError:
    rule = f"the first rank did not answer rank {rank} there within {timeout_seconds:g} s"
    fix = "see that MASTER_ADDR is the first node, that rank 0 runs there, and that no firewall is"
    return LostError(Fault("MASTER_ADDR, MASTER_PORT", where, rule, f"{fix} between the nodes"))
