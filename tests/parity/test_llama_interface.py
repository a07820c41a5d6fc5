"""All that transformers' Llama can be told, by an argument or a setting: the exported model does
the same, or refuses it by name. Nothing is taken and ignored; what a later version adds is noticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    StaticCache,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs

from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import TINY, exported
from tests.llama import LIMIT, ROPES, SHAPE, TOKENS, llama, ours, scaled


class Does(NamedTuple):
    """Does what Llama does; ``value`` makes a difference, seen beside ``others``."""

    value: Any
    others: Mapping[str, Any] = MappingProxyType({})


class Refuses(NamedTuple):
    """Refuses a value, naming it."""

    value: Any
    text: str | None = None


class Elsewhere(NamedTuple):
    """Neither model reads it: who does."""

    reader: str


def tensors(found: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All that a model returns, by name, a cache by its length."""
    if isinstance(found, torch.Tensor):
        return {name: found}
    if hasattr(found, "get_seq_length"):
        return {f"{name}.length": torch.tensor(found.get_seq_length())}
    if isinstance(found, tuple):
        named = {f"{name}.{i}": part for i, part in enumerate(found)}
    else:
        named = {f"{name}.{key}": part for key, part in (found or {}).items()}
    return {key: x for each, part in named.items() for key, x in tensors(part, each).items()}


def seen(model: torch.nn.Module, **arguments: Any) -> dict[str, torch.Tensor]:
    """What comes out of a training step and of inference, every gradient, every first weight."""
    model.train()
    arguments = {"input_ids": TOKENS, "labels": TOKENS, **arguments}
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    weights = {f"weight {name}": x.detach().clone() for name, x in model.named_parameters()}
    output = model(**arguments)
    found = tensors(output)
    if "use_cache" not in arguments:  # in training a cache is of use to nobody: Llama makes one
        found.pop(".cache.length", None)
    if "attention_mask" in arguments:  # what padding itself gives says nothing
        found[".logits"] = found[".logits"] * arguments["attention_mask"][..., None]
    loss = output[0] if isinstance(output, tuple) else output.loss
    if loss is not None:
        loss.backward()
    grads = {f"grad {name}": x.grad for name, x in model.named_parameters()}
    with torch.no_grad():
        inference = tensors(model.eval()(TOKENS), "eval")
    everything = {**found, **inference, **weights, **grads}
    return {name: x.detach() for name, x in everything.items() if x is not None}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, x in wanted.items():
        assert got[name].shape == x.shape, name
        worst = (got[name].double() - x.double()).abs().max()
        assert worst <= LIMIT * x.double().abs().max().clamp(min=1e-3), name


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


TRANSFORMERS = Elsewhere("transformers, for every model alike")
GENERATION = Elsewhere("the generation config")
HEADS = Elsewhere("heads for classification: test_export_heads")

CONFIG: dict[str, Does | Refuses | Elsewhere] = {
    "vocab_size": Does(48),
    "hidden_size": Does(40),
    "intermediate_size": Does(40),
    "num_hidden_layers": Does(3),
    "num_attention_heads": Does(2),
    "num_key_value_heads": Does(4),
    "head_dim": Does(6),
    "max_position_embeddings": Does(8, {"rope_parameters": ROPES["dynamic"]}),
    "initializer_range": Does(0.1),
    "rms_norm_eps": Does(0.1),
    "use_cache": Does(False),
    "pad_token_id": Does(int(TOKENS[0, 0])),
    "tie_word_embeddings": Does(True),
    "rope_parameters": Does(ROPES["yarn"]),
    "return_dict": Elsewhere("test_tuples: Llama of 5.24 fails on it"),
    "bos_token_id": GENERATION,
    "eos_token_id": GENERATION,
    "hidden_act": Refuses("gelu"),
    "attention_bias": Refuses(True),
    "mlp_bias": Refuses(True),
    "attention_dropout": Refuses(0.1),
    "pretraining_tp": Refuses(2),
    "output_hidden_states": Does(True),
    "output_attentions": Does(True),
    "chunk_size_feed_forward": Elsewhere("no model reads it that computes whole rows"),
    "is_encoder_decoder": Refuses(True),
    "is_causal": Refuses(False),
    "sliding_window": Refuses(4),
    "layer_types": Refuses(["sliding_attention"] * 2),
    "per_layer_config": Refuses({0: {"intermediate_size": 16}}),
    "tie_last_hidden_states": Does(False, {"output_hidden_states": True}),
    "add_cross_attention": Refuses(True),
    "torchscript": Refuses(True),
    "pruned_heads": Refuses({0: [1]}),
    "transformers_version": TRANSFORMERS,
    "architectures": TRANSFORMERS,
    "dtype": TRANSFORMERS,
    "id2label": HEADS,
    "label2id": HEADS,
    "problem_type": HEADS,
}
"""Every setting of a Llama."""

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
MASK = torch.ones_like(TOKENS)
MASK[1, 6:] = 0
UNCACHED = {"use_cache": False}

