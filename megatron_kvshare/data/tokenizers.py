"""Tokenizers behind one small interface; nothing is ever fetched from a network.

Imports neither torch nor megatron-core, so that preprocessing workers start quickly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy

from megatron_kvshare.data.byte_tokenizers import (
    BYTE_VOCABULARY,
    ByteTokenizer,
    TiktokenTokenizer,
)
from megatron_kvshare.errors import DataError, Fault

_NAMING = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
"""Where transformers finds names of special tokens, or a class that has usual ones."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    ``vocab_size`` is the true number of ids (unpadded); ``eod`` ends a document (None: the
    tokenizer has no such token); ``fingerprint`` is the SHA-256 of the tokenizer's file (None: it
    has no file).
    """

    vocab_size: int
    fingerprint: str | None

    @property
    def eod(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without added begin or end tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """:meth:`encode` of many texts (int32), in one thread and less time."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...

    def piece(self, token: int) -> str:
        """What the vocabulary calls a token."""
        ...

    def spellings(self) -> list[str]:
        """For every token id a text that it could stand for; its name where it stands for none."""
        ...


def load_tokenizer(
    kind: str,
    model: str | None,
    vocab_size: int | None = None,
    *,
    split_special_tokens: bool = False,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Load a tokenizer by Megatron's ``--tokenizer-type`` name.

    Args:
        kind: ``SentencePieceTokenizer``, ``HuggingFaceTokenizer``, ``TikTokenizer``,
            ``ByteLevelTokenizer`` or ``NullTokenizer``.
        model: its file or folder on this machine.
        vocab_size: number of ids, for those that have no file or a file of more.
        split_special_tokens: encode the names of special tokens inside a text as text.
        trust_remote_code: run code of the folder where it has no ``tokenizer.json``.

    Raises:
        DataError: the file is missing, broken, of another kind, needs code of its folder, or cannot
            split special tokens.
    """
    if kind == "NullTokenizer":
        if split_special_tokens:
            raise _cannot_split(kind, "its text is token ids, the last one included")
        if vocab_size is None:
            raise _fault(
                "--vocab-size", None, "NullTokenizer needs the number of ids", "give --vocab-size"
            )
        return NullTokenizer(vocab_size)
    if kind == "ByteLevelTokenizer":
        return ByteTokenizer(vocab_size or BYTE_VOCABULARY)
    if model is None:
        fix = "give the tokenizer's file or folder; `kvshare train-tokenizer` makes one"
        raise _fault("--tokenizer-model", None, f"{kind} needs a file", fix)
    kinds = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer")
    if kind not in kinds:
        fix = f"use one of {', '.join([*kinds, 'ByteLevelTokenizer', 'NullTokenizer'])}"
        raise _fault("--tokenizer-type", kind, "unknown kind of tokenizer", fix)
    if not Path(model).exists():
        fix = "give a path on this machine (names on a hub are not looked up)"
        raise _fault("--tokenizer-model", model, "no such file or folder", fix)
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(Path(model), split_special_tokens)
    if kind == "TikTokenizer":
        return TiktokenTokenizer(Path(model), vocab_size, split_special_tokens)
    return HuggingFaceTokenizer(Path(model), split_special_tokens, trust_remote_code)


def kind_of(path: str) -> str:
    """The kind of the tokenizer at ``path``, by its name alone."""
    kinds = {".model": "SentencePieceTokenizer", ".tiktoken": "TikTokenizer"}
    return kinds.get(Path(path).suffix, "HuggingFaceTokenizer")


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

    def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """Read the numbers of many texts."""
        return [numpy.array(self.encode(text), dtype=numpy.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Write the numbers."""
        return " ".join(map(str, ids))

    def piece(self, token: int) -> str:
        """The number."""
        return str(token)

    def spellings(self) -> list[str]:
        """All numbers."""
        return [str(token) for token in range(self.vocab_size)]


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file; its end-of-sentence token ends documents.

    Names of control tokens (``</s>``) inside a text are always text to SentencePiece, those of
    user-defined symbols never.
    """

    def __init__(self, path: Path, split_special_tokens: bool = False) -> None:
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
        symbols = _user_defined(content) if split_special_tokens else []
        if symbols:
            why = f"SentencePiece matches its user-defined symbols in any text ({symbols[0]}, ...)"
            raise _cannot_split(str(path), why)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """Token ids of many texts."""
        return list(self._processor.encode_as_numpy(list(texts), num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; those beyond the vocabulary, which a model can have, have none."""
        return str(self._processor.decode([each for each in ids if each < self.vocab_size]))

    def piece(self, token: int) -> str:
        """What the vocabulary calls a token."""
        return str(self._processor.id_to_piece(token))

    def spellings(self) -> list[str]:
        """All pieces, spaces as spaces."""
        return [self.piece(token).replace("▁", " ") for token in range(self.vocab_size)]


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` file, or a folder that ``transformers`` can read.

    ``definition`` is the content of ``tokenizer.json``, also where there is no such file.
    """

    def __init__(
        self, path: Path, split_special_tokens: bool = False, trust_remote_code: bool = False
    ) -> None:
        self._path, self._trusted = path, trust_remote_code
        file: Path | bytes = path / "tokenizer.json" if path.is_dir() else path
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            file = str(self._by_transformers(path).backend_tokenizer.to_str()).encode()
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
        self._tokenizer.encode_special_tokens = split_special_tokens
        self.definition = content
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint: str | None = hashlib.sha256(content).hexdigest()

    def _by_transformers(self, folder: Path) -> Any:
        if not self._trusted and not (folder / "tokenizer.json").is_file():
            _refuse_code(folder)
        return _from_transformers(folder, self._path, self._trusted)

    @cached_property  # importing transformers takes seconds, and workers do without
    def _settings(self) -> Any | None:
        """The tokenizer that transformers makes of this folder's files, which say more than
        ``tokenizer.json``. A file of another name than that has no settings."""
        folder = self._path if self._path.is_dir() else self._path.parent
        has_settings = folder == self._path or self._path.name == "tokenizer.json"
        is_named = any((folder / name).is_file() for name in _NAMING) or _is_bare_gpt2(folder)
        if not (has_settings and is_named):
            return None
        return self._by_transformers(folder)

    @cached_property
    def named(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as transformers finds them for this folder: in several
        files, whose rank has changed, or as usual for the class that they name."""
        found = self._settings
        if found is None:
            return {}
        tokens = {"bos_token": found.bos_token, "eos_token": found.eos_token}
        return {name: str(token) for name, token in tokens.items() if token is not None}

    @cached_property
    def bos(self) -> int | None:
        """The token transformers calls the begin of a sentence, if the vocabulary has it."""
        return self._tokenizer.token_to_id(self.named.get("bos_token", ""))

    @cached_property
    def eod(self) -> int | None:
        """The token transformers calls the end of a sentence; None where none is named.

        Raises:
            DataError: what is named is not in the vocabulary.
        """
        name = self.named.get("eos_token")
        if name is None:
            return None
        token = self._tokenizer.token_to_id(name)
        if token is None:
            rule = f"its end-of-sentence token {name!r} is not in its vocabulary"
            fix = 'name one that is, in its tokenizer_config.json: "eos_token": "..."'
            raise _fault("--tokenizer-model", str(self._path), rule, fix)
        return int(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how a chat becomes a text."""
        return self._settings is not None and self._settings.chat_template is not None

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a chat by the folder's template, up to where the next answer begins.

        Raises:
            DataError: the template refuses the messages, or is broken.
        """
        assert self.has_chat_template, "only a tokenizer with a template can do this"
        try:
            return str(
                self._settings.apply_chat_template(  # type: ignore[union-attr]
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template raises what it likes
            rule = f"the tokenizer's chat template refuses them ({error})"
            fix = "send roles in the order that it knows"
            raise _fault("messages", [m["role"] for m in messages], rule, fix) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """Token ids of many texts, without the offsets that :meth:`encode` computes as well."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [numpy.array(encoding.ids, dtype=numpy.int32) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def piece(self, token: int) -> str:
        """What the vocabulary calls a token."""
        return str(self._tokenizer.id_to_token(token))

    def spellings(self) -> list[str]:
        """What every token alone decodes to, and its name where that is something else."""
        return [self.decode([token]) or self.piece(token) for token in range(self.vocab_size)]


def _refuse_code(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    try:
        code = _json(file).get("auto_map")
    except ValueError as error:
        rule, fix = f"it is no readable JSON object ({error})", "download it again"
        raise _fault("--tokenizer-model", str(file), rule, fix) from error
    if code:
        rule = f"this tokenizer is code of its folder ({code}), which runs only where you say so"
        fix = "give a folder with tokenizer.json, or read the code and give --trust-remote-code"
        raise _fault("--tokenizer-model", str(folder), rule, fix)


def _from_transformers(folder: Path, given: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in ``folder`` as transformers reads it, without code that lies there unless it
    is trusted: where ``tokenizer.json`` does without, the class that needs none."""
    try:
        from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast
    except ImportError as error:
        raise _needs_transformers(given) from error
    try:
        settings = _json(folder / "tokenizer_config.json")
        if "auto_map" in settings and (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        if _is_bare_gpt2(folder):
            return GPT2TokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        fix = "give a folder with tokenizer.json and sound settings, or that file itself"
        reason = " ".join(str(error).split())[:200]
        rule = f"transformers cannot read it ({reason})"
        raise _fault("--tokenizer-model", str(given), rule, fix) from error


def _is_bare_gpt2(folder: Path) -> bool:
    """The two files of GPT-2's tokenizer, as Megatron's --vocab-file and --merge-file, and nothing
    that names a class."""
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    there = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return there and not any((folder / name).is_file() for name in names)


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _user_defined(content: bytes) -> list[str]:
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString(content)
    return [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]


def _cannot_split(value: str, why: str) -> DataError:
    return _fault("--split-special-tokens", value, why, "leave the flag out")


def _needs_transformers(path: Path) -> DataError:
    fix = "pip install 'megatron-kvshare[hf]'"
    return _fault(
        "--tokenizer-model", str(path), "Hugging Face tokenizers need the extra `hf`", fix
    )


def _fault(where: str, value: object, rule: str, fix: str) -> DataError:
    return DataError(Fault(where=where, value=value, rule=rule, fix=fix))
