"""A tiny model with a tokenizer and a chat template, as a server finds it on disk."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder
from tests.product import Tiny

VOCABULARY = 320
SMALL = Tiny(vocabulary=VOCABULARY)
END = "<|end|>"
ROLE = "<|role|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<|role|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant: {% endif %}"
)
WORDS = "shared keys and values make a small cache; naïve café, 日本語 🙂. "
MAP = build_map(4, "sandwich-top", 2)


def write_served(
    folder: Path, sharing: SharingMap = MAP, tiny: Tiny = SMALL, chat: bool = True
) -> Path:
    """A Hugging Face folder with random weights; every text has tokens."""
    from tokenizers import ByteLevelBPETokenizer

    write_folder(folder, sharing, RECIPES["two-sweep"], tiny)
    fast = ByteLevelBPETokenizer()
    fast.train_from_iterator(
        [WORDS * 4], vocab_size=VOCABULARY, special_tokens=[END, ROLE], show_progress=False
    )
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    if chat:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
