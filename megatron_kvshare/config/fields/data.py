"""Settings of data and tokenizer."""

from __future__ import annotations

from typing import Literal

from megatron_kvshare.config.fields.types import SCHEMA, Index, Positive, dataclass

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
]


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class DataConfig:
    """Data: indexed token files (.bin/.idx, made by `kvshare preprocess`) and the tokenizer."""

    data_path: tuple[str, ...] = ()
    """Prefix of the .bin/.idx files, or a blend: weight prefix weight prefix ..."""
    train_data_path: tuple[str, ...] = ()
    """Training data only, instead of --data-path with --split."""
    valid_data_path: tuple[str, ...] = ()
    """Validation data only."""
    test_data_path: tuple[str, ...] = ()
    """Test data only: read once, by --eval-iters batches, when the run has come to its end."""
    data_args_path: str | None = None
    """File with the words of --data-path, for long blends."""
    per_split_data_args_path: str | None = None
    """JSON file with the words of --train-data-path, --valid-data-path and --test-data-path, under
    the keys train, valid and test."""
    data_stages: str | None = None
    """YAML file with blends that take the place of the training data from a step or token on."""
    max_epochs: Positive | None = None
    """Refuse a run that reads a training source more often than this."""
    split: str = "969,30,1"
    """Shares of training, validation and test documents of --data-path."""
    data_cache_path: str | None = None
    """Folder for the index of samples; left out: beside the data."""
    mock_data: bool = False
    """Train on made-up tokens (no files needed)."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Kind of tokenizer; TikTokenizer is for files of tiktoken, ByteLevelTokenizer has no file."""
    tokenizer_model: str | None = None
    """Tokenizer file (SentencePiece) or folder (Hugging Face)."""
    trust_remote_code: bool = False
    """Run code that the folder of --tokenizer-model brings along; never done otherwise."""
    reset_position_ids: bool = False
    """Packed documents: start positions anew after each end-of-document token."""
    reset_attention_mask: bool = False
    """Packed documents: documents do not see each other."""
    eod_mask_loss: bool = False
    """Packed documents: no loss on end-of-document tokens."""
    num_workers: Index = 0
    """Loader processes per rank; 0 loads in the training process."""
