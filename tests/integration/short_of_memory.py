"""`kvshare` with ranks that run out of memory at one place: `python -m ... RANKS PLACE arguments`.

RANKS: 0,1 for example; PLACE: a key of `PLACES`. The error is raised where torch would raise it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from megatron_kvshare.cli.main import main
from megatron_kvshare.engines import megatron
from megatron_kvshare.model.gpt import KVShareGPT

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of"
    " which 1.21 GiB is free. Including non-PyTorch memory, this process has 77.88 GiB memory in"
    " use. Of the allocated memory 73.20 GiB is allocated by PyTorch, and 3.97 GiB is reserved by"
    " PyTorch but unallocated. If reserved but unallocated memory is large try setting"
    " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
"""What torch says."""
PLACES = {
    "building": (KVShareGPT, "__init__", 1),
    "training": (KVShareGPT, "forward", 5),
    "validation": (KVShareGPT, "forward", 1),
    "saving": (megatron, "content", 1),
}
"""What is called there, and the number of the call that finds no memory: that forward is in the
second step, where a step has four."""


def run_out(place: str) -> None:
    """From now on memory runs out there."""
    owner, name, last = PLACES[place]
    original, calls = getattr(owner, name), 0

    def with_shortage(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled() != (place == "validation")
        if calls == last:
            raise torch.OutOfMemoryError(CUDA)
        return original(*arguments, **settings)

    setattr(owner, name, with_shortage)


if __name__ == "__main__":
    ranks, where, *argv = sys.argv[1:]
    if os.environ.get("RANK", "0") in ranks.split(","):
        run_out(where)
    sys.exit(main(argv))
