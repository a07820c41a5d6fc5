"""The execution plan of a sharing map: in which order, and how often, layers run (L1, no torch).

The model executes this data and decides nothing itself; another solver of the cyclic groups is
another plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.sharing.map import SharingMap


class StepMode(StrEnum):
    """How much of a layer one step needs."""

    FULL = "full"
    NO_ATTENTION = "no_attention"  # an upward layer that has no KV to read yet: norm and MLP only
    KV_ONLY = "kv_only"  # only the KV of a producer is wanted: norm and K/V projection


@dataclass(frozen=True)
class LayerStep:
    """One layer of one sweep."""

    layer: int
    mode: StepMode = StepMode.FULL


@dataclass(frozen=True)
class Sweep:
    """One pass over the layers of a segment, for all tokens, started from the segment's input.

    ``gradient`` = under autograd. The hidden states and the KV of the ``last`` sweep leave the
    segment.
    """

    steps: tuple[LayerStep, ...]
    gradient: bool
    last: bool


@dataclass(frozen=True)
class Segment:
    """Layers ``first..last`` (inclusive) and the sweeps that run them.

    ``targets`` = the producers in the segment that upward layers read: the KV that one sweep hands
    to the next. A segment is a cyclic group exactly when it has targets.
    """

    first: int
    last: int
    sweeps: tuple[Sweep, ...]
    targets: tuple[int, ...] = ()

    @property
    def is_cyclic(self) -> bool:
        return bool(self.targets)

    @property
    def num_layers(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class ExecutionPlan:
    """Segments cover layers ``0..L-1`` in order and run one after another, each all its sweeps."""

    map: SharingMap
    segments: tuple[Segment, ...]

    @property
    def groups(self) -> tuple[Segment, ...]:
        """The cyclic segments, bottom to top."""
        return tuple(segment for segment in self.segments if segment.is_cyclic)


def jacobi_plan(
    map: SharingMap, forward_passes: int = 7, backward_passes: int = 2, skip: bool = True
) -> ExecutionPlan:
    """The published iteration: ``forward_passes`` no-grad, then ``backward_passes`` grad sweeps.

    Layers outside cyclic groups run once. ``skip`` leaves out what a sweep does not need, without
    changing any result: attention of upward layers in the first sweep (there is no KV yet), and all
    but the KV of the group's top layer in every sweep but the last. Raises :class:`MapError` for an
    impossible number of sweeps. Source: arXiv 2410.14442, section 3.3; the skipping is ours.
    """
    faults = pass_faults(forward_passes, backward_passes)
    if faults:
        raise MapError(faults)
    segments: list[Segment] = []
    start = 0
    for first, last in map.cyclic_groups:
        if start < first:
            segments.append(_single_sweep(start, first - 1))
        segments.append(_iterated(map, first, last, forward_passes, backward_passes, skip))
        start = last + 1
    if start < map.num_layers:
        segments.append(_single_sweep(start, map.num_layers - 1))
    return ExecutionPlan(map, tuple(segments))


def pass_faults(forward_passes: int, backward_passes: int) -> list[Fault]:
    """What is wrong with the numbers of sweeps (empty when they are fine)."""
    faults = []
    if forward_passes < 0:
        rule = "the number of passes without gradient cannot be negative"
        fix = "use 0 or more (the published value is 7)"
        faults.append(Fault("--kv-forward-passes", forward_passes, rule, fix))
    if backward_passes < 1:
        rule = "at least one pass must carry gradient, or nothing in the group is trained"
        fix = "use 1 or more (the published value is 2)"
        faults.append(Fault("--kv-backward-passes", backward_passes, rule, fix))
    return faults


def _single_sweep(first: int, last: int) -> Segment:
    steps = tuple(LayerStep(layer) for layer in range(first, last + 1))
    return Segment(first, last, (Sweep(steps, gradient=True, last=True),))


def _iterated(
    map: SharingMap, first: int, last: int, forward_passes: int, backward_passes: int, skip: bool
) -> Segment:
    layers = range(first, last + 1)
    count = forward_passes + backward_passes

    def step(layer: int, number: int) -> LayerStep:
        if skip and layer == last and number < count - 1:
            return LayerStep(layer, StepMode.KV_ONLY)
        if skip and number == 0 and map.is_upward(layer):
            return LayerStep(layer, StepMode.NO_ATTENTION)
        return LayerStep(layer)

    sweeps = tuple(
        Sweep(
            steps=tuple(step(layer, number) for layer in layers),
            gradient=number >= forward_passes,
            last=number == count - 1,
        )
        for number in range(count)
    )
    targets = tuple(sorted({map.sources[layer] for layer in layers if map.is_upward(layer)}))
    return Segment(first, last, sweeps, targets)
