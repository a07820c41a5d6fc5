"""transformers' own tests of every model, for a small Llama and for exports of three maps.

Runs inside the package of transformers' tests, see test_common_tests.py: it is copied there.
"""

from __future__ import annotations

import unittest
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
)
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama

from megatron_kvshare.conversion.exported import modeling_kvshare
from megatron_kvshare.conversion.exported.configuration_kvshare import KVShareConfig

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor

HEADS = {
    "Model": (AutoModel, "MODEL_MAPPING_NAMES"),
    "ForCausalLM": (AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "ForSequenceClassification": (
        AutoModelForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "ForQuestionAnswering": (
        AutoModelForQuestionAnswering,
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    ),
    "ForTokenClassification": (
        AutoModelForTokenClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
}
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def classes(module: object, prefix: str) -> tuple[type, ...]:
    names = [f"{prefix}{head}" for head in HEADS]
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


def make_known() -> None:
    """As `register` does; the tests look for the kind of a class in tables of names besides."""
    AutoConfig.register("kvshare", KVShareConfig)
    for head, (auto, names) in HEADS.items():
        name = f"KVShare{head}"
        if hasattr(modeling_kvshare, name):
            auto.register(KVShareConfig, getattr(modeling_kvshare, name))
            getattr(modeling_auto, names)["kvshare"] = name


make_known()


class Tester:
    """What the tests ask for: a configuration and inputs."""

    batch_size, seq_length, hidden_size, num_attention_heads, vocab_size = 13, 7, 32, 4, 99
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.num_hidden_layers = parent.settings["num_hidden_layers"]

    def get_config(self):
        return self.parent.config_class(**SHAPE, **self.parent.settings)

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(tokens).tril()  # the first rows are padded
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


class Common(ModelTesterMixin):
    settings: Mapping[str, Any] = MappingProxyType({"num_hidden_layers": 4})
    config_class, all_model_classes = KVShareConfig, classes(modeling_kvshare, "KVShare")

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()


class LlamaTest(Common, unittest.TestCase):
    config_class, all_model_classes = LlamaConfig, classes(modeling_llama, "Llama")


class AcyclicTest(Common, unittest.TestCase):
    settings = MappingProxyType({**Common.settings, "kv_source_layers": [0, 0, 2, 2]})


class WindowedTest(Common, unittest.TestCase):
    windows = MappingProxyType({"kv_windowed_layers": [0, 3], "kv_window_size": 3})
    settings = MappingProxyType({**AcyclicTest.settings, **windows})


class CyclicTest(Common, unittest.TestCase):
    settings = MappingProxyType({**Common.settings, "kv_source_layers": [0, 2, 2, 2]})
