"""The descriptor of a tensor for bulk copies (TMA): shape and strides, block, swizzle."""

import numpy as np


class TensorMap:
    """A host tensor descriptor as the copy engine reads it."""

    def __init__(self, region, item, shape, strides, block, swizzle, padding) -> None:
        self.region, self.item = region, item
        self.shape, self.strides = list(shape), list(strides)  # elements, outermost first
        self.block = list(block)
        self.swizzle = swizzle  # bytes of a swizzled row; 0: none
        self.padding = padding
        self.count = int(np.prod(self.block))
        self.size = self.count * item
        self.period = {0: 128, 32: 256, 64: 512, 128: 1024}[swizzle]
        self.places = self.swizzled(0)

    def swizzled(self, address):
        """The byte addresses of all bytes of a block that is copied to `address`."""
        linear = address + np.arange(self.size)
        if not self.swizzle:
            return linear
        bits = {128: 7, 64: 3, 32: 1}[self.swizzle]
        return linear ^ ((linear >> 7 & bits) << 4)

    def inside(self, start):
        """(elements of the block that are inside the tensor, their byte offsets); `start` has the
        innermost coordinate first."""
        start = list(reversed(start))
        grids = np.meshgrid(
            *(s + np.arange(b) for s, b in zip(start, self.block, strict=True)), indexing="ij"
        )
        inside = np.ones(self.block, bool)
        offset = np.zeros(self.block, np.int64)
        for grid, size, stride in zip(grids, self.shape, self.strides, strict=True):
            inside &= (grid >= 0) & (grid < size)
            offset += grid * stride
        flat = inside.ravel()
        return flat, offset.ravel()[flat] * self.item + self.region.low

    def written(self, start, data):
        """(byte offsets in the region, bytes) that a store of this block writes: the part inside
        the tensor."""
        flat, offsets = self.inside(start)
        return offsets, data.reshape(self.count, self.item)[flat]

    def write(self, offsets, data, add):
        """Stores bytes at offsets in the region; add: adds float32 numbers to what is there."""
        where = offsets[:, None] + np.arange(self.item)
        if add:
            if self.item != 4:
                raise NotImplementedError("additions other than float32")
            total = self.region.bytes[where].view(np.float32) + data.view(np.float32)
            data = total.view(np.uint8)
        self.region.bytes[where] = data

    def read(self, start):
        """Returns the bytes of the block with corner `start`; zeros outside of the tensor."""
        flat, offsets = self.inside(start)
        data = np.zeros((self.count, self.item), np.uint8)
        data[flat] = self.region.bytes[offsets[:, None] + np.arange(self.item)]
        return data.ravel()
