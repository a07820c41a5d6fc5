"""Tokenizers over bytes: the bytes themselves, and files of tiktoken."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from megatron_kvshare.errors import DataError, Fault

_BYTES = 256
BYTE_VOCABULARY = 512
"""Ids of megatron-core's ByteLevelTokenizer unless told otherwise."""
_SPECIAL = 1_000
_MEGATRON_VOCABULARY = 1 << 17
_MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_END = _MEGATRON_SPECIAL.index("</s>")
_MEGATRON_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""megatron-core's pattern v2, its default."""
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_RANKS, _CL100K_RANKS, _LLAMA3_RANKS, _O200K_RANKS = 50_256, 100_256, 128_000, 199_998


class ByteTokenizer:
    """UTF-8 as it is: a byte is a token; the byte 0, which no text holds, ends documents, as in
    megatron-core's ``ByteLevelTokenizer``."""

    def __init__(self, vocab_size: int = BYTE_VOCABULARY) -> None:
        if vocab_size < _BYTES:
            rule = f"there are {_BYTES} bytes"
            raise DataError(Fault("--vocab-size", vocab_size, rule, "leave it out"))
        self.vocab_size = vocab_size
        self.eod: int | None = 0
        self.fingerprint: str | None = hashlib.sha256(b"bytes of UTF-8").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Bytes of a text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """Bytes of many texts."""
        encoded = (numpy.frombuffer(text.encode("utf-8"), dtype=numpy.uint8) for text in texts)
        return [ids.astype(numpy.int32) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes; what is none becomes a replacement character."""
        return bytes(token for token in ids if token < _BYTES).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """The byte, as SentencePiece writes it."""
        return f"<0x{token:02X}>"

    def spellings(self) -> list[str]:
        """Characters of ASCII, and names of other bytes."""
        ascii_end = 128
        ids = range(self.vocab_size)
        return [chr(token) if token < ascii_end else self.piece(token) for token in ids]


class _Ranks(NamedTuple):
    """What a file of tiktoken says, and what it leaves to its reader to know."""

    ranks: dict[bytes, int]
    special: dict[str, int]
    pattern: str
    eod: int


class TiktokenTokenizer:
    """A file of tiktoken: megatron-core's (``.json``; 1,000 special tokens in front, of which the
    third ends documents, pattern v2), or lines of base64 and rank (``.tiktoken``) with GPT-2's
    pattern up to 50,256 ranks and cl100k's (GPT-4, Llama 3) above."""

    def __init__(
        self, path: Path, vocab_size: int | None = None, split_special_tokens: bool = False
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            rule, fix = "files of tiktoken need it", "pip install 'megatron-kvshare[tiktoken]'"
            raise DataError(Fault("--tokenizer-model", str(path), rule, fix)) from error
        try:
            content = path.read_bytes()
            found = _read(content, vocab_size)
            self._encoding = tiktoken.Encoding(
                path.name,
                pat_str=found.pattern,
                mergeable_ranks=found.ranks,
                special_tokens=found.special,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"not a file of tiktoken ({error})"
            fix = "give megatron-core's .json or a .tiktoken file, or choose HuggingFaceTokenizer"
            raise DataError(Fault("--tokenizer-model", str(path), rule, fix)) from error
        self._tokens = (*found.ranks.values(), *found.special.values())
        self._allowed: Any = set() if split_special_tokens else "all"
        self.vocab_size = max(self._tokens) + 1
        self.eod: int | None = found.eod
        self.fingerprint: str | None = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._encoding.encode(text, allowed_special=self._allowed, disallowed_special=())

    def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """Token ids of many texts."""
        return [numpy.array(self.encode(text), dtype=numpy.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._encoding.decode(list(ids))

    @cached_property
    def _names(self) -> dict[int, str]:
        return {
            token: self._encoding.decode_single_token_bytes(token).decode("utf-8", "replace")
            for token in self._tokens
        }

    def piece(self, token: int) -> str:
        """What the vocabulary calls a token."""
        return self._names.get(token, f"<{token}>")

    def spellings(self) -> list[str]:
        """All pieces."""
        return [self.piece(token) for token in range(self.vocab_size)]


def _read(content: bytes, vocab_size: int | None) -> _Ranks:
    """What a file says.

    Raises:
        ValueError, KeyError, TypeError: it is none of tiktoken's.
    """
    if content.lstrip()[:1] == b"[":
        return _of_megatron(json.loads(content), vocab_size or _MEGATRON_VOCABULARY)
    ranks = {}
    for line in content.splitlines():
        if line.strip():
            token, rank = line.split()
            ranks[_decoded(token)] = int(rank)
    _check(ranks, 0)
    size = len(ranks)
    if size == _O200K_RANKS:
        raise ValueError("o200k's pattern is not known here; convert it to tokenizer.json")
    if size == _LLAMA3_RANKS:
        special = {"<|begin_of_text|>": size, "<|end_of_text|>": size + 1}
        return _Ranks(ranks, special, _CL100K_PATTERN, size + 1)
    end = size + 1 if size == _CL100K_RANKS else size
    pattern = _GPT2_PATTERN if size <= _GPT2_RANKS else _CL100K_PATTERN
    return _Ranks(ranks, {"<|endoftext|>": end}, pattern, end)


def _of_megatron(entries: list[dict[str, Any]], vocab_size: int) -> _Ranks:
    kept = entries[: max(0, vocab_size - _SPECIAL)]
    ranks = {_decoded(entry["token_bytes"]): entry["rank"] + _SPECIAL for entry in kept}
    _check(ranks, _SPECIAL)
    fill = (f"<SPECIAL_{number}>" for number in range(len(_MEGATRON_SPECIAL), _SPECIAL))
    special = {name: number for number, name in enumerate([*_MEGATRON_SPECIAL, *fill])}
    return _Ranks(ranks, special, _MEGATRON_PATTERN, _MEGATRON_END)


def _decoded(token: bytes | str) -> bytes:
    try:
        return base64.b64decode(token, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{token[:40]!r} is not base64") from error


def _check(ranks: dict[bytes, int], first: int) -> None:
    if sorted(ranks.values()) != list(range(first, first + len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2, ...")
    if not all(bytes([value]) in ranks for value in range(_BYTES)):
        raise ValueError("it lacks some of the 256 bytes")
