"""The modelling file that exports carry: the native model in logits, loss and every gradient, and
transformers' way to generate."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import CONVERGED_PREFILL, RECIPES, exact_plan, solver_plan
from tests.huggingface import TINY, exported
from tests.parity.cases import all_maps, one_of_each_pattern
from tests.parity.test_solvers import TRAINED, logits_of, model_with
from tests.product import (
    assert_close_by_name,
    gather_by_name,
    random_tokens,
)
from tests.recipes import jacobi

LENGTH = 13
LIMIT = 1e-5
TOP = build_map(8, "sandwich-top", 3)
SEVERAL = all_maps(8)["random.1"]
BOTTOM = build_map(8, "pizza-bottom", 3)
WINDOWED = all_maps(8)["mixattention"]
GENERATING = {"top": TOP, "several": SEVERAL, "bottom": BOTTOM, "windowed": WINDOWED}


def generating() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sharing", GENERATING.values(), ids=GENERATING.keys())


def assert_logits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max()


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(TINY.vocabulary, 2, LENGTH, seed=0)


def cases() -> list:
    """Every kind of map, each with the published recipe and one of the others in turn."""
    others = itertools.cycle(TRAINED.items())
    found = []
    for name, sharing in all_maps(8).items():
        if name.endswith((".l2", ".l5")):
            continue
        found.append(pytest.param(sharing, RECIPES["paper"], id=name))
        if sharing.is_cyclic:
            kind, recipe = next(others)
            found.append(pytest.param(sharing, recipe, id=f"{name}-{kind}"))
    return found


@pytest.mark.parametrize(("sharing", "recipe"), cases())
def test_logits_and_gradients_are_those_of_the_native_model(sharing, recipe, single, tokens):
    native, weights = model_with(TINY, sharing, single)
    plan = solver_plan(sharing, recipe)
    labels = random_tokens(TINY.vocabulary, 2, LENGTH, seed=1)
    (native(tokens, labels, plan=plan).loss / labels.numel()).backward()
    model = exported(sharing, weights, recipe).train()
    logits = model(tokens).logits
    assert_logits(logits.detach(), logits_of(native, tokens, plan))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    wanted = gather_by_name([native], single, "grad")
    mine = dict(model.named_parameters())
    # What no gradient reaches is zero there and None here.
    got = {
        name: torch.zeros_like(x) if mine[name].grad is None else mine[name].grad
        for name, x in wanted.items()
    }
    assert_close_by_name(got, wanted, LIMIT)


def token_by_token(model, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    cache, steps = DynamicCache(), []
    for step in tokens.split(1, dim=1):
        output = model(step, past_key_values=cache, use_cache=True, **kwargs)
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


@torch.no_grad()
@one_of_each_pattern()
def test_enough_passes_equal_generation_with_a_cache(sharing, tokens):
    weights = TINY.weights(sharing)
    exact = token_by_token(exported(sharing, weights), tokens)
    enough = exported(sharing, weights, jacobi(LENGTH - 1, 1))
    assert_logits(enough(tokens).logits, exact)
    assert_logits(exported(sharing, weights, kv_prefill="exact")(tokens).logits, exact)


@torch.no_grad()
@generating()
def test_the_cache_holds_the_layers_that_own_keys_and_values(sharing, tokens):
    model = exported(sharing, TINY.weights(sharing))
    cache = model(tokens, use_cache=True).past_key_values
    kept = [layer for layer in cache.layers if layer.get_seq_length()]
    assert len(kept) == len(sharing.producers)
    assert all(layer.keys.shape == (2, TINY.kv_heads, LENGTH, 8) for layer in kept)


@torch.no_grad()
@generating()
def test_a_prompt_in_two_parts(sharing, tokens):
    """Exact sweeps give the same whether the cache is empty or holds the start already."""
    model = exported(sharing, TINY.weights(sharing), kv_prefill="exact")
    whole = model(tokens).logits
    cache = DynamicCache()
    parts = [
        model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(7, 1)
    ]
    assert_logits(torch.cat(parts, dim=1), whole)


@torch.no_grad()
@pytest.mark.parametrize("prefill", ["converged", "exact"])
@pytest.mark.parametrize("sharing", [TOP, SEVERAL], ids=["top", "several"])
def test_prefill_is_the_native_plan(prefill, sharing, single, tokens):
    native, weights = model_with(TINY, sharing, single)
    trained = RECIPES["one-sweep"]
    plan = exact_plan(sharing, LENGTH, 1e-6)
    if prefill == "converged":
        plan = solver_plan(sharing, CONVERGED_PREFILL.for_length(LENGTH))
    model = exported(sharing, weights, trained, kv_prefill=prefill)
    assert_logits(model(tokens).logits, logits_of(native, tokens, plan))


GREEDY = {"max_new_tokens": 6, "do_sample": False}
WAYS = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3},
    "sampling": {"max_new_tokens": 6, "do_sample": True, "top_k": 5},
}


def batches() -> list:
    """Every map greedily and by beams; sampling is transformers' own, one map will do."""
    found = itertools.product(GENERATING, ("paper", "two-sweep"), ("greedy", "beams"))
    found = [*found, ("top", "paper", "sampling"), ("top", "two-sweep", "sampling")]
    return [pytest.param(GENERATING[m], r, WAYS[w], id=f"{m}-{r}-{w}") for m, r, w in found]


