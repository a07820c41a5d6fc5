#!/usr/bin/env bash
# Everything the example scripts have in common: the environment, the devices, the data and the launcher.
# Arguments are passed on to `kvshare pretrain` after all others, so they win.
#
# From the environment (the example scripts set the first three):
#   SIZE             1b or 110m: examples/configs/SIZE.yaml, or the file CONFIG_FILE
#   KV_PATTERN       the sharing map; KV_LAYERS: how many layers keep KV; WINDOW_SIZE: tokens, for windowed maps
#   KV_RECIPE        how a map with upward layers is computed: one-sweep, two-sweep or paper (default: that of the
#                    checkpoint in SAVE, two-sweep without one)
#   DATA_PATH        prefix of .bin/.idx files, or a blend "0.7 A 0.3 B"; left out: the embedded corpus
#   TOKENIZER_MODEL  SentencePiece file, or folder of a Hugging Face tokenizer; belongs to DATA_PATH
#   SAVE             folder for checkpoints; a run that finds one there continues (default: runs/NAME/checkpoint)
#   TRAIN_ITERS      optimizer steps in total; the warm-up is a fraction of them
#   TP               tensor-parallel size (default 1; above 1 with sequence parallelism)
#   PP               pipeline-parallel size (default 1); VPP: virtual stages on each of its processes (default 1)
#   GPUS_PER_NODE    default: all GPUs of this machine
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    several machines: start the script once on each
#   NPROC            processes when there is no GPU (default TP x PP, which share the cores)
#   LAUNCHER         torchrun (default): this script starts the processes of its machine; srun: SLURM has started it
#                    once for every process, as slurm/pretrain.sbatch does; deepspeed: DeepSpeed's launcher, with
#                    HOSTFILE: on all its machines by ssh, or on this one where NNODES is above 1
#   CHECK=1          do not train: see whether all processes could (kvshare doctor --distributed);
#                    SAVE_BYTES: bytes that must be free at SAVE
#   FULL_SIZE=1      without a GPU: keep the full-size model (to look at it with --dry-run)
#
# Without a GPU a small model of the same map family is trained (examples/configs/small.yaml).
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Relative where that is shorter: these paths end up in the commands shown to the user.
HERE="$(realpath --relative-base="$PWD" "$ROOT/examples")"
RUNS="$(realpath --relative-base="$PWD" "$ROOT/runs")"
TOOLS="$(realpath -s --relative-base="$PWD" "$ROOT/tools")"
: "${SIZE:?start one of the scripts beside this one, for example examples/pretrain_1b_top_share.sh}"
LAUNCHER="${LAUNCHER:-torchrun}"
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}" TP="${TP:-1}" PP="${PP:-1}" VPP="${VPP:-1}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

say() { if [[ "${RANK:-$NODE_RANK}" -eq 0 ]]; then echo "launch: $*" >&2; fi; }
fail() { echo "launch error: $*" >&2; exit 2; }

# SLURM signals every process of a job step. The trainer saves and stops at USR1; whatever else is on the way to it,
# and the trainer before it is ready, must not die of the signal. Ignoring is inherited, until Python sets its handler.
trap '' USR1

case "$LAUNCHER" in
  torchrun | deepspeed) ;;
  srun)
    : "${SLURM_PROCID:?LAUNCHER=srun is for scripts that srun has started}"
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
    # Where SLURM gives each process one GPU of its own, that is its number 0.
    if [[ "${CUDA_VISIBLE_DEVICES:-,}" != *,* ]]; then LOCAL_RANK=0; fi
    ;;
  *) fail "LAUNCHER=$LAUNCHER: it is deepspeed, torchrun or srun" ;;
esac
if [[ -z "${DATA_PATH:-}" && "$NNODES" -gt 1 && -z "${SLURM_JOB_ID:-}" ]]; then
  fail "several nodes need data that all of them see: set DATA_PATH and TOKENIZER_MODEL"
fi
PY="$(bash "$ROOT/tools/setup_env.sh")"

gpu_count() {
  # Importing torch takes seconds: ask it only where there is a driver.
  if [[ -e /dev/nvidiactl ]] || command -v nvidia-smi > /dev/null; then
    "$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
  else
    echo 0
  fi
}

yaml_number() { sed -n "s/^$2: *\([0-9]*\).*/\1/p" "$1"; }

GPUS="$(gpu_count)"
CONFIG="$SIZE" SMALL_FILE="$HERE/configs/small.yaml" CONFIG_FILE="${CONFIG_FILE:-$HERE/configs/$SIZE.yaml}"
if [[ "$GPUS" -eq 0 && -z "${FULL_SIZE:-}" ]]; then
  CONFIG=small
  if [[ -n "${KV_LAYERS:-}" ]]; then
    # The same share of the layers, but never so few that the map loses its shape.
    SMALL=$(yaml_number "$SMALL_FILE" num-layers) FULL=$(yaml_number "$CONFIG_FILE" num-layers)
    SCALED=$(((KV_LAYERS * SMALL + FULL / 2) / FULL))
    LEAST=$((KV_LAYERS < 3 ? KV_LAYERS : 3))
    KV_LAYERS=$((SCALED > LEAST ? SCALED : LEAST))
  fi
  say "no GPU here: training a small $KV_PATTERN model instead of $SIZE" \
    "($(yaml_number "$SMALL_FILE" num-layers) layers${KV_LAYERS:+, $KV_LAYERS with KV}) on $(nproc) CPU cores"
  CONFIG_FILE="$SMALL_FILE"
fi
NAME="$CONFIG-${KV_PATTERN/:/-}${KV_LAYERS:+-$KV_LAYERS}"
SAVE="${SAVE:-$RUNS/$NAME/checkpoint}"

