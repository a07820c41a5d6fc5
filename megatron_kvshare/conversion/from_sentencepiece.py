"""SentencePiece models in Hugging Face's tokenizers: the same pieces for the same text.

What its library cannot express (a map of characters under which sequences compose) is tried as
nearly as it can be; :mod:`megatron_kvshare.conversion.tokenizer_proof` finds the difference.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

SPACE = "▁"
_ALL = 1 << 20
"""More spaces than a text begins with."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def fast_tokenizer(model: Any) -> Any:
    """A ``tokenizers.Tokenizer`` of a SentencePiece ``ModelProto``.

    Control pieces are no added tokens: their names in a text are text, as for SentencePiece.
    """
    from tokenizers import Tokenizer

    is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
    fast = Tokenizer(_bpe(model) if is_bpe else _unigram(model))
    fast.normalizer = _normalizer(model)
    splits = _splits(model, is_bpe)
    if splits:
        from tokenizers import pre_tokenizers

        fast.pre_tokenizer = pre_tokenizers.Sequence(splits)
    fast.decoder = _decoder(model)
    return fast


def _texts(model: Any, *kinds: int) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type in kinds]


def _bpe(model: Any) -> Any:
    """User-defined symbols are never merged; each comes to the model as a word of its own, which
    ``ignore_merges`` looks up."""
    from tokenizers import models

    return models.BPE(
        {piece.piece: token for token, piece in enumerate(model.pieces)},
        _merges(model),
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=bool(_texts(model, _USER_DEFINED)),
    )


def _merges(model: Any) -> list[tuple[str, str]]:
    """Pairs that make a piece, in SentencePiece's order: by the score of what they make."""
    rank = {piece.piece: -piece.score for piece in model.pieces if piece.type == _NORMAL}
    order = {piece.piece: token for token, piece in enumerate(model.pieces)}
    found = []
    for whole in rank:
        halves = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        pairs = [pair for pair in halves if pair[0] in rank and pair[1] in rank]
        pairs.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        found += [(rank[whole], order[whole], pair) for pair in pairs]
    return [pair for _, _, pair in sorted(found, key=lambda each: each[:2])]


def _unigram(model: Any) -> Any:
    """User-defined symbols have the score that SentencePiece gives them, whatever the file says:
    more than any piece of a text, the more the longer."""
    from tokenizers import models

    scored = [
        (
            piece.piece,
            0.1 * (len(piece.piece.encode()) - 1) if piece.type == _USER_DEFINED else piece.score,
        )
        for piece in model.pieces
    ]
    return models.Unigram(scored, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _normalizer(model: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec = model.normalizer_spec
    space = SPACE if spec.escape_whitespaces else " "
    at_end = model.trainer_spec.treat_whitespace_as_suffix
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix and not at_end:
        steps.append(normalizers.Prepend(space))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    suffix = space if spec.add_dummy_prefix and at_end else ""
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{space}+\z|(?<=[^{space}])\z"), suffix))
    elif suffix:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), suffix))
    return normalizers.Sequence(steps)


def _splits(model: Any, is_bpe: bool) -> list[Any]:
    """Where a text is cut so that no piece is found that SentencePiece would not find."""
    from tokenizers import Regex, pre_tokenizers

    symbols = sorted(_texts(model, _USER_DEFINED), key=len, reverse=True)
    splits = []
    if is_bpe and symbols:
        pattern = Regex("|".join(map(re.escape, symbols)))
        splits.append(pre_tokenizers.Split(pattern, "isolated"))
    if symbols or not is_bpe:
        cuts = _cuts(model)
        if cuts:
            splits.append(pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous"))
    return splits


def _cuts(model: Any) -> list[str]:
    """Patterns that end inside each name that is no text (``<s>``, ``<0x41>``), where no piece of a
    text reaches across, nor a run of unknown characters: a lookup of whole words or of all pieces
    then does not find the name. Without such a place the proof finds the difference."""
    pieces = _texts(model, _NORMAL, _USER_DEFINED)
    across = {text[at : at + 2] for text in pieces for at in range(len(text) - 1)}
    known = {text for text in pieces if len(text) == 1}
    all_known = model.trainer_spec.byte_fallback

    def can_cut(name: str, at: int) -> bool:
        pair = name[at - 1 : at + 1]
        return pair not in across and (all_known or not known.isdisjoint(pair))

    places = {
        name: next((at for at in range(1, len(name)) if can_cut(name, at)), None)
        for name in _texts(model, _UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    }
    return [
        f"{re.escape(name[:at])}(?={re.escape(name[at:])})"
        for name, at in places.items()
        if at is not None
    ]


def _decoder(model: Any) -> Any:
    from tokenizers import decoders

    spec = model.normalizer_spec
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        most = _ALL if spec.remove_extra_whitespaces else 1
        back.append(decoders.Strip(content=" ", left=most))
    return decoders.Sequence(back)


def replaced(model: Any) -> Iterator[str]:
    """What the model's normalisation replaces by something else: the keys of its map, a double
    array (Darts) of units of 32 bits behind its size in bytes."""
    content = model.normalizer_spec.precompiled_charsmap
    if not content:
        return
    (size,) = struct.unpack_from("<I", content)
    units = struct.unpack_from(f"<{size // 4}I", content, 4)
    waiting = [(0, b"")]
    while waiting:
        node, key = waiting.pop()
        unit = units[node]
        base = node ^ (unit >> 10) << ((unit & 1 << 9) >> 6)
        for byte in range(1, 256):
            child = base ^ byte
            if child < len(units) and units[child] & (1 << 31 | 0xFF) == byte:
                longer = key + bytes([byte])
                if units[child] >> 8 & 1:
                    yield longer.decode()
                waiting.append((child, longer))
