"""The executor finds faults that are planted in the library's kernels and in PTX, and leaves no trace."""

import pytest
import torch
import triton

import fastsdpo
from fastsdpo.ops import _triton_kernels as kernels

from . import executor, memory
from .cases import DTYPES, LOSSES, results, rows
from .executor import buffer_of, executing, planted
from .machine import SPAN, Machine
from .parse import UnknownInstruction, parse


def executed_loss(name: str, vocabulary: int, dtype="bf16", layout="packed", order=None):
    """(results, faults) of a loss."""
    with executing(order=order) as run:
        found = results(LOSSES[name], *rows(vocabulary, DTYPES[dtype]), "triton", layout)
    return found, run.faults


PLANTED = {
    "misaligned access": (
        kernels.row_start,
        "return ptr + offset // 8 * 8, (offset % 8).to(tl.int32)",
        "return ptr + tl.multiple_of(offset, 8), 0",
        memory.MISALIGNED,
    ),
    "bound off by one": (kernels.load_tile, "(v < high)", "(v <= high)", memory.OUT_OF_BOUNDS),
    "sum that is not stored": (kernels.statistics_kernel, "    tl.store(out + 2, t_top)\n", "", memory.UNWRITTEN),
    "store to the next row": (
        kernels.gradient_kernel,
        "tl.store(g + v, value, mask=(v >= low) & (v < high))",
        "tl.store(g + v, value, mask=v < high + 3)",
        memory.RACE_OF_PROGRAMS,
    ),
}


@pytest.mark.parametrize("name", PLANTED, ids=lambda value: value.replace(" ", "-"))
def test_a_planted_fault_is_found(name):
    function, right, wrong, kind = PLANTED[name]
    with planted(function, right, wrong):
        _, found = executed_loss("JSD", 5001)  # whole tiles and their edges
    assert any(fault.kind.startswith(kind) for fault in found), list(map(str, found))
    assert all(fault.places[0].text() for fault in found)


def test_a_missing_barrier_is_found(monkeypatch):
    """The compiler writes the kernels' barriers: they are taken out of what it wrote."""
    whole = executor.load

    def load(name, ptx, shared, device):
        assert name != "statistics_kernel" or ptx.count(b"bar.sync") > 1
        return whole(name, ptx.replace(b"bar.sync", b"bar.warp.sync"), shared, device)

    monkeypatch.setattr(executor, "load", load)
    monkeypatch.setattr(executor, "_PLANTED", ["no barriers"])
    _, found = executed_loss("forward KL", 1001)
    kinds = {fault.kernel: fault.kind for fault in found}
    assert kinds["statistics_kernel"].startswith(memory.RACE_OF_WARPS), kinds


def test_a_stale_read_in_place_is_found():
    """A gradient that reads the target's logit, which another warp may have overwritten: reported in any
    order, and the values show it where warps run one by one."""
    stale = (
        kernels.gradient_kernel,
        "                    p = tl.exp2(tl.fma(x - sm, k, -sl))\n",
        "                    own = load_logit(s + target_at, True, cap, HAS_CAP, FAST)\n"
        "                    p = tl.exp2(tl.fma(x - sm, k, -sl) + 1e-3 * own)\n",
    )
    with planted(*stale):
        apart, found = executed_loss("sampled", 1000, "fp32")
        assert not found
        together, found = executed_loss("sampled", 1000, "fp32", "in place")
        late, found_late = executed_loss("sampled", 1000, "fp32", "in place", range(7, -1, -1))
    for faults in (found, found_late):
        assert any(fault.kind.startswith(memory.RACE_OF_WARPS) for fault in faults)
    assert torch.equal(together["gradient"], apart["gradient"])
    assert not torch.equal(late["gradient"], apart["gradient"])


def test_a_flushed_subnormal_number_shows():
    student, teacher = torch.tensor([[0.0, -87.0]]), torch.tensor([[0.0, -300.0]])
    with planted(kernels.jsd_terms, "tl.maximum(m, SMALLEST_NORMAL)", "tl.where(m == 0.0, 1.0, m)"), executing():
        out = fastsdpo.sdpo_loss(student, teacher, torch.tensor([0]), mode="full", alpha=0.5, backend="triton")
    assert not out.loss.isfinite()


def test_nothing_stays_intercepted():
    logits, targets = torch.randn(1, 5), torch.tensor([0])
    before = torch.empty, triton.runtime.driver._active, kernels.jsd_terms.src
    with planted(kernels.jsd_terms, "alpha * q", "q"), executing() as run:
        fastsdpo.token_logps(logits, targets, backend="triton")
        assert run.launches
    assert before == (torch.empty, triton.runtime.driver._active, kernels.jsd_terms.src)
    with pytest.raises(ValueError, match="CUDA or ROCm"):
        fastsdpo.token_logps(logits, targets, backend="triton")


