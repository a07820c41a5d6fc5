"""Tokens per second of `kvshare preprocess`, beside line-by-line tokenising in Megatron-LM's way.

    python benchmarks/preprocess.py [--pairs 5] [--mb 24] [--memory-mb 10 100 1000] [--json FILE]

Both read the same JSON lines (documents of 200 to 6,000 characters of the embedded corpus), with
the same tokenizer (byte-level BPE of 8,192 tokens, SentencePiece BPE of 4,096, trained here) and 2
worker processes. The other way is that of tools/preprocess_data.py: a pool that maps an encoder
over lines, 32 at a time, with megatron-core's tokenizer classes and its IndexedDatasetBuilder; its
clock starts when all is imported, the one of `kvshare preprocess` before its workers start. Runs
alternate, ratios are medians over pairs, and the files of both must be the same. On a machine that
does other work as well, the ratio of CPU seconds says more than that of rates.

Then: 1 worker against 2, with the share of the time that the parent is busy; and the peak memory of
parent and worker for inputs of several sizes (tokenized as bytes, which is quickest).
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_kvshare.data.preprocess import PreprocessJob, preprocess
from megatron_kvshare.data.train_tokenizer import TokenizerJob, train_tokenizer

CORPUS = Path(__file__).resolve().parents[1] / "examples" / "data" / "state_of_the_union.jsonl.xz"
WORKERS, CHUNK = 2, 32
HUGGING_FACE, SENTENCEPIECE = "HuggingFaceTokenizer", "SentencePieceTokenizer"
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="of runs (default: 5)")
    parser.add_argument("--mb", type=int, default=24, help="of text to tokenize (default: 24)")
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--json", help="write the figures to this file too")
    words = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with lzma.open(CORPUS) as lines:
            texts = [json.loads(line)["text"] for line in lines]
        corpus = write_corpus(folder, texts, words.mb)
        models = tokenizers(folder, texts)
        for kind, model in models.items():
            found[kind] = compared(kind, model, corpus, folder, words.pairs)
            print(shown(kind, found[kind]), flush=True)
        kind = HUGGING_FACE
        found["workers"] = scaled(kind, models[kind], corpus, folder, words.pairs)
        print(
            f"1 to 2 workers: {found['workers']['ratio']:.2f} x; the parent is busy"
            f" {found['workers']['parent_share']:.1%} of the time",
            flush=True,
        )
        found["memory"] = {size: memory(folder, texts, size) for size in words.memory_mb}
        for size, (parent, worker) in found["memory"].items():
            print(f"{size:,} MB: peak memory {parent:.0f} MB parent, {worker:.0f} MB worker")
    if words.json:
        Path(words.json).write_text(json.dumps(found, indent=1) + "\n")


def write_corpus(folder: Path, texts: list[str], megabytes: int) -> Path:
    """Documents cut out of the corpus at random, the same in every run."""
    draw = random.Random(1)
    path = folder / f"corpus-{megabytes}.jsonl"
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            text = draw.choice(texts)
            start = draw.randrange(max(1, len(text) - 3_000))
            document = text[start : start + draw.randrange(200, 6_000)]
            size += file.write(json.dumps({"text": document}) + "\n")
    return path


def tokenizers(folder: Path, texts: list[str]) -> dict[str, str]:
    from tokenizers import ByteLevelBPETokenizer

    fast = ByteLevelBPETokenizer()
    fast.train_from_iterator(texts[::4], vocab_size=8_192, special_tokens=[END])
    fast_folder = folder / "fast"
    fast_folder.mkdir()
    fast.save(str(fast_folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (fast_folder / "tokenizer_config.json").write_text(json.dumps(named))
    sample = folder / "sample.txt"
    sample.write_text("\n".join(texts[::4]), encoding="utf-8")
    job = TokenizerJob(inputs=(str(sample),), output=str(folder / "sp"), vocab_size=4_096)
    return {HUGGING_FACE: str(fast_folder), SENTENCEPIECE: str(train_tokenizer(job).model)}


def cpu_seconds() -> float:
    """CPU time of this process, and of its workers that have ended."""
    of = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, of))


def ours(
    kind: str, model: str | None, corpus: Path, prefix: Path, workers: int
) -> tuple[int, float, float]:
    """Tokens, seconds, and the seconds that the parent was busy."""
    job = PreprocessJob(
        inputs=(str(corpus),),
        output_prefix=str(prefix),
        tokenizer_type=kind,
        tokenizer_model=model,
        append_eod=True,
        workers=workers,
    )
    started, busy = time.monotonic(), time.process_time()
    counts = preprocess(job)
    return counts.tokens, time.monotonic() - started, time.process_time() - busy


class MegatronEncoder:
    """The encoder of tools/preprocess_data.py."""

    tokenizer: Any

    def __init__(self, kind: str, model: str) -> None:
        self.kind, self.model = kind, model

    def start(self) -> None:
        from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import (
            HuggingFaceTokenizer,
        )
        from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import (
            SentencePieceTokenizer,
        )

        chosen = HuggingFaceTokenizer if self.kind == HUGGING_FACE else SentencePieceTokenizer
        MegatronEncoder.tokenizer = chosen(self.model)

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        text = json.loads(line)["text"]
        ids = MegatronEncoder.tokenizer.text_to_ids(text)
        if ids:
            ids = [*ids, MegatronEncoder.tokenizer.eos_id]
        return ids, [len(ids)], len(line)


def theirs(kind: str, model: str, corpus: Path, prefix: Path) -> tuple[int, float]:
    """Tokens and seconds of Megatron-LM's way."""
    import megatron.core.tokenizers.text.libraries.huggingface_tokenizer
    import megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer  # noqa: F401
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = MegatronEncoder(kind, model)
    tokens = 0
    started = time.monotonic()
    with (
        corpus.open(encoding="utf-8") as lines,
        multiprocessing.get_context("fork").Pool(WORKERS, initializer=encoder.start) as pool,
    ):
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(8_192))
        for ids, lengths, _ in pool.imap(encoder.encode, lines, CHUNK):
            builder.add_document(ids, lengths)
            tokens += len(ids)
        builder.finalize(f"{prefix}.idx")
    return tokens, time.monotonic() - started


