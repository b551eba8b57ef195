"""Shared memory, mbarriers, descriptors and pointers of a program.

A tile remembers what is still reading or writing it asynchronously. Memory that nothing has landed
in is NaN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.numbers import Integer
from gluon_emulator.schedule import Event, Fault, Program


class Barrier:
    """An mbarrier: its phase completes with its last arrival and its last expected byte."""

    def __init__(self) -> None:
        self.count = self.pending = self.expected_bytes = self.phase = 0
        Program.running.barriers.append(self)

    def init(self, count: int) -> None:
        self.count = self.pending = count
        Program.running.me().unfenced.add(self)

    def _settle(self) -> None:
        if self.pending < 0:
            raise Fault("a barrier gets more arrivals than its count")
        if self.pending == 0 and self.expected_bytes == 0:
            self.phase += 1
            self.pending = self.count

    def arrive(self, count: int) -> None:
        Program.running.pause()
        self.pending -= count
        self._settle()

    def expect(self, num_bytes: int) -> None:
        Program.running.pause()
        self.expected_bytes += num_bytes
        self.pending -= 1
        self._settle()

    def complete(self, num_bytes: int) -> None:
        self.expected_bytes -= num_bytes
        self._settle()

    def wait(self, parity: int) -> None:
        Program.running.pause(lambda: self.phase & 1 != parity & 1)


class Barriers:
    """Memory of several mbarriers."""

    def __init__(self, count: int) -> None:
        self._barriers = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self._barriers[i]


class Tile:
    """A view of shared memory; `key` is the tile that hazards are tracked for."""

    def __init__(self, data: Tensor, key: Any) -> None:
        self.data, self.key = data, key

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def index(self, i: int) -> "Tile":
        if not 0 <= i < len(self.data):
            raise Fault(f"tile {i} of {len(self.data)}")
        return Tile(self.data[i], (self.key, int(i)))

    def slice(self, start: int, length: int, dim: int = 0) -> "Tile":
        return Tile(self.data.narrow(dim, start, length), self.key)

    def permute(self, order: Sequence[int]) -> "Tile":
        return Tile(self.data.permute(*order), self.key)

    def reshape(self, shape: Sequence[int]) -> "Tile":
        return Tile(self.data.view(shape), self.key)

    def store(self, value: Tensor) -> None:
        Program.running.pause()
        must_be_free(self, "a write")
        self.data.copy_(value)
        Program.running.me().unfenced.add(self.key)

    def load(self, layout: Any = None) -> Tensor:
        Program.running.pause()
        if "a copy" in uses(self):
            raise Fault(f"a read of a tile that has not landed: {self.key}")
        return self.data.clone()


def uses(tile: Tile) -> list[str]:
    return Program.running.uses.setdefault(tile.key, [])


def must_be_free(tile: Tile, who: str) -> None:
    if users := uses(tile):
        raise Fault(f"{who} of a tile that {users[0]} still uses: {tile.key}")


def must_be_fenced(thing: Any, who: str) -> None:
    program = Program.running
    if any(thing in partition.unfenced for partition in (program.whole, *program.partitions)):
        raise Fault(f"{who} of what was written without fence_async_shared afterwards: {thing}")


class Descriptor:
    """A TensorDescriptor: what of a box lies outside the tensor is 0 when read, lost when written.

    With two dimensions more than the tensor, rows are those before row 2³⁰ of a box whose start
    the first two move: addresses are sums modulo 2⁶⁴ (`triton.tools.ragged_tma`).
    """

    def __init__(
        self,
        base: Tensor,
        shape: Sequence[int],
        strides: Sequence[int],
        block_shape: Sequence[int],
        layout: Any,
    ) -> None:
        _, row, *inner = base.stride()
        self.is_ragged = len(shape) == 5
        if self.is_ragged:
            expected_shape = [0x7FFF0000, 0x7FFF0000, 2**30, *base.shape[2:]]
            expected_strides = [2**34 - row, row, row, *inner]
        else:
            expected_shape, expected_strides = list(base.shape), list(base.stride())
        if list(shape) != expected_shape or list(strides) != expected_strides:
            raise Fault("a descriptor of another tensor's shape or strides")
        aligned = all(stride * base.element_size() % 16 == 0 for stride in strides[:-1])
        if strides[-1] != 1 or not aligned or base.data_ptr() % 16:
            raise Fault(f"a descriptor of unaligned memory: strides {list(strides)}")
        self.base, self.dtype, self.block_shape = base.detach(), base.dtype, list(block_shape)

    def overlap(self, start: Sequence[int], tile: Tile) -> tuple[Tensor, Tensor]:
        """The parts of the tensor and of the tile that correspond, of a box from `start` on."""
        if self.is_ragged:
            return self._ragged_overlap([int(x) for x in start], tile)
        outside, inside = [], []
        for first, block, size in zip(start, self.block_shape, self.base.shape, strict=True):
            low, high = max(int(first), 0), min(int(first) + block, size)
            high = max(low, high)
            outside.append(slice(low, high) if low < size else slice(0, 0))
            inside.append(slice(low - int(first), high - int(first)))
        if any(s.start == s.stop for s in outside):
            inside = [slice(0, 0)] * len(inside)
            outside = inside
        return self.base[tuple(outside)], tile.data.view(self.block_shape)[tuple(inside)]

    def _ragged_overlap(self, start: list[int], tile: Tile) -> tuple[Tensor, Tensor]:
        stride, num_rows = self.base.stride(1), self.block_shape[2]
        moved = start[0] * (2**34 - stride) + (start[1] + start[2]) * stride
        item = self.base.element_size()
        moved = (moved * item + 2**63) % 2**64 - 2**63
        row, rest = divmod(moved // item, stride)
        inside = min(max(2**30 - start[2], 0), num_rows)
        if min(start) < 0 or max(start[:2]) >= 0x7FFF0000 or rest:
            raise Fault(f"a box that starts at {start}")
        if inside and not 0 <= row <= self.base.shape[1] - inside:
            raise Fault(f"a box of the rows {row} … {row + inside - 1} of {self.base.shape[1]}")
        there = self.base[
            0, row : row + inside, start[3], start[4] : start[4] + tile.data.shape[-1]
        ]
        return there, tile.data.view(num_rows, -1)[:inside]


def start_load(
    descriptor: Descriptor, start: Sequence[int], barrier: Barrier, tile: Tile, pred: bool = True
) -> None:
    if not pred:
        return
    Program.running.pause()
    must_be_free(tile, "a copy")
    must_be_fenced(barrier, "a copy at a barrier")
    must_be_fenced(tile.key, "a copy")
    uses(tile).append("a copy")
    tile.data.fill_(torch.nan)

    def land() -> None:
        tile.data.zero_()
        there, here = descriptor.overlap(start, tile)
        here.copy_(there)
        uses(tile).remove("a copy")
        barrier.complete(tile.num_bytes)

    Program.running.events.append(Event("load", land))


def start_store(
    descriptor: Descriptor, start: Sequence[int], tile: Tile, add: bool = False
) -> None:
    program = Program.running
    program.pause()
    must_be_fenced(tile.key, "a store")
    uses(tile).append("a store")
    done = [False]

    def leave() -> None:
        there, here = descriptor.overlap(start, tile)
        there.add_(here) if add else there.copy_(here)
        uses(tile).remove("a store")
        done[0] = True

    program.events.append(Event("store", leave))
    program.me().stores.append(done)


def wait_for_stores(pendings: int) -> None:
    stores = Program.running.me().stores
    Program.running.pause(lambda: sum(not done for (done,) in stores) <= pendings)


class Pointer:
    """A pointer, or a tensor of pointers, into a tensor's memory."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self._data, self._offset, self.dtype = base.detach().view(-1), offset, base.dtype

    def __add__(self, offset: Any) -> "Pointer":
        moved = Pointer.__new__(Pointer)
        moved._data, moved.dtype = self._data, self.dtype
        moved._offset = _wide(self._offset) + _wide(offset)
        return moved

    def _at(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        offsets = torch.as_tensor(self._offset, dtype=torch.int64)
        mask = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask
        mask = mask.expand(offsets.shape)
        used = offsets[mask]
        if used.numel() and not 0 <= used.min() <= used.max() < len(self._data):
            raise Fault("an access outside of a tensor")
        return used, mask

    def store(self, value: Tensor, mask: Tensor | None) -> None:
        used, mask = self._at(mask)
        self._data[used] = torch.as_tensor(value).expand(mask.shape)[mask].to(self.dtype)

    def load(self, mask: Any, other: float) -> Any:
        """A tensor or, at a single pointer, an integer."""
        if not isinstance(self._offset, Tensor):
            if mask is False:
                return Integer(other)
            used, _ = self._at(None)
            return Integer(self._data[used])
        used, mask = self._at(mask)
        values = torch.full(mask.shape, other, dtype=self.dtype)
        values[mask] = self._data[used]
        return values


def _wide(offset: Any) -> Any:
    return offset.to(torch.int64) if isinstance(offset, Tensor) else int(offset)
