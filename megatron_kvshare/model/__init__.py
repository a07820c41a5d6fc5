"""The decoder: Llama-shaped, with keys and values shared between layers as the sharing map
says.

It reads as single-device code: parallelism lives inside megatron-core's linear layers and in
:mod:`megatron_kvshare.megatron_api`. Shared keys and values are arguments and return values, never
module state.

Shape letters: ``s`` sequence, ``b`` batch, ``h`` hidden, ``n`` query heads, ``g`` KV heads (both of
this tensor-parallel rank), ``d`` head dimension.
"""

from megatron_kvshare.model.gpt import KVShareGPT, ModelOutput

__all__ = ["KVShareGPT", "ModelOutput"]
