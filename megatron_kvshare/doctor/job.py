"""``kvshare doctor --distributed``: can this job train? Told in seconds, before it starts."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_kvshare import __version__
from megatron_kvshare.config.launch import told_once
from megatron_kvshare.doctor import facts as known
from megatron_kvshare.doctor.config import PreflightConfig, parse_preflight
from megatron_kvshare.doctor.facts import Facts, size
from megatron_kvshare.doctor.roll_call import RollCall
from megatron_kvshare.errors import ConfigError, Fault, KVShareError, LostError, runs

_GPU_BYTES, _CPU_BYTES = 256 * 2**20, 4 * 2**20
"""Summed over all ranks: enough for a network to show its bandwidth, quickly."""
_REPEATS = 5
_SHOWN_NODES = 16


def run(argv: Sequence[str]) -> int:
    """Check the job on all ranks; the first prints a table.

    Raises:
        ConfigError: on the first rank, with everything there is to put right.
        LostError: ranks are missing, or do not reach each other over the network.
        SystemExit: on the other ranks, with the same exit code.
    """
    started = time.monotonic()
    with told_once():
        config = parse_preflight(argv)
        call = RollCall(config.timeout_seconds)
    with _probe(config, call) as probe:
        mine = asdict(known.facts_here(config, call.rank, probe))
        answers = call.settle("facts", mine, lambda given: _wrong(config, given))
    speeds = _network(config, call)
    if call.rank == 0:
        facts = [Facts(**each) for each in answers]
        print(table(config, facts, speeds[0], time.monotonic() - started), flush=True)
    return 0


def table(
    config: PreflightConfig, answers: Sequence[Facts], speed: dict[str, Any], seconds: float
) -> str:
    """What was found where everything is right; ``speed`` is an answer of :func:`_all_reduce`."""
    first, ranks = answers[0], len(answers)
    # What one rank must send and receive at least, whatever the algorithm: NCCL calls it busbw.
    moved = 2 * (ranks - 1) / ranks * speed["bytes"]
    lines = {
        "nodes": nodes(answers),
        "devices": "; ".join(
            f"{name} (ranks {runs([each.rank for each in answers if each.device == name])})"
            for name in dict.fromkeys(each.device for each in answers)
        ),
        "code": f"{known.digest_of_all(first.code)} on every node, megatron_kvshare {__version__}",
        "packages": ", ".join(f"{name} {version}" for name, version in first.versions.items()),
        "network": f"{speed['backend']}, all-reduce of {size(speed['bytes'])} in"
        f" {1000 * speed['seconds']:.3g} ms: {size(moved / speed['seconds'])}/s",
    }
    if config.save is not None:
        lines["disk"] = f"{size(first.free_bytes)} free in {first.folder}, seen from every node"
    lines["took"] = f"{seconds:.1f} s"
    text = [
        textwrap.fill(value, 100, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
        for name, value in lines.items()
    ]
    return "\n".join([f"doctor: {ranks} ranks are ready to train", *text])


def nodes(answers: Sequence[Facts]) -> str:
    """``node1 (ranks 0-7), node2 (ranks 8-15)``; a long job's are shortened."""
    ranks: dict[str, list[int]] = {}
    for facts in answers:
        ranks.setdefault(facts.host, []).append(facts.rank)
    shown = [f"{host} (ranks {runs(each)})" for host, each in ranks.items()]
    more = f", and {len(shown) - _SHOWN_NODES} more" if len(shown) > _SHOWN_NODES else ""
    return ", ".join(shown[:_SHOWN_NODES]) + more


@contextlib.contextmanager
def _probe(config: PreflightConfig, call: RollCall) -> Iterator[str]:
    """A file of the first rank where --save will be, for the others to see while they answer."""
    if config.save is None:
        yield ""
        return
    if call.rank:
        yield call.share("probe")
        return
    folder = known.nearest_folder(config.save)
    try:
        with tempfile.NamedTemporaryFile(prefix=".kvshare-doctor-", dir=folder) as file:
            yield call.share("probe", file.name)
    except OSError:
        # The first rank's own answer says that it cannot write there.
        yield call.share("probe", str(folder / "unwritable"))


