#!/usr/bin/env bash
# 1.1B, every layer with its own KV: the baseline the shared maps are compared with.
# Settings from the environment and what happens without a GPU: examples/launch.sh. Arguments are passed on.
set -euo pipefail
export SIZE=1b KV_PATTERN=standard KV_LAYERS=
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
