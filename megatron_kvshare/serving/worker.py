"""Carries out steps of the engine: the model, its cache, and nothing that decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from megatron_kvshare.kernels.paged_attention import (
    PageList,
    PageRows,
    PageTable,
    has_paged_kernel,
)
from megatron_kvshare.megatron_api.layers import gather_last_dim
from megatron_kvshare.model.block import StageTensors
from megatron_kvshare.model.context import Past, SequenceContexts, sequence_contexts
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.model.kv import KV
from megatron_kvshare.model.paged_view import PagedView, Place
from megatron_kvshare.model.visibility import SequenceLayout
from megatron_kvshare.serving.cache import PagedCache
from megatron_kvshare.serving.graphs import DecodeGraphs, DecodeInputs, Record
from megatron_kvshare.serving.pages import DROPPED
from megatron_kvshare.serving.prefill_plan import prefill_plan
from megatron_kvshare.serving.request import TokenLogprob
from megatron_kvshare.serving.sampling import token_logprobs
from megatron_kvshare.serving.step import Chunk, NewToken, Step
from megatron_kvshare.sharing.plan import ExecutionPlan

_NOWHERE = 1 << 40
"""Position of a page that nobody reads: beyond every limit."""
_SCORED_AT_A_TIME = 256
_MOST_UNUSED = 0.25
"""Share of pages between the lowest and the highest in use that may be read for nothing: to copy
those in use costs three times their bytes."""


class StepResult(NamedTuple):
    """``logits`` fp32 ``[n, vocab]`` of the ``sequences`` whose next token is to be drawn;
    ``scored``: what was asked of the tokens of prompts, by sequence."""

    sequences: tuple[int, ...]
    logits: torch.Tensor
    scored: dict[int, list[TokenLogprob]]


class Worker:
    """One tensor-parallel rank. All ranks run the same steps. ``graphs``: what decodes in place of
    one kernel after another, or None."""

    graphs: DecodeGraphs | None = None

    def __init__(self, model: KVShareGPT, cache: PagedCache) -> None:
        self.model = model
        self.spec = model.spec
        self.cache = cache
        self.device = next(model.parameters()).device
        self.dtype = model.config.params_dtype
        self.follows_table = has_paged_kernel(self.device, self.dtype, self.spec.model.head_dim)
        self._aside: dict[int, list[torch.Tensor]] = {}
        self._tables: tuple[PageTable, ...] = ()

    def record_graphs(self, most: int, length: int, record: Record | None = None) -> None:
        """Decode batches of up to ``most`` sequences of ``length`` by graphs from now on."""
        size = self.cache.layout.page_size
        widths = tuple(-(-length // size) for _ in self.cache.layout.groups)
        self.graphs = DecodeGraphs(self._decode, most, widths, record)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        for moved in step.set_aside:
            self._aside[moved.sequence] = self.cache.set_aside(moved.tables)
        for moved in step.put_back:
            self.cache.put_back(moved.tables, self._aside.pop(moved.sequence))
        for sequence in step.forgotten:
            self._aside.pop(sequence, None)
        sequences: list[int] = []
        logits: list[torch.Tensor] = []
        scored: dict[int, list[TokenLogprob]] = {}
        for chunks in _alike(step.chunks):
            if chunks[0].scored is not None:
                last, scored[chunks[0].sequence] = self.score(chunks[0])
            else:
                last = self.prefill(chunks)
            if last is not None:
                sequences += [chunk.sequence for chunk in chunks]
                logits.append(last)
        if step.tokens:
            sequences += [token.sequence for token in step.tokens]
            logits.append(self.decode(step.tokens, step.same_tables))
        rows = torch.cat(logits) if logits else torch.empty(0, self.spec.vocab_size)
        return StepResult(tuple(sequences), rows, scored)

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """Keys and values of chunks of one length, that have no past or are alone; logits ``[b,
        vocab]`` after their last tokens, None where a prompt goes on."""
        first = chunks[0]
        tokens = len(first.tokens)
        plan = prefill_plan(self.spec, first.mode, tokens, self._bf16)
        ids = torch.tensor([chunk.tokens for chunk in chunks], device=self.device)
        hidden = self._run(ids, chunks, self._contexts(first), plan.whole)
        if not first.is_last:
            return None
        hidden = hidden[-1:]
        if plan.tail < self.spec.map.num_layers:
            tables = tuple(self._page_table(group) for group in _by_group(chunks))
            view = self._view(self._inputs(ids[:, -1:], chunks, tables))
            hidden = self._run_layers(hidden, view, plan.tail, plan.tail_kv_given)
        return self._logits(hidden)[:, 0]

    def score(self, chunk: Chunk) -> tuple[torch.Tensor | None, list[TokenLogprob]]:
        """The same for one chunk, with the log-probability of each token that follows one of it."""
        assert chunk.scored is not None
        tokens = len(chunk.tokens)
        plan = prefill_plan(self.spec, chunk.mode, tokens, self._bf16, every_token=True)
        ids = torch.tensor([chunk.tokens], device=self.device)
        hidden = self._run(ids, (chunk,), self._contexts(chunk), plan.whole)
        following = [*chunk.tokens[1:], *([] if chunk.following is None else [chunk.following])]
        scores: list[TokenLogprob] = []
        last = None
        for start in range(0, tokens, _SCORED_AT_A_TIME):
            logits = self._logits(hidden[start : start + _SCORED_AT_A_TIME])[0]
            targets = following[start : start + len(logits)]
            scores += token_logprobs(logits[: len(targets)], targets, chunk.scored)
            last = logits[-1:]
        return (last if chunk.is_last else None), scores

    def decode(self, tokens: Sequence[NewToken], same_tables: bool) -> torch.Tensor:
        """Logits ``[b, vocab]`` after one more token of each sequence."""
        if not (same_tables and self._tables):
            self._tables = tuple(self._page_table(group) for group in _by_group(tokens))
        ids = torch.tensor([[token.token] for token in tokens], device=self.device)
        inputs = self._inputs(ids, tokens, self._tables)
        return self._decode(inputs) if self.graphs is None else self.graphs(inputs)

    def _decode(self, inputs: DecodeInputs) -> torch.Tensor:
        hidden = self._run_layers(self._embed(inputs.ids), self._view(inputs), 0, False)
        return self._logits(hidden)[:, 0]

    @property
    def _bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.model.embedding is not None
        hidden: torch.Tensor = self.model.embedding(ids)
        return hidden

    def _contexts(self, chunk: Chunk) -> SequenceContexts:
        past = None
        if chunk.start:
            kv = {
                producer: self.cache.read(producer, chunk.tables, chunk.start)
                for producer in self.spec.map.producers
            }
            past = Past(chunk.start, kv)
        layout = SequenceLayout(len(chunk.tokens), self.device, self.dtype)
        return sequence_contexts(self.spec, layout, None, past)

    def _run(
        self,
        ids: torch.Tensor,
        chunks: Sequence[Chunk],
        contexts: SequenceContexts,
        plan: ExecutionPlan,
    ) -> torch.Tensor:
        """Hidden states ``[s, b, h]`` after ``plan``, whose keys and values are written."""
        entering = StageTensors(self._embed(ids), {})
        leaving = self.model.decoder(entering, contexts, plan, keep_kv=True).leaving
        for producer, kv in leaving.kv.items():
            for number, chunk in enumerate(chunks):
                own = KV(*(x[:, number] for x in kv))
                self.cache.write(producer, chunk.tables, chunk.start, own)
        return leaving.hidden

    def _run_layers(
        self, hidden: torch.Tensor, view: PagedView, first: int, kv_given: bool
    ) -> torch.Tensor:
        """One token of each sequence, ``[1, b, h]``, through the layers from ``first`` on."""
        layers = self.model.decoder.layers[first:]
        if kv_given:
            hidden, layers = layers[0].read_own(hidden, view), layers[1:]
        for layer in layers:
            hidden, view = layer(hidden, view)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, h]`` -> fp32 ``[b, s, vocab]`` of the true vocabulary, on every rank."""
        logits = self.model.logits(hidden)
        if self.model.heads.tp_size > 1:
            logits = gather_last_dim(logits)
        return logits[..., : self.spec.vocab_size]

    def _inputs(
        self,
        ids: torch.Tensor,
        tokens: Sequence[NewToken | Chunk],
        tables: tuple[PageTable, ...],
    ) -> DecodeInputs:
        """For the last token of each sequence."""
        size = self.cache.layout.page_size
        last = [_last_position(token) for token in tokens]
        written = [
            [table[position // size] for table, position in zip(group, last, strict=True)]
            for group in _by_group(tokens)
        ]
        positions = torch.tensor(last, device=self.device)
        pages = tuple(torch.tensor(group, device=self.device) for group in written)
        return DecodeInputs(ids, positions, positions % size, pages, tables)

    def _view(self, inputs: DecodeInputs) -> PagedView:
        places = [
            Place(page, inputs.slots, table)
            for page, table in zip(inputs.pages, inputs.tables, strict=True)
        ]
        of_producer = {p: places[number] for p, number in self.cache.group_of.items()}
        pools = self.cache.pools
        return PagedView.of(self.spec, pools, of_producer, inputs.positions, self.dtype)

    def _page_table(self, tables: Sequence[tuple[int, ...]]) -> PageTable:
        """Of one group of the cache, the pages of a batch."""
        if self.follows_table:
            most = max(map(len, tables))
            rows = [[max(x, 0) for x in pages] + [0] * (most - len(pages)) for pages in tables]
            return PageRows(torch.tensor(rows, dtype=torch.int32, device=self.device))
        size = self.cache.layout.page_size
        held = [
            (page, owner, index * size)
            for owner, pages in enumerate(tables)
            for index, page in enumerate(pages)
            if page != DROPPED
        ]
        ids = [page for page, _, _ in held]
        low, high = min(ids), max(ids) + 1
        shared = len(set(ids)) < len(ids)
        if shared or high - low > (1 + _MOST_UNUSED) * len(ids) + 1:
            of_pages, owner, first = (
                torch.tensor(x, device=self.device) for x in zip(*held, strict=True)
            )
            return PageList(of_pages, owner, first)
        owner = torch.zeros(high - low, dtype=torch.long)
        first = torch.full((high - low,), _NOWHERE)
        index = torch.tensor(ids) - low
        owner[index] = torch.tensor([x for _, x, _ in held])
        first[index] = torch.tensor([x for _, _, x in held])
        return PageList(slice(low, high), owner.to(self.device), first.to(self.device))


def _last_position(token: NewToken | Chunk) -> int:
    if isinstance(token, NewToken):
        return token.position
    return token.start + len(token.tokens) - 1


def _by_group(tokens: Sequence[NewToken | Chunk]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """For each group of the cache, the pages of every sequence."""
    return zip(*(token.tables for token in tokens), strict=True)


def _alike(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, ...]]:
    """Neighbours that one forward can take: whole prompts of one length."""

    def key(numbered: tuple[int, Chunk]) -> tuple[object, ...]:
        number, chunk = numbered
        is_whole = chunk.start == 0 and chunk.is_last and chunk.scored is None
        return (len(chunk.tokens), chunk.mode) if is_whole else (number,)

    for _, group in groupby(enumerate(chunks), key):
        yield tuple(chunk for _, chunk in group)