def _wrong(config: PreflightConfig, answers: Sequence[dict[str, Any]]) -> KVShareError | None:
    found = known.faults(config, [Facts(**each) for each in answers])
    return ConfigError(found) if found else None


# The network --------------------------------------------------------------------------------------


def _network(config: PreflightConfig, call: RollCall) -> list[dict[str, Any]]:
    """All ranks' answers of :func:`_all_reduce`, on the first.

    Measured in a thread, since a rank that is stuck in a collective could not say so.
    """
    mine: dict[str, Any] = {}
    worker = threading.Thread(target=_try, args=(_all_reduce, config, mine), daemon=True)
    # Imported before time is taken: a slow file system is not a broken network.
    _try(_load_megatron, config, mine)
    if not mine:
        worker.start()
        worker.join(config.timeout_seconds)
    answer = mine or {"fault": f"no end within {config.timeout_seconds:g} s"}
    try:
        return call.settle("network", answer, _broken_network)
    except LostError as error:
        if worker.is_alive():
            # The end of the interpreter would wait for the collective.
            print(error, file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        raise
    except SystemExit as left:
        if worker.is_alive():
            os._exit(int(left.code or 0))
        raise


def _try(
    work: Callable[[PreflightConfig], dict[str, Any]],
    config: PreflightConfig,
    answer: dict[str, Any],
) -> None:
    """Add what ``work`` returns to ``answer``, or a ``fault`` in words."""
    try:
        answer |= work(config)
    except Exception as error:  # whatever a network or a driver comes up with is the answer
        first_line = next(iter(str(error).splitlines()), "")
        answer["fault"] = f"{type(error).__name__}: {first_line}"


def _load_megatron(_: PreflightConfig) -> dict[str, Any]:
    importlib.import_module("megatron_kvshare.megatron_api.parallel")
    return {}


def _all_reduce(config: PreflightConfig) -> dict[str, Any]:
    """``bytes``, ``seconds`` and ``backend`` of an all-reduce over the job."""
    import torch
    import torch.distributed as dist

    from megatron_kvshare.megatron_api import parallel

    # Collectives wait for a minute longer: the fault is told before NCCL ends the process.
    state = parallel.initialize(
        backend=config.distributed_backend, timeout_minutes=config.timeout_seconds / 60
    )
    try:
        count = (_GPU_BYTES if state.platform.is_gpu else _CPU_BYTES) // 4
        ones = torch.ones(count, device=state.platform.device)
        best = float("inf")
        for _ in range(_REPEATS):  # the first also makes the connections
            ones.fill_(1)
            start = time.perf_counter()
            dist.all_reduce(ones)
            total = ones[-1].item()  # waits for the end
            best = min(best, time.perf_counter() - start)
            if total != state.world_size or not bool((ones == total).all()):
                return {"fault": f"a sum of {state.world_size} ones came out as {total:g}"}
        slowest = max(parallel.gather_objects(best))
        return {"bytes": 4 * count, "seconds": slowest, "backend": state.platform.backend}
    finally:
        parallel.destroy()


def _broken_network(answers: Sequence[dict[str, Any]]) -> KVShareError | None:
    by_fault: dict[str, list[int]] = {}
    for rank, each in enumerate(answers):
        if "fault" in each:
            by_fault.setdefault(each["fault"], []).append(rank)
    if not by_fault:
        return None
    rule = "all ranks must form a process group and add up a tensor"
    fix = (
        "see the log of these ranks with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME"
        " without GPUs) names the network device between the nodes"
    )
    return LostError(
        [
            Fault(f"network, ranks {runs(ranks)}", text, rule, fix)
            for text, ranks in by_fault.items()
        ]
    )
