"""Documents packed into one row of an export: each computed as it is alone."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    modeling_flash_attention_utils,
)

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, exported
from tests.parity.cases import all_maps
from tests.parity.test_solvers import TRAINED
from tests.product import assert_close_by_name, random_tokens

LENGTHS = (5, 1, 9, 2)
DOCUMENTS = [random_tokens(TINY.vocabulary, 1, n, seed=n) for n in LENGTHS]
LIMIT = 1e-5
EVERY = 17
"""Of so many pairs of a map and a recipe one is tried by day; 10 recipes and 17 share no factor."""
RECIPES_TRIED = {"paper": RECIPES["paper"], **TRAINED}
STANDARD = build_map(8, "standard")
TOP = build_map(8, "sandwich-top", 3)
WINDOWED = all_maps(8)["mixattention"]
UPWARD_WINDOWED = SharingMap.parse("0s_4_4s_4_4s_0s_7s_7")
SEVERAL = {"standard": STANDARD, "top": TOP, "windowed": WINDOWED, "upward": UPWARD_WINDOWED}


def several_maps() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sharing", SEVERAL.values(), ids=SEVERAL)


def collated(documents: list[torch.Tensor], **returned: bool) -> dict[str, torch.Tensor]:
    collator = DataCollatorWithFlattening(return_tensors="pt", **returned)
    return dict(collator([{"input_ids": each[0]} for each in documents]))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {
        name: torch.zeros_like(x) if x.grad is None else x.grad.clone()
        for name, x in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_packed_is_alone(model, documents=DOCUMENTS, **returned: bool) -> None:
    """The loss, a mean over all tokens but the first of every document, and every gradient."""
    model.train()
    packed = model(**collated(documents, **returned)).loss
    packed.backward()
    got = gradients(model)
    count = sum(each.shape[1] - 1 for each in documents)
    alone = torch.zeros(())
    for each in documents:
        logits = model(each, use_cache=False).logits[0, :-1]
        alone = alone + torch.nn.functional.cross_entropy(logits, each[0, 1:], reduction="sum")
    (alone / count).backward()
    assert packed.item() == pytest.approx((alone / count).item(), rel=1e-6)
    assert_close_by_name(got, gradients(model), LIMIT)


def cases() -> list:
    """Every map with every recipe by night; by day some of each."""
    found: list = []
    for name, sharing in all_maps(8).items():
        recipes = RECIPES_TRIED if sharing.is_cyclic else {"once": RECIPES["paper"]}
        for kind, recipe in recipes.items():
            marks = pytest.mark.nightly if len(found) % EVERY else ()
            found.append(pytest.param(sharing, recipe, id=f"{name}-{kind}", marks=marks))
    return found


@pytest.mark.parametrize(("sharing", "recipe"), cases())
def test_loss_and_gradients_are_those_of_documents_alone(sharing, recipe):
    assert_packed_is_alone(exported(sharing, TINY.weights(sharing), recipe))


@torch.no_grad()
@pytest.mark.parametrize("prefill", ["trained", "converged", "exact"])
@several_maps()
def test_inference(sharing, prefill):
    model = exported(sharing, TINY.weights(sharing), RECIPES["one-sweep"], kv_prefill=prefill)
    packed = model(**collated(DOCUMENTS))
    wanted = torch.cat([model(each).logits for each in DOCUMENTS], dim=1)
    assert (packed.logits - wanted).abs().max() <= LIMIT * wanted.abs().max()
    assert packed.past_key_values is None


def varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, **how):
    """What flash_attn_varlen_func computes, written out: ``[tokens, heads, width]``."""
    assert how["causal"]
    window = how.get("window_size", (-1, -1))[0]
    bounds = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert [bounds[0][-1], bounds[1][-1]] == [len(q), len(k)]
    assert max(b - a for a, b in itertools.pairwise(bounds[0])) <= int(how["max_seqlen_q"])
    parts = []
    for (a, b), (c, d) in zip(*(itertools.pairwise(each) for each in bounds), strict=True):
        ago = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (ago >= 0) & ((ago <= window) | (window < 0))
        key, value = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], key) * how["softmax_scale"]
        weights = scores.masked_fill(~seen, -1e30).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(parts)


def dense_kernel(q, k, v, **how):
    rows = [torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1]) for x in (q, k)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    return varlen_kernel(*flat, *rows, max_seqlen_q=q.shape[1], **how).view_as(q)


@pytest.fixture
def flash():
    """transformers' whole way to a flash kernel, and at its end the kernel written out."""
    utils = modeling_flash_attention_utils
    known = dict.fromkeys(("dropout_p", "window_size", "max_seqlen_q", "max_seqlen_k"), True)
    supported = {"deterministic": False, "s_aux": False, "learnable_sink": False, **known}
    supported |= {"softcap": False, "cache_seqlens": False, "block_table": False}

    def process(**how):
        return utils._process_flash_attention_kwargs(supports_mapping=supported, **how)

    kernels = (dense_kernel, varlen_kernel, None, utils._pad_input, utils._unpad_input)
    found = (kernels, (process, None))
    with mock.patch.object(utils, "lazy_import_flash_attention", return_value=found):
        yield "flash_attention_2"


