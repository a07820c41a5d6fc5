"""The exported model as the tests build it: from the same weights, by name, as the native one."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_kvshare.checkpoint.tensors import TensorInfo
from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig
from megatron_kvshare.conversion.exported.modeling_kvshare import KVShareForCausalLM
from megatron_kvshare.conversion.folder import write_json, write_weights
from megatron_kvshare.conversion.own_code import CODE, HERE
from megatron_kvshare.conversion.settings import is_plain_llama, to_config
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.solver import RECIPES, Recipe
from megatron_kvshare.spec.model_spec import ModelSpec
from tests.product import Tiny

TINY = Tiny()
_REMOTE = "transformers_modules"


@contextlib.contextmanager
def code_copied_to(folder: Path) -> Iterator[None]:
    """transformers copies the code of a model into one folder for all, in the user's home, and
    imports it as one package: inside, `folder` is that folder and nothing is imported from it."""
    path, before = list(sys.path), _take_remote_modules()
    try:
        with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder)):
            yield
    finally:
        sys.path[:] = path
        _take_remote_modules()
        sys.modules.update(before)


def _take_remote_modules() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0] == _REMOTE]
    return {name: sys.modules.pop(name) for name in names}


def model_spec(
    sharing: SharingMap, recipe: Recipe = RECIPES["paper"], tiny: Tiny = TINY
) -> ModelSpec:
    return ModelSpec(
        model=tiny.config(sharing.num_layers),
        map=sharing,
        recipe=recipe,
        window_size=tiny.window if any(sharing.windowed) else None,
        vocab_size=tiny.vocabulary,
    )


def exported(
    sharing: SharingMap,
    weights: dict[str, Tensor],
    recipe: Recipe = RECIPES["paper"],
    tiny: Tiny = TINY,
    **settings: Any,
) -> KVShareForCausalLM:
    """The modelling file's model; ``settings`` overrule those of its config.json."""
    content = to_config(model_spec(sharing, recipe, tiny), torch.float32, {})
    usual = {"attn_implementation": "sdpa", **_sharing(sharing, tiny)}
    config = KVShareConfig(**{**content, **usual, **settings})
    model = KVShareForCausalLM(config)
    missing = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return model.eval()


def _sharing(sharing: SharingMap, tiny: Tiny) -> dict[str, Any]:
    """A standard map is exported as a plain Llama; here the modelling file runs it too."""
    return {
        "kv_source_layers": list(sharing.sources),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


class InMemory:
    """A tensor source of given tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.tensors = {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def write_folder(
    folder: Path,
    sharing: SharingMap,
    recipe: Recipe = RECIPES["paper"],
    tiny: Tiny = TINY,
    max_shard_bytes: int = 10**9,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A Hugging Face folder with random weights; ``settings`` overrule those of config.json."""
    folder.mkdir(parents=True)
    about = model_spec(sharing, recipe, tiny)
    weights = {name: x.to(dtype) for name, x in tiny.weights(sharing).items()}
    write_weights(InMemory(weights), folder, max_shard_bytes)
    write_json(folder / "config.json", {**to_config(about, dtype, {}), **settings})
    for name in () if is_plain_llama(sharing) else CODE:
        shutil.copy(HERE / name, folder / name)
    return folder
