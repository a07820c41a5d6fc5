#!/usr/bin/env bash
# What the recipes beside this file share: one part of a corpus to token files. A recipe calls it as
#
#   prepare.sh TOKENIZER OUTPUT_PREFIX INPUT... -- FLAGS...
#
# TOKENIZER: a SentencePiece .model, a .tiktoken file, or a tokenizer.json or its folder (Hugging Face).
# WORKERS (default: all cores) tokenize. A run that was stopped or killed goes on when it is started again.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
TOKENIZER="$1" OUTPUT="$2"
shift 2
INPUT=()
while [[ "$1" != "--" ]]; do INPUT+=("$1"); shift; done
shift
case "$TOKENIZER" in
  *.model) KIND=SentencePieceTokenizer ;;
  *.tiktoken) KIND=TikTokenizer ;;
  *) KIND=HuggingFaceTokenizer ;;
esac
PY="$(bash "$ROOT/tools/setup_env.sh")"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PY" -m megatron_kvshare preprocess --input "${INPUT[@]}" --output-prefix "$OUTPUT" --append-eod \
  --tokenizer-type "$KIND" --tokenizer-model "$TOKENIZER" --workers "${WORKERS:-$(nproc)}" "$@"
