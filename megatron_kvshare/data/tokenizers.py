"""Tokenizers behind one small interface (L4); nothing is ever fetched from a network.

Imports neither torch nor megatron-core, so that preprocessing workers start quickly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_kvshare.errors import DataError, Fault

_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<eod>")


class Tokenizer(Protocol):
    """Text to token ids and back.

    ``vocab_size`` is the true number of ids (unpadded); ``eod`` ends a document (None: the
    tokenizer has no such token); ``fingerprint`` is the SHA-256 of the tokenizer's file (None: it
    has no file).
    """

    vocab_size: int
    eod: int | None
    fingerprint: str | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without added begin or end tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


def load_tokenizer(
    kind: str, model: str | None, vocab_size: int | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """Load a tokenizer by Megatron's ``--tokenizer-type`` name.

    Args:
        kind: ``SentencePieceTokenizer``, ``HuggingFaceTokenizer`` or ``NullTokenizer``.
        model: its file or folder on this machine.
        vocab_size: number of ids, for ``NullTokenizer`` only.
        trust_remote_code: run code of the folder where it has no ``tokenizer.json``.

    Raises:
        DataError: the file is missing, broken, of another kind, or needs code of its folder.
    """
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise _fault(
                "--vocab-size", None, "NullTokenizer needs the number of ids", "give --vocab-size"
            )
        return NullTokenizer(vocab_size)
    if model is None:
        fix = "give the tokenizer's file or folder; `kvshare train-tokenizer` makes one"
        raise _fault("--tokenizer-model", None, f"{kind} needs a file", fix)
    kinds = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
    if kind not in kinds:
        fix = f"use one of {', '.join([*kinds, 'NullTokenizer'])}"
        raise _fault("--tokenizer-type", kind, "unknown kind of tokenizer", fix)
    if not Path(model).exists():
        fix = "give a path on this machine (names on a hub are not looked up)"
        raise _fault("--tokenizer-model", model, "no such file or folder", fix)
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(Path(model))
    return HuggingFaceTokenizer(Path(model), trust_remote_code)


def kind_of(path: str) -> str:
    """The kind of the tokenizer at ``path``, by its name alone."""
    return "SentencePieceTokenizer" if path.endswith(".model") else "HuggingFaceTokenizer"


class NullTokenizer:
    """Text that is already numbers, separated by spaces; the last id ends documents."""

    fingerprint = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Read the numbers; ids outside the vocabulary are refused."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            fix = "use a tokenizer for text, or write token ids separated by spaces"
            raise _fault(
                "NullTokenizer", text[:40], "the text is not a list of numbers", fix
            ) from error
        for token in ids:
            if not 0 <= token < self.vocab_size:
                rule = f"token id outside the vocabulary of {self.vocab_size}"
                raise _fault("NullTokenizer", token, rule, "raise --vocab-size")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Write the numbers."""
        return " ".join(map(str, ids))


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file; its end-of-sentence token ends documents."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if path.is_dir():
            candidate = path / "tokenizer.model"
            path = candidate if candidate.is_file() else path
        try:
            content = path.read_bytes()
            self._processor = SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            fix = "give a .model file, or choose HuggingFaceTokenizer for tokenizer.json"
            raise _fault(
                "--tokenizer-model", str(path), "not a SentencePiece model", fix
            ) from error
        self.vocab_size = int(self._processor.get_piece_size())
        eos = self._processor.eos_id()
        self.eod: int | None = eos if eos >= 0 else None
        self.fingerprint: str | None = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._processor.decode(list(ids)))


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` file, or a folder that ``transformers`` can read."""

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        file: Path | bytes = path / "tokenizer.json" if path.is_dir() else path
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            file = self._convert(path, trust_remote_code)
        try:
            from tokenizers import Tokenizer as FastTokenizer

            content = file if isinstance(file, bytes) else file.read_bytes()
            self._tokenizer = FastTokenizer.from_buffer(content)
        except ImportError as error:
            raise _needs_transformers(path) from error
        except Exception as error:  # the library raises plain Exception for every broken file
            fix = "give a tokenizer.json, or choose SentencePieceTokenizer for a .model file"
            raise _fault(
                "--tokenizer-model", str(path), "not a Hugging Face tokenizer", fix
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod: int | None = self._find_eod(path if path.is_dir() else path.parent)
        self.fingerprint: str | None = hashlib.sha256(content).hexdigest()

    @staticmethod
    def _convert(path: Path, trust_remote_code: bool) -> bytes:
        """The fast form of an older tokenizer folder, through transformers."""
        if not trust_remote_code:
            _refuse_code(path)
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise _needs_transformers(path) from error
        try:
            slow = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=trust_remote_code
            )
            return str(slow.backend_tokenizer.to_str()).encode()
        except Exception as error:  # transformers raises many kinds for a folder it cannot read
            fix = "give a folder with tokenizer.json, or that file itself"
            raise _fault(
                "--tokenizer-model", str(path), "transformers cannot read it", fix
            ) from error

    def _find_eod(self, folder: Path) -> int | None:
        """The token named in tokenizer_config.json, else the first usual name that exists."""
        names = list(_EOD_NAMES)
        config = folder / "tokenizer_config.json"
        if config.is_file():
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            named = named.get("content") if isinstance(named, dict) else named
            names = [named, *names] if named else names
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _refuse_code(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    try:
        code = json.loads(file.read_text(encoding="utf-8")).get("auto_map")
    except (ValueError, AttributeError) as error:
        rule, fix = f"it is no readable JSON object ({error})", "download it again"
        raise _fault("--tokenizer-model", str(file), rule, fix) from error
    if code:
        rule = f"this tokenizer is code of its folder ({code}), which runs only where you say so"
        fix = "give a folder with tokenizer.json, or read the code and give --trust-remote-code"
        raise _fault("--tokenizer-model", str(folder), rule, fix)


def _needs_transformers(path: Path) -> DataError:
    fix = "pip install 'megatron-kvshare[hf]'"
    return _fault(
        "--tokenizer-model", str(path), "Hugging Face tokenizers need the extra `hf`", fix
    )


def _fault(where: str, value: object, rule: str, fix: str) -> DataError:
    return DataError(Fault(where=where, value=value, rule=rule, fix=fix))
