"""Rules of the model: sizes, the sharing map, parallel layout.

Written against anything that has ``model``, ``sharing`` or ``parallel``, so that every subcommand
can use them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Protocol

from megatron_kvshare.config.derive import sharing_map
from megatron_kvshare.config.fields.model import ModelConfig, ParallelConfig, SharingConfig
from megatron_kvshare.config.flags.rule import divisor, multiples, rule
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.errors import Fault, MapError
from megatron_kvshare.rope import ROPE_SETTINGS
from megatron_kvshare.sharing import patterns


class HasModel(Protocol):
    """A configuration with a model."""

    @property
    def model(self) -> ModelConfig: ...


class HasSharing(HasModel, Protocol):
    """A configuration with a model and a sharing map."""

    @property
    def sharing(self) -> SharingConfig: ...


class HasParallel(HasModel, Protocol):
    """A configuration with a model and its parallel layout."""

    @property
    def parallel(self) -> ParallelConfig: ...


@rule("hidden_size num_attention_heads kv_channels")
def heads_fit(config: HasModel) -> Iterator[Fault]:
    """Heads cut the hidden size evenly, and rotary embeddings rotate pairs."""
    model = config.model
    heads = model.num_attention_heads
    if model.kv_channels is None and model.hidden_size % heads:
        yield Fault(
            "--hidden-size",
            model.hidden_size,
            f"without --kv-channels it must be divisible by --num-attention-heads {heads}",
            f"use --hidden-size {multiples(model.hidden_size, heads)}, "
            f"or --num-attention-heads {divisor(model.hidden_size, heads)}",
        )
    elif model.head_dim % 2:
        flag = "--kv-channels" if model.kv_channels else "--hidden-size"
        value = model.kv_channels or model.hidden_size
        step = 2 if model.kv_channels else 2 * heads
        rule_text = f"the head width {model.head_dim} must be even (rotary embeddings rotate pairs)"
        yield Fault(flag, value, rule_text, f"use {flag} {multiples(value, step)}")


@rule("num_attention_heads num_query_groups")
def groups_fit(config: HasModel) -> Iterator[Fault]:
    """Every KV head serves the same number of query heads."""
    heads, groups = config.model.num_attention_heads, config.model.query_groups
    if heads % groups:
        yield Fault(
            "--num-query-groups",
            groups,
            f"it must divide --num-attention-heads {heads}",
            f"use --num-query-groups {divisor(heads, groups)}",
        )


@rule("seq_length max_position_embeddings")
def positions_fit(config: HasModel) -> Iterator[Fault]:
    """The declared positions cover the training sequence."""
    model = config.model
    if model.seq_length > model.max_positions:
        yield Fault(
            "--max-position-embeddings",
            model.max_position_embeddings,
            f"it must be at least --seq-length {model.seq_length}",
            f"use --max-position-embeddings {model.seq_length} or leave it out",
        )


@rule("use_rope_scaling rope_scaling_type rope_low_freq_factor rope_high_freq_factor")
def rope_scaling_fits(config: HasModel) -> Iterator[Fault]:
    """One kind of scaling; the two wavelength limits of Llama 3's are in order."""
    model = config.model
    kind = model.rope_scaling_type
    if model.use_rope_scaling and kind not in (None, "llama3"):
        rule_text = "--use-rope-scaling asks for llama3"
        yield Fault("--rope-scaling-type", kind, rule_text, "drop one of the two")
    elif model.rope_scaling == "llama3" and (
        model.rope_low_freq_factor >= model.rope_high_freq_factor
    ):
        yield Fault(
            "--rope-low-freq-factor",
            model.rope_low_freq_factor,
            f"it must be below --rope-high-freq-factor {model.rope_high_freq_factor:g}",
            "use --rope-low-freq-factor 1 --rope-high-freq-factor 4 (Llama 3)",
        )


@rule(
    "rope_scaling_type rotary_base hidden_size num_attention_heads kv_channels yarn_beta_fast"
    " yarn_beta_slow yarn_mscale yarn_mscale_all_dim yarn_attention_factor"
    " yarn_correction_range_round_to_int"
)
def stretching_is_defined(config: HasModel) -> Iterator[Fault]:
    """Formulas of dynamic and yarn divide by what must not be zero; yarn's settings are its own."""
    model = config.model
    if model.rope_scaling == "dynamic" and model.head_dim <= 2:
        rule_text = "dynamic scaling needs heads wider than 2"
        yield Fault("--rope-scaling-type", "dynamic", rule_text, "use linear")
    if model.rope_scaling == "yarn":
        if model.yarn_beta_slow >= model.yarn_beta_fast:
            rule_text = f"it must be below --yarn-beta-fast {model.yarn_beta_fast:g}"
            yield Fault("--yarn-beta-slow", model.yarn_beta_slow, rule_text, "use 1 and 32")
        if model.rotary_base <= 1:
            rule_text = "yarn needs one above 1"
            yield Fault("--rotary-base", model.rotary_base, rule_text, "use 10000")
        return
    usual = {field.name: field.default for field in fields(ModelConfig)}
    for name in ROPE_SETTINGS["yarn"]:
        value = getattr(model, name)
        if name.startswith("yarn_") and value != usual[name]:
            rule_text = "it has a meaning with --rope-scaling-type yarn only"
            fix = f"add --rope-scaling-type yarn or drop {flag_of(name)}"
            yield Fault(flag_of(name), value, rule_text, fix)


