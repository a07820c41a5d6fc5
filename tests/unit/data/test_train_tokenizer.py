"""Training a tokenizer drops nothing and gives the same model every time."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion.tokenizer import write_tokenizer
from megatron_kvshare.conversion.tokenizer_proof import prove_tokenizer
from megatron_kvshare.data.text_sample import cut_sentences, cut_stream, draw_sample
from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_kvshare.errors import DataError

from .conftest import WORDS


@given(st.text(alphabet="aé日🙂 .!\n", max_size=200), st.integers(4, 40))
def test_cutting_keeps_every_character_and_the_limit(text: str, limit: int) -> None:
    pieces = list(cut_sentences(text, limit))
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)
    assert "".join(pieces).replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_cuts_prefer_sentence_ends_then_spaces() -> None:
    assert list(cut_sentences("One two. Three four", 12)) == ["One two.", "Three four"]
    assert list(cut_sentences("aaaa bbbb cccc", 11)) == ["aaaa bbbb", "cccc"]
    assert list(cut_sentences("ééé", 3)) == ["é", "é", "é"]


def test_one_long_line_is_learned_from(tmp_path: Path) -> None:
    """SentencePiece alone would drop it: the words' pieces show that it was read."""
    path = tmp_path / "long.txt"
    path.write_text("zyxwv utsrq " * 4000)
    job = TokenizerJob(inputs=(str(path),), output=str(tmp_path / "t"), vocab_size=288)
    trained = train_tokenizer(job)
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(trained.model))
    assert trained.sample.is_all and trained.sample.of_bytes > 47_000  # without border spaces
    assert len(tokenizer.encode("zyxwv utsrq")) <= 2
    assert len(trained.files[1].read_text("utf-8").splitlines()) == 288


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text((WORDS + "\n") * 50)
    lines.write_text(json.dumps({"body": (WORDS + "\n") * 50}) + "\n")
    models = []
    for path, folder in ((text, "x"), (text, "longer/name"), (lines, "y")):
        job = TokenizerJob(
            inputs=(str(path),), output=str(tmp_path / folder), vocab_size=320, json_key="body"
        )
        models.append(train_tokenizer(job).model.read_bytes())
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize(
    "text, vocab_size, message",
    [
        (WORDS, 5000, r"too short for so many tokens.*use --vocab-size [0-9]+ or more text"),
        (WORDS, 100, "use --vocab-size of at least [0-9]+"),
        ("\n \n", 400, "holds no text"),
    ],
)
def test_impossible_vocabularies(tmp_path: Path, text: str, vocab_size: int, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    job = TokenizerJob(inputs=(str(path),), output=str(tmp_path / "t"), vocab_size=vocab_size)
    with pytest.raises(DataError, match=message):
        train_tokenizer(job)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_broken_line_is_named_though_it_passes_through_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    job = TokenizerJob(inputs=(str(path),), output=str(tmp_path / "t"), vocab_size=400)
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        train_tokenizer(job)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text(WORDS * 20)
    argv = ["train-tokenizer", "--input", str(path), "--output", str(tmp_path / "d" / "t")]
    assert main([*argv, "--vocab-size", "300"]) == 0
    assert (tmp_path / "d" / "t.model").is_file()
    assert "300 tokens" in capsys.readouterr().out
    assert main([*argv, "--vocab-size", "0"]) == 2
    blocked = ["--output", str(path / "t"), "--vocab-size", "300"]
    assert main(["train-tokenizer", "--input", str(path), *blocked]) == 2
    assert "cannot be written" in capsys.readouterr().err


@given(st.lists(st.text(alphabet="aé日🙂 .!\n", max_size=60), max_size=8), st.integers(4, 40))
def test_a_stream_is_cut_without_loss(texts: list[str], limit: int) -> None:
    pieces = list(cut_stream(texts, limit))
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)
    assert "".join(pieces) == "".join(text + "\n" for text in texts)


def test_a_stream_is_cut_after_lines() -> None:
    assert list(cut_stream(["one", "two three"], 8)) == ["one\n", "two", " three\n"]


def test_a_sample_is_random_ordered_and_the_same_every_time() -> None:
    pieces = [f"{number:03d}" for number in range(300)]
    whole = draw_sample(pieces, 900, None, 0)
    assert whole.is_all and whole.pieces == pieces and whole.of_bytes == 900
    some = draw_sample(pieces, 600, None, 0)
    assert some == draw_sample(iter(pieces), 600, None, 0) != draw_sample(pieces, 600, None, 1)
    assert (len(some.pieces), some.text_bytes, some.of_pieces) == (200, 600, 300)
    assert some.pieces == sorted(some.pieces) and not some.is_all
    assert len(draw_sample(pieces, 600, 20, 0).pieces) == 20
    early = [sum(p < "150" for p in draw_sample(pieces, 300, None, s).pieces) for s in range(50)]
    assert 45 < sum(early) / 50 < 55  # of 100, half are expected, within 5 deviations


