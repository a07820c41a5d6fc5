"""The log of a run on the terminal."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from megatron_kvshare.output import complain, say


class Console:
    """The sink that prints one line per record."""

    def __init__(self, train_iters: int) -> None:
        self._total = train_iters
        self._lost = 0

    def write(self, record: dict[str, Any]) -> None:
        arrived = say(self._text(record))
        if not arrived and not self._lost:
            complain("warning: standard output cannot be written; the run goes on without it")
        if arrived and self._lost:
            complain(f"warning: standard output was lost for {self._lost} lines")
        self._lost = 0 if arrived else self._lost + 1

    def close(self) -> None:
        """Nothing to close."""

    def _at(self, record: dict[str, Any]) -> str:
        return f"step {record['step']:>{len(str(self._total))}}/{self._total}"

    def _text(self, record: dict[str, Any]) -> str:
        for part, name in (("valid", "validation"), ("test", "test")):
            if f"{part}_loss" in record:
                return self._evaluation(record, part, name)
        return self._train(record)

    def _evaluation(self, record: dict[str, Any], part: str, name: str) -> str:
        loss, perplexity = record[f"{part}_loss"], record[f"{part}_perplexity"]
        text = f"{self._at(record)} | {name} loss {loss:.4f} | perplexity {perplexity:.2f}"
        gap = record.get("valid_kv_gap")
        return text if gap is None else f"{text} | exact {gap:+.4f}"

    def _train(self, record: dict[str, Any]) -> str:
        parts = [
            f"{self._at(record)} ({record['step'] / self._total:.0%})",
            f"ETA {timedelta(seconds=round(record['eta_seconds']))}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.3g}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['tflops']:.3g} TFLOP/s",
            f"MFU {record['mfu']:.1%}",
        ]
        if "data_stage" in record:
            parts.append(f"data stage {record['data_stage']}")
        if "memory_allocated_gib" in record:
            allocated, reserved = record["memory_allocated_gib"], record["memory_reserved_gib"]
            parts.append(f"memory {allocated:.1f} of {reserved:.1f} GiB")
        if "kv_residual" in record:
            parts.append(f"KV residual {record['kv_residual']:.2g}")
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} steps skipped")
        return " | ".join(parts)
