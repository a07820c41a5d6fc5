"""The keys of DeepSpeed's file, as version 0.19.8 knows them, and what becomes of each here."""

from __future__ import annotations

from typing import Any

from megatron_kvshare.config.deepspeed.keys import (
    DEVICE,
    NUMBER,
    PAIR,
    SWITCH,
    TEXTS,
    Agreed,
    Entry,
    Off,
    Only,
    Passed,
    Refused,
    Section,
    Typed,
    one_of,
    section,
    whole,
)

_COUNT, _SIZE = whole(1), whole(0)
_DTYPES = one_of("fp32", "bf16")
_PARTITIONED, _SHARDED = (1, 2), (1, 2, 3)
_DROP = "remove it"


def _off(rule: str, *keys: str, fix: str = _DROP, switch: str = "enabled") -> Off:
    return Off(frozenset({switch, *keys}), rule, fix, switch)


def _only(value: Any, rule: str, fix: str = _DROP) -> Only:
    return Only((value,), rule, fix)


def _renamed(name: str) -> Refused:
    return Refused(f"DeepSpeed calls it {name} now", f"write {name}")


_GONE = Refused("DeepSpeed has removed it: the run would go on without it", _DROP)
_NVME = "state is kept in memory, not on NVMe disks"
_SCALED = "gradients are scaled by the tokens of the global batch"
_QUANTIZED = "weights and gradients are sent as they are, or the numbers would change"
_OTHER_ADAM = "the optimizer is AdamW with bias correction, in fp32"
_MONITOR = "the run writes its own logs, the same under every engine"
_ULYSSES = "sequences are not split over processes by DeepSpeed (Ulysses)"
_EXPERTS = "every layer is dense: there are no experts"
_OWN_DATA = "batches come from the data settings, DeepSpeed loads none"
_OWN_SAVE = "DeepSpeed's files lie in the folder of the checkpoint, written by all ranks at a time"
_PP = "ZeRO 2 and 3 do not combine with pipeline stages, and sweeps would cross them"

_OFFLOAD_OPTIMIZER = Section(
    {
        "device": Agreed(DEVICE),
        "pin_memory": Passed(SWITCH, True),
        "nvme_path": Only((None,), _NVME, 'remove it, and write "device": "cpu"'),
        "buffer_count": _only(4, _NVME),
        "pipeline_read": _only(False, _NVME),
        "pipeline_write": _only(False, _NVME),
        "fast_init": _only(False, _NVME),
        "ratio": _only(1.0, "the whole optimizer state is offloaded, or nothing"),
        "super_offload": _only(False, _OTHER_ADAM),
        "cpuadam_cores_perc": _only(0.8, "it belongs to super_offload"),
    },
    stages=_SHARDED,
)
_OFFLOAD_PARAM = Section(
    {
        "device": Passed(DEVICE, "none"),
        "pin_memory": Passed(SWITCH, True),
        "nvme_path": Only((None,), _NVME, 'remove it, and write "device": "cpu"'),
        "buffer_count": _only(5, _NVME),
        "buffer_size": _only(100_000_000, _NVME),
        "max_in_cpu": _only(1_000_000_000, _NVME),
    },
    stages=(3,),
)

