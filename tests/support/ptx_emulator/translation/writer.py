"""Writes the Python function of one basic block; this module: control flow and barriers."""

import numpy as np

from ptx_emulator.parse import Imm, Instruction, Reg
from ptx_emulator.translation.accesses import Accesses
from ptx_emulator.translation.arithmetic import Arithmetic
from ptx_emulator.translation.conversions import Conversions
from ptx_emulator.translation.warps import Warps


class BlockWriter(Arithmetic, Conversions, Accesses, Warps):
    """Has a method `_name` per PTX instruction."""

    def write(self) -> str:
        ended = False
        for instruction in self.block.instructions:
            self.constants_line = instruction.line
            try:
                ended = self.instruction(instruction)
            except (NotImplementedError, KeyError, AttributeError, IndexError, TypeError) as error:
                raise NotImplementedError(
                    f"line {instruction.line}: {instruction.text}: {type(error).__name__} {error}"
                ) from error
        if not ended:
            self.lines.append(f"return {self.block.next}")
        body = "\n    ".join(self.lines)
        return f"def block(X, R, m):\n    {body}\n"

    def instruction(self, i: Instruction) -> bool:
        """Translates an instruction; returns whether it ended the block."""
        op, parts = i.op, i.parts
        name = parts[0]
        handler = getattr(self, f"_{name}", None)
        if name in ("ret", "exit"):
            self.leave(i)
            return True
        if op.startswith("bra"):
            self.branch(i)
            return True
        if op.startswith("brx"):
            targets = np.array([self.program.labels[x.name] for x in i.args[1].items])
            index = self.read(i.args[0], "u4")
            self.lines.append(
                f"return X.branch_table({i.line}, {index}, {self.constant(targets)}, m)"
            )
            return True
        if name in ("bar", "barrier"):
            return self.barrier(i)
        if handler is None:
            raise NotImplementedError(op)
        ended = handler(i)
        return bool(ended)

    def leave(self, i: Instruction) -> None:
        if i.predicate is None:
            self.lines.append("return -1")
        else:
            p = f"R[{i.predicate.index}]"
            p = f"~{p}" if i.negated else p
            self.lines.append(f"return X.branch({p}, m, -1, {self.block.next})")

    def branch(self, i: Instruction) -> None:
        target = self.program.labels[i.args[0].name]
        if i.predicate is None:
            self.lines.append(f"return {target}")
        else:
            p = f"R[{i.predicate.index}]"
            p = f"~{p}" if i.negated else p
            self.lines.append(f"return X.branch({p}, m, {target}, {self.block.next})")

    def barrier(self, i: Instruction) -> bool:
        if i.op.startswith("bar.warp.sync"):
            self.lines.append(f"X.sync_warp({self.mask(i)})")
            return False
        if i.predicate is not None:
            raise NotImplementedError("predicated barrier")
        if "red" in i.parts:
            raise NotImplementedError(i.op)
        number = i.args[0] if i.args else Imm(0)
        if isinstance(number, Reg):  # Triton 3.8: the number of a partition's barrier
            number = f"X.barrier_number({i.line}, {self.read(number, 'u4')}, {self.mask(i)})"
        else:
            number = number.value
        count = i.args[1].value if len(i.args) > 1 else 0
        sync = "arrive" not in i.parts
        self.lines.append(f"X.barrier_arguments = ({number}, {count}, {i.line}, {sync})")
        self.lines.append(f"return {self.block.next}")
        return True

    # --- mbarriers ---

    def _mbarrier(self, i):
        op, args = i.op, i.args
        mask = self.mask(i)
        if op.startswith("mbarrier.init"):
            self.lines.append(
                f"X.init_mbarrier({i.line}, {self.address(args[0], 'u4')}, "
                f"X.full({self.read(args[1], 'u4')}, u4), {mask})"
            )
        elif op.startswith("mbarrier.inval"):
            self.lines.append(f"X.drop_mbarrier({i.line}, {self.address(args[0], 'u4')}, {mask})")
        elif op.startswith("mbarrier.arrive"):
            transfer = "expect_tx" in i.parts
            value = f"X.full({self.read(args[2], 'u4')}, u4)" if len(args) > 2 else "None"
            self.lines.append(
                f"X.arrive_mbarrier({i.line}, {self.address(args[1], 'u4')}, {value}, {transfer}, "
                f"{mask})"
            )
        elif "try_wait" in op:
            if "parity" not in op:
                raise NotImplementedError(op)
            self.lines.append(
                f"X.wait_arguments = ({self.address(args[1], 'u4')}, "
                f"X.full({self.read(args[2], 'u4')}, u4), {args[0].index}, {i.line})"
            )
            self.lines.append(f"return {self.block.next}")
            return True
        else:
            raise NotImplementedError(op)
        return False

    def _setmaxnreg(self, i):
        self.lines.append(f"X.registers_wanted = ({i.args[0].value}, {'inc' in i.parts}, {i.line})")
        self.lines.append(f"return {self.block.next}")
        return True

    def _griddepcontrol(self, i):
        pass

    def _nanosleep(self, i):
        pass

    def _trap(self, i):
        self.lines.append(f"X.trap({i.line}, {self.mask(i)})")

    def _call(self, i):
        raise NotImplementedError("call")
