"""Commands that have commands of their own: ``kvshare data merge``, ``kvshare convert to-hf``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_kvshare.errors import ConfigError, Fault


def dispatch(
    prog: str,
    kind: str,
    commands: Mapping[str, Callable[[Sequence[str]], int]],
    examples: str,
    argv: Sequence[str],
) -> int:
    """Run the one that the first argument names, or show what there is; ``kind``: what they are
    called.

    Raises:
        ConfigError: there is no such command, or none is named.
    """
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if argv and argv[0] in ("--help", "-h"):
        print(f"usage: {prog} {'|'.join(commands)} [flags]\n\nExamples:\n{examples}")
        print(f"\nEach {kind} explains its flags with --help.")
        return 0
    given = argv[0] if argv else None
    fix = f"write one of: {', '.join(f'`{prog} {name} ...`' for name in commands)}"
    raise ConfigError(Fault(prog, given, f"the {kind}s are {', '.join(commands)}", fix))
