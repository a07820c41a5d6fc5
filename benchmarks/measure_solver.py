"""Measures one trained run of benchmarks/solvers.py: takes the flags of its ``kvshare pretrain``.

Writes measured.json beside the checkpoint: iterated and exact validation loss, training FLOPs and
time, the gap after more sweeps, and for prefill the error, work and time of several plans.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.costs.cost import prefill_work, standard_plan, train_flops_per_token
from megatron_kvshare.megatron_api import parallel
from megatron_kvshare.model import KVShareGPT
from megatron_kvshare.model.parameters import initialize
from megatron_kvshare.sharing.plan import ExecutionPlan
from megatron_kvshare.sharing.solver import Recipe, Solver, exact_plan, solver_plan
from megatron_kvshare.spec.run_plan import RunPlan
from megatron_kvshare.train.evaluation import evaluation_sums
from megatron_kvshare.train.run import Run
from megatron_kvshare.train.setup import prepare

PREFILLS = {
    **{f"jacobi {n}": (1, n) for n in (1, 2, 3, 4, 6, 9)},
    **{f"strided({g}) {n}": (g, n) for g in (2, 4, 8, 16) for n in (1, 2, 3, 4)},
}
"""Stride and number of sweeps."""
PREFILL_BATCHES = 2


def main() -> None:
    config = parse_pretrain(sys.argv[1:])
    torch.set_num_threads(1)
    state = parallel.initialize(backend="gloo")
    run = prepare(RunPlan.of(config, state.world_size), state)
    assert run.progress.step == config.train.train_iters, "the run is not finished"
    (model,) = run.engine.stages
    model.eval()
    folder = Path(config.checkpoint.save or "").parent
    with torch.no_grad():
        measured = measure(run, folder / "metrics.jsonl")
    (folder / "measured.json").write_text(json.dumps(measured))
    parallel.destroy()


def measure(run: Run, metrics: Path) -> dict[str, Any]:
    batches, length = run.config.train.eval_iters, run.config.model.seq_length
    found = {
        "iterated_loss": evaluation_sums(run, run.plan, batches).mean_loss,
        "train_flops": train_flops_per_token(run.spec.shape, run.plan) * run.progress.tokens,
        **_training(metrics),
    }
    found["exact_loss"] = found["iterated_loss"]
    if run.plan.map.is_cyclic:
        exact = exact_plan(run.plan.map, length, 1e-6)
        found["exact_loss"] = evaluation_sums(run, exact, batches).mean_loss
        found["prefill"] = prefills(run, exact)
    return found


def _training(metrics: Path) -> dict[str, Any]:
    """The curve ``[[tokens, loss], ...]`` of the last try at each step, and the seconds that all
    steps take at the speed of the fastest tenth of them: runs share the machine with other work."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    records = {record["step"]: record for record in lines if "loss" in record}
    curve = [[each["tokens"], round(each["loss"], 4)] for _, each in sorted(records.items())]
    speed = statistics.quantiles((r["tokens_per_second"] for r in records.values()), n=10)[-1]
    return {"train_seconds": round(curve[-1][0] / speed), "curve": curve}


def prefills(run: Run, exact: ExecutionPlan) -> list[dict[str, Any]]:
    """Loss and logits of several plans beside exact ones, their time over a standard stack's."""
    tokens = next(run.data.valid_batches()).tokens[:1]
    true_loss = evaluation_sums(run, exact, PREFILL_BATCHES).mean_loss
    true_logits = run.engine.stages[0](tokens, plan=exact).value[..., : run.spec.vocab_size]
    standard = standard_model(run)
    rows = []
    for name, (stride, sweeps) in PREFILLS.items():
        plan = _plan(run, stride, sweeps)
        logits = run.engine.stages[0](tokens, plan=plan).value[..., : run.spec.vocab_size]
        rows.append(
            {
                "plan": name,
                "stride": stride,
                "sweeps": sweeps,
                "work": prefill_work(plan),
                "loss_difference": evaluation_sums(run, plan, PREFILL_BATCHES).mean_loss
                - true_loss,
                "logit_difference": float((logits - true_logits).abs().mean()),
                "time_over_standard": _time_ratio(run, plan, standard, tokens),
            }
        )
    return rows


def _plan(run: Run, stride: int, sweeps: int) -> ExecutionPlan:
    solver = Solver.STRIDED if stride > 1 else Solver.JACOBI
    numbers = {"forward_sweeps": sweeps - 1, "backward_sweeps": 1}
    return solver_plan(run.plan.map, Recipe(solver=solver, stride=stride, **numbers))


def standard_model(run: Run) -> KVShareGPT:
    """An untrained standard map of the same shape, for its time."""
    plan = standard_plan(run.config.model.num_layers)
    spec = replace(run.spec, map=plan.map)
    model = KVShareGPT(spec, run.config.parallel, plan, run.state)
    initialize(model, seed=1)
    return model


def _time_ratio(
    run: Run, plan: ExecutionPlan, standard: KVShareGPT, tokens: torch.Tensor, pairs: int = 5
) -> float:
    """Median over pairs of a prefill with the plan and one of the standard model after it."""
    ratios = []
    for _ in range(pairs + 1):
        start = time.perf_counter()
        run.engine.stages[0](tokens, plan=plan)
        middle = time.perf_counter()
        standard(tokens)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios[1:])


if __name__ == "__main__":
    main()
