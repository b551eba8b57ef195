"""Computes PTX instructions on numpy arrays with one element per thread.

Registers are arrays of bits: uint16, uint32 and uint64; predicates are bool arrays.
"""

import numpy as np

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I1, I2, I4, I8 = np.int8, np.int16, np.int32, np.int64
F2, F4, F8 = np.float16, np.float32, np.float64


def bf16_to_f32(bits):
    return (bits.astype(U4) << U4(16)).view(F4)


def f32_to_bf16(x):
    """Rounds to nearest, ties to even; NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(x, dtype=F4).view(U4)
    rounded = ((bits + U4(0x7FFF) + ((bits >> U4(16)) & U4(1))) >> U4(16)).astype(U2)
    return np.where(np.isnan(x), U2(0x7FFF), rounded)


def f32_to_f16(x):
    bits = x.astype(F2).view(U2)
    return np.where(np.isnan(x), U2(0x7FFF), bits)


def low(x):
    return (x & U4(0xFFFF)).astype(U2)


def high(x):
    return (x >> U4(16)).astype(U2)


def pack(lo, hi):
    return lo.astype(U4) | (hi.astype(U4) << U4(16))


def flush(x):
    """Replaces subnormal float32 by zero of the same sign."""
    return np.where(np.abs(x) < F4(1.1754944e-38), np.copysign(F4(0), x), x)


def fma32(a, b, c):
    return (np.multiply(a, b, dtype=F8) + c).astype(F4)


def halves(function, unpack, repack, *args):
    """Applies an operation to each 16-bit half of packed registers."""
    lo = repack(function(*(unpack(low(x)) for x in args)))
    hi = repack(function(*(unpack(high(x)) for x in args)))
    return pack(lo, hi)


def f16_to_f32(bits):
    return bits.view(F2).astype(F4)


def maximum_nan(a, b):
    return np.maximum(a, b)


def shift_left(x, amount, bits):
    amount = np.minimum(amount, U4(bits))
    wide = np.where(amount >= bits, x.dtype.type(0), x << (amount % U4(bits)).astype(x.dtype))
    return wide


def shift_right(x, amount, bits):
    amount = np.minimum(amount, U4(bits - 1)) if x.dtype.kind == "i" else amount
    clipped = (amount % U4(bits)).astype(x.dtype)
    shifted = x >> clipped
    if x.dtype.kind == "i":
        return shifted
    return np.where(amount >= bits, x.dtype.type(0), shifted)


def divide(a, b):
    """Division that truncates; a division by zero gives all ones, as on hardware."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient = a // safe
    else:
        quotient = a // safe
        remainder = a - quotient * safe
        quotient = quotient + ((remainder != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(0) - a.dtype.type(1), quotient)


def remainder(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, a - divide(a, safe) * safe)


def extract(x, position, length, signed, bits):
    position = np.minimum(position & U4(255), U4(bits))
    length = np.minimum(length & U4(255), U4(bits))
    wide = x.astype(np.uint64)
    if signed:
        wide = (x.view(I4 if bits == 32 else I8)).astype(I8).view(np.uint64)
    if bits == 64:
        raise NotImplementedError("bfe of 64 bits")
    field = wide >> position.astype(np.uint64)
    mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    value = field & mask
    if signed:
        top = np.minimum(position + length - U4(1), U4(bits - 1)).astype(np.uint64)
        sign = np.where(length == 0, 0, (wide >> top) & np.uint64(1)).astype(bool)
        value = np.where(sign, value | ~mask, value)
    return value.astype(U4)


def insert(a, b, position, length):
    mask = (
        ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << position.astype(np.uint64)
    ).astype(U4)
    return (b & ~mask) | ((shift_left(a, position, 32)) & mask)


def permute_bytes(a, b, selector):
    shape = np.broadcast_shapes(a.shape, b.shape, np.shape(selector))
    source = np.empty((8, *shape), U4)
    for i in range(4):
        source[i] = (a >> U4(8 * i)) & U4(255)
        source[4 + i] = (b >> U4(8 * i)) & U4(255)
    selector = np.broadcast_to(np.asarray(selector, U4), shape)
    result = np.zeros(shape, U4)
    for i in range(4):
        nibble = (selector >> U4(4 * i)) & U4(15)
        byte = np.take_along_axis(source, (nibble & U4(7)).astype(np.intp)[None], 0)[0]
        byte = np.where(nibble & U4(8), np.where(byte & U4(128), U4(255), U4(0)), byte)
        result |= byte << U4(8 * i)
    return result


def lop3(a, b, c, table):
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            x = a if i & 4 else ~a
            y = b if i & 2 else ~b
            z = c if i & 1 else ~c
            result |= x & y & z
    return result


def funnel(a, b, c, left, wrap):
    amount = c & U4(31) if wrap else np.minimum(c, U4(32))
    joined = (b.astype(np.uint64) << np.uint64(32)) | a
    if left:
        return ((joined << amount.astype(np.uint64)) >> np.uint64(32)).astype(U4)
    return (joined >> amount.astype(np.uint64)).astype(U4)


def multiply_high(a, b):
    size = a.dtype.itemsize
    if size == 8:
        high = [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
        return np.array(high, dtype=a.dtype)
    wide = {2: (U4, I4), 4: (np.uint64, I8)}[size][a.dtype.kind == "i"]
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)


def count_bits(x):
    return np.bitwise_count(x).astype(U4)


def leading_zeros(x):
    exponent = np.frexp(x.astype(F8))[1]
    return (8 * x.dtype.itemsize - np.where(x == 0, 0, exponent)).astype(U4)


def reverse_bits(x):
    result = np.zeros_like(x)
    for i in range(32):
        result |= ((x >> U4(i)) & U4(1)) << U4(31 - i)
    return result


def to_integer(x, rounding, dtype):
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](
        x.astype(F8)
    )
    info = np.iinfo(dtype)
    largest = np.nextafter(F8(info.max) + 1, 0) if info.bits == 64 else F8(info.max)
    clipped = np.clip(np.where(np.isnan(rounded), 0, rounded), F8(info.min), largest)
    return clipped.astype(dtype)


def _float8_table():
    codes = np.arange(256)
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = (1 + fraction / 8) * np.exp2(exponent - 7.0)
    value = sign * np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    value[(codes & 127) == 127] = np.nan
    return value.astype(F2)


E4M3 = _float8_table().view(U2)


def e4m3x2_to_f16x2(bits):
    return pack(E4M3[bits & U2(255)], E4M3[bits >> U2(8)])


_E4M3_VALUES = _float8_table().astype(F4)[:127]


def f32_to_e4m3(x):
    """Rounds to nearest, ties to even, and saturates."""
    magnitude = np.minimum(np.abs(x), F4(448)).astype(F8)
    above = np.clip(np.searchsorted(_E4M3_VALUES, magnitude, side="left"), 0, 126)
    below = np.maximum(above - 1, 0)
    d_above = _E4M3_VALUES[above] - magnitude
    d_below = magnitude - _E4M3_VALUES[below]
    take_below = (d_below < d_above) | ((d_below == d_above) & (below % 2 == 0))
    code = np.where(take_below, below, above).astype(U2)
    code = np.where(np.isnan(x), U2(127), code)
    return code | np.where(np.signbit(x), U2(128), U2(0))
