"""The tensors of a model (L1, no torch): names, true shapes, order.

The one declarative map of parameters. The names are those of Hugging Face's Llama and of files
on disk alike; the model's own fused and split parameters are described by it
(:mod:`megatron_kvshare.model.parameters`), and conversions in both directions follow it.
"""

from __future__ import annotations

from megatron_kvshare.sharing.cost import ModelShape
from megatron_kvshare.sharing.map import SharingMap

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
Shape = tuple[int, ...]


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def weight_shapes(shape: ModelShape, map: SharingMap) -> dict[str, Shape]:
    """Every tensor by its name; consumers have no key and value projections, a tied head none."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    shapes: dict[str, Shape] = {EMBEDDING: vocabulary}
    for layer in range(map.num_layers):
        parts = layer_shapes(shape, map.is_producer(layer))
        shapes |= {layer_prefix(layer) + name: part for name, part in parts.items()}
    shapes[FINAL_NORM] = (shape.hidden_size,)
    if not shape.tied_embeddings:
        shapes[HEAD] = vocabulary
    return shapes


def layer_shapes(shape: ModelShape, is_producer: bool) -> dict[str, Shape]:
    """The tensors of one layer: ``[out, in]``, as torch's linear layers keep them."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    kv = (shape.kv_width, hidden)
    own = {"self_attn.k_proj.weight": kv, "self_attn.v_proj.weight": kv} if is_producer else {}
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (shape.query_width, hidden),
        **own,
        "self_attn.o_proj.weight": (hidden, shape.query_width),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
