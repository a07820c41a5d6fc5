"""A run that is killed goes on from what is finished, and ends byte-identical."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.data import cutting, encoding
from megatron_kvshare.data import preprocess as module
from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.unfinished import Unfinished
from megatron_kvshare.errors import DataError, OwnershipError
from megatron_kvshare.ownership.owner import file_place, take

from .conftest import WORDS

SUFFIXES = ("_text_document.bin", "_text_document.idx", "_text_document.meta.json")

HURRIED = """
import sys
from megatron_kvshare.data import encoding, preprocess, unfinished
preprocess._COMMIT_SECONDS = 0.0
encoding._TASK_BYTES = 2_000
unfinished.os.fsync = lambda _: None
from megatron_kvshare.cli.main import entry
if __name__ == "__main__":
    entry()
"""
"""The command with commits after every small batch."""


def write_input(folder: Path, documents: int) -> list[str]:
    random.seed(3)
    words = WORDS.split()
    lines = [
        json.dumps({"text": " ".join(random.choices(words, k=random.randrange(1, 60)))})
        if number % 50
        else '{"text": null}'
        for number in range(documents)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines[: documents // 2]) + "\n")
    (folder / "b").write_text("\n".join(lines[documents // 2 :]) + "\n")
    return [str(folder / "a.jsonl"), str(folder / "b")]


def command(inputs: list[str], output: Path, model: str) -> list[str]:
    argv = ["preprocess", "--input", *inputs, "--output-prefix", str(output), "--append-eod"]
    return [*argv, "--on-bad-record", "skip", "--tokenizer-model", model]


def results(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (*SUFFIXES, ".skipped.jsonl")]


def start(folder: Path, argv: list[str], workers: int) -> subprocess.Popen[bytes]:
    script = folder / "hurried.py"
    script.write_text(HURRIED)
    run = [sys.executable, str(script), *argv, "--workers", str(workers)]
    return subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed_somewhere(folder: Path, argv: list[str], output: Path, choice: random.Random) -> bool:
    """Start a run, kill one of its processes at some moment after it has begun to write, and see
    that all end; whether it was in time to interrupt it."""
    process = start(folder, argv, workers=2)
    progress = Path(f"{output}.unfinished", "progress.json")
    before = progress.stat().st_mtime_ns if progress.exists() else 0
    while process.poll() is None:
        if progress.exists() and progress.stat().st_mtime_ns != before:
            break
        time.sleep(0.005)
    time.sleep(choice.random() * 0.3)
    everyone = [psutil.Process(process.pid)] if process.poll() is None else []
    try:
        everyone += everyone[0].children(recursive=True) if everyone else []
        victim = choice.choice(everyone) if everyone else None
        if victim is not None:
            victim.kill()
    except psutil.NoSuchProcess:
        pass
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive, "a worker outlives its parent"
    if process.returncode == 0:
        return False
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert "Traceback" not in said or process.returncode == -signal.SIGKILL, said
    return True


def check_kills(folder: Path, model: str, kills: int, documents: int, seed: int) -> None:
    inputs = write_input(folder, documents)
    assert main(command(inputs, folder / "whole", model)) == 0
    choice = random.Random(seed)
    output = folder / "killed"
    argv = command(inputs, output, model)
    done = 0
    while done < kills:
        if not killed_somewhere(folder, argv, output, choice):
            assert results(output) == results(folder / "whole")
            for suffix in (*SUFFIXES, ".skipped.jsonl"):
                Path(f"{output}{suffix}").unlink()
            continue
        done += 1
    assert main(argv) == 0
    assert results(output) == results(folder / "whole")
    left = {path.name for path in folder.iterdir() if path.name.startswith("killed")}
    assert left == {f"killed{suffix}" for suffix in (*SUFFIXES, ".skipped.jsonl")}


def test_a_killed_run_goes_on(tmp_path: Path, tokenizer_model: str) -> None:
    check_kills(tmp_path, tokenizer_model, kills=1, documents=6_000, seed=1)


@pytest.mark.nightly
def test_many_killed_runs_go_on(tmp_path: Path, tokenizer_model: str) -> None:
    check_kills(tmp_path, tokenizer_model, kills=20, documents=20_000, seed=2)


class Killed(BaseException):
    """Stands in for a kill: nothing handles it."""


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit after every few documents."""
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(encoding, "_TASK_BYTES", 1)
    monkeypatch.setattr(cutting, "READ_BYTES", 500)


