"""Code that Hugging Face folders bring along: ours is known and runs from this package,
anybody else's runs only where the user says so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_kvshare.conversion.folder import CONFIG, read_json
from megatron_kvshare.errors import ConfigError, Fault

CODE = ("configuration_kvshare.py", "modeling_kvshare.py")
HERE = Path(__file__).parent / "exported"
TOKENIZER_CONFIG = "tokenizer_config.json"

_SHIPPED = {
    "configuration_kvshare.py": (
        "84a2c0be9098e20ec0d81bd3e0c5523095b8fa35b5315dbcbcb4fff063d556d0",
        "0b03d314c0cc9f2aa75803940f37abf3f75c1a2dd30592b397a8db706b4875b5",
        "a27077a60f492cecf702bc6aaac758094e44650ce21a47c13c44cbb005ed551c",
        "2e0d369245e8f4ba03416439387ab154c55659480c08f0443b1c8df9b15b01f7",
        "aca3af00b874dddc2d479a6bc15187b2c461b3e3e68d2dd86ca8f805eb0cde47",
    ),
    "modeling_kvshare.py": (
        "cc22433714d1f6ee898ae2abe2480d37285b77f39a9202a5d0fa69da34f644e4",
        "855e90ffcf8cf464286ac04212344abd6ad16f91f5600cd739c1954641e45786",
        "3af4babb33e880d534338efb2c6c90b5192742758671cf14a0245b6dd3f35b7d",
        "98aad76438e65af45aabe811c465ec025bee2004f7002aa59321bed56ca2f45e",
        "8b836a5d62a8b803dbbe22ee80923ebf3514e3aab42e5e01b84f18c61e82019d",
        "510b3e5715ade1169199f402ba41494995d33776da1d0cd0c4085ef87cfc9b48",
        "3dbb5d2e377b4b5e9ba80f1d7322412e6f9989f0161c31e76bfb95cf0dc0d197",
        "6f95b60d7d323705d0ce17879cfbaa279307671c0b1892ec0d9bc9da475ca065",
        "5da4a81f7c5982fa5feebf08c7fcccebca3d35db518b150363e855865c324b34",
        "8c3e10227f3e8c50920e9bb5feb6adc442d322304bfe518ddf6b17179bf557e9",
    ),
}
"""SHA-256 of every version that was ever exported, oldest first. The present files need no entry;
who changes one adds what it was before (tests/unit/conversion/test_own_code.py lists them)."""


def is_present(file: Path) -> bool:
    """Whether ``file`` is what this version exports under its name."""
    return file.is_file() and file.read_bytes() == (HERE / file.name).read_bytes()


def is_ours(file: Path) -> bool:
    """Whether ``file`` is what this or an earlier version exports under its name."""
    if file.name not in CODE or not file.is_file():
        return False
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return is_present(file) or digest in _SHIPPED[file.name]


class ForeignCode(NamedTuple):
    """The key of a file, and the code it names."""

    where: str
    value: str


def foreign_code(folder: Path) -> list[ForeignCode]:
    """What transformers would run of ``folder``, or on its behalf, that is not ours."""
    found = []
    for file in (folder / CONFIG, folder / TOKENIZER_CONFIG):
        content = read_json(file) if file.is_file() else {}
        references = dict.fromkeys(_references(content))
        kernels = content.get("attn_implementation")
        found += [
            ForeignCode(f"{file}: auto_map", reference)
            for reference in references
            if not _is_ours(folder, reference)
        ]
        if isinstance(kernels, str) and "/" in kernels:  # a repository
            found.append(ForeignCode(f"{file}: attn_implementation", kernels))
    return found


def code_files(config: Mapping[str, Any]) -> list[str]:
    """The files that a configuration names as its code."""
    return sorted({_file(reference) for reference in _references(config)})


def _file(reference: str) -> str:
    return f"{reference.rpartition('.')[0]}.py"


def _is_ours(folder: Path, reference: str) -> bool:
    """Whether ``module.Class`` names a file of ours; one that is not there runs nothing."""
    if "--" in reference:
        return False  # of another repository
    file = folder / _file(reference)
    return is_ours(file) or (file.name in CODE and not file.exists())


def _references(config: Mapping[str, Any]) -> Iterator[str]:
    """``module.Class`` or ``owner/repository--module.Class``: a class each, or two of a tokenizer
    (of which one may be null), by the name of transformers' class or, in older files, alone."""
    auto_map = config.get("auto_map") or {}
    entries = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for entry in entries:
        for reference in entry if isinstance(entry, list) else [entry]:
            if reference is not None:
                yield str(reference)


def refuse_foreign_code(folder: Path, fix: str) -> None:
    """Raise :class:`ConfigError` with all code of the folder that is not ours."""
    rule = "no version of this program exports such code, and other code is not run unasked"
    faults = [Fault(code.where, code.value, rule, fix) for code in foreign_code(folder)]
    if faults:
        raise ConfigError(faults)
