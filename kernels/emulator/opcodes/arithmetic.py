"""Whole numbers, floating point, comparisons and moves, each thread for itself."""

from __future__ import annotations

import numpy as np

from ..numbers import BINARY, COMPARE, FILES, TYPES, flush, fma
from ..ptx import Imm, Sym, Vec, number
from . import opcode


@opcode("add ...", "sub ...")
def compile_arith(cta, ins, p, o):
    t = p[-1]
    uf = BINARY[p[0]]
    a, b = (cta.src(x, t) for x in o[1:3])
    if "ftz" in p:
        return cta.put(o[0], t, lambda: flush(uf(flush(a), flush(b))))
    return cta.ufunc(uf, o[0], t, a, b)


@opcode("and ...", "or ...", "xor ...")
def compile_logic(cta, ins, p, o):
    t = p[-1]
    return cta.ufunc(BINARY[p[0]], o[0], t, cta.src(o[1], t), cta.src(o[2], t))


@opcode("not ...")
def compile_not(cta, ins, p, o):
    return cta.ufunc(np.logical_not if p[-1] == "pred" else np.invert, o[0], p[-1], cta.src(o[1], p[-1]))


@opcode("neg ...")
def compile_neg(cta, ins, p, o):
    return cta.ufunc(np.negative, o[0], p[-1], cta.src(o[1], p[-1]))


@opcode("abs ...")
def compile_abs(cta, ins, p, o):
    a = cta.src(o[1], p[-1])
    if "ftz" in p:
        return cta.put(o[0], p[-1], lambda: flush(np.abs(a)))
    return cta.ufunc(np.abs, o[0], p[-1], a)


@opcode("mul ...")
def compile_mul(cta, ins, p, o):
    t = p[-1]
    a, b = cta.src(o[1], t), cta.src(o[2], t)
    if "wide" in p:
        w = t[0] + str(2 * int(t[1:]))
        wide = TYPES[w]
        return cta.put(o[0], w, lambda: a.astype(wide) * b.astype(wide))
    if "hi" in p:
        wide = np.int64 if t == "s32" else np.uint64
        if t[1:] != "32":
            raise NotImplementedError("mul.hi of 64 bits")
        return cta.put(o[0], t, lambda: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(TYPES[t]))
    if "ftz" in p:
        return cta.put(o[0], t, lambda: flush(flush(a) * flush(b)))
    return cta.ufunc(np.multiply, o[0], t, a, b)


@opcode("mad ...")
def compile_mad(cta, ins, p, o):
    t = p[-1]
    a, b = cta.src(o[1], t), cta.src(o[2], t)
    if "wide" in p:
        w = t[0] + str(2 * int(t[1:]))
        wide, c = TYPES[w], cta.src(o[3], w)
        return cta.put(o[0], w, lambda: a.astype(wide) * b.astype(wide) + c)
    c = cta.src(o[3], t)
    return cta.put(o[0], t, lambda: a * b + c)


@opcode("fma ...")
def compile_fma(cta, ins, p, o):
    if p[-1] != "f32":
        raise NotImplementedError(ins.opcode)
    a, b, c = (cta.src(x, "f32") for x in o[1:4])
    if "ftz" in p:
        return cta.put(o[0], "f32", lambda: flush(fma(flush(a), flush(b), flush(c))))
    return cta.put(o[0], "f32", lambda: fma(a, b, c))


@opcode("div ...")
def compile_div(cta, ins, p, o):
    t = p[-1]
    a, b = cta.src(o[1], t), cta.src(o[2], t)
    if t == "f32":
        return cta.put(o[0], t, lambda: a / b)

    def f():  # towards zero; by zero all ones
        zero = b == 0
        d = np.where(zero, TYPES[t](1), b)
        q = a // d
        if t[0] == "s":
            q = q + ((q < 0) & (q * d != a)).astype(TYPES[t])
        return np.where(zero, np.array(-1).astype(TYPES[t]), q)

    return cta.put(o[0], t, f)