PTX = """
.visible .entry written(.param .u64 p)
.reqntid 64
{
    .reg .pred %p<3>; .reg .b32 %r<5>; .reg .b64 %rd<5>;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    ld.param.b64 %rd1, [written_param_0];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.lt.s32 %p1, %r1, 40;
    BODY
    ret;
$L__func_end0:
}
""".replace("u64 p)", "u64 written_param_0)")


def executed(body: str, grid=(1, 1, 1), size: int = 64) -> tuple[torch.Tensor, list[str]]:
    """(the tensor whose address is the parameter, kinds of faults) of a kernel of 64 threads."""
    data = torch.arange(size, dtype=torch.int32)
    machine, buffer = Machine(parse(PTX.replace("BODY", body)), 0), buffer_of(data, "data")
    machine.run(grid, [SPAN + data.data_ptr() % 64], [buffer])
    result = torch.from_numpy(buffer.data.copy()).view(torch.int32)
    return result, [fault.kind for fault in machine.faults.values()]


def test_what_a_launch_does_is_counted():
    """Two programs of 64 threads: 40 of each take the load and store, and all come to the barrier."""
    taken = "ld.global.b32 %r3, [%rd3]; st.global.b32 [%rd3], %r1;"
    body = f"@!%p1 bra $L__BB0_1; {taken}\n$L__BB0_1:\n bar.sync 0;"
    machine = Machine(parse(PTX.replace("BODY", body)), 0)
    data = torch.arange(64, dtype=torch.int32)
    machine.run((2, 1, 1), [SPAN + data.data_ptr() % 64], [buffer_of(data, "data")])
    counts = machine.counts
    assert (counts.programs, counts.barriers) == (2, 2)
    assert counts.instructions == 2 * (64 * (6 + 1) + 40 * 2 + 64 * 2)
    assert (counts.read, counts.written) == (160, 160)  # both programs' are the same addresses
    assert counts.accesses == {("ld", 4): 80, ("st", 4): 80}


def test_ptx_without_a_fault():
    swap = "shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;"
    body = f"ld.global.b32 %r3, [%rd3]; {swap} @%p1 st.global.b32 [%rd3], %r4;"
    result, found = executed(body)
    assert not found
    assert result[:40].view(-1, 2).flip(1).flatten().tolist() == list(range(40))
    assert result[40:].tolist() == list(range(40, 64))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("@%p1 bra $L__BB0_1; bar.sync 0;\n$L__BB0_1:\n bar.sync 0;", memory.BARRIER),
        ("@%p1 bra $L__BB0_1; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;\n$L__BB0_1:", memory.SHUFFLE),
        ("st.global.b32 [%rd1], %r1;", memory.COLLISION),
        ("st.global.b32 [%rd3+4], %r1;", memory.OUT_OF_BOUNDS),
        ("ld.global.b64 %rd4, [%rd3];", memory.MISALIGNED),
        ("ld.global.b32 %r3, [%rd3]; st.global.b32 [%rd3], %r2;", memory.RACE_OF_PROGRAMS),
        ("@%p1 st.global.b32 [%rd3+100], %r2; ld.global.b32 %r3, [%rd3];", memory.RACE_OF_WARPS),
        ("ld.shared.b32 %r3, [8];", memory.UNWRITTEN),
    ],
    ids=lambda value: value.replace(" ", "-") if value.isascii() and ";" not in value else "",
)
def test_a_fault_in_ptx_is_found(body, kind):
    _, found = executed(body, grid=(2, 1, 1))
    assert any(one.startswith(kind) for one in found), found


def test_a_maximum_of_three():
    """sm_100 has it. A NaN counts for nothing, as with two."""
    for values in ("0fBF800000, 0f40000000, 0f40E00000", "0f40E00000, 0f7FC00000, 0f40000000"):
        result, _ = executed(f"max.f32 %r3, {values}; st.global.b32 [%rd3], %r3;")
        assert result.view(torch.float32).tolist() == [7.0] * 64


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_a_field_of_bits(kind):
    """Every place and length of a number with its highest bit set, beside PTX's definition bit by bit."""
    number = 0xA5C3_0F69
    for at in (0, 1, 5, 30, 31, 40):
        for length in (0, 1, 4, 27, 32, 300):
            body = f"mov.u32 %r1, {number}; bfe.{kind} %r3, %r1, {at}, {length}; st.global.b32 [%rd3], %r3;"
            count = length & 0xFF
            last = number >> min(at + count - 1, 31) & 1 if kind == "s32" and count else 0
            want = [number >> at + i & 1 if i < count and at + i < 32 else last for i in range(32)]
            result = executed(body)[0][0].item() & 0xFFFFFFFF
            assert result == sum(bit << i for i, bit in enumerate(want)), (at, length)


@pytest.mark.parametrize(
    "text",
    ["popc.b32 %r3, %r1;", "add.f32 %r3, %r1, %r2, %r1;", "max.xorsign.abs.f32 %r3, %r1, %r2;"],
    ids=["popc", "operands", "modifier"],
)
def test_an_unknown_instruction_is_not_guessed(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        executed(text)
