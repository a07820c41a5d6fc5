#!/usr/bin/env bash
# 1.1B, sandwich-top, trained by DeepSpeed: the model, data and schedule of ../pretrain_1b_top_share.sh.
# ZERO names the JSON file beside this script: zero1 (default), zero2, zero3 or zero3_offload.
# LAUNCHER=deepspeed starts it by DeepSpeed's launcher. Settings from the environment and what happens without a GPU:
# examples/launch.sh. Arguments are passed on.
set -euo pipefail
HERE="$(realpath --relative-base="$PWD" "$(dirname "${BASH_SOURCE[0]}")")"
RUNS="$(realpath -m --relative-base="$PWD" "$HERE/../../runs")"
ZERO="${ZERO:-zero1}"
if [[ ! -f "$HERE/$ZERO.json" ]]; then echo "launch error: no file $HERE/$ZERO.json: ZERO names one" >&2; exit 2; fi
export SIZE=1b KV_PATTERN=sandwich-top KV_LAYERS="${KV_LAYERS:-11}"
# A folder of its own: a checkpoint of the other engine is loaded by naming it with --load.
export CONFIG_FILE="$HERE/1b.yaml" SAVE="${SAVE:-$RUNS/deepspeed-$ZERO/checkpoint}"
exec bash "$HERE/../launch.sh" --deepspeed --deepspeed-config "$HERE/$ZERO.json" "$@"
