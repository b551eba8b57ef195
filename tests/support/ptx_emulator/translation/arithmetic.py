"""Translates arithmetic on integers, floats and bits."""

import numpy as np

from ptx_emulator.approximation import DIV, EX2, LG2, RSQRT
from ptx_emulator.parse import Imm, Instruction
from ptx_emulator.translation.operands import INTEGERS, NUMPY_OF, SIZE_OF, Operands


class Arithmetic(Operands):
    """A part of `writer.BlockWriter`."""

    def _float(self, i: Instruction, names: int, expression32: str, kind: str) -> None:
        """Translates an operation on floats of any width; {a}, {b}, {c} are the operands."""
        ftz = "ftz" in i.parts
        letters = "abc"[:names]
        sources = i.args[1 : 1 + names]
        if kind in ("f32", "f64"):
            dtype = NUMPY_OF[kind]
            values = {x: self.read(a, dtype) for x, a in zip(letters, sources, strict=True)}
            if ftz and kind == "f32":
                values = {x: f"o.flush({v})" for x, v in values.items()}
            expression = expression32.format(**values)
            if kind == "f64":
                expression = expression.replace("o.fma32", "o.fma64")
            if ftz and kind == "f32":
                expression = f"o.flush({expression})"
            if "sat" in i.parts:
                expression = f"np.clip({expression}, f4(0), f4(1))"
            self.simple(i, expression, dtype)
            return
        unpack, repack = {
            "f16": ("o.f16_to_f32", "o.f32_to_f16"),
            "bf16": ("o.bf16_to_f32", "o.f32_to_bf16"),
        }[kind.removesuffix("x2")]
        # The sum of a product is exact in float64, then rounded to float32 and to 16 bits.
        function = f"lambda {', '.join(letters)}: {expression32.format(a='a', b='b', c='c')}"
        if kind.endswith("x2"):
            values = ", ".join(f"X.full({self.read(a, 'u4')}, u4)" for a in sources)
            self.simple(i, f"o.halves({function}, {unpack}, {repack}, {values})", "u4")
        else:
            values = ", ".join(f"{unpack}(X.full({self.read(a, 'u2')}, u2))" for a in sources)
            self.simple(i, f"{repack}(({function})({values}))", "u2")

    def _arithmetic(self, i: Instruction, symbol: str) -> None:
        kind = i.parts[-1]
        if kind in INTEGERS:
            dtype = NUMPY_OF[kind].replace("i", "u")
            a, b = (self.read(x, dtype) for x in i.args[1:3])
            self.simple(i, f"{a} {symbol} {b}", dtype)
        else:
            self._float(i, 2, f"{{a}} {symbol} {{b}}", kind)

    def _add(self, i):
        self._arithmetic(i, "+")

    def _sub(self, i):
        self._arithmetic(i, "-")

    def _mul(self, i):
        kind = i.parts[-1]
        if kind not in INTEGERS:
            self._float(i, 2, "{a} * {b}", kind)
            return
        dtype = NUMPY_OF[kind]
        a, b = (self.read(x, dtype) for x in i.args[1:3])
        self.simple(i, *self.product(i, a, b, dtype))

    def product(self, i, a, b, dtype) -> tuple[str, str]:
        if "wide" in i.parts:
            wide = dtype[0] + str(2 * SIZE_OF[dtype])
            return f"{self.widen(a, wide)} * {self.widen(b, wide)}", wide
        if "hi" in i.parts:
            return f"o.multiply_high({a}, {b})", dtype
        return f"{a} * {b}", dtype

    @staticmethod
    def widen(expression: str, dtype: str) -> str:
        return f"({expression}).astype({dtype})"

    def _mad(self, i):
        kind = i.parts[-1]
        if kind not in INTEGERS:
            self._fma(i)
            return
        dtype = NUMPY_OF[kind]
        a, b = (self.read(x, dtype) for x in i.args[1:3])
        expression, result = self.product(i, a, b, dtype)
        self.simple(i, f"{expression} + {self.read(i.args[3], result)}", result)

    def _fma(self, i):
        self._float(i, 3, "o.fma32({a}, {b}, {c})", i.parts[-1])

    def _div(self, i):
        kind = i.parts[-1]
        if kind in INTEGERS:
            dtype = NUMPY_OF[kind]
            a, b = (f"X.full({self.read(x, dtype)}, {dtype})" for x in i.args[1:3])
            self.simple(i, f"o.divide({a}, {b})", dtype)
        elif "full" in i.parts or "approx" in i.parts:
            self._float(i, 2, f"X.approximate({{a}} / {{b}}, {DIV})", kind)
        else:
            self._float(i, 2, "{a} / {b}", kind)

    def _rem(self, i):
        dtype = NUMPY_OF[i.parts[-1]]
        a, b = (f"X.full({self.read(x, dtype)}, {dtype})" for x in i.args[1:3])
        self.simple(i, f"o.remainder({a}, {b})", dtype)

    def _extreme(self, i, integer: str, number: str, nan: str) -> None:
        kind = i.parts[-1]
        if kind in INTEGERS:
            dtype = NUMPY_OF[kind]
            a, b = (self.read(x, dtype) for x in i.args[1:3])
            expression = f"np.{integer}({a}, {b})"
            if "relu" in i.parts:
                expression = f"np.maximum({expression}, {dtype}(0))"
            self.simple(i, expression, dtype)
        else:
            self._float(i, 2, f"np.{nan if 'NaN' in i.parts else number}({{a}}, {{b}})", kind)

    def _max(self, i):
        self._extreme(i, "maximum", "fmax", "maximum")

    def _min(self, i):
        self._extreme(i, "minimum", "fmin", "minimum")

    def _bitwise(self, i, symbol):
        dtype = NUMPY_OF[i.parts[-1]]
        a, b = (self.read(x, dtype) for x in i.args[1:3])
        self.simple(i, f"{a} {symbol} {b}", dtype)

    def _and(self, i):
        self._bitwise(i, "&")

    def _or(self, i):
        self._bitwise(i, "|")

    def _xor(self, i):
        self._bitwise(i, "^")

    def _not(self, i):
        dtype = NUMPY_OF[i.parts[-1]]
        self.simple(i, f"~{self.read(i.args[1], dtype)}", dtype)

    def _neg(self, i):
        kind = i.parts[-1]
        if kind in INTEGERS:
            dtype = NUMPY_OF[kind]
            self.simple(i, f"{dtype}(0) - {self.read(i.args[1], dtype)}", dtype)
        else:
            self.sign(i, kind, "^", 0x8000)

    def _abs(self, i):
        kind = i.parts[-1]
        if kind in INTEGERS:
            self.simple(i, f"np.abs({self.read(i.args[1], NUMPY_OF[kind])})", NUMPY_OF[kind])
        else:
            self.sign(i, kind, "&", 0x7FFF)

    def sign(self, i, kind, symbol, half):
        dtype = {"f64": "u8", "f32": "u4", "f16x2": "u4", "bf16x2": "u4"}.get(kind, "u2")
        ones = half == 0x7FFF
        bits = {
            "u8": 0x7FFFFFFFFFFFFFFF if ones else 1 << 63,
            "u4": half << 16 | (0xFFFF if ones else 0),
            "u2": half,
        }[dtype]
        if kind.endswith("x2"):
            bits = half << 16 | half
        value = self.constant(np.dtype(dtype).type(bits))
        self.simple(i, f"{self.read(i.args[1], dtype)} {symbol} {value}", dtype)

    def _shl(self, i):
        self.shift(i, "<<", "left", NUMPY_OF[i.parts[-1]])

    def _shr(self, i):
        self.shift(i, ">>", "right", NUMPY_OF[i.parts[-1]])

    def shift(self, i, symbol, name, dtype):
        bits = 8 * SIZE_OF[dtype]
        a, amount = self.read(i.args[1], dtype), i.args[2]
        if isinstance(amount, Imm) and amount.value < bits:
            self.simple(i, f"{a} {symbol} {dtype}({amount.value})", dtype)
        else:
            a = f"X.full({a}, {dtype})"
            b = f"X.full({self.read(amount, 'u4')}, u4)"
            self.simple(i, f"o.shift_{name}({a}, {b}, {bits})", dtype)

    def _shf(self, i):
        a, b, c = (f"X.full({self.read(x, 'u4')}, u4)" for x in i.args[1:4])
        self.simple(i, f"o.funnel({a}, {b}, {c}, {'l' in i.parts}, {'wrap' in i.parts})", "u4")

    def _bfe(self, i):
        kind = i.parts[-1]
        a = f"X.full({self.read(i.args[1], 'u4')}, u4)"
        b, c = (f"X.full({self.read(x, 'u4')}, u4)" for x in i.args[2:4])
        if all(isinstance(x, Imm) for x in i.args[2:4]):
            position, length = i.args[2].value, i.args[3].value
            if length > 0 and position + length <= 32:
                if kind == "u32":
                    mask = (1 << length) - 1
                    self.simple(i, f"({a} >> u4({position})) & u4({mask})", "u4")
                else:
                    left = 32 - position - length
                    value = f"(({a} << u4({left})).view(i4) >> i4({32 - length})).view(u4)"
                    self.simple(i, value, "u4")
                return
        self.simple(i, f"o.extract({a}, {b}, {c}, {kind == 's32'}, 32)", "u4")

    def _bfi(self, i):
        a, b, c, d = (f"X.full({self.read(x, 'u4')}, u4)" for x in i.args[1:5])
        self.simple(i, f"o.insert({a}, {b}, {c}, {d})", "u4")

    def _prmt(self, i):
        if len(i.parts) > 2:
            raise NotImplementedError("prmt modes")
        a, b = (f"X.full({self.read(x, 'u4')}, u4)" for x in i.args[1:3])
        self.simple(i, f"o.permute_bytes({a}, {b}, {self.read(i.args[3], 'u4')})", "u4")

    def _lop3(self, i):
        a, b, c = (f"X.full({self.read(x, 'u4')}, u4)" for x in i.args[1:4])
        self.simple(i, f"o.lop3({a}, {b}, {c}, {i.args[4].value})", "u4")

    def _popc(self, i):
        self.simple(i, f"o.count_bits({self.read(i.args[1], NUMPY_OF[i.parts[-1]])})", "u4")

    def _clz(self, i):
        self.simple(i, f"o.leading_zeros({self.read(i.args[1], NUMPY_OF[i.parts[-1]])})", "u4")

    def _brev(self, i):
        self.simple(i, f"o.reverse_bits({self.read(i.args[1], 'u4')})", "u4")

    def unary(self, i, expression, error):
        kind = i.parts[-1]
        if "approx" in i.parts:
            expression = f"X.approximate({expression}, {error})"
        self._float(i, 1, expression, kind)

    def _ex2(self, i):
        self.unary(i, "np.exp2({a})", EX2)

    def _lg2(self, i):
        self.unary(i, "np.log2({a})", LG2)

    def _rcp(self, i):
        self.unary(i, "(f4(1) / {a})", 2.0**-23)

    def _sqrt(self, i):
        self.unary(i, "np.sqrt({a})", 2.0**-23)

    def _rsqrt(self, i):
        self.unary(i, "(1.0 / np.sqrt(({a}).astype(f8))).astype(f4)", RSQRT)

    def _sin(self, i):
        self.unary(i, "np.sin({a})", 0.0)

    def _cos(self, i):
        self.unary(i, "np.cos({a})", 0.0)

    def _tanh(self, i):
        self.unary(i, "np.tanh({a})", 2.0**-11)
