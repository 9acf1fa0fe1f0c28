"""`fastsdpo bench`: it checks before it times, and keeps what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from fastsdpo import bench

# torch.compile and TRL warn of their own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = [
    "--device",
    "cpu",
    "--tokens",
    "6",
    "--vocabulary",
    "300",
    "--hidden",
    "16",
    "--rounds",
    "1",
]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """`torch.compile` as it is without a compiler: it raises when called."""

    def refuse(function, **_):
        def run(*_args):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", refuse)


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status = bench.main([*SMALL, "--modes", "sampled", "jsd", "--output", str(tmp_path / "new")])
    assert status == 0
    results = json.loads((tmp_path / "new" / "bench.json").read_text())
    rows = {(row["question"], row["mode"]): row for row in results["rows"]}
    assert rows.keys() == {(q, m) for q in ("logits", "hidden") for m in ("sampled", "jsd")}
    for (question, _), row in rows.items():
        assert {"fastsdpo", "PyTorch"} <= row["rivals"].keys()
        assert ("bare GEMMs" in row["rivals"]) == (question == "hidden")
        assert row["left_out"]["torch.compile"] == "RuntimeError: no compiler here"
        assert all(timing["median"] > 0 for timing in row["rivals"].values())
    page = (tmp_path / "new" / "bench.md").read_text()
    assert "| logits | 6 x 300 | float32 | jsd | PyTorch |" in page
    assert "torch.compile left out: RuntimeError: no compiler here" in page
    assert (tmp_path / "new" / "bench.png").stat().st_size > 1000
    assert "hidden 6 x 300 x 16 jsd: fastsdpo" in capsys.readouterr().out


def test_a_wrong_rival_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        bench, "trl_loss", lambda mode, s, t, ids: 2 * bench.plain_loss(mode, s, t, ids)
    )
    monkeypatch.setattr(bench, "_version", lambda package: "1" if package == "trl" else None)
    row = bench.measure(
        bench.LogitsCase(4, 50, torch.float32, "cpu"), "logits", "reverse_kl", 1, "cpu"
    )
    assert row["left_out"]["TRL"] == "off by 1.0e+00 from float64"
    assert row["rivals"].keys() == {"fastsdpo", "PyTorch"}


def test_ours_wrong_stops(monkeypatch):
    case = bench.LogitsCase(4, 50, torch.float32, "cpu")
    monkeypatch.setattr(case, "ours", lambda mode: case.loss_of(lambda m, s, t, i: s.sum(), mode))
    with pytest.raises(RuntimeError, match=r"4 x 50 jsd: fastsdpo off by .* from float64"):
        bench.check(case, "jsd", {"fastsdpo": case.ours("jsd")})


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tokens", "0"])
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench.main(["--device", "cuda"])
        assert "this PyTorch sees no GPU" in capsys.readouterr().err