@pytest.mark.parametrize("recipe", ["paper", "two-sweep"])
@several_maps()
def test_attention_implementations(sharing, recipe, flash):
    """Two rows of several documents each: sdpa's logits and gradients by the others."""
    tokens = random_tokens(TINY.vocabulary, 2, 11, seed=0)
    positions = [torch.arange(n) for n in (5, 1, 5, 3, 1, 1, 6)]
    where = {"position_ids": torch.cat(positions).view(2, 11), "use_cache": False}
    found = {}
    for name in ("sdpa", "eager", *(() if recipe != "paper" and sharing.is_cyclic else (flash,))):
        model = exported(sharing, TINY.weights(sharing), RECIPES[recipe]).train()
        model.config._attn_implementation = name
        logits = model(tokens, **where).logits
        logits.square().mean().backward()
        found[name] = {"logits": logits.detach(), **gradients(model)}
    for name in found:
        assert_close_by_name(found[name], found["sdpa"], LIMIT)


@several_maps()
def test_flash_attention_without_packing(sharing, flash):
    model = exported(sharing, TINY.weights(sharing))
    with torch.no_grad():
        wanted = model(DOCUMENTS[2]).logits
        model.config._attn_implementation = flash
        got = model(DOCUMENTS[2]).logits
    assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max()


def llama() -> LlamaForCausalLM:
    """transformers' Llama with the weights of the standard map."""
    config = exported(STANDARD, TINY.weights(STANDARD)).config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}))
    model.load_state_dict(TINY.weights(STANDARD), strict=False)
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    "returned",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    ],
    ids=["positions", "lengths", "index", "all"],
)
def test_the_standard_map_is_llama(returned):
    batch = {**collated(DOCUMENTS, **returned), "use_cache": False}
    models = [exported(STANDARD, TINY.weights(STANDARD)).train(), llama().train()]
    losses, grads = [], []
    for model in models:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_close_by_name(*grads, LIMIT)


@pytest.mark.parametrize("said", ["seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"])
def test_documents_without_position_ids(said):
    """The same documents told in another way, and positions that begin anew in each."""
    model = exported(TOP, TINY.weights(TOP), RECIPES["one-sweep"])
    batch = collated(DOCUMENTS, return_flash_attn_kwargs=True, return_seq_idx=True)
    ids = batch["input_ids"]
    wanted = model(ids, position_ids=batch["position_ids"]).logits
    assert torch.equal(model(ids, **{said: batch[said]}).logits, wanted)


def test_what_cannot_be_packed_is_refused():
    model = exported(TOP, TINY.weights(TOP), RECIPES["two-sweep"])
    batch = collated(DOCUMENTS, return_flash_attn_kwargs=True, return_seq_idx=True)
    ones = torch.ones_like(batch["input_ids"])
    half = ones.clone()
    half[:, :3] = 0
    wrong = {
        "position_ids.*attention_mask": {"attention_mask": ones},
        "cannot be computed with attention_mask": {"attention_mask": half},
        "a cache": {"past_key_values": DynamicCache()},
        "use_cache=True": {"use_cache": True},
        "seq_idx and position_ids say": {"seq_idx": ones.cumsum(-1).int()},
        "cu_seq_lens_q and position_ids say": {"cu_seq_lens_q": torch.tensor([0, 4, 17])},
        "cu_seq_lens_k must rise from 0 to .* 17": {"cu_seq_lens_k": torch.tensor([0, 5])},
        "max_length_q is 8, a document 9": {"max_length_q": 8},
    }
    for text, change in wrong.items():
        with pytest.raises(ValueError, match=text):
            model(**{**batch, **change})
    packed = model(**batch).logits
    again = model(**{**batch, "max_length_q": 64, "max_length_k": 64}).logits
    assert torch.equal(packed, again)


@torch.no_grad()
@pytest.mark.parametrize("beside", ["mask", "cache", "nothing"])
def test_a_gap_is_what_it_is_for_llama(beside):
    """Positions that step forward: beside a mask or a cache one document, alone two."""
    tokens = random_tokens(TINY.vocabulary, 2, 9, seed=0)
    positions = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 14]).expand(2, -1)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    where = {
        "mask": {"attention_mask": mask, "use_cache": False},
        "cache": {"use_cache": True},
        "nothing": {"use_cache": False},
    }[beside]
    models = exported(STANDARD, TINY.weights(STANDARD)), llama().eval()
    ours, theirs = (model(tokens, position_ids=positions, **where).logits for model in models)
    assert (ours - theirs)[:, 2:].abs().max() <= LIMIT * theirs.abs().max()
