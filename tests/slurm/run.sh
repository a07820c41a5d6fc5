#!/usr/bin/env bash
# The tests marked slurm, on a cluster that is started for them and stopped afterwards; needs root on Debian or Ubuntu.
# Arguments go to pytest. On a cluster that is already there: bash tests/run.sh -m slurm --basetemp=FOLDER_ALL_NODES_SEE
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$HERE/../.."
PY="$(bash tools/setup_env.sh)"
trap 'bash "$HERE/cluster/down.sh" --purge' EXIT
ENVIRONMENT="$(bash "$HERE/cluster/up.sh")"
# shellcheck source=/dev/null
. "$ENVIRONMENT"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$PY" -m pytest -n 0 -m slurm tests/slurm "$@"