def test_a_sample_takes_the_memory_it_is_given() -> None:
    tracemalloc.start()
    draw_sample(("x" * 1000 for _ in range(20_000)), 1_000_000, None, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_500_000


def random_words(seed: int, count: int) -> str:
    """Lines of made-up words: enough of them for any vocabulary here."""
    random = Random(seed)
    words = [
        "".join(random.choices("abcdefghijklmnop", k=random.randint(2, 7))) for _ in range(400)
    ]
    lines = (" ".join(random.choices(words, k=9)) for _ in range(count))
    return "\n".join(line if number % 7 else "" for number, line in enumerate(lines))


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "byte-level-bpe"])
def test_every_kind_trains_encodes_and_exports(tmp_path: Path, model_type: str) -> None:
    """Twice the same bytes; every text comes back; the export gives the same ids."""
    text = tmp_path / "a.txt"
    text.write_text(random_words(0, 120))
    made = []
    for name in ("x", "y"):
        job = TokenizerJob(
            inputs=(str(text),), output=str(tmp_path / name), vocab_size=400, model_type=model_type
        )
        made.append(train_tokenizer(job))
    contents = [[file.read_bytes() for file in each.files] for each in made]
    assert contents[0] == contents[1]
    byte_level = model_type == "byte-level-bpe"
    kind = "HuggingFaceTokenizer" if byte_level else "SentencePieceTokenizer"
    tokenizer = load_tokenizer(kind, str(made[0].model))
    assert tokenizer.vocab_size == 400 and tokenizer.eod == (0 if byte_level else 2)
    for sample in (text.read_text()[:500].strip(), "naïve 日本語 🙂 12", "a  b"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    words = text.read_text().split("\n", 1)[1][:2000]
    assert len(tokenizer.encode(words)) < 0.8 * len(words)
    folder = tmp_path / "export"
    folder.mkdir()
    written = write_tokenizer(tokenizer, made[0].model, folder)
    prove_tokenizer(tokenizer, folder, written.rules)


def test_byte_level_learns_line_breaks(tmp_path: Path) -> None:
    """Lines of a file are read one by one, and blank ones are text here."""
    text = tmp_path / "a.txt"
    text.write_text("one two\n\n\n\nthree four\n\n\n\n" * 300)
    job = TokenizerJob(
        inputs=(str(text),), output=str(tmp_path / "t"), vocab_size=270, model_type="byte-level-bpe"
    )
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(train_tokenizer(job).model))
    assert any(set(text) == {"\n"} and len(text) > 1 for text in tokenizer.spellings())


def test_of_much_text_a_part_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": random_words(number, 40)}) for number in range(50)]
    path.write_text("\n".join([*lines, "{", json.dumps({"text": None})]) + "\n")
    argv = ["train-tokenizer", "--input", str(path), "--output", str(tmp_path / "t")]
    argv += ["--vocab-size", "400", "--max-sentences", "300"]
    assert main(argv) == 2
    assert "a.jsonl:51" in capsys.readouterr().err
    assert main([*argv, "--on-bad-record", "skip"]) == 0
    printed = capsys.readouterr()
    assert "(300 lines, a random choice of 1,7" in printed.out
    assert printed.err.count("bad records were left out") == 2
    job = TokenizerJob(
        inputs=(str(path),),
        output=str(tmp_path / "u"),
        vocab_size=400,
        max_text_bytes=10_000,
        skips_bad_records=True,
    )
    assert train_tokenizer(job).sample.text_bytes <= 10_000


@pytest.mark.parametrize(
    ("text", "vocab_size", "message"),
    [
        (WORDS, 5000, r"too short for so many tokens.*use --vocab-size \d+ or more text"),
        (WORDS, 256, "use --vocab-size of at least 257"),
        ("\n \n", 400, "holds no text"),
    ],
)
def test_impossible_vocabularies_of_bytes(
    tmp_path: Path, text: str, vocab_size: int, message: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    job = TokenizerJob(
        inputs=(str(path),),
        output=str(tmp_path / "t"),
        vocab_size=vocab_size,
        model_type="byte-level-bpe",
    )
    with pytest.raises(DataError, match=message):
        train_tokenizer(job)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_bytes_leave_no_character_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = "train-tokenizer --input a --output t --vocab-size 300 --model-type byte-level-bpe"
    assert main([*words.split(), "--character-coverage", "0.5"]) == 2
    assert "--character-coverage" in capsys.readouterr().err
