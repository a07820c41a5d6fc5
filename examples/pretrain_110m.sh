#!/usr/bin/env bash
# The 110M set: one of the nine maps of the study, or all of them one after the other.
#   MAP=pizza-middle bash examples/pretrain_110m.sh     pizza, sandwich or lasagna x bottom, middle or top
#   MAP=all bash examples/pretrain_110m.sh
# 6 of 12 layers keep KV; KV_LAYERS=3 is the aggressive setting.
# Settings from the environment and what happens without a GPU: examples/launch.sh. Arguments are passed on.
set -euo pipefail
NINE=({pizza,sandwich,lasagna}-{bottom,middle,top})
LAUNCH="$(dirname "${BASH_SOURCE[0]}")/launch.sh"
MAP="${MAP:-sandwich-top}"
export SIZE=110m KV_LAYERS="${KV_LAYERS:-6}"

if [[ "$MAP" != all ]]; then
  KV_PATTERN="$MAP" exec bash "$LAUNCH" "$@"
fi
for MAP in "${NINE[@]}"; do
  echo "=== ${MAP}: one of ${#NINE[@]} maps"
  KV_PATTERN="$MAP" bash "$LAUNCH" "$@"
done
