"""Exported tokenizers give the token ids of the training for every kind of text, or none is
written; texts and models here are not those of the proof."""

from __future__ import annotations

import io
import json
import random
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from megatron_kvshare.conversion.from_sentencepiece import replaced
from megatron_kvshare.conversion.tokenizer import Written, write_tokenizer
from megatron_kvshare.conversion.tokenizer_proof import prove_tokenizer, samples
from megatron_kvshare.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_kvshare.errors import CheckpointError

WORDS = (
    "hello world this is text about words",
    "the tag and other things <custom> here, 1234 numbers 5678",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z < > / [ ] 0x_",
    "hello there my friend, the world is round; Tiếng Việt có dấu",
)


def train(path: Path, **settings: Any) -> SentencePieceTokenizer:
    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 40),
        model_writer=content,
        hard_vocab_limit=False,
        minloglevel=3,
        **{"vocab_size": 420, "normalization_rule_name": "identity", **settings},
    )
    path.write_bytes(content.getvalue())
    return SentencePieceTokenizer(path)


def written(tokenizer: Any, source: Path, folder: Path) -> Written:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return write_tokenizer(tokenizer, source, folder)


SYMBOLS = {"user_defined_symbols": "<custom>,hel,12", "control_symbols": "<ctl>"}
SUFFIX = {"treat_whitespace_as_suffix": True}
KEPT = {"remove_extra_whitespaces": False}
BARE = {"add_dummy_prefix": False}
BPE = {"model_type": "bpe", "byte_fallback": True}
MODELS: dict[str, dict[str, Any]] = {
    "as trained here": {**BPE, **KEPT, "split_digits": True},
    "bpe with symbols": {**BPE, **SYMBOLS},
    "bpe, nothing before": {**BPE, **SYMBOLS, **BARE},
    "bpe, spaces behind": {**BPE, **SYMBOLS, **SUFFIX},
    "bpe, spaces kept behind": {**BPE, **SUFFIX, **KEPT},
    "bpe with unknown": {"model_type": "bpe", **SYMBOLS, **KEPT},
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, **KEPT},
    "unigram with symbols": {"model_type": "unigram", "byte_fallback": True, **SYMBOLS, **BARE},
    "unigram, spaces behind": {"model_type": "unigram", **SYMBOLS, **SUFFIX},
}
TEXTS = (
    "",
    " ",
    "  hello  <custom>world, hello<custom><custom>",
    "<custom>",
    "<custom> the <s>",
    "a <s> b</s><unk><ctl><0x41>",
    "<s>hello</s>",
    "thel 12 1234 hel",
    "▁ ▁▁hello▁",
    "\thello\r\n\nworld \x00\u200d\ufeff",
    "Tiê\u0301ng Viê\u0323t có dâ\u0301u, ＡＢＣ ① 🙂👍🏽",
)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_the_files_give_the_ids_of_the_training(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "tokenizer.model", **settings)
    about = written(tokenizer, tmp_path / "tokenizer.model", tmp_path / "hf")
    assert (about.bos, about.eos, [*about.rules]) == (1, 2, [])
    bare = FastTokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    draw = random.Random(7)
    texts = [
        *TEXTS,
        *("".join(draw.choices(" <custom>hel12▁\n/s0xé\u0301x", k=30)) for _ in "x" * 300),
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert bare.encode(text, add_special_tokens=False).ids == ids, text
        assert loaded(text)["input_ids"] == ids, text
        if 0 not in ids:
            assert loaded.decode(ids) == tokenizer.decode(ids)
    assert loaded.bos_token_id == 1 and loaded.eos_token_id == 2
    assert loaded.decode([*tokenizer.encode("hello"), 2], skip_special_tokens=True) in (
        "hello",
        "hello ",
    )


@pytest.mark.nightly
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_the_proof_holds(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "tokenizer.model", **settings)
    written(tokenizer, tmp_path / "tokenizer.model", tmp_path / "hf")
    prove_tokenizer(tokenizer, tmp_path / "hf")


def test_the_proof_holds_for_symbols(tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "tokenizer.model", **BPE, **SYMBOLS)
    written(tokenizer, tmp_path / "tokenizer.model", tmp_path / "hf")
    prove_tokenizer(tokenizer, tmp_path / "hf")


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("nmt_nfkc", "bpe"),
        ("nfkc_cf", "unigram"),
        pytest.param("nfkc", "bpe", marks=pytest.mark.nightly),
        pytest.param("nmt_nfkc_cf", "unigram", marks=pytest.mark.nightly),
    ],
)
def test_characters_that_compose_are_refused(rule: str, kind: str, tmp_path: Path) -> None:
    """Hugging Face's library drops marks: the error shows the shortest text that differs."""
    settings = {"model_type": kind, "byte_fallback": True, "normalization_rule_name": rule}
    tokenizer = train(tmp_path / "tokenizer.model", **settings)
    rules = written(tokenizer, tmp_path / "tokenizer.model", tmp_path / "hf").rules
    with pytest.raises(CheckpointError) as raised:
        prove_tokenizer(tokenizer, tmp_path / "hf", rules)
    (fault,) = raised.value.faults
    text = str(fault.value)
    assert len(text) <= 3 and "\u0301" in text
    assert f"{tokenizer.encode(text)}" in fault.rule and "in training it was" in fault.rule
    assert "--without-tokenizer" in fault.fix


