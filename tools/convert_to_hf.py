#!/usr/bin/env python3
"""The same as `kvshare convert to-hf`: see `--help`."""

from __future__ import annotations

import sys

from megatron_kvshare.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
