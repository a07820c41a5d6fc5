"""The script form of ``kvshare train-tokenizer``."""

from __future__ import annotations

import sys

from megatron_kvshare.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
