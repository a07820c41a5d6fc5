#!/usr/bin/env bash
# 1.1B, cross-layer attention (CLA, arXiv 2405.12981): every second layer reads the KV of the one below it.
# CLA_GROUP=3 and more share further.
# Settings from the environment and what happens without a GPU: examples/launch.sh. Arguments are passed on.
set -euo pipefail
export SIZE=1b KV_PATTERN="cla:${CLA_GROUP:-2}" KV_LAYERS=
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
