"""The documents: code that parses, names that exist, files that are there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OUTSIDE = {"fastsdpo.integrations.trl": "trl", "fastsdpo.integrations.transformers": "transformers"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_there_is_a_page_for_every_integration():
    modules = {path.stem for path in (ROOT / "fastsdpo/integrations").glob("[a-z]*.py")}
    assert modules | {"pytorch"} == {path.stem for path in (ROOT / "docs/integrations").glob("*")}


@pages
def test_python_blocks_parse_and_import_what_exists(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsdpo"):
                if node.module in OUTSIDE:
                    pytest.importorskip(OUTSIDE[node.module])
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastsdpo":
                assert hasattr(importlib.import_module("fastsdpo"), node.attr), node.attr


@pages
def test_named_files_and_linked_pages_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in name or (page.parent / name).exists(), name
    named = re.findall(r"`((?:benchmarks|tests|examples|docs|kernels)/[\w./-]+\.(?:py|md|json))`", text)
    for name in named:
        assert (ROOT / name).exists(), name
