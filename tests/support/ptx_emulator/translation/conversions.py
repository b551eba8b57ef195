"""Translates comparisons, selections, moves and conversions."""

import numpy as np

from ptx_emulator.parse import Pair, Reg, Vector
from ptx_emulator.translation.operands import (
    COMPARISONS,
    INTEGERS,
    NUMPY_OF,
    SIZE_OF,
    UNSIGNED_OF,
    Operands,
)


class Conversions(Operands):
    """A part of `writer.BlockWriter`."""

    def _setp(self, i):
        parts = i.parts
        compare, kind = parts[1], parts[-1]
        if kind in ("f16x2", "bf16x2"):
            self._setp_packed(i, compare, kind.removesuffix("x2"))
            return
        if kind in ("f16", "bf16"):
            unpack = "o.f16_to_f32" if kind == "f16" else "o.bf16_to_f32"
            a, b = (f"{unpack}(X.full({self.read(x, 'u2')}, u2))" for x in i.args[1:3])
        else:
            a, b = (self.read(x, NUMPY_OF[kind]) for x in i.args[1:3])
        floats = kind not in INTEGERS
        if compare in COMPARISONS:
            expression = f"({a} {COMPARISONS[compare]} {b})"
            if floats and compare == "ne":  # ordered
                expression = f"({expression} & ~(np.isnan({a}) | np.isnan({b})))"
        elif compare == "num":
            expression = f"~(np.isnan({a}) | np.isnan({b}))"
        elif compare == "nan":
            expression = f"(np.isnan({a}) | np.isnan({b}))"
        else:  # unordered: true where either is NaN
            base = COMPARISONS[compare.removesuffix("u")]
            expression = f"(({a} {base} {b}) | np.isnan({a}) | np.isnan({b}))"
        combine = [p for p in parts[2:-1] if p in ("and", "or", "xor")]
        if combine:
            symbol = {"and": "&", "or": "|", "xor": "^"}[combine[0]]
            expression = f"({expression} {symbol} {self.read(i.args[3], '?')})"
        destination = i.args[0]
        if isinstance(destination, Pair):
            if combine:
                raise NotImplementedError("setp with two results and a predicate")
            name = self.temporary()
            self.lines.append(f"{name} = {expression}")
            mask = self.mask(i)
            self.write_register(destination.first, name, "?", mask)
            self.write_register(destination.second, f"~{name}", "?", mask)
            return
        self.simple(i, expression, "?")

    def _setp_packed(self, i, compare, kind):
        """Compares each half of a word; the result of the lower half comes first."""
        destination = i.args[0]
        if compare not in COMPARISONS or compare == "ne" or len(i.args) > 3:
            raise NotImplementedError(f"setp.{compare} of two halves")
        unpack = "o.f16_to_f32" if kind == "f16" else "o.bf16_to_f32"
        words = [self.temporary() for _ in i.args[1:3]]
        for word, source in zip(words, i.args[1:3], strict=True):
            self.lines.append(f"{word} = X.full({self.read(source, 'u4')}, u4)")
        mask = self.mask(i)
        for register, shift in ((destination.first, 0), (destination.second, 16)):
            a, b = (f"{unpack}(({word} >> u4({shift})).astype(u2))" for word in words)
            self.write_register(register, f"({a} {COMPARISONS[compare]} {b})", "?", mask)

    def _selp(self, i):
        dtype = NUMPY_OF[i.parts[-1]]
        a, b = (self.read(x, dtype) for x in i.args[1:3])
        self.simple(i, f"where({self.read(i.args[3], '?')}, {a}, {b})", dtype)

    def _mov(self, i):
        kind = i.parts[-1]
        destination, source = i.args
        mask = self.mask(i)
        if isinstance(destination, Vector):
            count = len(destination.items)
            total = SIZE_OF[NUMPY_OF[kind]]
            wide, narrow = UNSIGNED_OF[total], UNSIGNED_OF[total // count]
            value = f"X.full({self.read(source, wide)}, {wide})"
            for k, item in enumerate(destination.items):
                if item is not None:
                    shift = 8 * (total // count) * k
                    self.write_register(
                        item, f"({value} >> {wide}({shift})).astype({narrow})", narrow, mask
                    )
            return
        if isinstance(source, Vector):
            count = len(source.items)
            total = SIZE_OF[NUMPY_OF[kind]]
            wide, narrow = UNSIGNED_OF[total], UNSIGNED_OF[total // count]
            terms = [
                f"(X.full({self.read(x, narrow)}, {narrow}).astype({wide})"
                f" << {wide}({8 * total // count * k}))"
                for k, x in enumerate(source.items)
            ]
            self.write_register(destination, " | ".join(terms), wide, mask)
            return
        dtype = NUMPY_OF[kind]
        if isinstance(source, Reg):
            self.write_register(destination, self.read(source, dtype), dtype, mask)
        else:
            value = self.read(source, dtype)
            self.write_register(
                destination, f"X.full({value}, {'b1' if dtype == '?' else dtype})", dtype, mask
            )

    def _cvta(self, i):
        dtype = NUMPY_OF[i.parts[-1]]
        self.simple(i, self.read(i.args[1], dtype), dtype)

    def _cvt(self, i):
        parts = i.parts
        to, source_kind = parts[-2], parts[-1]
        args = i.args
        if to in ("f16x2", "bf16x2") and source_kind == "f32":
            convert = "o.f32_to_f16" if to == "f16x2" else "o.f32_to_bf16"
            hi, lo = (f"X.full({self.read(x, 'f4')}, f4)" for x in args[1:3])
            if "relu" in parts:
                hi, lo = f"np.maximum({hi}, f4(0))", f"np.maximum({lo}, f4(0))"
            if "rz" in parts:
                raise NotImplementedError("towards zero")
            self.simple(i, f"o.pack({convert}({lo}), {convert}({hi}))", "u4")
            return
        if to == "f16x2" and source_kind == "e4m3x2":
            self.simple(i, f"o.e4m3x2_to_f16x2({self.read(args[1], 'u2')})", "u4")
            return
        if to == "e4m3x2" and source_kind == "f32":
            hi, lo = (f"X.full({self.read(x, 'f4')}, f4)" for x in args[1:3])
            self.simple(i, f"o.f32_to_e4m3({lo}) | (o.f32_to_e4m3({hi}) << u2(8))", "u2")
            return
        floats = {"f16", "bf16", "f32", "f64"}
        if source_kind in floats:
            if source_kind == "f16":
                value = f"o.f16_to_f32({self.read(args[1], 'u2')})"
            elif source_kind == "bf16":
                value = f"o.bf16_to_f32({self.read(args[1], 'u2')})"
            else:
                value = self.read(args[1], NUMPY_OF[source_kind])
            if to in floats:
                rounding = [p for p in parts if p in ("rni", "rzi", "rmi", "rpi")]
                if rounding:
                    function = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
                    value = f"np.{function[rounding[0]]}({value})"
                if any(p in parts for p in ("rz", "rm", "rp", "rna")) and to != "f64":
                    raise NotImplementedError("rounding")
                if to == "f16":
                    self.simple(i, f"o.f32_to_f16({value})", "u2")
                elif to == "bf16":
                    self.simple(i, f"o.f32_to_bf16({value})", "u2")
                elif to == "f32":
                    value = f"({value}).astype(f4)" if source_kind == "f64" else value
                    if "sat" in parts:
                        value = f"np.clip({value}, f4(0), f4(1))"
                    self.simple(i, value, "f4")
                else:
                    self.simple(i, f"({value}).astype(f8)", "f8")
                return
            rounding = next(p for p in parts if p in ("rni", "rzi", "rmi", "rpi"))
            dtype = NUMPY_OF[to]
            self.simple(i, f"o.to_integer({value}, {rounding!r}, {dtype})", dtype)
            return
        value = self.read(args[1], NUMPY_OF[source_kind])
        if to in floats:
            if to == "f16":
                self.simple(i, f"o.f32_to_f16(({value}).astype(f4))", "u2")
            elif to == "bf16":
                self.simple(i, f"o.f32_to_bf16(({value}).astype(f4))", "u2")
            else:
                self.simple(i, f"({value}).astype({NUMPY_OF[to]})", NUMPY_OF[to])
            return
        dtype = NUMPY_OF[to]
        if "sat" in parts:
            info = np.iinfo(dtype)
            value = f"np.clip({value}, {info.min}, {info.max})"
        self.simple(i, f"({value}).astype({dtype})", dtype)
