"""Renders a configuration for people: what was changed, and from what."""

from __future__ import annotations

from typing import Any

from megatron_kvshare.config.flags.settings import Setting, groups_of, settings_of


def describe(config: object) -> str:
    """A table of the settings that differ from their defaults, by group: name, value, default.

    Derived defaults (the feed-forward width) are shown too, because they depend on other settings.
    """
    config_type = type(config)
    rows = [(each, _value(config, each)) for each in settings_of(config_type)]
    changed = [(each, value) for each, value in rows if value != each.default]
    if not changed:
        return "All settings have their defaults."
    names = max(len(each.name) for each, _ in changed)
    values = max(len(_text(value)) for _, value in changed)
    lines: list[str] = []
    for group in (*groups_of(config_type), ""):
        members = [row for row in changed if row[0].group == group]
        if members:
            lines.append(group or "general")
        for each, value in members:
            line = f"  {each.name:<{names}}  {_text(value):<{values}}"
            lines.append(f"{line}  (default {_text(each.default)})")
    return "\n".join(lines)


def as_dict(config: object) -> dict[str, Any]:
    """All settings flat, by name, as YAML and JSON take them."""
    values = {each.name: _value(config, each) for each in settings_of(type(config))}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _value(config: object, setting: Setting) -> Any:
    owner = getattr(config, setting.group) if setting.group else config
    return getattr(owner, setting.name)


def _text(value: object) -> str:
    if value is None or value == ():
        return "not set"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
