#!/usr/bin/env python3
"""The same as `kvshare convert to-hf`: see `--help`."""

from as_script import kvshare

if __name__ == "__main__":
    kvshare("convert", "to-hf")