@rule("recompute_granularity recompute_method recompute_num_layers num_layers")
def recompute_fits(config: HasModel) -> Iterator[Fault]:
    """Method and number of layers belong to full recompute."""
    model = config.model
    extras = {
        "--recompute-method": model.recompute_method,
        "--recompute-num-layers": model.recompute_num_layers,
    }
    if model.recompute_granularity != "full":
        for flag, value in extras.items():
            if value is not None:
                rule_text = "it has a meaning with --recompute-granularity full only"
                yield Fault(
                    flag, value, rule_text, f"add --recompute-granularity full or drop {flag}"
                )
    elif (model.recompute_num_layers or 0) > model.num_layers:
        rule_text = f"it must be at most --num-layers {model.num_layers}"
        fix = f"use --recompute-num-layers {model.num_layers} or less"
        yield Fault("--recompute-num-layers", model.recompute_num_layers, rule_text, fix)


@rule("transformer_impl")
def transformer_engine_is_there(config: HasModel) -> Iterator[Fault]:
    """Transformer Engine is optional and must be importable when asked for."""
    if config.model.transformer_impl == "transformer_engine" and not _importable(
        "transformer_engine"
    ):
        yield Fault(
            "--transformer-impl",
            "transformer_engine",
            "Transformer Engine is not installed here",
            "use --transformer-impl local, or pip install transformer-engine[pytorch]",
        )


@rule("num_layers kv_pattern kv_layers kv_map window_size")
def map_is_valid(config: HasSharing) -> Iterator[Fault]:
    """The map exists for this number of layers, and its windows have a size."""
    try:
        built = sharing_map(config.model, config.sharing)
    except MapError as error:
        yield from map(_at_flag, error.faults)
    else:
        yield from patterns.window_faults(built, config.sharing.window_size)


@rule(
    "num_attention_heads num_query_groups hidden_size kv_channels ffn_hidden_size"
    " tensor_model_parallel_size"
)
def tensor_parallel_fits(config: HasParallel) -> Iterator[Fault]:
    """Every rank gets the same number of heads and of feed-forward columns.

    KV heads may be fewer than ranks: then ranks share one, and its width must cut evenly.
    """
    model, size = config.model, config.parallel.tensor_model_parallel_size
    flag = "--tensor-model-parallel-size"
    heads, groups = model.num_attention_heads, model.query_groups
    width = groups * model.head_dim
    if heads % size:
        rule_text = f"--num-attention-heads {heads} must be divisible by it"
        yield Fault(flag, size, rule_text, f"use {flag} {divisor(heads, size)}")
    ffn = model.ffn_hidden_size or 0
    if ffn % size:
        rule_text = f"--ffn-hidden-size {ffn} must be divisible by it"
        yield Fault(flag, size, rule_text, f"use --ffn-hidden-size {multiples(ffn, size)}")
    if groups < heads and heads % groups == 0 and size % groups and groups % size:
        rule_text = f"it and the {groups} KV heads (--num-query-groups) must divide one another"
        yield Fault(flag, size, rule_text, f"use {flag} {divisor(groups, size)}")
    elif width % size:
        rule_text = f"the width of all KV heads, {width}, must be divisible by it"
        yield Fault(flag, size, rule_text, f"use {flag} {divisor(width, size)}")


@rule("sequence_parallel seq_length tensor_model_parallel_size")
def sequence_parallel_fits(config: HasParallel) -> Iterator[Fault]:
    """Every tensor-parallel rank gets the same part of the sequence."""
    length, size = config.model.seq_length, config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and length % size:
        yield Fault(
            "--seq-length",
            length,
            f"with --sequence-parallel it must be divisible by --tensor-model-parallel-size {size}",
            f"use --seq-length {multiples(length, size)}",
        )


@rule("overlap_param_gather use_distributed_optimizer overlap_grad_reduce")
def overlap_fits(config: HasParallel) -> Iterator[Fault]:
    """Gathering weights during forward belongs to the distributed optimizer with overlapped
    reduction."""
    parallel = config.parallel
    needed = {
        "--use-distributed-optimizer": parallel.use_distributed_optimizer,
        "--overlap-grad-reduce": parallel.overlap_grad_reduce,
    }
    missing = [flag for flag, given in needed.items() if not given]
    if parallel.overlap_param_gather and missing:
        rule_text = f"it needs {' and '.join(missing)}"
        yield Fault("--overlap-param-gather", True, rule_text, f"add {' '.join(missing)}")


def _at_flag(fault: Fault) -> Fault:
    """Faults inside an explicit map name a layer: say which flag holds it."""
    if fault.where.startswith("--"):
        return fault
    return replace(fault, where=f"--kv-map, {fault.where}")


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


MODEL_RULES = (
    heads_fit,
    groups_fit,
    positions_fit,
    rope_scaling_fits,
    stretching_is_defined,
    recompute_fits,
    transformer_engine_is_there,
)
SHARING_RULES = (map_is_valid,)
PARALLEL_RULES = (tensor_parallel_fits, sequence_parallel_fits, overlap_fits)
