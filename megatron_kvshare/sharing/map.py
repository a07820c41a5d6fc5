"""The sharing map: which layer's keys and values every layer reads (no torch).

Everything else (attention masks, sweep plans, costs, checkpoint names, caches) asks this object.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_kvshare.errors import Fault, MapError

_ENTRY = re.compile(r"([0-9]{1,9})(s?)")


@dataclass(frozen=True)
class SharingMap:
    """Layer ``i`` pairs its queries with the keys and values of layer ``sources[i]`` (0-based).

    A layer with ``sources[i] == i`` is a producer (it owns ``W_K`` and ``W_V`` and has a KV
    cache); every other layer is a consumer. A layer with ``sources[i] > i`` is *upward*: the KV of
    the current token does not exist yet when it runs, so its mask is strictly causal.
    ``windowed[i]`` marks sliding-window attention.

    Raises :class:`MapError`, with all faults at once, when a target is out of range or is itself a
    consumer. Source: "A Systematic Study of Cross-Layer KV Sharing" (arXiv 2410.14442), section 3;
    the notation is the ``layer_types`` field of published LCKV checkpoints.
    """

    sources: tuple[int, ...]
    windowed: tuple[bool, ...]

    def __post_init__(self) -> None:
        faults = _source_faults(self.sources)
        if len(self.windowed) != len(self.sources):
            faults.append(
                Fault(
                    "windowed",
                    len(self.windowed),
                    f"one entry per layer is needed, the map has {len(self.sources)} layers",
                    "give as many window marks as sources",
                )
            )
        if faults:
            raise MapError(faults)

    @classmethod
    def parse(cls, notation: str) -> SharingMap:
        """Read ``"0_1s_1s"``: a target per layer joined with ``_``; ``s`` = sliding window."""
        matches = [_ENTRY.fullmatch(entry) for entry in notation.strip().split("_")]
        faults = [
            Fault(
                f"layer {layer} of the map",
                notation.strip().split("_")[layer],
                "an entry is a 0-based layer number, optionally followed by 's' (sliding window)",
                "write one entry per layer joined with '_', for example 0_1s_1s_3",
            )
            for layer, match in enumerate(matches)
            if match is None
        ]
        sources = [None if match is None else int(match[1]) for match in matches]
        if faults:
            raise MapError([*faults, *_source_faults(sources)])
        windowed = tuple(match is not None and match[2] == "s" for match in matches)
        return cls(tuple(source for source in sources if source is not None), windowed)

    @property
    def num_layers(self) -> int:
        return len(self.sources)

    @cached_property
    def producers(self) -> tuple[int, ...]:
        """Layers that own keys and values, in ascending order."""
        return tuple(layer for layer, source in enumerate(self.sources) if source == layer)

    def is_producer(self, layer: int) -> bool:
        return self.sources[layer] == layer

    def is_upward(self, layer: int) -> bool:
        return self.sources[layer] > layer

    def consumers_of(self, layer: int) -> tuple[int, ...]:
        """The other layers that read the keys and values of ``layer``."""
        return tuple(
            reader for reader, source in enumerate(self.sources) if source == layer != reader
        )

    @property
    def is_cyclic(self) -> bool:
        return bool(self.cyclic_groups)

    @cached_property
    def cyclic_groups(self) -> tuple[tuple[int, int], ...]:
        """The ``(first, last)`` intervals to iterate over: inclusive, disjoint, ascending.

        A group starts at the first upward layer not in an earlier group and reaches up to the
        highest target of any layer inside it.
        """
        groups: list[tuple[int, int]] = []
        layer = 0
        while layer < self.num_layers:
            if self.is_upward(layer):
                groups.append((layer, self._group_top(layer)))
                layer = groups[-1][1]
            layer += 1
        return tuple(groups)

    def _group_top(self, first: int) -> int:
        top, layer = self.sources[first], first
        while layer <= top:
            top = max(top, self.sources[layer])
            layer += 1
        return top

    @property
    def notation(self) -> str:
        """The explicit string that :meth:`parse` reads back."""
        marks = zip(self.sources, self.windowed, strict=True)
        return "_".join(f"{source}{'s' if windowed else ''}" for source, windowed in marks)

    def __str__(self) -> str:
        return self.notation


def _source_faults(sources: Sequence[int | None]) -> list[Fault]:
    """Rules of the method for every known entry; ``None`` = an entry that could not be read."""
    if not sources:
        return [Fault("the map", "", "a map has at least one layer", "give one entry per layer")]
    faults = []
    for layer, source in enumerate(sources):
        if source is None:
            continue
        where = f"layer {layer} of the map"
        if not 0 <= source < len(sources):
            rule = f"the target must be a layer of the model, 0 to {len(sources) - 1}"
            faults.append(Fault(where, source, rule, f"use {layer} (own KV) or another such layer"))
            continue
        target = sources[source]
        if target is not None and target != source:
            rule = f"a target must be a KV layer, but layer {source} itself reads layer {target}"
            fix = f"set layer {source} to {source} (own KV), or point layer {layer} at a KV layer"
            faults.append(Fault(where, source, rule, fix))
    return faults