ZERO = Section(
    {
        "stage": Agreed(whole(0)),
        "contiguous_gradients": Passed(SWITCH, True, stages=_SHARDED),
        "reduce_scatter": Passed(SWITCH, True, stages=_SHARDED),
        "reduce_bucket_size": Passed(_COUNT, 500_000_000, auto=True, stages=_SHARDED),
        "use_multi_rank_bucket_allreduce": Passed(SWITCH, True, stages=_PARTITIONED),
        "allgather_partitions": _only(True, "DeepSpeed heeds no other value"),
        "allgather_bucket_size": Passed(_SIZE, 500_000_000, auto=True, stages=_PARTITIONED),
        "overlap_comm": Passed(SWITCH, auto=True, stages=_SHARDED),
        "compute_grad_norm": _only(True, "the gradient norm is logged and clipped by"),
        "load_from_fp32_weights": _only(True, "a run goes on from fp32 weights"),
        "elastic_checkpoint": _only(
            False,
            "DeepSpeed gives it up",
            "remove it; a checkpoint is read on another number of ranks anyway",
        ),
        "offload_param": _OFFLOAD_PARAM,
        "offload_optimizer": _OFFLOAD_OPTIMIZER,
        "zenflow": Refused("the optimizer takes its step at once, on all gradients", _DROP),
        "sub_group_size": Passed(_COUNT, 1_000_000_000, stages=(3,)),
        "cpu_offload": _renamed("offload_optimizer"),
        "cpu_offload_param": _renamed("offload_param"),
        "cpu_offload_use_pin_memory": _renamed("pin_memory in offload_optimizer and offload_param"),
        "stage3_prefetch_bucket_size": Passed(_SIZE, 50_000_000, auto=True, stages=(3,)),
        "stage3_param_persistence_threshold": Passed(_SIZE, 100_000, auto=True, stages=(3,)),
        "stage3_model_persistence_threshold": Passed(_SIZE, (1 << 63) - 1, stages=(3,)),
        "stage3_max_live_parameters": Passed(_SIZE, 1_000_000_000, auto=True, stages=(3,)),
        "stage3_max_reuse_distance": Passed(_SIZE, 1_000_000_000, auto=True, stages=(3,)),
        "stage3_gather_16bit_weights_on_model_save": Agreed(SWITCH),
        "stage3_module_granularity_threshold": _only(
            0, "a layer that runs several times must be fetched on its own"
        ),
        "stage3_use_all_reduce_for_fetch_params": Passed(SWITCH, False, stages=(3,)),
        "stage3_allgather_sequential": Passed(SWITCH, False, stages=(3,)),
        "stage3_gather_fp16_weights_on_model_save": _renamed(
            "stage3_gather_16bit_weights_on_model_save"
        ),
        "ignore_unused_parameters": Passed(SWITCH, True, stages=(2,)),
        "legacy_stage1": _only(False, "DeepSpeed has removed it"),
        "round_robin_gradients": Passed(SWITCH, False, stages=_PARTITIONED),
        "parameter_alignment": Passed(SWITCH, False, stages=_PARTITIONED),
        "zero_hpz_partition_size": _only(1, "weights are partitioned over all replicas alike"),
        "zero_quantized_weights": _only(False, _QUANTIZED),
        "zero_quantized_nontrainable_weights": _only(False, _QUANTIZED),
        "zero_quantized_gradients": _only(False, _QUANTIZED),
        "memory_efficient_linear": Passed(SWITCH, True, stages=(3,)),
        "pipeline_loading_checkpoint": _only(False, "checkpoints are loaded by our own reader"),
        "override_module_apply": Passed(SWITCH, True, stages=(3,)),
        "log_trace_cache_warnings": Passed(SWITCH, False, stages=(3,)),
        "enable_sanity_checks": Passed(SWITCH, False, stages=(3,)),
        "save_muon_momentum_buffer_in_memory": _only(False, _OTHER_ADAM),
        "leaf_module": Refused("the engine knows which modules are fetched as one", _DROP),
        "mics_shard_size": _GONE,
        "mics_hierarchical_params_gather": _GONE,
        "zeropp_loco_param": _GONE,
    },
    aliases={
        "prefetch_bucket_size": "stage3_prefetch_bucket_size",
        "param_persistence_threshold": "stage3_param_persistence_threshold",
        "model_persistence_threshold": "stage3_model_persistence_threshold",
        "max_live_parameters": "stage3_max_live_parameters",
        "max_reuse_distance": "stage3_max_reuse_distance",
        "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
        "module_granularity_threshold": "stage3_module_granularity_threshold",
        "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
        "allgather_sequential": "stage3_allgather_sequential",
    },
)