@pytest.mark.usefixtures("small_steps")
def test_every_commit_can_be_gone_on_from(
    tmp_path: Path, tokenizer_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every commit in turn, and with unfinished bytes behind what is finished."""
    inputs = write_input(tmp_path, 101)
    job = PreprocessJob(
        inputs=tuple(inputs),
        output_prefix=str(tmp_path / "whole"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=tokenizer_model,
        on_bad_record="skip",
    )
    counts = preprocess(job)
    assert counts.skipped_records.counts == {"null": 3}
    commit, seen = Unfinished.commit, set()

    def killed(self: Unfinished) -> None:
        commit(self)
        if repr(self.progress) in seen:
            return
        seen.add(repr(self.progress))
        for file in (file for pair in self._files for file in pair):
            if not self.progress.is_complete:
                file.write(b"left over")
                file.flush()
        self._files.clear()
        raise Killed

    monkeypatch.setattr(Unfinished, "commit", killed)
    said: list[str] = []
    found = None
    while found is None:
        with contextlib.suppress(Killed):
            found = preprocess(replace(job, output_prefix=str(tmp_path / "cut")), say=said.append)
    assert (found.documents, found.tokens) == (counts.documents, counts.tokens)
    assert len(seen) > 10
    assert sum("going on from" in line for line in said) == len(seen)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_work_on_something_else_is_not_gone_on_from(
    tmp_path: Path, tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_input(tmp_path, 100)
    folder = tmp_path / "o.unfinished"
    folder.mkdir()
    for content in ("{", "[]", '{"job": "x"}'):
        folder.mkdir(exist_ok=True)
        (folder / "progress.json").write_text(content)
        (folder / "text_document.bin").write_bytes(b"other tokens")
        assert main(command(inputs, tmp_path / "o", tokenizer_model)) == 0
        assert "beginning anew" in capsys.readouterr().err
    assert main(command(inputs, tmp_path / "whole", tokenizer_model)) == 0
    assert results(tmp_path / "o") == results(tmp_path / "whole")


@pytest.mark.usefixtures("small_steps")
def test_a_stop_at_a_bad_record_can_be_gone_on_from_with_skip(
    tmp_path: Path, tokenizer_model: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good words"}\n' * 40 + '{"text": 3}\n' + '{"text": "more"}\n')
    settings = {
        "inputs": (str(path),),
        "output_prefix": str(tmp_path / "o"),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": tokenizer_model,
    }
    with pytest.raises(DataError, match=r"a.jsonl:41.*--on-bad-record skip"):
        preprocess(PreprocessJob(**settings))
    said: list[str] = []
    counts = preprocess(PreprocessJob(**settings, on_bad_record="skip"), say=said.append)
    assert any("documents and" in line and "are finished" in line for line in said)
    assert (counts.documents, counts.skipped_records.counts) == (41, {"not text": 1})
    shown = [json.loads(line) for line in (tmp_path / "o.skipped.jsonl").read_text().splitlines()]
    assert [(found["file"], found["line"]) for found in shown] == [(str(path), 41)]


def test_the_second_of_two_runs_is_refused(tmp_path: Path, tokenizer_model: str) -> None:
    """Also where it has other keys: the unfinished work is one of both."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good words", "title": "more"}\n')
    job = PreprocessJob(
        inputs=(str(path),),
        output_prefix=str(tmp_path / "o"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=tokenizer_model,
        json_keys=("title",),
    )
    first = take(file_place("--output-prefix", str(tmp_path / "o")), heartbeat=0.05)
    try:
        with pytest.raises(OwnershipError, match="it lives"):
            preprocess(job)
    finally:
        first.release()
    assert preprocess(job).documents == 1
