"""Which sequences run, and on which pages (no torch).

Every step gives one token to each running sequence. A new one is taken in as soon as there is room
for its whole prompt and a page more; where a running one finds no page to grow, the one that came
last is set aside in host memory, and comes back first. So nothing fails for want of pages, and the
first to come is always served.
"""

from __future__ import annotations

from collections import deque

from megatron_kvshare.serving.pages import page_keys
from megatron_kvshare.serving.prefill_plan import is_final
from megatron_kvshare.serving.sequence import Sequence, SequencePages
from megatron_kvshare.serving.settings import PrefillMode
from megatron_kvshare.serving.step import Chunk, Moved, NewToken, Step
from megatron_kvshare.sharing.map import SharingMap


class Scheduler:
    """Plans steps; the engine carries them out, tells :meth:`advance`, and adds what was drawn."""

    def __init__(
        self,
        map: SharingMap,
        pages: SequencePages,
        mode: PrefillMode,
        max_batch_size: int,
        prefill_tokens: int,
        prefix_reuse: bool,
    ) -> None:
        self.pages = pages
        self.max_batch_size = max_batch_size
        self.prefill_tokens = prefill_tokens
        self.cuts_prompts = is_final(map, mode)
        self.mode: PrefillMode = mode if map.is_cyclic else "exact"
        self.reuses = prefix_reuse and self.cuts_prompts and pages.shares_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.reused_tokens = 0
        self._forgotten: list[int] = []
        self._before: tuple[object, ...] = ()

    def add(self, sequence: Sequence) -> None:
        sequence.tokens = list(sequence.request.prompt)
        sequence.tables = [[] for _ in self.pages.groups]
        if self.reuses:
            sequence.keys = page_keys(self.mode, sequence.request.prompt, self.pages.size)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody waits for it any more."""
        if sequence.aside:
            self._forgotten.append(sequence.number)
        else:
            self.pages.release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> Step:
        """The next step. Pages are given out here, so it must be carried out."""
        lengths = self._lengths_of_chunks()
        set_aside = self._make_room(lengths)
        put_back = [] if set_aside else self._admit(lengths)
        running = [sequence for sequence in self.running if sequence.is_prefilled]
        tokens = tuple(map(_new_token, running))
        chunks = tuple(
            self._chunk(sequence, lengths[sequence])
            for sequence in self.running
            if sequence in lengths
        )
        forgotten, self._forgotten = tuple(self._forgotten), []
        tables = tuple((token.sequence, token.tables) for token in tokens)
        same, self._before = tables == self._before, tables
        return Step(tuple(set_aside), tuple(put_back), forgotten, chunks, tokens, same)

    def advance(self, step: Step) -> None:
        """``step`` has been carried out: its tokens are in the cache."""
        by_number = {sequence.number: sequence for sequence in self.running}
        for token in step.tokens:
            by_number[token.sequence].computed += 1
        for chunk in step.chunks:
            sequence = by_number[chunk.sequence]
            sequence.computed += len(chunk.tokens)
            if self.reuses:
                self.pages.publish(sequence)

    def _lengths_of_chunks(self) -> dict[Sequence, int]:
        """How much of the prompts that have been begun the step takes on."""
        lengths: dict[Sequence, int] = {}
        budget = self.prefill_tokens
        for sequence in self.running:
            length = min(budget, sequence.prompt_length - sequence.computed)
            if length > 0:
                lengths[sequence] = length
                budget -= length
        return lengths

    def _make_room(self, lengths: dict[Sequence, int]) -> list[Moved]:
        """Pages for what every running sequence adds; those that came last make room."""
        set_aside: list[Moved] = []
        for sequence in list(self.running):
            added = 1 if sequence.is_prefilled else lengths.get(sequence, 0)
            if sequence.aside or not added:
                continue
            self.pages.trim(sequence, sequence.computed)
            tokens = sequence.computed + added
            while not (sequence.aside or self.pages.fit(self.pages.missing(sequence, tokens))):
                last = self.running[-1]
                set_aside.append(self._set_aside(last))
                lengths.pop(last, None)
            if not sequence.aside:
                self.pages.extend(sequence, tokens)
        return set_aside

    def _set_aside(self, sequence: Sequence) -> Moved:
        moved = Moved(sequence.number, sequence.frozen_tables)
        self.pages.release(sequence)
        sequence.aside = True
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return moved

    def _admit(self, lengths: dict[Sequence, int]) -> list[Moved]:
        """Take in what there is room for, in the order of arrival."""
        put_back: list[Moved] = []
        budget = self.prefill_tokens - sum(lengths.values())
        while self.waiting and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            if sequence.aside:
                moved = self._come_back(sequence)
                if moved is None:
                    break
                put_back.append(moved)
            else:
                begun = self._begin(sequence, budget, alone=not lengths)
                if not begun:
                    break
                lengths[sequence] = begun
                budget -= begun
            self.running.append(self.waiting.popleft())
        return put_back

    def _come_back(self, sequence: Sequence) -> Moved | None:
        """From host memory, where there is room for its pages and the next token."""
        tokens = sequence.computed + (1 if sequence.is_prefilled else 0)
        missing = self.pages.missing(sequence, tokens)
        needed = [a + b for a, b in zip(missing, self.pages.held(sequence), strict=True)]
        if not self.pages.fit(needed, self._spare):
            return None
        self.pages.replace(sequence)
        sequence.aside = False
        moved = Moved(sequence.number, sequence.frozen_tables)
        self.pages.extend(sequence, tokens)
        return moved

    def _begin(self, sequence: Sequence, budget: int, alone: bool) -> int:
        """How many tokens of a new prompt the step takes on; 0: it has to wait.

        ``alone``: nothing else is being prefilled, so a prompt that cannot be cut may be longer
        than the budget.
        """
        scored = sequence.request.sampling.prompt_logprobs is not None
        if self.reuses and not scored:
            sequence.computed = self.pages.reuse(sequence)
        left = sequence.prompt_length - sequence.computed
        length = min(left, budget) if self.cuts_prompts else left
        fits = 0 < length <= budget or (alone and not self.cuts_prompts)
        missing = self.pages.missing(sequence, sequence.prompt_length)
        if not (fits and self.pages.fit(missing, self._spare)):
            self.pages.release(sequence)
            sequence.tables = [[] for _ in self.pages.groups]
            sequence.computed = 0
            return 0
        self.reused_tokens += sequence.computed
        self.pages.extend(sequence, sequence.computed + length)
        return length

    @property
    def _spare(self) -> int:
        """Pages left over beside what a newcomer needs, so that others can grow a little."""
        return 1 if self.running else 0

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        start, end = sequence.computed, sequence.computed + length
        scored = sequence.request.sampling.prompt_logprobs
        is_last = end == sequence.prompt_length
        following = None if is_last or scored is None else sequence.tokens[end]
        tokens = tuple(sequence.tokens[start:end])
        tables = sequence.frozen_tables
        return Chunk(sequence.number, tokens, start, tables, self.mode, is_last, scored, following)


def _new_token(sequence: Sequence) -> NewToken:
    tables = sequence.frozen_tables
    return NewToken(sequence.number, sequence.tokens[-1], sequence.computed, tables)
