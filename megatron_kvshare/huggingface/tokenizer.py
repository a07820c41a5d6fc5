"""Tokenizer files of an export (L5), proven to give the token ids the model was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_kvshare.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_kvshare.errors import CheckpointError, Fault
from megatron_kvshare.huggingface.folder import write_json

SAMPLES = (
    "Fellow-Citizens of the Senate and House of Representatives:",
    "  Two spaces, a tab\tand\n\nnew lines; 1,234.56 and 2026.\n",
    "Ünïcödé, 日本語, Ελληνικά, emoji 🙂, €.",
    " leading and trailing ",
    "def f(x):\n    return x ** 2  # code",
)


class Written(NamedTuple):
    """Special token ids for config.json; the two are None where the tokenizer has no such token."""

    bos: int | None
    eos: int | None

    @property
    def ids(self) -> dict[str, int]:
        named = {"bos_token_id": self.bos, "eos_token_id": self.eos}
        return {name: token for name, token in named.items() if token is not None}


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path) -> Written:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, and try them out.

    No token is ever added to a text by itself: in training, documents are joined by the
    end-of-document token and begin with nothing.

    Raises:
        CheckpointError: the written files give other token ids.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        written = _from_sentencepiece(source, folder)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        written = _copied(tokenizer, source, folder)
    _try_out(tokenizer, folder)
    return written


def _try_out(tokenizer: Tokenizer, folder: Path) -> None:
    again = HuggingFaceTokenizer(folder)
    for text in SAMPLES:
        wanted, got = tokenizer.encode(text), again.encode(text)
        if wanted != got:
            rule = f"{text!r} gives {got[:8]}..., in training it gave {wanted[:8]}..."
            fix = "export --without-tokenizer, and tell us about this tokenizer"
            raise CheckpointError(Fault("tokenizer.json", str(folder), rule, fix))


def _copied(tokenizer: HuggingFaceTokenizer, source: Path, folder: Path) -> Written:
    """The file itself; what it would add to a text is left out of the settings."""
    origin = source if source.is_dir() else source.parent
    settings: dict[str, Any] = {}
    if (origin / "tokenizer_config.json").is_file():
        settings = json.loads((origin / "tokenizer_config.json").read_text(encoding="utf-8"))
    content = json.loads(tokenizer.definition)
    content["post_processor"] = None
    write_json(folder / "tokenizer.json", content)
    kept = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "chat_template")
    settings = {name: settings[name] for name in kept if settings.get(name) is not None}
    settings |= tokenizer.named
    for extra in ("chat_template.jinja",):
        if (origin / extra).is_file():
            shutil.copyfile(origin / extra, folder / extra)
    _write_settings(folder, settings)
    return Written(tokenizer.bos, tokenizer.eod)


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    usual = {
        "tokenizer_class": "PreTrainedTokenizerFast",
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
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    fast = _fast_tokenizer(model, pieces)
    fast.save(str(folder / "tokenizer.json"))
    shutil.copyfile(source, folder / "tokenizer.model")
    trainer = model.trainer_spec
    special = {
        "unk_token": trainer.unk_id,
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
    }
    there = {name: pieces[token][0] for name, token in special.items() if token >= 0}
    _write_settings(folder, there)
    bos, eos = (token if token >= 0 else None for token in (trainer.bos_id, trainer.eos_id))
    return Written(bos, eos)


def _fast_tokenizer(model: Any, pieces: Sequence[tuple[str, float]]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    bytes_too = trainer.byte_fallback
    if trainer.model_type == trainer.BPE:
        vocabulary = {piece: token for token, (piece, _) in enumerate(pieces)}
        kind = models.BPE(
            vocabulary,
            _merges(model),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=bytes_too,
        )
    else:
        kind = models.Unigram(list(pieces), trainer.unk_id, bytes_too)
    fast = Tokenizer(kind)
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1))
    fast.decoder = decoders.Sequence(back)
    control = [piece.piece for piece in model.pieces if piece.type in (2, 3)]
    fast.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return fast


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _merges(model: Any) -> list[tuple[str, str]]:
    """Pairs that make a piece, in SentencePiece's order: by the score of what they make."""
    rank = {piece.piece: -piece.score for piece in model.pieces if piece.type in (1, 4)}
    order = {piece.piece: token for token, piece in enumerate(model.pieces)}
    found = []
    for whole in rank:
        halves = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        pairs = [pair for pair in halves if pair[0] in rank and pair[1] in rank]
        pairs.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        found += [(rank[whole], order[whole], pair) for pair in pairs]
    return [pair for _, _, pair in sorted(found, key=lambda each: each[:2])]
