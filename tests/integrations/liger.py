"""Liger's functions with fastsdpo's losses in them, and Liger's own tests over these, once for each backend.

    python -m tests.integrations.liger build/liger      # `make liger-tests`, which unpacks Liger's sources there
    python -m tests.integrations.liger FOLDER --backends native --record       # and pytest's arguments

FOLDER has https://github.com/linkedin/Liger-Kernel at the version that is installed. Its tests of the fused linear
JSD, the fused linear KL divergence and the chunked JSD loss then run over our losses, with its tolerances. ``ptx``
executes the compiled Triton kernels for sm_90 on the CPU (`tests.ptx`), and leaves out what is larger than
`PTX_ELEMENTS`.

Not run: its tests of the JSD and KL divergence of log-probs, whose gradient is one in log-probs, ours in logits; and
`LEFT_OUT`. Its checks for a GPU of bfloat16 are answered with yes, its tests of a GPU's own products are skipped.
"""

import argparse
import contextlib
import math
import os
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsdpo
from benchmarks import harness

TESTS = (
    "test/transformers/test_fused_linear_jsd.py",
    "test/transformers/test_fused_linear_kl_div.py",
    "test/chunked_loss/test_jsd_loss.py",
)
# What these would find of values is in test_liger.py.
LEFT_OUT = {
    "test_jsd_hard_loss_computed_only_when_used": "it counts calls of torch's nll_loss",
    "kl_div.py::test_amp[autocast_dtype0": "it rounds logits to bfloat16, further from float64 than ours",
}
BACKENDS = ("native", "reference", "ptx")
PTX_ELEMENTS = 3_000_000  # of logits: half a minute on one core
RESULTS = harness.RESULTS / "liger_cpu.json"
backend = "auto"


