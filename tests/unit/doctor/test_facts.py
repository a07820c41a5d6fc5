"""What makes a job refuse to start, judged from the answers of its ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_kvshare
from megatron_kvshare.doctor import facts as known
from megatron_kvshare.doctor.config import PreflightConfig
from megatron_kvshare.doctor.facts import Facts
from megatron_kvshare.doctor.job import nodes
from megatron_kvshare.errors import runs

CONFIG = PreflightConfig(save="out/checkpoint", save_bytes=1000)
FIRST = Facts(
    rank=0,
    host="node1",
    local_rank=0,
    versions={"Python": "3.11.7", "torch": "2.6.0"},
    package="/code/megatron_kvshare",
    code={"__init__.py": "a", "train/loop.py": "b"},
    device="cpu",
    devices=0,
    folder="/out",
    free_bytes=2000,
)
PACKAGE = Path(megatron_kvshare.__file__).parent


def job(*nodes: dict) -> list[Facts]:
    """Two ranks on every node; each node's answers differ from FIRST as told."""
    return [
        replace(FIRST, rank=2 * node + local, host=f"node{node + 1}", local_rank=local, **differs)
        for node, differs in enumerate(nodes)
        for local in range(2)
    ]


def told(*nodes: dict) -> list[str]:
    return [str(fault) for fault in known.faults(CONFIG, job(*nodes))]


def test_equal_nodes_have_no_fault():
    gpus = {"device": "H100", "devices": 2}
    assert not told({}, {}, {})
    assert not told(gpus, gpus)


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        (
            {"versions": {"Python": "3.11.7", "torch": "2.7.0"}},
            ["version of torch", "2.6.0 on node1, node2; 2.7.0 on node3", "setup_env.sh"],
        ),
        ({"versions": {"Python": "3.11.7"}}, ["version of torch", "none on node3"]),
        (
            {"code": {"__init__.py": "a", "train/loop.py": "c"}, "package": "/other"},
            ["code of megatron_kvshare", "in /other on node3", "it differs in train/loop.py."],
        ),
        ({"code": {"__init__.py": "a"}}, ["code of megatron_kvshare", "differs in train/loop.py"]),
        ({"device": "H100", "devices": 2}, ["devices", "GPU on node3"]),
        ({"folder_fault": "cannot be written"}, ["--save", "/out on node3 cannot be written"]),
        ({"free_bytes": 999}, ["--save", "999 bytes are free on node3", "1 kB"]),
    ],
)
def test_one_node_that_differs_is_named(differs: dict, words: list[str]):
    (fault,) = told({}, {}, differs)
    assert all(word in fault for word in words), fault


def test_everything_is_told_at_once():
    other = {"versions": {"Python": "3.12.0", "torch": "2.7.0"}, "code": {}, "free_bytes": 1}
    assert [fault.split(" = ")[0] for fault in told({}, other)] == [
        "version of Python",
        "version of torch",
        "code of megatron_kvshare",
        "--save",
    ]


def test_without_save_no_folder_is_looked_at():
    facts = job({"folder_fault": "is not there", "free_bytes": 0})
    assert not known.faults(replace(CONFIG, save=None), facts)


def test_more_processes_than_gpus():
    faults = told({"device": "H100", "devices": 1})
    assert len(faults) == 1 and "rank 1 on node1" in faults[0] and "GPU number 1" in faults[0]


def test_two_ranks_on_one_gpu():
    facts = [replace(each, devices=8, local_rank=0) for each in job({})]
    (fault,) = known.faults(CONFIG, facts)
    assert "GPU 0 of node1" in str(fault) and "ranks 0-1" in str(fault)


def test_long_lists_are_shortened():
    facts = job(*[{}] * 40)
    assert known.spread(facts, lambda each: each.host and "same") == {
        "same": "node1, node2, node3, node4 and 36 more"
    }
    assert nodes(facts).startswith("node1 (ranks 0-1), node2 (ranks 2-3)")
    assert nodes(facts).endswith("node16 (ranks 30-31), and 24 more")


def test_runs():
    assert runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert runs([3]) == "3"


def test_the_digest_follows_the_source_files_only(tmp_path: Path):
    copy = tmp_path / "megatron_kvshare"
    shutil.copytree(PACKAGE, copy)
    mine = known.digests(PACKAGE)
    assert mine == known.digests(copy) and "train/loop.py" in mine
    (copy / "notes.txt").write_text("not code")
    assert known.digests(copy) == mine
    (copy / "errors.py").write_bytes((copy / "errors.py").read_bytes() + b"\n")
    theirs = known.digests(copy)
    assert {name for name in mine if mine[name] != theirs[name]} == {"errors.py"}
    assert known.digest_of_all(mine) != known.digest_of_all(theirs)


def test_the_folder_of_a_run_that_has_not_started(tmp_path: Path):
    assert known.nearest_folder(str(tmp_path / "runs" / "a" / "checkpoint")) == tmp_path
    probe = tmp_path / "probe"
    probe.touch()
    seen = known.look_at(probe, 3, writes=True)
    assert seen["folder_fault"] == "" and seen["free_bytes"] > 0
    assert [*tmp_path.iterdir()] == [probe], "nothing is left behind"


def test_a_folder_that_only_the_first_rank_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "_VISIBLE_SECONDS", 0.0)
    seen = known.look_at(tmp_path / "probe", 3, writes=True)
    assert seen["folder_fault"] == "is not the folder that rank 0 sees"


def test_sizes_in_words():
    assert [known.size(count) for count in (0, 999, 1500, 2.5e9, 4e18)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.5 GB",
        "4e+03 PB",
    ]
