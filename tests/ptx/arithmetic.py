"""What PTX instructions without memory compute, on arrays of one value per thread.

`function_of` gives an instruction's function and the types of its operands. Float arithmetic is IEEE: float32
with one rounding; ``.ftz`` takes and gives 0 for subnormal numbers. The approximate instructions (ex2, lg2,
rcp) are rounded from float64; hardware is up to two units in the last place off.
"""

import functools
from collections.abc import Callable

import numpy as np

from .parse import BYTES, Instruction, UnknownInstruction, Vector

F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
PLAIN = {"rn", "ftz", "approx", "full", "NaN"}  # modifiers of float arithmetic that are understood


def dtype_of(kind: str) -> np.dtype:
    """Of an operand; the half-precision floats are taken as their bits."""
    if kind == "pred":
        return np.dtype("?")
    if kind in ("bf16", "f16"):
        return np.dtype("u2")
    letter = "u" if kind.endswith("x2") else {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    size = 8 if kind == "f32x2" else 4 if kind.endswith("x2") else int(kind[1:]) // 8
    return np.dtype(f"{letter}{size}")


def flush(x):
    """Subnormal numbers become 0 of the same sign."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)


def fma(a, b, c):
    """a b + c with one rounding. The product is exact in float64; a sum that float64 rounds to the middle
    between two float32 is nudged to its side of it."""
    product, c = a.astype(F64) * b, c.astype(F64)
    total = product + c
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if tie.any():
        part = total - product
        error = (product - (total - part)) + (c - part)
        nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        total = np.where(tie & (error != 0), nudged, total)
    return total.astype(F32)


def from_half(x, kind: str):
    """float32 of the bits of a half-precision number."""
    return x.view(np.float16).astype(F32) if kind[0] == "f" else (x.astype(U32) << U32(16)).view(F32)


def to_half(x, kind: str):
    if kind[0] == "f":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(np.uint16)


def to_integer(x, target: np.dtype):
    """A float that is a whole number, limited to the type; NaN is 0."""
    info = np.iinfo(target)
    top, inside = x >= float(info.max), np.clip(np.nan_to_num(x), info.min, float(info.max))
    return np.where(top, info.max, np.where(top, 0, inside).astype(target)).astype(target)


def divide(a, b):
    """Integers, rounded towards zero; all ones where b is 0."""
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    quotient = np.where((a < 0) ^ (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient).astype(a.dtype)


def shift(a, by, left: bool):
    bits = a.dtype.itemsize * 8
    near = np.minimum(by, bits - 1).astype(a.dtype)
    out = np.left_shift(a, near) if left else np.right_shift(a, near)
    gone = np.right_shift(a, a.dtype.type(bits - 1)) if a.dtype.kind == "i" and not left else 0
    return np.where(by >= bits, gone, out).astype(a.dtype)


def funnel_shift(a, b, by, left: bool, wrap: bool):
    both = (b.astype(U64) << U64(32)) | a
    by = (by & U32(31) if wrap else np.minimum(by, 32)).astype(U64)
    return ((both << by >> U64(32)) if left else both >> by).astype(U32)


def extract(a, at, length):
    """bfe: ``length`` of 32 bits from ``at`` on; the highest of a signed number's fills what is above."""
    bits = a.astype(np.int64) >> np.minimum(at & U32(0xFF), U32(32)).astype(np.int64)
    above = 64 - np.minimum(length & U32(0xFF), U32(32)).astype(np.int64)
    near = np.minimum(above, 63)
    moved = np.where(above == 64, 0, bits << near)
    out = moved >> near if a.dtype.kind == "i" else moved.view(U64) >> near.astype(U64)
    return out.astype(a.dtype)


def permute(a, b, selector):
    """Four bytes picked of eight; bit 3 of a selector copies the byte's sign into all of it."""
    both, out = (b.astype(U64) << U64(32)) | a, U64(0)
    for n in range(4):
        pick = (selector.astype(U64) >> U64(4 * n)) & U64(15)
        byte = (both >> ((pick & U64(7)) * U64(8))) & U64(0xFF)
        sign = np.where(byte & U64(0x80), U64(0xFF), U64(0))
        out = out | np.where(pick & U64(8), sign, byte) << U64(8 * n)
    return out.astype(U32)


def lop3(table: int) -> Callable:
    """Any function of three bits, by its table of truth."""

    def f(a, b, c):
        out = U32(0)
        for n in range(8):
            if table >> n & 1:
                term = (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
                out = out | term
        return out

    return f


def compare(how: str, a, b):
    """setp; of floats, a name that ends in u is true where one is NaN."""
    if how in ("num", "nan"):
        return (np.isnan(a) | np.isnan(b)) == (how == "nan")
    orders = {"eq": np.equal, "ne": np.not_equal, "lt lo": np.less, "le ls": np.less_equal}
    orders |= {"gt hi": np.greater, "ge hs": np.greater_equal}  # the second name is for unsigned numbers
    plain = {name: function for names, function in orders.items() for name in names.split()}
    if a.dtype.kind != "f":
        return plain[how](a, b)
    nan = np.isnan(a) | np.isnan(b)
    return plain[how[:-1]](a, b) | nan if how[-1] == "u" else plain[how](a, b) & ~nan


def _of_all(f, *xs):
    return functools.reduce(f, xs)


SHARED = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs}
INTEGER = {
    **SHARED,
    **{"min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    **{"not": np.invert, "div": divide, "rem": lambda a, b: (a - divide(a, b) * b).astype(a.dtype)},
}
PREDICATE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
FLOAT = {
    **SHARED,
    **{"mul": np.multiply, "min": np.fmin, "max": np.fmax, "div": np.divide, "fma": fma, "sqrt": np.sqrt},
    "ex2": lambda x: np.exp2(x.astype(F64)).astype(F32),
    "lg2": lambda x: np.log2(np.where(x < 0, np.nan, np.abs(x)).astype(F64)).astype(F32),
    "rcp": lambda x: (1.0 / x.astype(F64)).astype(F32),
}


def function_of(i: Instruction) -> tuple[Callable, list[str]]:
    """(function, types of its operands) of an instruction. The function takes arrays of these types."""
    f, kinds = _function_of(i)
    if isinstance(f, np.ufunc) and f.nin != len(kinds):  # numpy takes one more for the place of its result
        raise UnknownInstruction(i.text)
    return f, kinds


def _function_of(i: Instruction) -> tuple[Callable, list[str]]:
    op, name, kind = i.op, i.op[0], i.op[-1]
    count = len(i.operands) - 1
    if name == "cvt":
        return _convert(i)
    if name == "setp":
        return _compare(i)
    if name == "selp":
        return lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"]
    if kind == "pred":
        return PREDICATE[name], ["pred"] * count
    if name in ("shl", "shr"):
        return lambda a, by: shift(a, by, name == "shl"), [kind, "u32"]
    if name == "shf":
        return lambda a, b, by: funnel_shift(a, b, by, op[1] == "l", op[2] == "wrap"), ["u32"] * 3
    if name == "bfe" and kind in ("s32", "u32"):
        return extract, [kind, "u32", "u32"]
    if name == "prmt" and op[1] == "b32":
        return permute, ["u32"] * 3
    if name == "lop3":
        return lop3(i.operands.pop().value), ["u32"] * 3
    if name in ("mul", "mad") and kind[0] in "us":
        return _multiply(i)
    if kind == "f32x2" and op[1:-1] in ([], ["rn"]):  # two float32 in a register of 64 bits
        f = FLOAT[name]

        def pairs(*xs):
            xs = [np.ascontiguousarray(x).view(F32) for x in np.broadcast_arrays(*xs)]
            return f(*xs).view(U64)

        return pairs, ["u64"] * count
    if kind == "f32" and set(op[1:-1]) <= PLAIN:
        f = {"min": np.minimum, "max": np.maximum}[name] if "NaN" in op else FLOAT[name]
        if name in ("min", "max"):  # of two or three
            f = functools.partial(_of_all, f)
        if "ftz" in op:
            return lambda *xs: flush(f(*map(flush, xs))), [kind] * count
        return f, [kind] * count
    if kind in ("bf16", "f16") and op[1:-1] == ["rn", "f32"]:  # half operands, a float32 result
        f = FLOAT[name]
        halves = [kind] * (count - 1)
        return lambda *xs: f(*[from_half(x, kind) for x in xs[:-1]], xs[-1]), [*halves, "f32"]
    if kind[0] in "bus" and kind[1:].isdigit() and name in INTEGER and len(op) == 2:
        return INTEGER[name], [kind] * count
    raise UnknownInstruction(i.text)


def _convert(i: Instruction) -> tuple[Callable, list[str]]:
    to, source, modes = i.op[-2], i.op[-1], set(i.op[1:-2])
    if modes - {"rn", "ftz"} - set(ROUNDINGS):
        raise UnknownInstruction(i.text)
    if to in ("bf16x2", "f16x2") and source == "f32":
        join = lambda a, b: (to_half(a, to).astype(U32) << U32(16)) | to_half(b, to)  # noqa: E731
        return join, ["f32", "f32"]
    half = source in ("bf16", "f16")
    read = (lambda x: from_half(x, source)) if half else lambda x: x
    if to in ("bf16", "f16"):
        return lambda a: to_half(read(a).astype(F32), to), [source]
    target, rounding = dtype_of(to), modes & set(ROUNDINGS)
    if rounding:
        whole = ROUNDINGS[rounding.pop()]
        if target.kind == "f":
            return lambda a: whole(read(a)), [source]
        return lambda a: to_integer(whole(read(a).astype(F64)), target), [source]
    return lambda a: read(a).astype(target), [source]


def _compare(i: Instruction) -> tuple[Callable, list[str]]:
    how, modes, kind = i.op[1], i.op[2:-1], i.op[-1]
    if kind in ("f16x2", "bf16x2") and not modes and isinstance(i.operands[0], Vector):
        kind = kind[:-2]
        parts = lambda x: (x.astype(np.uint16), (x >> U32(16)).astype(np.uint16))  # noqa: E731

        def both(a, b):
            return [
                compare(how, from_half(x, kind), from_half(y, kind)) for x, y in zip(parts(a), parts(b), strict=True)
            ]

        return both, ["u32", "u32"]
    if modes or isinstance(i.operands[0], Vector):
        raise UnknownInstruction(i.text)
    if kind in ("f16", "bf16"):
        return lambda a, b: compare(how, from_half(a, kind), from_half(b, kind)), [kind, kind]
    return lambda a, b: compare(how, a, b), [kind, kind]


def _multiply(i: Instruction) -> tuple[Callable, list[str]]:
    name, part, kind = i.op
    if part not in ("lo", "wide"):
        raise UnknownInstruction(i.text)
    if part == "lo":
        f = np.multiply if name == "mul" else lambda a, b, c: a * b + c
        return f, [kind] * (len(i.operands) - 1)
    wide = f"{kind[0]}{16 * BYTES[kind]}"
    target = dtype_of(wide)
    product = lambda a, b: a.astype(target) * b.astype(target)  # noqa: E731
    if name == "mul":
        return product, [kind, kind]
    return lambda a, b, c: product(a, b) + c, [kind, kind, wide]
