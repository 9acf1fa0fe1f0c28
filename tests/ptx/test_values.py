"""The kernels' compiled PTX for sm_90, executed: values against float64, faults, the same bits in any order.

A bounded sample of losses, dtypes, sizes and layouts; all of them with `-m slow`.
"""

from __future__ import annotations

import pytest
import torch

from .cases import LOSSES, Results, placed, rows, wrong
from .executor import executing, harmless
from .memory import RACE_OF_WARPS

SIZES = (
    1,
    2,
    33,
    129,
    1000,
)  # one token; less than a warp's accesses; odd rows; whole 16-byte pieces
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FEW = SIZES[2:]  # of top-k, whose smaller supports are other kernels
SAMPLE = [
    ("logps", "fp16"),
    ("log-ratio", "bf16"),
    ("sampled", "bf16"),
    ("sampled fused", "fp32"),
    ("forward KL", "bf16"),
    ("forward KL fused", "bf16"),
    ("reverse KL", "fp16"),
    ("JSD", "fp32"),
    ("JSD fused", "bf16"),
    ("top-k JSD", "bf16"),
    ("top-k fused", "fp32"),
]


def check(
    name: str,
    dtype: str,
    vocabulary: int,
    *,
    arch=90,
    order=None,
    shifts=None,
    floor=4e-6,
    **options,
) -> Results:
    """Executes a case; fails where a value is wrong or a fault found that is not `harmless`."""
    student, teacher, targets = rows(vocabulary, DTYPES[dtype])
    # Which of equal logits are of a support is nobody's contract: there are none in these rows.
    want = LOSSES[name](student.double(), teacher.double(), targets, "reference", **options)
    if shifts is not None:
        student, teacher = placed(student, shifts[0]), placed(teacher, shifts[1])
    with executing(arch, order) as executor:
        got = LOSSES[name](student, teacher, targets, "triton", **options)
    case = f"{name} {dtype} V = {vocabulary}"
    assert executor.launches
    assert not wrong(got, want, floor), f"{case}: {wrong(got, want, floor)}"
    faults = [fault for fault in executor.faults if not harmless(fault)]
    if (
        "fused" in name and shifts is not None
    ):  # the second access of a pair is not used: see `harmless`
        faults = [fault for fault in faults if not fault.kind.startswith(RACE_OF_WARPS)]
    faults = [str(fault) for fault in faults]
    assert not faults, f"{case}:\n" + "\n".join(faults)
    return got


def bits(results: Results) -> list[bytes]:
    return [r.detach().contiguous().view(torch.uint8).numpy().tobytes() for r in results.values()]


@pytest.mark.parametrize(("name", "dtype"), SAMPLE, ids=lambda value: value.replace(" ", "-"))
def test_values_are_float64s(name, dtype):
    for vocabulary in FEW if name.startswith("top-k") else SIZES:
        check(name, dtype, vocabulary)


@pytest.mark.parametrize("name", ["sampled", "forward KL"])
def test_gradients_in_place_are_the_same_bits_in_any_order(name):
    """Rows of odd length share 16-byte pieces: one program reads what its neighbour overwrites."""
    inplace = {"inplace_grad": True}
    for vocabulary in (33, 1000):
        first = bits(check(name, "bf16", vocabulary, **inplace))
        for order in (1, range(7, -1, -1)):
            assert bits(check(name, "bf16", vocabulary, order=order, **inplace)) == first


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("reverse KL", "bf16"), ("log-ratio", "bf16"), ("sampled fused", "fp32")],
    ids=lambda value: value.replace(" ", "-"),
)
def test_rows_at_odd_strides(name, dtype):
    """Student and teacher at other places of a 16-byte piece: the same bits as packed rows."""
    for vocabulary in (2, 129, 1000):
        shifted = check(name, dtype, vocabulary, shifts=(3, 6))
        if vocabulary != 2:  # a gradient's row has no whole pieces there
            assert bits(shifted) == bits(check(name, dtype, vocabulary))


def test_split_rows_are_the_same_bits(monkeypatch):
    """A row in two segments, as two programs and a third that adds up, or as one program."""
    found = []
    for split in "01":
        monkeypatch.setenv("FASTSDPO_TRITON_SPLIT", split)
        found.append(bits(check("forward KL", "fp32", 8200)))
    assert found[0] == found[1]


def test_softcap():
    for vocabulary in (33, 1000):
        check("reverse KL", "fp32", vocabulary, softcap=30.0, floor=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES, ids=lambda value: value.replace(" ", "-"))
def test_every_loss_and_dtype(name, dtype, arch):
    for vocabulary in (*SIZES, 4097, 32001):
        first = bits(check(name, dtype, vocabulary, arch=arch))
        shifted = bits(check(name, dtype, vocabulary, arch=arch, shifts=(3, 6)))
        assert vocabulary < 129 or shifted == first
        if vocabulary <= 1000:  # warps apart, in both layouts
            assert bits(check(name, dtype, vocabulary, arch=arch, order=0)) == first
            apart = check(name, dtype, vocabulary, arch=arch, order=0, shifts=(3, 6))
            assert bits(apart) == shifted
