"""Floating-point arithmetic, against rational numbers rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from bench.gpu.programs import Program, every, exact

_SPECIAL = {
    # Zeros, infinities, NaN, subnormals, the borders of the normal numbers, one and its neighbours, and others.
    "f32": (
        *(0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFC00001, 1, 0x80000001, 0x007FFFFF, 0x00800000),
        *(0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x3F7FFFFF, 0x3F800001, 0xBF800000, 0x34000000, 0x33800000, 0x00000123),
        *(0x40490FDB, 0xC2F6E979, 0x7E967699, 0x5F3759DF, 0x1E3CE508, 0x80ABCDEF, 0x4B800001),
    ),
    "f16": (
        *(0, 0x8000, 0x7C00, 0xFC00, 0x7FFF, 0x7E01, 1, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x3BFF),
        *(0x3C01, 0xBC00, 0x1400, 0x4248, 0xD7BD, 0x6001),
    ),
    "bf16": (
        *(0, 0x8000, 0x7F80, 0xFF80, 0x7FFF, 0x7FC1, 1, 0x8001, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x3F80, 0x3F7F),
        *(0x3F81, 0xBF80, 0x3C00, 0x4049, 0xC2F7, 0x1E3D),
    ),
    "f64": (
        *(0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, 1, (1 << 52) - 1, 1 << 52, (0x7FF << 52) - 1),
        *(0x3FF << 52, (0x3FF << 52) + 1, 0xBFF << 52, 0x3CA << 52, 0x400921FB54442D18),
    ),
}
DTYPES = {"f16": "u2", "bf16": "u2", "f32": "u4", "f64": "u8"}
# The PTX ISA version and target that 16-bit arithmetic came with.
_LEAST = {"f16": 80, "bf16": 90, "f32": 80, "f64": 80}
Function = Callable[..., exact.Number]


def special(name: str) -> tuple[int, ...]:
    """Return bits of a format at which something changes."""
    return _SPECIAL[name]


def arithmetic(
    opcode: str,
    function: Function,
    inputs: tuple[np.ndarray, ...],
    kind: str,
    *,
    mode: str = "rn",
    flush: bool = False,
    least: int | None = None,
) -> Program:
    """Return the program of one instruction, whose result is ``function`` of its operands, rounded once."""

    def result(*numbers: exact.Number) -> int:
        if flush:
            numbers = tuple(exact.flushed(x) for x in numbers)
        return exact.write(function(*numbers), kind, mode, flush=flush)

    want = exact.each(result, *inputs, formats=(kind,) * len(inputs))
    operands = ", ".join(["%d0", *(f"%a{k}" for k in range(len(inputs)))])
    return Program(
        opcode, f"{opcode} {operands};", inputs, (want,), nan=kind, least=_LEAST[kind] if least is None else least
    )


def packed(one: Program, opcode: str) -> Program:
    """Return the program of the packed form: each thread's numbers, and those of the next thread as upper halves."""

    def pair(x: np.ndarray) -> np.ndarray:
        return x.astype(np.uint32) | (np.roll(x, -1).astype(np.uint32) << np.uint32(16))

    body = one.body.replace(one.name, opcode)
    inputs, want = tuple(pair(x) for x in one.inputs), tuple(pair(x) for x in one.expected)
    return Program(opcode, body, inputs, want, one.exact, one.nan + "x2", one.relative, one.absolute, least=one.least)


def _modes(opcode: str, function: Callable[[str], Function], inputs: tuple[np.ndarray, ...]) -> Iterator[Program]:
    """Yield the fp32 forms of an instruction: every rounding, ftz, sat."""
    sat = lambda mode: lambda *x: exact.clamped(function(mode)(*x))  # noqa: E731
    for mode in ("rn", "rz", "rm", "rp"):
        yield arithmetic(f"{opcode}.{mode}.f32", function(mode), inputs, "f32", mode=mode)
        yield arithmetic(f"{opcode}.{mode}.ftz.f32", function(mode), inputs, "f32", mode=mode, flush=True)
    yield arithmetic(f"{opcode}.rn.sat.f32", sat("rn"), inputs, "f32")
    yield arithmetic(f"{opcode}.rn.ftz.sat.f32", sat("rn"), inputs, "f32", flush=True)