FLAGS=(--config "$CONFIG_FILE" --kv-pattern "$KV_PATTERN")
if [[ -n "${KV_LAYERS:-}" ]]; then FLAGS+=(--kv-layers "$KV_LAYERS"); fi
if [[ "$KV_PATTERN" == yoco || -n "${WINDOW_SIZE:-}" ]]; then
  FLAGS+=(--window-size "${WINDOW_SIZE:-$(($(yaml_number "$CONFIG_FILE" seq-length) / 2))}")
fi
case "$KV_PATTERN" in
  *-middle* | *-top | lckv:*) # what has upward layers
    # A run that finds a checkpoint goes on with its recipe, and --kv-* arguments mean what they mean without a name.
    if [[ -n "${KV_RECIPE:-}" || ( ! -e "$SAVE/latest_checkpointed_iteration.txt" && " $*" != *" --kv-"* ) ]]; then
      FLAGS+=(--kv-recipe "${KV_RECIPE:-two-sweep}")
    fi
    ;;
esac
if [[ "$TP" -gt 1 ]]; then
  FLAGS+=(--tensor-model-parallel-size "$TP" --sequence-parallel)
  # megatron-core starts a collective before the product it overlaps; one queue keeps that order on GPUs.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi
if [[ "$PP" -gt 1 ]]; then
  FLAGS+=(--pipeline-model-parallel-size "$PP")
  if [[ "$VPP" -gt 1 ]]; then
    FLAGS+=(--num-layers-per-virtual-pipeline-stage $(($(yaml_number "$CONFIG_FILE" num-layers) / PP / VPP)))
  fi
fi
if [[ -z "${DATA_PATH:-}" ]]; then
  say "DATA_PATH is not set: training on the embedded corpus"
  CORPUS="$(bash "$HERE/prepare_corpus.sh")"
  YARDSTICK="$(grep entropy "$CORPUS/summary.txt")"
  DATA_PATH="$CORPUS/corpus_text_document" TOKENIZER_MODEL="$CORPUS/tokenizer.model"
  # The corpus is a few million tokens: enough to see a full-size model work, not to train it.
  if [[ "$CONFIG" != small ]]; then
    TRAIN_ITERS="${TRAIN_ITERS:-50}"
    FLAGS+=(--global-batch-size $((64 * (GPUS > 0 ? GPUS : 1))) --split "90,10,0")
  fi
fi
read -ra DATA <<< "$DATA_PATH"
FLAGS+=(--data-path "${DATA[@]}" --save "$SAVE" --resume auto --metrics-file "$(dirname "$SAVE")/metrics.jsonl")
if [[ -n "${TOKENIZER_MODEL:-}" ]]; then
  KIND=SentencePieceTokenizer
  if [[ -d "$TOKENIZER_MODEL" ]]; then KIND=HuggingFaceTokenizer; fi
  FLAGS+=(--tokenizer-type "$KIND" --tokenizer-model "$TOKENIZER_MODEL")
fi
if [[ -n "${TRAIN_ITERS:-}" ]]; then FLAGS+=(--train-iters "$TRAIN_ITERS"); fi

mkdir -p "$(dirname "$SAVE")"
COMMAND=(megatron_kvshare pretrain "${FLAGS[@]}" "$@")
if [[ -n "${CHECK:-}" ]]; then
  COMMAND=(megatron_kvshare doctor --distributed --save "$SAVE" --save-bytes "${SAVE_BYTES:-0}")
fi
PROCESSES="${GPUS_PER_NODE:-$GPUS}"
if [[ "$GPUS" -eq 0 ]]; then
  PROCESSES="${NPROC:-$((TP * PP))}"
  # All cores for one process; several processes share them.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > PROCESSES ? $(nproc) / PROCESSES : 1))}"
  # Threads that wait by spinning make training several times slower where other work shares the cores.
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
  # Tensors in huge pages: 3 to 7 % of a step (docs/solvers.md). Older C libraries ignore it.
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
fi
need_master() { : "${MASTER_ADDR:?on several nodes set MASTER_ADDR to the host name of the first}"; }
if [[ "$LAUNCHER" == deepspeed ]]; then
  RUN=("$PY" -m deepspeed.launcher.runner --num_gpus "$PROCESSES")
  if [[ -n "${HOSTFILE:-}" ]]; then RUN+=(--hostfile "$HOSTFILE"); fi
  if [[ "$NNODES" -gt 1 ]]; then
    need_master
    : "${HOSTFILE:?on several nodes set HOSTFILE, with a line \"NAME slots=N\" for each}"
    RUN+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
  fi
  RUN+=(--module)
elif [[ "$LAUNCHER" == srun || ("$NNODES" -eq 1 && "$PROCESSES" -eq 1) ]]; then
  RUN=("$PY" -m)
else
  RUN=("$PY" "$TOOLS/torchrun.py" --nproc_per_node "$PROCESSES")
  if [[ "$NNODES" -gt 1 ]]; then
    need_master
    RUN+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
    RUN+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
  else
    RUN+=(--standalone)
  fi
  RUN+=(-m)
fi
if [[ -n "${YARDSTICK:-}" ]]; then say "for comparison with the training loss: $YARDSTICK"; fi
if [[ -z "${YARDSTICK:-}" || -n "${SLURM_JOB_ID:-}" ]]; then
  # The process becomes the trainer, so that signals of a scheduler reach it.
  exec "${RUN[@]}" "${COMMAND[@]}"
fi
"${RUN[@]}" "${COMMAND[@]}"
say "for comparison with the training loss: $YARDSTICK"
