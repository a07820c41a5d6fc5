"""Settings of the network: shape, who reads whose keys and values, how it is spread."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from megatron_kvshare.config.fields.types import (
    SCHEMA,
    Count,
    Index,
    Layers,
    Minutes,
    NonNegative,
    Positive,
    dataclass,
)
from megatron_kvshare.sharing.solver import current_name


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ModelConfig:
    """Model: a Llama-shaped decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases)."""

    num_layers: Layers = 22
    """Number of decoder layers."""
    hidden_size: Count = 2048
    """Width of the hidden states."""
    ffn_hidden_size: Count | None = None
    """Width of the SwiGLU feed-forward; left out: 8/3 of --hidden-size, up to a multiple of 256
    (2048 gives 5632)."""
    num_attention_heads: Count = 32
    """Number of query heads."""
    num_query_groups: Count | None = None
    """Number of KV heads (grouped-query attention; 1 is multi-query); left out: one per query
    head."""
    kv_channels: Count | None = None
    """Width of one attention head; left out: --hidden-size / --num-attention-heads."""
    seq_length: Count = 2048
    """Tokens per training sequence."""
    max_position_embeddings: Count | None = None
    """Longest sequence the model is declared for; left out: --seq-length."""
    norm_epsilon: Positive = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: Positive = 10000.0
    """Base (theta) of the rotary embedding; Llama 3 uses 500000."""
    use_rope_scaling: bool = False
    """Stretch the rotary frequencies as Llama 3.1 does: --rope-scaling-type llama3."""
    rope_scaling_type: Literal["llama3", "linear", "dynamic", "yarn"] | None = None
    """How the rotary frequencies are stretched, by transformers' names: long wavelengths (llama3,
    yarn), all of them (linear), or all in texts longer than --max-position-embeddings (dynamic)."""
    rope_scaling_factor: Positive = 8.0
    """RoPE scaling: by how much wavelengths are stretched."""
    rope_low_freq_factor: Positive = 1.0
    """Llama 3 RoPE scaling: wavelengths above the original length / this factor are stretched
    fully."""
    rope_high_freq_factor: Positive = 4.0
    """Llama 3 RoPE scaling: wavelengths below the original length / this factor stay as they
    are."""
    rope_original_max_positions: Count = 8192
    """RoPE scaling of llama3 and yarn: the sequence length before stretching."""
    yarn_beta_fast: Positive = 32.0
    """YaRN: wavelengths that turn more often than this in the original length stay as they are."""
    yarn_beta_slow: Positive = 1.0
    """YaRN: wavelengths that turn less often than this in the original length are stretched
    fully."""
    yarn_mscale: NonNegative | None = None
    """YaRN: with --yarn-mscale-all-dim, what the logarithm of the factor is multiplied by in the
    scale of queries and keys; left out: 1 (and 0 for the other)."""
    yarn_mscale_all_dim: NonNegative | None = None
    """YaRN: the same in what that scale is divided by."""
    yarn_attention_factor: NonNegative | None = None
    """YaRN: the scale of queries and keys itself; left out: follows from factor and mscale."""
    yarn_correction_range_round_to_int: bool = True
    """YaRN: round the range in which wavelengths are stretched in part to whole dimensions."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output head weights of its own instead of the embedding's."""
    init_method_std: NonNegative = 0.02
    """Standard deviation of the initial weights."""
    vocab_size: Count | None = None
    """True vocabulary size; left out: taken from the tokenizer. Padding happens in memory only."""
    make_vocab_size_divisible_by: Count = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layers: megatron-core's own with torch SDPA, or Transformer Engine's when it is installed."""
    compile: bool = True
    """On GPUs, run norms, SwiGLU, rotation and the attention of token subsets as kernels that
    torch.compile makes. A run checks them at its start; those that are wrong are left out, with a
    warning. On a CPU nothing is compiled."""
    flex_attention: bool = True
    """Of these, the attention of token subsets: FlexAttention in place of one flash attention for
    each block of keys."""
    bf16: bool = False
    """Train in bfloat16 with fp32 master weights; left out: fp32."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Save memory by recomputing in backward: whole layers (full) or core attention only
    (selective)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full: recompute all layers in chunks (uniform) or only the first ones (block); left out:
    uniform."""
    recompute_num_layers: Count | None = None
    """uniform: layers per chunk; block: how many layers to recompute; left out: 1 and all."""

    def __post_init__(self) -> None:
        """Fill in the one default that follows from another field, so that readers meet a
        number."""
        if self.ffn_hidden_size is None:
            width = -(-8 * self.hidden_size // (3 * 256)) * 256
            object.__setattr__(self, "ffn_hidden_size", width)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of KV heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def rope_scaling(self) -> str | None:
        """Kind of rotary scaling, by either of the two flags."""
        return self.rope_scaling_type or ("llama3" if self.use_rope_scaling else None)

    @property
    def max_positions(self) -> int:
        """Longest sequence the model is declared for, in tokens."""
        return self.max_position_embeddings or self.seq_length

    def padded_vocab_size(self, tensor_parallel: int = 1, vocab_size: int | None = None) -> int:
        """Rows of the embedding in memory: padded so that every rank gets an equal part.

        Args:
            tensor_parallel: tensor-parallel size.
            vocab_size: true size; defaults to the configured one.

        Raises:
            ValueError: if neither the argument nor the configuration gives a size.
        """
        size = vocab_size if vocab_size is not None else self.vocab_size
        if size is None:
            raise ValueError("the vocabulary size is not known yet: pass it or set vocab_size")
        multiple = self.make_vocab_size_divisible_by * tensor_parallel
        return -(-size // multiple) * multiple


RecipeName = Annotated[Literal["one-sweep", "two-sweep", "paper"], BeforeValidator(current_name)]
"""A name of :data:`RECIPES`; the earlier ones become today's."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class SharingConfig:
    """KV sharing: which layer's keys and values each layer reads, and how cyclic maps are
    iterated."""

    kv_pattern: str = "standard"
    """Named map, for example standard, sandwich-top, pizza-bottom, lasagna-middle, cla:2, yoco,
    lckv:2, gemma:10; `kvshare plan --help` lists them all."""
    kv_layers: Count | None = None
    """Number of layers that own their keys and values, for the named maps that take it."""
    kv_map: str | None = None
    """Explicit map instead of a named one: per layer the layer it reads, joined by _, suffix s for
    a sliding window, as in 0_1s_1s_3."""
    window_size: Count | None = None
    """Sliding-window width in tokens for the layers marked s; the token itself counts."""
    kv_recipe: RecipeName | None = None
    """How cyclic maps are computed, by name: one-sweep is strided(4;0,1) from input, two-sweep
    strided(4;1,1) with projection at use, paper jacobi(7,2); the next six flags change single parts
    of it. The earlier names cheapest (one-sweep) and fast (two-sweep) are still taken. Left out:
    the checkpoint's with --resume auto and --load, else two-sweep; but paper with
    --kv-forward-sweeps, --kv-backward-sweeps or --kv-solver jacobi."""
    kv_solver: Literal["jacobi", "strided"] | None = None
    """jacobi: every token reads the sweep before; strided: a sweep visits interleaved token subsets
    one after another, and each reads what the earlier ones have refreshed."""
    kv_stride: Count | None = None
    """strided: number of token subsets; left out: 4."""
    kv_forward_sweeps: Index | None = None
    """Sweeps without gradient over each cyclic group (m); left out: the recipe's. The earlier names
    of this and the next flag, --kv-min-sweeps and --kv-max-sweeps, which end in -passes, are still
    taken."""
    kv_backward_sweeps: Count | None = None
    """Sweeps with gradient over each cyclic group (b); left out: the recipe's."""
    kv_start: Literal["zero", "input", "self"] | None = None
    """What the first sweep reads: nothing (zero), the target's K and V projections of the group's
    input (input), or those of every layer's own input in one more parallel sweep (self)."""
    kv_project_at_use: bool = False
    """Carry the target's input, not its K and V, out of the sweeps without gradient, and project
    it with gradient where it is read."""
    kv_tolerance: Positive | None = None
    """Evaluation: repeat sweeps without gradient until the shared KV move by at most this
    (relative); left out: as many sweeps as in training."""
    kv_min_sweeps: Index = 1
    """With --kv-tolerance: at least this many sweeps without gradient."""
    kv_max_sweeps: Count = 16
    """With --kv-tolerance: at most this many sweeps without gradient."""
    kv_tolerance_in_training: bool = False
    """Use --kv-tolerance in training too."""
    kv_gap_iters: Index = 1
    """Global batches of every evaluation that are also evaluated exactly, as decoding computes
    them; the difference of the losses is logged. 0 turns it off."""
    kv_gap_warning: Positive = 0.01
    """Warn when exact and iterated loss differ by more than this."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ParallelConfig:
    """Parallelism: how the model and the batch are spread over processes."""

    tensor_model_parallel_size: Count = 1
    """Processes that share each layer's weights."""
    pipeline_model_parallel_size: Count = 1
    """Processes that each hold some of the layers, one after another."""
    num_layers_per_virtual_pipeline_stage: Count | None = None
    """Cut each pipeline process's layers into virtual stages of this many layers (interleaved
    schedule: smaller bubbles, more messages)."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of every stage: 8,8,7,7 or Megatron's Et*8|t*8|t*7|t*7L; left out: evenly many."""
    account_for_embedding_in_pipeline_split: bool = False
    """In an even layout, the embedding takes the place of one layer."""
    account_for_loss_in_pipeline_split: bool = False
    """In an even layout, the output head takes the place of one layer."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel processes."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while forward already runs (needs --use-distributed-optimizer)."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; auto is nccl with GPUs and gloo without."""
    distributed_timeout_minutes: Minutes = 10
    """How long nothing may move before the run is given up, with a report of what every rank does
    and exit code 69."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
