"""The execution plan of a sharing map: in which order, and how often, layers run (no torch).

The model executes this data and decides nothing itself. :mod:`megatron_kvshare.sharing.solver`
makes plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from megatron_kvshare.sharing.map import SharingMap


def subset_length(length: int, stride: int, offset: int) -> int:
    """How many of ``length`` tokens have ``t % stride == offset``."""
    return len(range(offset, length, stride))


class StepMode(StrEnum):
    """How much of a layer one step needs."""

    FULL = "full"
    NO_ATTENTION = "no_attention"  # an upward layer that has no KV to read yet: norm and MLP only
    KV_ONLY = "kv_only"  # only the KV of a producer is wanted: norm and K/V projection
    KV_GIVEN = "kv_given"  # a producer whose KV is there already: queries, attention and MLP
    OWN_INPUT = "own_input"  # an upward layer reads its target's projection of its own input


class Carry(StrEnum):
    """What a token reads of tokens that the sweep has not visited yet."""

    NOTHING = "nothing"  # no keys at all (first sweep): such tokens are not seen
    GROUP_INPUT = "group_input"  # the producers' projections of the group's input (first sweep)
    KV = "kv"  # the keys and values as the sweep before left them
    PROJECTED = "projected"  # projections, made anew with gradient, of what entered the producers


@dataclass(frozen=True)
class LayerStep:
    """One layer for the tokens of one visit."""

    layer: int
    mode: StepMode = StepMode.FULL


@dataclass(frozen=True)
class Visit:
    """The tokens ``t`` with ``t % stride == offset``, together through ``steps``."""

    steps: tuple[LayerStep, ...]
    offset: int = 0


@dataclass(frozen=True)
class Sweep:
    """One round over the layers of a segment for every token, started from the segment's input.

    The ``visits`` run one after another, each over one of ``stride`` interleaved token subsets; a
    later visit reads the KV that earlier ones have refreshed (Gauss-Seidel). ``finish`` then runs
    for all tokens at once. ``gradient`` = under autograd. The hidden states and the KV of the
    ``last`` sweep leave the segment. ``carried``: producers whose KV a visit may read before this
    sweep has made it. ``keep_inputs``: the next sweep's carry is ``PROJECTED``, so what entered
    those producers is kept. ``skip_below``: the sweep is left out once the KV residual of the one
    before is at most this.
    """

    visits: tuple[Visit, ...]
    gradient: bool
    last: bool
    carry: Carry = Carry.NOTHING
    carried: tuple[int, ...] = ()
    finish: tuple[LayerStep, ...] = ()
    keep_inputs: bool = False
    skip_below: float | None = None

    @property
    def stride(self) -> int:
        """Number of token subsets; 1 = all tokens at once."""
        return len(self.visits)

    @property
    def weighted_steps(self) -> Iterator[tuple[LayerStep, float]]:
        """Every step and the share of the tokens it runs for."""
        for visit in self.visits:
            yield from ((step, 1 / self.stride) for step in visit.steps)
        yield from ((step, 1.0) for step in self.finish)


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

    @property
    def only_visit(self) -> Visit:
        """Of a segment that is not cyclic: its layers run once, for all tokens."""
        assert not self.is_cyclic, "a cyclic group has sweeps"
        ((visit,),) = (sweep.visits for sweep in self.sweeps)
        return visit

    def within(self, layers: range) -> Segment | None:
        """The part that lies in ``layers``; a cyclic group cannot be cut."""
        first, last = max(self.first, layers.start), min(self.last, layers.stop - 1)
        if first > last:
            return None
        if (first, last) == (self.first, self.last):
            return self
        assert not self.is_cyclic, "a cyclic group spans stages"
        steps = tuple(step for step in self.only_visit.steps if step.layer in layers)
        part = replace(self.sweeps[0], visits=(replace(self.only_visit, steps=steps),))
        return Segment(first, last, (part,))


@dataclass(frozen=True)
class ExecutionPlan:
    """Segments cover layers ``0..L-1`` in order and run one after another, each all its sweeps."""

    map: SharingMap
    segments: tuple[Segment, ...]

    @property
    def groups(self) -> tuple[Segment, ...]:
        """The cyclic segments, bottom to top."""
        return tuple(segment for segment in self.segments if segment.is_cyclic)

    @property
    def most_sweeps(self) -> int:
        """Of any cyclic group."""
        return max((len(segment.sweeps) for segment in self.groups), default=0)

    def within(self, layers: range) -> tuple[Segment, ...]:
        """What a pipeline stage with these layers runs."""
        parts = (segment.within(layers) for segment in self.segments)
        return tuple(part for part in parts if part is not None)
