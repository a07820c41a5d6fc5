#!/usr/bin/env bash
# 1.1B, YOCO (arXiv 2405.05254): the lower half owns its KV in sliding windows, the upper half reads one layer's.
# WINDOW_SIZE (tokens) is half the sequence when left out.
# Settings from the environment and what happens without a GPU: examples/launch.sh. Arguments are passed on.
set -euo pipefail
export SIZE=1b KV_PATTERN=yoco KV_LAYERS=
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
