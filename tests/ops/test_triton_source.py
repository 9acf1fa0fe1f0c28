"""What the Triton kernels' source must not contain, because older compilers cannot read it."""

import ast
from pathlib import Path

import fastsdpo.ops

OPS = Path(fastsdpo.ops.__file__).parent
KERNELS = OPS / "_triton_kernels.py"


def device_functions(path: Path) -> list[ast.FunctionDef]:
    found = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            marks = [ast.unparse(mark).partition("(")[0] for mark in node.decorator_list]
            if "triton.jit" in marks:
                found.append(node)
    return found


def test_no_min_or_max_of_constants():
    """Before Triton 3.6 Python's min and max are operations on tensors, and no constants."""
    functions = device_functions(KERNELS)
    assert functions
    for function in functions:
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert not names & {"min", "max"}, function.name


def test_no_chained_boolean_operators():
    """Triton 3.2 takes `a and (b and c)`, not `a and b and c`."""
    for function in device_functions(KERNELS):
        chains = [node for node in ast.walk(function) if isinstance(node, ast.BoolOp)]
        assert all(len(chain.values) == 2 for chain in chains), function.name
