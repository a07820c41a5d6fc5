#!/usr/bin/env bash
# What sharing saves when a 1.1B model generates on one GPU: the standard map beside maps with half of the KV layers and
# with three, at 5+2043, 512+1024 and 2048+2048 tokens, with all memory that is free. Weights are random.
#   bash examples/bench_1b.sh
#   bash examples/bench_1b.sh --cache-gb 3.6 --lengths 5+2043 --kv-pattern sandwich-top     a budget; arguments win
# OUTPUT: folder for bench.json and figures (default: runs/bench_1b). Three minutes at most: --budget.
# Without a GPU a tiny model runs at short lengths, to see that everything works.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
PY="$(bash "$ROOT/tools/setup_env.sh")"

FLAGS=(--kv-pattern pizza-bottom sandwich-top --budget 180 --output "${OUTPUT:-runs/bench_1b}")
GPUS=0
if [[ -e /dev/nvidiactl ]] || command -v nvidia-smi > /dev/null; then
  GPUS="$("$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
fi
if [[ "$GPUS" -gt 0 ]]; then
  FLAGS+=(--shape 1b --bf16 --kv-layers 11 3 --lengths 5+2043 512+1024 2048+2048 --prefill-tokens 8192 --page-size 128)
else
  echo "bench_1b: no GPU here: a tiny model at short lengths instead of 1.1B" >&2
  FLAGS+=(--num-layers 6 --hidden-size 64 --ffn-hidden-size 176 --vocab-size 512 --kv-layers 3 2)
  FLAGS+=(--lengths 5+27 16+32 --cache-gb 0.002 --page-size 16 --decode-steps 4)
fi
exec "$PY" -m megatron_kvshare bench "${FLAGS[@]}" "$@"
