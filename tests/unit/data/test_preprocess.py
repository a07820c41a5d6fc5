"""Token files made here are read by stock megatron-core, whatever the number of workers."""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from megatron_kvshare.cli.main import main
from megatron_kvshare.data import encoding
from megatron_kvshare.data.inputs import open_inputs
from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.errors import DataError
from megatron_kvshare.megatron_api.datasets import DType, IndexedDataset, IndexedDatasetBuilder
from tests.mutations import mutations

from .conftest import UNICODE, WORDS

TEXTS = [WORDS, "", UNICODE, WORDS * 300, "   \n", "end"]


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "in.jsonl.xz"
    lines = "".join(json.dumps({"text": text, "title": text[:5]}) + "\n" for text in TEXTS)
    path.write_bytes(lzma.compress(lines.encode()))
    return str(path)


def job_for(source: str, output: Path, model: str, **changes: object) -> PreprocessJob:
    settings: dict[str, object] = {
        "inputs": (source,),
        "output_prefix": str(output),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": model,
    }
    return PreprocessJob(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("append_eod", [False, True])
def test_round_trip(jsonl: str, tmp_path: Path, tokenizer_model: str, append_eod: bool) -> None:
    job = job_for(jsonl, tmp_path / "new" / "out", tokenizer_model, append_eod=append_eod)
    counts = preprocess(job)
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model)
    stored = IndexedDataset(str(tmp_path / "new" / "out_text_document"))
    documents = [stored[i].tolist() for i in range(len(stored))]
    end = [2] if append_eod else []
    expected = [tokenizer.encode(text) + end for text in TEXTS if text.strip()]
    assert documents == expected
    assert stored.document_indices.tolist() == list(range(len(expected) + 1))
    assert (counts.documents, counts.skipped) == (4, 2)
    assert counts.tokens == sum(map(len, expected))
    assert counts.bytes_read == counts.total_bytes
    if not append_eod:
        assert [tokenizer.decode(ids) for ids in documents] == [t for t in TEXTS if t.strip()]


