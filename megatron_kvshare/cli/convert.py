"""``kvshare convert to-hf | from-hf | to-native``: checkpoints to and from other forms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.cli.subcommands import dispatch
from megatron_kvshare.config import SharingConfig
from megatron_kvshare.config.fields.types import SCHEMA, Seed, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.errors import ConfigError, Fault

_TO_EXAMPLES = """\
  kvshare convert to-hf --load runs/small-sandwich-top-4/checkpoint --save runs/hf
  python -c 'from transformers import AutoModelForCausalLM as M
  print(M.from_pretrained("runs/hf", trust_remote_code=True))'

--load is the --save folder of a run (its newest checkpoint), or one folder iter_* (DeepSpeed:
global_step*) in it, of any layout; one process is enough. A standard map becomes a plain
LlamaForCausalLM. The folder is proven before it gets its name: every tensor bit by bit, and the
logits of both models."""

_FROM_EXAMPLES = """\
  kvshare convert from-hf --hf llama --save runs/llama
  kvshare convert from-hf --hf llama --save runs/shared --kv-pattern sandwich-middle --kv-layers 15
  kvshare pretrain --load runs/shared --finetune ...

Takes exports of this program, Llama and Mistral models, and published LCKV checkpoints.
Checkpoints of stock Megatron-LM come in through their Hugging Face export. With --kv-pattern or
--kv-map a model without sharing becomes a shared-KV one, to be trained on."""

_NATIVE_EXAMPLES = """\
  kvshare convert to-native --load runs/deepspeed --save runs/native
  kvshare pretrain --load runs/native ...

--load is the --save folder of a run that DeepSpeed trained, or one global_step* folder in it, of
any ZeRO stage and number of ranks. One process without DeepSpeed and without a GPU reads its shards
as data; optimizer state comes along, and every tensor is compared. To train on, none of this is
needed: either engine loads what the other has saved."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ToHuggingFaceConfig:
    """Native checkpoint to Hugging Face folder."""

    load: str
    """The --save folder of a run, or one of the checkpoints in it."""
    save: str
    """Folder to write; it must not be there yet, or be empty."""
    tokenizer_model: str | None = None
    """Tokenizer file or folder; left out: the one the model was trained with."""
    trust_remote_code: bool = False
    """Run code that the folder of the tokenizer brings along; never done otherwise."""
    without_tokenizer: bool = False
    """Write no tokenizer files."""
    max_shard_gb: Annotated[float, Field(gt=0, le=1e9)] = 5.0
    """Largest size of one safetensors file, in GB."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class FromHuggingFaceConfig:
    """Hugging Face folder to native checkpoint."""

    hf: str
    """Folder with config.json and safetensors."""
    save: str
    """Folder to write, as --save of a run; it must not be there yet, or be empty."""
    kv_init: Literal["mean", "target", "aligned", "random"] = "aligned"
    """With another map: keys and values of a producer are the mean over the layers that read it
    after their heads are matched and turned (aligned), the plain mean (mean), its own (target), or
    drawn anew (random)."""
    seed: Seed = 1234
    """Seed of --kv-init random."""
    sharing: SharingConfig = field(default_factory=SharingConfig)


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class ToNativeConfig:
    """DeepSpeed's checkpoint to a native one."""

    load: str
    """The --save folder of a run, or one of the checkpoints in it."""
    save: str
    """Folder to write, as --save of a run; it must not be there yet, or be empty."""


def run(argv: Sequence[str]) -> int:
    """Run ``to-hf``, ``from-hf`` or ``to-native``."""
    directions: dict[str, Callable[[Sequence[str]], int]] = {
        "to-hf": _to_hf,
        "from-hf": _from_hf,
        "to-native": _to_native,
    }
    examples = f"{_TO_EXAMPLES}\n\n{_FROM_EXAMPLES}\n\n{_NATIVE_EXAMPLES}"
    return dispatch("kvshare convert", "direction", directions, examples, argv)


def _to_hf(argv: Sequence[str]) -> int:
    command = Command(
        "kvshare convert to-hf", "Write a checkpoint as a Hugging Face folder.", _TO_EXAMPLES
    )
    config = parse(ToHuggingFaceConfig, argv, command)
    from megatron_kvshare.checkpoint.reader import open_checkpoint
    from megatron_kvshare.conversion.export import ExportJob, export
    from megatron_kvshare.megatron_api import parallel

    stored = open_checkpoint(Path(config.load))
    for doubt in stored.doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    job = ExportJob(
        save=Path(config.save),
        tokenizer_model=config.tokenizer_model,
        trust_remote_code=config.trust_remote_code,
        without_tokenizer=config.without_tokenizer,
        max_shard_bytes=round(config.max_shard_gb * 1e9),
    )
    with parallel.alone() as state:
        _say(export(stored, job, state, _progress()))
    print(f"wrote {config.save}: {stored.folder} as a Hugging Face model")
    return 0


def _to_native(argv: Sequence[str]) -> int:
    command = Command(
        "kvshare convert to-native",
        "Write DeepSpeed's checkpoint as a native one.",
        _NATIVE_EXAMPLES,
    )
    config = parse(ToNativeConfig, argv, command)
    from megatron_kvshare.checkpoint.reader import open_checkpoint
    from megatron_kvshare.conversion.to_native import to_native
    from megatron_kvshare.megatron_api import parallel

    stored = open_checkpoint(Path(config.load))
    for doubt in stored.doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    with parallel.alone() as state:
        written = to_native(stored, Path(config.save), state)
    _say(written)
    print(f"wrote {written.folder}: {stored.folder} as a native checkpoint")
    return 0


def _from_hf(argv: Sequence[str]) -> int:
    command = Command(
        "kvshare convert from-hf", "Make a checkpoint of a Hugging Face folder.", _FROM_EXAMPLES
    )
    config = parse(FromHuggingFaceConfig, argv, command)
    from megatron_kvshare.conversion.importing import ImportJob, import_folder, open_folder
    from megatron_kvshare.conversion.kv_init import KVInit
    from megatron_kvshare.megatron_api import parallel

    changed = config.sharing.kv_map is not None or config.sharing.kv_pattern != "standard"
    if not changed and config.sharing != SharingConfig():
        rule = "the folder says how its own map is computed; these flags are for another map"
        fix = "give --kv-pattern or --kv-map too, or leave them out"
        raise ConfigError(Fault("--kv-*", config.sharing.kv_recipe, rule, fix))
    job = ImportJob(
        hf=Path(config.hf),
        save=Path(config.save),
        sharing=config.sharing if changed else None,
        kv_init=KVInit(config.kv_init),
        seed=config.seed,
    )
    found = open_folder(job.hf)
    for doubt in found.doubts:
        print(f"warning: {doubt}")
    for file in found.missing:
        print(f"warning: {job.hf} has no {file}; the weights are imported all the same")
    with parallel.alone() as state:
        _say(import_folder(found, job, state))
    print(f"wrote {job.save}; train on with: kvshare pretrain --load {job.save} --finetune ...")
    return 0


def _progress() -> Callable[[int, int], None]:
    line = ProgressLine()
    return lambda written, of: line.show(
        written / of, f"{written / 1e9:,.2f} of {of / 1e9:,.2f} GB"
    )


def _say(what: object) -> None:
    print(f"proven: {what}", file=sys.stderr)
