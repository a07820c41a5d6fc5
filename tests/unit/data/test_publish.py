"""Whenever preprocess is killed, its files are the old pair, the new one, or refused as none."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.token_files import open_checked
from megatron_kvshare.errors import DataError

STEPS = ("replace", "rename", "unlink", "remove", "fsync")
TEXTS = {
    "same lengths": ("1 2 3\n\n4 5\n", "6 7 8\n\n9 1\n"),
    "same size": ("1 2 3\n\n4 5\n", "6 7\n\n8 9 1\n"),
    "other size": ("1 2 3\n\n4 5\n", "6 7 8 9\n\n1 2 3 4\n\n5\n"),
}


def job(folder: Path, text: str, vocab_size: int) -> PreprocessJob:
    """``vocab_size`` does not show in the tokens, but in the notes."""
    source = folder / "text.txt"
    source.write_text(text)
    return PreprocessJob(
        inputs=(str(source),),
        output_prefix=str(folder / "out" / "a"),
        tokenizer_type="NullTokenizer",
        vocab_size=vocab_size,
        text_documents="paragraph",
    )


def content(folder: Path) -> tuple[list[list[int]], dict[str, object]]:
    files = open_checked(str(folder / "a_text_document"))
    documents = range(files.num_documents)
    return [files.tokens(number, number + 1).tolist() for number in documents], files.notes


@contextmanager
def before_each_step(act: Callable[[], None]) -> Iterator[None]:
    """Whatever moves, removes or flushes files calls ``act`` first."""
    real = {name: getattr(os, name) for name in STEPS}

    def wrapped(name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            act()
            return real[name](*arguments, **options)

        return call

    try:
        for name in STEPS:
            setattr(os, name, wrapped(name))
        yield
    finally:
        for name in STEPS:
            setattr(os, name, real[name])


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS.keys())
def test_every_state_on_the_way_is_a_pair_or_none(tmp_path: Path, texts: tuple[str, str]) -> None:
    out = tmp_path / "out"
    preprocess(job(tmp_path, texts[0], 50))
    old, seen = content(out), []

    def look() -> None:
        state = tmp_path / f"state{len(seen)}"
        shutil.copytree(out, state)
        seen.append(state)

    with before_each_step(look):
        preprocess(job(tmp_path, texts[1], 60))
    new = content(out)
    assert old[0] != new[0] and old[1] != new[1] and len(seen) > 5
    found = []
    for state in seen:
        try:
            found.append(content(state))
        except DataError as error:
            found.append(None)
            assert "a_text_document.idx, as when `kvshare preprocess` is stopped" in str(error)
        assert found[-1] in (old, new, None), f"neither pair at step {len(found)}"
    assert found[0] == old and None in found and found[-1] == new


def test_an_index_of_other_notes_is_refused(tmp_path: Path) -> None:
    """Of two runs with files of the same size, one's index and the other's tokens."""
    for number, text in enumerate(TEXTS["same size"]):
        (tmp_path / str(number)).mkdir()
        preprocess(job(tmp_path / str(number), text, 50))
    first, second = (tmp_path / str(number) / "out" for number in (0, 1))
    shutil.copy(second / "a_text_document.idx", first)
    with pytest.raises(DataError, match=r"is not the one that a_text_document\.meta\.json"):
        content(first)


def killed_at(step: int, folder: Path) -> bool:
    """Preprocess in a process of its own, which kills itself before ``step``; whether it got so
    far."""
    child = os.fork()
    if child == 0:
        left = iter(range(step))

        def act() -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with before_each_step(act):
                preprocess(job(folder, TEXTS["same lengths"][1], 60))
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.nightly
def test_killed_at_every_step(tmp_path: Path) -> None:
    preprocess(job(tmp_path, TEXTS["same lengths"][1], 60))
    new, found, step, killed = content(tmp_path / "out"), [], 0, True
    while killed:
        folder = tmp_path / str(step)
        folder.mkdir()
        preprocess(job(folder, TEXTS["same lengths"][0], 50))
        states = {"old": content(folder / "out"), "new": new}
        killed = killed_at(step, folder)
        try:
            pair = content(folder / "out")
            found += [name for name, state in states.items() if state == pair] or ["mixed"]
        except DataError:
            found.append("none")
        preprocess(job(folder, TEXTS["same lengths"][1], 60))
        assert content(folder / "out") == new, "the next run must not mind what is left"
        step += 1
    assert list(dict.fromkeys(found)) == ["old", "none", "new"] and step > 5
