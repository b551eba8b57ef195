"""Reads registers, spills, instructions and overlap from a compiled kernel's binary.

NVIDIA: from SASS, with the tools that ship in Triton's wheel. AMD: from the assembly text.
"""

import hashlib
import json
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from capture import Launch
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.cache import get_cache_manager

# ptxas: "Potential Performance Loss: wgmma.mma_async instructions are serialized due to …"
_SERIALIZED = re.compile(r"C75(?:10|11|12|18)\b.*|.*wgmma.*serialized.*")
_MATMUL = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma")
_MEMORY = ("LDG", "STG", "LDGSTS", "LD", "ST")
_DOTS = ("tt.dot", "tt.dot_scaled")


class Scheduled(NamedTuple):
    """An instruction of a loop with its scheduling information."""

    opcode: str
    stall: int  # cycles until the warp's next instruction
    waits: tuple[int, ...]  # barriers that it waits for, of the warp's six
    sets: int | None  # the barrier that is freed when the result is available
    sets_when_read: int | None  # the barrier that is freed when the operands have been read
    closes_group: bool  # of matrix products
    groups_left: int | None  # how many groups of products may still run; None: it waits for none
    # BAR: its number or register, the threads that it counts (0: the whole program), whether it
    # waits for them.
    meets: tuple[str, int, bool] | None = None


@dataclass(frozen=True)
class Binary:
    registers: int  # per thread
    spills: int  # instructions that touch local memory (AMD: spilled registers)
    local_bytes: int  # per thread
    mix: dict[str, int]  # instructions of the whole kernel, per warp
    loop: dict[str, int] = field(default_factory=dict)  # of the main loop, if there is one
    under_wgmma: dict[str, int] = field(default_factory=dict)  # those issued while a wgmma runs
    schedule: tuple[Scheduled, ...] = ()  # of the main loop, if it has wgmma
    serialized: tuple[str, ...] = ()  # messages of ptxas about serialised wgmma
    transposed_dots: int = 0  # dot operands that are a transposed dot result


def examine(launch: Launch) -> Binary:
    """Examines the binary of a launch; the result is stored next to it in Triton's cache."""
    manager = get_cache_manager(launch.hash)
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    file = f"{launch.name}.examined-{version}.json"
    if path := manager.get_file(file):
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
        return Binary(**kept | {"schedule": tuple(Scheduled(*step) for step in kept["schedule"])})
    files = launch.files()
    binary = _examine_amd(files) if "amdgcn" in files else _examine_nvidia(files)
    manager.put(json.dumps(vars(binary)), file, binary=False)
    return binary


def count(mix: dict[str, int], pattern: str) -> int:
    """How many instructions of a mix start with a match of the pattern."""
    return sum(n for opcode, n in mix.items() if re.match(pattern, opcode))


# --- NVIDIA ----------------------------------------------------------------------------------


