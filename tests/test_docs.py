"""The documents: code that parses, names that exist, files that are there."""

import ast
import importlib
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import fastsdpo
from fastsdpo.cli import COMMANDS, main
from fastsdpo.commands.parser import Parser
from tests.pages import NAMES, ROOT, blocks, commands

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OUTSIDE = {f"fastsdpo.integrations.{name}": name for name in ("trl", "transformers", "torchrl")}

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


@pages
def test_commands_have_the_options_that_pages_give_them(page, monkeypatch, tmp_path):
    parse = Parser.parse_args

    def stop(self, argv=None, namespace=None):
        parse(self, argv, namespace)
        raise SystemExit(0)

    monkeypatch.setattr(Parser, "parse_args", stop)
    monkeypatch.chdir(tmp_path)
    for argv in commands(page):
        if argv[0] in COMMANDS:
            with pytest.raises(SystemExit) as ended:
                main(argv)
            assert ended.value.code in (0, None), shlex.join(argv)


def test_the_readme_works_as_pasted(tiny, tmp_path, monkeypatch, capsys):
    """Its first block prints what it says, its four commands and its trainer run, on a tiny model."""
    page = ROOT / "README.md"
    local = {name: str(tiny) for name in NAMES}
    losses, trainer, *_ = blocks(page, "python")
    exec(compile(losses, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == blocks(page, "text")[1].strip()
    monkeypatch.chdir(tmp_path)
    job = [argv for argv in commands(page) if argv[0] in ("demo-data", "prepare", "train", "signal")]
    assert [argv[0] for argv in job] == ["demo-data", "prepare", "train", "signal"]
    for argv in job:
        assert main([local.get(word, word) for word in argv]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/first/model").is_dir() and (tmp_path / "signal.html").stat().st_size > 10_000
    text = trainer.replace("runs/first", "runs/second")
    for name, folder in local.items():
        text = text.replace(name, folder)
    exec(compile(text, "README.md", "exec"), {})


@pytest.mark.parametrize("name", ["integrations/pytorch"])
def test_blocks_run_one_after_the_other(name, tiny):
    """With tensors and a model of the names that the page uses."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    model = LlamaForCausalLM.from_pretrained(tiny)
    make = fastsdpo.TokenizedInteraction
    items = [make([1, 2], [1, 2, 7], [3, 4], "a", "c"), make([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 9], [6], "b", "c")]
    names = {
        "torch": torch,
        "fastsdpo": fastsdpo,
        "model": model,
        "batch": items,
        "temperature": 1.5,
        "student_logits": draw(2, 3, 50).requires_grad_(),
        "teacher_logits": draw(2, 3, 50),
        "student_hidden": draw(2, 3, 8).requires_grad_(),
        "teacher_hidden": draw(2, 3, 8),
        "lm_head": SimpleNamespace(weight=draw(50, 8).requires_grad_()),
        "completion_ids": torch.randint(50, (2, 3), generator=generator),
        "weights": torch.full((2, 3), 1 / 6),
    }
    for block in blocks(ROOT / f"docs/{name}.md", "python"):
        exec(compile(block, name, "exec"), names)
    plain = names["sdpo_loss"](names["student_logits"], names["teacher_logits"], 1.5, names["weights"])
    fused = fastsdpo.SDPOLoss(mode="full", alpha=1.0, temperature=1.5)(
        names["student_logits"], names["teacher_logits"], names["completion_ids"], weights=names["weights"]
    )
    torch.testing.assert_close(fused.loss, plain)
    assert names["out"].loss.isfinite() and model.lm_head.weight.grad.abs().sum() > 0
