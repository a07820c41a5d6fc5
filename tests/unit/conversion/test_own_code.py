"""Code in folders: every version of ours is known and runs from the package, other code only where
the user says so."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kvshare import load_model
from megatron_kvshare.cli.main import main
from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from megatron_kvshare.conversion.own_code import CODE, HERE, foreign_code, is_ours, is_present
from megatron_kvshare.evaluation.lm_eval import TasksJob, _model
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import code_copied_to, write_folder

TOP = build_map(8, "sandwich-top", 3)
Change = Callable[[Path], object]


def history() -> dict[str, bytes]:
    """``file at commit`` -> content, of all commits that changed one of ours."""
    found = {}
    for name in CODE:
        log = ["git", "log", "--format=%h", "--name-only", "--diff-filter=d", "--", f":/*/{name}"]
        done = subprocess.run(log, cwd=HERE, capture_output=True, text=True)
        commit = ""
        for word in done.stdout.split() if done.returncode == 0 else ():
            if "/" not in word:
                commit = word
                continue
            show = ["git", "show", f"{commit}:{word}"]
            found[f"{name} at {commit}"] = subprocess.run(
                show, cwd=HERE, capture_output=True, check=True
            ).stdout
    return found


HISTORY = history()
needs_history = pytest.mark.skipif(not HISTORY, reason="no git history here")


@needs_history
def test_every_version_that_was_ever_exported_is_known(tmp_path: Path) -> None:
    unknown = []
    for title, content in HISTORY.items():
        file = tmp_path / title.partition(" ")[0]
        file.write_bytes(content)
        if not is_ours(file):
            unknown.append(title)
    assert not unknown, "add the SHA-256 of each to _SHIPPED in own_code.py"


def test_the_present_files_need_no_entry(tmp_path: Path) -> None:
    for name in CODE:
        content = (HERE / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        assert is_present(tmp_path / name) and is_ours(tmp_path / name)
        (tmp_path / name).write_bytes(content + b"\n")
        assert not is_ours(tmp_path / name)
        (tmp_path / f"my_{name}").write_bytes(content)
        assert not is_ours(tmp_path / f"my_{name}")
    (tmp_path / CODE[0]).write_bytes((HERE / CODE[1]).read_bytes())
    assert not is_ours(tmp_path / CODE[0])


# Foreign code -----------------------------------------------------------------------------------

TRACE = "executed"


def code(name: str, trace: bool = True) -> Change:
    """Code that leaves a trace beside the folder when it is run, and else does as before."""

    def change(folder: Path) -> None:
        before = (folder / name).read_text() if (folder / name).exists() else ""
        (folder / name).write_text(f"{before}\nopen({str(folder.parent / TRACE)!r}, 'w').close()\n")

    return change


def entry(file: str, key: str, value: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, key: value}))

    return change


MODEL = {"AutoModelForCausalLM": "modeling_mine.Mine"}
FOREIGN: dict[str, tuple[Change, str]] = {
    "changed model": (code("modeling_kvshare.py"), "modeling_kvshare.KVShareForCausalLM"),
    "changed configuration": (code("configuration_kvshare.py"), "configuration_kvshare"),
    "another file": (entry("config.json", "auto_map", MODEL), "modeling_mine.Mine"),
    "a repository": (
        entry("config.json", "auto_map", {"AutoConfig": "them/theirs--configuration_kvshare.C"}),
        "them/theirs--",
    ),
    "a folder of a repository": (
        entry("config.json", "auto_map", {"AutoConfig": "them--x/configuration_kvshare.C"}),
        "them--x/",
    ),
    "a tokenizer": (
        entry("tokenizer_config.json", "auto_map", {"AutoTokenizer": [None, "mine.Mine"]}),
        "tokenizer_config.json: auto_map",
    ),
    "a tokenizer of old": (
        entry("tokenizer_config.json", "auto_map", ["mine.Mine", None]),
        "mine.Mine",
    ),
    "kernels": (entry("config.json", "attn_implementation", "them/kernels"), "them/kernels"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("code") / "hf", TOP, RECIPES["two-sweep"])


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(("change", "says"), FOREIGN.values(), ids=FOREIGN.keys())
def test_tasks_refuse_it_and_nothing_has_run(change, says, hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    assert not foreign_code(hf)
    change(hf)
    assert main(["evaluate", "--hf", str(hf), "--tasks", "local_piqa"]) == 2
    error = capsys.readouterr().err
    assert says in error and "--trust-remote-code" in error and "Traceback" not in error
    assert not (tmp_path / TRACE).exists()


@needs_history
@pytest.mark.parametrize("title", HISTORY)
def test_earlier_exports_run_by_the_code_of_the_package(title, hf, tmp_path, single, capsys):
    (hf / title.partition(" ")[0]).write_bytes(HISTORY[title])
    tokenizer(hf)
    assert not foreign_code(hf)
    made = _model(TasksJob(folder=hf, tasks=()))
    assert type(made["pretrained"]) is KVShareForCausalLM
    assert made["tokenizer"]("ab ab")["input_ids"] == [0, 0]
    assert main(["convert", "from-hf", "--hf", str(hf), "--save", str(tmp_path / "n")]) == 0
    assert "equal bit by bit" in capsys.readouterr().err


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"ab": 0, "cd": 1}, "cd"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    entry("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")(folder)


def test_a_changed_model_is_not_imported(hf, tmp_path, capsys, single):
    code("modeling_kvshare.py")(hf)
    assert main(["convert", "from-hf", "--hf", str(hf), "--save", str(tmp_path / "n")]) == 2
    assert "modeling_kvshare.KVShareForCausalLM" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="is not run"):
        load_model(hf)
    assert not (tmp_path / TRACE).exists()


def test_code_of_a_llama_is_not_run(tmp_path, capsys, single):
    folder = write_folder(tmp_path / "hf", build_map(8, "standard"), auto_map=MODEL)
    code("modeling_mine.py")(folder)
    assert main(["convert", "from-hf", "--hf", str(folder), "--save", str(tmp_path / "n")]) == 0
    assert "names modeling_mine.Mine, which is not run" in capsys.readouterr().out
    assert not (tmp_path / TRACE).exists()


# Tokenizers that are code -----------------------------------------------------------------------


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A tokenizer without tokenizer.json that is code of its folder."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "mine.py").write_text(
        "from transformers import GPT2Tokenizer\n\nclass Mine(GPT2Tokenizer):\n    pass\n"
    )
    code("mine.py")(folder)
    entry("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["mine.Mine", None]})(folder)
    entry("tokenizer_config.json", "tokenizer_class", "Mine")(folder)
    return folder


def test_a_tokenizer_runs_code_only_where_it_is_trusted(slow, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    (tmp_path / "text.txt").write_text("ab")
    words = ["preprocess", "--input", str(tmp_path / "text.txt")]
    words += ["--output-prefix", str(tmp_path / "out")]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(slow)]
    assert main(words) == 2
    assert "mine.Mine" in capsys.readouterr().err
    assert not (tmp_path / TRACE).exists()
    with code_copied_to(tmp_path / "modules"):
        assert main([*words, "--trust-remote-code"]) == 0
    assert (tmp_path / TRACE).exists()
    assert "1 documents, 1 tokens" in capsys.readouterr().out
