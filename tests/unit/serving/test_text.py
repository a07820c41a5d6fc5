"""Streamed text equals the whole, characters are never cut, and stop strings never shown."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.serving.text import TextStream


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    vocab_size, fingerprint, eod = 256, None, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    piece = spellings = None


def streamed(text: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), Bytes().encode("prompt: "), stop)
    tokens = Bytes().encode(text)
    pieces = []
    for number, token in enumerate(tokens):
        piece, stopped = stream.add(token, is_last=number == len(tokens) - 1)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return pieces, False


TEXT = st.text(alphabet="ab \n\u00e4\u20ac\U0001f600", max_size=30)


@given(TEXT)
def test_pieces_make_the_text(text: str) -> None:
    pieces, stopped = streamed(text)
    assert "".join(pieces) == text and not stopped
    assert not any("\ufffd" in piece for piece in pieces)


@given(
    TEXT, st.lists(st.text(alphabet="ab \u00e4", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Met as soon as its last character is there, though another would begin earlier."""
    pieces, stopped = streamed(text, stop)
    ends = [text.find(each) + len(each) for each in stop if each in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    seen = text[: min(ends)]
    assert "".join(pieces) == seen[: min(seen.find(each) for each in stop if each in seen)]


def test_what_is_no_character_comes_out_at_the_end() -> None:
    stream = TextStream(Bytes(), (), ())
    assert stream.add(0xE2) == ("", False)
    assert stream.finish() == "\ufffd"
