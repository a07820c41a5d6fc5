#!/usr/bin/env bash
# 1.1B, pizza-bottom: the first layers own their KV, all later ones read the KV of the last of those.
# 11 of 22 layers keep KV and training costs no more than standard; KV_LAYERS=3 is the aggressive setting.
# Settings from the environment and what happens without a GPU: examples/launch.sh. Arguments are passed on.
set -euo pipefail
export SIZE=1b KV_PATTERN=pizza-bottom KV_LAYERS="${KV_LAYERS:-11}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
