"""The executor finds faults that are planted in the library's kernels and in PTX, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
import triton

import fastsdpo
from fastsdpo.ops import _triton_common as common
from fastsdpo.ops.divergence import _triton as pairs
from fastsdpo.ops.token_logps import _triton as tokens

from . import memory
from .cases import LOSSES, rows
from .executor import buffer_of, executing, harmless, planted
from .machine import SPAN, Machine
from .parse import UnknownInstruction, parse


def faults(name: str, vocabulary: int, dtype=torch.bfloat16, order=None):
    """(results, faults that are not harmless) of a loss."""
    with executing(order=order) as executor:
        results = LOSSES[name](*rows(vocabulary, dtype), "triton")
    return results, [fault for fault in executor.faults if not harmless(fault)]


STORED = "tl.debug_barrier()  # what was stored is read, by other threads as well\n"
PLANTED = {
    "misaligned access": (
        common.row_partial, "start = ptr + whole_pieces(offset, A)",
        "start = tl.multiple_of(ptr + offset, 16)", memory.MISALIGNED,
    ),
    "missing barrier": (common.row_partial, STORED, "\n", memory.RACE_OF_WARPS),
    "bound off by one": (
        common.edge_positions, "at < offset + vocabulary", "at <= offset + vocabulary", memory.OUT_OF_BOUNDS,
    ),
    "sum that is not stored": (
        common.store_segment, "        tl.store(out + 1, z_sum)\n", "        pass\n", memory.UNWRITTEN,
    ),
    "store to the next row": (
        tokens.logp_gradient_row, "g_start = g_ptr + whole_pieces(first, A)",
        "g_start = g_ptr + whole_pieces(first, A) + vocabulary // 8 * 8", memory.RACE_OF_PROGRAMS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED, ids=lambda value: value.replace(" ", "-"))
def test_a_planted_fault_is_found(name):
    function, right, wrong, kind = PLANTED[name]
    with planted(function, right, wrong):
        _, found = faults("logps", 1001)
    assert any(fault.kind.startswith(kind) for fault in found), list(map(str, found))
    assert all(fault.places[0].text() for fault in found)


STALE = {
    "sampled fused": (
        tokens._sampled_token_fwd_kernel,
        "tl.debug_barrier()  # all threads have read the target's logit", "#",
    ),
    "top-k fused": (
        pairs._topk_fwd_kernel, "tl.debug_barrier()  # all threads have read the support's logits", "#",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STALE, ids=lambda value: value.replace(" ", "-"))
def test_a_stale_read_in_place_is_found(name):
    """Without its barrier the race is reported in any order, and shows in the values where warp 0 is late."""
    right, found = faults(name, 1000, torch.float32)
    assert not found
    with planted(*STALE[name]):
        together, found = faults(name, 1000, torch.float32)
        late, found_late = faults(name, 1000, torch.float32, order=range(7, -1, -1))
    for results in (found, found_late):
        assert any(fault.kind.startswith(memory.RACE_OF_WARPS) for fault in results)
    torch.testing.assert_close(together["loss"], right["loss"], rtol=0, atol=0)
    finite = right["loss"].isfinite()
    assert (late["loss"] - right["loss"])[finite].abs().max() > 0.1


def test_a_flushed_subnormal_number_shows():
    student, teacher = torch.tensor([[0.0, -87.0]]), torch.tensor([[0.0, -300.0]])
    with (
        planted(pairs.jsd_terms, "tl.maximum(m, SMALLEST_NORMAL)", "tl.where(m == 0.0, 1.0, m)"),
        executing(),
    ):
        out = fastsdpo.sdpo_loss(
            student, teacher, torch.tensor([0]), mode="full", alpha=0.5, backend="triton"
        )
    assert out.loss.isnan()


def test_nothing_stays_intercepted():
    logits, targets = torch.randn(1, 5), torch.tensor([0])
    before = torch.empty, triton.runtime.driver._active, common.processors, pairs.jsd_terms.src
    with planted(pairs.jsd_terms, "alpha * q", "q"), executing() as executor:
        fastsdpo.token_logps(logits, targets, backend="triton")
        assert executor.launches
    assert before == (
        torch.empty,
        triton.runtime.driver._active,
        common.processors,
        pairs.jsd_terms.src,
    )
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


@pytest.mark.parametrize(
    "text",
    ["popc.b32 %r3, %r1;", "add.f32 %r3, %r1, %r2, %r1;", "max.xorsign.abs.f32 %r3, %r1, %r2;"],
    ids=["popc", "operands", "modifier"],
)
def test_an_unknown_instruction_is_not_guessed(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        executed(text)
