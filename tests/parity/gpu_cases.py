"""Cases that reach every route of attention on a GPU: each pair of settings is in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model import context
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES, solver_plan
from tests.maps import NINE
from tests.product import Tiny, load_by_name, loss_and_gradients, random_tokens

LAYERS, KV_LAYERS, HIDDEN, STRIDE = 5, 3, 64, 4
ROUTES = ("blocks", "mixed", "masks")
"""How a strided sweep's subsets are read; mixed: the last is one token too short for blocks."""
MASKED = ("packed", "window")
"""These always take masks, at any length."""
RECOMPUTE = {
    "recompute-full": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "recompute-selective": {"recompute_granularity": "selective"},
}
CHOICES: dict[str, Sequence[Any]] = {
    "route": ROUTES,
    "pattern": NINE,
    "recipe": tuple(RECIPES),
    "feature": ("plain", *MASKED, *RECOMPUTE),
    "head_dim": (64, 128),
    "queries_per_kv": (1, 2),
}


@dataclass(frozen=True)
class Case:
    """One model and how it is computed."""

    route: str
    pattern: str
    recipe: str
    feature: str
    head_dim: int
    queries_per_kv: int

    def __str__(self) -> str:
        heads = f"d{self.head_dim}-{self.queries_per_kv}to1"
        return f"{self.route}-{self.pattern}-{self.recipe}-{self.feature}-{heads}"

    @property
    def length(self) -> int:
        """Tokens; 2048 for blocks, as far as nobody has moved the threshold."""
        enough = STRIDE * context.BLOCKWISE_FROM
        return {"blocks": enough, "mixed": enough - 1, "masks": enough // 2}[self.route]

    @property
    def sharing(self) -> SharingMap:
        sharing = build_map(LAYERS, self.pattern, KV_LAYERS)
        if self.feature != "window":
            return sharing
        return replace(sharing, windowed=tuple(layer % 2 == 1 for layer in range(LAYERS)))

    @property
    def reads_blocks(self) -> bool:
        """Whether some subset reads keys block by block where a kernel can."""
        return self.sharing.is_cyclic and self.recipe != "paper" and self.route != "masks"

    @property
    def tiny(self) -> Tiny:
        window = self.length // 3 if self.feature == "window" else None
        extra = {"kv_channels": self.head_dim, **RECOMPUTE.get(self.feature, {})}
        kv_heads = 2 // self.queries_per_kv
        return Tiny(hidden=HIDDEN, ffn=96, heads=2, kv_heads=kv_heads, window=window, extra=extra)

    def documents(self) -> Tensor | None:
        """[1, s]: documents that begin anywhere, one of a single token."""
        if self.feature != "packed":
            return None
        starts = torch.tensor([0, self.length // 3, self.length // 3 + 1, self.length - 7])
        return (torch.arange(self.length)[:, None] >= starts).sum(1)[None] - 1


def possible_cases() -> Iterator[Case]:
    """All combinations but those in which something that takes masks anyway reads blocks."""
    for values in itertools.product(*CHOICES.values()):
        case = Case(*values)
        if case.route == "masks" or case.feature not in MASKED:
            yield case


def pairs_of(case: Case) -> frozenset[Any]:
    """Every two settings of a case, as ((name, value), (name, value))."""
    return frozenset(itertools.combinations([(name, getattr(case, name)) for name in CHOICES], 2))


def pairwise() -> tuple[Case, ...]:
    """Few cases that hold every pair any case can hold: again and again the one with most new ones.

    allpairspy leaves pairs out where combinations are excluded.
    """
    pairs = {case: pairs_of(case) for case in possible_cases()}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return tuple(chosen)


CASES = pairwise()


@dataclass(frozen=True)
class Computed:
    """Logits [1, s, vocabulary], mean loss, gradients by name; all on the CPU, in fp32 or bf16."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def compute(
    state: ParallelState,
    case: Case,
    bf16: bool,
    masks_only: bool = False,
    compiled: bool = False,
) -> Computed:
    """Forward and backward of `case`, its weights rounded to bf16 in either precision.

    `masks_only`: every attention takes a mask, as that of packed documents does: the whole text is
    declared to be one document. `compiled`: by the kernels that a run on a GPU compiles.
    """
    tiny, sharing = case.tiny, case.sharing
    model = tiny.but(extra={**tiny.extra, "bf16": bf16, "compile": compiled}).model(sharing, state)
    model.plan = solver_plan(sharing, RECIPES[case.recipe])
    weights = {name: weight.bfloat16() for name, weight in tiny.weights(sharing).items()}
    load_by_name(model, weights if bf16 else {n: w.float() for n, w in weights.items()})
    tokens, labels = (random_tokens(tiny.vocabulary, 1, case.length, seed) for seed in (0, 1))
    documents = case.documents()
    if masks_only and documents is None:
        documents = torch.zeros_like(tokens)
    there = None if documents is None else documents.to(state.platform.device)
    with torch.no_grad():
        logits = model(tokens.to(state.platform.device), document_ids=there).value
    loss, gradients = loss_and_gradients(model, state, tokens, labels, document_ids=documents)
    return Computed(logits[..., : tiny.vocabulary].float().cpu(), loss.float(), gradients)


def compute_in_fp32(state: ParallelState, _layout: Any, case: Case) -> Computed:
    """A job for a worker of `tests.distributed.world`."""
    return compute(state, case, bf16=False, masks_only=True)
