"""Proof that exported tokenizer files give the token ids of the training: generated texts that
reach every rule of a tokenizer go through both."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_kvshare.data.tokenizers import Tokenizer
from megatron_kvshare.errors import CheckpointError, Fault

Encode = Callable[[list[str]], list[list[int]]]
_SEED = 0
_MOST_PIECES = 40_000
"""Of larger vocabularies, this many pieces by chance."""
_SHOWN = 6
"""Ids on either side of the first difference."""

_TEXTS = (
    "",
    "Fellow-Citizens of the Senate and House of Representatives:",
    "  Two spaces, a tab\tand\n\nnew lines; 1,234.56 and 2026.\n",
    "Ünïcödé, 日本語, Ελληνικά, emoji 🙂, €.",
    " leading and trailing ",
    "def f(x):\n    return x ** 2  # code",
    "Русский, العربية, עברית, हिन्दी, ไทย, 한국어, Tiếng Việt",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 1️⃣ ｆｕｌｌ ﬁne ① ½ Å Ａ\u0301 e\u0302\u0301",
    "x" * 3000,
    "0123456789" * 40,
    "<s> </s> <unk> <pad> <mask> [INST] <|endoftext|> <0x41> <bos> <eos>",
    "https://example.org/a?b=c&d=%20#e foo@bar.com snake_case CamelCase ALLCAPS don't",
)
_SPACES = (
    " \t\n\r\v\f\x00\x1c\x85\xa0\u1680\u2000\u2003\u2009\u200a\u200b\u200c\u200d\u2028\u2029"
    "\u202f\u205f\u2060\u2581\u3000\ufe0f\ufeff\ufffd"
)
"""What looks like nothing: white space, joiners, marks of order and of spaces."""


def prove_tokenizer(trained: Tokenizer, folder: Path, rules: Iterable[str] = ()) -> None:
    """Compare a tokenizer with the files of ``folder``, as transformers reads them by default and
    as the bare ``tokenizer.json``: token ids of texts, and the texts of these. ``rules``: what it
    is known to replace in a text.

    Raises:
        CheckpointError: a text gives other token ids, or these another text.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import AutoTokenizer
    from transformers.utils import logging

    bare = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would notice that it does not know the type of model
    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # it raises nearly anything for files that it cannot use
        rule = f"transformers cannot load what was written: {error}"
        raise _refused(folder, type(error).__name__, rule) from error
    finally:
        logging.set_verbosity(verbosity)
    readers: dict[str, Encode] = {
        "tokenizer.json": lambda texts: [
            each.ids for each in bare.encode_batch_fast(texts, add_special_tokens=False)
        ],
        "AutoTokenizer": lambda texts: loaded(texts)["input_ids"],
    }
    for batch in _batches(samples(trained.spellings(), rules)):
        wanted = [trained.encode(text) for text in batch]
        for reader, encode in readers.items():
            for text, ids, got in zip(batch, wanted, encode(batch), strict=True):
                if ids != got:
                    raise _difference(text, reader, trained, encode, folder)
        known = [ids for ids in wanted if loaded.unk_token_id not in ids]
        for ids, text in zip(known, loaded.batch_decode(known), strict=True):
            if trained.decode(ids) != text:
                rule = f"the ids {ids[:12]} become this, in training {trained.decode(ids)!r}"
                raise _refused(folder, text, rule)


def _batches(texts: Iterable[str], size: int = 4096) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _difference(
    text: str, reader: str, trained: Tokenizer, encode: Encode, folder: Path
) -> CheckpointError:
    """The error for a text, made as short as it gets."""

    def differs(part: str) -> bool:
        return trained.encode(part) != encode([part])[0]

    text = _shortest(text, differs)
    wanted, got = trained.encode(text), encode([text])[0]
    pairs = enumerate(zip(wanted, got, strict=False))
    at = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(wanted), len(got)))
    start = max(at - _SHOWN, 0)
    ours, theirs = wanted[start : at + _SHOWN], got[start : at + _SHOWN]
    names = [[trained.piece(token) for token in ids] for ids in (theirs, ours)]
    rule = (
        f"from token {start} on {reader} gives {theirs} {names[0]}, in training it was {ours} "
        f"{names[1]}"
    )
    return _refused(folder, text, rule)


def _refused(folder: Path, value: object, rule: str) -> CheckpointError:
    fix = (
        "export --without-tokenizer, and use the tokenizer of the training itself; Hugging Face's "
        "library cannot express every tokenizer"
    )
    return CheckpointError(Fault(str(folder / "tokenizer.json"), value, rule, fix))


def _shortest(text: str, differs: Callable[[str], bool]) -> str:
    """A part of ``text`` that still differs, none of whose halves, quarters, ... can go."""
    size = len(text) // 2
    while size:
        at = 0
        while at < len(text):
            shorter = text[:at] + text[at + size :]
            if differs(shorter):
                text = shorter
            else:
                at += size
        size //= 2
    return text


