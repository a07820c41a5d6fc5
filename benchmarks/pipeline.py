"""Where pipeline ranks are busy and where they wait: measured, simulated, and against a bound.

    python benchmarks/pipeline.py [--microbatches 8] [--json FILE] [--png FILE]

Trains each case for a few steps on two ranks with one thread each and records when every rank
computes; draws that as text and as a picture. Then the same orders are replayed with the measured
costs (the error is printed), and the schedules of more ranks are simulated with unit costs (a layer
forward 1, backward 2, without gradient forward only) beside the lower bound of any order.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lower_bound import lower_bound
from measure_pipeline import CASES, RANKS, Event, config_of

ROOT = Path(__file__).resolve().parents[1]
MEASURE = Path(__file__).with_name("measure_pipeline.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--png", default="pipeline.png", help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "events.json"
        launch(arguments.microbatches, found)
        events = {
            name: [Event(*each) for each in each_case]
            for name, each_case in json.loads(found.read_text()).items()
        }
    measured = [report(name, events[name], arguments.microbatches) for name in CASES]
    simulated = simulate()
    draw(events, Path(arguments.png))
    if arguments.json:
        text = json.dumps({"measured": measured, "simulated": simulated}, indent=1)
        Path(arguments.json).write_text(text + "\n")


def launch(microbatches: int, found: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc_per_node", str(RANKS), str(MEASURE), str(microbatches), str(found)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(words, check=True, env=environment, stdout=sys.stderr)


# ---- reports ----


def report(name: str, events: list[Event], microbatches: int) -> dict[str, Any]:
    graph, order = graph_of(name, events, microbatches)
    measured = max(e.end for e in events) - min(e.start for e in events)
    busy = [sum(e.end - e.start for e in events if e.rank == rank) for rank in range(RANKS)]
    replayed = replay(graph, order)
    bound = lower_bound(graph, microbatches)
    row = {
        "case": name,
        "microbatches": microbatches,
        "milliseconds": 1e3 * measured,
        "busy": [each / measured for each in busy],
        "bubble": 1 - sum(busy) / RANKS / measured,
        "replayed_over_measured": replayed / measured,
        "replayed_over_bound": replayed / bound,
        "bubble_of_bound": 1 - sum(busy) / RANKS / bound,
    }
    print(f"\n{name}: {row['milliseconds']:.0f} ms, {microbatches} microbatches, {RANKS} ranks")
    print(text_gantt(events))
    shares = ", ".join(f"{share:.0%}" for share in row["busy"])
    print(
        f"busy {shares}; bubble {row['bubble']:.1%}; replayed with measured costs"
        f" {row['replayed_over_measured']:.2f} x the measured time;"
        f" {row['replayed_over_bound']:.3f} x the lower bound of any order"
    )
    return row


def graph_of(name: str, events: list[Event], microbatches: int) -> tuple[Any, Any]:
    """The tasks with their median measured costs, and the order in which the ranks ran them."""
    from megatron_kvshare.spec.run_plan import RunPlan
    from megatron_kvshare.stages.order import Action, TaskGraph
    from megatron_kvshare.stages.tasks import tasks_of

    planned = RunPlan.of(config_of(CASES[name], microbatches), RANKS)
    if planned.placement.spanning_groups:
        tasks = tasks_of(planned.plan, planned.placement)
    else:
        tasks = stage_tasks(planned.placement)
    seconds: dict[tuple[bool, int], list[float]] = defaultdict(list)
    for event in events:
        seconds[event.forward, event.task].append(event.end - event.start)

    def cost(forward: bool, task: int) -> float:
        found = seconds.get((forward, task))
        return statistics.mean(found) if found else 0.0

    count = range(len(tasks))
    graph = TaskGraph(
        tasks, tuple(cost(True, t) for t in count), tuple(cost(False, t) for t in count), RANKS
    )
    order = [
        [
            Action(e.forward, e.task, e.microbatch)
            for e in sorted(events, key=lambda e: e.start)
            if e.rank == rank
        ]
        for rank in range(RANKS)
    ]
    return graph, order


def stage_tasks(placed: Any) -> tuple[Any, ...]:
    """One task for each stage: what the schedules of megatron-core run as a whole."""
    from megatron_kvshare.stages.tasks import EmbedTask, HeadTask, Key, Task

    first, *others = placed.stages
    tasks: list[Task] = [EmbedTask(stage=first, makes=(Key("hidden", first.stop),))]
    for stage in others:
        made = Key("hidden", stage.stop)
        tasks.append(HeadTask(stage=stage, hidden=Key("hidden", stage.first), makes=(made,)))
    return tuple(tasks)


def replay(graph: Any, order: Sequence[Sequence[Any]]) -> float:
    """Time that the ranks need for these orders, when messages cost nothing."""
    ran = {action for rank in order for action in rank}
    end: dict[Any, float] = {}
    clocks, places = [0.0] * len(order), [0] * len(order)
    while any(place < len(rank) for place, rank in zip(places, order, strict=True)):
        moved = False
        for rank, actions in enumerate(order):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                before = [each for each in graph.before(action) if each in ran]
                if any(each not in end for each in before):
                    break
                start = max([clocks[rank], *(end[each] for each in before)])
                clocks[rank] = end[action] = start + graph.cost(action)
                places[rank] += 1
                moved = True
        assert moved, "the recorded order is no order"
    return max(clocks)


def text_gantt(events: list[Event], columns: int = 100) -> str:
    """A line per rank: F forward, B backward, . waiting."""
    first, last = min(e.start for e in events), max(e.end for e in events)
    lines = []
    for rank in range(RANKS):
        cells = ["."] * columns
        for event in (e for e in events if e.rank == rank):
            start = int((event.start - first) / (last - first) * columns)
            stop = max(start + 1, round((event.end - first) / (last - first) * columns))
            cells[start:stop] = ["F" if event.forward else "B"] * len(cells[start:stop])
        lines.append(f"  rank {rank} |{''.join(cells)}|")
    return "\n".join(lines)


def draw(events: dict[str, list[Event]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(events), 1, figsize=(12, 1.5 * len(events)))
    for axis, (name, each) in zip(axes, events.items(), strict=True):
        first = min(e.start for e in each)
        for e in each:
            place = (1e3 * (e.start - first), 1e3 * (e.end - e.start))
            color = "C0" if e.forward else "C1"
            axis.broken_barh(
                [place], (e.rank - 0.4, 0.8), color=color, edgecolor="w", linewidth=0.4
            )
        axis.set(yticks=range(RANKS), ylim=(RANKS - 0.5, -0.5), ylabel="rank")
        axis.set_title(name, fontsize=9, loc="left")
    axes[-1].set_xlabel("milliseconds (blue forward, orange backward)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ---- simulation ----


def simulate() -> list[dict[str, Any]]:
    """Bubbles of more ranks, two layers each, unit costs."""
    from megatron_kvshare.sharing.patterns import build_map
    from megatron_kvshare.sharing.solver import RECIPES, Recipe, solver_plan
    from megatron_kvshare.stages.order import best_schedule, makespan

    recipes = {
        "jacobi(1, 2)": Recipe(forward_sweeps=1),
        **{name: RECIPES[name] for name in ("two-sweep", "one-sweep")},
    }
    rows = []
    print("\nsandwich-top, 3 KV layers, 2 layers per rank, unit costs: idle share (x of the bound)")
    for name, recipe in recipes.items():
        for ranks in (2, 4, 8, 16, 32, 64):
            graph = unit_graph(solver_plan(build_map(2 * ranks, "sandwich-top", 3), recipe), ranks)
            work = sum(graph.forward_cost) + sum(graph.backward_cost)
            cells = []
            for factor in (1, 2, 4, 8):
                microbatches = factor * ranks
                if microbatches * len(graph.tasks) > 40_000:
                    continue
                needed = makespan(best_schedule(graph, microbatches))
                bound = lower_bound(graph, microbatches)
                idle = 1 - work * microbatches / ranks / needed
                rows.append(
                    {
                        "recipe": name,
                        "ranks": ranks,
                        "microbatches": microbatches,
                        "idle": idle,
                        "over_bound": needed / bound,
                    }
                )
                cells.append(f"{microbatches:>4}: {idle:4.0%} ({needed / bound:.2f})")
            print(f"  {name:<13} {ranks:>3} ranks, microbatches " + "  ".join(cells))
    return rows


def unit_graph(plan: Any, ranks: int) -> Any:
    from megatron_kvshare.stages.order import TaskGraph
    from megatron_kvshare.stages.placement import Placement
    from megatron_kvshare.stages.tasks import FinishTask, LayersTask, VisitTask, tasks_of

    each = plan.map.num_layers // ranks
    tasks = tasks_of(plan, Placement(plan.map, (each,) * ranks, ranks))

    def forward(task: Any) -> float:
        if isinstance(task, VisitTask):
            return len(task.visit.steps) / task.sweep.stride
        if isinstance(task, LayersTask):
            return float(task.segment.num_layers)
        return float(isinstance(task, FinishTask))

    costs = tuple(map(forward, tasks))
    backward = tuple(2 * c if t.gradient else 0.0 for c, t in zip(costs, tasks, strict=True))
    return TaskGraph(tasks, costs, backward, ranks)


if __name__ == "__main__":
    main()
