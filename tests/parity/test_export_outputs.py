"""Hidden states and attention weights of exports: those of the last sweep, which one token after
another computes too; and the ways of computing attention that Llama has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import TINY, exported
from tests.product import random_tokens

LIMIT = 1e-5
LENGTH = 11
TOKENS = random_tokens(TINY.vocabulary, 2, LENGTH, seed=3)
ACYCLIC = build_map(8, "pizza-bottom", 3)
MAPS = {
    "acyclic": ACYCLIC,
    "windows": SharingMap.parse("0s_0s_2_2s_4_4_6s_6"),
    "top": build_map(8, "sandwich-top", 3),
    "two groups": SharingMap.parse("0_2_2_3_3s_7_7s_7"),
}
ALL = {"output_hidden_states": True, "output_attentions": True}


def several_maps() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sharing", MAPS.values(), ids=MAPS)


def by_day(*names: str) -> pytest.MarkDecorator:
    """These maps by day, the others by night."""
    marks = {name: () if name in names else pytest.mark.nightly for name in MAPS}
    params = [pytest.param(MAPS[name], id=name, marks=marks[name]) for name in MAPS]
    return pytest.mark.parametrize("sharing", params)


def made(sharing: SharingMap, recipe: str = "paper", **settings) -> KVShareForCausalLM:
    return exported(sharing, TINY.weights(sharing), RECIPES[recipe], **settings)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max()


@torch.no_grad()
@several_maps()
def test_they_are_those_of_one_token_after_another(sharing):
    """Which computes every layer once, reading what is in the cache."""
    model = made(sharing, kv_prefill="exact")
    whole = model(TOKENS, **ALL)
    assert len(whole.hidden_states) == 9 and len(whole.attentions) == 8
    cache = None
    for place in range(LENGTH):
        one = model(TOKENS[:, place : place + 1], past_key_values=cache, use_cache=True, **ALL)
        cache = one.past_key_values
        for got, wanted in zip(one.hidden_states, whole.hidden_states, strict=True):
            assert_close(got[:, 0], wanted[:, place])
        for got, wanted in zip(one.attentions, whole.attentions, strict=True):
            assert_close(got[:, :, 0], wanted[:, :, place, : place + 1])
            assert not wanted[:, :, place, place + 1 :].any()


@torch.no_grad()
@several_maps()
def test_asking_for_them_changes_nothing(sharing):
    model = made(sharing, "two-sweep")
    wanted, got = model(TOKENS).logits, model(TOKENS, **ALL)
    assert_close(got.logits, wanted)
    assert torch.equal(model.lm_head(got.hidden_states[-1]), got.logits)
    strict = [source > layer for layer, source in enumerate(sharing.sources)]
    for upward, weights in zip(strict, got.attentions, strict=True):
        sums = weights.sum(-1)
        assert torch.allclose(sums[:, :, 1:], torch.ones(()))
        assert torch.allclose(sums[:, :, 0], torch.zeros(()) if upward else torch.ones(()))


@torch.no_grad()
@several_maps()
@pytest.mark.parametrize("recipe", ["paper", "two-sweep"])
def test_padded_and_packed_rows_have_those_of_each_text_alone(sharing, recipe):
    model = made(sharing, recipe)
    first, second = TOKENS[:1, :4], TOKENS[1:, :6]
    alone = [model(each, use_cache=False, **ALL) for each in (first, second)]
    padded = torch.zeros(2, 7, dtype=torch.long)
    padded[0, 3:], padded[1, :6] = first, second
    mask = torch.zeros_like(padded)
    mask[0, 3:], mask[1, :6] = 1, 1
    packed = torch.cat((first, second), dim=1)
    position_ids = torch.cat((torch.arange(4), torch.arange(6)))[None]
    batch = model(padded, attention_mask=mask, **ALL)
    row = model(packed, position_ids=position_ids, use_cache=False, **ALL)
    for output, places in ((batch, ((0, 3, 7), (1, 0, 6))), (row, ((0, 0, 4), (0, 4, 10)))):
        for text, (b, start, end) in zip(alone, places, strict=True):
            for got, wanted in zip(output.hidden_states, text.hidden_states, strict=True):
                assert_close(got[b, start:end], wanted[0])
            for got, wanted in zip(output.attentions, text.attentions, strict=True):
                assert_close(got[b, :, start:end, start:end], wanted[0])
                assert not got[b, :, start:end, :start].any()


def test_gradients_flow_through_them():
    """Also where padding is in the batch and layers are checkpointed."""
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    for settings in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model = made(MAPS["top"]).train()
        if settings:
            model.gradient_checkpointing_enable(**settings)
        output = model(TOKENS, attention_mask=mask, **ALL)
        seen = [*output.hidden_states[:-1], *output.attentions]
        for x in seen:
            x.retain_grad()
        output.logits[:, -1].sum().backward()
        assert all(x.grad is not None and x.grad.any() for x in seen)


def test_only_the_states_that_are_named_are_kept():
    model = made(ACYCLIC)
    every = model(TOKENS, output_hidden_states=True).hidden_states
    for wanted, places in ((3, {3}), ([0, -1], {0, 8}), ((2, 40), {2}), ([], None), (0, None)):
        got = model(TOKENS, output_hidden_states=wanted).hidden_states
        if places is None:
            assert got is None
            continue
        assert {place for place, x in enumerate(got) if x is not None} == places
        assert all(torch.equal(got[place], every[place]) for place in places)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_weights_come_with_every_attention_implementation(name):
    model = made(MAPS["top"], attn_implementation=name)
    wanted = made(MAPS["top"], attn_implementation="eager")(TOKENS, output_attentions=True)
    got = model(TOKENS, output_attentions=True)
    assert torch.equal(got.logits, wanted.logits)
    assert all(map(torch.equal, got.attentions, wanted.attentions))
    step = {"return_dict_in_generate": True, "max_new_tokens": 3, "do_sample": False}
    written = model.generate(TOKENS, pad_token_id=0, **step, **ALL)
    assert [len(x) for x in written.hidden_states] == [9, 9, 9]
    assert [x[0].shape[-1] for x in written.attentions] == [11, 12, 13]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Compiling flex attention takes a minute: its plain form computes the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@torch.no_grad()
def assert_flex_is_sdpa(sharing: SharingMap, recipe: str) -> None:
    plain, flex = (
        made(sharing, recipe, attn_implementation=name) for name in ("sdpa", "flex_attention")
    )
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = mask[1, 7:] = 0
    inputs = [{"input_ids": TOKENS, "attention_mask": mask}]
    inputs.append({"input_ids": TOKENS, "position_ids": torch.arange(LENGTH)[None] % 4})
    for given in inputs:
        wanted, got = (model(use_cache=False, **given).logits for model in (plain, flex))
        real = given.get("attention_mask", torch.ones_like(TOKENS)).bool()
        assert_close(got[real], wanted[real])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(**inputs[0], **settings) for model in (plain, flex)]
    assert torch.equal(*written)


@by_day("two groups")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_same(sharing, uncompiled):
    assert_flex_is_sdpa(sharing, "two-sweep")


@pytest.mark.nightly
def test_compiled_flex_attention_is_the_same():
    for sharing in MAPS.values():
        assert_flex_is_sdpa(sharing, "two-sweep")


@torch.no_grad()
@by_day("acyclic", "two groups")
@pytest.mark.parametrize("prefill", ["trained", pytest.param("exact", marks=pytest.mark.nightly)])
def test_generation_from_embeddings(sharing, prefill):
    """Alone, beside ids, padded, from a cache, with beams: as from the ids of the same tokens."""
    model = made(sharing, kv_prefill=prefill)
    embedded = model.get_input_embeddings()(TOKENS)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    usual = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    usual["attention_mask"] = torch.ones_like(TOKENS)  # or ids of padding would be masked
    for settings in ({}, {"attention_mask": mask}, {"num_beams": 2}, {"use_cache": False}):
        settings = {**usual, **settings}
        wanted = model.generate(TOKENS, **settings)
        got = model.generate(inputs_embeds=embedded, **settings)
        assert torch.equal(got, wanted[:, LENGTH:])
        both = model.generate(TOKENS, inputs_embeds=embedded, **settings)
        assert torch.equal(both, wanted)
    caches = [model(TOKENS[:, :8], use_cache=True).past_key_values for _ in range(2)]
    wanted = model.generate(TOKENS, past_key_values=caches[0], **usual)
    got = model.generate(inputs_embeds=embedded, past_key_values=caches[1], **usual)
    assert torch.equal(got, wanted[:, LENGTH:])


class Server:
    """What a server has for a layer: it keeps keys and values, several texts in one row."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(self.lengths, dim=1) for x in (query, key, value)), strict=True)
        one = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([one(*each, is_causal=True, enable_gqa=True) for each in parts], dim=1)


