"""Tokenizers load from local files, lose nothing, and refuse what they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_kvshare.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megatron_kvshare.errors import DataError

from .conftest import UNICODE, WORDS


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator([WORDS], vocab_size=300, special_tokens=["<|endoftext|>", "<end>"])
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    fast.save(str(path))
    return path


def test_sentencepiece_keeps_any_text(tokenizer_model: str) -> None:
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model)
    assert (tokenizer.vocab_size, tokenizer.eod) == (400, 2)
    text = WORDS + UNICODE
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids and max(ids) < 400
    assert not {1, 2} & set(ids)


def test_hugging_face_file_and_folder(tokenizer_json: Path) -> None:
    vocabulary = json.loads(tokenizer_json.read_text("utf-8"))["model"]["vocab"]
    for place in (tokenizer_json, tokenizer_json.parent):
        tokenizer = load_tokenizer("HuggingFaceTokenizer", str(place))
        assert tokenizer.vocab_size == len(vocabulary)
        assert tokenizer.eod is None, "transformers names none either"
        assert tokenizer.decode(tokenizer.encode(WORDS + UNICODE)) == WORDS + UNICODE


def test_hugging_face_config_names_the_end_token(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    config = {"eos_token": {"__type": "AddedToken", "content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer("HuggingFaceTokenizer", str(tmp_path)).eod == 1


def folder_with(tokenizer_json: Path, folder: Path, **settings: object) -> str:
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


NAMED: dict[str, dict[str, object]] = {
    "nothing": {"tokenizer_config": {}},
    "map alone": {"special_tokens_map": {"eos_token": "<end>"}},
    "map as objects": {"special_tokens_map": {"eos_token": {"content": "<end>"}}},
    "map and settings": {
        "special_tokens_map": {"eos_token": "<end>"},
        "tokenizer_config": {"eos_token": "<|endoftext|>"},
    },
    "settings": {"tokenizer_config": {"eos_token": "<end>", "bos_token": "<|endoftext|>"}},
    "null": {"tokenizer_config": {"eos_token": None}},
    "a class with a usual name": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}},
    "a model with a usual class": {"config": {"model_type": "gpt2"}},
    "ids of a model": {"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": 1}},
    "another token": {"tokenizer_config": {"extra_special_tokens": {"eod_token": "<end>"}}},
}


@pytest.mark.parametrize("settings", NAMED.values(), ids=NAMED.keys())
def test_special_tokens_are_those_of_transformers(
    tokenizer_json: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tokenizer_json, tmp_path, **settings)
    expected = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for place in (folder, f"{folder}/tokenizer.json"):
        tokenizer = HuggingFaceTokenizer(Path(place))
        assert (tokenizer.bos, tokenizer.eod) == (expected.bos_token_id, expected.eos_token_id)


def test_settings_beside_another_file_are_not_its_own(tokenizer_json: Path, tmp_path: Path) -> None:
    folder_with(tokenizer_json, tmp_path, tokenizer_config={"eos_token": "<end>"})
    other = tmp_path / "other.json"
    other.write_bytes(tokenizer_json.read_bytes())
    assert load_tokenizer("HuggingFaceTokenizer", str(other)).eod is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, "'</s>' is not in its vocabulary"),
        ({"special_tokens_map": {"eos_token": "<nope>"}}, "'<nope>' is not in its vocabulary"),
        ({"tokenizer_config": [1]}, "transformers cannot read it"),
    ],
)
def test_an_end_token_that_does_not_exist_is_an_error(
    tokenizer_json: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    """transformers would add it behind the vocabulary; here it once became another one."""
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(
        "HuggingFaceTokenizer", folder_with(tokenizer_json, tmp_path, **settings)
    )
    with pytest.raises(DataError, match=f"--tokenizer-model.*{message}"):
        _ = tokenizer.eod


def test_code_of_a_folder_is_not_run(tokenizer_json: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    own = {"auto_map": {"AutoTokenizer": ["code.Tok", None]}, "tokenizer_class": "Tok"}
    folder = folder_with(tokenizer_json, tmp_path, tokenizer_config={**own, "eos_token": "<end>"})
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: ...\n")
    assert load_tokenizer("HuggingFaceTokenizer", folder).eod == 1
    assert not (tmp_path / "ran").exists()


def test_special_tokens_inside_a_text(tokenizer_json: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tokenizer_json, tmp_path, tokenizer_config={"eos_token": "<end>"})
    text = f"{WORDS}<end> and <|endoftext|>"
    expected = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for split in (False, True):
        found = load_tokenizer("HuggingFaceTokenizer", folder, split_special_tokens=split)
        ids = found.encode(text)
        assert ids == expected.encode(text, split_special_tokens=split)
        assert (1 in ids) is not split and found.decode(ids) == text


def test_sentencepiece_reads_names_of_control_tokens_as_text(
    tokenizer_model: str, tmp_path: Path
) -> None:
    text = f"{WORDS}</s> <s> {WORDS}"
    for split in (False, True):
        tokenizer = load_tokenizer(
            "SentencePieceTokenizer", tokenizer_model, split_special_tokens=split
        )
        assert not {1, 2} & set(tokenizer.encode(text))
    (tmp_path / "text").write_text("\n".join(WORDS[i:] for i in range(40)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "own"),
        vocab_size=40,
        user_defined_symbols=["<own>"],
        minloglevel=2,
    )
    own = str(tmp_path / "own.model")
    assert 3 in load_tokenizer("SentencePieceTokenizer", own).encode("a<own>b")
    with pytest.raises(DataError, match=r"--split-special-tokens.*<own>"):
        load_tokenizer("SentencePieceTokenizer", own, split_special_tokens=True)
    with pytest.raises(DataError, match="--split-special-tokens"):
        load_tokenizer("NullTokenizer", None, 50, split_special_tokens=True)


def test_null_tokenizer_reads_numbers() -> None:
    tokenizer = load_tokenizer("NullTokenizer", None, 50)
    assert tokenizer.encode("0 7  49\n") == [0, 7, 49]
    assert (tokenizer.vocab_size, tokenizer.eod) == (50, 49)
    for text in ("50", "-1", "word"):
        with pytest.raises(DataError):
            tokenizer.encode(text)


def test_wrong_files_are_refused(
    tokenizer_model: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    cases = [
        ("SentencePieceTokenizer", str(tokenizer_json), "not a SentencePiece model"),
        ("SentencePieceTokenizer", str(tmp_path), "not a SentencePiece model"),
        ("HuggingFaceTokenizer", tokenizer_model, "not a Hugging Face tokenizer"),
        ("HuggingFaceTokenizer", str(tmp_path), "transformers cannot read it"),
        ("HuggingFaceTokenizer", "gpt2", "no such file or folder"),
        ("SentencePieceTokenizer", None, "needs a file"),
        ("NullTokenizer", None, "needs the number of ids"),
        ("GPT2BPETokenizer", tokenizer_model, "unknown kind"),
    ]
    for kind, model, message in cases:
        with pytest.raises(DataError, match=message):
            load_tokenizer(kind, model)


def test_tokens_that_only_the_model_has_are_no_text(
    tokenizer_model: str, tokenizer_json: Path
) -> None:
    """A model's vocabulary can be larger than its tokenizer's, and any of it can be drawn."""
    for kind, place in (
        ("SentencePieceTokenizer", tokenizer_model),
        ("HuggingFaceTokenizer", str(tokenizer_json)),
    ):
        tokenizer = load_tokenizer(kind, place)
        ids = tokenizer.encode("shared keys")
        beyond = tokenizer.vocab_size + 7
        assert tokenizer.decode([*ids, beyond]) == tokenizer.decode(ids)
        assert tokenizer.decode([beyond]) == ""


class TestChats:
    TEMPLATE = (
        "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    @pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
    def test_the_template_of_the_folder(
        self, where: str, tokenizer_json: Path, tmp_path: Path
    ) -> None:
        folder = folder_with(tokenizer_json, tmp_path, tokenizer_config={"eos_token": "<end>"})
        if where == "chat_template.jinja":
            (tmp_path / where).write_text(self.TEMPLATE)
        else:
            config = {"eos_token": "<end>", "chat_template": self.TEMPLATE}
            (tmp_path / where).write_text(json.dumps(config))
        tokenizer = HuggingFaceTokenizer(Path(folder))
        assert tokenizer.has_chat_template
        text = tokenizer.chat_text([{"role": "user", "content": "keys?"}])
        assert text == "user: keys?<end>assistant: "
        with pytest.raises(DataError, match="no judges"):
            tokenizer.chat_text([{"role": "judge", "content": "keys?"}])

    def test_where_there_is_none(self, tokenizer_json: Path, tmp_path: Path) -> None:
        assert not HuggingFaceTokenizer(tokenizer_json).has_chat_template
        folder = folder_with(tokenizer_json, tmp_path, tokenizer_config={"eos_token": "<end>"})
        assert not HuggingFaceTokenizer(Path(folder)).has_chat_template
