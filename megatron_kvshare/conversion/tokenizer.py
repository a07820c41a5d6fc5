"""Tokenizer files of an export, which give the token ids the model was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_kvshare.conversion.folder import read_json, write_json
from megatron_kvshare.conversion.from_sentencepiece import fast_tokenizer, replaced
from megatron_kvshare.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_kvshare.errors import DataError, Fault


class Written(NamedTuple):
    """Special token ids for config.json; the two are None where the tokenizer has no such token.

    ``rules``: what the tokenizer replaces in a text before it looks for pieces, as far as known.
    """

    bos: int | None
    eos: int | None
    rules: Iterable[str] = ()

    @property
    def ids(self) -> dict[str, int]:
        named = {"bos_token_id": self.bos, "eos_token_id": self.eos}
        return {name: token for name, token in named.items() if token is not None}


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path) -> Written:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; :func:`prove_tokenizer` tries them.

    No token is ever added to a text by itself: in training, documents are joined by the
    end-of-document token and begin with nothing.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(source, folder)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        rule = "Hugging Face folders take SentencePiece models and tokenizers of Hugging Face only"
        fix = "give --without-tokenizer, or --tokenizer-model of an equal tokenizer.json"
        raise DataError(Fault("--tokenizer-model", str(source), rule, fix))
    return _copied(tokenizer, source, folder)


def _copied(tokenizer: HuggingFaceTokenizer, source: Path, folder: Path) -> Written:
    """The file itself; what it would add to a text, or cut off, is left out."""
    origin = source if source.is_dir() else source.parent
    content = json.loads(tokenizer.definition)
    content |= {"post_processor": None, "truncation": None, "padding": None}
    write_json(folder / "tokenizer.json", content)
    settings: dict[str, Any] = {}
    if (origin / "tokenizer_config.json").is_file():
        settings = read_json(origin / "tokenizer_config.json")
    tokens = ("bos_token", "eos_token", "unk_token", "pad_token")
    kept = (*tokens, "model_max_length", "chat_template", "split_special_tokens")
    settings = {name: _text(settings[name]) for name in kept if settings.get(name) is not None}
    settings |= tokenizer.named
    added = {token["content"] for token in content.get("added_tokens", ())}
    if not settings.get("split_special_tokens"):
        for name in tokens:
            if settings.get(name) not in added:
                # transformers would add it as a token of its own, and find it in texts.
                settings.pop(name, None)
    for extra in ("chat_template.jinja",):
        if (origin / extra).is_file():
            shutil.copyfile(origin / extra, folder / extra)
    _write_settings(folder, settings)
    return Written(tokenizer.bos, tokenizer.eod)


def _text(token: Any) -> Any:
    """A token is written as its text, or as an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """``add_*_token`` are for converters to GGUF, which take true where nothing is said."""
    usual = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", {**usual, **settings})


def _from_sentencepiece(source: Path, folder: Path) -> Written:
    """The same pieces and merges for Hugging Face's tokenizers; the ``.model`` is kept beside."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    if source.is_dir():
        source = source / "tokenizer.model"
    model = protobuf.ModelProto()
    model.ParseFromString(source.read_bytes())
    fast_tokenizer(model).save(str(folder / "tokenizer.json"))
    shutil.copyfile(source, folder / "tokenizer.model")
    trainer = model.trainer_spec
    special = {
        "unk_token": trainer.unk_id,
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
    }
    there = {name: model.pieces[token].piece for name, token in special.items() if token >= 0}
    _write_settings(
        folder,
        {
            **there,
            "add_prefix_space": model.normalizer_spec.add_dummy_prefix,
            # To SentencePiece the name of a special token in a text is text.
            "split_special_tokens": True,
        },
    )
    bos, eos = (token if token >= 0 else None for token in (trainer.bos_id, trainer.eos_id))
    return Written(bos, eos, replaced(model))
