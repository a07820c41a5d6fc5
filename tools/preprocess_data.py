"""Megatron's script name for ``kvshare preprocess``."""

from __future__ import annotations

import sys

from megatron_kvshare.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
