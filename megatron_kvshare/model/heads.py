"""How query and KV heads are divided over the tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kvshare.config import ModelConfig
from megatron_kvshare.kernels.heads import Heads


@dataclass(frozen=True)
class HeadLayout:
    """Widths are in elements of the last dimension; ``local_`` ones belong to this rank."""

    query_heads: int
    kv_heads: int
    head_dim: int
    tp_rank: int
    tp_size: int

    @classmethod
    def of(cls, model: ModelConfig, tp_rank: int, tp_size: int) -> HeadLayout:
        return cls(model.num_attention_heads, model.query_groups, model.head_dim, tp_rank, tp_size)

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys (or the values) of all KV heads."""
        return self.kv_heads * self.head_dim

    @property
    def local_query_heads(self) -> int:
        return self.query_heads // self.tp_size

    @property
    def local_query_width(self) -> int:
        return self.query_width // self.tp_size

    @property
    def local_kv_width(self) -> int:
        return self.kv_width // self.tp_size

    @property
    def local_kv_heads(self) -> int:
        """KV heads this rank's queries read: at least one, shared with others when TP exceeds
        them."""
        return max(1, self.kv_heads // self.tp_size)

    @property
    def kv_heads_are_split(self) -> bool:
        """True with more ranks than KV heads: a rank's weights then make only part of a head."""
        return self.tp_size > self.kv_heads

    @property
    def kv_parts(self) -> tuple[Heads, Heads]:
        """Keys and values side by side, as this rank's queries read them."""
        return Heads(self.local_kv_heads, rotated=True), Heads(self.local_kv_heads, rotated=False)

    @property
    def kv_head_of_rank(self) -> int:
        """The one KV head this rank reads when there are more ranks than KV heads."""
        return self.tp_rank * self.kv_heads // self.tp_size
