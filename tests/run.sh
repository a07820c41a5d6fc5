#!/usr/bin/env bash
# Format, lint, types and the default test suite; needs nothing but Python 3.11 or later and bash.
#
#   bash tests/run.sh                      everything a change must pass
#   bash tests/run.sh tests/unit -k map    arguments go to pytest
#   bash tests/run.sh -m nightly           what takes longer; also -m download, slurm, gpu (see pyproject.toml)
#   TEST_PROCESSES=0 bash tests/run.sh     in one process instead of two (for -m gpu, or a debugger)
#   PYTHON=python3.12 bash tests/run.sh    the same on Python 3.12, which brings megatron-core 0.19.2
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 2
PY="$(bash tools/setup_env.sh)" || exit 2

# One thread per process: the tests start several, and oversubscribed cores are slow.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
# Scripts that tests start use this same environment.
export VENV="${VENV:-$(dirname "$(dirname "$PY")")}"

FAILED=()
check() {
  echo "== $1"
  "${@:2}" || FAILED+=("$1")
}
check format "$PY" -m ruff format --check .
check lint "$PY" -m ruff check .
check types "$PY" -m mypy
check tests "$PY" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadgroup "$@"

if [[ ${#FAILED[@]} -gt 0 ]]; then
  echo "FAILED: ${FAILED[*]}"
  exit 1
fi
echo "all checks passed after $SECONDS s"
