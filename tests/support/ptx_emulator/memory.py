"""Global memory: one address range per tensor argument, far from all others.

A kernel gets invented addresses, so an access outside of its pointer's tensor hits no range,
regardless of what is next to the tensor in real memory. The low 16 bits are those of the real
address, which preserves alignment.
"""

import ctypes

import numpy as np

_DTYPES = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
_SHIFT = 40


class Region:
    """The bytes of one tensor, from its first element to its last."""

    def __init__(self, index: int, name: str, pointer: int, extent: int, item: int) -> None:
        self.name, self.extent, self.item = name, extent, item
        self.low = pointer & 15
        origin = pointer - self.low
        size = -(-(self.low + extent) // 16) * 16
        raw = (ctypes.c_uint8 * max(size, 16)).from_address(origin)
        self.bytes = np.frombuffer(raw, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in _DTYPES.items()}
        base = (index << _SHIFT) | (1 << (_SHIFT - 1)) | (pointer & 0xFFFF)
        self.pointer = base  # the address that the kernel gets
        self.origin = base - self.low
        self.index = index
        units = self.bytes.size // min(item, 4) if item else 1
        self.unit = max(min(item, 4), 1)
        self.units = units
        self.writer = None  # CTA + 1 by unit
        self.epoch = None
        self.writer_warp = None
        self.reader = None


class GlobalMemory:
    """The tensors of one launch, by address."""

    def __init__(self, report) -> None:
        self.report = report
        self.regions: dict[int, Region] = {}

    def add(self, name: str, pointer: int, extent: int, item: int) -> Region:
        region = Region(len(self.regions) + 1, name, pointer, extent, item)
        self.regions[region.index] = region
        return region

    def resolve(self, line, addresses, size, total):
        """Returns [(region, lanes or None, byte offset)] of accesses of `total` bytes in items of
        `size`."""
        ids = (addresses >> np.uint64(_SHIFT)).astype(np.int64)
        first = int(ids[0])
        if (ids == first).all():
            groups = [(first, None)]
        else:
            groups = [(int(i), np.flatnonzero(ids == i)) for i in np.unique(ids)]
        result = []
        if (addresses & np.uint64(total - 1)).any():
            bad = int(np.flatnonzero(addresses & np.uint64(total - 1))[0])
            self.report(
                "misaligned global access", line, f"{hex(int(addresses[bad]))}, {total} bytes"
            )
        for index, lanes in groups:
            region = self.regions.get(index)
            mine = addresses if lanes is None else addresses[lanes]
            if region is None:
                self.report("global access to no tensor", line, f"address {hex(int(mine[0]))}")
                continue
            offset = mine.astype(np.int64) - region.origin
            bad = (offset < region.low) | (offset + total > region.low + region.extent)
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                self.report(
                    "global access out of bounds",
                    line,
                    f"{region.name}: byte {int(offset[at]) - region.low} of {region.extent}, "
                    f"{total} bytes wide; {int(bad.sum())} lanes",
                )
                good = np.flatnonzero(~bad)
                lanes = good if lanes is None else lanes[good]
                offset = offset[good]
            if len(offset):
                result.append((region, lanes, offset))
        return result