_FUNCTIONS: dict[str, Callable[[str], Function]] = {
    "add": lambda mode: lambda x, y: exact.add(x, y, mode),
    "sub": lambda mode: lambda x, y: exact.add(x, exact.neg(y), mode),
    "mul": lambda mode: exact.mul,
    "fma": lambda mode: lambda x, y, z: exact.fma(x, y, z, mode),
}


def _near_ties() -> tuple[np.ndarray, ...]:
    """Return factors and addends of fp32 whose exact sum is a tie but for its last bits, subnormal ones among them."""
    rng = np.random.default_rng(0)
    n = 512
    a = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    b = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    c = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    k = np.arange(n)
    # 1 + 2**-24, a tie, and a product too small for fp64 to keep beside it; then the same around subnormal numbers.
    a[:128], b[:128], c[:128] = 0x33800000, 0x3F800000, 0x3F800000 + k[:128] % 4
    a[:128:2] |= (1 + k[:128:2]).astype(np.uint32)
    a[128:256], b[128:256] = 0x1F800000 + (k[128:256] % 64), 0x1F000001 + (k[128:256] % 8) * 0x100
    c[128:256] = (k[128:256] % 16) | np.where(k[128:256] % 3 == 0, 0x80000000, 0).astype(np.uint32)
    exponents = np.uint32(90) + (k[256:384] % 60).astype(np.uint32)
    c[256:384] = (c[256:384] & 0x807FFFFF) | (exponents << np.uint32(23))
    a[256:384] = (a[256:384] & 0x807FFFFF) | (np.uint32(110) << np.uint32(23))
    b[256:384] = (b[256:384] & 0x807FFFFF) | (np.uint32(110) << np.uint32(23))
    # Sums 2**-70 below and above a tie, which fp64 rounds onto it: 1 - 2**-46 and 1 + 2**-46 are products.
    below = np.array([0x33800001, 0x3F7FFFFE], np.uint32)
    above = np.array([8384513 * 2.0**-47, 8392705 * 2.0**-23], np.float32).view(np.uint32)
    for first, factors in ((384, below), (448, above)):
        a[first : first + 64], b[first : first + 64] = factors
        c[first : first + 64] = 0x3F800000 + np.arange(64) % 2
    return a, b, c


def _fp32() -> Iterator[Program]:
    edges = special("f32")
    two = every(edges, edges, dtype="u4")
    three = every(edges[:13], edges[6:17], edges[1:26:3], dtype="u4")
    for name in ("add", "sub", "mul"):
        yield from _modes(name, _FUNCTIONS[name], two)
        yield arithmetic(f"{name}.f32", _FUNCTIONS[name]("rn"), two, "f32")
    yield from _modes("fma", _FUNCTIONS["fma"], three)
    for mode in ("rn", "rz", "rm", "rp"):
        one = arithmetic(f"fma.{mode}.f32", _FUNCTIONS["fma"](mode), _near_ties(), "f32", mode=mode)
        yield Program(f"{one.name} near ties", one.body, one.inputs, one.expected, nan="f32")
    yield arithmetic("div.rn.f32", exact.div, two, "f32")
    yield arithmetic("div.rn.ftz.f32", exact.div, two, "f32", flush=True)
    one = every((*edges, *range(0x3F800000, 0x40800000, 0x00123457)), dtype="u4")
    yield arithmetic("sqrt.rn.f32", exact.sqrt, one, "f32")
    yield arithmetic("sqrt.rn.ftz.f32", exact.sqrt, one, "f32", flush=True)
    unit = (0, exact.Fraction(1))
    yield arithmetic("rcp.rn.f32", lambda x: exact.div(unit, x), one, "f32")
    yield arithmetic("rcp.rn.ftz.f32", lambda x: exact.div(unit, x), one, "f32", flush=True)
    yield arithmetic("neg.f32", exact.neg, one, "f32")
    yield arithmetic("neg.ftz.f32", exact.neg, one, "f32", flush=True)
    magnitude = lambda x: x if x is None else (0, x[1])  # noqa: E731
    yield arithmetic("abs.f32", magnitude, one, "f32")
    yield arithmetic("abs.ftz.f32", magnitude, one, "f32", flush=True)
    wide = every(special("f64"), special("f64"), dtype="u8")
    for name in ("add", "sub", "mul"):
        yield arithmetic(f"{name}.rn.f64", _FUNCTIONS[name]("rn"), wide, "f64")
    yield arithmetic("div.rn.f64", exact.div, wide, "f64")
    yield arithmetic("sqrt.rn.f64", exact.sqrt, wide[:1], "f64")
    yield arithmetic("neg.f64", exact.neg, wide[:1], "f64")
    yield arithmetic("abs.f64", magnitude, wide[:1], "f64")
    yield arithmetic("rcp.rn.f64", lambda x: exact.div(unit, x), wide[:1], "f64")
    for name in ("min", "max"):
        larger: Function = lambda x, y, n=name: exact.extreme(x, y, largest=n == "max")  # noqa: E731
        yield arithmetic(f"{name}.f64", larger, wide, "f64")
    for name in ("add", "sub", "mul", "fma"):
        yield _pairs_of_fp32(name, three if name == "fma" else two)


