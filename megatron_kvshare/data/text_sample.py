"""Text for the trainers of tokenizers: cut into pieces, and of too much of it a random choice."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_SENTENCE_BYTES = 4192
"""SentencePiece's trainer leaves out longer lines without an error."""

_SENTENCE_ENDS = (b". ", b"! ", b"? ", b"; ")


@dataclass(frozen=True)
class Sample:
    """Pieces of text in their order, and what they were chosen from."""

    pieces: list[str]
    text_bytes: int
    of_pieces: int
    of_bytes: int

    @property
    def is_all(self) -> bool:
        """Whether nothing was left out."""
        return len(self.pieces) == self.of_pieces


def draw_sample(
    pieces: Iterable[str], most_bytes: int, most_pieces: int | None, seed: int
) -> Sample:
    """Choose pieces at random, as many as have ``most_bytes`` together; the same ones every time.

    Every piece gets a random number, and those with the lowest stay: all while they fit. So memory
    holds ``most_bytes`` of text, and some 150 bytes for each piece.
    """
    numbers = random.Random(seed)
    kept: list[tuple[float, int, bytes]] = []
    size = count = of_bytes = 0
    for count, piece in enumerate(pieces, 1):
        content = piece.encode("utf-8")
        of_bytes += len(content)
        size += len(content)
        heapq.heappush(kept, (-numbers.random(), count, content))
        while size > most_bytes or (most_pieces is not None and len(kept) > most_pieces):
            size -= len(heapq.heappop(kept)[2])
    kept.sort(key=lambda entry: entry[1])
    chosen = [content.decode("utf-8") for _, _, content in kept]
    return Sample(chosen, size, count, of_bytes)


def cut_sentences(text: str, limit: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """Cut text into lines of at most ``limit`` bytes of UTF-8, losing nothing but line breaks and
    border spaces.

    Lines are cut after the end of a sentence if there is one, else at a space, else between two
    characters.
    """
    for line in text.split("\n"):
        content = line.encode("utf-8")
        start = 0
        while len(content) - start > limit:
            cut = _border(content, start, start + limit)
            yield content[start:cut].decode("utf-8")
            start = cut + (content[cut : cut + 1] == b" ")
        if start < len(content):
            yield content[start:].decode("utf-8")


def cut_stream(texts: Iterable[str], limit: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """Join texts by line breaks and cut that into pieces of at most ``limit`` bytes of UTF-8, which
    together are all of it: after a line break if there is one, else as in :func:`cut_sentences`."""
    content = b""
    for text in texts:
        content += text.encode("utf-8") + b"\n"
        start = 0
        while len(content) - start > limit:
            line = content.rfind(b"\n", start, start + limit) + 1
            cut = line or _border(content, start, start + limit)
            yield content[start:cut].decode("utf-8")
            start = cut
        content = content[start:]
    if content:
        yield content.decode("utf-8")


def _border(content: bytes, start: int, end: int) -> int:
    sentence = max(content.rfind(mark, start, end) for mark in _SENTENCE_ENDS)
    if sentence > start:
        return sentence + 1
    space = content.rfind(b" ", start, end)
    if space > start:
        return space
    while content[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end