def test_rules_of_ones_own_are_all_reached(tmp_path: Path) -> None:
    """One for a character of its own is expressed; one for several is found out."""
    outcomes = {}
    for name, rows in {"one": [("2028", "20")], "two": [("71 72", "7A")]}.items():
        table = tmp_path / f"{name}.tsv"
        table.write_text("".join(f"{key}\t{value}\n" for key, value in rows))
        model = tmp_path / f"{name}.model"
        tokenizer = train(model, normalization_rule_tsv=str(table), **BPE)
        rules = [*written(tokenizer, model, tmp_path / name).rules]
        assert rules == ["".join(chr(int(x, 16)) for x in key.split()) for key, _ in rows]
        try:
            prove_tokenizer(tokenizer, tmp_path / name, rules)
            outcomes[name] = "proven"
        except CheckpointError:
            outcomes[name] = "refused"
    assert outcomes == {"one": "proven", "two": "refused"}


def test_a_name_that_cannot_be_told_from_text_is_refused(tmp_path: Path) -> None:
    settings = {"model_type": "unigram", "control_symbols": "⟦⟧"}
    tokenizer = train(tmp_path / "tokenizer.model", **settings)
    written(tokenizer, tmp_path / "tokenizer.model", tmp_path / "hf")
    with pytest.raises(CheckpointError, match="in training it was"):
        prove_tokenizer(tokenizer, tmp_path / "hf")


def test_one_wrong_piece_is_found(tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "tokenizer.model", **BPE, **KEPT)
    written(tokenizer, tmp_path / "tokenizer.model", tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["▁world"], vocabulary["▁there"] = vocabulary["▁there"], vocabulary["▁world"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'▁there'|'▁world'"):
        prove_tokenizer(tokenizer, tmp_path / "hf")


def test_samples_reach_every_kind_of_character() -> None:
    import unicodedata

    texts = list(samples(["<s>", "hello", " world"]))
    assert texts == list(samples(["<s>", "hello", " world"]))
    categories = {unicodedata.category(character) for text in texts for character in text}
    assert len(categories) == 29 and "Cs" not in categories
    assert {"", " ", "\t", "\r\n", "▁"} <= {*texts, "\r\n"}
    assert any("e\u0302\u0301" in text for text in texts)


def test_keys_of_a_map_are_read(tmp_path: Path) -> None:
    train(tmp_path / "m.model", normalization_rule_name="nfkc")
    model = protobuf.ModelProto()
    model.ParseFromString((tmp_path / "m.model").read_bytes())
    keys = [*islice(replaced(model), 3000)]
    assert len(set(keys)) == 3000
    normalize = SentencePieceProcessor(model_proto=model.SerializeToString()).normalize
    assert all(normalize(key) != key for key in keys)


# Tokenizers of Hugging Face -----------------------------------------------------------------------


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A folder whose settings differ from what training does with it."""
    from tokenizers import ByteLevelBPETokenizer, processors

    folder = tmp_path / "original"
    folder.mkdir()
    fast = ByteLevelBPETokenizer()
    fast.train_from_iterator(WORDS, vocab_size=330, special_tokens=["<s>", "</s>"])
    fast._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast.enable_truncation(max_length=8)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "pad_token": "<pad>",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_copy_does_what_training_did(original: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(original)
    about = written(tokenizer, original, tmp_path / "hf")
    assert (about.bos, about.eos) == (0, 1)
    prove_tokenizer(tokenizer, tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "hello <pad> world, <s> this is longer than eight tokens</s>"
    assert loaded(text)["input_ids"] == tokenizer.encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, None)


@pytest.mark.parametrize("named", [True, False], ids=["with settings", "bare"])
def test_a_folder_without_tokenizer_json_is_written_as_one(
    original: Path, tmp_path: Path, named: bool
) -> None:
    """Without settings, as Megatron's --vocab-file and --merge-file, it is GPT-2's."""
    folder = tmp_path / "older"
    folder.mkdir()
    model = json.loads((original / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "unk_token": "<s>"}
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.eod == (model["vocab"]["</s>"] if named else len(model["vocab"]))
    about = written(tokenizer, folder, tmp_path / "hf")
    assert about.eos == tokenizer.eod
    prove_tokenizer(tokenizer, tmp_path / "hf")
    shutil.rmtree(folder)
    again = HuggingFaceTokenizer(tmp_path / "hf")
    assert again.encode("hello world") == tokenizer.encode("hello world")


@pytest.mark.parametrize("kind", ["sentencepiece", "copy"])
def test_converters_to_gguf_are_told_what_training_adds(kind, original, tmp_path) -> None:
    if kind == "copy":
        written(HuggingFaceTokenizer(original), original, tmp_path / "hf")
    else:
        made = train(tmp_path / "tokenizer.model", **BPE, **KEPT)
        written(made, tmp_path / "tokenizer.model", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (False, False)
    assert settings.get("add_prefix_space", True) is True
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert content["post_processor"] is None


def test_special_tokens_that_are_pieces_of_sentencepiece(tmp_path: Path) -> None:
    """An export of ours, imported and exported again: its begin and end are plain pieces, which
    transformers is told not to find in texts."""
    transformers = pytest.importorskip("transformers")
    first, second = tmp_path / "first", tmp_path / "second"
    about = written(train(tmp_path / "tokenizer.model", **BPE), tmp_path / "tokenizer.model", first)
    again = written(HuggingFaceTokenizer(first), first, second)
    assert again.ids == about.ids and about.eos is not None
    one, two = (
        transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        for folder in (first, second)
    )
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(one, name) == getattr(two, name) is not None
    for text in (*WORDS[:5], "it ends with </s> and begins with <s>"):
        assert one(text)["input_ids"] == two(text)["input_ids"]
