#!/usr/bin/env bash
# FineWeb-Edu and what looks like it: a data set of the hub, downloaded to a folder as it is there:
#
#   FOLDER/README.md   FOLDER/sample/10BT/000_00000.parquet ...   FOLDER/data/CC-MAIN-2024-10/train-00000-of-....parquet
#
#   bash examples/data/fineweb_edu.sh FOLDER/sample/10BT TOKENIZER OUTPUT [flags of `kvshare preprocess`]
#
# makes OUTPUT_text_document. In place of the folder its name on the hub (OWNER/NAME) is streamed, then with
# --dataset-config sample-10BT, and --revision for another commit than the newest.
set -euo pipefail
: "${3:?usage: bash $0 FOLDER TOKENIZER OUTPUT [flags]}"
FOLDER="$1" TOKENIZER="$2" OUTPUT="$3"
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/prepare.sh" "$TOKENIZER" "$OUTPUT" "$FOLDER" -- "$@"