def _pairs_of_fp32(op: str, inputs: tuple[np.ndarray, ...]) -> Program:
    def pair(x: np.ndarray) -> np.ndarray:
        return x.astype(np.uint64) | (np.roll(x, -1).astype(np.uint64) << np.uint64(32))

    one = arithmetic(f"{op}.rn.f32", _FUNCTIONS[op]("rn"), inputs, "f32")
    name = f"{op}.rn.f32x2"
    body, pairs = one.body.replace(one.name, name), tuple(pair(x) for x in inputs)
    return Program(name, body, pairs, (pair(one.expected[0]),), nan="f32x2", least=100)


def _small() -> Iterator[Program]:
    """Yield the forms of 16 bits, alone and packed."""
    for kind in ("f16", "bf16"):
        edges = special(kind)
        two, three = every(edges, edges, dtype="u2"), every(edges[::2], edges[1::2], edges[::3], dtype="u2")
        one = every(edges, dtype="u2")
        programs = [arithmetic(f"{n}.rn.{kind}", _FUNCTIONS[n]("rn"), two, kind) for n in ("add", "sub", "mul")]
        # Where the sum of an exact product is not exact in fp64.
        programs.append(arithmetic(f"fma.rn.{kind}", _FUNCTIONS["fma"]("rn"), three, kind, least=80))
        after = {"relu": exact.relu} if kind == "bf16" else {"relu": exact.relu, "sat": exact.clamped}
        for suffix, change in after.items():
            function: Function = lambda x, y, z, f=change: f(exact.fma(x, y, z))  # noqa: E731
            programs.append(arithmetic(f"fma.rn.{suffix}.{kind}", function, three, kind, least=80))
        if kind == "f16":
            for n in ("add", "sub", "mul"):
                clamp: Function = lambda x, y, n=n: exact.clamped(_FUNCTIONS[n]("rn")(x, y))  # noqa: E731
                programs.append(arithmetic(f"{n}.rn.sat.{kind}", clamp, two, kind))
        programs.append(arithmetic(f"neg.{kind}", exact.neg, one, kind, least=80))
        programs.append(arithmetic(f"abs.{kind}", lambda x: x if x is None else (0, x[1]), one, kind, least=80))
        programs += list(_extremes(kind, two))
        for each in programs:
            yield each
            yield packed(each, each.name + "x2")


def _extremes(kind: str, two: tuple[np.ndarray, ...]) -> Iterator[Program]:
    """Yield min and max, of which NaN and signs are the point."""
    ftz = (False, True) if kind == "f32" else (False,)
    for name in ("min", "max"):
        for nan in (False, True):
            for flush in ftz:
                function: Function = lambda x, y, n=name, m=nan: exact.extreme(x, y, largest=n == "max", nan=m)  # noqa: E731
                opcode = f"{name}{'.ftz' * flush}{'.NaN' * nan}.{kind}"
                yield arithmetic(opcode, function, two, kind, flush=flush, least=80)
            yield _xorsign(name, nan, kind, two)
    if kind == "f32":
        a, b = two
        c = np.roll(a, 17)
        three = lambda x, y, z: exact.extreme(exact.extreme(x, y, largest=True), z, largest=True)  # noqa: E731
        one = arithmetic("max.f32", three, (a, b, c), "f32", least=100)
        yield Program("max.f32 of three", one.body, one.inputs, one.expected, nan="f32", least=100)


