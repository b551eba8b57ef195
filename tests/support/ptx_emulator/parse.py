"""Parses the subset of PTX that Triton generates."""

import re
import struct
from dataclasses import dataclass, field

REG_DTYPES = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "u1",
    "b16": "u2", "u16": "u2", "s16": "u2", "f16": "u2",
    "b32": "u4", "u32": "u4", "s32": "u4", "f32": "u4",
    "b64": "u8", "u64": "u8", "s64": "u8", "f64": "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Reg:
    """A register of a kernel, by its index."""

    name: str
    index: int
    dtype: str  # a numpy dtype character code: "?", "u1", "u2", "u4", "u8"


@dataclass(frozen=True)
class Imm:
    """A constant."""

    value: int | float
    is_float: bool = False


@dataclass(frozen=True)
class Special:
    """A special register, set by the hardware."""

    name: str  # "%tid.x"


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter, a label or shared memory."""

    name: str


@dataclass(frozen=True)
class Memory:
    """An operand in brackets: an address."""

    base: object  # Reg, Symbol or Imm
    offset: int = 0
    coordinates: tuple = ()  # for a bulk tensor copy: [base, {x, y, …}]


@dataclass(frozen=True)
class Vector:
    """An operand in braces."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """Two destinations of one instruction."""

    first: object  # d|p
    second: object


@dataclass
class Instruction:
    """One instruction with its operands and its line in the text."""

    op: str  # "ld.global.v4.b32"
    args: list
    predicate: Reg | None
    negated: bool
    line: int
    text: str
    scopes: tuple = ()  # of labels, outermost first

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Kernel:
    """A parsed kernel."""

    name: str = ""
    params: list = field(default_factory=list)  # (name, type, bytes)
    registers: list = field(default_factory=list)  # dtype by index
    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)  # label → index of an instruction
    tables: dict = field(default_factory=dict)  # for brx.idx: label → labels
    num_threads: int = 0
    max_registers: int | None = None  # .maxnreg, the initial value for setmaxnreg
    shared: dict = field(default_factory=dict)  # static shared variables: name → (offset, bytes)
    static_shared: int = 0
    text: str = ""


_SPECIALS = re.compile(
    r"%(tid|ntid|ctaid|nctaid|laneid|warpid|clusterid|cluster_ctaid|cluster_ctarank|nclusterid"
    r"|cluster_nctarank|cluster_nctaid|clock|clock64|smid|lanemask_\w+|envreg\d+|globaltimer\w*"
    r"|dynamic_smem_size|total_smem_size|is_explicit_cluster)(\.[xyz])?$"
)


def _strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class _Parser:
    """Reads the text once, statement by statement."""

    def __init__(self, text: str) -> None:
        self.kernel = Kernel(text=text)
        self.scopes: list[dict] = []
        self.label_scopes: list[int] = [0]
        self.num_scopes = 0
        self.last_label = ""

    def lookup(self, name: str) -> Reg | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def operand(self, text: str):
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self.operand(x) for x in _split(text[1:-1])))
        if text.startswith("["):
            inside = _split(text[1:-1])
            if len(inside) > 1:
                base = self.operand(inside[0])
                coords = self.operand(inside[1])
                items = coords.items if isinstance(coords, Vector) else (coords,)
                return Memory(base, 0, items)
            match = re.match(r"^(.*?)\s*([+-])\s*(-?\w+)$", inside[0])
            if match and match.group(1):
                sign = -1 if match.group(2) == "-" else 1
                return Memory(self.operand(match.group(1)), sign * int(match.group(3), 0))
            return Memory(self.operand(inside[0]))
        if "|" in text:
            first, _, second = text.partition("|")
            return Pair(self.operand(first), self.operand(second))
        if text.startswith("!"):
            return ("not", self.operand(text[1:]))
        if text == "_":
            return None
        if _SPECIALS.match(text):
            return Special(text)
        reg = self.lookup(text)
        if reg is not None:
            return reg
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", text):
            return Imm(struct.unpack("!f", bytes.fromhex(text[2:]))[0], True)
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", text):
            return Imm(struct.unpack("!d", bytes.fromhex(text[2:]))[0], True)
        if re.match(r"^-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return Imm(int(text.rstrip("U"), 0))
        if re.match(r"^-?\d+\.\d*([eE][-+]?\d+)?$", text):
            return Imm(float(text), True)
        return Symbol(text)

    def declare(self, statement: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S)
        if not match:
            raise NotImplementedError(f"declaration {statement!r}")
        dtype = REG_DTYPES[match.group(1)]
        for name in _split(match.group(2)):
            name = name.strip()
            counted = re.match(r"^(.*)<(\d+)>$", name)
            names = (
                [f"{counted.group(1)}{i}" for i in range(int(counted.group(2)))]
                if counted
                else [name]
            )
            for one in names:
                index = len(self.kernel.registers)
                self.kernel.registers.append(dtype)
                self.scopes[-1][one] = Reg(one, index, dtype)

    def static(self, statement: str) -> None:
        match = re.match(
            r"(?:\.extern\s+|\.visible\s+)*\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]",
            statement,
        )
        if match:
            align, name, size = int(match.group(1)), match.group(2), int(match.group(3) or 0)
            offset = -(-self.kernel.static_shared // align) * align
            self.kernel.shared[name] = (offset, size)
            self.kernel.static_shared = offset + size

    def parse(self) -> Kernel:
        source = _strip_comments(self.kernel.text)
        entry = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", source, re.S)
        for statement in source[: entry.start()].split(";"):
            if ".shared" in statement:
                self.static(statement.strip().split("\n")[-1].strip())
        kernel = self.kernel
        kernel.name = entry.group(1)
        for param in _split(entry.group(2)):
            array = re.search(r"\.b8\s+(\w+)\[(\d+)\]$", param.strip())
            if array:
                kernel.params.append((array.group(1), "b8", int(array.group(2))))
                continue
            words = param.split()
            kernel.params.append((words[-1], words[1].lstrip("."), 0))
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.group(3))
        kernel.num_threads = int(threads.group(1))
        registers = re.search(r"\.maxnreg\s+(\d+)", entry.group(3))
        kernel.max_registers = int(registers.group(1)) if registers else None
        position, end = entry.end(), len(source)
        line = source.count("\n", 0, position) + 1
        self.scopes.append({})
        depth = 1
        while depth and position < end:
            c = source[position]
            if c.isspace():
                line += c == "\n"
                position += 1
            elif c == "{":
                depth += 1
                self.num_scopes += 1
                self.scopes.append({})
                self.label_scopes.append(self.num_scopes)
                position += 1
            elif c == "}":
                depth -= 1
                self.scopes.pop()
                self.label_scopes.pop()
                position += 1
            else:
                match = re.compile(r"[\w$%.@!]+\s*:(?!:)").match(source, position)
                if match and source[position] not in "@.":
                    name = self.last_label = match.group().rstrip(":").strip()
                    kernel.labels[f"{name}@{self.label_scopes[-1]}"] = len(kernel.instructions)
                    position = match.end()
                    line += match.group().count("\n")
                    continue
                if source.startswith((".loc", ".file", ".pragma", ".section"), position):
                    stop = source.index("\n", position)
                    position = stop
                    continue
                stop = source.index(";", position)
                statement = source[position:stop]
                self.statement(statement.strip(), line)
                line += statement.count("\n")
                position = stop + 1

        # A label refers to the innermost scope that defines it.
        def seen(name, scopes):
            for scope in reversed(scopes):
                if f"{name}@{scope}" in kernel.labels:
                    return f"{name}@{scope}"
            raise KeyError(f"label {name}")

        for instruction in kernel.instructions:
            if instruction.op.startswith("bra"):
                instruction.args = [Symbol(seen(instruction.args[0].name, instruction.scopes))]
            elif instruction.op.startswith("brx"):
                table = kernel.tables[instruction.args[1].name]
                labels = [Symbol(seen(name, instruction.scopes)) for name in table]
                instruction.args = [instruction.args[0], Vector(tuple(labels))]
        return kernel

    def statement(self, statement: str, line: int) -> None:
        if not statement:
            return
        if statement.startswith(".reg"):
            self.declare(statement)
            return
        if statement.startswith(".branchtargets"):
            names = statement.removeprefix(".branchtargets").split(",")
            self.kernel.tables[self.last_label] = [name.strip() for name in names]
            return
        if statement.startswith("."):
            if ".shared" in statement:
                self.static(statement)
            return
        predicate, negated, text = None, False, statement
        match = re.match(r"^@(!?)\s*([%\w$]+)\s+(.*)$", statement, re.S)
        if match:
            negated = match.group(1) == "!"
            predicate = self.lookup(match.group(2))
            if predicate is None:
                raise KeyError(f"line {line}: predicate {match.group(2)}")
            statement = match.group(3)
        op, _, rest = statement.partition(" ")
        if "\t" in op:
            op, _, more = op.partition("\t")
            rest = f"{more} {rest}"
        op, rest = op.strip(), " ".join(rest.split())
        args = [self.operand(x) for x in _split(rest)]
        text, scopes = " ".join(text.split()), tuple(self.label_scopes)
        self.kernel.instructions.append(
            Instruction(op, args, predicate, negated, line, text, scopes)
        )


def parse(text: str) -> Kernel:
    """Parses the first entry of a module."""
    return _Parser(text).parse()
