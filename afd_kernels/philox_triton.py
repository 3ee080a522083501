"""Philox4x32-10 noise for Triton kernels: the formulas of csrc/include/afd/noise_math.h.

Every multiply-add is an explicit fma and the square root is the IEEE one, so a GPU is bitwise equal
to the native core; docs/NUMERICS.md has the specification.
"""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) with u = (word + 1/2) 2^-32 in (0, 1], rounded once."""
    u = tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    # u = 2^e m with m in [2/3, 4/3), split on the bits; ln(1 + f) = f + f^2 (-1/2 + f L(f)).
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.13820701837539673, -0.15122200548648834)
    p = tl.fma(p, f, 0.14042189717292786)
    p = tl.fma(p, f, -0.1647232323884964)
    p = tl.fma(p, f, 0.2000792920589447)
    p = tl.fma(p, f, -0.2500423789024353)
    p = tl.fma(p, f, 0.3333326578140259)
    p = tl.fma(p, f, -0.5)
    p = tl.fma(p, f * f, f)
    log = tl.fma(e.to(tl.float32), 0.6931471824645996, p)
    return tl.sqrt_rn(log * -2.0)


@triton.jit
def _cos_sin(word):
    """cos and sin of int32(word) pi 2^-31; the octant is split off exactly, on the integer."""
    z = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    s = z * z
    sin = tl.fma(s, -3.659276262624189e-05, 0.0024909931235015392)
    sin = tl.fma(sin, s, -0.08074582368135452)
    sin = tl.fma(sin, s, 0.7853981852531433) * z
    cos = tl.fma(s, -0.0003189920971635729, 0.015850160270929337)
    cos = tl.fma(cos, s, -0.3084244132041931)
    cos = tl.fma(cos, s, 1.0)
    # Quadrant q = bits 30 and 31: odd q swaps the two, q = 2, 3 negates sin, q = 1, 2 negates cos.
    q = tl.add(word, 0x20000000, sanitize_overflow=False)
    swap = (q & 0x40000000) != 0
    sin_sign = q & 0x80000000
    cos_sign = tl.add(q, 0x40000000, sanitize_overflow=False) & 0x80000000
    x = tl.where(swap, sin, cos).to(tl.uint32, bitcast=True) ^ cos_sign
    y = tl.where(swap, cos, sin).to(tl.uint32, bitcast=True) ^ sin_sign
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


@triton.jit
def philox_quads(seed, quad):
    """The four 32-bit words of Philox4x32-10: key = int64 scalar seed, counter = int64 quad [Q]."""
    c0 = quad.to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32)
    c2 = c0 ^ c0
    c3 = c2
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # 64-bit products: ptxas emits one IMAD.WIDE for each, where tl.umulhi costs two.
        wide0 = c0.to(tl.uint64) * 0xD2511F53
        wide2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (wide2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = wide2.to(tl.uint32)
        c2 = (wide0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = wide0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _normals_of_quads(seed, quad):
    """The normals of elements 4 quad, 4 quad + 1, 4 quad + 2 and 4 quad + 3, each [Q]."""
    w0, w1, w2, w3 = philox_quads(seed, quad)
    r0 = _radius(w0)
    c0, s0 = _cos_sin(w1)
    r1 = _radius(w2)
    c1, s1 = _cos_sin(w3)
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def normal_tile(seed, start, BLOCK: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr):
    """Noise fp32 [BLOCK] of elements start .. start + BLOCK - 1 of the sample with this seed.

    seed: int64 scalar. start: int64 scalar, a multiple of 4 where QUADS, which then spends one
    Philox call on four elements; without it every element computes its whole quad.
    VECTOR: neighbours a thread loads at once (4 fp32 or 8 bf16). A thread that makes the noise of
    the very elements it holds needs no exchange through shared memory.
    """
    if QUADS:
        first = start >> 2
        if VECTOR == 8:
            even = first + tl.arange(0, BLOCK // 8) * 2
            a0, a1, a2, a3 = _normals_of_quads(seed, even)
            b0, b1, b2, b3 = _normals_of_quads(seed, even + 1)
            n0 = tl.join(a0, b0)
            n1 = tl.join(a1, b1)
            n2 = tl.join(a2, b2)
            n3 = tl.join(a3, b3)
        else:
            n0, n1, n2, n3 = _normals_of_quads(seed, first + tl.arange(0, BLOCK // 4))
        # [quad, pair, cos | sin] flattened is the element order.
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))
    else:
        index = start + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox_quads(seed, index >> 2)
        second = (index & 2) != 0
        radius = _radius(tl.where(second, w2, w0))
        cos, sin = _cos_sin(tl.where(second, w3, w1))
        return radius * tl.where((index & 1) != 0, sin, cos)