@opcode("rem ...")
def compile_rem(cta, ins, p, o):
    t = p[-1]
    a, b = cta.src(o[1], t), cta.src(o[2], t)
    return cta.put(o[0], t, lambda: np.fmod(a, np.where(b == 0, TYPES[t](1), b)))


@opcode("max ...", "min ...")
def compile_max(cta, ins, p, o):
    t = p[-1]
    uf = {"max": np.fmax, "min": np.fmin} if t[0] == "f" else {"max": np.maximum, "min": np.minimum}
    if "NaN" in p:
        uf = {"max": np.maximum, "min": np.minimum}
    uf = uf[p[0]]
    a, b = cta.src(o[1], t), cta.src(o[2], t)
    if "relu" in p:
        return cta.put(o[0], t, lambda: np.maximum(uf(a, b), TYPES[t](0)))
    return cta.ufunc(uf, o[0], t, a, b)


@opcode("shl ...", "shr ...")
def compile_shl(cta, ins, p, o):
    t = p[-1]
    bits, dt = int(t[1:]), TYPES[t]
    a, n = cta.src(o[1], t), cta.src(o[2], "u32")
    uf = np.left_shift if p[0] == "shl" else np.right_shift
    if n.ndim == 0 and int(n) < bits:
        return cta.ufunc(uf, o[0], t, a, n.astype(dt))
    if p[0] == "shr" and t[0] == "s":
        return cta.put(o[0], t, lambda: uf(a, np.minimum(n, bits - 1).astype(dt)))
    return cta.put(o[0], t, lambda: np.where(n < bits, uf(a, np.minimum(n, bits - 1).astype(dt)), dt(0)))


@opcode("bfe ...")
def compile_bfe(cta, ins, p, o):
    t = p[-1]
    bits, dt = int(t[1:]), TYPES[t]
    if not (isinstance(o[2], Imm) and isinstance(o[3], Imm)):
        raise NotImplementedError("bfe by registers")
    a, pos, size = cta.src(o[1], t), number(o[2].text), number(o[3].text)
    if pos + size > bits:
        size = bits - pos
    up = dt(bits - pos - size)
    down = dt(bits - size)
    return cta.put(o[0], t, lambda: np.right_shift(np.left_shift(a, up), down))


