"""Runs in the environment of vLLM: serves folders one after another and writes what came out.

``python serve_with_vllm.py JOBS.json RESULTS.json``; a job is ``{"folder": ..., "settings": ...}``
beside common ``settings``, ``prompts`` (token ids) and the number of new ``tokens``.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def main(jobs: Path, results: Path) -> None:
    wanted = json.loads(jobs.read_text())
    found = {}
    for name, job in wanted["jobs"].items():
        found[name] = one(job, wanted)
        results.write_text(json.dumps(found))


def one(job: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """What is generated and how large the cache is, or the error that stopped it."""
    try:
        llm = LLM(model=job["folder"], **{**common["settings"], **job["settings"]})
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    sampling = SamplingParams(
        temperature=0, max_tokens=common["tokens"], logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in common["prompts"]]
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling)]
    settings = llm.llm_engine.vllm_config
    caches = llm.collective_rpc("get_kv_cache_spec")[0]
    found = {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [of[token].logprob for of, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ],
        "cache tokens": settings.cache_config.num_gpu_blocks * settings.cache_config.block_size,
        "caches": {name: type(spec).__name__ for name, spec in caches.items()},
        "chunked": settings.scheduler_config.enable_chunked_prefill,
        "architecture": settings.model_config.architecture,
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
