"""The model card of an export: what it is, what computes it, how to load it."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_kvshare.checkpoint.manifest import Manifest
from megatron_kvshare.conversion.settings import is_plain_llama
from megatron_kvshare.costs.cost import costs
from megatron_kvshare.sharing.solver import recipe_name, solver_plan
from megatron_kvshare.spec.model_spec import ModelSpec
from megatron_kvshare.tables import maps as draw

_ITERATED = """\
Layers that read a higher one make the map *cyclic*: prompts and scored texts are computed in sweeps
over the bracketed layers, as in training ({recipe}); generation then goes on one exact step per
token. Pass `kv_prefill="converged"` or `"exact"` to `from_pretrained` to compute prompts (nearly)
as decoding does. Such a model needs the default `DynamicCache`; with flash attention only recipes
without token subsets run."""


def model_card(manifest: Manifest, spec: ModelSpec, name: str) -> str:
    """Markdown with the front matter of the hub."""
    plain = is_plain_llama(spec.map)
    plan = solver_plan(spec.map, spec.recipe)
    about = costs(spec.shape, plan)
    model = spec.model
    trust = "" if plain else ", trust_remote_code=True"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [kv-sharing, megatron_kvshare]",
        "---",
        f"# {name}",
        "",
        f"{about.parameters:,} parameters, {model.num_layers} layers of which "
        f"{len(spec.map.producers)} own keys and values: the KV cache takes "
        f"{about.kv_bytes_per_token:,} bytes per token in 16 bit, 1/{about.kv_reduction:.2f} of a "
        "model without sharing.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
        'inputs = tokenizer("The state of the", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        "```",
        "",
        f"## The map `{spec.map.notation}`",
        "",
        "```text",
        _drawn(spec),
        "```",
        "",
    ]
    if plan.groups:
        lines += [_ITERATED.format(recipe=recipe_name(spec.recipe)), ""]
    lines += ["## Training", "", *_training(manifest), ""]
    return "\n".join(lines)


def _drawn(spec: ModelSpec) -> str:
    plan = solver_plan(spec.map, spec.recipe)
    console = Console(file=io.StringIO(), width=100, no_color=True)
    console.print(draw.map_table(plan, spec.window_size))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _training(manifest: Manifest) -> list[str]:
    progress, config = manifest.progress, manifest.config
    if not progress.step:
        return ["Imported, not trained here."]
    rows = {
        "steps": f"{progress.step:,}",
        "tokens": f"{progress.tokens:,}",
        "sequence length": config.get("seq_length"),
        "global batch": config.get("global_batch_size"),
        "learning rate": config.get("lr"),
        "seed": config.get("seed"),
        **{f"version of {name}": version for name, version in manifest.versions.items()},
    }
    shown = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return ["| what | value |", "| --- | --- |", *shown]
