"""``load_model(PATH).generate`` and ``kvshare generate``: the tokens that the export's own
``generate`` gives, from a checkpoint and from a folder."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from megatron_kvshare import load_model
from megatron_kvshare.cli.main import main
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.serving.load import open_model
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, exported, write_folder
from tests.serving import prompts_of
from tests.unit.evaluation.conftest import TOP

NEW = 10


@pytest.mark.parametrize("mode", ["trained", "exact"])
def test_tokens_are_those_of_the_export(mode: str, folders) -> None:
    prompts = prompts_of((3, 9, 17), TINY.vocabulary, seed=4)
    model = exported(TOP, TINY.weights(TOP), RECIPES["one-sweep"])
    model.config.kv_prefill = mode
    wanted = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    for kind in ("hf", "native"):
        answers = load_model(folders / kind).generate(
            prompts, kv_prefill=mode, temperature=0, max_tokens=NEW, ignore_eos=True
        )
        assert [answer.tokens for answer in answers] == wanted
        assert {answer.finished for answer in answers} == {"length"}


def test_seeds_make_it_repeatable(folders) -> None:
    model = load_model(folders / "native")
    first, again = (
        model.generate([[1, 2, 3]] * 2, max_tokens=NEW, temperature=5.0, seed=3) for _ in range(2)
    )
    assert [each.tokens for each in first] == [each.tokens for each in again]
    assert first[0].tokens != first[1].tokens, "each prompt has a seed of its own"


def test_what_cannot_be_is_said(folders) -> None:
    model = load_model(folders / "hf")
    with pytest.raises(ConfigError, match="prompts are a list"):
        model.generate("text")
    with pytest.raises(ConfigError, match="unknown"):
        model.generate([[1]], max_new_tokens=3)
    with pytest.raises(ConfigError, match="token ids of this model"):
        model.generate([[1], [2, 400]], max_tokens=3)
    assert model.generate([[1]], max_tokens=2, ignore_eos=True)[0].finished == "length"


@pytest.fixture
def with_text(folders) -> str:
    """A model whose texts are numbers: its tokenizer is megatron-core's NullTokenizer."""
    return str(folders / "native")


GREEDY = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos"]


def test_one_prompt_streams(with_text: str, capfd) -> None:
    (wanted,) = load_model(with_text).generate(
        [[3, 1, 4]], temperature=0, max_tokens=4, ignore_eos=True
    )
    assert main(["generate", "--load", with_text, "--prompt", "3 1 4", *GREEDY]) == 0
    out, err = capfd.readouterr()
    assert out.strip() == " ".join(map(str, [3, 1, 4, *wanted.tokens]))
    assert "4 tokens in" in err


def test_a_file_of_prompts_becomes_json_lines(with_text: str, tmp_path, capfd) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 2"}\n\n{"prompt": "5"}\n')
    output = tmp_path / "answers.jsonl"
    words = ["--prompt-file", str(prompts), "--output", str(output)]
    assert main(["generate", "--load", with_text, *words, *GREEDY]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["1 2", "5"]
    answers = load_model(with_text).generate(
        [[1, 2], [5]], temperature=0, max_tokens=4, ignore_eos=True
    )
    assert [record["tokens"] for record in records] == [answer.tokens for answer in answers]
    assert {record["finish_reason"] for record in records} == {"length"}


def test_what_is_typed_is_answered_line_by_line(with_text: str, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 2\n\n7\n"))
    assert main(["generate", "--load", with_text, "--interactive", *GREEDY]) == 0
    assert len(capfd.readouterr().out.split("\n")) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "prompts come from one place"),
        (["--prompt", "1", "--interactive"], "prompts come from one place"),
        (["--prompt", "1", "--temperature", "-1", "--top-p", "0"], "2 faults"),
        (["--prompt-file", "nowhere.txt"], "No such file"),
        (["--prompt", "1", "--cache-tokens", "1", "--page-size", "8", "--max-tokens", "99"], ""),
    ],
)
def test_what_is_wrong_is_said(words: list[str], said: str, with_text: str, capfd) -> None:
    code = main(["generate", "--load", with_text, *words])
    err = capfd.readouterr().err
    assert code == (2 if said else 0), err
    assert said in err and "Traceback" not in err


def test_lines_without_a_prompt_are_named(with_text: str, tmp_path, capfd) -> None:
    for content in ('{"text": "1"}', "[1]", "{", '{"prompt": 3}', "", "[" * 100_000):
        path = tmp_path / "prompts.jsonl"
        path.write_text(content + "\n")
        assert main(["generate", "--load", with_text, "--prompt-file", str(path)]) == 2
        assert "Traceback" not in capfd.readouterr().err


def test_texts_are_read_as_the_folder_says(tmp_path, single) -> None:
    """``split_special_tokens`` of an export: the name of a special token in a prompt is text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["</s>", "<", "/", "s", ">", "we", "</"]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="we"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    write_folder(tmp_path / "hf", TOP, RECIPES["one-sweep"])
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    settings = tmp_path / "hf" / "tokenizer_config.json"
    for split, wanted in ((False, [5, 0]), (True, [5, 6, 3, 4])):
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": split}
        settings.write_text(json.dumps(content))
        assert open_model(tmp_path / "hf").text().tokenizer.encode("we </s>") == wanted
