"""A plan cut by pipeline stages: the tasks of one microbatch and the values between them.

For cyclic groups that span stages. Every task belongs to one stage and runs what lies there of one
visit of one sweep; it reads named values and makes others. A value is wanted wherever a later task
reads it, and goes there straight from the stage that made it. No torch here:
:mod:`megatron_kvshare.pipeline.executor` runs the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_kvshare.sharing.plan import (
    Carry,
    ExecutionPlan,
    LayerStep,
    Segment,
    StepMode,
    Sweep,
    Visit,
)
from megatron_kvshare.stages.placement import Placement, Stage


class Key(NamedTuple):
    """A value of one microbatch: the ``hidden`` states above ``layer``, its ``kv``, its ``input``
    or the KV ``carried`` into a sweep, of the tokens ``offset`` modulo the sweep's stride; or what
    has ``left`` the group below, of all tokens."""

    what: str
    layer: int
    sweep: int = 0
    offset: int = 0

    @property
    def is_kv(self) -> bool:
        return self.what in ("kv", "carried")


Sources = Mapping[int, tuple[Key | None, ...]]
"""Producer -> the values that its blocks of KV are, None where a block is not known yet."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one stage computes at a time. ``makes``: the values that later tasks read; ``gradient``:
    whether it has a backward."""

    stage: Stage
    makes: tuple[Key, ...] = ()
    gradient: bool = True

    @property
    def reads(self) -> tuple[Key, ...]:
        """Every value once, in a fixed order."""
        return ()

    @property
    def measures(self) -> tuple[Key, ...]:
        """What it reads besides to measure a residual."""
        return ()

    @property
    def stride(self) -> int:
        """The values are those of every ``stride``-th token."""
        return 1


@dataclass(frozen=True, kw_only=True)
class EmbedTask(Task):
    """The embedding of all tokens."""


@dataclass(frozen=True, kw_only=True)
class LayersTask(Task):
    """A part of a segment that lies whole in its stage; ``outside``: KV of producers below."""

    segment: Segment
    hidden: Key
    outside: Sources

    @cached_property
    def reads(self) -> tuple[Key, ...]:
        return _each_once((self.hidden,), self.outside)


@dataclass(frozen=True, kw_only=True)
class SweepTask(Task):
    """A part of sweep number ``number`` of a cyclic group."""

    segment: Segment
    number: int

    @property
    def sweep(self) -> Sweep:
        return self.segment.sweeps[self.number]


@dataclass(frozen=True, kw_only=True)
class CarryTask(SweepTask):
    """Keys and values that a sweep begins with, projected from ``inputs`` of their producers."""

    inputs: Mapping[int, tuple[Key, ...]]

    @cached_property
    def reads(self) -> tuple[Key, ...]:
        return _each_once((), self.inputs)

    @property
    def stride(self) -> int:
        return self.sweep.stride


@dataclass(frozen=True, kw_only=True)
class VisitTask(SweepTask):
    """What a stage has of one visit of a sweep. ``kv``: of producers in its own segment;
    ``outside``: of producers below; ``old``: the KV of the targets it renews as they were."""

    visit: Visit
    hidden: Key
    kv: Sources
    outside: Sources
    old: Mapping[int, Key | None]

    @cached_property
    def reads(self) -> tuple[Key, ...]:
        return _each_once((self.hidden,), self.kv, self.outside)

    @property
    def measures(self) -> tuple[Key, ...]:
        return tuple(key for key in self.old.values() if key is not None)

    @property
    def stride(self) -> int:
        return self.sweep.stride


@dataclass(frozen=True, kw_only=True)
class FinishTask(SweepTask):
    """The step for all tokens after the visits of a last sweep; ``hidden``: one of each visit."""

    step: LayerStep
    hidden: tuple[Key, ...]
    kv: tuple[Key, ...]

    @cached_property
    def reads(self) -> tuple[Key, ...]:
        return (*self.hidden, *self.kv)


@dataclass(frozen=True, kw_only=True)
class HeadTask(Task):
    """The output head and the loss."""

    hidden: Key

    @property
    def reads(self) -> tuple[Key, ...]:
        return (self.hidden,)


def _each_once(hidden: tuple[Key, ...], *kv: Sources) -> tuple[Key, ...]:
    keys = (key for sources in kv for source in sources.values() for key in source)
    return tuple(dict.fromkeys(key for key in (*hidden, *keys) if key is not None))


def tasks_of(plan: ExecutionPlan, placement: Placement) -> tuple[Task, ...]:
    """The tasks of one microbatch in the order in which they depend on one another."""
    return tuple(_Builder(plan, placement).build())


class _Builder:
    """Goes through the plan once and remembers where the newest values are."""

    def __init__(self, plan: ExecutionPlan, placement: Placement) -> None:
        self.plan = plan
        self.map = plan.map
        self.placement = placement
        self.hidden = Key("hidden", -1)
        self.final: dict[int, tuple[Key, ...]] = {}  # KV of finished segments

    def build(self) -> Iterator[Task]:
        first, last = self.placement.stages[0], self.placement.stages[-1]
        yield EmbedTask(stage=first, makes=(self.hidden,))
        for segment in self.plan.segments:
            stages = self._stages(segment)
            if segment.is_cyclic and len(stages) > 1:
                yield from self._spanning(segment, stages)
            else:
                for stage in stages:
                    yield self._layers(segment, stage)
        yield HeadTask(stage=last, hidden=self.hidden)

    def _stages(self, segment: Segment) -> list[Stage]:
        stages = self.placement.stages
        return [s for s in stages if s.first <= segment.last and segment.first < s.stop]

    def _layers(self, segment: Segment, stage: Stage) -> Task:
        part = segment.within(stage.layers)
        assert part is not None
        layers = range(part.first, part.last + 1)
        outside = {
            source: self.final[source] for source in self._sources(layers) if source not in layers
        }
        made = {
            layer: (Key("kv", layer),)
            for layer in layers
            if self.map.is_producer(layer) and self._is_read_above(layer, part.last)
        }
        hidden, self.hidden = self.hidden, Key("hidden", part.last)
        self.final |= made
        makes = (self.hidden, *(key for keys in made.values() for key in keys))
        return LayersTask(stage=stage, segment=part, hidden=hidden, outside=outside, makes=makes)

    def _sources(self, layers: range) -> list[int]:
        return sorted({self.map.sources[layer] for layer in layers})

    def _is_read_above(self, producer: int, layer: int) -> bool:
        return any(reader > layer for reader in self.map.consumers_of(producer))

    def _spanning(self, segment: Segment, stages: list[Stage]) -> Iterator[Task]:
        entering = self.hidden
        for number, sweep in enumerate(segment.sweeps):
            group = _Group(self, segment, stages, entering, number)
            yield from group.carries()
            for visit in sweep.visits:
                yield from group.visit(visit)
            if sweep.finish:
                yield group.finish()
        self.hidden = group.leaving
        for layer in range(segment.first, segment.last + 1):
            if self.map.is_producer(layer):
                self.final[layer] = group.blocks(layer)


@dataclass
class _Group:
    """One sweep of a spanning group."""

    builder: _Builder
    segment: Segment
    stages: list[Stage]
    entering: Key
    number: int

    @property
    def sweep(self) -> Sweep:
        return self.segment.sweeps[self.number]

    @property
    def layers(self) -> range:
        return range(self.segment.first, self.segment.last + 1)

    @property
    def leaving(self) -> Key:
        """The hidden states of the whole sequence after the last sweep."""
        last = self.segment.last
        return Key("left", last) if self.sweep.finish else Key("hidden", last, self.number)

    def blocks(self, producer: int) -> tuple[Key, ...]:
        """The producer's KV as this sweep makes it."""
        return tuple(Key("kv", producer, self.number, j) for j in range(self.sweep.stride))

    def carries(self) -> Iterator[Task]:
        """Projections that the sweep begins with, on the stages of their producers."""
        if self.sweep.carry not in (Carry.GROUP_INPUT, Carry.PROJECTED):
            return
        for stage in self.stages:
            mine = [layer for layer in self.sweep.carried if layer in stage.layers]
            if not mine:
                continue
            keys = {p: tuple(self._projected(p, j) for j in range(self.sweep.stride)) for p in mine}
            source: dict[int, tuple[Key, ...]] = {p: (self.entering,) for p in mine}
            if self.sweep.carry is Carry.PROJECTED:
                source = {p: self._inputs(p, self.number - 1) for p in mine}
            yield CarryTask(
                stage=stage,
                gradient=self.sweep.gradient,
                segment=self.segment,
                number=self.number,
                inputs=source,
                makes=tuple(key for each in keys.values() for key in each),
            )

    def _projected(self, producer: int, offset: int) -> Key:
        return Key("carried", producer, self.number, offset)

    def _inputs(self, producer: int, sweep: int) -> tuple[Key, ...]:
        stride = self.segment.sweeps[sweep].stride
        return tuple(Key("input", producer, sweep, j) for j in range(stride))

    def _before(self, producer: int, offset: int) -> Key | None:
        """What is known of a block before the sweep has made it."""
        match self.sweep.carry:
            case Carry.NOTHING:
                return None
            case Carry.KV:
                return Key("kv", producer, self.number - 1, offset)
            case _:
                carried = producer in self.sweep.carried
                return self._projected(producer, offset) if carried else None

    def visit(self, visit: Visit) -> Iterator[Task]:
        """What every stage has of one visit, bottom to top."""
        hidden = self.entering
        for stage in self.stages:
            steps = tuple(step for step in visit.steps if step.layer in stage.layers)
            top = steps[-1].layer
            makes = [key for step in steps for key in self._made(step, visit.offset)]
            after = Key("hidden", top, self.number, visit.offset)
            if stage != self.stages[-1] or self.sweep.last:
                makes.insert(0, after)
            inside = {step.layer for step in steps}
            read = {p: self._read(p, steps, visit.offset) for p in self._read_inside(steps)}
            outside = {p: self.builder.final[p] for p in self._read_below(steps)}
            yield VisitTask(
                stage=stage,
                gradient=self.sweep.gradient,
                segment=self.segment,
                number=self.number,
                visit=Visit(steps, visit.offset),
                hidden=hidden,
                kv=read,
                outside=outside,
                makes=tuple(makes),
                old={p: self._before(p, visit.offset) for p in self.segment.targets if p in inside},
            )
            hidden = after

    def _made(self, step: LayerStep, offset: int) -> Iterator[Key]:
        if not self.builder.map.is_producer(step.layer):
            return
        if step.mode in (StepMode.FULL, StepMode.KV_ONLY):
            yield Key("kv", step.layer, self.number, offset)
            if self.sweep.keep_inputs and self._is_projected_next(step.layer):
                yield Key("input", step.layer, self.number, offset)

    def _is_projected_next(self, producer: int) -> bool:
        return producer in self.segment.sweeps[self.number + 1].carried

    def _attending(self, steps: tuple[LayerStep, ...]) -> Iterator[int]:
        return (step.layer for step in steps if step.mode is StepMode.FULL)

    def _read_inside(self, steps: tuple[LayerStep, ...]) -> list[int]:
        sources = {self.builder.map.sources[layer] for layer in self._attending(steps)}
        return sorted(source for source in sources if source in self.layers)

    def _read_below(self, steps: tuple[LayerStep, ...]) -> list[int]:
        sources = {self.builder.map.sources[layer] for layer in self._attending(steps)}
        return sorted(source for source in sources if source not in self.layers)

    def _read(
        self, producer: int, steps: tuple[LayerStep, ...], offset: int
    ) -> tuple[Key | None, ...]:
        """The newest values of the producer's blocks when the task begins.

        The block of the visit itself is read as it was by layers below the producer only; for the
        others it is new: from a lower stage, or made by this very task.
        """
        sharing = self.builder.map
        upward = any(
            sharing.sources[layer] == producer and sharing.is_upward(layer)
            for layer in self._attending(steps)
        )
        made_below = producer < steps[0].layer

        def newest(block: int) -> Key | None:
            new = Key("kv", producer, self.number, block)
            if block < offset or (block == offset and made_below):
                return new
            if block == offset and not upward:
                return None
            return self._before(producer, block)

        return tuple(newest(block) for block in range(self.sweep.stride))

    def finish(self) -> Task:
        """The top layer's attention and feed-forward, for all tokens."""
        (step,) = self.sweep.finish
        last = self.segment.last
        visits = range(self.sweep.stride)
        return FinishTask(
            stage=self.stages[-1],
            gradient=self.sweep.gradient,
            segment=self.segment,
            number=self.number,
            step=step,
            hidden=tuple(Key("hidden", last, self.number, offset) for offset in visits),
            kv=self.blocks(step.layer),
            makes=(self.leaving,),
        )