# Texts ------------------------------------------------------------------------------------------


def samples(pieces: Sequence[str], rules: Iterable[str] = ()) -> Iterator[str]:
    """Texts for a vocabulary, the same at every call: first those that most often differ.
    ``pieces``: all of its tokens as text, or by name; ``rules``: what else must be reached."""
    draw = random.Random(_SEED)
    yield from _TEXTS
    yield from _around_spaces()
    yield from _names(pieces, draw)
    yield from _of_pieces(pieces, draw)
    yield from _normal_forms()
    yield from _marked(draw)
    yield from _of_categories(draw)
    yield from _by_chance(pieces, draw)
    yield from _of_rules(rules)


def _around_spaces() -> Iterator[str]:
    for one in _SPACES:
        for other in ("", " ", one, *_SPACES):
            yield f"{one}{other}"
            yield f"a{one}{other}b"
        yield from (f"{one}a", f"a{one}", f" {one}a", f"a{one} ", f"{one * 3}a{one * 5}b{one * 2}")
    yield "a\r\nb\r\n\r\nc"


def _names(pieces: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Pieces with punctuation, control pieces among them, in all neighbourhoods."""
    names = [piece for piece in pieces if len(piece) > 2 and not piece.isalnum()]
    names = [name for name in names if not name.lstrip().isalpha()]
    for name in names if len(names) < 3000 else draw.sample(names, 3000):
        other = draw.choice(names)
        yield from (name, name * 2, f"a{name}b", f" {name} ", f"{name} {name}", f"{name}\n{other}")
        yield from (name[:-1], name[1:], f"{name}{other}", f"{name}{other}x{name}", f"  {name}  x")


def _of_pieces(pieces: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Every piece alone, and in chains with others."""
    texts = list(pieces)
    if len(texts) > _MOST_PIECES:
        texts = draw.sample(texts, _MOST_PIECES)
    yield from texts
    draw.shuffle(texts)
    for start in range(0, len(texts), 12):
        joint = draw.choice(("", "", " ", "\n"))
        yield joint.join(texts[start : start + 12])


def _normal_forms() -> Iterator[str]:
    """All characters that a normalisation changes, in its four forms, a row of them a time."""
    changed = [
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if not unicodedata.is_normalized("NFKC", character)
        or not unicodedata.is_normalized("NFD", character)
    ]
    hangul = [character for character in changed if "가" <= character <= "힣"]
    changed = [character for character in changed if not "가" <= character <= "힣"] + hangul[::40]
    for start in range(0, len(changed), 24):
        row = changed[start : start + 24]
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            yield unicodedata.normalize(form, "".join(row))
        yield "x".join(row)


def _of_rules(rules: Iterable[str]) -> Iterator[str]:
    for rule in rules:
        yield f"{rule}a{rule}{rule} {rule}"
        yield f"a {rule}\u0301{rule}\u200d{rule}"


def _marked(draw: random.Random) -> Iterator[str]:
    """Letters with one to four combining marks, in any order."""
    marks = [chr(code) for code in range(0x300, 0x370)]
    letters = "aeiouyAEOUcnszdφαωіの🙂 1"
    for letter in letters:
        yield "".join(letter + mark for mark in marks)
    for _ in range(600):
        parts = (
            draw.choice(letters) + "".join(draw.choices(marks, k=draw.randint(1, 4)))
            for _ in range(6)
        )
        yield "".join(parts)


def _of_categories(draw: random.Random) -> Iterator[str]:
    """Characters of every category of Unicode, private and unassigned ones too, none of which is
    half of a pair."""
    plain = [chr(code) for code in range(0x250)]
    for start in range(0, len(plain), 16):
        row = plain[start : start + 16]
        yield "".join(row)
        yield "\u0301".join(row)
    found: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        found.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    del found["Cs"]
    for characters in found.values():
        chosen = characters if len(characters) < 400 else draw.sample(characters, 400)
        for start in range(0, len(chosen), 20):
            row = chosen[start : start + 20]
            yield "".join(row)
            yield " ".join(row)
            yield f"a{'b'.join(row)}"


def _by_chance(pieces: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Pieces, parts of pieces, spaces and characters of many scripts in any order."""
    texts = [piece for piece in pieces if piece]
    others = [chr(draw.randrange(0x20, 0xD800)) for _ in range(300)] + [*_SPACES, *"0123456789"]
    for _ in range(4000):
        words = []
        for _ in range(draw.randint(1, 12)):
            word = draw.choice(texts) if texts and draw.random() < 0.7 else draw.choice(others)
            words.append(word[: draw.randint(1, len(word))] if draw.random() < 0.2 else word)
        yield "".join(words)
