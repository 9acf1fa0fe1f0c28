"""`fastsdpo bench` and what it measures with: rivals are checked before they are timed."""

import json
import sys

import pytest
import torch

from fastsdpo import bench, cli, timing

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages about their own coming changes
SMALL = ["--device", "cpu", "--tokens", "6", "--vocabulary", "300", "--hidden", "16", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """`torch.compile` as it is without a compiler: it raises when called."""

    def refuse(function, **_):
        def run(*_args):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", refuse)


def test_command(tmp_path, capsys):
    assert cli.main(["bench", *SMALL, "--modes", "sampled", "jsd", "--output", str(tmp_path / "new")]) == 0
    rows = json.loads((tmp_path / "new" / "bench.json").read_text())["rows"]
    assert [(r["case"]["question"], r["case"]["mode"]) for r in rows] == [
        (question, mode) for question in ("logits", "hidden") for mode in ("sampled", "jsd")
    ]
    for row in rows:
        assert {"fastsdpo", "PyTorch"} <= row["rivals"].keys()
        assert row["left_out"]["torch.compile"] == "RuntimeError: no compiler here"
        assert all(found["median"] > 0 and max(found["errors"], default=0) < 1e-3 for found in row["rivals"].values())
    page = (tmp_path / "new" / "bench.md").read_text()
    assert "| logits | 6 x 300 | float32 | jsd | PyTorch |" in page
    assert "torch.compile left out: RuntimeError: no compiler here" in page
    said = capsys.readouterr().out
    assert said.startswith("losses are computed by the ") and "hidden 6 x 300 x 16 jsd: fastsdpo" in said


def test_a_model_s_shape(capsys):
    arguments = [*SMALL[:4], *SMALL[6:], "--model", "Gemma-2-2B", "--modes", "sampled", "--questions", "hidden"]
    assert cli.main(["bench", *arguments]) == 0
    assert "| hidden | 6 x 256000 x 16, softcap 30 | float32 | sampled | PyTorch |" in capsys.readouterr().out
    transformers = pytest.importorskip("transformers")
    for name, kind in (("Gemma-2-2B", "Gemma2Config"), ("Gemma-3n-E4B", "Gemma3nTextConfig")):
        config = getattr(transformers, kind)()
        assert bench.MODELS[name] == (config.vocab_size, config.hidden_size, config.final_logit_softcapping)


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--tokens", "0"])
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["bench", "--device", "nowhere"]) == 1
    assert "--device must be one that this PyTorch can use, got 'nowhere'" in capsys.readouterr().err


def test_a_wrong_rival_is_not_timed_and_ours_wrong_stops(monkeypatch):
    case = bench.LogitsCase(4, 50)
    wrong = lambda case, mode: case.loss_of(lambda *args: 2 * bench.plain_loss(*args), mode)  # noqa: E731
    monkeypatch.setitem(bench.FROM_LOGITS, "PyTorch", wrong)
    row = bench.measure(case, "reverse_kl", rounds=1, only=["fastsdpo", "PyTorch"])
    assert row["left_out"] == {"PyTorch": "off by 1.0e+00 from float64"}
    assert row["rivals"].keys() == {"fastsdpo"}
    monkeypatch.setitem(bench.FROM_LOGITS, "fastsdpo", wrong)
    with pytest.raises(RuntimeError, match=r"4 x 50 jsd: fastsdpo is off by .* from float64"):
        bench.measure(case, "jsd", rounds=1)


@pytest.mark.parametrize("mode", bench.MODES)
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_every_rival_takes_the_softcap(kind, mode):
    from benchmarks import losses  # adds its rivals

    hidden = 16 if kind == "hidden" else 0
    case = (bench.LogitsCase if kind == "logits" else bench.HiddenCase)(5, 300, hidden, softcap=3.0)
    makers = dict(bench.rivals_of(case))
    for compiled in ("torch.compile", "Liger compiled", "CCE"):
        makers.pop(compiled, None)
    assert losses.FROM_LOGITS is bench.FROM_LOGITS
    assert {name: bench.why_not(case, mode, name, make)[0] for name, make in makers.items()} == dict.fromkeys(
        makers, ""
    )
    free = type(case)(5, 300, hidden)
    assert abs(float(free.exact(mode)[0]) / float(case.exact(mode)[0]) - 1) > 0.01


def test_on_a_gpu_every_timing_waits_for_it_and_memory_is_its_own(monkeypatch):
    """With a stand-in for `torch.cuda`: the order of calls, and what is subtracted from what."""
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
    peaks = [350, 300]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peaks.pop(0))
    run, prepare = (lambda: said.append("run")), (lambda: said.append("prepare"))
    found = timing.interleave({"x": run}, 2, prepare=prepare, device="cuda:0")["x"]
    assert found.peak_bytes == 200  # the lower of the peaks before and after the timed runs
    peak, timed = ["prepare", "wait", "reset", "run", "wait"], ["prepare", "wait", "run", "wait"]
    assert said == [*peak, *timed, *timed, *peak]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_that_the_allocator_kept_from_an_earlier_call_is_seen():
    for _ in range(3):
        peak = timing.peak_memory(lambda: torch.ones(24 * 2**18))  # 24 MiB, below what glibc always gives back
        assert peak is not None and 23 * 2**20 < peak < 40 * 2**20


def test_rounds_go_on_until_the_time_has_passed(monkeypatch):
    runs = []  # of a second each, by this clock
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(len(runs)))
    timing.interleave({"x": lambda: runs.append(1)}, 2, least_seconds=5)
    assert len(runs) == 1 + 5 + 1  # the first and the last measure the memory
    runs.clear()
    assert timing.interleave({"x": lambda: runs.append(1)}, 2, memory=False)["x"].median == 1
    assert len(runs) == 2