class _Instruction(NamedTuple):
    address: int
    predicate: str
    text: str
    control: int  # the upper half of its encoding

    @property
    def opcode(self) -> str:
        """The operation with its important modifiers: the width of an access, MUFU's function,
        HGMMA's shape."""
        name, *modifiers = self.text.split()[0].split(".")
        if name in _MEMORY:
            widths = [m for m in modifiers if re.fullmatch(r"[US]?8|[US]?16|64|128|256", m)]
            return f"{name}.{widths[0] if widths else '32'}"
        return f"{name}.{modifiers[0]}" if name in ("MUFU", "HGMMA") and modifiers else name


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _examine_nvidia(files: dict[str, str]) -> Binary:
    disassembly = _run(knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", files["cubin"])
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", disassembly)}
    instructions = _parse_sass(disassembly)
    mix = Counter(instruction.opcode for instruction in instructions)
    loop = _main_loop(instructions)
    ptx = Path(files["ptx"]).read_text(encoding="utf-8")
    return Binary(
        registers=usage["REG"],
        spills=count(mix, r"(LDL|STL)\b"),
        local_bytes=max(usage["STACK"], usage["LOCAL"]),
        mix=mix,
        loop=Counter(instruction.opcode for instruction in loop),
        under_wgmma=_under_wgmma(loop),
        schedule=tuple(map(_scheduled, loop)) if count(mix, "HGMMA") else (),
        serialized=_serialized(files["ptx"]) if "wgmma" in ptx else (),
        # Gluon begins after that stage, and its operands are where its author put them.
        transposed_dots=_transposed_dots(files) if "ttir" in files else 0,
    )


def _parse_sass(disassembly: str) -> list[_Instruction]:
    line = re.compile(
        r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;"
        r"\s*/\* 0x\w+ \*/\s*/\* 0x(\w+) \*/",
        re.MULTILINE,
    )
    found = line.findall(disassembly)
    return [_Instruction(int(a, 16), p, text, int(c, 16)) for a, p, text, c in found]


def _main_loop(instructions: list[_Instruction]) -> list[_Instruction]:
    """Returns the shortest loop with the most matrix products or, if there are none, the shortest
    that reads or writes global memory. Code that ptxas moves behind the end of the kernel, such as
    the retry of a barrier, is in no loop, because those contain no EXIT."""
    ranked = []
    for body in _loops(instructions):
        products = _num_products(body)
        if products or any(i.text.startswith(("LDG", "STG", "UTMALDG")) for i in body):
            ranked.append((-products, len(body), body))
    return min(ranked, key=lambda entry: entry[:2])[2] if ranked else []


def _loops(instructions: list[_Instruction]) -> list[list[_Instruction]]:
    """Code that ends with a backward branch and has no EXIT, from its goal on."""
    found = []
    for branch in instructions:
        goal = re.search(r"\b0x([0-9a-f]+)$", branch.text)
        if branch.text.startswith("BRA") and goal and int(goal[1], 16) < branch.address:
            start = int(goal[1], 16)
            body = [i for i in instructions if start <= i.address <= branch.address]
            if not any(i.text.startswith("EXIT") for i in body):
                found.append(body)
    return found


def _num_products(body: list[_Instruction]) -> int:
    return sum(bool(_MATMUL.match(i.text)) for i in body)


class ProductLoop(NamedTuple):
    """A loop over products of a kernel whose warps run different code."""

    mix: dict[str, int]
    under_wgmma: dict[str, int]
    registers: int  # up to the highest that it names
    schedule: tuple[Scheduled, ...]


def product_loops(launch: Launch) -> list[ProductLoop]:
    """The loops with matrix products that contain no other such loop (NVIDIA)."""
    disassembly = _run(knobs.nvidia.cuobjdump.path, "-sass", launch.files()["cubin"])
    loops = [body for body in _loops(_parse_sass(disassembly)) if _num_products(body)]
    spans = [(body[0].address, body[-1].address) for body in loops]
    return [
        ProductLoop(
            Counter(i.opcode for i in body),
            _under_wgmma(body),
            1 + max(int(n) for i in body for n in re.findall(r"\bR(\d+)", i.text)),
            tuple(map(_scheduled, body)),
        )
        for body, (start, end) in zip(loops, spans, strict=True)
        if not any((start, end) != span and start <= span[0] <= span[1] <= end for span in spans)
    ]


def _running_groups(instruction: _Instruction) -> int | None:
    """How many groups of products may still run after a WARPGROUP.DEPBAR; None for other
    instructions."""
    wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", instruction.text)
    return int(wait[1], 16) if wait else None


def _meets(instruction: _Instruction) -> tuple[str, int, bool] | None:
    found = re.match(r"BAR\.(SYNC|ARV)\S* (\w+)(?:, (\w+))?", instruction.text)
    return found and (found[2], int(found[3] or "0", 0), found[1] == "SYNC")


def _scheduled(instruction: _Instruction) -> Scheduled:
    """Decodes the control bits: 4 of stall, 1 of yield, two barriers of 3 (7: none), a mask of 6
    (Jia et al. 2018, arXiv:1804.06826)."""
    bits = instruction.control >> 41
    result, read, mask = bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
    return Scheduled(
        opcode=instruction.opcode,
        stall=bits & 15,
        waits=tuple(index for index in range(6) if mask >> index & 1),
        sets=result if result < 6 else None,
        sets_when_read=read if read < 6 else None,
        closes_group=instruction.opcode.startswith("HGMMA") and "gsb0" in instruction.text,
        groups_left=_running_groups(instruction),
        meets=_meets(instruction),
    )


def _under_wgmma(loop: list[_Instruction]) -> dict[str, int]:
    """Counts the instructions issued while a wgmma of the loop is running.

    It goes through the loop twice, because products from the end of one step may still run in the
    next. HGMMA's gsb0 closes a group; WARPGROUP.DEPBAR.LE waits until at most n groups are running.
    """
    groups, is_open, under = 0, False, Counter()
    for counts in (False, True):
        for instruction in loop:
            opcode = instruction.opcode
            if opcode.startswith("HGMMA"):
                is_open = "gsb0" not in instruction.text
                groups += not is_open
            elif (left := _running_groups(instruction)) is not None:
                groups, is_open = min(groups, left), False
            elif counts and (groups or is_open):
                under[opcode] += 1
    return under


def _serialized(ptx_path: str) -> tuple[str, ...]:
    """Compiles the PTX again to get the messages of ptxas, which it prints only while compiling."""
    arch = re.search(r"\.target\s+(\w+)", Path(ptx_path).read_text(encoding="utf-8"))[1]
    # The target and the version of Triton determine which assembler Triton uses.
    assembler = get_ptxas(int(re.search(r"\d+", arch)[0])).path
    said = _run(assembler, "-v", f"--gpu-name={arch}", ptx_path, "-o", "/dev/null")
    return tuple(line for line in said.splitlines() if _SERIALIZED.search(line))


# --- AMD -------------------------------------------------------------------------------------


def _examine_amd(files: dict[str, str]) -> Binary:
    assembly = Path(files["amdgcn"]).read_text(encoding="utf-8")

    def stated(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s+(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    opcodes = re.findall(r"^\t([a-z]\w+)(?:\s|$)", assembly, re.MULTILINE)
    return Binary(
        registers=stated("vgpr_count"),
        # Spilled scalars go to lanes of vector registers, not to memory.
        spills=stated("vgpr_spill_count"),
        local_bytes=stated("private_segment_fixed_size"),
        mix=Counter(opcodes),
        transposed_dots=_transposed_dots(files),
    )


# --- Triton IR -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Value:
    operation: str = ""
    sources: list["_Value"] = field(default_factory=list)


def _transposed_dots(files: dict[str, str]) -> int:
    return count_transposed_dots(Path(files["ttir"]).read_text(encoding="utf-8"))


def count_transposed_dots(ttir: str) -> int:
    """Counts dot operands that are a transposed dot result.

    Triton before 3.7.1 silently miscompiles such a product for Hopper. The count follows values in
    Triton's IR before layouts: through casts and arithmetic, and through loops, whose results and
    arguments come from initial values and from scf.yield.
    """
    scopes: list[dict[str, _Value]] = [{}]
    regions: list[tuple[list[_Value], list[_Value]]] = []  # results and loop arguments
    dots: list[list[_Value]] = []
    for line in ttir.splitlines():
        text = line.partition(" loc(")[0].strip()
        if text.startswith("}"):
            scopes[-1].clear()
            if len(scopes) > 1 and "else" not in text:
                scopes.pop(), regions.pop()
            continue
        head = re.match(r'(?:((?:%\w+(?::\d+)?(?:, )?)+) = )?"?([\w.]+)"?(.*)', text)
        if not head:
            continue
        names, operation, rest = _result_names(head[1] or ""), head[2], head[3]

        def find(name: str) -> _Value:
            return next((scope[name] for scope in reversed(scopes) if name in scope), _Value())

        carried = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", rest.partition("iter_args")[2])
        operands = [find(name) for name in re.findall(r"%\w+(?:#\d+)?", rest)]
        if operation == "scf.yield" and regions:
            for receivers in regions[-1]:
                for receiver, operand in zip(receivers, operands, strict=False):
                    receiver.sources.append(operand)
        if operation in _DOTS:
            dots.append(operands[:2])
        initial = [find(name) for _, name in carried]
        # A region's results come from its yields; a reduced value is not a dot result.
        is_region = operation in ("scf.for", "scf.if", "tt.reduce")
        results = [_Value(operation, [] if is_region else operands) for _ in names]
        arguments = [_Value(operation, [value]) for value in initial]
        for result, value in zip(results, initial, strict=False):
            result.sources.append(value)
        scopes[-1].update(zip(names, results, strict=True))
        if line.rstrip().endswith("{"):
            names_inside = [name for name, _ in carried]
            scopes.append(dict(zip(names_inside, arguments, strict=True)))
            regions.append((results, arguments))
    return sum(_is_transposed_dot(operand) for operands in dots for operand in operands)


def _result_names(declared: str) -> list[str]:
    """%a, %b → %a, %b; %c:2 → %c#0, %c#1."""
    names = []
    for name, number in re.findall(r"(%\w+)(?::(\d+))?", declared):
        names += [f"{name}#{i}" for i in range(int(number))] if number else [name]
    return names


def _is_transposed_dot(operand: _Value) -> bool:
    seen, waiting = set(), [(operand, False)]
    while waiting:
        state = value, transposed = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        if value.operation in _DOTS:
            if transposed:
                return True
            continue  # the operands of that dot are counted separately
        transposed = transposed or value.operation == "tt.trans"
        waiting += [(source, transposed) for source in value.sources]
    return False
