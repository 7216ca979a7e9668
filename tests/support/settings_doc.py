"""Renders docs/SETTINGS.md from `Settings`: `python -m tests.support.settings_doc > docs/SETTINGS.md`."""

from __future__ import annotations

import sys

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from toolfleet.settings import Settings

HEAD = """\
# Settings

Every setting of every part is an environment variable; `src/settings.py` is the only reader of the environment. This
page is made from it by `make docs`, and a test fails where the two differ. Durations are in seconds and sizes in bytes
unless the name says otherwise.

| variable | default | what it does |
|---|---|---|
"""


def variable(name: str, field: FieldInfo) -> str:
    """The first name that is looked for."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return str(alias) if alias else f"TOOLFLEET_{name.upper()}"


def default(field: FieldInfo) -> str:
    """As a person would write it into the environment."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ("", {}):
        return "not set"
    if isinstance(value, tuple):
        return f"`{','.join(f'{part:g}' for part in value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def render() -> str:
    """The page."""
    rows = []
    for name, field in Settings.model_fields.items():
        text = " ".join((field.description or "").replace("``", "`").split()).replace("|", "\\|")
        rows.append(f"| `{variable(name, field)}` | {default(field)} | {text} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(render())
