"""What a checkpoint says about itself: ``kvshare.json``, and the check against a run. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_kvshare.config import CheckpointConfig
from megatron_kvshare.config.flags.settings import flag_of
from megatron_kvshare.errors import CheckpointError, Fault, KVShareError
from megatron_kvshare.rope import ROPE_SETTINGS
from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.solver import Recipe, recipe_name

MANIFEST = "kvshare.json"
FORMAT_VERSION = 9
Layout = Literal["native", "deepspeed"]

# What reading a text that is no manifest, or one of an old version that is damaged, ends with.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

# The weights fit another value of these, so --finetune may change them; a resume may not.
_CHANGED_BY_FINETUNE = {
    "kv_recipe",
    "window_size",
    "tokenizer",
    "norm_epsilon",
    "rotary_base",
    "use_rope_scaling",
    "rope_scaling_type",
    "max_position_embeddings",
    *itertools.chain(*ROPE_SETTINGS.values()),
}


class Alarm(NamedTuple):
    """A sign of divergence: its ``cause`` in a few words, and what was ``seen`` at ``step``."""

    cause: str
    step: int
    seen: str


@dataclass(frozen=True)
class Health:
    """What the next step of a run is judged by, see ``train/anomaly.py``.

    Losses and unclipped gradient norms are those of steps that changed the weights. ``fresh``: the
    run began with new weights. ``alarms``: the signs of divergence so far, one of each cause.
    """

    skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()
    recent_norms: tuple[float, ...] = ()
    first_losses: tuple[float, ...] = ()
    fresh: bool = False
    alarms: tuple[Alarm, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Health:
        """As JSON holds it, and as far as it does: formats before 7 know the first two fields."""
        plain = {name: each for name, each in values.items() if not isinstance(each, list)}
        lists = {name: tuple(each) for name, each in values.items() if isinstance(each, list)}
        alarms = tuple(Alarm(*each) for each in lists.pop("alarms", ()))
        return cls(**plain, **lists, alarms=alarms)


@dataclass(frozen=True)
class Progress:
    """How far a run has come; ``tokens`` counts all tokens of all batches, masked ones too.

    ``tokens_by_source``: the same by the prefix of the data; empty for made-up ones, and before
    version 9.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    health: Health = field(default_factory=Health)