@opcode("mov ...")
def compile_mov(cta, ins, p, o):
    t = p[-1]
    if isinstance(o[0], Vec):
        n = len(o[0].items)
        part = {np.uint16: "u16", np.uint32: "u32"}[FILES[int(t[1:]) // n]]
        outs = [None if isinstance(x, Sym) else cta.row(x, part) for x in o[0].items]
        a = cta.src(o[1], t)

        def f(m):
            parts = np.ascontiguousarray(a).view(TYPES[part]).reshape(-1, n).copy()
            for k, out in enumerate(outs):
                if out is not None:
                    np.copyto(out, parts[:, k], where=True if m is None else m)

        return f
    if isinstance(o[1], Vec):
        n = len(o[1].items)
        part = "u" + str(int(t[1:]) // n)
        sources = [cta.src(x, part) for x in o[1].items]
        T = cta.T
        return cta.put(
            o[0], t, lambda: np.stack([np.broadcast_to(s, T) for s in sources], 1).reshape(-1).view(TYPES[t])
        )
    a, out = cta.src(o[1], t), cta.row(o[0], t)
    return lambda m: np.copyto(out, a) if m is None else np.copyto(out, a, where=m)


@opcode("selp ...")
def compile_selp(cta, ins, p, o):
    t = p[-1]
    a, b, c = cta.src(o[1], t), cta.src(o[2], t), cta.row(o[3])
    return cta.put(o[0], t, lambda: np.where(c, a, b))


@opcode("setp ...")
def compile_setp(cta, ins, p, o):
    t = p[-1]
    cmp, combine = p[1], next((x for x in p if x in ("and", "or", "xor")), None)
    ftz = "ftz" in p
    out = o[0]
    rest = list(o[1:])
    a, b = cta.src(rest[0], t), cta.src(rest[1], t)
    unordered = t[0] == "f" and cmp[-1] == "u" and len(cmp) == 3
    base = cmp[:2] if unordered else cmp
    if t[0] == "f" and cmp == "ne":  # ordered: NaN is not different
        test = lambda a, b: (a < b) | (a > b)  # noqa: E731
    elif cmp == "nan":
        test = lambda a, b: (a != a) | (b != b)  # noqa: E731
    elif cmp == "num":
        test = lambda a, b: (a == a) & (b == b)  # noqa: E731
    else:
        test = COMPARE[base]
    if not (ftz or unordered or combine) and test in COMPARE.values():
        return cta.ufunc(test, out, "pred", a, b)

    def f():
        x, y = (flush(a), flush(b)) if ftz else (a, b)
        r = test(x, y)
        if unordered:
            r = r | (x != x) | (y != y)
        return BINARY[combine](r, cta.row(rest[2]) ^ rest[2].negated) if combine else r

    return cta.put(out, None, f)


@opcode("popc ...")
def compile_popc(cta, ins, p, o):
    a = cta.src(o[1], "u" + p[-1][1:])
    return cta.put(o[0], "u32", lambda: np.bitwise_count(a).astype(np.uint32))


@opcode("brev ...")
def compile_brev(cta, ins, p, o):
    a = cta.src(o[1], "u32")

    def value():
        x = np.ascontiguousarray(np.broadcast_to(a, cta.T))
        bits = np.unpackbits(x.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").reshape(-1).view(np.uint32)

    return cta.put(o[0], "u32", value)


@opcode("clz ...")
def compile_clz(cta, ins, p, o):
    a = cta.src(o[1], "u32")
    return cta.put(
        o[0],
        "u32",
        lambda: np.where(a == 0, 32, 31 - np.floor(np.log2(np.maximum(a, 1).astype(np.float64)))).astype(np.uint32),
    )


@opcode("ex2 ...")
def compile_ex2(cta, ins, p, o):
    a = cta.src(o[1], "f32")
    if "ftz" in p:
        return cta.put(o[0], "f32", lambda: flush(np.exp2(flush(a))))
    return cta.put(o[0], "f32", lambda: np.exp2(a))


def unary(cta, fn):
    def op(ins, p, o):
        a = cta.src(o[1], p[-1])
        if "ftz" in p:
            return cta.put(o[0], p[-1], lambda: flush(fn(flush(a))))
        return cta.put(o[0], p[-1], lambda: fn(a))

    return op


@opcode("lg2 ...")
def compile_lg2(cta, ins, p, o):
    return unary(cta, np.log2)(ins, p, o)


@opcode("rcp ...")
def compile_rcp(cta, ins, p, o):
    return unary(cta, lambda x: np.float32(1) / x)(ins, p, o)


@opcode("sqrt ...")
def compile_sqrt(cta, ins, p, o):
    return unary(cta, np.sqrt)(ins, p, o)


@opcode("rsqrt ...")
def compile_rsqrt(cta, ins, p, o):
    return unary(cta, lambda x: np.float32(1) / np.sqrt(x))(ins, p, o)


@opcode("tanh ...")
def compile_tanh(cta, ins, p, o):
    return unary(cta, np.tanh)(ins, p, o)


@opcode("prmt ...")
def compile_prmt(cta, ins, p, o):
    a, b, c = (cta.src(x, "u32") for x in o[1:4])
    T = cta.T

    def f():
        both = np.broadcast_to(a, T).astype(np.uint64) | (np.broadcast_to(b, T).astype(np.uint64) << np.uint64(32))
        out = np.zeros(T, np.uint32)
        for k in range(4):
            s = (np.broadcast_to(c, T) >> np.uint32(4 * k)) & np.uint32(15)
            byte = (both >> ((s & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            byte = np.where(s & 8, np.where(byte & np.uint64(128), 255, 0), byte)
            out |= byte.astype(np.uint32) << np.uint32(8 * k)
        return out

    return cta.put(o[0], "u32", f)


@opcode("cvta ...")
def compile_cvta(cta, ins, p, o):
    return compile_mov(cta, ins, ["mov", "b64"], o)


@opcode("setmaxnreg ...")
def compile_setmaxnreg(cta, ins, p, o):
    return lambda m: None
