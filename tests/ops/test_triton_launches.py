"""What a launch compiles: one variant for every T, temperature, alpha, stride; nothing chosen by timing."""

import importlib
import inspect
import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
MODULES = ("fastsdpo.ops.token_logps._triton", "fastsdpo.ops.divergence._triton")
KERNELS = (
    "_sampled_token_fwd_kernel",
    "_sampled_token_bwd_kernel",
    "_divergence_fwd_kernel",
    "_divergence_bwd_kernel",
    "_jsd_kernel",
    "_topk_fwd_kernel",
    "_topk_bwd_kernel",
)


def kernel_named(name):
    for module in map(importlib.import_module, MODULES):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(name)


def test_every_kernel_is_looked_at():
    from triton.runtime import JITFunction

    found = {
        name
        for module in map(importlib.import_module, MODULES)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert found == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_values_never_compile_another_variant(name):
    """The key of Triton's cache of compiled kernels, for other sizes, strides, temperatures, alphas."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = kernel_named(name)
    binder = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    tensor = torch.zeros(64)

    def key(integer, real):
        given = {}
        for p in kernel.params:
            real_number = p.name in ("k", "cap", "inv_temperature", "alpha", "is_clip")
            given[p.name] = (
                1 if p.is_constexpr else tensor if p.name.endswith("_ptr")
                else real if real_number else integer
            )  # fmt: skip
        return binder(**given)[1]

    # 1 and multiples of 16 are what Triton makes variants of; a temperature of 1, alpha of 0 and 1.
    keys = [key(i, r) for i, r in ((1, 1.0), (16, 0.0), (151936, 1.4426950408889634), (7, 0.3))]
    assert all(k == keys[0] for k in keys)


def test_launch_parameters_are_a_function_of_dtypes_alone():
    from fastsdpo.ops import _triton_common as common

    assert inspect.signature(common.launch).parameters.keys() - {"joint"} == {
        "element_sizes", "heavy", "beside"
    }  # fmt: skip
    assert common.tile_of(common.launch(2, 2)) == 4096
    assert common.tile_of(common.launch(2, 2, heavy=True)) == 2048
    assert common.launch(2, 4)["VEC"] == 8
    assert common.launch(4)["VEC"] == 4
    for sizes in ((2,), (4,), (2, 4)):
        for heavy in (True, False):
            options = common.launch(*sizes, heavy=heavy)
            assert options["maxnreg"] == 64
            assert options["LANES"] % (32 * options["num_warps"]) == 0
    source = "".join(
        inspect.getsource(importlib.import_module(m)) for m in (*MODULES, common.__name__)
    )
    assert "autotune" not in source


@pytest.mark.parametrize("vocabulary", [1, 2000, 32001, 151936, 1_000_000])
def test_segments_of_a_row_are_a_function_of_its_length(vocabulary):
    from fastsdpo.ops import _triton_common as common

    for tile in (2048, 4096):
        segments, pieces = common.segments_of(vocabulary, tile)
        length = pieces * common.ALIGNMENT
        assert segments * length >= vocabulary > (segments - 1) * length
        # Tiles begin at a boundary at most ALIGNMENT - 1 elements before the segment.
        assert (length + common.ALIGNMENT) % tile == 0
        assert length < common.MAX_TILES_PER_SEGMENT * tile


def test_few_rows_are_split_and_many_are_not(monkeypatch):
    from fastsdpo.ops import _triton_common as common

    monkeypatch.setattr(common, "processors", lambda device: 132)
    device = torch.device("cpu")
    assert common.splits_rows(1, 8, device)
    assert common.splits_rows(131, 8, device)
    assert not common.splits_rows(132, 8, device)
    assert not common.splits_rows(1, 1, device)
