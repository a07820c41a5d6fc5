"""Signals and the clock become a wish; the ranks decide on it elsewhere."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_kvshare.train.agreement import CLOCK, reason, stop_wish


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_heeded_and_the_handler_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_wish(None) as wish:
        assert wish.now() == 0
        os.kill(os.getpid(), number)
        assert wish.now() == number and reason(wish.now()) == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait() -> None:
    with stop_wish(None) as wish:
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.now() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_clock_gives_way_to_a_signal() -> None:
    with stop_wish(1e-9) as wish:
        assert wish.now() == CLOCK and reason(CLOCK) == "--exit-duration-in-mins"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wish.now() == signal.SIGUSR1
    with stop_wish(60) as wish:
        assert wish.now() == 0
