#!/usr/bin/env bash
# Make the virtual environment that everything here runs in. Safe to call again: nothing happens when it is
# up to date. Prints the path of its Python on stdout, and what it is doing on stderr:
#
#   PY="$(bash tools/setup_env.sh)"
#
# From the environment:
#   PYTHON=python3.12   the Python to build on (>= 3.11); it gets an environment of its own, .venv-py312
#   VENV=FOLDER         where the environment goes (default: .venv at the repository root)
#   TORCH_INDEX_URL=URL take torch from this package index instead of the default one
#   SKIP_SETUP=1        install nothing, use the Python on PATH as it is (containers that bring torch)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CONSTRAINTS="$ROOT/constraints.txt"

say() { echo "setup: $*" >&2; }
fail() { echo "setup error: $*" >&2; exit 2; }

# "3.11" for a Python that runs and is new enough, nothing otherwise.
usable_version() {
  "$1" -c 'import sys; v = sys.version_info; print("%d.%d" % v[:2]) if v >= (3, 11) else None' 2>/dev/null
}

# pyenv puts a python3.12 on PATH that only works when that version is switched on: look behind it.
pyenv_python() {
  local found
  for found in "${PYENV_ROOT:-$HOME/.pyenv}/versions/${1#python}".*/bin/"$1"; do
    if [[ -x "$found" ]]; then echo "$found"; return; fi
  done
}

find_python() {
  local name candidate
  for name in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    for candidate in "$name" "$(pyenv_python "$name")"; do
      if [[ -n "$candidate" && -n "$(usable_version "$candidate")" ]]; then
        echo "$candidate"
        return
      fi
    done
  done
}

if [[ -n "${SKIP_SETUP:-}" ]]; then
  command -v "${PYTHON:-python3}" || fail "SKIP_SETUP is set, but there is no ${PYTHON:-python3} on PATH"
  exit 0
fi

BASE_PYTHON="$(find_python)"
if [[ -z "$BASE_PYTHON" ]]; then
  fail "no usable Python 3.11 or later among: ${PYTHON:-python3 python3.12 python3.11 python3.13}." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash $0"
fi
VERSION="$(usable_version "$BASE_PYTHON")"
if [[ -z "${VENV:-}" ]]; then
  if [[ -n "${PYTHON:-}" ]]; then VENV="$ROOT/.venv-py${VERSION/./}"; else VENV="$ROOT/.venv"; fi
fi
# Everything the environment depends on: when one of these changes, it is brought up to date.
WANTED="$(cat "$CONSTRAINTS" "$ROOT/setup.py" | cksum) python $VERSION at $ROOT"
up_to_date() { [[ -x "$VENV/bin/python" && "$(cat "$VENV/kvshare.stamp" 2>/dev/null)" == "$WANTED" ]]; }

install() {
  if [[ "$(usable_version "$VENV/bin/python")" != "$VERSION" ]]; then
    say "making $VENV with Python $VERSION ($BASE_PYTHON)"
    "$BASE_PYTHON" -m venv --clear "$VENV" \
      || fail "could not make $VENV. On Debian and Ubuntu the package python3-venv is needed"
  fi
  local pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check -c "$CONSTRAINTS")
  local again="The message is above. It is safe to run this again"
  if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
    say "installing torch from $TORCH_INDEX_URL"
    "${pip[@]}" --no-deps --index-url "$TORCH_INDEX_URL" torch >&2 \
      || fail "torch could not be installed from TORCH_INDEX_URL=$TORCH_INDEX_URL. $again"
  fi
  say "installing torch, megatron-core and the other packages: one to three minutes"
  # Byte-compiling everything up front would take as long as the rest together.
  cd "$ROOT"
  DS_BUILD_OPS=0 "${pip[@]}" --no-compile -e ".[all]" >&2 \
    || fail "the packages could not be installed. $again"
  echo "$WANTED" > "$VENV/kvshare.stamp"
  say "ready after $SECONDS s"
}

if ! up_to_date; then
  # One at a time: two commands may be started together on a fresh clone.
  exec 9> "$VENV.lock"
  if command -v flock > /dev/null; then flock 9; fi
  if ! up_to_date; then
    install
  fi
fi
echo "$VENV/bin/python"
