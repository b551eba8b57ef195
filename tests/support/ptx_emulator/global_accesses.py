"""Global memory: loads, stores and atomics, and their ordering between programs."""

import numpy as np


class GlobalAccesses:
    """A part of `machine.Cta`."""

    def global_lanes(self, addresses, mask):
        if mask is None:
            return None, addresses
        threads = np.flatnonzero(mask)
        return threads, addresses[threads]

    def load_global(self, line, addresses, size, count, mask, strong=False):
        threads, mine = self.global_lanes(addresses, mask)
        results = [np.zeros(self.num_threads, f"u{size}") for _ in range(count)]
        if not len(mine):
            return results
        for region, lanes, offset in self.launch.memory.resolve(line, mine, size, size * count):
            self.note_global_read(region, line, offset, size * count, threads, lanes, strong)
            view = region.views[size]
            first = offset // size
            for k in range(count):
                values = view[first + k]
                if threads is None and lanes is None:
                    results[k] = values
                else:
                    chosen = (
                        lanes if threads is None else threads if lanes is None else threads[lanes]
                    )
                    results[k][chosen] = values
        return results

    def store_global(self, line, addresses, size, values, mask):
        threads, mine = self.global_lanes(addresses, mask)
        if not len(mine):
            return
        for region, lanes, offset in self.launch.memory.resolve(
            line, mine, size, size * len(values)
        ):
            self.note_global_write(region, line, offset, size * len(values), threads, lanes)
            view = region.views[size]
            first = offset // size
            for k, value in enumerate(values):
                mine = value
                if threads is not None or lanes is not None:
                    chosen = (
                        lanes if threads is None else threads if lanes is None else threads[lanes]
                    )
                    mine = value[chosen]
                view[first + k] = mine
                self.check_stored(line, view[first + k], mine)

    def _units(self, region, offset, total):
        first = offset // region.unit
        count = max(total // region.unit, 1)
        return first[None] + np.arange(count)[:, None]

    def _warps_of(self, threads, lanes):
        warps = self.warp if threads is None else self.warp[threads]
        return warps if lanes is None else warps[lanes]

    def _known(self, cta, epoch, warp):
        """Whether writes of those CTAs at those epochs are ordered before this one's accesses."""
        known = np.zeros(cta.shape, bool)
        for other in np.unique(cta).tolist():
            reached = self.acquired.get(other - 1)
            if reached is not None:
                known |= (cta == other) & (epoch < reached)
        return known

    def note_global_write(self, region, line, offset, total, threads, lanes):
        if not self.options.races:
            return
        if region.writer is None:
            region.writer = np.zeros(region.units, np.int32)
            region.epoch = np.zeros(region.units, np.int32)
            region.writer_warp = np.zeros(region.units, np.int16)
            region.reader = (
                region.reader if region.reader is not None else np.zeros(region.units, np.int32)
            )
        units = self._units(region, offset, total)
        warps = np.broadcast_to(self._warps_of(threads, lanes), units.shape)
        me = self.linear + 1
        writer = region.writer[units]
        foreign = (writer != 0) & (writer != me)
        if foreign.any():
            bad = foreign & ~self._known(writer, region.epoch[units], None)
            if bad.any():
                self.launch.report(
                    "global write over another program's",
                    line,
                    f"{region.name}; {int(bad.sum())} units",
                )
        own = (
            (writer == me)
            & (region.writer_warp[units] != warps)
            & (region.epoch[units] == self.epoch)
        )
        if own.any():
            self.launch.duplicates += int(own.sum())
        if region.reader is not None:
            reader = region.reader[units]
            bad = (reader != 0) & (reader != me)
            if bad.any():
                known = np.zeros(reader.shape, bool)
                for other in np.unique(reader).tolist():
                    if other - 1 in self.acquired:
                        known |= reader == other
                if (bad & ~known).any():
                    self.launch.report(
                        "global write over what another program read", line, region.name
                    )
        region.writer[units] = me
        region.epoch[units] = self.epoch
        region.writer_warp[units] = warps

    def note_global_read(self, region, line, offset, total, threads, lanes, strong):
        if not self.options.races:
            return
        units = self._units(region, offset, total)
        me = self.linear + 1
        if region.writer is not None:
            writer = region.writer[units]
            if writer.any():
                foreign = (writer != 0) & (writer != me)
                if foreign.any():
                    bad = foreign & ~self._known(writer, region.epoch[units], None)
                    if bad.any():
                        self.launch.report(
                            "global read of another program's write without acquire",
                            line,
                            f"{region.name}; {int(bad.sum())} units",
                        )
                warps = np.broadcast_to(self._warps_of(threads, lanes), units.shape)
                own = (
                    (writer == me)
                    & (region.writer_warp[units] != warps)
                    & (region.epoch[units] == self.epoch)
                )
                if own.any():
                    self.launch.report(
                        "global read of another warp's write without barrier", line, region.name
                    )
        if region.reader is None:
            region.reader = np.zeros(region.units, np.int32)
        before = region.reader[units]
        region.reader[units] = np.where((before == 0) | (before == me), me, before)

    def atomic(self, line, addresses, operation, order, values, mask):
        threads, mine = self.global_lanes(addresses, mask)
        dtype = values[0].dtype
        result = np.zeros(self.num_threads, dtype)
        if not len(mine):
            return result
        size = dtype.itemsize
        acquired: dict[int, int] = {}
        for region, lanes, offset in self.launch.memory.resolve(line, mine, size, size):
            view = region.views[size].view(dtype)
            chosen = np.arange(self.num_threads) if threads is None else threads
            chosen = chosen if lanes is None else chosen[lanes]
            for thread, at in zip(chosen.tolist(), (offset // size).tolist(), strict=True):
                old = view[at]
                x = values[0][thread]
                new = {
                    "add": lambda o=old, v=x: o + v,
                    "min": lambda o=old, v=x: min(o, v),
                    "max": lambda o=old, v=x: max(o, v),
                    "and": lambda o=old, v=x: o & v,
                    "or": lambda o=old, v=x: o | v,
                    "xor": lambda o=old, v=x: o ^ v,
                    "exch": lambda v=x: v,
                    "cas": lambda o=old, v=x, t=thread: values[1][t] if o == v else o,
                }[operation]()
                view[at] = new
                result[thread] = old
                key = (region.index, at)
                published = self.launch.published.setdefault(key, {})
                if order in ("acq_rel", "acquire"):
                    for cta, epoch in published.items():
                        acquired[cta] = max(acquired.get(cta, 0), epoch)
                if order in ("acq_rel", "release"):
                    # Publishes writes before this CTA's last barrier, and those it has acquired.
                    published[self.linear] = self.epoch
                    for cta, epoch in {**self.acquired, **acquired}.items():
                        published[cta] = max(published.get(cta, 0), epoch)
        # Approximation: on hardware, other threads acquire it only at the next barrier.
        for cta, epoch in acquired.items():
            if cta != self.linear:
                self.acquired[cta] = max(self.acquired.get(cta, 0), epoch)
        return result
