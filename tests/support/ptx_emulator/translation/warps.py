"""Translates operations of a warp or warp group: shuffles, votes, matrix products."""

import re

from ptx_emulator.parse import Imm, Pair, Vector
from ptx_emulator.translation.operands import NUMPY_OF, Operands


class Warps(Operands):
    """A part of `writer.BlockWriter`."""

    def _shfl(self, i):
        mode = i.parts[2]
        destination, a, b, c = i.args[:4]
        found = None
        if isinstance(destination, Pair):
            destination, found = destination.first, destination.second
        mask = self.mask(i)
        value = f"X.full({self.read(a, 'u4')}, u4)"
        if isinstance(b, Imm) and isinstance(c, Imm) and found is None:
            self.write_register(
                destination, f"{value}[X.lanes({mode!r}, {b.value}, {c.value})[0]]", "u4", mask
            )
            return
        lanes = self.temporary()
        self.lines.append(
            f"{lanes} = X.lanes({mode!r}, {self.read(b, 'u4')}, {self.read(c, 'u4')})"
        )
        value_name = self.temporary()
        self.lines.append(f"{value_name} = {value}[{lanes}[0]]")
        if found is not None:
            self.write_register(found, f"{lanes}[1]", "?", mask)
        self.write_register(destination, value_name, "u4", mask)

    def _redux(self, i):
        operation, dtype = i.parts[2], NUMPY_OF[i.parts[-1]]
        mask = self.mask(i)
        self.write_register(
            i.args[0],
            f"X.reduce({operation!r}, {self.read(i.args[1], dtype)}, {mask})",
            dtype,
            mask,
        )

    def _vote(self, i):
        mode = i.parts[2]
        p = f"X.full({self.read(i.args[1], '?')}, b1)"
        mask = self.mask(i)
        dtype = "u4" if mode == "ballot" else "?"
        self.write_register(i.args[0], f"X.vote({mode!r}, {p}, {mask})", dtype, mask)

    def _activemask(self, i):
        mask = self.mask(i)
        self.write_register(i.args[0], f"X.vote('ballot', X.full(True, b1), {mask})", "u4", mask)

    def _elect(self, i):
        mask = self.mask(i)
        name = self.temporary()
        self.lines.append(f"{name} = X.elect({mask})")
        self.write_register(i.args[0].first, f"{name}[0]", "u4", mask)
        self.write_register(i.args[0].second, f"{name}[1]", "?", mask)

    # --- matrices ---

    def _mma(self, i):
        parts = i.parts
        shape = parts[3]
        kinds = parts[6:10]
        if shape not in ("m16n8k16", "m16n8k8") or kinds[0] != "f32" or kinds[3] != "f32":
            raise NotImplementedError(i.op)
        d, a, b, c = i.args
        mask = self.mask(i)
        lists = [
            ", ".join(f"X.full({self.read(x, 'u4')}, u4)" for x in operand.items)
            for operand in (a, b, c)
        ]
        name = self.temporary()
        self.lines.append(
            f"{name} = X.multiply([{lists[0]}], [{lists[1]}], [{lists[2]}], {kinds[1]!r})"
        )
        for k, item in enumerate(d.items):
            self.write_register(item, f"{name}[{k}]", "u4", mask)

    def _wgmma(self, i):
        parts = i.parts
        if parts[1] == "fence":
            self.lines.append("X.fence_wgmma(R, m)")
        elif parts[1] == "commit_group":
            self.lines.append("X.commit_wgmma(m)")
        elif parts[1] == "wait_group":
            self.lines.append(f"X.wait_wgmma({i.args[0].value}, m)")
        else:
            match = re.match(r"m64n(\d+)k(\d+)", parts[4])
            n, k = int(match.group(1)), int(match.group(2))
            d, a, b, scale, *rest = i.args
            flags = [x.value for x in rest]
            operands = [x.index for x in a.items] if isinstance(a, Vector) else []
            if flags[:2] != [1, 1]:
                raise NotImplementedError("negated operands")
            if isinstance(a, Vector):
                a_text = "[" + ", ".join(self.read(x, "u4") for x in a.items) + "]"
                transposed = (0, flags[2] if len(flags) > 2 else 0)
            else:
                a_text = self.read(a, "u8")
                transposed = (flags[2], flags[3]) if len(flags) > 3 else (0, 0)
            indices = [x.index for x in d.items]
            self.lines.append(
                f"X.wgmma({i.line}, R, {indices}, {a_text}, {self.read(b, 'u8')}, "
                f"X.full({self.read(scale, '?')}, b1), {n}, {k}, {parts[5:]!r}, {transposed}, m, "
                f"{operands})"
            )
