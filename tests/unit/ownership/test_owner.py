"""One owner at a time: whoever comes, whoever dies, whatever the machine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kvshare.errors import EXIT_USER_ERROR, OwnershipError
from megatron_kvshare.ownership.claims import highest, new_claim, numbers, publish
from megatron_kvshare.ownership.owner import (
    Ownership,
    Place,
    _is_undisputed,
    file_place,
    folder_place,
    owned,
    take,
)
from megatron_kvshare.ownership.process import Process, this_process

BEAT = 0.05
"""Seconds between heartbeats here."""
ELSEWHERE = Process(host="elsewhere", boot="b", namespace="n", pid=77, born=5)
JOB = {"SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "big", "SLURM_STEP_ID": "0"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return folder_place("--save", str(tmp_path / "run"))


class Others:
    """Claims of other processes; they beat as long as they are told to."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stop = threading.Event()
        place.lock.parent.mkdir(parents=True, exist_ok=True)

    def claim(self, process: Process, beating: bool = False, number: int = 1) -> Path:
        """Beats come more often than promised: a busy machine is no fault of the code."""
        interval = 8 * BEAT if beating else BEAT
        path = publish(self._place.lock, number, new_claim(process, interval))
        assert path is not None
        if beating:
            threading.Thread(target=self._beat, args=(path,), daemon=True).start()
        return path

    def _beat(self, path: Path) -> None:
        clock = 0  # no clock of this machine
        while not self._stop.wait(BEAT):
            clock += 1_000_000_000
            try:
                os.utime(path, ns=(clock, clock))
            except FileNotFoundError:
                return

    def stop(self) -> None:
        self._stop.set()


@pytest.fixture
def others(place: Place) -> Iterator[Others]:
    others = Others(place)
    yield others
    others.stop()


def dead_process() -> Process:
    """One that ran on this machine, and has ended."""
    words = [sys.executable, "-c", "from megatron_kvshare.ownership.process import *"]
    words[2] += "\nfrom dataclasses import asdict\nprint(asdict(this_process()))"
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return Process(**eval(done.stdout))  # a dict of texts and numbers


def lock_files(place: Place) -> list[str]:
    return sorted(path.name for path in place.lock.parent.iterdir())