_ADAM = section(
    lr=Agreed(NUMBER),
    betas=Agreed(PAIR),
    eps=Agreed(NUMBER),
    weight_decay=Agreed(NUMBER),
    bias_correction=_only(True, _OTHER_ADAM),
    amsgrad=_only(False, _OTHER_ADAM),
    adam_w_mode=_only(True, "weight decay is AdamW's, not L2 regularisation"),
    torch_adam=Only((True, False), _OTHER_ADAM, _DROP),
    fp32_optimizer_states=_only(True, _OTHER_ADAM),
    max_grad_norm=Refused(
        "DeepSpeed does not heed it here", "write gradient_clipping at the top of the file"
    ),
)
_OPTIMIZER = Typed(
    {"AdamW": _ADAM, "Adam": _ADAM},
    section(legacy_fusion=_only(False, _OTHER_ADAM)),
    "the optimizer is AdamW",
    'write "AdamW", or leave the section out',
)

_WARMUP: dict[str, Entry] = {
    "warmup_num_steps": Agreed(whole(0)),
    "warmup_type": _only("linear", "warm-up is linear", 'write "linear"'),
    "last_batch_iteration": _only(-1, "the step is the checkpoint's"),
}
_FROM_0, _UNTIL = _only(0, "warm-up starts at 0"), Agreed(_COUNT)
_RATES: dict[str, Entry] = {"warmup_min_lr": _FROM_0, "warmup_max_lr": Agreed(NUMBER)}
_SCHEDULER = Typed(
    {
        "WarmupLR": section(**_WARMUP, **_RATES),
        "WarmupDecayLR": section(**_WARMUP, **_RATES, total_num_steps=_UNTIL),
        "WarmupCosineLR": section(
            **_WARMUP,
            warmup_min_ratio=_FROM_0,
            cos_min_ratio=Agreed(NUMBER),
            total_num_steps=_UNTIL,
        ),
    },
    section(),
    "after a linear warm-up the rate stays, or falls linearly or as a cosine",
    "leave the section out, and use --lr-decay-style",
)

