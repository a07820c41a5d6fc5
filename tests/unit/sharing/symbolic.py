"""Runs a plan on sets of tokens: fails where a step reads keys and values that are not there."""

from __future__ import annotations

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.plan import Carry, ExecutionPlan, LayerStep, Segment, StepMode, Sweep

TOKENS = frozenset(range(11))
Known = dict[int, frozenset[int]]
"""Producer -> the tokens whose keys and values are known."""


def run_symbolically(plan: ExecutionPlan, skippable_run: int = 0) -> set[int]:
    """The producers whose KV every segment has left for all tokens.

    Of the sweeps that may be left out, ``skippable_run`` run; a first sweep always does.
    """
    outside: set[int] = set()
    for segment in plan.segments:
        before: Known = {}
        inputs: set[int] = set()  # producers whose inputs the sweep before has kept
        for sweep in _run_ones(segment, skippable_run):
            run = _SweepOnSets(plan.map, segment, sweep, outside)
            before = run.run(before, inputs)
            inputs = run.ran if sweep.keep_inputs else set()
        assert all(tokens == TOKENS for tokens in before.values())
        outside |= before.keys()
    return outside


def _run_ones(segment: Segment, count: int) -> list[Sweep]:
    chosen: list[Sweep] = []
    for sweep in segment.sweeps:
        optional = sweep.skip_below is not None and chosen
        if not optional or count > 0:
            count -= bool(optional)
            chosen.append(sweep)
    return chosen


class _SweepOnSets:
    def __init__(
        self, sharing: SharingMap, segment: Segment, sweep: Sweep, outside: set[int]
    ) -> None:
        self.sharing, self.segment, self.sweep, self.outside = sharing, segment, sweep, outside
        self.known: Known = {}
        self.ran: set[int] = set()

    def run(self, before: Known, inputs: set[int]) -> Known:
        self.known = self._carried(before, inputs)
        for visit in self.sweep.visits:
            rows = frozenset(t for t in TOKENS if t % self.sweep.stride == visit.offset)
            made: set[int] = set()  # in this visit
            for step in visit.steps:
                hidden_is_needed = step is not visit.steps[-1]
                assert step.mode is not StepMode.KV_ONLY or not hidden_is_needed
                self._step(step, rows, visit.offset, made)
        for step in self.sweep.finish:
            assert step.mode is StepMode.KV_GIVEN
            assert self.sharing.is_producer(step.layer)
            assert self.known[step.layer] == TOKENS
        top = self.sweep.finish[-1:] or self.sweep.visits[-1].steps[-1:]
        assert not self.sweep.last or top[0].mode is not StepMode.KV_ONLY, "no hidden states leave"
        return self.known

    def _carried(self, before: Known, inputs: set[int]) -> Known:
        match self.sweep.carry:
            case Carry.NOTHING:
                return {}
            case Carry.KV:
                assert before, "there is no sweep before"
                assert before.keys() >= set(self.sweep.carried)
                return dict(before)
            case Carry.PROJECTED:
                assert inputs >= set(self.sweep.carried), "the inputs were not kept"
        return dict.fromkeys(self.sweep.carried, TOKENS)

    def _step(self, step: LayerStep, rows: frozenset[int], offset: int, made: set[int]) -> None:
        layer, sharing = step.layer, self.sharing
        source, upward = sharing.sources[layer], sharing.is_upward(layer)
        assert step.mode is not StepMode.KV_GIVEN
        if step.mode in (StepMode.NO_ATTENTION, StepMode.OWN_INPUT):
            assert upward
            assert source not in self.known, "it has something to read"
            return
        if sharing.is_producer(layer):
            self.known[layer] = self.known.get(layer, frozenset()) | rows
            self.ran.add(layer)
            made.add(layer)
        if step.mode is StepMode.KV_ONLY:
            assert sharing.is_producer(layer)
        elif source < self.segment.first:
            assert source in self.outside
        elif upward:
            self._assert_complete(source, offset)
        else:
            assert source in made, "its own visit comes first"
            self._assert_complete(source, offset + 1)

    def _assert_complete(self, source: int, blocks: int) -> None:
        """Everything that was carried in or made by the visits so far, the first ``blocks``."""
        stride, carry = self.sweep.stride, self.sweep.carry
        if carry is Carry.NOTHING:
            expected = frozenset(t for t in TOKENS if t % stride < blocks)
            assert self.known.get(source, frozenset()) == expected
            return
        assert self.known[source] == TOKENS
        others_unvisited = stride > 1 or self.sharing.sources[source] not in self.ran
        assert not others_unvisited or source in self.sweep.carried
