"""What `make docs` fills in: the help of every command, the settings of both trainers, links out of the pages."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in the help of commands and tables of settings; names files outside of docs/ instead of linking them."""
    if "{{ commands }}" in markdown:
        markdown = markdown.replace("{{ commands }}", commands())
    markdown = re.sub(r"\{\{ settings:(\w+) \}\}", lambda found: settings(found[1]), markdown)
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)", _outside(page), markdown)


def _outside(page: Any) -> Any:
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        target = (folder / found[2].partition("#")[0]).resolve()
        return found[0] if target.is_relative_to(ROOT / "docs") else f"{found[1]} (`{target.relative_to(ROOT)}`)"

    return replaced


def commands() -> str:
    """The help of `fastsdpo` and of each of its commands, as a user sees it."""
    top = _help()
    names = re.findall(r"^ {2,4}([a-z][a-z-]+) {2,}\S", top, re.MULTILINE)
    pages = [f"```text\n{top}```\n"]
    pages += [f"## fastsdpo {name}\n\n```text\n{_help(name)}```\n" for name in dict.fromkeys(names)]
    return "\n".join(pages)


def _help(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastsdpo", *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "88", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def settings(name: str) -> str:
    """A table of what a configuration adds to the one that it extends: name, default, what it does."""
    from transformers import TrainingArguments

    from fastsdpo import OnlineSDPOConfig, SDPOConfig

    config = {"SDPOConfig": SDPOConfig, "OnlineSDPOConfig": OnlineSDPOConfig}[name]
    extended = next(base for base in config.__mro__[1:] if base in (SDPOConfig, TrainingArguments))
    inherited = {field.name: field for field in dataclasses.fields(extended)}
    rows = ["| setting | default | what it does |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        known = inherited.get(field.name)
        if known is not None and known.default == field.default and known.metadata == field.metadata:
            continue
        value = None if field.default is dataclasses.MISSING else field.default
        text = " ".join(str(field.metadata.get("help", "")).split()).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{value!r}` | {text} |")
    return "\n".join(rows)