ARGUMENTS: dict[str, Does | Refuses | Elsewhere] = {
    "input_ids": Does(TOKENS.flip(1)),
    "attention_mask": Does(MASK, {"labels": TOKENS.where(MASK.bool(), -100)}),
    "position_ids": Does(POSITIONS, UNCACHED),
    "cache": Does(lambda: filled(), {"labels": None}),
    "past_key_values": Does(lambda: filled(), {"labels": None}),
    "inputs_embeds": Does(torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))),
    "labels": Does(TOKENS.roll(2, 1)),
    "use_cache": Does(True),
    "logits_to_keep": Does(3, {"labels": None}),
    "return_dict": Does(False, UNCACHED),
    "num_items_in_batch": Does(5),
    "shift_labels": Does(TOKENS.flip(0)),
    "ignore_index": Does(int(TOKENS[0, 3])),
    "seq_idx": Does(torch.tensor([[0] * 4 + [1] * 5]), {"position_ids": POSITIONS, **UNCACHED}),
    "cu_seq_lens_q": Elsewhere("test_packed_exports: Llama reads it in flash attention only"),
    "cu_seq_lens_k": Elsewhere("test_packed_exports"),
    "max_length_q": Elsewhere("test_packed_exports"),
    "max_length_k": Elsewhere("test_packed_exports"),
    "output_hidden_states": Does([0, -1, 7]),
    "output_attentions": Does(True),
    "output_router_logits": Refuses(True),
    "is_causal": Refuses(False),
    "cache_position": Refuses(torch.arange(1, 10)),
    "token_type_ids": Refuses(torch.zeros_like(TOKENS)),
    "head_mask": Refuses(torch.ones(2, 4)),
    "anything_else": Refuses(1),
}
"""Every argument of a Llama's forward, and some of earlier versions."""


def filled() -> DynamicCache:
    """A cache of two tokens' keys and values in every layer."""
    cache, draw = DynamicCache(), torch.Generator().manual_seed(2)
    for layer in range(2):
        cache.update(*torch.randn(2, 2, 2, 2, 8, generator=draw).unbind(0), layer)
    return cache


def only(table: dict, kind: type) -> Callable:
    names = [name for name, entry in table.items() if isinstance(entry, kind)]
    return pytest.mark.parametrize("name", names)


def test_the_tables_cover_all_of_this_version():
    forwards = [LlamaForCausalLM.forward, LlamaModel.forward, ForCausalLMLoss]
    arguments = {name for each in forwards for name in inspect.signature(each).parameters}
    arguments |= set(TransformersKwargs.__annotations__)
    assert arguments - {"self", "kwargs", "logits", "vocab_size"} <= set(ARGUMENTS)
    settings = {field.name for kind in (LlamaConfig, PreTrainedConfig) for field in fields(kind)}
    assert settings <= set(CONFIG)


@pytest.fixture(scope="module")
def usual() -> dict[str, torch.Tensor]:
    return seen(llama())


def test_without_anything_they_are_the_same(usual):
    assert_same(seen(ours()), usual)


@only(CONFIG, Does)
def test_a_setting_does_what_it_does_in_llama(name, usual):
    value, others = CONFIG[name]
    wanted = seen(llama(**others, **{name: value}))
    assert not same(wanted, seen(llama(**others)) if others else usual), "it makes no difference"
    assert_same(seen(ours(**others, **{name: value})), wanted)


@only(CONFIG, Refuses)
def test_a_setting_is_refused(name):
    value = CONFIG[name].value
    with pytest.raises(ValueError, match=name):
        ours(**{name: value})
    model = ours(attn_implementation="eager")
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=name):
        model(TOKENS)


@only(ARGUMENTS, Does)
def test_an_argument_does_what_it_does_in_llama(name, usual):
    value, others = ARGUMENTS[name]
    given = {**others, name: value}
    if name == "inputs_embeds":
        given["input_ids"] = None
    wanted = seen(llama(), **given)
    beside = seen(llama(), **others) if others else usual
    if name != "seq_idx":  # which says again what position_ids say
        assert not same(wanted, beside), "it makes no difference"
    assert_same(seen(ours(), **given), wanted)


@torch.no_grad()
def test_tuples():
    model = ours().eval()
    for part in (model, model.model):
        wanted = part(TOKENS)
        assert not isinstance(wanted, tuple)
        for ask in ({"return_dict": False}, {}):
            model.config.return_dict = "return_dict" in ask
            got = part(TOKENS, **ask)
            assert isinstance(got, tuple)
            assert [type(x) for x in got] == [type(x) for x in wanted.to_tuple()]
            assert torch.equal(got[0], wanted[0])
        model.config.return_dict = True


@only(ARGUMENTS, Refuses)
def test_an_argument_is_refused(name):
    for model in (ours(), ours().model):
        with pytest.raises(ValueError, match=name):
            model(TOKENS, **{name: ARGUMENTS[name].value})


def test_all_faults_of_a_configuration_at_once():
    wrong = {"rope_scaling": scaled("mine"), "hidden_act": "gelu", "kv_source_layers": [1, 0]}
    with pytest.raises(ValueError, match=r"layer 0 reads .*hidden_act.*rope_type is 'mine'"):
        ours(**wrong)