def test_a_place_is_owned_and_nothing_remains(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    place = folder_place("--save", str(tmp_path / "there" / "new" / "run"))
    ownership = take(place, BEAT)
    assert lock_files(place) == ["run.lock.1"] and ownership.holds()
    ownership.check()
    ownership.release()
    ownership.release()
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(OwnershipError, match="has given it back"):
        ownership.check()


def test_what_was_written_stays(place: Place) -> None:
    with owned(place):
        (place.lock.parent / "result").touch()
    assert lock_files(place) == ["result"]


def test_an_owner_that_lives_here_is_named(place: Place, capsys: pytest.CaptureFixture) -> None:
    owner = take(place, BEAT)
    started = time.monotonic()
    with pytest.raises(OwnershipError) as refused:
        take(place, BEAT)
    assert time.monotonic() - started >= 3 * BEAT
    text = str(refused.value)
    assert f"process {os.getpid()} on {this_process().host}" in text and " UTC" in text
    assert f"--save = {place.value!r}" in text and "choose another --save" in text
    assert refused.value.exit_code == EXIT_USER_ERROR
    assert "waiting up to" in capsys.readouterr().err
    owner.check()
    owner.release()


def test_a_suspended_owner_of_this_host_is_not_replaced(place: Place, others: Others) -> None:
    others.claim(this_process())  # it lives, and gives no sign
    with pytest.raises(OwnershipError, match="it lives"):
        take(place, BEAT)


@pytest.mark.parametrize("what", ["ended", "zombie", "number given anew", "rebooted", "requeued"])
def test_an_owner_that_is_certainly_gone_is_replaced_at_once(
    place: Place, others: Others, what: str
) -> None:
    here = replace(this_process({**JOB, "SLURM_RESTART_COUNT": "2"}), machine="m", boot="boot")
    child = subprocess.Popen(["true"])
    gone = {
        "ended": dead_process,
        "zombie": lambda: replace(this_process(), pid=child.pid, born=None),
        "number given anew": lambda: replace(this_process(), born=1),
        "rebooted": lambda: replace(here, boot="before"),
        "requeued": lambda: replace(ELSEWHERE, job=here.job, restarts=1),
    }
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, its exit code is still there
    others.claim(gone[what](), beating=what == "requeued")
    said: list[str] = []
    new = here if what in ("rebooted", "requeued") else this_process()
    ownership = take(place, BEAT, said.append, here=new)
    assert said == [], "it has waited"
    assert lock_files(place) == ["run.lock.2"]
    ownership.release()
    child.wait()


def test_machines_that_share_a_host_name_are_not_one() -> None:
    here = replace(this_process(), host="localhost", boot="mine", machine="mine")
    for other in (replace(here, boot="other", machine="other"), replace(here, boot="other")):
        expected = "dead" if other.machine == "mine" else "unknown"
        assert here.life_of(replace(other, pid=1)) == expected
    unknown = replace(here, machine="")
    assert unknown.life_of(replace(unknown, boot="other")) == "unknown"
    assert here.life_of(replace(here, namespace="container")) == "unknown"


def test_a_job_of_another_cluster_is_another_job() -> None:
    first, again = ({**JOB, "SLURM_RESTART_COUNT": count} for count in "01")
    assert this_process(again).requeued(this_process(first))
    assert not this_process(first).requeued(this_process(again))
    assert not this_process(first).requeued(this_process(first))
    other = {**again, "SLURM_CLUSTER_NAME": "small"}
    assert not this_process(other).requeued(this_process(first))
    assert not this_process({}).requeued(this_process({}))
    assert "SLURM job 12 of big step 0 (restart 1)" in str(this_process(again))


@pytest.mark.parametrize("job", ["", "SLURM job 12 of big"])
def test_an_owner_elsewhere_that_beats_is_respected(place: Place, others: Others, job: str) -> None:
    """A step of the same job, too."""
    here = this_process(JOB)
    path = others.claim(replace(ELSEWHERE, job=job), beating=True)
    with pytest.raises(OwnershipError, match=r"process 77 on elsewhere.*gives signs of life"):
        take(place, BEAT, here=here)
    assert lock_files(place) == [path.name]


def test_a_silent_owner_elsewhere_is_replaced_with_a_warning(place: Place, others: Others) -> None:
    others.claim(ELSEWHERE)
    said: list[str] = []
    started = time.monotonic()
    ownership = take(place, BEAT, said.append)
    assert time.monotonic() - started >= 3 * BEAT
    assert "process 77 on elsewhere" in said[-1] and "taken over" in said[-1]
    ownership.release()


def test_an_owner_that_falls_silent_meanwhile_is_replaced(place: Place, others: Others) -> None:
    path = others.claim(ELSEWHERE)
    said: list[str] = []

    def beat_once(text: str) -> None:
        if not said:
            os.utime(path, ns=(1, 1))
        said.append(text)

    take(place, BEAT, beat_once).release()
    assert "waiting up to" in said[0] and "taken over" in said[1]


def test_an_owner_that_ends_meanwhile_is_followed(place: Place, others: Others) -> None:
    path = others.claim(ELSEWHERE, beating=True)
    take(place, BEAT, lambda waiting: path.unlink()).release()
    assert lock_files(place) == []


def test_a_folder_that_goes_with_its_owner_is_made_again(place: Place) -> None:
    """The owner made it, wrote nothing and has failed, while the newcomer was waiting."""
    owner = take(place, BEAT)
    second = take(place, BEAT, lambda waiting: owner.release())
    assert lock_files(place) == ["run.lock.1"]
    second.release()
    assert not place.lock.parent.exists()


def test_a_claim_that_nobody_understands_is_watched_too(place: Place, others: Others) -> None:
    (place.lock.parent / "run.lock.3").write_text("{")
    said: list[str] = []
    ownership = take(place, BEAT, said.append)
    assert "cannot be understood" in said[-1]
    assert lock_files(place) == ["run.lock.4"]
    ownership.release()


@pytest.mark.parametrize("stale", [False, True], ids=["free", "left by a dead process"])
def test_of_many_newcomers_one_wins(place: Place, others: Others, stale: bool) -> None:
    if stale:
        others.claim(dead_process(), number=4)
    start = threading.Barrier(16)
    won: list[Ownership] = []
    refused: list[OwnershipError] = []

    def come() -> None:
        start.wait()
        try:
            won.append(take(place, BEAT, lambda text: None))
        except OwnershipError as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(won), len(refused)) == (1, 15)
    won[0].check()
    won[0].release()
    assert lock_files(place) == []


