"""What all instructions share: reads and writes of operands, addresses, masks."""

from typing import Any

import numpy as np

from ptx_emulator import ops
from ptx_emulator.parse import Imm, Instruction, Memory, Pair, Reg, Special, Symbol

# numpy's name for each PTX type, and the bytes of each.
NUMPY_OF = {
    "b8": "u1", "u8": "u1", "s8": "i1",
    "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "pred": "?",
}  # fmt: skip
SIZE_OF = {
    "?": 1, "u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2,
    "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8,
}  # fmt: skip
UNSIGNED_OF = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64", "b8"}


class Operands:
    """Writes the function of one basic block, line by line.

    An expression is an array with one element per thread, or a scalar.
    """

    def __init__(self, program: Any, block: Any, partial: bool) -> None:
        self.program, self.block, self.partial = program, block, partial
        self.lines: list[str] = []
        self.constants: dict[str, object] = {"np": np, "o": ops, "where": np.where}
        for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"):
            self.constants[name] = np.dtype(name).type
        self.constants["b1"] = np.bool_
        self.temporaries = 0

    def constant(self, value) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def temporary(self) -> str:
        self.temporaries += 1
        return f"t{self.temporaries}"

    def read(self, operand, dtype: str) -> str:
        """Returns an expression for the operand with numpy type `dtype`."""
        if isinstance(operand, tuple):  # ("not", predicate)
            return f"(~{self.read(operand[1], dtype)})"
        if isinstance(operand, Reg):
            have = operand.dtype
            if have == dtype:
                return f"R[{operand.index}]"
            if have == "?" or dtype == "?":
                raise NotImplementedError("predicate as number")
            if SIZE_OF[have] == SIZE_OF[dtype]:
                return f"R[{operand.index}].view({dtype})"
            if SIZE_OF[have] > SIZE_OF[dtype]:
                unsigned = UNSIGNED_OF[SIZE_OF[dtype]]
                cut = f"R[{operand.index}].astype({unsigned})"
                return cut if unsigned == dtype else f"{cut}.view({dtype})"
            raise NotImplementedError(f"{operand.name} as {dtype}")
        if isinstance(operand, Imm):
            if dtype == "?":
                return self.constant(np.bool_(operand.value != 0))
            if operand.is_float:
                kind = {2: np.float16, 4: np.float32, 8: np.float64}[SIZE_OF[dtype]]
                return self.constant(kind(operand.value).view(dtype))
            if dtype[0] == "f":  # bits
                bits = operand.value & (1 << 8 * SIZE_OF[dtype]) - 1
                return self.constant(np.dtype(UNSIGNED_OF[SIZE_OF[dtype]]).type(bits).view(dtype))
            bits = operand.value & (1 << 8 * SIZE_OF[dtype]) - 1
            return self.constant(np.dtype(UNSIGNED_OF[SIZE_OF[dtype]]).type(bits).view(dtype))
        if isinstance(operand, Special):
            return f"X.special({operand.name!r}).astype({dtype})"
        if isinstance(operand, Symbol):
            return f"X.symbol({operand.name!r}, {dtype})"
        raise NotImplementedError(f"operand {operand}")

    @staticmethod
    def is_array(operand) -> bool:
        return isinstance(operand, (Reg, tuple))

    def write_register(self, register, expression: str, dtype: str, mask: str | None) -> None:
        """Writes an expression of numpy type `dtype`, one element per thread or a scalar."""
        if register is None:
            return
        if isinstance(register, Pair):
            raise NotImplementedError("two destinations")
        have = register.dtype
        if have != dtype:
            if SIZE_OF[have] == SIZE_OF[dtype]:
                expression = f"({expression}).view({have})"
            elif dtype == "?":
                raise NotImplementedError("number from predicate")
            elif SIZE_OF[have] > SIZE_OF[dtype]:
                wide = ("i" if dtype[0] == "i" else "u") + str(SIZE_OF[have])
                expression = f"({expression}).astype({wide})"
                if wide != have:
                    expression += f".view({have})"
            else:
                raise NotImplementedError(f"{dtype} into {register.name}")
        if mask is None:
            self.lines.append(f"R[{register.index}] = {expression}")
        else:
            self.lines.append(
                f"R[{register.index}] = where({mask}, {expression}, R[{register.index}])"
            )

    def mask(self, instruction: Instruction) -> str | None:
        """An expression for the threads that execute the instruction; None for all."""
        terms = ["m"] if self.partial else []
        if instruction.predicate is not None:
            term = f"R[{instruction.predicate.index}]"
            terms.append(f"~{term}" if instruction.negated else term)
        if not terms:
            return None
        if len(terms) == 1 and not terms[0].startswith("~"):
            return terms[0]
        name = self.temporary()
        self.lines.append(f"{name} = {' & '.join(terms)}")
        return name

    def address(self, memory: Memory, dtype: str) -> str:
        base = memory.base
        if isinstance(base, Imm):
            return f"X.full({base.value + memory.offset}, {dtype})"
        if isinstance(base, Symbol):
            return f"X.full(X.symbol({base.name!r}, {dtype}) + {dtype}({memory.offset}), {dtype})"
        expression = self.read(base, base.dtype)
        if memory.offset:
            value = np.dtype(base.dtype).type(memory.offset & (1 << 8 * SIZE_OF[base.dtype]) - 1)
            expression = f"({expression} + {self.constant(value)})"
        return expression

    def simple(self, i: Instruction, expression: str, dtype: str) -> None:
        if not any(self.is_array(a) for a in i.args[1:]):
            expression = f"X.full({expression}, {'b1' if dtype == '?' else dtype})"
        self.write_register(i.args[0], expression, dtype, self.mask(i))
