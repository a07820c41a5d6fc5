"""Bad data is refused before megatron-core, which would loop or assert, gets to see it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from megatron_kvshare.config import DataConfig
from megatron_kvshare.data.data_plan import DataRequest, plan_data
from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.data.vocabulary import Vocabulary, resolve_vocabulary
from megatron_kvshare.errors import DataError, KVShareError

from .conftest import WORDS, WriteTokens, counting_documents


def plan(vocabulary: Vocabulary | None = None, eval_iters: int = 1, **settings: object):
    request = DataRequest(
        seq_length=16,
        global_batch_size=4,
        train_iters=10,
        eval_iters=eval_iters,
        vocabulary=vocabulary or Vocabulary(100, eod=99),
    )
    return plan_data(DataConfig(**settings), request)


@pytest.mark.parametrize(
    "documents, split, fix",
    [
        (10, "969,30,1", "--split 90,10,0"),
        (2, "100,0,0", "--split 67,33,0"),
        (20, "1", "--split 969,30,1"),
    ],
)
def test_an_empty_part_names_a_split_that_works(
    write_tokens: WriteTokens, documents: int, split: str, fix: str
) -> None:
    prefix = write_tokens([[1] * 30] * documents)
    with pytest.raises(DataError) as caught:
        plan(data_path=(prefix,), split=split)
    assert fix in str(caught.value)
    assert plan(data_path=(prefix,), split=fix.split()[1]).rows


def test_a_part_of_empty_documents_is_empty(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[1] * 30] * 8 + [[]] * 2)
    with pytest.raises(DataError, match=r"2 documents without tokens.*--split 67,33,0"):
        plan(data_path=(prefix,), split="80,20,0")


def test_one_document_cannot_be_split(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[1] * 30])
    with pytest.raises(DataError, match="--split 100,0,0 with --eval-iters 0"):
        plan(data_path=(prefix,))
    assert plan(data_path=(prefix,), split="100,0,0", eval_iters=0).rows


def test_an_empty_test_part_is_fine(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[1] * 30] * 10)
    assert len(plan(data_path=(prefix,), split="90,10,0").rows) == 2


@pytest.mark.parametrize(
    "words", [("0.5", "a", "b"), ("a", "0.5"), ("0", "a"), ("-1", "a", "1", "b")]
)
def test_crooked_blends(words: tuple[str, ...]) -> None:
    with pytest.raises(KVShareError, match="--data-path"):
        plan(data_path=words)


def test_all_broken_sources_come_in_one_error(tmp_path: Path, write_tokens: WriteTokens) -> None:
    good = write_tokens(counting_documents(5))
    with pytest.raises(DataError) as caught:
        plan(data_path=(str(tmp_path / "x"), good, str(tmp_path / "y")), split="1,1,0")
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("split", ["0,100,0", "a,b", "1,2,3,4", "-1,2"])
def test_crooked_splits(write_tokens: WriteTokens, split: str) -> None:
    with pytest.raises(KVShareError, match="--split"):
        plan(data_path=(write_tokens([[1] * 30] * 10),), split=split)


def test_nothing_given() -> None:
    with pytest.raises(DataError, match="--mock-data"):
        plan()


def test_a_missing_part(write_tokens: WriteTokens) -> None:
    with pytest.raises(DataError, match="--eval-iters 0"):
        plan(train_data_path=(write_tokens([[1] * 30]),))


def break_missing(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()


def break_empty(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"")


def break_magic(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"x" * 100)


def break_cut_index(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-5])


def break_cut_header(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:20])


def break_cut_tokens(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


def break_no_documents(prefix: Path) -> None:
    header = struct.pack("<9sQBQQq", b"MMIDIDX\x00\x00", 1, 8, 0, 1, 0)
    Path(f"{prefix}.idx").write_bytes(header)


def break_notes(prefix: Path) -> None:
    Path(f"{prefix}.meta.json").write_text("{")


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_missing, "there is no file"),
        (break_empty, "is empty"),
        (break_magic, "not a Megatron index"),
        (break_cut_index, "cut off"),
        (break_cut_header, "cut off"),
        (break_cut_tokens, "bytes of tokens"),
        (break_no_documents, "bytes of tokens|no tokens"),
        (break_notes, "not JSON"),
    ],
)
def test_damaged_files(write_tokens: WriteTokens, damage, message: str) -> None:
    prefix = write_tokens(counting_documents(5))
    damage(Path(prefix))
    with pytest.raises(DataError, match=message):
        open_checked(prefix)


def test_a_nearly_right_prefix_is_corrected(write_tokens: WriteTokens, tmp_path: Path) -> None:
    prefix = write_tokens(counting_documents(5), "books_text_document")
    for wrong in (prefix + ".bin", str(tmp_path / "books")):
        with pytest.raises(DataError, match=f"pass the prefix {prefix}"):
            open_checked(wrong)


def test_tokens_outside_the_vocabulary(write_tokens: WriteTokens) -> None:
    prefix = write_tokens(counting_documents(60))
    with pytest.raises(DataError, match=r"= 99: token id outside the vocabulary of 64.*100"):
        plan(Vocabulary(64), data_path=(prefix,))


def test_packing_needs_an_end_of_document_token(write_tokens: WriteTokens) -> None:
    prefix = write_tokens([[1] * 30] * 10)
    with pytest.raises(DataError, match="--append-eod"):
        plan(data_path=(prefix,), split="1,1,0", reset_attention_mask=True)
    with pytest.raises(DataError, match="--tokenizer-model"):
        resolve_vocabulary(DataConfig(data_path=(prefix,), reset_attention_mask=True), 100)


def test_the_vocabulary_comes_from_tokenizer_notes_or_flag(
    tmp_path: Path, tokenizer_model: str, write_tokens: WriteTokens
) -> None:
    text = tmp_path / "a.txt"
    text.write_text(WORDS)
    job = PreprocessJob(
        inputs=(str(text),),
        output_prefix=str(tmp_path / "o"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=tokenizer_model,
    )
    preprocess(job)
    noted = DataConfig(data_path=("1", job.prefixes[0]))
    given = DataConfig(tokenizer_model=tokenizer_model)
    assert resolve_vocabulary(noted, None).size == resolve_vocabulary(given, None).size == 400
    assert resolve_vocabulary(given, 512).size == 512
    assert resolve_vocabulary(noted, None).eod == 2
    assert resolve_vocabulary(DataConfig(tokenizer_type="NullTokenizer"), 64) == Vocabulary(64, 63)
    foreign = DataConfig(data_path=(write_tokens([[1]]),))
    assert resolve_vocabulary(foreign, 64) == Vocabulary(64)
    for config, size in ((noted, 300), (given, 300), (foreign, None)):
        with pytest.raises(DataError, match="--vocab-size"):
            resolve_vocabulary(config, size)


def test_the_end_of_documents_is_that_of_the_data(tmp_path: Path) -> None:
    """Data made when a name was guessed, or by settings that have changed since."""
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator([WORDS], vocab_size=300, special_tokens=["</s>", "<end>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": "</s>"}')
    text = tmp_path / "a.txt"
    text.write_text((WORDS + "\n\n") * 20)
    job = PreprocessJob(
        inputs=(str(text),),
        output_prefix=str(tmp_path / "o"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path),
        text_documents="paragraph",
        append_eod=True,
    )
    preprocess(job)
    given = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    run = given | {"data_path": tuple(job.prefixes), "split": "1,1", "reset_attention_mask": True}
    for named, eod in (('{"eos_token": "</s>"}', 0), ("{}", 0), ('{"eos_token": "<end>"}', 1)):
        settings.write_text(named)
        vocabulary = resolve_vocabulary(DataConfig(**run), None)
        assert vocabulary.eod == eod
        if eod == 0:
            assert plan(vocabulary, **run).rows
            continue
        with pytest.raises(DataError, match="ends documents with token 0, the tokenizer has 1"):
            plan(vocabulary, **run)


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer_model: str) -> None:
    text = tmp_path / "a.txt"
    text.write_text(WORDS)
    job = PreprocessJob(
        inputs=(str(text),),
        output_prefix=str(tmp_path / "o"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=tokenizer_model,
    )
    preprocess(job)
    with pytest.raises(DataError, match="another tokenizer"):
        plan(Vocabulary(400, 2, "0" * 64), data_path=tuple(job.prefixes), eval_iters=0, split="1")


def test_stock_files_work_and_are_named_in_a_note(
    tmp_path: Path, tokenizer_model: str, write_tokens: WriteTokens
) -> None:
    stock = write_tokens([[1] * 30] * 10)
    lines = plan(data_path=(stock,), split="1,1").notes()
    assert any("without a note of their tokenizer" in line and stock in line for line in lines)
    text = tmp_path / "a.txt"
    text.write_text((WORDS + "\n") * 50)
    job = PreprocessJob(
        inputs=(str(text),),
        output_prefix=str(tmp_path / "o"),
        tokenizer_type="ByteLevelTokenizer",
        text_documents="line",
    )
    preprocess(job)
    ours = {"data_path": tuple(job.prefixes), "split": "1,1"}
    settings = DataConfig(tokenizer_type="ByteLevelTokenizer", **ours)
    noted = plan(resolve_vocabulary(settings, None), **ours)
    assert not list(noted.notes())
    other = resolve_vocabulary(DataConfig(tokenizer_model=tokenizer_model, **ours), None)
    with pytest.raises(DataError, match="another tokenizer"):
        plan(other, **ours)