def test_a_file_system_without_hard_links(
    place: Place, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    owner = take(place, BEAT)
    assert publish(place.lock, 1, new_claim(ELSEWHERE, BEAT)) is None
    with pytest.raises(OwnershipError):
        take(place, BEAT)
    assert lock_files(place) == ["run.lock.1"]
    owner.release()


def test_an_owner_that_was_replaced_finds_out_by_itself(place: Place, others: Others) -> None:
    lost = threading.Event()
    owner = take(place, BEAT, on_loss=lost.set)
    path = others.claim(ELSEWHERE, number=2)
    assert lost.wait(20)
    assert not owner.holds()
    with pytest.raises(OwnershipError, match=r"process 77 on elsewhere.*has taken over"):
        owner.check()
    owner.release()
    assert path.exists(), "the claim of the new owner is not ours to remove"


def test_an_owner_whose_claim_was_removed_stops(place: Place, others: Others) -> None:
    owner = take(place, 100)
    path = place.lock.parent / "run.lock.1"
    path.unlink()
    with pytest.raises(OwnershipError, match="was removed"):
        owner.check()
    others.claim(ELSEWHERE)  # the same number again
    owner.release()
    assert path.exists()


def test_a_newcomer_that_judged_an_owner_of_old_withdraws(place: Place, others: Others) -> None:
    """It slept between its look and its claim; meanwhile the place was free and taken again."""
    judged = others.claim(ELSEWHERE, number=3)
    seen = highest(place.lock, BEAT)
    assert others.claim(ELSEWHERE, number=4)
    assert _is_undisputed(place.lock, 4, seen)
    judged.unlink()
    assert _is_undisputed(place.lock, 4, seen)
    others.claim(ELSEWHERE, number=1)
    assert not _is_undisputed(place.lock, 4, seen), "a newer owner is below"
    others.claim(ELSEWHERE, number=3)
    assert not _is_undisputed(place.lock, 4, seen), "the same number, and another owner"
    assert not _is_undisputed(place.lock, 3, None), "there is a higher one"


def test_leftovers_go_with_the_next_owner(place: Place, others: Others) -> None:
    folder = place.lock.parent
    others.claim(dead_process(), number=2)
    others.claim(dead_process(), number=1)
    draft, foreign = folder / f"run.lock.{'a' * 32}.draft", folder / "run.lock.backup"
    draft.touch()
    foreign.touch()
    owner = take(place, BEAT)
    assert lock_files(place) == ["run.lock.3", "run.lock.backup"]
    owner.release()


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    odd, other = (file_place("--output", str(tmp_path / name)) for name in ("a[1]*", "a1"))
    with owned(odd, other):
        assert numbers(odd.lock) and numbers(other.lock)
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_link_and_its_folder_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    places = [folder_place("--save", str(tmp_path / name)) for name in ("real", "link")]
    assert places[0].lock == places[1].lock


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        take(folder_place("--save", str(tmp_path / "file" / "run")))
