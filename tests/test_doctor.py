"""`fastsdpo doctor` reports, and its exit status tells whether a kernel is wrong."""

import json

from fastsdpo import doctor


def test_every_available_kernel_is_right(capsys):
    assert doctor.main(["--json", "--no-bandwidth"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["wrong"] == 0
    assert report["checked"] >= 18
    assert set(report["backends"]) == {"triton", "native", "reference"}
    assert report["auto"]["cpu"]["float64"] == "reference"
    assert report["versions"]["torch"] != "not installed"


def test_a_wrong_kernel_is_named_and_fails(monkeypatch, capsys):
    from fastsdpo.ops.divergence import reference

    plain = reference.row_divergence
    monkeypatch.setattr(
        reference, "row_divergence", lambda s, t, a: (plain(s, t, a)[0] * 1.01, *plain(s, t, a)[1:])
    )
    assert doctor.main(["--no-bandwidth"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG reverse KL float32" in shown