def compared(kind: str, model: str, corpus: Path, folder: Path, pairs: int) -> dict[str, Any]:
    """Rates of both ways, pair by pair."""
    rows = []
    for _ in range(pairs):
        begun = cpu_seconds()
        tokens, seconds, _ = ours(kind, model, corpus, folder / "ours", WORKERS)
        between = cpu_seconds()
        other, other_seconds = theirs(kind, model, corpus, folder / "theirs")
        used, other_used = between - begun, cpu_seconds() - between
        for suffix in (".bin", ".idx"):
            made = (folder / f"ours_text_document{suffix}").read_bytes()
            assert made == (folder / f"theirs{suffix}").read_bytes(), f"{kind}: {suffix} differs"
        rows.append((tokens / seconds, other / other_seconds, other_used / used))
    return {
        "tokens_per_second": statistics.median(rate for rate, _, _ in rows),
        "megatron_tokens_per_second": statistics.median(rate for _, rate, _ in rows),
        "ratios": [mine / other for mine, other, _ in rows],
        "ratio": statistics.median(mine / other for mine, other, _ in rows),
        "cpu_ratio": statistics.median(cpu for _, _, cpu in rows),
    }


def shown(kind: str, row: dict[str, Any]) -> str:
    ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
    return (
        f"{kind}: {row['tokens_per_second']:,.0f} tokens/s, in Megatron-LM's way"
        f" {row['megatron_tokens_per_second']:,.0f}, ratio {row['ratio']:.2f} ({ratios}), of CPU"
        f" seconds {row['cpu_ratio']:.2f}"
    )


def scaled(kind: str, model: str, corpus: Path, folder: Path, pairs: int) -> dict[str, Any]:
    """How much quicker 2 workers are than 1, both in processes of their own."""
    rows = list(_scaled(kind, model, corpus, folder, pairs))
    return {
        "ratio": statistics.median(ratio for ratio, _ in rows),
        "ratios": [ratio for ratio, _ in rows],
        "parent_share": statistics.median(share for _, share in rows),
    }


def _scaled(
    kind: str, model: str, corpus: Path, folder: Path, pairs: int
) -> Iterator[tuple[float, float]]:
    for _ in range(pairs):
        _, one, _ = ours(kind, model, corpus, folder / "one", 1)
        _, two, busy = ours(kind, model, corpus, folder / "two", WORKERS)
        yield one / two, busy / two


MEASURE = """
import resource, sys
from megatron_kvshare.cli.main import main
if __name__ == "__main__":
    assert main(["preprocess", *sys.argv[1:]]) == 0
    of = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print("peak", *(resource.getrusage(who).ru_maxrss for who in of))
"""


def memory(folder: Path, texts: list[str], megabytes: int) -> tuple[float, float]:
    """Peak memory in MB of the parent, and of the larger worker, for so much text."""
    corpus = write_corpus(folder, texts, megabytes)
    script = folder / "measure.py"
    script.write_text(MEASURE)
    words = ["--input", str(corpus), "--output-prefix", str(folder / "memory"), "--workers", "2"]
    command = [sys.executable, str(script), *words, "--tokenizer-type", "ByteLevelTokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    corpus.unlink()
    line = next(line for line in done.stdout.splitlines() if line.startswith("peak"))
    unit = 1024 if sys.platform == "linux" else 1
    parent, worker = (int(word) * unit / 1e6 for word in line.split()[1:])
    return parent, worker


if __name__ == "__main__":
    main()