@dataclass(frozen=True)
class Manifest:
    """``identity`` is what the weights are made for; ``config`` is there for the reader.

    ``has_optimizer``: its state is inside, as the same tensors whatever optimizer wrote it.
    """

    identity: dict[str, Any]
    progress: Progress
    tensor_parallel: int
    data_parallel: int
    has_optimizer: bool
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    pipeline_parallel: int = 1
    format_version: int = FORMAT_VERSION
    data: dict[str, Any] = field(default_factory=dict)
    """What the run reads, see :attr:`megatron_kvshare.data.train_data.TrainData.identity`; empty
    before version 5."""
    tracking: dict[str, str] = field(default_factory=dict)
    """Names under which trackers know the run, so that a resumed run is the same one there."""
    layout: Layout = "native"
    """Who wrote weights and optimizer state, in files of which form; native before version 8."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Marks of the other files, see :mod:`megatron_kvshare.checkpoint.integrity`; none before
    version 4."""

    def write(self, folder: Path) -> None:
        """Write ``kvshare.json``, with its own SHA-256 inside."""
        values = asdict(self)
        values["sha256"] = _digest(values)
        text = json.dumps(values, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest, however it is laid out as text."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_file_name(name: str) -> bool:
    """Whether it names something in a folder, and nothing else anywhere."""
    return name not in ("", ".", "..") and not any(each in name for each in "/\\\0")


def file_inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a checkpoint, where what is read says the name.

    Raises:
        ValueError: it would be a file outside the folder, by its path or through a link.
    """
    if not is_file_name(name):
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise ValueError(f"{name} is a link that leads out of the folder")
    return path


class NewerFormat(CheckpointError):
    """A checkpoint of a later version of this program: sound, but it cannot be read."""


def read_manifest(folder: Path) -> Manifest:
    """Read ``kvshare.json``. Raises :class:`CheckpointError` if missing, damaged or too new."""
    path = folder / MANIFEST
    try:
        values = _checked(json.loads(path.read_text(encoding="utf-8")))
        version = values["format_version"]
        if version > FORMAT_VERSION:
            rule = (
                f"format version {version} is newer than {FORMAT_VERSION}, which this version reads"
            )
            raise NewerFormat(Fault(str(path), version, rule, "update megatron_kvshare"))
        values.pop("sha256", None)
        if version < 6:
            values["has_optimizer"] = values.pop("optimizer_format") is not None
        if version < 2:
            values["identity"]["kv_recipe"] = _recipe_of_version_1(values)
        recipe = values["identity"].get("kv_recipe")
        if recipe is not None:  # its parts have had other names
            values["identity"]["kv_recipe"] = Recipe.from_dict(recipe).as_dict()
        return Manifest(**{**values, "progress": _progress(values["progress"])})
    except NewerFormat:
        raise
    except (*_DAMAGE, KVShareError) as error:
        rule = "this is not a complete checkpoint of megatron_kvshare"
        fix = "load another iter_* folder, by its number in latest_checkpointed_iteration.txt"
        raise CheckpointError(Fault(str(path), str(error), rule, fix)) from error


def _checked(values: Any) -> dict[str, Any]:
    """A manifest that is what was written, as far as its format lets that be seen.

    Only then does its version mean anything: one flipped bit makes a version that needs no
    checksum, or one that is yet to come. So a checksum is checked wherever there is one, and later
    versions must keep its rule.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(values, dict):
        raise ValueError("it must be a JSON object")
    version = values["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version {version!r} is not a version")
    if ("sha256" in values or version >= 4) and values["sha256"] != _digest(values):
        raise ValueError("its text is not what was written (SHA-256)")
    if not all(map(is_file_name, values.get("files", ()))):
        raise ValueError("it names files outside its folder")
    return values


def _progress(values: dict[str, Any]) -> Progress:
    """Before version 7 what is now ``health`` lay beside the counters."""
    counting = ("step", "samples", "tokens", "skipped_steps", "tokens_by_source")
    counters = {name: values[name] for name in counting if name in values}
    rest = {name: each for name, each in values.items() if name not in counters}
    return Progress(**counters, health=Health.from_dict(rest.get("health", rest)))


def _recipe_of_version_1(values: dict[str, Any]) -> dict[str, Any] | None:
    """Version 1 knew the published passes only and wrote their numbers among the settings."""
    if not SharingMap.parse(values["identity"]["kv_map"]).is_cyclic:
        return None
    forward, backward = (values["config"][f"kv_{kind}_passes"] for kind in ("forward", "backward"))
    return Recipe(forward_sweeps=forward, backward_sweeps=backward).as_dict()


def check_identity(manifest: Manifest, run: dict[str, Any], finetune: bool) -> None:
    """Raise :class:`CheckpointError` with every difference between a checkpoint and a run."""
    stored = manifest.identity
    faults = [
        Fault(
            _where(name),
            _shown(run, name),
            f"the checkpoint has {_shown(stored, name)!r}",
            _fix(name),
        )
        for name in dict.fromkeys((*stored, *run))
        if stored.get(name) != run.get(name)
        and not (finetune and name in _CHANGED_BY_FINETUNE)
        and not (name == "tokenizer" and None in (stored.get(name), run.get(name)))
    ]
    if faults:
        raise CheckpointError(faults)


def data_changes(stored: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What a run reads otherwise than the checkpoint did, a line for each difference.

    Parts of the data that only one of them reads are not compared: evaluation may be turned on.
    Before version 9 there were no stages.
    """
    stored = {"stages": [], **stored} if stored else {}
    return [
        f"{name} was {_data_text(stored[name])}, now {_data_text(run[name])}"
        for name in stored
        if name in run and not _same_contents(stored[name], run[name])
    ]


def _same_contents(stored: Any, run: Any) -> bool:
    """By what the checkpoint knows of each source: older ones know nothing of the index beyond the
    lengths of the documents. Paths are left out, for data may be moved."""
    if isinstance(stored, list) and isinstance(run, list):
        return len(stored) == len(run) and all(map(_same_contents, stored, run))
    if isinstance(stored, dict) and isinstance(run, dict):
        names = stored.keys() - {"source"}
        return all(_same_contents(stored[name], run.get(name)) for name in names)
    return bool(stored == run)


def tokens_after_move(
    tokens: dict[str, int], stored: dict[str, Any], run: dict[str, Any]
) -> dict[str, int]:
    """``tokens`` by the prefixes that a run reads today, where the data ``stored`` has been
    moved."""
    names = {
        before["source"]: now["source"]
        for before, now in zip(_training_rows(stored), _training_rows(run), strict=False)
        if _same_contents(before, now)
    }
    found: dict[str, int] = {}
    for source, count in tokens.items():
        name = names.get(source, source)
        found[name] = found.get(name, 0) + count
    return found


def _training_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    stages = [stage["train"] for stage in data.get("stages", ())]
    return [row for rows in (data.get("train", []), *stages) for row in rows]


def _data_text(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    if any("first_sample" in each for each in value):
        return " and ".join(
            f"from sample {each['first_sample']:,} on {_data_text(each['train'])}" for each in value
        )
    return " + ".join(map(_row_text, value)) or "none"


def _row_text(row: dict[str, Any]) -> str:
    return (
        f"{row['weight']:.4g} x {row['source']} (documents {row['documents'][0]} to"
        f" {row['documents'][1]}, fingerprint {row['fingerprint'][:12]}{_index_text(row)})"
    )


def _index_text(row: dict[str, Any]) -> str:
    return f", index {row['index_sha256'][:8]}" if "index_sha256" in row else ""


def check_data(manifest: Manifest, run: dict[str, Any], settings: CheckpointConfig) -> list[str]:
    """Changes of the data that were accepted by ``--data-change-ok``.

    Raises:
        CheckpointError: the run would go on with other data than the checkpoint without being told
        to.
    """
    changes = [] if settings.finetune else data_changes(manifest.data, run)
    if not changes or settings.data_change_ok:
        return changes
    rule = f"this run reads other data than the checkpoint: {'; '.join(changes)}"
    fix = "give the same data, or add --data-change-ok to go on with the new"
    raise CheckpointError(Fault("--load", settings.load, rule, fix))


def _shown(identity: dict[str, Any], name: str) -> Any:
    value = identity.get(name)
    recipe = name == "kv_recipe" and value is not None
    return recipe_name(Recipe.from_dict(value)) if recipe else value


def _where(name: str) -> str:
    return "tokenizer" if name == "tokenizer" else flag_of(name)


def _fix(name: str) -> str:
    if name == "tokenizer":
        return "use the tokenizer (and data) that the checkpoint was trained with"
    if name == "kv_map":
        return "use the checkpoint's map, or start without --load"
    if name == "kv_recipe":
        return (
            "leave out --kv-recipe and the flags of its parts to go on with the checkpoint's, or"
            " train on with another by --finetune"
        )
    return "use the checkpoint's value, or start without --load"
