"""The recipes for corpora as people have them, on small made files of their form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kvshare.data.tokenizers import load_tokenizer
from megatron_kvshare.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_kvshare.megatron_api.datasets import IndexedDataset
from tests.integration.conftest import ROOT
from tests.unit.data.conftest import WORDS
from tests.unit.data.test_archives import zstd
from tests.unit.data.test_inputs import json_lines


def texts(first: int) -> list[str]:
    return [f"{number} {WORDS}" for number in range(first, first + 5)]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_parquet(path: Path, found: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": found, "id": found, "score": [3.5] * len(found)})
    parquet.write_table(table, path, row_group_size=2, compression="snappy")


@pytest.mark.nightly
def test_recipes(tmp_path: Path) -> None:
    sample = tmp_path / "sample.txt"
    sample.write_text("\n".join(WORDS[i:] + WORDS[:i] for i in range(len(WORDS))))
    job = TokenizerJob(inputs=(str(sample),), output=str(tmp_path / "tok"), vocab_size=400)
    model = str(train_tokenizer(job).model)

    slim = tmp_path / "SlimPajama-627B"
    for chunk, first in (("chunk1", 0), ("chunk2", 5)):
        write(slim / f"train/{chunk}/example_train_0.jsonl.zst", zstd(json_lines(texts(first))))
    write(slim / "validation/chunk1/example_holdout_0.jsonl.zst", zstd(b"{}\n" + json_lines(["x"])))
    pile = tmp_path / "minipile"
    for number in range(2):
        write_parquet(pile / f"data/train-0000{number}-of-00002-9ca.parquet", texts(5 * number))
    write_parquet(pile / "data/validation-00000-of-00001-a2.parquet", ["x"])
    write_parquet(pile / "data/test-00000-of-00001-a2.parquet", ["never"])
    web = tmp_path / "fineweb-edu"
    write(web / "README.md", b"---\nconfigs: []\n---\n# FineWeb-Edu")
    write(web / ".gitattributes", b"*.parquet filter=lfs")
    for dump, first in (("CC-MAIN-2013-20", 0), ("CC-MAIN-2024-10", 5)):
        write_parquet(web / f"data/{dump}/train-00000-of-00001.parquet", texts(first))

    for name, folder in (("slimpajama", slim), ("minipile", pile), ("fineweb_edu", web)):
        output = tmp_path / "out" / name
        script = ROOT / "examples" / "data" / f"{name}.sh"
        words = ["bash", str(script), str(folder), model, str(output)]
        environment = {
            **os.environ,
            "SKIP_SETUP": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "WORKERS": "1",
        }
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    for name in ("slimpajama_train", "minipile_train", "fineweb_edu"):
        stored = IndexedDataset(f"{tmp_path}/out/{name}_text_document")
        got = [tokenizer.decode(stored[number].tolist()[:-1]) for number in range(len(stored))]
        assert got == texts(0) + texts(5)
    for name in ("slimpajama_validation", "minipile_validation"):
        assert len(IndexedDataset(f"{tmp_path}/out/{name}_text_document")) == 1
    assert Path(f"{tmp_path}/out/slimpajama_validation.skipped.jsonl").is_file()
