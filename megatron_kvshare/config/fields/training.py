"""Settings of the optimisation, of its engine, of checkpoints and of logs."""

from __future__ import annotations

from typing import Literal

from megatron_kvshare.config.fields.types import (
    SCHEMA,
    Count,
    Fraction,
    Index,
    Minutes,
    Momentum,
    NonNegative,
    Positive,
    Ratio,
    Seed,
    ZeroStage,
    dataclass,
)


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class TrainConfig:
    """Training: batch, length, optimizer (AdamW), learning rate, evaluation."""

    micro_batch_size: Count = 1
    """Sequences per process and forward pass."""
    global_batch_size: Count | None = None
    """Sequences per optimizer step over all processes; left out: --micro-batch-size x data-parallel
    size."""
    train_iters: Count = 1000
    """Optimizer steps in total, those before a resume included."""
    lr: Positive = 4e-4
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay; WSD is warm-up, stable, decay."""
    lr_decay_iters: Count | None = None
    """Step at which the decay is complete; left out: --train-iters."""
    lr_warmup_iters: Index = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: Fraction | None = None
    """Warm-up as a fraction of the decay steps, instead of --lr-warmup-iters."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """WSD: shape of the final decay."""
    lr_wsd_decay_iters: Count | None = None
    """WSD: steps of the final decay."""
    weight_decay: NonNegative = 0.1
    """AdamW weight decay (norms and other vectors are left out)."""
    clip_grad: NonNegative = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    adam_beta1: Momentum = 0.9
    """AdamW beta 1."""
    adam_beta2: Momentum = 0.95
    """AdamW beta 2 (0.95 as in Llama; Megatron's default is 0.999)."""
    adam_eps: Positive = 1e-8
    """AdamW epsilon."""
    seed: Seed = 1234
    """Seed of initial weights and data order."""
    eval_interval: Count = 1000
    """Steps between two evaluations on the validation split."""
    eval_iters: Index = 10
    """Global batches per evaluation; 0 turns evaluation off."""
    nan_policy: Literal["skip", "stop"] = "skip"
    """A step with NaN or Inf in loss or gradients is skipped and counted, or stops the run."""
    nan_max_consecutive_skips: Count = 10
    """Under skip: stop after this many skipped steps in a row, for whatever reason."""
    loss_spike_factor: Ratio | None = None
    """A loss above this many times the mean of the last 100 is a spike; left out: none is."""
    loss_spike_policy: Literal["skip", "stop"] = "skip"
    """A spike's step is skipped and its samples written down, or stops the run."""
    divergence_policy: Literal["warn", "stop"] = "warn"
    """A run that diverges (gradient norm, loss) warns and goes on, or is saved and stopped, with
    exit code 3."""
    deterministic_mode: bool = False
    """Take only algorithms that give the same bits every time on a GPU; slower there, see
    docs/gpu.md."""
    exit_interval: Count | None = None
    """Save and stop at the next step that is a multiple of this."""
    exit_duration_in_mins: Minutes | None = None
    """Save and stop after the first step that ends later than this many minutes after the start."""

    @property
    def decay_iters(self) -> int:
        """Step at which the learning-rate decay is complete."""
        return self.lr_decay_iters or self.train_iters

    @property
    def warmup_iters(self) -> int:
        """Steps of linear warm-up, given as a number or as a fraction."""
        if self.lr_warmup_fraction is not None:
            return int(self.lr_warmup_fraction * self.decay_iters)
        return self.lr_warmup_iters


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class DeepSpeedConfig:
    """Engine: what trains, megatron-core or DeepSpeed; see docs/deepspeed.md."""

    engine: Literal["megatron", "deepspeed"] = "megatron"
    """megatron: megatron-core's data parallelism and optimizer; deepspeed: DeepSpeed's ZeRO."""
    deepspeed: bool = False
    """The same as --engine deepspeed."""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON file. Settings that it gives hold where no flag does; flags that contradict
    it are refused."""
    zero_stage: ZeroStage | None = None
    """What the data-parallel processes share out: 0 nothing, 1 optimizer state, 2 gradients too, 3
    weights too; left out: the JSON file's, else 0."""
    zero_offload: Literal["cpu"] | None = None
    """Keep the optimizer state in the memory of the host."""
    load_tag: str | None = None
    """With --load: the tag (folder) of the checkpoint to load, as --ckpt-step N; left out: the
    newest."""
    universal_checkpoint: bool = False
    """Refused: --load reads DeepSpeed's checkpoints on any number of ranks as they are."""
    deepspeed_activation_checkpointing: bool = False
    """The same as --recompute-granularity full."""

    @property
    def is_engine(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.deepspeed or self.engine == "deepspeed"


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class CheckpointConfig:
    """Checkpoints: where to save and what to continue from."""

    save: str | None = None
    """Folder to save to, every --save-interval steps and at the end."""
    load: str | None = None
    """Folder to continue from; there must be a checkpoint in it."""
    ckpt_step: Index | None = None
    """With --load: the checkpoint of this step instead of the newest."""
    resume: Literal["auto"] | None = None
    """auto: continue from the newest checkpoint of --save; while there is none, start from --load,
    or fresh without one. For jobs that are started again and again by the same command."""
    save_interval: Count | None = None
    """Steps between two checkpoints; left out: at the end only."""
    async_save: bool = False
    """Write checkpoints beside the training, which stops only while its state is copied in
    memory."""
    keep_last: Count | None = None
    """How many checkpoints stay, the newest ones; left out: all."""
    keep_every: Count | None = None
    """With --keep-last: checkpoints of steps that are multiples of this stay too."""
    no_save_optim: bool = False
    """Save weights without the optimizer state."""
    no_load_optim: bool = False
    """Load weights without the optimizer state."""
    data_change_ok: bool = False
    """Continue although data, blend, seed or sequence length are not those of the checkpoint."""
    no_load_rng: bool = False
    """Do not restore the random number generators."""
    finetune: bool = False
    """Load the weights only and start from step 0."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class LogConfig:
    """Logging: console, metrics file, TensorBoard, wandb."""

    log_interval: Count = 10
    """Steps between two log lines."""
    metrics_file: str | None = None
    """JSON-lines file that gets one object per logged step; appended to on resume."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard events."""
    wandb_project: str | None = None
    """wandb project; left out: no wandb."""
    wandb_exp_name: str | None = None
    """wandb name of the run."""
    wandb_save_dir: str | None = None
    """Folder for wandb's files."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline needs no network; upload later with `wandb sync`. Left out: what WANDB_MODE in the
    environment says, else online."""
    peak_tflops: Positive | None = None
    """Peak TFLOP/s of one device for MFU; left out: the datasheet's of a card that is known, else
    measured with a matrix product. The log says which."""
    log_kv_residual: bool = True
    """Cyclic maps: log how far the shared KV still moves in the last sweep."""
    profile: bool = False
    """Profile some steps. On a GPU under `nsys profile --capture-range=cudaProfilerApi ...`, or
    anywhere with --use-pytorch-profiler."""
    use_pytorch_profiler: bool = False
    """--profile by torch: Chrome traces, in --tensorboard-dir if given, else in profile/ beside the
    checkpoints."""
    profile_step_start: Count = 10
    """First step to profile."""
    profile_step_end: Count = 12
    """Step before which the profile ends."""
    profile_ranks: tuple[Index, ...] = (0,)
    """Ranks to profile."""
