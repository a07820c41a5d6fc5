"""Megatron-LM flags, and Megatron-DeepSpeed's, that are no settings here: they hold anyway or are
refused with a fix.

A Megatron command line runs unchanged or is told, flag by flag, what to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_kvshare.errors import Fault


@dataclass(frozen=True)
class Accepted:
    """Not needed. ``values`` are those that hold here; None: any; empty: the flag is a switch.

    ``fix`` is what to do instead of another value; empty: to write the first one, or nothing.
    """

    values: tuple[str, ...] | None = ()
    rule: str = "is always on"
    fix: str = ""


@dataclass(frozen=True)
class Refused:
    """Not supported: ``rule`` is the reason, ``fix`` what to write instead."""

    rule: str
    fix: str


MegatronFlags = Mapping[str, Accepted | Refused]

_ANY = Accepted(values=None)
_ON = Accepted()
_LLAMA = "leave it out: the model is Llama-shaped (RMSNorm, RoPE, SwiGLU, no biases)"
_LAYOUT = Refused(
    "uneven stages are written as a layout", "use --pipeline-model-parallel-layout, as in 8,8,7,7"
)
_VIRTUAL = Refused(
    "virtual stages are given by their layers", "use --num-layers-per-virtual-pipeline-stage N"
)
_MOE = Refused("mixture of experts is not supported", "leave it out: every layer is dense")
_FP16 = Refused("fp16 and its loss scaling are not supported", "use --bf16, or neither for fp32")
_FP8 = Refused("8-bit training is not supported", "use --bf16")
_GPT2_FILES = Refused(
    "the files of a tokenizer are given by their folder",
    "use --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER, with the two in it as"
    " vocab.json and merges.txt",
)
_IN_JSON = Refused(
    "DeepSpeed's sizes stand in its JSON file",
    "write it in the zero_optimization of --deepspeed-config",
)
_RECOMPUTE = Refused(
    "layers are recomputed whole, by torch's checkpointing",
    "use --deepspeed-activation-checkpointing",
)
_NO_DROPOUT = "dropout is not supported, and with a cyclic map every sweep would see another mask"
_SAMPLES = "the length of a run is counted in optimizer steps"

_ACCEPTED: dict[str, Accepted] = {
    "swiglu": _ON,
    "group_query_attention": _ON,
    "disable_bias_linear": _ON,
    "use_rotary_position_embeddings": _ON,
    "no_position_embedding": _ON,
    "normalization": Accepted(("RMSNorm",), "the model uses RMSNorm only"),
    "position_embedding_type": Accepted(
        ("rope",),
        "the model uses rotary embeddings only",
        "use --position-embedding-type rope, with --rope-scaling-type yarn for yarn",
    ),
    "rotary_percent": Accepted(("1.0",), "the whole head is rotated"),
    "use_mcore_models": _ON,
    "use_flash_attn": _ON,
    "attention_backend": Accepted(
        ("auto", "flash"), "torch picks the fastest exact attention kernel"
    ),
    "attention_softmax_in_fp32": _ON,
    "accumulate_allreduce_grads_in_fp32": _ON,
    "calculate_per_token_loss": _ON,
    "attention_dropout": Accepted(("0",), _NO_DROPOUT, "use --attention-dropout 0 or leave it out"),
    "hidden_dropout": Accepted(("0",), _NO_DROPOUT, "use --hidden-dropout 0 or leave it out"),
    "context_parallel_size": Accepted(
        ("1",),
        "it is not supported",
        "use --context-parallel-size 1 and spread the model with --tensor-model-parallel-size",
    ),
    "optimizer": Accepted(("adam",), "the optimizer is AdamW"),
    "weight_decay_incr_style": Accepted(("constant",), "weight decay is constant"),
    "lr_warmup_init": Accepted(("0",), "warm-up starts at 0"),
    "recompute_modules": Accepted(("core_attn",), "selective recompute covers core attention"),
    "ckpt_format": Accepted(("torch_dist",), "checkpoints are distributed torch checkpoints"),
    "use_dist_ckpt": _ON,
    "auto_detect_ckpt_format": _ON,
    "ckpt_fully_parallel_save": _ON,
    "dataloader_type": Accepted(("single",), "samples are read in the order of the index"),
    "no_create_attention_mask_in_dataloader": _ON,
    "no_masked_softmax_fusion": _ON,
    "no_bias_swiglu_fusion": _ON,
    "no_bias_gelu_fusion": _ON,
    "no_bias_dropout_fusion": _ON,
    "no_rope_fusion": _ON,
    "gradient_accumulation_fusion": _ON,
    "no_gradient_accumulation_fusion": _ON,
    "no_persist_layer_norm": _ON,
    "use_cpu_initialization": _ON,
    "exit_signal_handler": _ON,
    "exit_on_missing_checkpoint": _ON,
    "log_throughput": _ON,
    "log_progress": _ON,
    "log_validation_ppl_to_tensorboard": _ON,
    "timing_log_level": _ANY,
    "num_dataset_builder_threads": _ANY,
    "manual_gc": _ON,
    "manual_gc_interval": _ANY,
    "expert_model_parallel_size": Accepted(("1",), "every layer is dense: there are no experts"),
    "expert_tensor_parallel_size": Accepted(("1",), "every layer is dense: there are no experts"),
    "virtual_pipeline_model_parallel_size": Accepted(
        ("1",), "virtual stages are given by --num-layers-per-virtual-pipeline-stage"
    ),
    "local_rank": _ANY,  # of the deepspeed launcher, which sets LOCAL_RANK too
    "no_pipeline_parallel": _ON,
    "ds_sequence_parallel_size": Accepted(
        ("1",), "DeepSpeed's Ulysses is not supported", "use --sequence-parallel"
    ),
}

_REFUSED: dict[str, Refused] = {
    "fp16": _FP16,
    "loss_scale": _FP16,
    "initial_loss_scale": _FP16,
    "min_loss_scale": _FP16,
    "fp8_format": _FP8,
    "fp8_recipe": _FP8,
    "num_experts": _MOE,
    "moe_router_topk": _MOE,
    "moe_grouped_gemm": _MOE,
    "moe_token_dispatcher_type": _MOE,
    "moe_aux_loss_coeff": _MOE,
    "num_virtual_stages_per_pipeline_rank": _VIRTUAL,
    "decoder_first_pipeline_num_layers": _LAYOUT,
    "decoder_last_pipeline_num_layers": _LAYOUT,
    "use_megatron_fsdp": Refused("FSDP is not supported", "use --use-distributed-optimizer"),
    "use_torch_fsdp2": Refused("FSDP is not supported", "use --use-distributed-optimizer"),
    "tp_comm_overlap": Refused(
        "overlapped tensor-parallel communication is not supported", "leave it out"
    ),
    "rampup_batch_size": Refused(
        "the global batch keeps its size for the whole run",
        "leave it out; run first with a small --global-batch-size, then --load with a larger one",
    ),
    "train_samples": Refused(_SAMPLES, "use --train-iters (samples / --global-batch-size)"),
    "lr_decay_samples": Refused(_SAMPLES, "use --lr-decay-iters (samples / --global-batch-size)"),
    "lr_warmup_samples": Refused(_SAMPLES, "use --lr-warmup-iters (samples / --global-batch-size)"),
    "lr_wsd_decay_samples": Refused(
        _SAMPLES, "use --lr-wsd-decay-iters (samples / --global-batch-size)"
    ),
    "no_save_rng": Refused(
        "generator states are small and always saved",
        "leave it out; use --no-load-rng when loading",
    ),
    "use_checkpoint_args": Refused("settings come from flags and --config", "leave it out"),
    "no_check_for_nan_in_loss_and_grad": Refused(
        "loss and gradients are always checked", "use --nan-policy skip or stop"
    ),
    "recompute_activations": Refused("it is an old name", "use --recompute-granularity selective"),
    "distribute_saved_activations": Refused(
        "saved activations are not distributed", "use --sequence-parallel"
    ),
    "vocab_file": _GPT2_FILES,
    "merge_file": _GPT2_FILES,
    "wandb_entity": Refused("wandb reads it itself", "set the environment variable WANDB_ENTITY"),
    "tensorboard_log_interval": Refused("all logs share one interval", "use --log-interval"),
    "add_bias_linear": Refused("linear layers have no biases", _LLAMA),
    "add_qkv_bias": Refused("linear layers have no biases", _LLAMA),
    "squared_relu": Refused("the activation is SwiGLU", _LLAMA),
    "openai_gelu": Refused("the activation is SwiGLU", _LLAMA),
    "qk_layernorm": Refused("queries and keys are not normalised", _LLAMA),
    "apply_layernorm_1p": Refused("RMSNorm has a plain weight", _LLAMA),
    "rotary_interleaved": Refused("rotary halves are not interleaved", _LLAMA),
    "rotary_seq_len_interpolation_factor": Refused(
        "the rotary embedding is stretched by one pair of flags",
        "use --rope-scaling-type linear --rope-scaling-factor N",
    ),
    "multi_latent_attention": Refused("attention is grouped-query attention", _LLAMA),
    "init_method_xavier_uniform": Refused("initial weights are normal", "use --init-method-std"),
    "cpu_optimizer": Refused("it is --zero-offload here", "use --zero-offload cpu"),
    "zero_contigious_gradients": _IN_JSON,
    "zero_reduce_bucket_size": _IN_JSON,
    "zero_reduce_scatter": _IN_JSON,
    "zero_allgather_bucket_size": _IN_JSON,
    "use_pin_memory": _IN_JSON,
    "remote_device": Refused(
        "weights are offloaded as the JSON file says",
        'write "offload_param": {"device": "cpu"} in its zero_optimization',
    ),
    "partition_activations": _RECOMPUTE,
    "contigious_checkpointing": _RECOMPUTE,
    "checkpoint_in_cpu": _RECOMPUTE,
    "checkpoint_activations": _RECOMPUTE,
    "checkpoint_num_layers": _RECOMPUTE,
    "deepspeed_mpi": Refused(
        "processes are counted by RANK, WORLD_SIZE and LOCAL_RANK",
        "start with torchrun or the deepspeed launcher",
    ),
    "use_legacy_models": Refused("the model is built on megatron-core", "leave it out"),
}

MEGATRON_FLAGS: MegatronFlags = {**_ACCEPTED, **_REFUSED}


def megatron_fault(flag: str, entry: Accepted | Refused, values: tuple[str, ...]) -> Fault | None:
    """What is wrong with a Megatron flag that was given; None when it changes nothing.

    Args:
        flag: as written by the user, for the message.
        entry: its row of the table.
        values: its values, empty for a switch.
    """
    if isinstance(entry, Refused):
        return Fault(flag, " ".join(values) or "given", entry.rule, entry.fix)
    if (
        entry.values is None
        or values == entry.values
        or (len(values) == 1 and any(_same(values[0], allowed) for allowed in entry.values))
    ):
        return None
    if not entry.values:
        return Fault(
            flag, " ".join(values), "it is a switch and takes no value", f"write {flag} alone"
        )
    fix = entry.fix or f"write {flag} {entry.values[0]} or leave it out"
    return Fault(flag, " ".join(values), entry.rule, fix)


def _same(given: str, allowed: str) -> bool:
    """Whether two values are the same text or, as 0.0 and 0, the same number."""
    try:
        return given == allowed or float(given) == float(allowed)
    except ValueError:
        return False
