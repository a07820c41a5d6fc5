#!/usr/bin/env python3
"""The same as `kvshare evaluate`: see `--help`."""

from __future__ import annotations

import sys

from megatron_kvshare.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