def _xorsign(name: str, nan: bool, kind: str, two: tuple[np.ndarray, ...]) -> Program:
    """The sizes compared, with the sign of both; the sign of NaN counts, so bits are looked at."""
    form = exact.FORMATS[kind]

    def result(a: int, b: int) -> int:
        top = form.bits - 1
        x, y = (exact.read(z & ~(1 << top), kind) for z in (a, b))
        chosen = exact.extreme(x, y, largest=name == "max", nan=nan)
        return exact.write(chosen if chosen is None else (((a ^ b) >> top) & 1, chosen[1]), kind)

    opcode = f"{name}{'.NaN' * nan}.xorsign.abs.{kind}"
    want = exact.each(result, *two)
    return Program(opcode, f"{opcode} %d0, %a0, %a1;", two, (want,), nan=kind, least=86)


def _mixed() -> Iterator[Program]:
    """Yield the instructions of fp32 whose factors have 16 bits."""
    for kind in ("f16", "bf16"):
        a, b, c = every(special(kind)[::2], special(kind)[1::2], special("f32")[::3], dtype="u4")
        small, other = a.astype("u2"), b.astype("u2")
        fused = exact.each(
            lambda x, y, z: exact.write(exact.fma(x, y, z), "f32"),
            small,
            other,
            c,
            dtype="u4",
            formats=(kind, kind, "f32"),
        )
        name = f"fma.rn.f32.{kind}"
        yield Program(name, f"{name} %d0, %a0, %a1, %a2;", (small, other, c), (fused,), nan="f32", least=100)
        for op, sign in (("add", 0), ("sub", 1)):
            total = exact.each(
                lambda x, z, s=sign: exact.write(exact.add(x, exact.neg(z) if s else z), "f32"),
                *(small, c),
                dtype="u4",
                formats=(kind, "f32"),
            )
            name = f"{op}.rn.f32.{kind}"
            yield Program(name, f"{name} %d0, %a0, %a1;", (small, c), (total,), nan="f32", least=100)


def _others() -> Iterator[Program]:
    two = every(special("f32"), special("f32"), dtype="u4")
    yield from _extremes("f32", two)
    sign = np.uint32(0x80000000)
    yield Program("copysign.f32", "copysign.f32 %d0, %a0, %a1;", two, ((two[0] & sign) | (two[1] & ~sign),))
    tests: dict[str, Callable[[float], bool]] = {
        "finite": math.isfinite,
        "infinite": math.isinf,
        "number": lambda x: not math.isnan(x),
        "notanumber": math.isnan,
        # PTX ISA, testp: "positive and negative zero are considered normal numbers".
        "normal": lambda x: math.isfinite(x) and (x == 0 or abs(x) >= 2.0**-126),
        "subnormal": lambda x: 0 < abs(x) < 2.0**-126,
    }
    one = every(special("f32"), dtype="u4")
    for name, test in tests.items():
        want = exact.each(lambda x, f=test: int(f(exact.value(x))), *one, formats=("f32",))
        body = f"testp.{name}.f32 %p0, %a0;\nselp.u32 %d0, 1, 0, %p0;"
        yield Program(f"testp.{name}.f32", body, one, (want,))