@pytest.mark.parametrize(("sharing", "recipe", "way"), batches())
def test_a_left_padded_batch_generates_what_each_row_does_alone(sharing, recipe, way):
    model = exported(sharing, TINY.weights(sharing), RECIPES[recipe])
    rows = [random_tokens(TINY.vocabulary, 1, length, seed=length) for length in (5, 9, 1)]
    longest = max(row.shape[1] for row in rows)
    pads = [longest - row.shape[1] for row in rows]
    padded = torch.cat(
        [torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)]
    )
    mask = torch.stack([torch.arange(longest) >= pad for pad in pads]).long()
    settings = {**way, "pad_token_id": 0}
    alone = []
    for row in rows:
        torch.manual_seed(0)
        alone.append(model.generate(row, attention_mask=torch.ones_like(row), **settings))
    if way.get("do_sample"):  # rows of a batch draw one after another: only the first is the same
        rows, pads, alone = rows[:1], pads[:1], alone[:1]
        padded, mask = padded[:1], mask[:1]
    torch.manual_seed(0)
    together = model.generate(padded, attention_mask=mask, **settings)
    for row, pad, own in zip(together, pads, alone, strict=True):
        assert torch.equal(row[pad : pad + own.shape[1]], own[0])


@torch.no_grad()
@generating()
def test_other_ways_to_ask_for_the_same_text(sharing, tokens):
    """Drafts to check, a prompt in parts, as embeddings or with its start in a cache."""
    model = exported(sharing, TINY.weights(sharing), RECIPES["one-sweep"], kv_prefill="exact")
    prompt, settings = tokens[:1, :7], {**GREEDY, "pad_token_id": 0}
    wanted = model.generate(prompt, **settings)
    embeddings = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), wanted[:, 7:])
    started = DynamicCache()
    model(prompt[:, :4], past_key_values=started)
    ways = (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": model},
        {"prefill_chunk_size": 3},
        {"past_key_values": started},
        {"use_cache": False},
        {"position_ids": torch.arange(7)[None]},
    )
    for way in ways:
        assert torch.equal(model.generate(prompt, **way, **settings), wanted), way


def test_drafts_are_refused_where_checking_them_is_not_exact(tokens):
    model = exported(TOP, TINY.weights(TOP), RECIPES["one-sweep"])
    with pytest.raises(ValueError, match="needs kv_prefill='exact'"):
        model.generate(tokens[:1], prompt_lookup_num_tokens=3, **GREEDY)


