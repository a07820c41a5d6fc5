"""torchrun that ends with the exit code of the process that ended first, instead of always 1.

A scheduler has to know whether a job was stopped after saving (75), is lost (69), has diverged (3)
or has to be corrected (2): see megatron_kvshare/errors.py. Takes the arguments of torchrun.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron_kvshare.errors import EXIT_DIVERGED, EXIT_STOPPED, EXIT_USER_ERROR


def torchrun() -> int:
    """Run; as a shell does, count a process that died of signal N as 128 + N."""
    try:
        main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode not in (EXIT_DIVERGED, EXIT_STOPPED, EXIT_USER_ERROR):
            print(error, file=sys.stderr)
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(torchrun())
