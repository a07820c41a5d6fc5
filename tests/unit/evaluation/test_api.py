"""``load_model``: the same logits from a native checkpoint and from a Hugging Face folder."""

from __future__ import annotations

import pytest
import torch

from megatron_kvshare import load_model
from megatron_kvshare.errors import CheckpointError, ConfigError
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, exported, write_folder
from tests.product import random_tokens
from tests.unit.evaluation.conftest import TOP

LENGTH = 19


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(TINY.vocabulary, 2, LENGTH, seed=3)


@pytest.mark.parametrize("kind", ["hf", "native", "native/iter_0000000"])
def test_sweeps_and_exact(kind, folders, tokens):
    model = load_model(folders / kind)
    weights = TINY.weights(TOP)
    swept = model.logits(tokens)
    assert swept.shape == (2, LENGTH, TINY.vocabulary) and swept.dtype == torch.float32
    wanted = exported(TOP, weights, RECIPES["one-sweep"])(tokens).logits
    assert (swept - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    exact = model.logits(tokens, mode="exact")
    wanted = TINY.oracle(TOP, weights).token_by_token(tokens)
    assert (exact - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (exact - swept).abs().max() > 1e-3


def test_a_later_token_changes_no_earlier_logit(folders, tokens):
    model = load_model(folders / "native")
    other = tokens.clone()
    other[:, 9] += 1 - 2 * (other[:, 9] > 0).long()
    for mode in ("sweeps", "exact"):
        before, after = (model.logits(x, mode=mode) for x in (tokens, other))
        assert torch.equal(before[:, :9], after[:, :9]) or mode == "exact"
        assert (before[:, :9] - after[:, :9]).abs().max() <= 1e-5


@pytest.mark.parametrize("recipe", ["paper", "two-sweep", "one-sweep"])
def test_texts_shorter_than_the_stride(recipe, tokens, tmp_path, single):
    model = load_model(write_folder(tmp_path / "hf", TOP, RECIPES[recipe]))
    other = exported(TOP, TINY.weights(TOP), RECIPES[recipe])
    for length in (1, 2, 3, 5):
        wanted = other(tokens[:, :length]).logits
        for mode in ("sweeps", "exact"):
            got = model.logits(tokens[:, :length], mode=mode)
            if mode == "sweeps" or length == 1:
                assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


WRONG = {
    "shape": (torch.tensor([1, 2]), "sweeps", r"\[batch, seq\]"),
    "floats": (torch.ones(1, 2), "sweeps", "whole numbers"),
    "too large": (torch.tensor([[40]]), "sweeps", "0 to 39"),
    "negative": (torch.tensor([[-1]]), "sweeps", "0 to 39"),
    "empty": (torch.empty(1, 0, dtype=torch.long), "sweeps", "at least one"),
    "mode": (torch.tensor([[1]]), "fast", "sweeps .* exact"),
}


@pytest.mark.parametrize(("token_ids", "mode", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tokens(token_ids, mode, says, folders):
    model = load_model(folders / "native")
    with pytest.raises(ConfigError, match=says):
        model.logits(token_ids, mode=mode)


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_model(tmp_path / "missing")