def test_a_larger_vocabulary(tokens):
    model = exported(TOP, TINY.weights(TOP), RECIPES["one-sweep"])
    before = model(tokens, labels=tokens)
    model.resize_token_embeddings(TINY.vocabulary + 8, mean_resizing=False)
    after = model(tokens, labels=tokens)
    assert after.logits.shape[-1] == TINY.vocabulary + 8
    assert torch.equal(after.logits[..., : TINY.vocabulary], before.logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(tokens + 8, labels=tokens + 8).loss.isfinite()


def test_padding_on_either_side_changes_no_logit(tokens):
    model = exported(TOP, TINY.weights(TOP), RECIPES["two-sweep"])
    alone = model(tokens[:1, :8]).logits
    for left in (0, 3, 5):
        row = torch.nn.functional.pad(tokens[:1, :8], (left, 5 - left))
        mask = torch.nn.functional.pad(torch.ones(1, 8, dtype=torch.long), (left, 5 - left))
        assert_logits(model(row, attention_mask=mask).logits[:, left : left + 8], alone)


def _causal_kernel(module, query, key, value, attention_mask, scaling, **more):
    """What flash kernels compute, written out: the last query sees the last key, then a window; of
    a padding mask the columns that are 0 are unseen. More than that they cannot be told."""
    assert attention_mask is None or attention_mask.dim() == 2
    queries, keys = query.shape[2], key.shape[2]
    assert queries <= keys
    ago = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = ago >= 0
    if more.get("sliding_window") is not None:
        seen = seen & (ago < more["sliding_window"])
    seen = seen[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, -keys:]
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("implementation", ["eager", "flash_like_for_tests"])
@generating()
def test_attention_implementations_agree(sharing, implementation, tokens):
    AttentionInterface.register("flash_like_for_tests", _causal_kernel)
    weights = TINY.weights(sharing)
    models = [exported(sharing, weights), exported(sharing, weights)]
    models[1].config._attn_implementation = implementation
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    for where in ({}, {"attention_mask": mask}):
        real = where.get("attention_mask", torch.ones_like(tokens)).bool()
        sdpa, other = (model(tokens, **where).logits for model in models)
        assert_logits(other[real], sdpa[real])
        settings = {**where, **GREEDY, "pad_token_id": 0}
        ours, theirs = (model.generate(tokens, **settings) for model in models)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["paper", "two-sweep", "one-sweep"])
def test_gradient_checkpointing_changes_no_gradient(recipe, reentrant, tokens):
    weights = TINY.weights(TOP)
    gradients = []
    for on in (False, True):
        model = exported(TOP, weights, RECIPES[recipe]).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    plain, checkpointed = (
        {name: x for name, x in each.items() if x is not None} for each in gradients
    )
    # Reentrant checkpointing adds the gradients of a layer's uses in another order.
    assert_close_by_name(checkpointed, plain, 1e-6 if reentrant else 0.0)


@torch.no_grad()
@pytest.mark.parametrize("sharing", [BOTTOM, WINDOWED], ids=["bottom", "windowed"])
def test_a_static_cache_serves_acyclic_maps(sharing, tokens):
    model = exported(sharing, TINY.weights(sharing))
    settings = {**GREEDY, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    wanted = model.generate(tokens, **settings)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), wanted)


def test_what_a_cyclic_map_cannot_do_is_refused(tokens):
    model = exported(TOP, TINY.weights(TOP), RECIPES["two-sweep"])
    with pytest.raises(ValueError, match=r"StaticCache cannot serve.*Use DynamicCache"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    model.config._attn_implementation = "flash_like_for_tests"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(tokens)


@torch.no_grad()
def test_bf16_follows_fp32(tokens):
    model = exported(TOP, TINY.weights(TOP), RECIPES["two-sweep"])
    wanted = model(tokens).logits
    got = model.to(torch.bfloat16)(tokens).logits.float()
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()


@torch.no_grad()
def test_the_suite_sees_a_leak(tokens, monkeypatch):
    """A mask that is not strict lets upward layers see the token itself."""
    sharing = SharingMap((0, 2, 2, 3), (False,) * 4)
    weights = TINY.weights(sharing)
    exact = token_by_token(exported(sharing, weights), tokens)
    model = exported(sharing, weights, jacobi(LENGTH - 1, 1))
    from megatron_kvshare.conversion.exported import modeling_kvshare

    right = modeling_kvshare.NewTokens._visible
    monkeypatch.setattr(
        modeling_kvshare.NewTokens,
        "_visible",
        lambda self, rows, strict, *more: right(self, rows, False, *more),
    )
    assert (model(tokens).logits - exact).abs().max() > 1e-3 * exact.abs().max()
