"""Translates loads, stores, atomics, asynchronous copies, matrices in shared memory."""

from ptx_emulator.parse import Vector
from ptx_emulator.translation.operands import NUMPY_OF, SIZE_OF, UNSIGNED_OF, Operands


class Accesses(Operands):
    """A part of `writer.BlockWriter`."""

    def _ld(self, i):
        parts = i.parts
        kind = parts[-1]
        if "param" in parts:
            memory = i.args[1]
            dtype = NUMPY_OF[kind]
            value = f"X.param({memory.base.name!r}, {memory.offset}, {dtype})"
            self.write_register(i.args[0], f"X.full({value}, {dtype})", dtype, self.mask(i))
            return
        space = self.space(parts)
        size = SIZE_OF[NUMPY_OF[kind]]
        destination = i.args[0]
        items = destination.items if isinstance(destination, Vector) else (destination,)
        mask = self.mask(i)
        address = self.address(i.args[1], "u4" if space == "shared" else "u8")
        extra = ""
        name = self.temporary()
        if len(i.args) > 2:
            raise NotImplementedError("cache hint")
        relaxed = (
            ", strong=True" if any(p in parts for p in ("acquire", "relaxed", "volatile")) else ""
        )
        self.lines.append(
            f"{name} = X.load_{space}({i.line}, {address}, {size}, {len(items)}, {mask}{extra}"
            f"{relaxed if space == 'global' else ''})"
        )
        unsigned = UNSIGNED_OF[size]
        for k, item in enumerate(items):
            value = f"{name}[{k}]"
            if kind in ("s8", "s16", "s32"):
                value, dtype = f"{value}.view({NUMPY_OF[kind]})", NUMPY_OF[kind]
            else:
                dtype = unsigned
            self.write_register(item, value, dtype, mask)

    @staticmethod
    def space(parts) -> str:
        for p in parts:
            if p.startswith("shared"):
                return "shared"
            if p == "global":
                return "global"
        raise NotImplementedError("generic address")

    def _st(self, i):
        parts = i.parts
        kind = parts[-1]
        space = self.space(parts)
        size = SIZE_OF[NUMPY_OF[kind]]
        source = i.args[1]
        items = source.items if isinstance(source, Vector) else (source,)
        mask = self.mask(i)
        address = self.address(i.args[0], "u4" if space == "shared" else "u8")
        unsigned = UNSIGNED_OF[size]
        values = ", ".join(f"X.full({self.read(x, unsigned)}, {unsigned})" for x in items)
        self.lines.append(f"X.store_{space}({i.line}, {address}, {size}, [{values}], {mask})")

    def _atom(self, i):
        parts = i.parts
        if "shared" in parts or "shared::cta" in parts:
            raise NotImplementedError("shared atomics")
        kind = parts[-1]
        operation = next(
            p for p in parts
            if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        )  # fmt: skip
        mask = self.mask(i)
        dtype = NUMPY_OF[kind]
        values = ", ".join(f"X.full({self.read(x, dtype)}, {dtype})" for x in i.args[2:])
        name = self.temporary()
        order = next(
            (p for p in parts if p in ("acq_rel", "acquire", "release", "relaxed")), "relaxed"
        )
        self.lines.append(
            f"{name} = X.atomic({i.line}, {self.address(i.args[1], 'u8')}, {operation!r}, "
            f"{order!r}, [{values}], {mask})"
        )
        self.write_register(i.args[0], name, dtype, mask)

    def _red(self, i):
        i.args = [None, *i.args]
        self._atom(i)

    def _membar(self, i):
        pass

    def _fence(self, i):
        if "proxy" in i.parts:
            self.lines.append("X.fence_proxy(m)")

    def _cp(self, i):
        op, args = i.op, i.args
        if op.startswith("cp.async.commit_group"):
            self.lines.append(f"X.commit_copies({self.mask(i)})")
        elif op.startswith("cp.async.wait_group"):
            self.lines.append(f"X.wait_copies({args[0].value}, {self.mask(i)})")
        elif op.startswith("cp.async.wait_all"):
            self.lines.append(f"X.commit_copies({self.mask(i)})")
            self.lines.append(f"X.wait_copies(0, {self.mask(i)})")
        elif op.startswith("cp.async.bulk.commit_group"):
            self.lines.append(f"X.commit_stores({self.mask(i)})")
        elif op.startswith("cp.async.bulk.wait_group"):
            self.lines.append(f"X.wait_stores({args[0].value}, {self.mask(i)})")
        elif ".bulk.tensor." in op and op.endswith(
            (".global.shared::cta.bulk_group", ".global.shared::cta.add.bulk_group")
        ):
            destination, source = args[:2]
            coordinates = ", ".join(
                f"X.full({self.read(x, 'i4')}, i4)" for x in destination.coordinates
            )
            self.lines.append(
                f"X.tensor_store({i.line}, X.full({self.read(destination.base, 'u8')}, u8), "
                f"[{coordinates}], {self.address(source, 'u4')}, {self.mask(i)}, "
                f"add={op.startswith('cp.reduce.')})"
            )
        elif op.startswith("cp.async.bulk.tensor"):
            if "mbarrier" not in op:
                raise NotImplementedError(op)
            destination, source, barrier = args[:3]
            coordinates = ", ".join(f"X.full({self.read(x, 'i4')}, i4)" for x in source.coordinates)
            self.lines.append(
                f"X.tensor_copy({i.line}, {self.address(destination, 'u4')}, "
                f"X.full({self.read(source.base, 'u8')}, u8), [{coordinates}], "
                f"{self.address(barrier, 'u4')}, {self.mask(i)})"
            )
        elif op.startswith(("cp.async.cg.shared", "cp.async.ca.shared")):
            size = args[2].value
            read = f"X.full({self.read(args[3], 'u4')}, u4)" if len(args) > 3 else "None"
            self.lines.append(
                f"X.copy({i.line}, {self.address(args[0], 'u4')}, {self.address(args[1], 'u8')}, "
                f"{size}, {read}, {self.mask(i)})"
            )
        else:
            raise NotImplementedError(op)

    def _ldmatrix(self, i):
        parts = i.parts
        destination = i.args[0]
        items = destination.items if isinstance(destination, Vector) else (destination,)
        mask = self.mask(i)
        name = self.temporary()
        self.lines.append(
            f"{name} = X.load_matrix({i.line}, {self.address(i.args[1], 'u4')}, {len(items)}, "
            f"{'trans' in parts}, {mask})"
        )
        for k, item in enumerate(items):
            self.write_register(item, f"{name}[{k}]", "u4", mask)

    def _stmatrix(self, i):
        source = i.args[1]
        items = source.items if isinstance(source, Vector) else (source,)
        values = ", ".join(f"X.full({self.read(x, 'u4')}, u4)" for x in items)
        self.lines.append(
            f"X.store_matrix({i.line}, {self.address(i.args[0], 'u4')}, [{values}], "
            f"{'trans' in i.parts}, {self.mask(i)})"
        )