def _approximate() -> Iterator[Program]:
    """Yield what a GPU approximates, with the errors that the specification allows."""
    rng = np.random.default_rng(1)
    wide = np.concatenate([np.array(special("f32"), "u4"), rng.integers(0, 1 << 32, 230, dtype=np.uint32)])
    near = rng.uniform(-30, 30, 256).astype(np.float32).view(np.uint32)
    angles = rng.uniform(-math.pi, math.pi, 256).astype(np.float32).view(np.uint32)
    positive = wide & np.uint32(0x7FFFFFFF)
    cases: tuple[tuple[str, Callable[[np.ndarray], np.ndarray], np.ndarray, float, float], ...] = (
        ("ex2.approx.ftz.f32", np.exp2, near, 2.0**-22, 0),
        ("ex2.approx.f32", np.exp2, near, 2.0**-22, 0),
        ("lg2.approx.f32", np.log2, positive, 2.0**-22, 2.0**-22),
        ("lg2.approx.ftz.f32", np.log2, positive, 2.0**-22, 2.0**-22),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x), positive, 2.0**-22, 0),
        ("sqrt.approx.ftz.f32", np.sqrt, positive, 2.0**-22, 0),
        ("sin.approx.ftz.f32", np.sin, angles, 0, 2.0**-20),
        ("cos.approx.ftz.f32", np.cos, angles, 0, 2.0**-20),
        ("rcp.approx.f32", lambda x: 1 / x, wide, 2.0**-22, 0),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, wide, 2.0**-22, 0),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), positive, 2.0**-22, 0),
        ("sqrt.approx.f32", np.sqrt, positive, 2.0**-22, 0),
        ("sin.approx.f32", np.sin, angles, 0, 2.0**-20),
        ("cos.approx.f32", np.cos, angles, 0, 2.0**-20),
        ("tanh.approx.f32", np.tanh, near, 2.0**-10, 0),
    )
    for name, function, bits, relative, absolute in cases:
        with np.errstate(all="ignore"):
            x = bits.view(np.float32).astype(np.float64)
        small = np.float32(2.0**-126)
        with np.errstate(all="ignore"):
            if "ftz" in name:
                x = np.where(np.abs(x) < small, np.copysign(0, x), x)
            y = function(x).astype(np.float32)
            if "ftz" in name:
                y = np.where(np.abs(y) < small, np.copysign(np.float32(0), y), y)
        inputs = every(bits, dtype="u4")
        want = np.resize(y.astype(np.float32).view(np.uint32), len(inputs[0]))
        yield Program(name, f"{name} %d0, %a0;", inputs, (want,), False, "f32", relative=relative, absolute=absolute)
    yield from _divisions()
    yield from _small_approximate()


def _small_approximate() -> Iterator[Program]:
    """Yield the functions of 16 bits; the errors allowed are those of the specification, or two roundings."""
    for opcode, function, kind, relative in (
        ("ex2.approx.f16", np.exp2, "f16", 2.0**-9.9),
        ("ex2.approx.ftz.bf16", np.exp2, "bf16", 2.0**-7),
        ("tanh.approx.f16", np.tanh, "f16", 2.0**-10),
        ("tanh.approx.bf16", np.tanh, "bf16", 2.0**-7),
    ):
        numbers = np.random.default_rng(4).uniform(-8, 8, 128)
        rows = [(int(x < 0), exact.Fraction(float(abs(x)))) for x in numbers]
        bits = np.array([exact.write(x, kind) for x in rows], np.uint16)
        with np.errstate(all="ignore"):
            exactly = function(np.array([exact.value(exact.read(int(x), kind)) for x in bits]))
        pairs = [(int(y < 0), exact.Fraction(float(abs(y)))) for y in exactly]
        want = np.array([exact.write(y, kind) for y in pairs], np.uint16)
        least = 90 if kind == "bf16" else 80
        one = Program(opcode, f"{opcode} %d0, %a0;", (bits,), (want,), False, kind, relative=relative, least=least)
        yield one
        yield packed(one, opcode + "x2")


def _divisions() -> Iterator[Program]:
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 1 << 32, 256, dtype=np.uint32) for _ in range(2))
    # Quotients that are normal numbers, and divisors within 2**-126 to 2**126.
    exponents = ((a >> 23) & 0xFF) % 100 + 78, ((b >> 23) & 0xFF) % 100 + 78
    a, b = ((x & np.uint32(0x807FFFFF)) | (e << np.uint32(23)) for x, e in zip((a, b), exponents, strict=True))
    x, y = a.view(np.float32).astype(np.float64), b.view(np.float32).astype(np.float64)
    want = (x / y).astype(np.float32).view(np.uint32)
    for name in ("div.full.f32", "div.full.ftz.f32", "div.approx.f32", "div.approx.ftz.f32"):
        yield Program(name, f"{name} %d0, %a0, %a1;", (a, b), (want,), False, "f32", relative=2.0**-21)
    # Beyond 2**126 div.approx takes the reciprocal for 0.
    large = np.full(256, 0x7F000001, np.uint32)
    zero = ((a ^ large) & np.uint32(0x80000000),)
    name = "div.approx.f32"
    yield Program(f"{name} by large numbers", f"{name} %d0, %a0, %a1;", (a, large), zero)


def programs() -> Iterator[Program]:
    """Yield the programs of this table."""
    yield from _fp32()
    yield from _small()
    yield from _mixed()
    yield from _others()
    yield from _approximate()