def test_files_do_not_depend_on_workers(
    jsonl: str, tmp_path: Path, tokenizer_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_TASK_BYTES", 50)
    for workers in (1, 2):
        preprocess(job_for(jsonl, tmp_path / str(workers), tokenizer_model, workers=workers))
    for suffix in (".bin", ".idx", ".meta.json"):
        one, two = (tmp_path / f"{workers}_text_document{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_each_key_gets_its_own_files(jsonl: str, tmp_path: Path, tokenizer_model: str) -> None:
    job = job_for(jsonl, tmp_path / "out", tokenizer_model, json_keys=("text", "title"))
    preprocess(job)
    stored = [IndexedDataset(prefix) for prefix in job.prefixes]
    sizes = [files.sequence_lengths.sum() for files in stored]
    assert job.prefixes[1].endswith("out_title_document")
    assert sizes[0] > sizes[1] > 0


def test_a_fault_in_a_worker_leaves_old_files_alone(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n')
    preprocess(job_for(str(path), tmp_path / "out", tokenizer_model))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path}
    path.write_text('{"text": "good"}\n{"text": "cut\n')
    with pytest.raises(DataError, match=r"in.jsonl:2.*not JSON"):
        preprocess(job_for(str(path), tmp_path / "out", tokenizer_model, workers=2))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path} == before


def test_nothing_to_write_and_nowhere_to_write(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(" \n ")
    with pytest.raises(DataError, match="holds no text"):
        preprocess(job_for(str(path), tmp_path / "out", tokenizer_model))
    with pytest.raises(DataError, match="cannot be written"):
        preprocess(job_for(str(path), path / "out", tokenizer_model))
    assert [file.name for file in tmp_path.iterdir()] == ["blank.txt"]


def test_plain_text_has_one_key(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(DataError, match="is plain text"):
        preprocess(job_for(str(path), tmp_path / "o", tokenizer_model, json_keys=("a", "b")))


@pytest.fixture
def end_folder(tmp_path: Path) -> str:
    """A Hugging Face tokenizer whose end token, ``<end>``, is named in an older settings file."""
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator([WORDS], vocab_size=300, special_tokens=["</s>", "<end>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    return str(folder)


def test_end_tokens_inside_documents_are_told_and_can_be_text(
    tmp_path: Path,
    end_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encoding, "_TASK_BYTES", 50)
    path = tmp_path / "a.jsonl"
    texts = [WORDS, "one<end>two", WORDS, "three <end><end> four", "</s>"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["preprocess", "--input", str(path), "--append-eod", "--tokenizer-model", end_folder]
    argv += ["--tokenizer-type", "HuggingFaceTokenizer"]
    split = ["--split-special-tokens"]
    for name, flags, inner in (("as_it_is", ["--workers", "2"], 3), ("split", split, 0)):
        prefix = tmp_path / name
        assert main([*argv, "--output-prefix", str(prefix), *flags]) == 0
        said = capsys.readouterr().err
        assert ("2 documents hold the end-of-document token, 3 times" in said) is (inner > 0)
        assert (f"{path}:2" in said and "--split-special-tokens" in said) is (inner > 0)
        stored = IndexedDataset(f"{prefix}_text_document")
        documents = [stored[number].tolist() for number in range(len(stored))]
        assert sum(ids.count(1) for ids in documents) == len(texts) + inner
        assert all(ids[-1] == 1 for ids in documents)
        notes = json.loads(Path(f"{prefix}_text_document.meta.json").read_text())
        assert (notes["eod"], notes["split_special_tokens"]) == (1, not inner)
        if not inner:
            tokenizer = load_tokenizer("HuggingFaceTokenizer", end_folder)
            assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts


def test_command(
    jsonl: str, tmp_path: Path, tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["preprocess", "--input", jsonl, "--output-prefix", str(tmp_path / "o")]
    argv += ["--tokenizer-type", "SentencePieceTokenizer", "--workers", "1", "--append-eod"]
    assert main([*argv, "--tokenizer-model", tokenizer_model]) == 0
    assert "4 documents" in capsys.readouterr().out
    notes = json.loads((tmp_path / "o_text_document.meta.json").read_text())
    assert (notes["vocab_size"], notes["eod"], notes["documents"]) == (400, 2, 4)
    assert main(argv) == 2
    assert main(["preprocess", "--output-prefix", "x", "--inputs", jsonl]) == 2
    message = capsys.readouterr().err
    assert "--input" in message and "Traceback" not in message


TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_files_are_those_of_megatrons_own_tool(
    tmp_path: Path, tokenizer_model: str, end_folder: str, kind: str, vocab_size: int
) -> None:
    """As tools/preprocess_data.py of Megatron-LM does it: line by line, with its builder. A
    vocabulary of 65,500 ids, and not one less, takes 4 bytes an id."""
    model = tokenizer_model if kind == "SentencePieceTokenizer" else end_folder
    lines = [{"text": text} for text in (WORDS, UNICODE, WORDS * 50, "a", UNICODE * 7)] * 40
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = load_tokenizer(kind, model)
    tokenizer.vocab_size = vocab_size
    job = job_for(str(path), tmp_path / "ours", model, tokenizer_type=kind, append_eod=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreprocessJob, "load_tokenizer", lambda _: tokenizer)
        preprocess(job)
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for line in path.open():
        ids = direct(kind, model)(json.loads(line)["text"])
        assert tokenizer.eod is not None
        ids.append(tokenizer.eod)
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()


@functools.cache
def direct(kind: str, model: str) -> Callable[[str], list[int]]:
    """The library's own loop."""
    if kind == "SentencePieceTokenizer":
        return SentencePieceProcessor(model_file=model).encode
    fast = pytest.importorskip("tokenizers").Tokenizer.from_file(f"{model}/tokenizer.json")
    return lambda text: fast.encode(text, add_special_tokens=False).ids


def test_keys_that_are_no_file_names(tmp_path: Path, tokenizer_model: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"meta/text": "words", "meta_text": "others"}\n')
    job = job_for(str(path), tmp_path / "o", tokenizer_model, json_keys=("meta/text",))
    assert preprocess(job).documents == 1
    assert (tmp_path / "o_meta_text_document.bin").is_file()
    keys = ("meta/text", "meta_text")
    with pytest.raises(DataError, match="same files"):
        preprocess(job_for(str(path), tmp_path / "o", tokenizer_model, json_keys=keys))


def test_mutated_input_is_accounted_for(tmp_path: Path, tokenizer_model: str) -> None:
    check_mutations(tmp_path, tokenizer_model, 20, seed=5)


@pytest.mark.nightly
def test_much_mutated_input_is_accounted_for(tmp_path: Path, tokenizer_model: str) -> None:
    check_mutations(tmp_path, tokenizer_model, 300, seed=6)


def check_mutations(folder: Path, model: str, count: int, seed: int) -> None:
    """Every line of a damaged file is a document, or skipped and counted."""
    lines = [json.dumps({"text": f"{number} {WORDS}"}) for number in range(12)]
    original = "".join(line + "\n" for line in lines).encode()
    path = folder / "a.jsonl"
    for what, content in mutations(original, count, seed):
        path.write_bytes(content)
        job = job_for(str(path), folder / "o", model, on_bad_record="skip")
        try:
            counts = preprocess(job)
        except DataError as error:
            assert "Traceback" not in str(error), what
            continue
        records = [line for line in content.split(b"\n") if line.strip(b" \t\r\v\f")]
        is_lines = open_inputs([str(path)]).kinds() == {"JSON lines": 1}
        expected = len(records) if is_lines else 1
        assert counts.documents + counts.skipped == expected, what
        stored = IndexedDataset(f"{folder}/o_text_document")
        assert len(stored) == counts.documents, what
