"""Writes the text of ``--help`` from the settings and their docstrings."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from megatron_kvshare.config.flags.settings import Setting, groups_of, settings_of

_INDENT = " " * 6
_CONFIG = (
    "  --config FILE.yaml\n"
    f"{_INDENT}Read settings from a file: the same names, with - or _; flags win over the file.\n"
    "  --help\n"
    f"{_INDENT}Show this text."
)


def help_text(config_type: type[Any], prog: str, description: str, examples: str) -> str:
    """The whole help: what the command does, all flags by group with defaults, examples."""
    settings = settings_of(config_type)
    sections = [f"usage: {prog} [--config FILE.yaml] [--FLAG VALUE ...]"]
    if description:
        sections.append(textwrap.dedent(description).strip())
    for attribute, group_type in groups_of(config_type).items():
        title = " ".join((group_type.__doc__ or attribute).split())
        members = [setting for setting in settings if setting.group == attribute]
        sections.append("\n".join([title, *map(_entry, members)]))
    own = [setting for setting in settings if not setting.group]
    title = "Flags:" if len(own) == len(settings) else "General:"
    sections.append("\n".join([title, *map(_entry, own), _CONFIG]))
    if examples:
        sections.append(
            "Examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  ")
        )
    return "\n\n".join(sections)


def _entry(setting: Setting) -> str:
    flags = setting.flag if setting.negative is None else f"{setting.flag}, {setting.negative}"
    width = min(shutil.get_terminal_size().columns, 100)
    text = textwrap.fill(
        f"{setting.help} {_default(setting)}".strip(),
        width=width,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_on_hyphens=False,
    )
    return f"  {flags} {setting.metavar}".rstrip() + "\n" + text


def _default(setting: Setting) -> str:
    if setting.is_required:
        return "(required)"
    if setting.is_switch:
        return "(default: on)" if setting.default else ""
    if setting.default in (None, ()):
        return ""
    default = setting.default
    text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"(default: {text})"
