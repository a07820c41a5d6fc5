"""The dispatcher: light, helpful, and never a traceback for what a user can put right."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from megatron_kvshare import __version__
from megatron_kvshare.cli import main as cli
from megatron_kvshare.errors import DataError, Fault
from tests.distributed.world import PATIENCE_SECONDS

FAULT = Fault("--data-path", "x", "there is no file x.idx", "name one")


class Raising:
    """Stands for a subcommand's module whose run() raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self, argv: list[str]) -> int:
        raise self.error


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and command.help in shown for name, command in cli.COMMANDS.items())


def test_help_is_light():
    code = (
        "import sys; from megatron_kvshare.cli.main import main; main(['--help']);"
        "print(sorted({'torch', 'megatron', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    assert run_python(code).stdout.endswith("[]\n")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_the_flag_that_deepspeeds_launcher_writes_first_is_taken(capsys):
    assert cli.main(["--local_rank=1", "--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert cli.main(["--local_rank=1"]) == 2


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "pretrain --lr 1"),
        ({"LOCAL_WORLD_SIZE": "1"}, "pretrain --lr 1"),
        ({"LOCAL_WORLD_SIZE": "4"}, "--nproc_per_node 4 -m megatron_kvshare pretrain --lr 1"),
        ({"LOCAL_SIZE": "4"}, "--num_gpus 4 --module megatron_kvshare pretrain --lr 1"),
    ],
)
def test_a_run_is_started_again_by_its_launcher(environ, words, monkeypatch):
    from megatron_kvshare.cli.pretrain import _command

    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert " ".join(_command(["--lr", "1"])).endswith(words)


def test_no_command_is_a_user_error(capsys):
    assert cli.main([]) == 2
    assert "usage: kvshare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pretrian", "pretrain"), ("tokenizer", "train-tokenizer"), ("plans", "plan")],
)
def test_unknown_command_gets_the_nearest(typed, meant, capsys):
    assert cli.main([typed]) == 2
    assert f"`kvshare {meant}`" in capsys.readouterr().err


def test_unknown_command_without_a_near_one(capsys):
    assert cli.main(["xyzzy"]) == 2
    assert "kvshare --help" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_run(name):
    module = importlib.import_module(f"megatron_kvshare.cli.{cli.COMMANDS[name].module}")
    assert callable(module.run)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError(FAULT), 2, "data error: --data-path = 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_stops_a_command_is_told_plainly(error, code, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda name: Raising(error))
    assert cli.main(["plan"]) == code
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda name: Raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


def test_a_missing_package_is_named(monkeypatch, capsys):
    def no_rich(module: str):
        raise ModuleNotFoundError("No module named 'rich'", name="rich.table")

    monkeypatch.setattr(cli.importlib, "import_module", no_rich)
    assert cli.main(["plan"]) == 2
    shown = capsys.readouterr().err
    assert "package rich" in shown and "setup_env.sh" in shown


def test_other_ranks_are_silent_about_configuration(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["nonsense"]) == 2
    assert not capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = f"set -o pipefail; {sys.executable} -m megatron_kvshare --help | true"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode in (0, cli.EXIT_BROKEN_PIPE)
    assert not done.stderr


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_kvshare", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert __version__ in done.stdout
