"""The kernels' compiled PTX, executed: values against float64, faults, the same bits in any order.

Every kernel, mode and dtype for sm_90, each in one layout; with `-m slow` in every layout and for sm_80 and
sm_100 (`python -m benchmarks.ptx` does the same and keeps the figures).
"""

import pytest
import torch

import fastsdpo
from fastsdpo.ops import rows as door
from fastsdpo.ops.rows import LossOptions, RowCall, Tokens
from fastsdpo.testing import make_rows

from .cases import DTYPES, LAYOUTS, LOSSES, ROWS, Results, results, rows, wrong
from .executor import executing

# (vocabulary, rows): one token; two; odd rows; whole 16-byte pieces and one token; several tiles
SIZES = ((1, ROWS), (2, ROWS), (33, 4 * ROWS), (129, ROWS), (4097, 5), (32001, 2))
LATE = tuple(range(7, -1, -1))  # warp 0 comes last
OPTIONS = ("softcap", "given", "clipped")  # each with one dtype
EVERY_DTYPE = [name for name in LOSSES if not any(option in name for option in OPTIONS)]


def sample() -> list[tuple[str, str, str, tuple]]:
    """(loss, dtype, layout, size): a loss's dtypes are of both kinds of strides, some in place, and have three of the
    sizes; the loss after it has the other three. OPTIONS: one dtype each."""
    found = []
    for n, name in enumerate(LOSSES):
        for d, dtype in enumerate(DTYPES):
            layout = list(LAYOUTS)[(n + 2 * d) % len(LAYOUTS)]
            if name in EVERY_DTYPE:
                found.append((name, dtype, layout, SIZES[(2 * d + n) % len(SIZES)]))
            elif d == n % len(DTYPES):
                found.append((name, dtype, layout, SIZES[2 + n % 4]))
    return found


def check(name: str, dtype: str, size: tuple[int, int], layout: str, *, arch: int = 90, order=None) -> Results:
    """Executes a case; fails where a value is wrong or a fault is found."""
    loss, case = LOSSES[name], f"{name} {dtype} V = {size[0]}, {size[1]} rows, {layout}"
    values = rows(size[0], DTYPES[dtype], size[1])
    want = results(loss, *values, "reference", layout)
    with executing(arch, order) as executor:
        got = results(loss, *values, "triton", layout)
    assert executor.launches
    assert not wrong(loss, got, want), f"{case}: {wrong(loss, got, want)}"
    faults = [str(fault) for fault in executor.faults]
    assert not faults, f"{case}:\n" + "\n".join(faults)
    return got


def bits(found: Results) -> list[bytes]:
    return [r.detach().contiguous().view(torch.uint8).numpy().tobytes() for r in found.values()]


@pytest.mark.parametrize(("name", "dtype", "layout", "size"), sample(), ids=str)
def test_values_are_float64s(name, dtype, layout, size):
    check(name, dtype, size, layout)


def test_the_sample_has_every_property():
    before = set()
    for name in EVERY_DTYPE:
        dtypes, layouts, sizes = zip(*[case[1:] for case in sample() if case[0] == name], strict=True)
        assert set(dtypes) == set(DTYPES)
        assert len({"strides" in layout for layout in layouts}) == 2, name
        assert any("in place" in layout for layout in layouts), name
        assert not before or before | set(sizes) == set(SIZES), name
        before = set(sizes)


@pytest.mark.parametrize(
    ("layout", "size", "order"),
    [("in place", (33, ROWS), 1), ("odd strides, fused in place", (5000, 2), LATE)],
    ids=["in-place", "fused"],
)
@pytest.mark.parametrize("name", ["sampled", "forward KL", "top-k JSD softcap"])
def test_gradients_in_place_are_the_same_bits_in_any_order(name, layout, size, order):
    """A GPU may run warps and programs in any order between barriers."""
    first = bits(check(name, "bf16", size, layout))
    assert bits(check(name, "bf16", size, layout, order=order)) == first


@pytest.mark.parametrize("name", ["reverse KL", "JSD", "top-k JSD"])
def test_a_row_is_the_same_bits_among_few_rows_and_many(name):
    """40 rows are two programs of the kernel that puts parts together."""
    loss, values = LOSSES[name], rows(136, torch.bfloat16, 40)
    with executing():
        many = results(loss, *values, "triton")
        few = results(loss, *[x[33:35].clone() for x in values], "triton")
    for key in ("loss", "student", "teacher"):
        torch.testing.assert_close(few[key], many[key][33:35], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["log-ratio", "reverse KL", "JSD", "top-k forward KL"])
def test_rows_of_two_programs(name):
    """Rows begin at phases 0 and 6 of a piece, so the programs' border is at another token in each. The most
    likely tokens, a support, are around it."""
    loss, (student, teacher, targets) = LOSSES[name], rows(32790, torch.bfloat16, 2)
    student[:, 32756:32776] += 40
    want = results(loss, student, teacher, targets, "reference", "in place")
    with executing() as executor:
        got = results(loss, student, teacher, targets, "triton", "in place")
    assert max(launch.grid[1] for launch in executor.launches) == 2
    assert not wrong(loss, got, want), wrong(loss, got, want)
    assert not executor.faults, list(map(str, executor.faults))


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_a_sure_student_has_no_gradient(alpha):
    """However far away the teacher is, also where the compiler fuses products and sums."""
    case = make_rows((3,), 3000, ignored=0)
    case.student[range(3), [7, 1500, 2990]] = 40
    leaf, options = case.student.requires_grad_(), {"mode": "full", "alpha": alpha, "temperature": 0.01}
    with executing():
        out = fastsdpo.sdpo_loss(leaf, case.teacher, case.target_ids, backend="triton", **options)
        out.loss.backward()
    assert bool((out.per_token_loss > 30).all()) if alpha == 1 else bool((out.per_token_loss > 0.3).all())
    assert not leaf.grad.any()


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_a_gradient_from_statistics_alone(alpha):
    """Of callers that put the rows' statistics together themselves, as shards of the vocabulary do."""
    case, options = make_rows((4,), 300), LossOptions(mode="full", alpha=alpha, temperature=0.7)
    call = RowCall(case.student[None], case.teacher[None], Tokens(case.target_ids, case.weights), options, "triton")
    grads = torch.empty(2, 1, 4, 300)
    with executing():
        found = door.forward(call)
        for grad, classes in zip(grads, (found.class_grads, torch.empty(0)), strict=True):
            door.backward(torch.ones(1), found._replace(class_grads=classes), call, grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    assert grads.abs().amax() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES, ids=lambda value: value.replace(" ", "-"))
def test_every_layout_and_target(name, dtype, arch):
    for layout in LAYOUTS:
        for size in SIZES:
            found = bits(check(name, dtype, size, layout, arch=arch))
            if 2 < size[0] <= 4097 and "in place" in layout:
                assert bits(check(name, dtype, size, layout, arch=arch, order=0)) == found
