#!/usr/bin/env bash
# 1.1B, sandwich-top: the first and last layers own their KV, the block between them reads its top layer's.
# 11 of 22 layers keep KV; KV_LAYERS=3 is the aggressive setting.
# Settings from the environment and what happens without a GPU: examples/launch.sh. Arguments are passed on.
set -euo pipefail
export SIZE=1b KV_PATTERN=sandwich-top KV_LAYERS="${KV_LAYERS:-11}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
