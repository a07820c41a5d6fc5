"""Exports in bf16 by transformers (sdpa): logits and generation against the native model in fp32.

What may differ is rounding, and how keys are read: transformers masks all tokens, the native model
reads long token subsets block by block.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_kvshare import load_model
from megatron_kvshare.checkpoint.reader import open_checkpoint
from megatron_kvshare.conversion.export import ExportJob, export
from megatron_kvshare.evaluation.api import LoadedModel
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.context import BLOCKWISE_FROM
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.sharing.solver import RECIPES
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.saving import save
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step
from tests.distributed.world import Layout
from tests.huggingface import code_copied_to
from tests.integration.pretrain_jobs import MAPS, config_of
from tests.parity.test_gpu_route import route
from tests.product import random_tokens, relative_differences

BF16 = 2e-2
"""Largest relative norm of a difference to fp32."""
VOCABULARY, SHORT, NEW = 100, 24, 8
STRIDED, STRIDE = next((name, each.stride) for name, each in RECIPES.items() if each.stride > 1)
LONG = STRIDE * BLOCKWISE_FROM


class Export(NamedTuple):
    """One trained model: in bf16 natively, by transformers, and natively in fp32."""

    native: KVShareGPT
    by_transformers: Any
    fp32: LoadedModel


@pytest.fixture(scope="module")
def exported(
    single: ParallelState, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Export]]:
    """Of one kind of map, after three steps; made when it is first asked for."""
    with code_copied_to(tmp_path_factory.mktemp("modules")):
        yield cache(lambda kind: export_of(single, kind, tmp_path_factory.mktemp("export")))


@torch.enable_grad()  # tests ask for it where they want none
def export_of(state: ParallelState, kind: str, root: Path) -> Export:
    flags = f"--bf16 --seq-length {LONG} --micro-batch-size 1 --global-batch-size 1 --lr 1e-3"
    recipe = ["--kv-recipe", STRIDED] if kind == "cyclic" else []
    words = [*MAPS[kind], *recipe, *shlex.split(flags), "--save", str(root / "native")]
    run = prepare(RunPlan.of(config_of(Layout(), words), state.world_size), state)
    batches = run.data.train_batches(0)
    for step in (1, 2, 3):
        train_step(run, batches, step)
    save(run, last=True)
    job = ExportJob(save=root / "export", without_tokenizer=True)
    export(open_checkpoint(root / "native"), job, state)
    by_transformers = AutoModelForCausalLM.from_pretrained(
        root / "export",
        trust_remote_code=True,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    )
    native = run.engine.stages[0].eval()
    device = state.platform.device
    return Export(native, by_transformers.to(device).eval(), load_model(root / "native"))


def assert_close(got: Tensor, wanted: Tensor) -> None:
    (off,) = relative_differences({"logits": got.cpu()}, {"logits": wanted.cpu()}).values()
    assert off <= BF16


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "length"),
    [("standard", SHORT), ("bottom", SHORT), ("cyclic", SHORT), ("cyclic", LONG)],
)
def test_logits(kind: str, length: int, here: ParallelState, exported: Callable[[str], Export]):
    """By the sweeps of training."""
    native, by_transformers, fp32 = exported(kind)
    by_transformers.config.kv_prefill = "trained"
    tokens = random_tokens(VOCABULARY, 2, length).to(here.platform.device)
    wanted = fp32.logits(tokens, mode="sweeps")
    with route(here) as log:
        ours = native(tokens, plan=fp32.plan("sweeps", length)).value[..., :VOCABULARY]
    if log is not None:
        assert bool(log["flash_forward"]) == (length == LONG)
    theirs = by_transformers(tokens).logits
    assert ours.isfinite().all() and theirs.isfinite().all()
    assert_close(ours, wanted)
    assert_close(theirs, wanted)
    assert_close(theirs, ours)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "use_cache", "pads"),
    [
        *((kind, use_cache, (0, 0)) for kind in MAPS for use_cache in (True, False)),
        ("cyclic", True, (0, 9)),
    ],
)
def test_greedy_generation(
    kind: str,
    use_cache: bool,
    pads: tuple[int, int],
    here: ParallelState,
    exported: Callable[[str], Export],
):
    """Logits of every new token are the exact ones of the text up to it; pads are on the left."""
    _, by_transformers, fp32 = exported(kind)
    by_transformers.config.kv_prefill = "exact"
    prompt = random_tokens(VOCABULARY, len(pads), SHORT).to(here.platform.device)
    real = torch.stack([torch.arange(SHORT) >= pad for pad in pads]).to(prompt.device)
    out = by_transformers.generate(
        prompt * real,
        attention_mask=real.long(),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[1] == SHORT + NEW
    for row, pad, got in zip(out.sequences, pads, torch.stack(out.logits, dim=1), strict=True):
        wanted = fp32.logits(row[None, pad:-1], mode="exact")[0, -NEW:]
        assert_close(got, wanted)
        assert torch.equal(got.argmax(-1), row[-NEW:])