def counted(labels: Tensor | None, like: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets with -100 where a row is ignored, and 1 / number of the others."""
    ids = torch.zeros(len(like), dtype=torch.long, device=like.device) if labels is None else labels.clone()
    ids[ids == ignore_index] = -100
    return ids, 1.0 / (ids != -100).sum().clamp(min=1)


class FusedLinearJSD:
    """``liger_kernel.ops.LigerFusedLinearJSDFunction``"""

    @staticmethod
    def apply(student, weight, teacher, head, labels=None, beta=0.5, ignore_index=-100, temperature=1.0, *rest):
        ids, share = counted(labels, student, ignore_index)
        options = {"mode": "full", "alpha": float(beta), "temperature": temperature, "backend": backend}
        options |= {"teacher_weight": head, "weights": share.expand(len(ids))}
        return fastsdpo.linear_sdpo_loss(student, teacher, weight, ids, **options).loss


class FusedLinearKLDiv:
    """``LigerFusedLinearKLDivFunction``: probabilities of the teacher beside the student's hidden states."""

    @staticmethod
    def apply(student, weight, target, labels=None, reduction="batchmean", ignore_index=-100, temperature=1.0, *rest):
        if reduction == "none":
            pytest.skip("one number for each token and vocabulary entry")
        ids, share = counted(labels, student, ignore_index)
        share = torch.ones(()) if reduction == "sum" else share / (len(weight) if reduction == "mean" else 1)
        options = {"mode": "full", "alpha": 0.0, "weights": share.expand(len(ids)), "backend": backend}
        # The temperature is the student's alone: the teacher's are probabilities already.
        states, logits = student / temperature, target.log()
        return fastsdpo.linear_sdpo_loss(states, None, weight, ids, teacher_logits=logits, **options).loss


class ChunkedJSD:
    """``chunked_loss.jsd_loss.LigerFusedLinearJSDFunction``: with a cross entropy at temperature 1."""

    @staticmethod
    def apply(student, weight, teacher, head, labels, bias=None, teacher_bias=None, *rest):
        hard, soft, beta, ignore_index, temperature, *_ = (*rest, *(0.5, 0.5, 0.5, -100, 1.0)[len(rest) :])
        both = rest[7] if len(rest) > 7 else False
        ids, share = counted(labels, student, ignore_index)
        options = {"mode": "full", "alpha": float(beta), "temperature": temperature, "backend": backend}
        options |= {"bias": bias, "teacher_weight": head, "teacher_bias": teacher_bias}
        weights, ce = (share * soft).expand(len(ids)), (share * hard).expand(len(ids))
        out = fastsdpo.linear_sdpo_loss(
            student, teacher, weight, ids, weights=weights, ce_weights=ce, ce_temperature=1.0, **options
        )
        if not both:
            return out.loss
        with torch.no_grad():
            logps = fastsdpo.linear_token_logps(student, weight, ids, bias=bias, backend=backend)
        return out.loss, out.per_token_loss.sum() * share, -logps.sum() * share


def replace() -> None:
    """Puts the four in the places where Liger and its tests look for them."""
    import liger_kernel.chunked_loss.functional as chunked_functional
    import liger_kernel.chunked_loss.jsd_loss as chunked
    import liger_kernel.ops as ops
    import liger_kernel.transformers.functional as functional
    import liger_kernel.transformers.fused_linear_jsd as fused
    import liger_kernel.transformers.fused_linear_kl_div as kl_div

    names = {"LigerFusedLinearJSDFunction": FusedLinearJSD, "LigerFusedLinearKLDivFunction": FusedLinearKLDiv}
    for module in (ops, functional, fused, kl_div):
        for name, ours in names.items():
            if hasattr(module, name):
                setattr(module, name, ours)
    chunked.LigerFusedLinearJSDFunction = ChunkedJSD
    chunked_functional.liger_fused_linear_jsd = ChunkedJSD.apply


class EachBackend:
    """A plugin of pytest: every test once for each backend, and what came of them."""

    def __init__(self, backends: list[str], largest: float):
        self.backends = backends
        self.largest = largest
        self.found: dict[str, Counter[str]] = {name: Counter() for name in backends}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("of_fastsdpo", self.backends, indirect=True)

    @pytest.fixture(autouse=True)
    def of_fastsdpo(self, request: pytest.FixtureRequest):
        global backend
        for name, reason in LEFT_OUT.items():
            if name in request.node.nodeid.replace(f"[{request.param}-", "["):
                pytest.skip(f"left out: {reason}")
        given = request.node.callspec.params
        size = given.get("B", 1) * given.get("T", 1) * given.get("V", 1)
        if size > self.largest:
            pytest.skip("larger than --largest")
        with contextlib.ExitStack() as stack:
            backend = request.param
            if backend == "ptx":
                from tests.ptx.executor import executing

                if size > PTX_ELEMENTS:
                    pytest.skip("too large for executed PTX")
                executor = stack.enter_context(executing(90))
                backend = "triton"
            yield
            if request.param == "ptx":
                assert not executor.faults, list(map(str, executor.faults))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = re.findall(r"(?<=[-[])(?:native|reference|ptx)(?=[]-])", report.nodeid)[-1]
        if report.skipped:
            self.found[name][report.longrepr[2].removeprefix("Skipped: ").partition(": ")[0]] += 1
        elif report.failed or report.when == "call":
            self.found[name][report.outcome] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"Liger-Kernel with its tests: it has {TESTS[0]}")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--largest", type=float, default=math.inf, help="elements of logits; larger cases are skipped")
    parser.add_argument("--record", action="store_true", help=f"write to {RESULTS.relative_to(harness.ROOT)}")
    args, rest = parser.parse_known_args()
    if not (args.folder / TESTS[0]).exists():
        parser.error(f"{args.folder} must have {TESTS[0]}: `make liger-tests` unpacks Liger's sources")
    os.chdir(args.folder)
    sys.path.insert(0, os.getcwd())
    import test.utils as their_utils

    their_utils.supports_bfloat16 = lambda: True
    replace()
    plugin = EachBackend(args.backends, args.largest)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *TESTS, *rest], [plugin])
    for name, found in plugin.found.items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in sorted(found.items())))
    if args.record:
        liger = f"Liger-Kernel {version('liger_kernel')}"
        rows = [{"case": {"tests": liger, "backend": name}, **found} for name, found in plugin.found.items()]
        harness.record(RESULTS, rows)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
