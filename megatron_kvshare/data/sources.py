"""Which documents feed training and validation, with every check before data is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_kvshare.config import DataConfig
from megatron_kvshare.config.blend import parse_blend, parse_split
from megatron_kvshare.data.token_files import TokenFiles, open_checked
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.errors import DataError, Fault
from megatron_kvshare.megatron_api.datasets import DataPart, split_ranges

_SPLITS_TO_TRY = ("969,30,1", "98,2,0", "95,5,0", "90,10,0", "80,20,0", "67,33,0", "1,1,0")


@dataclass(frozen=True)
class Source:
    """Documents ``[first, end)`` of one pair of token files.

    ``weight`` is its share of a blend; None: by its number of tokens.
    """

    files: TokenFiles
    documents: tuple[int, int]
    weight: float | None

    @property
    def tokens(self) -> int:
        """Tokens in one epoch."""
        return self.files.count_tokens(*self.documents)


def find_sources(
    data: DataConfig, parts: Sequence[DataPart], vocabulary: Vocabulary
) -> dict[DataPart, list[Source]]:
    """Open and check the documents of every requested part.

    Args:
        data: data settings, already checked on their own.
        parts: what the run reads.
        vocabulary: the token ids the model knows.

    Raises:
        DataError: all faults at once: files, tokens outside the vocabulary, another tokenizer; or a
            split that leaves a part without documents or tokens.
    """
    opened = _Opened()
    separate = not data.data_path
    sources: dict[DataPart, list[Source]] = {}
    for part in parts:
        flag, words = _paths(data, part)
        if not words:
            opened.faults.append(_no_data(flag, part))
        blend = parse_blend(flag, words)
        files = [(opened.open(prefix), weight) for prefix, weight in blend]
        sources[part] = [
            Source(found, (0, found.num_documents), weight) for found, weight in files if found
        ]
    for found in opened.files.values():
        opened.faults += _check_tokens(found, data, vocabulary)
    if opened.faults:
        raise DataError(opened.faults)
    return sources if separate else _split(data.split, sources)


class _Opened:
    """Token files by prefix, each opened and reported once."""

    def __init__(self) -> None:
        self.files: dict[str, TokenFiles] = {}
        self.broken: set[str] = set()
        self.faults: list[Fault] = []

    def open(self, prefix: str) -> TokenFiles | None:
        if prefix not in self.files and prefix not in self.broken:
            try:
                self.files[prefix] = open_checked(prefix)
            except DataError as error:
                self.broken.add(prefix)
                self.faults.extend(error.faults)
        return self.files.get(prefix)


def usable_split(files: TokenFiles, parts: Sequence[DataPart]) -> str | None:
    """A ``--split`` that gives every requested part of these files some tokens, if there is one."""
    candidates = _SPLITS_TO_TRY if len(parts) > 1 else ("100,0,0",)
    for split in candidates:
        ranges = split_ranges(parse_split(split), files.num_documents)
        if all(files.count_tokens(*ranges[part]) for part in parts):
            return split
    return None


def token_outside(where: str, token: int, vocab_size: int) -> Fault:
    """The fault of a token id that the model has no embedding for."""
    fix = f"use the data's own tokenizer, or --vocab-size of at least {token + 1}"
    if token < 0:
        fix = "make the files again with `kvshare preprocess`: ids are never negative"
    return Fault(where, token, f"token id outside the vocabulary of {vocab_size}", fix)


def _paths(data: DataConfig, part: DataPart) -> tuple[str, Sequence[str]]:
    if data.data_path:
        return "--data-path", data.data_path
    separate = {
        DataPart.train: data.train_data_path,
        DataPart.valid: data.valid_data_path,
        DataPart.test: data.test_data_path,
    }
    if not any(separate.values()):
        return "--data-path", ()
    return f"--{part.name}-data-path", separate[part]


def _split(split: str, sources: dict[DataPart, list[Source]]) -> dict[DataPart, list[Source]]:
    """Give each part its documents of every source."""
    shares = parse_split(split)
    faults = []
    cut: dict[DataPart, list[Source]] = {}
    for part, whole in sources.items():
        cut[part] = []
        for source in whole:
            documents = split_ranges(shares, source.files.num_documents)[part]
            piece = replace(source, documents=documents)
            cut[part].append(piece)
            if piece.tokens == 0:
                faults.append(_empty_part(split, part, piece, list(sources)))
    if faults:
        raise DataError(faults)
    return cut


def _empty_part(split: str, part: DataPart, piece: Source, parts: Sequence[DataPart]) -> Fault:
    first, end = piece.documents
    files = piece.files
    left = f"{end - first} documents without tokens" if end > first else "no documents"
    better = usable_split(files, parts)
    fix = f"use --split {better}"
    if better is None:
        fix = (
            "give more documents, use --split 100,0,0 with --eval-iters 0, "
            "or give --train-data-path and --valid-data-path instead"
        )
    rule = f"{left} of {files.num_documents} in {files.prefix} for the {part.name} part"
    return Fault("--split", split, rule, fix)


def _check_tokens(files: TokenFiles, data: DataConfig, vocabulary: Vocabulary) -> list[Fault]:
    faults = []
    made_by = files.notes.get("tokenizer_sha256")
    if made_by and vocabulary.fingerprint and made_by != vocabulary.fingerprint:
        name = files.notes.get("tokenizer_model")
        rule = f"{files.prefix} was made with another tokenizer ({name})"
        fix = "pass the tokenizer the data was made with, or preprocess the text again"
        faults.append(Fault("--tokenizer-model", data.tokenizer_model, rule, fix))
    packed = data.reset_attention_mask or data.reset_position_ids or data.eod_mask_loss
    scan = files.scan(vocabulary.eod if packed else None)
    faults += [
        token_outside(files.prefix, token, vocabulary.size)
        for token in dict.fromkeys((scan.smallest, scan.largest))
        if not 0 <= token < vocabulary.size
    ]
    ends = files.notes.get("eod") if files.notes.get("append_eod") else None
    if packed and ends not in (None, vocabulary.eod):
        rule = (
            f"{files.prefix} ends documents with token {ends}, the tokenizer has {vocabulary.eod}"
        )
        fix = "preprocess the text again, with the tokenizer as it is now"
        faults.append(Fault("--tokenizer-model", data.tokenizer_model, rule, fix))
    elif packed and not scan.found:
        where = "--reset-attention-mask, --reset-position-ids, --eod-mask-loss"
        rule = f"the data has no end-of-document token (id {vocabulary.eod})"
        fix = "preprocess it again with --append-eod, or leave the flags out"
        faults.append(Fault(where, files.prefix, rule, fix))
    return faults


def _no_data(flag: str, part: DataPart) -> Fault:
    fix = "give the prefix of files made by `kvshare preprocess`, or --mock-data"
    if flag == "--valid-data-path":
        fix = f"give {flag}, or --eval-iters 0"
    return Fault(flag, None, f"no data for the {part.name} part", fix)
