"""How layers are cut into pipeline stages (no torch): layouts, and the one that is proposed.

Stages are counted in the order of layers. With virtual stages there are several on a rank: stage
``v`` lies on rank ``v % ranks`` and is that rank's chunk ``v // ranks``, as in megatron-core.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from megatron_kvshare.errors import ConfigError, Fault

LAYOUT_FLAG = "--pipeline-model-parallel-layout"

_REPEAT_GROUP = re.compile(r"\(([^()]*)\)\*([0-9]{1,9})")
_REPEAT_LETTER = re.compile(r"([EtL])\*([0-9]{1,9})")
_LONGEST = 100_000
"""Letters of a layout written out: far more than there are layers."""

Layout = tuple[int, ...]
"""Number of layers of every stage, in the order of layers."""


def parse_layout(text: str, num_layers: int, ranks: int) -> Layout:
    """``8,8,7,7`` or Megatron's notation: ``Et*8|t*8|t*7|t*7L``, with ``(t|)*4`` repeated.

    Raises :class:`ConfigError` for one that loses layers or does not fit ``ranks``.
    """
    counts = _counts_of_numbers(text) if re.match(r"\s*[0-9]", text) else _counts_of_letters(text)
    if sum(counts) != num_layers:
        rule = f"its stages hold {sum(counts)} layers, the model has {num_layers}"
        raise ConfigError(Fault(LAYOUT_FLAG, text, rule, _use(even_ish(num_layers, len(counts)))))
    if len(counts) % ranks:
        rule = f"its {len(counts)} stages must be a multiple of the {ranks} pipeline ranks"
        raise ConfigError(Fault(LAYOUT_FLAG, text, rule, _use(even_ish(num_layers, ranks))))
    if 0 in counts:
        rule = f"stage {counts.index(0)} has no layer"
        raise ConfigError(Fault(LAYOUT_FLAG, text, rule, _use(even_ish(num_layers, len(counts)))))
    return counts


def even_layout(
    num_layers: int, stages: int, count_embedding: bool = False, count_head: bool = False
) -> Layout:
    """Equally many layers in every stage; an embedding or head that counts takes a layer's place.

    Raises :class:`ConfigError`, with a layout to copy, where that is impossible.
    """
    places = num_layers + count_embedding + count_head
    each = places // stages
    counts = [each] * stages
    counts[0] -= count_embedding
    counts[-1] -= count_head
    if places % stages == 0 and min(counts) > 0:
        return tuple(counts)
    what = f"{num_layers} layers" + " and the embedding" * count_embedding
    what += " and the head" * count_head
    rule = f"{what} do not divide into {stages} stages with at least one layer each"
    if num_layers < stages:
        fix = f"use at most {num_layers} stages (ranks x virtual stages)"
        raise ConfigError(Fault("--num-layers", num_layers, rule, fix))
    raise ConfigError(Fault("--num-layers", num_layers, rule, _use(even_ish(num_layers, stages))))


def even_ish(num_layers: int, stages: int) -> Layout:
    """The most even layout there is, larger stages first: ``8,8,7,7``."""
    small, larger = divmod(num_layers, stages)
    return tuple(small + (stage < larger) for stage in range(stages))


def layout_text(layout: Sequence[int]) -> str:
    """As :func:`parse_layout` reads it."""
    return ",".join(map(str, layout))


def slowest_stage(layout: Layout, work: Sequence[float], transport: Sequence[float]) -> float:
    """Work and transport of the stage that has most; see :func:`proposed_layout`."""
    stops = list(accumulate(layout))
    return max(
        sum(work[stop - layers : stop])
        + (transport[stop - layers] if stop > layers else 0.0)
        + (transport[stop] if stop < len(work) else 0.0)
        for layers, stop in zip(layout, stops, strict=True)
    )


def proposed_layout(work: Sequence[float], stages: int, transport: Sequence[float]) -> Layout:
    """The cut whose slowest stage is fastest.

    ``work``: of every layer, that of embedding and head included in the first and last;
    ``transport``: of sending what crosses a cut below layer ``i``, in the same unit, paid by both
    sides (``transport[0]`` is never paid). Among equal ones the cut that sends least.
    """
    count = len(work)
    sums = [0.0, *accumulate(work)]

    def stage(first: int, stop: int) -> float:
        sent = transport[stop] if stop < count else 0.0
        received = transport[first] if first else 0.0
        return sums[stop] - sums[first] + sent + received

    # best[stop]: (slowest stage, sum of transport, cuts) of the layers below stop.
    best: dict[int, tuple[float, float, Layout]] = {
        stop: (stage(0, stop), 0.0, (stop,)) for stop in range(1, count + 1)
    }
    for _ in range(1, stages):
        best = {
            stop: min(
                (
                    max(slowest, stage(first, stop)),
                    sent + transport[first],
                    (*cuts, stop),
                )
                for first, (slowest, sent, cuts) in best.items()
                if first < stop
            )
            for stop in range(2, count + 1)
            if any(first < stop for first in best)
        }
    cuts = best[count][2]
    return tuple(stop - first for first, stop in zip((0, *cuts), cuts, strict=False))


def _counts_of_numbers(text: str) -> Layout:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        rule = "it is a list of layers per stage"
        raise ConfigError(Fault(LAYOUT_FLAG, text, rule, f"write {LAYOUT_FLAG} 8,8,7,7"))
    return tuple(map(int, words))


def _counts_of_letters(text: str) -> Layout:
    plain = text.replace(",", "").replace(" ", "")
    while (longer := _REPEAT_GROUP.sub(_repeated, plain)) != plain:
        plain = longer
    plain = _REPEAT_LETTER.sub(_repeated, plain)
    if not re.fullmatch(r"E(t|\|)*L", plain):
        rule = "it is E (embedding), t (layer) and L (head and loss), with | between stages"
        fix = f"write {LAYOUT_FLAG} 'Et*8|t*8|t*7|t*7L', or 8,8,7,7"
        raise ConfigError(Fault(LAYOUT_FLAG, text, rule, fix))
    return tuple(stage.count("t") for stage in plain.split("|"))


def _repeated(match: re.Match[str]) -> str:
    if len(match[1]) * int(match[2]) > _LONGEST:
        rule = f"it is longer than {_LONGEST:,} layers and stages"
        fix = f"write {LAYOUT_FLAG} 8,8,7,7"
        raise ConfigError(Fault(LAYOUT_FLAG, match[0][-40:], rule, fix))
    return match[1] * int(match[2])


def _use(layout: Layout) -> str:
    return f"use {LAYOUT_FLAG} {layout_text(layout)}"
