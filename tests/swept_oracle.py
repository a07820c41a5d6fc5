"""The naive model of `tests/oracle.py`, its cyclic groups computed by any recipe.

Keys and values are kept per producer as one matrix over all tokens, with a flag for each token that
has any yet; a visit overwrites its rows. Nothing here knows of plans, modes or blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import KeyValue, Oracle, attend, defaults, visible


@dataclass(frozen=True)
class Way:
    """How a group is computed: subsets of tokens, sweeps without and with gradient, first reads."""

    stride: int
    without_gradient: int
    with_gradient: int
    start: str = "zero"
    project_at_use: bool = False


@dataclass
class Kept:
    """One producer's rows: keys, values, what entered the layer, and which of them exist."""

    keys: Tensor
    values: Tensor
    inputs: Tensor
    exist: Tensor

    def put(self, rows: Tensor, pair: KeyValue, entered: Tensor) -> Kept:
        exist = self.exist.clone()
        exist[rows] = True
        return Kept(
            self.keys.index_copy(0, rows, pair[0]),
            self.values.index_copy(0, rows, pair[1]),
            self.inputs.index_copy(0, rows, entered),
            exist,
        )


class SweptOracle(Oracle):
    """`logits` by a recipe instead of the published passes."""

    def swept(
        self,
        tokens: Tensor,
        way: Way,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary]."""
        documents, positions = defaults(tokens, documents, positions)
        rows = zip(tokens, documents, positions, strict=True)
        return torch.stack([self._swept_sequence(*row, way) for row in rows])

    def _swept_sequence(self, tokens, documents, positions, way: Way) -> Tensor:
        self.place = (documents.tolist(), positions)
        self.everyone = torch.arange(len(tokens))
        hidden = self.embed(tokens)
        kept: dict[int, Kept] = {}
        layer = 0
        while layer < self.num_layers:
            last = dict(self.groups).get(layer)
            if last is None:
                hidden = self._layer(layer, hidden, self.everyone, kept)
                layer += 1
            else:
                hidden = self._swept_group(range(layer, last + 1), hidden, kept, way)
                layer = last + 1
        return self.logits(hidden)

    def _swept_group(self, group: range, group_input: Tensor, kept, way: Way) -> Tensor:
        self._start(group, group_input, kept, way)
        hidden = group_input
        for sweep in range(way.without_gradient + way.with_gradient):
            gradient = sweep >= way.without_gradient
            with gradient_is(gradient):
                if way.project_at_use and sweep == way.without_gradient:
                    self._project_again(group, kept)
                hidden = self._sweep(group, group_input, kept, way.stride)
        return hidden

    def _sweep(self, group: range, group_input: Tensor, kept, stride: int) -> Tensor:
        """All subsets; the top layer, which nobody in the group waits for, reads everybody's KV."""
        *below, top = group
        entering_top = torch.zeros_like(group_input)
        for offset in range(stride):
            rows = self.everyone[offset::stride]
            hidden = group_input[rows]
            for layer in below:
                hidden = self._layer(layer, hidden, rows, kept)
            self._produce(top, hidden, rows, kept)
            entering_top = entering_top.index_copy(0, rows, hidden)
        return self._layer(top, entering_top, self.everyone, kept, produce=False)

    def _start(self, group: range, group_input: Tensor, kept, way: Way) -> None:
        producers = [layer for layer in group if self.sources[layer] == layer]
        if way.start == "input":
            with gradient_is(way.without_gradient == 0):
                for layer in producers:
                    self._produce(layer, group_input, self.everyone, kept)
        elif way.start == "self":
            with torch.no_grad():
                self._guess(group, group_input, kept)

    def _guess(self, group: range, hidden: Tensor, kept) -> None:
        """One parallel pass: an upward layer reads its target's projections of its own input."""
        for layer in group:
            source = self.sources[layer]
            if source > layer:
                own: dict[int, Kept] = {}
                self._produce(source, hidden, self.everyone, own)
                hidden = self._layer(layer, hidden, self.everyone, own)
            else:
                hidden = self._layer(layer, hidden, self.everyone, kept)

    def _project_again(self, group: range, kept) -> None:
        for layer in [layer for layer in group if layer in kept]:
            entered = kept[layer].inputs.detach()
            self._produce(layer, entered, self.everyone, kept)

    def _produce(self, layer: int, hidden: Tensor, rows: Tensor, kept) -> None:
        """Replace a producer's keys and values of some tokens."""
        normed = self.norm(hidden, self.weight("input_layernorm", layer))
        pair = self.keys_values(normed, layer, self.place[1][rows])
        if layer not in kept:
            tokens = len(self.everyone)
            empty = pair[0].new_zeros(tokens, *pair[0].shape[1:])
            inputs = hidden.new_zeros(tokens, hidden.shape[1])
            kept[layer] = Kept(empty, empty, inputs, torch.zeros(tokens, dtype=torch.bool))
        kept[layer] = kept[layer].put(rows, pair, hidden)

    def _layer(self, layer: int, hidden: Tensor, rows: Tensor, kept, produce=True) -> Tensor:
        """One layer for the tokens `rows`, which read whatever keys and values there are."""
        source = self.sources[layer]
        if source == layer and produce:
            self._produce(layer, hidden, rows, kept)
        if source in kept:
            may_see = visible(self.place[0], source > layer, self.window(layer))[rows]
            normed = self.norm(hidden, self.weight("input_layernorm", layer))
            queries = self.queries(normed, layer, self.place[1][rows])
            found = kept[source]
            attended = attend(queries, found.keys, found.values, may_see & found.exist)
            hidden = hidden + self.attention_output(attended, layer)
        return hidden + self.mlp(hidden, layer)


@contextmanager
def gradient_is(on: bool) -> Iterator[None]:
    """Never turns on what is off around it."""
    with torch.set_grad_enabled(on and torch.is_grad_enabled()):
        yield


def swept_loss_and_gradients(
    oracle: Oracle, tokens: Tensor, labels: Tensor, way: Way, **where: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy and its gradient for every weight, by name."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in oracle.weights.items()}
    model = SweptOracle(oracle.sources, oracle.windowed, oracle.shape, leaves)
    logits = model.swept(tokens, way, **where)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return loss.detach(), found
