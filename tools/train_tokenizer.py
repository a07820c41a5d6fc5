#!/usr/bin/env python3
"""The same as `kvshare train-tokenizer`: see `--help`."""

from as_script import kvshare

if __name__ == "__main__":
    kvshare("train-tokenizer")