def served(module, query, key, value, attention_mask, scaling, **more):
    assert attention_mask is None and more["forward_batch"] == "of the server"
    assert scaling == module.scaling
    out = more["attention_instances"][module.layer_idx].attend(query[0], key[0], value[0])
    return out.transpose(0, 1).flatten(1), None  # no batch: [tokens, heads x width]


@torch.no_grad()
def test_a_server_computes_attention(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", served)
    model = made(ACYCLIC)
    wanted = [model(each[None], use_cache=False).logits[0] for each in (TOKENS[0], TOKENS[1, :6])]
    row = torch.cat((TOKENS[0], TOKENS[1, :6]))[None]
    given = {
        "position_ids": torch.cat((torch.arange(LENGTH), torch.arange(6)))[None],
        "use_cache": False,
        "attention_instances": {layer: Server((LENGTH, 6)) for layer in range(8)},
        "forward_batch": "of the server",
        "return_dict": False,
    }
    model.config._attn_implementation = "mine"
    assert_close(model(row, **given)[0][0], torch.cat(wanted))
    hidden = model.model(inputs_embeds=model.get_input_embeddings()(row), **given)[0]
    assert_close(model.lm_head(hidden)[0], torch.cat(wanted))
    for name in ("attention_mask", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"attention_instances go without {name}"):
            model(row, **given, **{name: torch.ones_like(row)})
    with pytest.raises(ValueError, match="attention_instances go without output_attentions"):
        model(row, **given, output_attentions=True)


@torch.no_grad()
def test_attention_of_transformers_does_not_read_what_a_server_gives():
    model = made(ACYCLIC)
    wanted = model(TOKENS, use_cache=False).logits
    assert torch.equal(model(TOKENS, attention_instances={0: None}, use_cache=False).logits, wanted)
    with pytest.raises(ValueError, match="forward_batch"):
        model(TOKENS, attention_instances={0: None}, forward_batch="of a server")


@pytest.mark.parametrize("name", ["windows", "top"])
def test_maps_that_a_server_does_not_know_are_refused(name):
    model = made(MAPS[name])
    with pytest.raises(ValueError, match=r"attention_instances know nothing of (windows|layers)"):
        model(TOKENS[:1], use_cache=False, attention_instances={0: None})
