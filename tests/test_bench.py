"""`fastsdpo bench`: it checks before it times, and keeps what it measured."""

from __future__ import annotations

import contextlib
import json
import sys

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
    with contextlib.suppress(ImportError):
        import cut_cross_entropy  # noqa: F401  (it compiles a function at import)

    def refuse(function, **_):
        def run(*_args):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", refuse)


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status = bench.main([*SMALL, "--without", "CCE", "--modes", "sampled", "jsd", "--output", str(tmp_path / "new")])
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
    said = capsys.readouterr().out
    assert said.startswith("losses are computed by the ")
    assert "hidden 6 x 300 x 16 jsd: fastsdpo" in said


def test_a_wrong_rival_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "trl_loss", lambda mode, s, t, ids, cap: 2 * bench.plain_loss(mode, s, t, ids, cap))
    monkeypatch.setattr(bench, "_version", lambda package: "1" if package == "trl" else None)
    row = bench.measure(bench.LogitsCase(4, 50, torch.float32, "cpu"), "logits", "reverse_kl", 1, "cpu")
    assert row["left_out"]["TRL"] == "off by 1.0e+00 from float64"
    assert row["rivals"].keys() == {"fastsdpo", "PyTorch"}


def test_ours_wrong_stops(monkeypatch):
    case = bench.LogitsCase(4, 50, torch.float32, "cpu")
    monkeypatch.setattr(case, "ours", lambda mode: case.loss_of(lambda m, s, t, i, c: s.sum(), mode))
    with pytest.raises(RuntimeError, match=r"4 x 50 jsd: fastsdpo off by .* from float64"):
        bench.check(case, "jsd", {"fastsdpo": case.ours("jsd")})


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tokens", "0"])
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench.main(["--device", "cuda"])
        assert "device must be one that this PyTorch can use, got 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["logits", "hidden"])
@pytest.mark.parametrize("mode", list(bench.MODES))
def test_a_softcap_is_everyone_s(question, mode, monkeypatch):
    kind = {"logits": bench.LogitsCase, "hidden": bench.HiddenCase}[question]
    case = kind(5, 300, *([16] if question == "hidden" else []), torch.float32, "cpu", 3.0)
    calls = case.calls(mode, bench.plain_loss)
    calls.pop("CCE", None)  # compiles
    assert bench.check(case, mode, calls) == {}
    if question == "hidden":
        assert "Liger" not in calls
    without = kind(5, 300, *([16] if question == "hidden" else []), torch.float32, "cpu")
    assert abs(float(without.exact(mode)[0]) / float(case.exact(mode)[0]) - 1) > 0.01


def test_cce_by_its_eager_function(monkeypatch):
    """The calling convention; compiled, it is the same function."""
    torch_compile = pytest.importorskip("cut_cross_entropy.torch_compile")
    plain = torch_compile.torch_compile_linear_cross_entropy_apply
    plain = getattr(plain, "_torchdynamo_orig_callable", plain)
    monkeypatch.setattr(torch_compile, "torch_compile_linear_cross_entropy_apply", plain)
    for softcap in (None, 3.0):
        case = bench.HiddenCase(5, 300, 16, torch.float32, "cpu", softcap)
        assert bench.check(case, "sampled", {"CCE": case._cce()}) == {}


def test_large_cases_are_checked_on_a_few_tokens(monkeypatch):
    monkeypatch.setattr(bench, "CHECKED_CELLS", 100)
    checked = []
    monkeypatch.setattr(bench, "check", lambda case, *_: checked.append(case.label) or {})
    for kind, sizes in ((bench.LogitsCase, (300,)), (bench.HiddenCase, (300, 16))):
        bench.measure(kind(60, *sizes, torch.float32, "cpu"), "hidden", "jsd", 1, "cpu", ["Liger"])
    assert checked == ["48 x 300", "48 x 300 x 16"]


def test_a_model_s_shape(capsys):
    arguments = ["--device", "cpu", "--tokens", "2", "--rounds", "1", "--modes", "sampled"]
    arguments += ["--model", "Gemma-2-2B", "--hidden", "8", "--without", "CCE", "TRL"]
    assert bench.main([*arguments, "--questions", "hidden"]) == 0
    out = capsys.readouterr().out
    assert "| hidden | 2 x 256000 x 8, softcap 30 | float32 | sampled | PyTorch |" in out
    assert "| TRL |" not in out


def test_shapes_are_those_of_the_models():
    transformers = pytest.importorskip("transformers")
    for name, kind in (("Gemma-2-2B", "Gemma2Config"), ("Gemma-3n-E4B", "Gemma3nTextConfig")):
        config = getattr(transformers, kind)()
        found = config.vocab_size, config.hidden_size, config.final_logit_softcapping
        assert tuple(bench.MODELS[name]) == found
    assert transformers.Gemma3TextConfig().final_logit_softcapping is None


def test_on_a_gpu_every_timing_waits_for_it_and_memory_is_its_own(monkeypatch):
    """With a stand-in for `torch.cuda`: the order of calls, and what is subtracted from what."""
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
    peaks = [350, 300]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peaks.pop(0))
    rival = bench.Rival("x", lambda: said.append("run"), lambda: said.append("prepare"))
    timing = bench.interleave([rival], 2, "cuda:0")["x"]
    assert timing.peak_bytes == 200  # the lower of the peaks before and after the timed runs
    peak, timed = ["prepare", "wait", "reset", "run", "wait"], ["prepare", "wait", "run", "wait"]
    assert said == [*peak, *timed, *timed, *peak]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_that_the_allocator_kept_from_an_earlier_call_is_seen():
    def run():
        torch.ones(24 * 2**18)  # 24 MiB, below what glibc always gives back

    for _ in range(3):
        peak = bench.peak_memory(run)
        assert peak is not None and 23 * 2**20 < peak < 40 * 2**20


def test_rounds_go_on_until_the_time_has_passed(monkeypatch):
    runs = []  # of a second each, by this clock
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(len(runs)))
    rival = bench.Rival("x", lambda: runs.append(1))
    bench.interleave([rival], 2, least_seconds=5)
    assert len(runs) == 1 + 5 + 1  # the first and the last measure the memory
    runs.clear()
    assert bench.interleave([rival], 2)["x"].median == 1
    assert len(runs) == 1 + 2 + 1


def test_ceilings_and_shares():
    row = {"question": "logits", "tensor_bytes": 10.0, "gemm": None}
    assert bench.share_of_ceiling(row, 2.0, {"copy": 30.0, "gemm": 1.0}) == 0.5
    row = {"question": "hidden", "tensor_bytes": 10.0, "gemm": 20.0}
    assert bench.share_of_ceiling(row, 2.0, {"copy": 30.0, "gemm": 100.0}) == 0.4
    assert bench.copy_bandwidth(1) > 0
    assert bench.gemm_flops(64) > 0
