"""A Hugging Face tokenizer in an export has the special tokens transformers finds in its origin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kvshare.conversion.tokenizer import write_tokenizer
from megatron_kvshare.data.tokenizers import HuggingFaceTokenizer

TEXTS = ["Fellow-Citizens of the Senate and House of Representatives:", "a tab\tand\n\n1,234.56"]
ENDS = ["</s>", "<end>", "<begin>"]
ORIGINS: dict[str, dict[str, object]] = {
    "older settings": {"special_tokens_map": {"eos_token": "<end>", "bos_token": "<begin>"}},
    "older settings over newer": {
        "special_tokens_map": {"eos_token": "<end>"},
        "tokenizer_config": {"eos_token": "</s>"},
    },
    "begin in the vocabulary alone": {"tokenizer_config": {"eos_token": "<end>", "bos_token": "a"}},
    "nothing named": {},
}


@pytest.mark.parametrize("as_vocabulary", [False, True])
@pytest.mark.parametrize("settings", ORIGINS.values(), ids=ORIGINS.keys())
def test_special_tokens_of_an_export(
    tmp_path: Path, settings: dict[str, dict[str, object]], as_vocabulary: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    import tokenizers

    origin, export = tmp_path / "origin", tmp_path / "export"
    for folder in (origin, export):
        folder.mkdir()
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(TEXTS, vocab_size=320, special_tokens=ENDS)
    if as_vocabulary:  # vocab.json and merges.txt, which say neither what they are nor what ends
        fast.save_model(str(origin))
        config = {**settings.get("tokenizer_config", {}), "tokenizer_class": "GPT2Tokenizer"}
        config.setdefault("eos_token", "<end>")
        settings = {**settings, "tokenizer_config": config}
    else:
        fast.save(str(origin / "tokenizer.json"))
    for name, content in settings.items():
        (origin / f"{name}.json").write_text(json.dumps(content))
    expected = transformers.AutoTokenizer.from_pretrained(str(origin), local_files_only=True)
    written = write_tokenizer(HuggingFaceTokenizer(origin), origin, export)
    found = transformers.AutoTokenizer.from_pretrained(str(export), local_files_only=True)
    assert written.eos == found.eos_token_id == expected.eos_token_id
    assert written.eos in (1, None)
    if not as_vocabulary:  # GPT2Tokenizer's usual begin is not in this vocabulary
        assert written.bos == expected.bos_token_id
        # A begin that is a plain piece is not named: transformers would find it in texts.
        plain = settings is ORIGINS["begin in the vocabulary alone"]
        assert found.bos_token_id == (None if plain else expected.bos_token_id)
