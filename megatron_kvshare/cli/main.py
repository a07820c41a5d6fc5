"""The command ``kvshare``: runs a subcommand and turns user errors into plain messages.

Subcommands are imported when they are called, so ``kvshare --help`` needs no torch and is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from megatron_kvshare import __version__
from megatron_kvshare.errors import EXIT_USER_ERROR, ConfigError, Fault, KVShareError
from megatron_kvshare.output import drop_unwritten

EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT
EXIT_BROKEN_PIPE = 141  # what a shell reports for SIGPIPE


class Subcommand(NamedTuple):
    """A subcommand: the module with ``run(argv) -> exit code`` and one line of help."""

    module: str
    help: str


COMMANDS = {
    "plan": Subcommand("plan", "draw a sharing map and print what it costs; needs no GPU"),
    "doctor": Subcommand(
        "doctor", "what is installed, what is missing, and the next step for each"
    ),
    "train-tokenizer": Subcommand(
        "train_tokenizer", "train a SentencePiece or Hugging Face tokenizer on your text"
    ),
    "preprocess": Subcommand(
        "preprocess", "turn jsonl or plain text into Megatron .bin/.idx files"
    ),
    "data": Subcommand("data", "merge, split, shuffle, inspect and index token files"),
    "pretrain": Subcommand(
        "pretrain", "train a model; the same command on a laptop and on a cluster"
    ),
    "convert": Subcommand(
        "convert", "to-hf and from-hf: checkpoints to and from Hugging Face folders"
    ),
    "evaluate": Subcommand("evaluate", "perplexity, the gap to exact evaluation, lm-eval tasks"),
    "generate": Subcommand("generate", "continue texts with a model; any map, any checkpoint"),
    "serve": Subcommand("serve", "OpenAI's HTTP interface to a model, with batching"),
    "bench": Subcommand("bench", "what a map saves when serving: batch, speed, and their bounds"),
    "verify": Subcommand(
        "verify", "whether a checkpoint and a Hugging Face folder are the same model"
    ),
}

EXAMPLES = """\
A first tour (every command explains its flags with --help):
  kvshare doctor
  kvshare plan --num-layers 22 --kv-pattern sandwich-top --kv-layers 11
  kvshare train-tokenizer --input my.jsonl --vocab-size 4096 --output runs/tok
  kvshare preprocess --input my.jsonl --output-prefix runs/my --append-eod \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/tok.model
  kvshare pretrain --config my.yaml --kv-pattern sandwich-top --kv-layers 11 --dry-run
  torchrun --nproc_per_node 8 -m megatron_kvshare pretrain --config my.yaml
  kvshare convert to-hf --load runs/my/checkpoint --save runs/my/hf

Flags keep Megatron's names and a YAML file takes the same keys. Ready runs are in examples/."""


def overview() -> str:
    """Return the text of ``kvshare --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "kvshare: pretrain transformers whose layers share keys and values.",
            "",
            "usage: kvshare COMMAND [flags]     kvshare COMMAND --help     kvshare --version",
            "",
            "Commands:",
            *lines,
            "",
            EXAMPLES,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see :mod:`megatron_kvshare.errors`): 0, or for
    example 2 when the user has something to fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        _flush()
        return code
    except KVShareError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("kvshare: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python flushes stdout again at exit: give it a place to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def entry() -> None:
    """Console entry point; also what ``python -m megatron_kvshare`` calls."""
    sys.exit(main())


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(overview(), file=sys.stderr)
        return EXIT_USER_ERROR
    if arguments[0].startswith("--local_rank=") and arguments[1:]:
        arguments = arguments[1:]  # DeepSpeed's launcher writes it first; LOCAL_RANK says the same
    name, rest = arguments[0], arguments[1:]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
        return 0
    if name in ("--version", "-V"):
        print(f"megatron_kvshare {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(_unknown_command(name))
    return _load(name).run(rest)


def _flush() -> None:
    """What a command has printed is its result: one that a full disk swallows is no success."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_unwritten(sys.stdout)
        rule, fix = f"it cannot be written: {error.strerror}", "send it somewhere else"
        raise KVShareError(Fault("standard output", None, rule, fix)) from error


def _unknown_command(name: str) -> Fault:
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    fix = f"use `kvshare {near[0]}`" if near else "see `kvshare --help`"
    return Fault("command", name, f"the commands are {', '.join(COMMANDS)}", fix)


def _load(name: str):
    try:
        return importlib.import_module(f"megatron_kvshare.cli.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "megatron_kvshare"):
            raise
        rule = f"`kvshare {name}` needs the package {missing}, which is not installed"
        fix = "run `bash tools/setup_env.sh`, or see `kvshare doctor`"
        raise ConfigError(Fault("environment", sys.executable, rule, fix)) from error


def _print_error(error: KVShareError) -> None:
    """Print the message once per run: every rank meets the same configuration error."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(error, file=sys.stderr)
    elif not isinstance(error, ConfigError):
        print(f"[rank {rank}] {error}", file=sys.stderr)
