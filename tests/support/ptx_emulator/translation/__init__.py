"""Translates PTX to Python: one function per basic block, numpy over all threads of a CTA.

A block's function takes the CTA X, its registers R (a list of arrays, never modified in place) and
m, the mask of running threads, or None for all. It returns the index of the next block, or an array
of indices if threads diverge; −1 means exit.
"""

import re

from ptx_emulator.parse import Instruction, Kernel
from ptx_emulator.translation.operands import NUMPY_OF, SIZE_OF
from ptx_emulator.translation.writer import BlockWriter

_BULK_COPIES = ("cp.async.bulk", "cp.reduce.async.bulk")


class Block:
    """A basic block."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.instructions: list[Instruction] = []
        self.next = index + 1
        self.kind = "run"  # or "barrier", "wait" (mbarrier), "atomic" (yields first)
        self.functions: dict[bool, object] = {}


def _ends_block(op: str) -> bool:
    return (
        op.startswith(("bra", "brx", "bar.sync", "barrier", "bar.red", "bar.arrive", "setmaxnreg"))
        or op in ("ret", "exit", "trap")
        or "try_wait" in op
        or op.startswith("call")
    )


class Program:
    """A kernel in blocks, which are translated when they first run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.blocks: list[Block] = []
        ops = [i.op for i in kernel.instructions]
        self.async_proxy = any(op.startswith(("wgmma", *_BULK_COPIES)) for op in ops)
        # Specialised warps run as separate units.
        self.specialised = any(op.startswith(("brx", "bar.arrive", "setmaxnreg")) for op in ops)
        leaders = {0, *kernel.labels.values()}
        for i, instruction in enumerate(kernel.instructions):
            if _ends_block(instruction.op):
                leaders.add(i + 1)
            if self.specialised and instruction.op.startswith(
                ("mbarrier.arrive", "wgmma.commit", *_BULK_COPIES)
            ):
                leaders.add(i + 1)  # other units may run here
            if instruction.op.startswith(("atom.global", "red.global")) or (
                "try_wait" in instruction.op
            ):
                leaders.add(i)
        starts = sorted(x for x in leaders if x < len(kernel.instructions))
        self.block_of = {start: index for index, start in enumerate(starts)}
        for index, start in enumerate(starts):
            stop = starts[index + 1] if index + 1 < len(starts) else len(kernel.instructions)
            block = Block(index)
            block.instructions = kernel.instructions[start:stop]
            first, last = block.instructions[0].op, block.instructions[-1].op
            if first.startswith(("atom.global", "red.global")):
                block.kind = "atomic"
            if last.startswith(("bar.sync", "barrier", "bar.arrive")):
                block.kind = "barrier"
            elif last.startswith("setmaxnreg"):
                block.kind = "registers"
            elif "try_wait" in last:
                block.kind = "wait"
            self.blocks.append(block)
        self.labels = {name: self.block_of.get(at, -1) for name, at in kernel.labels.items()}
        widths = [4]
        for instruction in kernel.instructions:
            if re.match(r"st\.(volatile\.)?shared", instruction.op):
                widths.append(SIZE_OF[NUMPY_OF[instruction.parts[-1]]])
        self.shared_unit = min(widths)
        self.sources: dict[tuple[int, bool], str] = {}
        self.visited: set[int] = set()

    def coverage(self) -> tuple[int, int, list[tuple[int, int]]]:
        """(number of instructions that ran, of all, PTX lines of blocks that never ran)."""
        missed = [b for b in self.blocks if b.index not in self.visited]
        total = len(self.kernel.instructions)
        lines = [(b.instructions[0].line, b.instructions[-1].line) for b in missed]
        return total - sum(len(b.instructions) for b in missed), total, lines

    def function(self, block: Block, partial: bool):
        if partial not in block.functions:
            writer = BlockWriter(self, block, partial)
            source = writer.write()
            self.sources[block.index, partial] = source
            space = dict(writer.constants)
            code = compile(source, f"<block {block.index} of {self.kernel.name}>", "exec")
            exec(code, space)
            block.functions[partial] = space["block"]
        return block.functions[partial]
