#!/usr/bin/env python3
"""Megatron's script name for `kvshare data merge`: see `--help`."""

from as_script import kvshare

if __name__ == "__main__":
    kvshare("data", "merge")
