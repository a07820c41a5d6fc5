"""The one family of errors a user can meet.

Every error says what is wrong, where, the value, the rule it breaks and a way out. The command line
prints the message without a traceback and exits with :data:`EXIT_USER_ERROR`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
"""The run diverged and ``--divergence-policy`` is stop: to start it again changes nothing."""
EXIT_LOST = 69
"""A rank died or hung: the job can be started again and goes on from its last checkpoint."""
EXIT_ENGINE = 70
"""The engine of a server failed, for no fault of its user (EX_SOFTWARE)."""
EXIT_STOPPED = 75
"""Stopped early by a signal or the clock, after saving: start it again to go on (EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Training saves and leaves with EXIT_STOPPED at any of these."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: ``where`` (flag, file, layer), its ``value``, the ``rule``, the
    ``fix``."""

    where: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where} = {self.value!r}: {self.rule}. Fix: {self.fix}."


class KVShareError(Exception):
    """Base of all user-facing errors; ``faults`` are listed together in the message.

    ``exit_code``: what the command line ends with.
    """

    title = "error"
    exit_code = EXIT_USER_ERROR

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        assert self.faults, "an error needs at least one fault"
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.faults) == 1:
            return f"{self.title}: {self.faults[0]}"
        lines = [f"{self.title}: {len(self.faults)} faults"]
        lines += [f"  {number}. {fault}" for number, fault in enumerate(self.faults, 1)]
        return "\n".join(lines)


class ConfigError(KVShareError):
    """A flag, a configuration file or a combination of settings is wrong."""

    title = "configuration error"


class MapError(ConfigError):
    """A sharing map breaks a rule of the method."""

    title = "sharing map error"


class DataError(KVShareError):
    """Text, tokenizer or indexed data is missing, broken or does not fit."""

    title = "data error"


class CheckpointError(KVShareError):
    """A checkpoint cannot be written, read or does not fit the run."""

    title = "checkpoint error"


class OwnershipError(KVShareError):
    """A folder or file is another process's to write, or has become that."""

    title = "ownership error"


class TrainingError(KVShareError):
    """Training cannot continue (for example: too many steps with NaN gradients)."""

    title = "training error"


class DivergenceError(TrainingError):
    """The run diverges, and the user wants it to stop then."""

    title = "training diverged"
    exit_code = EXIT_DIVERGED


class OutOfMemoryError(KVShareError):
    """A device, or its host, has less memory than the run needs."""

    title = "out of memory"


class EngineError(KVShareError):
    """What generates text for others has failed, and nothing of theirs can be answered."""

    title = "engine failed"
    exit_code = EXIT_ENGINE


class LostError(KVShareError):
    """A rank died, hung or cannot be reached: nothing to correct, the job can be started again."""

    title = "lost ranks"
    exit_code = EXIT_LOST


def runs(numbers: Sequence[int]) -> str:
    """Ranks in a message: ``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
