"""Another engine, in torch alone, trains the golden runs: the loop knows the protocol only, and two
optimizers that share no code come to the same losses."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field

import pytest
import torch

from megatron_kvshare.checkpoint.save import content
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.megatron_api.optimizer import learning_rate
from megatron_kvshare.pipeline.runner import Sums, counted_tokens
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train import setup
from megatron_kvshare.train.pretrain import pretrain
from megatron_kvshare.train.report import Typed
from tests.parity.golden import FILE, FLAGS, cases


@dataclass
class PlainEngine:
    """torch's AdamW over the whole model, on one process; checkpoints of weights alone."""

    planned: RunPlan
    stages: list
    state: object
    adamw: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.train = self.planned.config.train
        groups = [
            {"params": [x for x in self.weights if x.decays is decays], "weight_decay": decay}
            for decays, decay in ((True, self.train.weight_decay), (False, 0.0))
        ]
        betas = (self.train.adam_beta1, self.train.adam_beta2)
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=self.train.adam_eps)

    @property
    def weights(self):
        return list(self.stages[0].parameters())

    def forward_backward(self, batches, how):
        self.adamw.zero_grad()
        sums = self._sums(batches, how, self.planned.batch.num_microbatches, torch.Tensor.backward)
        for weight in self.weights:
            weight.grad /= float(sums.num_tokens.sum())
        return sums

    @torch.no_grad()
    def evaluate(self, batches, how, global_batches):
        count = global_batches * self.planned.batch.num_microbatches
        return self._sums(batches, how, count, lambda loss: None)

    def _sums(self, batches, how, count, use):
        each = []
        for _ in range(count):
            batch = next(batches)
            kinds = (batch.tokens, batch.labels, batch.position_ids, batch.document_ids)
            counted = counted_tokens(batch)
            output = self.stages[0](
                *kinds, measure_residual=how.measure_residual, plan=how.plan, counted=counted
            )
            use(output.loss)
            each.append(Sums.of(output.value, counted, output.residuals))
        return Sums.stack(each)

    def evaluating(self):
        return contextlib.nullcontext()

    whole_weights = evaluating

    def set_learning_rate(self, step):
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.train, step)
        return group["lr"]

    def gradient_norm(self):
        return float(torch.nn.utils.clip_grad_norm_(self.weights, self.train.clip_grad))

    def update(self, grad_norm):
        self.adamw.step()

    def state_shards(self, with_optimizer):
        assert not with_optimizer
        return contextlib.nullcontext(content(self.stages, None, self.state))


@pytest.mark.parametrize("name", ["standard", "pizza-bottom.l2", "sandwich-top.l2, two-sweep"])
def test_another_engine_trains_the_golden_runs(single, tmp_path, monkeypatch, name):
    monkeypatch.setattr(setup, "build_engine", PlainEngine)
    words = [*FLAGS, *cases()[name].flags, "--metrics-file", str(tmp_path / "metrics.jsonl")]
    words += ["--save", str(tmp_path / "weights"), "--no-save-optim", "--eval-iters", "1"]
    run = pretrain(RunPlan.of(parse_pretrain(words), 1), single, Typed(["kvshare"], ["kvshare"]))
    assert isinstance(run.engine, PlainEngine)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    wanted = json.loads(FILE.read_text())["cases"][name]["losses"]
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert run.saved is not None and run.saved.name == "iter_0000005"
