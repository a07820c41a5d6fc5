#!/usr/bin/env python3
"""The same as `kvshare evaluate`: see `--help`."""

from as_script import kvshare

if __name__ == "__main__":
    kvshare("evaluate")
