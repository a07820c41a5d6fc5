"""One run writes to a ``--save`` folder and to a metrics file: the first rank owns both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_kvshare.checkpoint.folder import repair
from megatron_kvshare.config import PretrainConfig
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.output import PASSING
from megatron_kvshare.ownership.owner import Ownership, Place, file_place, folder_place, take
from megatron_kvshare.train.agreement import StopWish, together, warn

_METRICS = "--metrics-file"


class Owner:
    """What this rank owns for the run: nothing, unless it is the first.

    ``has_metrics_file``: False where it cannot be owned for want of space: the run does without.
    """

    def __init__(self, owned: Sequence[Ownership] = ()) -> None:
        self._owned = owned
        self.has_metrics_file = True

    @contextlib.contextmanager
    def expecting(self, place: Place, say: Callable[[str], None]) -> Iterator[None]:
        """Taking it inside may fail: a metrics file is done without while its disk is full."""
        try:
            yield
        except OSError as error:
            if place.flag != _METRICS or error.errno not in PASSING:
                fix = f"free space or permissions there, or choose another {place.flag}"
                rule = f"it cannot be written: {error}"
                raise ConfigError(Fault(place.flag, place.value, rule, fix)) from error
            say(f"{place.flag} fails and is left out from here on: {error}")
            self.has_metrics_file = False

    def holds(self) -> bool:
        """Whether all is still owned; may raise OSError."""
        return all(each.holds() for each in self._owned)

    def check(self) -> None:
        """Raise OwnershipError where another run has taken over; may raise OSError."""
        for each in self._owned:
            each.check()

    def release(self) -> None:
        """Give all back."""
        for each in self._owned:
            each.release()


@contextlib.contextmanager
def owning(
    config: PretrainConfig, state: ParallelState, wish: StopWish, heartbeat: float
) -> Iterator[Owner]:
    """Own what the run writes to, inside; all ranks call this. ``wish`` is told of a loss.

    Raises:
        OwnershipError: it belongs to another run; on the first rank, the others leave with it.
        ConfigError: the same, because it cannot be written.
    """
    owned: list[Ownership] = []
    owner = Owner(owned)
    try:
        with together(state):
            for place in _places(config) if state.is_first else []:
                with owner.expecting(place, partial(warn, state)):
                    owned.append(take(place, heartbeat, partial(warn, state), wish.lose))
            if owned and config.checkpoint.save is not None:
                repair(Path(config.checkpoint.save))
        yield owner
    finally:
        owner.release()


def _places(config: PretrainConfig) -> list[Place]:
    save, metrics_file = config.checkpoint.save, config.log.metrics_file
    places = [] if save is None else [folder_place("--save", save)]
    return places if metrics_file is None else [*places, file_place(_METRICS, metrics_file)]
