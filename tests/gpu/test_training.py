"""Sixty steps at about 110M on the embedded corpus: each recipe learns as it does by masks.

Masks are another kernel for every attention, so a fault of either shows as another course of the
loss, or in the gradient norm of the first step.
"""

from __future__ import annotations

import contextlib
import lzma
import math
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_kvshare.megatron_api.parallel import ParallelState
from megatron_kvshare.model.gpt import KVShareGPT
from megatron_kvshare.sharing.solver import RECIPES
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.run import StepResult
from megatron_kvshare.train.setup import prepare
from megatron_kvshare.train.step import train_step
from tests.integration.conftest import ROOT
from tests.parity.test_gpu_route import route

LOSS, FIRST_NORM = 0.15, 1e-2
"""Largest difference of the mean loss of the last five steps; of the first gradient norm, of it."""
EVERY = 4
"""One message in this many is enough for sixty steps, and soon tokenized."""


class Size(NamedTuple):
    """How large a run is; `learns`: what the loss falls by at least."""

    steps: int
    kv_layers: int
    learns: float
    flags: str


SIZES = {
    "cuda": Size(
        steps=60,
        kv_layers=6,
        learns=1.0,
        flags="--micro-batch-size 4 --global-batch-size 4 --lr 6e-4",
    ),
    "cpu": Size(
        steps=12,
        kv_layers=3,
        learns=0.5,
        flags="--micro-batch-size 1 --global-batch-size 1 --lr 3e-3 --num-layers 4"
        " --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 2 --num-query-groups 1",
    ),
}
"""On a GPU the 110M set's shape; on the CPU subsets that are as long, of a tiny model."""
COMMON = "--seq-length 2048 --lr-warmup-fraction 0.33 --eval-iters 0 --num-workers 0"
TOP = {name: f"--kv-pattern sandwich-top --kv-recipe {name}" for name in RECIPES}
KINDS = {"standard": "--kv-pattern standard", **TOP}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name the embedded corpus, tokenized as `examples/prepare_corpus.sh` does."""
    folder = tmp_path_factory.mktemp("corpus")
    (packed,) = (ROOT / "examples" / "data").glob("*.jsonl.xz")
    messages = lzma.decompress(packed.read_bytes()).splitlines()[::EVERY]
    text = folder / "messages.jsonl"
    text.write_bytes(b"\n".join(messages))
    made = train_tokenizer(
        TokenizerJob(inputs=(str(text),), output=str(folder / "tokenizer"), vocab_size=4096)
    )
    job = PreprocessJob(
        inputs=(str(text),),
        output_prefix=str(folder / "corpus"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(made.model),
        append_eod=True,
    )
    preprocess(job)
    return ["--data-path", *job.prefixes, "--tokenizer-model", job.tokenizer_model]


@contextlib.contextmanager
def by_masks() -> Iterator[None]:
    """Inside, every attention takes a mask: each text is declared to be one document."""
    contexts = KVShareGPT.contexts

    def of_one_document(
        self: KVShareGPT,
        token_ids: torch.Tensor,
        position_ids: Any = None,
        document_ids: Any = None,
    ) -> Any:
        if document_ids is None:
            document_ids = torch.zeros_like(token_ids)
        return contexts(self, token_ids, position_ids, document_ids)

    with mock.patch.object(KVShareGPT, "contexts", of_one_document):
        yield


def train(state: ParallelState, flags: list[str], steps: int) -> list[StepResult]:
    config = parse_pretrain([*flags, "--train-iters", str(steps)])
    run = prepare(RunPlan.of(config, state.world_size), state)
    batches = run.data.train_batches(0)
    return [train_step(run, batches, step) for step in range(1, steps + 1)]


def last_loss(results: list[StepResult]) -> float:
    return statistics.mean(result.loss for result in results[-5:])


@pytest.mark.parametrize("kind", KINDS)
def test_learns_as_by_masks(
    kind: str, here_nightly: ParallelState, corpus: list[str], tmp_path: Path
):
    size = SIZES[here_nightly.platform.device.type]
    config = ["--config", str(ROOT / "examples" / "configs" / "110m.yaml")]
    config += ["--save", str(tmp_path)]  # its save interval asks for one; nothing is saved here
    kv_layers = "" if kind == "standard" else f"--kv-layers {size.kv_layers}"
    flags = shlex.split(f"{COMMON} {size.flags} {KINDS[kind]} {kv_layers}")
    flags = [*config, *corpus, *flags]
    with route(here_nightly) as log:
        got = train(here_nightly, flags, size.steps)
    with route(here_nightly) as masked_log, by_masks():
        masked = train(here_nightly, flags, size.steps)
    if log is not None:
        reads_blocks = kind in RECIPES and RECIPES[kind].stride > 1
        assert bool(log["flash_backward"]) == reads_blocks
        assert masked_log["masked"] and not masked_log["flash_backward"] + masked_log["causal"]
    for result in (*got, *masked):
        assert math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        assert not result.skipped
    assert got[0].grad_norm == pytest.approx(masked[0].grad_norm, rel=FIRST_NORM)
    assert abs(last_loss(got) - last_loss(masked)) <= LOSS
    assert last_loss(got) < got[0].loss - size.learns
