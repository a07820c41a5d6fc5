"""``python -m megatron_kvshare`` is the command ``kvshare``: torchrun starts it with ``-m``.

The guard matters: megatron-core's checkpoint writers start processes that re-import this module.
"""

from __future__ import annotations

from megatron_kvshare.cli.main import entry

if __name__ == "__main__":
    entry()
