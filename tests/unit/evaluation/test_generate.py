"""``load_model(PATH).generate`` and ``kvshare generate``: the tokens that the export's own
``generate`` gives, from a checkpoint and from a folder."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare import load_model
from megatron_kvshare.cli.main import main
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, exported, write_folder
from tests.serving import prompts_of

TOP = build_map(8, "sandwich-top", 3)
NEW = 10
NUMBERS = ["--tokenizer-model"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, single):
    root = tmp_path_factory.mktemp("models")
    write_folder(root / "hf", TOP, RECIPES["one-sweep"])
    assert (
        main(["convert", "from-hf", "--hf", str(root / "hf"), "--save", str(root / "native")]) == 0
    )
    return root


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
