"""Files of DeepSpeed that cannot be read for want of memory are not called damaged."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare.checkpoint.deepspeed_shards import read_shards
from megatron_kvshare.engines.deepspeed_files import DataFiles
from megatron_kvshare.errors import CheckpointError

SHORT = (
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 GB"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
)


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_a_shortage_is_passed_on(error: Exception, tmp_path, monkeypatch) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    path.write_bytes(b"anything")

    def short(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", short)
    for read in (lambda: read_shards(tmp_path), lambda: DataFiles().load(str(path))):
        with pytest.raises(type(error)) as caught:
            read()
        assert caught.value is error


def test_damage_is_called_so(tmp_path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    path.write_bytes(b"anything")
    for read in (lambda: read_shards(tmp_path), lambda: DataFiles().load(str(path))):
        with pytest.raises(CheckpointError, match="cannot be read as data"):
            read()
