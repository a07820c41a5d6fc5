"""The token ids a run works with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_kvshare.config import DataConfig
from megatron_kvshare.config.blend import parse_blend
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.errors import DataError, Fault


@dataclass(frozen=True)
class Vocabulary:
    """``size`` true token ids (unpadded), the end-of-document id if there is one, the tokenizer's
    fingerprint.
    """

    size: int
    eod: int | None = None
    fingerprint: str | None = None


def resolve_vocabulary(data: DataConfig, vocab_size: int | None) -> Vocabulary:
    """Find the vocabulary: from the tokenizer, else from what preprocess noted beside the data,
    else as given.

    Args:
        data: data settings.
        vocab_size: ``--vocab-size``; may be larger than the tokenizer's, never smaller.

    Raises:
        DataError: no source of a size, a broken tokenizer, or a size below the tokenizer's.
    """
    known = _from_tokenizer(data, vocab_size)
    if known is None or known.eod is None:
        known = _from_notes(data, known) or known
    if known is None:
        if vocab_size is None:
            raise DataError(_unknown_size())
        known = Vocabulary(vocab_size, eod=vocab_size - 1 if data.mock_data else None)
    if vocab_size is not None and vocab_size < known.size:
        raise DataError(
            Fault(
                where="--vocab-size",
                value=vocab_size,
                rule=f"smaller than the vocabulary of the tokenizer or data ({known.size})",
                fix=f"leave it out, or use --vocab-size {known.size}",
            )
        )
    packed = data.reset_attention_mask or data.reset_position_ids or data.eod_mask_loss
    if packed and known.eod is None:
        raise DataError(_no_eod())
    return Vocabulary(vocab_size or known.size, known.eod, known.fingerprint)


def _from_tokenizer(data: DataConfig, vocab_size: int | None) -> Vocabulary | None:
    is_null = data.tokenizer_type == "NullTokenizer"
    has_none = data.tokenizer_type == "ByteLevelTokenizer" or (is_null and vocab_size)
    if data.tokenizer_model is None and not has_none:
        return None
    kind, model = data.tokenizer_type, data.tokenizer_model
    trusted = data.trust_remote_code
    tokenizer = load_tokenizer(kind, model, vocab_size, trust_remote_code=trusted)
    return Vocabulary(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint)


def _from_notes(data: DataConfig, known: Vocabulary | None) -> Vocabulary | None:
    """What `kvshare preprocess` noted beside the first source; later sources are checked token by
    token. Of a tokenizer that is known, but for the end of documents, it must be the same.
    """
    for flag, words in (
        ("--data-path", data.data_path),
        ("--train-data-path", data.train_data_path),
    ):
        if not words or data.mock_data:
            continue
        prefix = parse_blend(flag, words)[0][0]
        notes = open_checked(prefix).notes
        size, eod = notes.get("vocab_size"), notes.get("eod")
        eod = eod if isinstance(eod, int) else None
        if known is not None and known.fingerprint == notes.get("tokenizer_sha256"):
            return replace(known, eod=eod)
        if known is None and isinstance(size, int):
            return Vocabulary(size, eod)
    return None


def _unknown_size() -> Fault:
    return Fault(
        where="--vocab-size",
        value=None,
        rule="the number of token ids is not known: no tokenizer, and no note beside the data",
        fix="give --tokenizer-model, or --vocab-size",
    )


def _no_eod() -> Fault:
    return Fault(
        where="--reset-attention-mask, --reset-position-ids, --eod-mask-loss",
        value="on",
        rule="packed documents need an end-of-document token, and none is known",
        fix="give the --tokenizer-model the data was made with, with eos_token named in its"
        " tokenizer_config.json, or leave the flags out",
    )
