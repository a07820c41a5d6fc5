"""Data sets of the library ``datasets``: saved on this machine, or of the Hugging Face hub by name,
streamed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from megatron_kvshare.errors import DataError, Fault

_SCHEME = "hf://datasets/"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDING = re.compile(r"\.(jsonl?|ndjson|txt|md|gz|bz2|xz|zstd?|parquet|arrow|feather|csv)$")


class HubName(NamedTuple):
    """What of a data set is read, at one commit."""

    name: str
    config: str | None
    split: str
    revision: str


def hub_name(word: str) -> str | None:
    """The name of a data set that a word may mean: ``owner/name`` or ``hf://datasets/...``."""
    name = word.removeprefix(_SCHEME).rstrip("/")
    if word.startswith(_SCHEME) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return name
    return name if _NAME.fullmatch(word) and not _FILE_ENDING.search(word.lower()) else None


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` made a folder."""
    if (folder / "dataset_dict.json").is_file():
        return True
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def open_saved(folder: Path, split: str) -> Any:
    """The data set saved in a folder; of several splits the one named.

    Raises:
        DataError: it cannot be read, or has no such split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds for a damaged folder
        rule = f"the data set saved there cannot be read ({_shown(error)})"
        fix = "check that the folder is complete"
        raise DataError(Fault("--input", str(folder), rule, fix)) from error
    if not isinstance(found, dict):
        return found
    if split not in found:
        rule = f"the data set in {folder} has the splits {', '.join(found) or '(none)'}"
        raise DataError(Fault("--dataset-split", split, rule, "name one of them"))
    return found[split]


def pinned(name: str, revision: str | None, config: str | None, split: str) -> HubName:
    """A data set of the hub at the commit that ``revision`` means now.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # of the library, of the network below it, or for being offline
        rule = (
            f"there is no such file or folder, and as a data set of the Hugging Face hub it cannot"
            f" be looked up ({_shown(error)})"
        )
        fix = "check the path; for a data set, its name and --revision, and that the hub is within"
        fix += " reach (HF_HUB_OFFLINE off), or download it and give the folder"
        raise DataError(Fault("--input", name, rule, fix)) from error
    return HubName(name, config, split, str(sha))


def open_hub(name: HubName) -> Any:
    """Stream a data set of the hub."""
    import datasets

    return datasets.load_dataset(
        name.name, name.config, split=name.split, revision=name.revision, streaming=True
    )


def _shown(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
