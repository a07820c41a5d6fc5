#!/usr/bin/env bash
# Make the embedded corpus ready for training: train a tokenizer on it and tokenise it. Done once, under runs/.
# Prints the folder on stdout: tokenizer.model, corpus_text_document.bin/.idx, summary.txt.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"
VOCAB_SIZE=4096
TEXT=("$HERE"/data/*.jsonl.xz)
FOLDER="$ROOT/runs/corpus-$(cat "${TEXT[@]}" "${BASH_SOURCE[0]}" | cksum | cut -d ' ' -f 1)"

if [[ ! -d "$FOLDER" ]]; then
  PY="$(bash "$ROOT/tools/setup_env.sh")"
  mkdir -p "$ROOT/runs"
  # Built aside and moved at the end: an interrupted run leaves nothing half-made behind.
  BUILD="$(mktemp -d "$ROOT/runs/corpus.XXXXXX")"
  trap 'rm -rf "$BUILD"' EXIT
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  "$PY" -m megatron_kvshare train-tokenizer --input "${TEXT[@]}" --vocab-size "$VOCAB_SIZE" \
    --output "$BUILD/tokenizer" >&2
  "$PY" -m megatron_kvshare preprocess --input "${TEXT[@]}" --output-prefix "$BUILD/corpus" --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$BUILD/tokenizer.model" \
    --workers "$(nproc)" > "$BUILD/summary.txt"
  # Another process may have been faster: its result is the same.
  mv -T "$BUILD" "$FOLDER" 2> /dev/null || [[ -d "$FOLDER" ]]
fi
realpath --relative-base="$PWD" "$FOLDER"
