"""Shuffles, votes, reductions and matrix products (mma.sync) of a warp."""

import numpy as np

U4 = np.uint32


class Warps:
    """A part of `machine.Cta`."""

    def lanes(self, mode, b, c):
        """(the thread from which each thread reads, whether that lane is in range)."""
        key = None
        if np.ndim(b) == 0 and np.ndim(c) == 0:
            key = (mode, int(b), int(c))
            if key in self.lane_tables:
                return self.lane_tables[key]
        b = np.asarray(b).astype(np.int64)
        c = np.asarray(c).astype(np.int64)
        b = b & 31
        segment, clamp = c >> 8 & 31, c & 31
        maximum = (self.lane & segment) | (clamp & ~segment)
        minimum = self.lane & segment
        if mode == "up":
            lane = self.lane - b
            inside = lane >= maximum
        elif mode == "down":
            lane = self.lane + b
            inside = lane <= maximum
        elif mode == "bfly":
            lane = self.lane ^ b
            inside = lane <= maximum
        else:
            lane = minimum | (b & ~segment)
            inside = lane <= maximum
        source = (self.threads & ~31) + np.where(inside, lane, self.lane)
        result = (source, np.broadcast_to(inside, source.shape))
        if key:
            self.lane_tables[key] = result
        return result

    def reduce(self, operation, value, mask):
        by_warp = value.reshape(self.num_warps, 32)
        self.whole_warps(mask, 0, "redux")
        function = {
            "min": np.min, "max": np.max, "add": np.sum,
            "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
        }[operation]  # fmt: skip
        return np.repeat(function(by_warp, axis=1).astype(value.dtype), 32)

    def vote(self, mode, p, mask):
        active = np.ones(self.num_threads, bool) if mask is None else mask
        p = p.reshape(self.num_warps, 32)
        active = active.reshape(self.num_warps, 32)
        if mode == "ballot":
            bits = (p & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)
            return np.repeat(bits.sum(1).astype(U4), 32)
        if mode == "any":
            return np.repeat((p & active).any(1), 32)
        if mode == "all":
            return np.repeat((p | ~active).all(1), 32)
        raise NotImplementedError(mode)

    def elect(self, mask):
        active = np.ones(self.num_threads, bool) if mask is None else mask
        first = active.reshape(self.num_warps, 32).argmax(1)
        return np.repeat(first.astype(U4), 32), (self.lane == np.repeat(first, 32)) & active

    # --- mma.sync ---

    def _widen(self, bits, kind):
        if kind == "bf16":
            return (bits.astype(U4) << U4(16)).view(np.float32)
        if kind == "f16":
            return bits.view(np.float16).astype(np.float32)
        raise NotImplementedError(kind)

    def fragment(self, registers, kind, which):
        key = (which, kind, *map(id, registers))
        found = self.fragments.get(key)
        if found is not None:
            return found[0]
        W = self.num_warps
        n = len(registers)
        bits = np.stack(registers).view(np.uint16)  # [n, T * 2]
        if which == "a":  # [column half, row half, warp, g, t, 2] → [warp, rows, columns]
            x = bits.reshape(n // 2, 2, W, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5)
            x = x.reshape(W, 16, 4 * n)
        else:  # [row half, warp, g, t, 2] → [warp, k, n]
            x = bits.reshape(n, W, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(W, 8 * n, 8)
        value = self._widen(np.ascontiguousarray(x), kind)
        if len(self.fragments) > 512:
            self.fragments.clear()
        self.fragments[key] = (value, registers)  # keeps the registers alive, so ids stay unique
        return value

    def multiply(self, a, b, c, kind):
        """m16n8k16 and m16n8k8 on the fragments of every warp."""
        product = np.matmul(self.fragment(a, kind, "a"), self.fragment(b, kind, "b"))
        W = self.num_warps
        d = product.reshape(W, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, W * 32)
        return [(d[k] + c[k].view(np.float32)).view(U4) for k in range(4)]
