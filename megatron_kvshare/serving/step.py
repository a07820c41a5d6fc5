"""What one step of the engine does, as data (no torch): made by the scheduler, carried out by every
tensor-parallel rank."""

from __future__ import annotations

from typing import NamedTuple

from megatron_kvshare.serving.settings import PrefillMode

Tables = tuple[tuple[int, ...], ...]
"""Of one sequence: the pages of each group of the cache, in the order of their tokens."""


class Chunk(NamedTuple):
    """Some ``tokens`` of a prompt, from position ``start`` on. ``is_last``: the next token is drawn
    after it. ``scored``: log-probabilities of its tokens are asked for (so many alternatives)."""

    sequence: int
    tokens: tuple[int, ...]
    start: int
    tables: Tables
    mode: PrefillMode
    is_last: bool
    scored: int | None
    following: int | None
    """The token after the chunk, where it is scored and the prompt goes on."""


class NewToken(NamedTuple):
    """The token drawn last of a sequence, and its ``position``."""

    sequence: int
    token: int
    position: int
    tables: Tables


class Moved(NamedTuple):
    """A sequence whose pages go to host memory, or come back into ``tables``."""

    sequence: int
    tables: Tables


class Step(NamedTuple):
    """In this order: copies to host memory, copies back, what is forgotten there, chunks of
    prompts, one token of each running sequence. ``same_tables``: sequences and pages of ``tokens``
    are those of the step before."""

    set_aside: tuple[Moved, ...]
    put_back: tuple[Moved, ...]
    forgotten: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    tokens: tuple[NewToken, ...]
    same_tables: bool
