"""``kvshare generate``: text that follows a prompt, a file of prompts, or what is typed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kvshare.cli.engine_flags import EngineFlags, ServedModel, one_model, start
from megatron_kvshare.cli.progress import ProgressLine
from megatron_kvshare.config.fields.types import SCHEMA, Index, dataclass
from megatron_kvshare.config.flags.command_line import Command, parse
from megatron_kvshare.config.flags.rule import rule
from megatron_kvshare.errors import ConfigError, Fault
from megatron_kvshare.output import complain
from megatron_kvshare.serving.request import Output, Sampling

if TYPE_CHECKING:
    from megatron_kvshare.serving.engine import Engine
    from megatron_kvshare.serving.generate import Generated

_EXAMPLES = """\
  kvshare generate --hf runs/my/hf --prompt "The state of the union"
  kvshare generate --load runs/my/checkpoint --temperature 0 --max-tokens 64 --prompt "We" "They"
  kvshare generate --hf runs/my/hf --prompt-file prompts.jsonl --output answers.jsonl
  kvshare generate --hf runs/my/hf --interactive

One prompt streams to standard output; several are answered together, each after its prompt. A file
has a prompt on every line, or JSON lines with the key `prompt`; --output writes JSON lines with
prompt, text, tokens and finish_reason. --kv-prefill exact makes keys and values of prompts as
decoding does; what the choices mean: docs/serving.md."""


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class SamplingFlags:
    """How tokens are drawn."""

    max_tokens: Index = 128
    """Tokens that follow each prompt, at most."""
    temperature: float = 1.0
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: Index = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that were there before by this."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not shown."""
    ignore_eos: bool = False
    """Go on after the token that ends documents."""
    seed: Index | None = None
    """Of the first prompt; the next has the next one. Left out: random."""

    def sampling(self) -> Sampling:
        """As the engine takes them. Raises :class:`ConfigError` with all faults."""
        return Sampling(**{each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True, kw_only=True, config=SCHEMA)
class GenerateConfig:
    """A model, prompts, and how to continue them."""

    model: ServedModel = field(default_factory=ServedModel)
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    engine: EngineFlags = field(default_factory=EngineFlags)
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    prompt_file: str | None = None
    """File with a prompt on every line, or JSON lines (.jsonl) with the key `prompt`."""
    interactive: bool = False
    """Read prompts from standard input, one line each, until it ends."""
    output: str | None = None
    """File for the answers, as JSON lines; left out: they are printed."""


@rule("prompt prompt_file interactive")
def one_source(config: GenerateConfig) -> Iterator[Fault]:
    """Prompts come from one place."""
    given = bool(config.prompt) + (config.prompt_file is not None) + config.interactive
    if given != 1:
        fix = "give one of --prompt, --prompt-file and --interactive"
        yield Fault("--prompt", config.prompt, "prompts come from one place", fix)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command = Command(
        "kvshare generate", "Continue texts with a model.", _EXAMPLES, (one_model, one_source)
    )
    config = parse(GenerateConfig, argv, command)
    sampling, settings = config.sampling.sampling(), config.engine.settings()
    prompts = _prompts_of(config)
    engine = start(config.model, settings)
    if engine is None:
        return 0
    if engine.tokenizer is None:
        rule = "the model has no tokenizer, and prompts are texts"
        raise ConfigError(Fault("--tokenizer-model", None, rule, "give the model's tokenizer"))
    try:
        if config.interactive:
            _converse(engine, sampling)
        else:
            _answer(engine, prompts, sampling, config.output)
    finally:
        engine.close()
    return 0


def _prompts_of(config: GenerateConfig) -> list[str]:
    if config.prompt_file is None:
        return list(config.prompt)
    path = Path(config.prompt_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fix = "give a file of UTF-8 text with a prompt on every line"
        raise ConfigError(Fault("--prompt-file", str(path), f"{error}", fix)) from error
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        fix = "write a prompt on every line"
        raise ConfigError(Fault("--prompt-file", str(path), "there is no prompt in it", fix))
    return prompts


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        fix = 'write {"prompt": "..."} on every line'
        raise ConfigError(Fault(f"{path}:{number}", line[:60], f"{error}", fix)) from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        fix = 'write {"prompt": "..."} on every line'
        raise ConfigError(Fault(f"{path}:{number}", line[:60], "there is no text `prompt`", fix))
    return prompt


def _converse(engine: Engine, sampling: Sampling) -> None:
    """One prompt after another, each on its own: what was said before is not part of it."""
    prompting = sys.stdin.isatty()
    while True:
        if prompting:
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            try:
                _stream(engine, line.rstrip("\n"), sampling)
            except ConfigError as error:
                complain(str(error))


def _stream(engine: Engine, prompt: str, sampling: Sampling) -> Generated:
    from megatron_kvshare.serving.generate import generate

    def show(_: int, output: Output) -> None:
        print(output.text, end="", flush=True)

    (result,) = generate(engine, [prompt], sampling, show)
    print()
    return result


def _answer(engine: Engine, prompts: list[str], sampling: Sampling, output: str | None) -> None:
    from megatron_kvshare.serving.generate import generate

    began = time.perf_counter()
    if len(prompts) == 1 and output is None:
        print(prompts[0], end="", flush=True)
        results = [_stream(engine, prompts[0], sampling)]
    else:
        line, ended = ProgressLine(), 0

        def show(_: int, output: Output) -> None:
            nonlocal ended
            ended += output.finished is not None
            line.show(ended / len(prompts), f"{ended:,} of {len(prompts):,} prompts")

        results = generate(engine, prompts, sampling, show)
        records = [
            {
                "prompt": prompt,
                "text": result.text,
                "tokens": result.tokens,
                "finish_reason": result.finished,
            }
            for prompt, result in zip(prompts, results, strict=True)
        ]
        if output is not None:
            _write(Path(output), records)
        else:
            for record in records:
                print(f"{record['prompt']}{record['text']}\n")
    seconds = time.perf_counter() - began
    tokens = sum(len(result.tokens) for result in results)
    complain(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


def _write(path: Path, records: list[dict[str, object]]) -> None:
    try:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        fix = "give a file that can be written"
        raise ConfigError(Fault("--output", str(path), f"{error}", fix)) from error
