#!/usr/bin/env bash
# SlimPajama and what looks like it: JSON lines in Zstandard, tens of thousands of shards in folders:
#
#   FOLDER/train/chunk1/example_train_0.jsonl.zst ...   FOLDER/validation/chunk1/example_holdout_0.jsonl.zst ...
#
#   bash examples/data/slimpajama.sh FOLDER TOKENIZER OUTPUT [flags of `kvshare preprocess`]
#
# makes OUTPUT_train_text_document and OUTPUT_validation_text_document. Damaged records are left out and counted.
set -euo pipefail
: "${3:?usage: bash $0 FOLDER TOKENIZER OUTPUT [flags]}"
FOLDER="$1" TOKENIZER="$2" OUTPUT="$3"
shift 3
for PART in train validation; do
  bash "$(dirname "${BASH_SOURCE[0]}")/prepare.sh" "$TOKENIZER" "${OUTPUT}_$PART" "$FOLDER/$PART" -- \
    --on-bad-record skip "$@"
done
