"""Shared memory: loads and stores, matrices, and copies that land later (cp.async)."""

import numpy as np

SHARED_BASE = 1024  # the first address of a program's dynamic shared memory
U4 = np.uint32


class SharedAccesses:
    """A part of `machine.Cta`."""

    def shared_lanes(self, line, addresses, total, mask):
        """(threads, addresses as int64) of the active, legal accesses."""
        if mask is None:
            threads, mine = self.threads, addresses.astype(np.int64)
        else:
            threads = np.flatnonzero(mask)
            mine = addresses[threads].astype(np.int64)
        if not len(threads):
            return threads, mine
        if (mine & (min(total, 16) - 1)).any():
            at = int(np.flatnonzero(mine & (min(total, 16) - 1))[0])
            self.launch.report("misaligned shared access", line, f"{int(mine[at])}, {total} bytes")
        low, high = int(mine.min()), int(mine.max())
        if low < SHARED_BASE or high + total > self.shared_end:
            self.launch.report(
                "shared access out of bounds",
                line,
                f"bytes {low - SHARED_BASE} … {high + total - SHARED_BASE} of "
                f"{self.shared_end - SHARED_BASE}",
            )
            good = (mine >= SHARED_BASE) & (mine + total <= self.shared_end)
            threads, mine = threads[good], mine[good]
        return threads, mine

    def load_shared(self, line, addresses, size, count, mask):
        threads, mine = self.shared_lanes(line, addresses, size * count, mask)
        view = self.shared_views[size]
        results = []
        if len(threads) and self.races:
            self.races.on_read(line, mine, size * count, threads)
        first = mine // size
        for k in range(count):
            if len(threads) == self.num_threads:
                results.append(view[first + k])
            else:
                out = np.zeros(self.num_threads, view.dtype)
                out[threads] = view[first + k]
                results.append(out)
        return results

    def store_shared(self, line, addresses, size, values, mask):
        threads, mine = self.shared_lanes(line, addresses, size * len(values), mask)
        if not len(threads):
            return
        view = self.shared_views[size]
        first = mine // size

        def same_values():
            same = [view[first + k] == value[threads] for k, value in enumerate(values)]
            return np.repeat(np.stack(same), size // self.races.unit, axis=0)

        if self.races:
            self.races.on_write(line, mine, size * len(values), threads, same_values=same_values)
        for k, value in enumerate(values):
            mine = value if len(threads) == self.num_threads else value[threads]
            view[first + k] = mine
            self.check_stored(line, view[first + k], mine)

    def check_stored(self, line, found, meant) -> None:
        """Threads that store to the same place in one instruction must agree."""
        if (found != meant).any():
            self.launch.report(
                "different values stored to one address",
                line,
                f"{int((found != meant).sum())} lanes",
            )

    def whole_warps(self, mask, line, what):
        if mask is None:
            return np.arange(self.num_warps)
        by_warp = mask.reshape(self.num_warps, 32)
        some = by_warp.any(1)
        if not (by_warp.all(1) == some).all():
            self.launch.report(f"{what} without the whole warp", line, "")
        return np.flatnonzero(some)

    def load_matrix(self, line, addresses, count, transposed, mask):
        warps = self.whole_warps(mask, line, "ldmatrix")
        by_warp = addresses.reshape(self.num_warps, 32)[warps]
        rows = by_warp[:, : 8 * count].astype(np.int64).reshape(len(warps), count, 8)
        flat = rows.ravel()
        legal = self.matrix_bounds(line, flat)
        if not legal:
            return [np.full(self.num_threads, 0xFFFFFFFF, U4)] * count
        if self.races:
            receivers = self.receivers(warps, count, transposed)
            words = (rows[..., None] + 4 * np.arange(4)).ravel()
            self.races.on_read(line, words, 4, receivers)
        gathered = self.shared_views[4][(rows >> 2)[..., None] + np.arange(4)]  # [W, i, 8, 4]
        if transposed:
            halves = gathered.view(np.uint16)  # [W, i, 8 rows, 8 columns]
            gathered = np.ascontiguousarray(halves.swapaxes(2, 3)).view(U4)
        results = []
        for i in range(count):
            part = gathered[:, i].reshape(len(warps), 32)
            if len(warps) == self.num_warps:
                results.append(np.ascontiguousarray(part).ravel())
            else:
                out = np.zeros((self.num_warps, 32), U4)
                out[warps] = part
                results.append(out.ravel())
        return results

    def receivers(self, warps, count, transposed):
        """The lanes of a warp that receive the words of each row; if transposed, the first of the
        two lanes that share a word."""
        key = ("matrix", count, transposed, len(warps))
        if len(warps) == self.num_warps and key in self.lane_tables:
            return self.lane_tables[key]
        row, word = np.arange(8)[:, None], np.arange(4)
        lanes = 8 * word + row // 2 if transposed else 4 * row + word
        lanes = warps[:, None, None, None] * 32 + lanes
        lanes = np.broadcast_to(lanes, (len(warps), count, 8, 4)).ravel()
        if len(warps) == self.num_warps:
            self.lane_tables[key] = lanes
        return lanes

    def matrix_bounds(self, line, flat) -> bool:
        if (flat & 15).any():
            self.launch.report("misaligned matrix row", line, "")
            return False
        if flat.min() < SHARED_BASE or flat.max() + 16 > self.shared_end:
            self.launch.report(
                "shared access out of bounds", line,
                f"bytes {int(flat.min()) - SHARED_BASE} … {int(flat.max()) + 16 - SHARED_BASE} of "
                f"{self.shared_end - SHARED_BASE}",
            )  # fmt: skip
            return False
        return True

    def store_matrix(self, line, addresses, values, transposed, mask):
        warps = self.whole_warps(mask, line, "stmatrix")
        count = len(values)
        rows = addresses.reshape(self.num_warps, 32)[warps][:, : 8 * count]
        rows = rows.astype(np.int64).reshape(len(warps), count, 8)
        if not self.matrix_bounds(line, rows.ravel()):
            return
        data = np.stack([v.reshape(self.num_warps, 32)[warps] for v in values], 1)
        data = data.reshape(len(warps), count, 8, 4)
        if transposed:
            halves = np.ascontiguousarray(data).view(np.uint16)
            data = np.ascontiguousarray(halves.swapaxes(2, 3)).view(U4)
        words = (rows[..., None] + 4 * np.arange(4)).ravel()
        if self.races:
            lanes = warps[:, None, None, None] * 32 + (np.arange(8)[:, None] * 4 + np.arange(4))
            lanes = np.broadcast_to(lanes, (len(warps), count, 8, 4)).ravel()

            def same_values():
                same = self.shared_views[4][words >> 2] == data.ravel()
                return np.repeat(same[None], 4 // self.races.unit, axis=0)

            self.races.on_write(line, words, 4, lanes, same_values=same_values)
        self.shared_views[4][words >> 2] = data.ravel()
        self.check_stored(line, self.shared_views[4][words >> 2], data.ravel())

    # --- cp.async ---

    def copy(self, line, destination, source, size, read, mask):
        threads, mine = self.shared_lanes(line, destination, size, mask)
        if not len(threads):
            return
        data = np.zeros((len(threads), size), np.uint8)
        wanted = (
            np.full(len(threads), size)
            if read is None
            else np.minimum(read[threads].astype(np.int64), size)
        )
        for amount in np.unique(wanted).tolist():
            if amount == 0:
                continue
            these = np.flatnonzero(wanted == amount)
            addresses = source[threads[these]]
            unit = 16 if amount == 16 else amount
            if amount & (amount - 1):
                raise NotImplementedError("cp.async of an odd size")
            for region, lanes, offset in self.launch.memory.resolve(
                line, addresses, min(unit, 8), amount
            ):
                rows = these if lanes is None else these[lanes]
                self.note_global_read(region, line, offset, amount, threads[these], lanes, False)
                data[rows[:, None], np.arange(amount)] = region.bytes[
                    offset[:, None] + np.arange(amount)
                ]
        if self.races:
            self.races.start_copy(line, mine, size, threads)
        spread = mine[:, None] + np.arange(size)
        self.shared[spread] = 0xFF
        self.copies.append((threads, mine, size, data, self.committed[self.warp[threads]]))

    def commit_copies(self, mask) -> None:
        if mask is None:
            self.committed += 1
        else:
            self.committed[np.unique(self.warp[mask])] += 1

    def wait_copies(self, keep, mask) -> None:
        kept = []
        for threads, mine, size, data, group in self.copies:
            # Groups are numbered from 0; `committed` counts the closed ones.
            land = group < self.committed[self.warp[threads]] - keep
            if mask is not None:
                land &= mask[threads]
            if not land.any():
                kept.append((threads, mine, size, data, group))
                continue
            chosen = slice(None) if land.all() else np.flatnonzero(land)
            where, moved = mine[chosen], data[chosen]
            self.shared[where[:, None] + np.arange(size)] = moved
            if self.races:
                self.races.finish_copy(where, size, threads[chosen])
            if not land.all():
                rest = np.flatnonzero(~land)
                kept.append((threads[rest], mine[rest], size, data[rest], group[rest]))
        self.copies = kept
