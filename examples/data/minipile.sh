#!/usr/bin/env bash
# MiniPile and what looks like it: a few Parquet files for each split, with a column `text`:
#
#   FOLDER/data/train-00000-of-00012-....parquet ...   FOLDER/data/validation-00000-of-00001-....parquet
#
#   bash examples/data/minipile.sh FOLDER TOKENIZER OUTPUT [flags of `kvshare preprocess`]
#
# makes OUTPUT_train_text_document and OUTPUT_validation_text_document.
set -euo pipefail
: "${3:?usage: bash $0 FOLDER TOKENIZER OUTPUT [flags]}"
FOLDER="$1" TOKENIZER="$2" OUTPUT="$3"
shift 3
for PART in train validation; do
  bash "$(dirname "${BASH_SOURCE[0]}")/prepare.sh" "$TOKENIZER" "${OUTPUT}_$PART" "$FOLDER/data/$PART-*.parquet" -- "$@"
done