def test_a_setting_changed_on_loading_is_checked(tmp_path):
    """transformers sets these after the configuration has checked itself."""
    ours().save_pretrained(tmp_path)
    for wrong in ({"kv_prefill": "quickly"}, {"rope_parameters": scaled("mine")}):
        with pytest.raises(ValueError, match=r"quickly|mine"):
            KVShareForCausalLM.from_pretrained(tmp_path, **wrong)


@pytest.mark.parametrize("left", [0, 3])
def test_masks(left):
    """0 and 1 of any type; for the rest the shape is named."""
    mask = MASK.roll(3, 1) if left else MASK
    model = ours().eval()
    wanted = model(TOKENS, attention_mask=mask).logits
    for kind in (torch.bool, torch.float32, torch.int32, torch.uint8):
        assert torch.equal(model(TOKENS, attention_mask=mask.to(kind)).logits, wanted)
    shaped = torch.ones(2, 1, 9, 9)
    for wrong in (shaped, shaped.bool(), {"full_attention": shaped}, MASK[:, 1:], MASK[0]):
        with pytest.raises(
            ValueError, match=r"attention_mask must be \[batch, tokens\] = \[2, 9\]"
        ):
            model(TOKENS, attention_mask=wrong)


@pytest.mark.parametrize(
    "kept",
    [0, 2, torch.tensor([1, 4]), torch.tensor([[0, 2], [3, 1]]), MASK.bool()],
    ids=["all", "last", "some", "each", "mask"],
)
def test_logits_to_keep(kept):
    wanted, got = (make().eval()(TOKENS, logits_to_keep=kept).logits for make in (llama, ours))
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max()


def test_caches_that_cannot_be_read_are_refused():
    model = ours().eval()
    keys = torch.zeros(2, 2, 3, 8)
    with pytest.raises(ValueError, match=r"must be a Cache, as DynamicCache\(\), not tuple"):
        model(TOKENS, past_key_values=((keys, keys), (keys, keys)))
    windowed = LlamaConfig(**SHAPE, sliding_window=4, layer_types=["sliding_attention"] * 2)
    for cache in (DynamicCache(config=windowed), StaticCache(config=windowed, max_cache_len=20)):
        with pytest.raises(ValueError, match="with windows drops tokens"):
            model(TOKENS, past_key_values=cache)
    top = build_map(8, "sandwich-top", 3)
    cyclic = exported(top, TINY.weights(top))
    with pytest.raises(ValueError, match="either cache or past_key_values"):
        model(TOKENS, cache=DynamicCache(), past_key_values=DynamicCache())
    moved, static = DynamicCache(), StaticCache(cyclic.config, max_cache_len=20)
    moved.offloading = True  # as its argument says, which asks a CUDA build of torch for a GPU
    for cache, name in ((moved, "DynamicCache with offloading"), (static, "StaticCache")):
        with pytest.raises(ValueError, match=f"{name} cannot serve a map"):
            cyclic(TOKENS, past_key_values=cache)


def test_a_given_cache_is_read_whatever_use_cache_says():
    found = []
    for model in (llama(), ours()):
        model.eval()
        cache = model(TOKENS[:, :5], use_cache=True).past_key_values
        output = model(TOKENS[:, 5:], past_key_values=cache, use_cache=False)
        found.append({"logits": output.logits, "length": torch.tensor(cache.get_seq_length())})
    assert_same(*reversed(found))


@pytest.mark.parametrize("name", ["paged|flash_attention_2", "paged|sdpa", "mine"])
def test_attention_implementations_without_masks_are_refused(name):
    model = ours()
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match="take sdpa, eager, flex_attention or flash_attention"):
        model(TOKENS)


def test_attention_is_chosen_as_in_llama():
    for model in (llama(), ours()):
        for name in ("sdpa", "eager", "flex_attention"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
        with pytest.raises(ValueError, match="not supported"):
            model.set_attn_implementation("mine")


def test_a_gap_in_a_mask_counts():
    """Tokens after one keep their positions; text with gaps is no text of Llama's own."""
    gaps = MASK.clone()
    gaps[0, [2, 3, 5]] = 0
    wanted, got = (make().eval()(TOKENS, attention_mask=gaps).logits for make in (llama, ours))
    difference = (got - wanted)[gaps.bool()].abs().max()
    assert difference <= LIMIT * wanted.abs().max()


def test_trainer_knows_what_to_do_with_labels_and_outputs():
    """It shifts smoothed labels for causal models in its list, and takes what is not to be ignored
    for predictions; the whole training is in test_trainer."""
    model = ours()
    assert model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    found = set(model(TOKENS, labels=TOKENS, use_cache=True))
    assert found - set(model.config.keys_to_ignore_at_inference) == {"loss", "logits"}


def test_position_ids_need_the_shape_of_the_tokens():
    model = ours()
    for wrong in (torch.arange(9), torch.arange(8)[None], torch.arange(9).expand(3, 2, -1)):
        with pytest.raises(ValueError, match=r"position_ids must be \[batch, new tokens\]"):
            model(TOKENS, position_ids=wrong)