TOP = section(
    train_batch_size=Agreed(_COUNT),
    train_micro_batch_size_per_gpu=Agreed(_COUNT),
    gradient_accumulation_steps=Agreed(_COUNT),
    managed_gradient_accumulation=_only(True, "the engine says when a step is complete"),
    optimizer=_OPTIMIZER,
    scheduler=_SCHEDULER,
    zero_optimization=ZERO,
    zero_allow_untested_optimizer=Only((True, False), _OTHER_ADAM, _DROP),
    zero_force_ds_cpu_optimizer=_only(False, "the optimizer is the engine's"),
    gradient_clipping=Agreed(NUMBER),
    bf16=section(
        enabled=Agreed(SWITCH),
        immediate_grad_update=Passed(SWITCH, stages=_PARTITIONED),
        check_grad_overflow=_only(
            False, "NaN and Inf are seen under every engine", "remove it, and use --nan-policy"
        ),
        bf16_master_weights_and_grads=_only(False, "master weights are fp32"),
        bf16_optimizer_states=_only(False, _OTHER_ADAM),
    ),
    bfloat16=_renamed("bf16"),
    fp16=_off(
        "fp16 and its loss scaling are not supported",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
        fix='write "bf16": {"enabled": true} instead, or neither for fp32',
    ),
    torch_autocast=_off(
        "torch's autocast is not used",
        "dtype",
        "lower_precision_safe_modules",
        fix='write "bf16": {"enabled": true} instead',
    ),
    data_types=section(
        grad_accum_dtype=Passed(_DTYPES),
        param_dtype=Agreed(_DTYPES),
        buffer_dtype=Only((None,), "the model's buffers have the types that they need", _DROP),
        keep_in_fp32_modules=Only(
            ("auto", []), "the model's buffers have the types that they need", _DROP
        ),
    ),
    communication_data_type=Passed(_DTYPES),
    seq_parallel_communication_data_type=_only("fp32", _ULYSSES),
    prescale_gradients=_only(False, _SCALED),
    gradient_predivide_factor=_only(1.0, _SCALED),
    gradient_allreduce_op=_only("mean", _SCALED),
    disable_allgather=_only(False, "DeepSpeed does not heed it"),
    dataloader_drop_last=_only(False, _OWN_DATA),
    vocabulary_size=Agreed(_COUNT),
    steps_per_print=Passed(_COUNT),
    wall_clock_breakdown=Passed(SWITCH),
    memory_breakdown=Passed(SWITCH),
    dump_state=Passed(SWITCH),
    disable_python_gc=Passed(SWITCH),
    log_level=Passed(one_of("debug", "info", "warning", "error", "critical")),
    timers=section(
        throughput=section(enabled=Passed(SWITCH), synchronized=Passed(SWITCH)),
    ),
    comms_logger=section(
        enabled=Passed(SWITCH),
        verbose=Passed(SWITCH),
        prof_all=Passed(SWITCH),
        debug=Passed(SWITCH),
        prof_ops=Passed(TEXTS),
    ),
    activation_checkpointing=section(
        **{
            name: _only(
                False,
                "layers are recomputed by torch's checkpointing, not DeepSpeed's",
                "remove it; --deepspeed-activation-checkpointing recomputes whole layers",
            )
            for name in (
                "partition_activations",
                "contiguous_memory_optimization",
                "synchronize_checkpoint_boundary",
                "profile",
                "cpu_checkpointing",
            )
        },
        number_checkpoints=Only((None,), "every layer is a checkpoint of its own", _DROP),
    ),
    checkpoint=section(
        tag_validation=Passed(one_of("Warn", "Ignore", "Fail")),
        load_universal=Agreed(SWITCH),
        use_node_local_storage=_only(False, _OWN_SAVE),
        parallel_write=section(pipeline_stage=_only(False, _PP)),
        checkpoint_serialization=_only(True, _OWN_SAVE),
        writer=Only((None,), _OWN_SAVE, _DROP),
    ),
    tensorboard=_off(_MONITOR, "output_path", "job_name", fix="use --tensorboard-dir"),
    wandb=_off(_MONITOR, "group", "team", "project", fix="use --wandb-project"),
    csv_monitor=_off(_MONITOR, "output_path", "job_name", fix="use --metrics-file"),
    comet=_off(
        _MONITOR,
        "samples_log_interval",
        "project",
        "workspace",
        "api_key",
        "experiment_name",
        "experiment_key",
        "online",
        "mode",
        fix="use --metrics-file",
    ),
    flops_profiler=_off(
        "it does not see that a layer runs in several sweeps",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
        fix="remove it; TFLOP/s are logged, and --profile --use-pytorch-profiler shows times",
    ),
    compile=_off(
        "compiled kernels are asked for by a flag",
        "autoep_non_moe",
        "free_activation",
        "free_activation_threshold",
        "offload_activation",
        "offload_activation_pin_memory",
        "offload_opt_states",
        "double_buffer",
        "symmetric_memory",
        "debug_log",
        "offload_parameters",
        "sync_before_reduce",
        "sync_after_reduce",
        "sync_before_allgather",
        "sync_after_allgather",
        "keep_int_input_tensors",
        "keep_all_input_tensors",
        "passes",
        fix="use --compile-kernels",
        switch="deepcompile",
    ),
    hybrid_engine=_off(
        "nothing is generated during training",
        "max_out_tokens",
        "inference_tp_size",
        "release_inference_cache",
        "pin_parameters",
        "tp_gather_partition_size",
        "enable_cuda_graph",
    ),
    autotuning=Off(None, "batch and stage are those of the settings", _DROP),
    data_efficiency=Off(None, "samples are read in the order of the index, whole", _DROP),
    aio=Refused(_NVME, _DROP),
    datastates_ckpt=Refused(_OWN_SAVE, "remove it; --async-save writes beside the training"),
    weight_quantization=Refused("it is for inference", _DROP),
    tensor_parallel=Refused(
        "AutoTP does not know this model, whose layers are split by megatron-core",
        "remove it, and use --tensor-model-parallel-size",
    ),
    expert_parallel=Refused(_EXPERTS, _DROP),
    use_data_before_expert_parallelism=_only(False, _EXPERTS),
    sequence_parallel_size=_only(1, _ULYSSES, "remove it, and use --sequence-parallel"),
    pipeline=Refused(_PP, "remove it, and use --tensor-model-parallel-size or a higher ZeRO stage"),
    allgather_size=_renamed("allgather_bucket_size in zero_optimization"),
    **{
        name: _GONE
        for name in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        )
    },
)
