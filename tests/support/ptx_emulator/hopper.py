"""Features of sm_90: mbarriers, bulk tensor copies, wgmma."""

import numpy as np

U4 = np.uint32


class _Mbarrier:
    """One mbarrier object: the arrivals and bytes for which its phase still waits."""

    def __init__(self, count: int, num_warps: int) -> None:
        self.count = self.pending = count
        self.phase = 0
        self.bytes = 0
        self.copies: list = []
        self.published = np.zeros(num_warps, np.int64)
        self.visible = np.zeros(num_warps, np.int64)  # published by completed phases

    def advance(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.visible = self.published.copy()


class Hopper:
    """A part of `machine.Cta`."""

    def init_hopper(self) -> None:
        self.total_warps = self.num_warps
        self.mbarriers: dict[int, _Mbarrier] = {}
        self.stores_open: dict[int, list] = {}  # uncommitted bulk stores by thread
        self.stores: dict[int, list] = {}  # by thread: groups of bulk stores
        self.wgmma_open: dict[int, list] = {}  # by warpgroup
        self.wgmma_groups: dict[int, list] = {}
        self.wgmma_tables: dict = {}
        # By warpgroup: the registers at its last wgmma.fence and, by the identity of their arrays,
        # the shapes of the wgmma that have written to registers since.
        self.wgmma_fenced: dict[int, list] = {}
        self.wgmma_written: dict[int, dict] = {}
        # Accumulators in flight, by the identity of their register's array: a register that is
        # moved in the meantime shares the array and so gets the result too.
        self.wgmma_arrays: dict[int, np.ndarray] = {}
        self.wgmma_values: dict[tuple[int, int], tuple] = {}  # (array, warpgroup) → (array, value)

    def fence_proxy(self, m) -> None:
        if self.races:
            warps = np.arange(self.num_warps) if m is None else np.unique(self.warp[m])
            self.races.fence_proxy(warps)

    # --- mbarriers ---

    def _one_each(self, addresses, mask):
        threads = self.threads if mask is None else np.flatnonzero(mask)
        return [(int(t), int(addresses[t])) for t in threads]

    def init_mbarrier(self, line, addresses, counts, mask) -> None:
        for thread, address in self._one_each(addresses, mask):
            if self.races:
                self.races.on_write(line, np.array([address]), 8, np.array([thread]))
            self.mbarriers[address] = _Mbarrier(int(counts[thread]), self.total_warps)

    def drop_mbarrier(self, line, addresses, mask) -> None:
        for thread, address in self._one_each(addresses, mask):
            barrier = self.mbarriers.pop(address, None)
            if barrier is None:
                self.launch.report("mbarrier.inval of none", line, f"{address}")
            elif barrier.copies:
                self.launch.report("mbarrier.inval with copies in flight", line, f"{address}")
            if self.races:
                fenced = self.options.mbarrier_fence
                at, threads = np.array([address]), np.array([thread])
                self.races.on_write(line, at, 8, threads, generic=fenced)

    def _mbarrier(self, line, address):
        barrier = self.mbarriers.get(address)
        if barrier is None:
            self.launch.report("mbarrier that is not initialised", line, f"{address}")
            barrier = self.mbarriers[address] = _Mbarrier(1, self.total_warps)
        return barrier

    def arrive_mbarrier(self, line, addresses, counts, transfer, mask) -> None:
        for thread, address in self._one_each(addresses, mask):
            barrier = self._mbarrier(line, address)
            if transfer:
                barrier.bytes += int(counts[thread])
                barrier.pending -= 1
            else:
                barrier.pending -= 1 if counts is None else int(counts[thread])
            if barrier.pending < 0:
                self.launch.report("more arrivals than an mbarrier counts", line, f"{address}")
            if self.races:
                self.races.on_read(line, np.array([address]), 8, np.array([thread]), barrier=True)
                published = self.races.release(self.warp[thread], thread)
                barrier.published = np.maximum(barrier.published, published)
            barrier.advance()

    def test_mbarrier(self, line, addresses, parity, mask):
        """Whether the phase of that parity is complete; its copies land when it is tested, no
        earlier."""
        done = np.zeros(self.num_threads, bool)
        threads = self.threads if mask is None else np.flatnonzero(mask)
        mine = addresses[threads].astype(np.int64)
        for address in np.unique(mine).tolist():
            these = threads[mine == address]
            barrier = self._mbarrier(line, address)
            for wanted in np.unique(parity[these]).tolist():
                those = these[parity[these] == wanted]
                if barrier.phase == (wanted & 1):
                    self._land(barrier)
                if barrier.phase != (wanted & 1):
                    done[those] = True
                    if self.races:
                        # Waits and arrivals race only with the barrier's init and inval.
                        self.races.on_read(
                            line, np.full(len(those), address), 8, those, barrier=True
                        )
                        self.races.acquire(np.unique(self.warp[those]), barrier.visible)
        return done

    # --- bulk tensor copies ---

    def tensor_copy(self, line, destination, descriptor, coordinates, barrier, mask) -> None:
        threads = self.threads if mask is None else np.flatnonzero(mask)
        for thread in threads.tolist():
            tensor = self.launch.descriptors.get(int(descriptor[thread]))
            if tensor is None:
                self.launch.report("bulk copy from no descriptor", line, "")
                continue
            start = [int(c[thread]) for c in coordinates]
            address = int(destination[thread])
            places, offsets = tensor.places, tensor.size
            aligned = 128
            if address % aligned or address < 1024 or address + offsets > self.shared_end:
                self.launch.report(
                    "bulk copy to a misaligned or foreign address",
                    line,
                    f"{address}, {offsets} bytes",
                )
                continue
            if (address % tensor.period) and tensor.swizzle:
                # The hardware swizzles by bits of the address, not of the offset.
                places = tensor.swizzled(address) - address
            words = address + np.arange(0, tensor.size, 4)
            if self.races:
                lanes = np.full(len(words), thread)
                self.races.start_copy(line, words, 4, lanes, generic=False)
            self.shared[address : address + tensor.size] = 0xFF
            bar = self._mbarrier(line, int(barrier[thread]))
            if self.races:
                self.races.signal(line, int(barrier[thread]), thread, self.options.mbarrier_fence)
                published = self.races.release(self.warp[thread])
                bar.published = np.maximum(bar.published, published)
            bar.copies.append((line, tensor, start, address, places, thread))

    # A bulk store reads shared memory as late as possible, at its wait; its writes land then.

    def tensor_store(self, line, descriptor, coordinates, source, mask, add) -> None:
        threads = self.threads if mask is None else np.flatnonzero(mask)
        for thread in threads.tolist():
            tensor = self.launch.descriptors.get(int(descriptor[thread]))
            if tensor is None:
                self.launch.report("bulk store to no descriptor", line, "")
                continue
            start, address = [int(c[thread]) for c in coordinates], int(source[thread])
            if address % 128 or address < 1024 or address + tensor.size > self.shared_end:
                self.launch.report(
                    "bulk store from a misaligned or foreign address",
                    line,
                    f"{address}, {tensor.size} bytes",
                )
                continue
            places = tensor.places
            if (address % tensor.period) and tensor.swizzle:
                places = tensor.swizzled(address) - address
            words = None
            if self.races:
                words = np.unique((address + np.arange(tensor.size)) // self.races.unit)
                self.races.start_store(line, words, thread)
            store = (line, tensor, start, address, places, words, thread, add)
            self.stores_open.setdefault(thread, []).append(store)

    def commit_stores(self, mask) -> None:
        for thread in (self.threads if mask is None else np.flatnonzero(mask)).tolist():
            self.stores.setdefault(thread, []).append(self.stores_open.pop(thread, []))

    def wait_stores(self, keep, mask) -> None:
        for thread in (self.threads if mask is None else np.flatnonzero(mask)).tolist():
            groups = self.stores.get(thread, [])
            while len(groups) > keep:
                for store in groups.pop(0):
                    self.finish_store(*store)

    def finish_store(self, line, tensor, start, address, places, words, thread, add) -> None:
        offset, data = tensor.written(start, self.shared[address + places])
        if self.races:
            self.races.finish_store(words, thread)
        if len(offset) and not add:  # additions are atomic for each number
            threads = np.full(len(offset), thread)
            self.note_global_write(tensor.region, line, offset, tensor.item, threads, None)
        tensor.write(offset, data, add)

    def finish_stores(self) -> None:
        groups = [*self.stores_open.values(), *(g for gs in self.stores.values() for g in gs)]
        for stores in groups:
            for store in stores:
                self.launch.report("bulk store still reads shared memory at the end", store[0], "")
                self.finish_store(*store)

    def _land(self, barrier) -> None:
        for line, tensor, start, address, places, _ in barrier.copies:
            data = tensor.read(start)
            self.shared[address + places] = data
            if self.races:
                self.races.land(address + np.arange(0, tensor.size, 4), 4)
            barrier.bytes -= tensor.size
            if barrier.bytes < 0:
                self.launch.report("more bytes than an mbarrier expects", line, "")
        barrier.copies.clear()
        barrier.advance()

    # --- wgmma ---

    def fence_wgmma(self, R, m) -> None:
        for group in self._groups(m):
            self.wgmma_fenced[group] = list(R)
            self.wgmma_written[group] = {}

    def _check_fence(self, line, R, accumulators, operands, n, group, m) -> None:
        """Reports a missing wgmma.fence. One is needed between writes to a register (which replace
        its array) and a wgmma that uses it, unless only wgmma of that shape wrote to it, as their
        accumulator."""
        if group not in self.wgmma_fenced:
            self.launch.report("wgmma before any wgmma.fence", line, f"warpgroup {group}")
        fenced = self.wgmma_fenced.setdefault(group, list(R))
        written = self.wgmma_written.setdefault(group, {})
        mine = slice(group * 128, group * 128 + 128)
        for index in (*accumulators, *operands):
            array, before = R[index], fenced[index]
            if id(array) in written:
                ordered = index in accumulators and written[id(array)][1] == n
            else:  # partly: threads of another warpgroup may have written to theirs
                ordered = array is before or (m is not None and (array == before)[mine].all())
            if not ordered:
                kind = "an accumulator" if index in accumulators else "an operand"
                self.launch.report(f"wgmma after write to {kind} without wgmma.fence", line, "")
                return

    def _groups(self, m):
        if m is None:
            return list(range(self.num_warps // 4))
        by_group = m.reshape(-1, 128)
        some = by_group.any(1)
        if (some != by_group.all(1)).any():
            self.launch.report("wgmma without the whole warpgroup", 0, "")
        return np.flatnonzero(some).tolist()

    def _operand(self, line, descriptor, rows, k, transposed, item):
        """Byte addresses [rows, k] of an operand described by a shared-memory descriptor.

        rows: M or N. K is contiguous ("K-major") unless transposed ("MN-major").
        """
        key = (descriptor, rows, k, transposed, item)
        found = self.wgmma_tables.get(key)
        if found is not None:
            return found
        start = (descriptor & 0x3FFF) << 4
        leading = (descriptor >> 16 & 0x3FFF) << 4
        stride = (descriptor >> 32 & 0x3FFF) << 4
        base_offset = descriptor >> 49 & 7
        mode = descriptor >> 62 & 3
        width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of a swizzled row
        if base_offset:
            raise NotImplementedError("base offset of a descriptor")
        if mode == 0:
            raise NotImplementedError("operand without swizzle")
        r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
        if not transposed:
            # Atoms of 8 rows × width bytes; stride between groups of 8 rows.
            if k * item > width:
                raise NotImplementedError("K wider than the swizzle")
            linear = start + (r // 8) * stride + (r % 8) * width + c * item
        else:
            # Atoms of 8 k × width bytes of rows; leading: between atoms along the rows,
            # stride: between atoms along k.
            per_atom = width // item
            linear = (
                start
                + (r // per_atom) * leading
                + (r % per_atom) * item
                + (c // 8) * stride
                + (c % 8) * width
            )
        bits = {128: 7, 64: 3, 32: 1}[width]
        swizzled = linear ^ ((linear >> 7 & bits) << 4)
        if swizzled.min() < 1024 or swizzled.max() + item > self.shared_end:
            self.launch.report("wgmma operand out of bounds", line, hex(descriptor))
            swizzled = np.clip(swizzled, 1024, self.shared_end - item)
        if len(self.wgmma_tables) > 4096:
            self.wgmma_tables.clear()
        words = np.unique(swizzled.ravel() // (self.races.unit if self.races else 4))
        self.wgmma_tables[key] = swizzled, words
        return swizzled, words

    def wgmma(self, line, R, indices, a, b, scale, n, k, kinds, transposed, m, operands=()) -> None:
        """`operands` are the registers of A; `a` is their content, or a descriptor of shared
        memory."""
        kind = kinds[1]
        item = 2
        if kinds[0] != "f32" or kind not in ("f16", "bf16"):
            raise NotImplementedError(f"wgmma {kinds}")
        groups = self._groups(m)
        products = {}
        for group in groups:
            first = group * 128
            used = []
            self._check_fence(line, R, indices, operands, n, group, m)
            if isinstance(a, list):
                # Four registers, like A of m16n8k16, for each of the four warps.
                bits = np.stack([x[first : first + 128] for x in a]).view(np.uint16)
                x = bits.reshape(2, 2, 4, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(64, 16)
                left = self._widen(np.ascontiguousarray(x), kind)
            else:
                descriptor = self._uniform(line, a[first : first + 128])
                where, words = self._operand(line, descriptor, 64, k, transposed[0], item)
                used.append(words)
                left = self._widen(self.shared_views[2][where >> 1], kind)
            descriptor = self._uniform(line, b[first : first + 128])
            where, words = self._operand(line, descriptor, n, k, transposed[1], item)
            used.append(words)
            right = self._widen(self.shared_views[2][where >> 1], kind)
            product = left @ right.T  # [64, n]
            # [4 warps, row half, g, n / 8, t, 2] → register [n / 8, row half, 2] of [warp, g, t]
            d = product.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
            d = np.ascontiguousarray(d).reshape(n // 2, 128)
            keep = bool(scale[first])
            words = np.unique(np.concatenate(used))
            warps = [4 * group + w for w in range(4)]
            if self.races:
                self.races.start_wgmma(line, words, warps)
            products[group] = d, keep, words, warps
        fresh = []  # the accumulators, NaN until the wait
        for index in indices:
            array = R[index]
            if id(array) in self.wgmma_arrays:  # already pending: the same accumulator
                fresh.append(array)
                continue
            copy = array.copy()
            R[index] = copy
            self.wgmma_arrays[id(copy)] = copy
            fresh.append(copy)
        for group, (d, keep, words, warps) in products.items():
            mine = slice(group * 128, group * 128 + 128)
            keys = [(id(array), group) for array in fresh]
            written = self.wgmma_written.setdefault(group, {})
            written.update((id(array), (array, n)) for array in fresh)
            for row, (key, array) in enumerate(zip(keys, fresh, strict=True)):
                if not keep:
                    value = d[row].copy()
                elif key in self.wgmma_values:
                    value = self.wgmma_values[key][1] + d[row]
                else:
                    value = array[mine].view(np.float32) + d[row]
                self.wgmma_values[key] = array, value
                array[mine] = 0xFFFFFFFF
            self.wgmma_open.setdefault(group, []).append((keys, words, warps))

    def _uniform(self, line, values) -> int:
        if (values != values[0]).any():
            self.launch.report("wgmma descriptor differs within a warpgroup", line, "")
        return int(values[0])

    def commit_wgmma(self, m) -> None:
        for group in self._groups(m):
            self.wgmma_groups.setdefault(group, []).append(self.wgmma_open.pop(group, []))

    def wait_wgmma(self, keep, m) -> None:
        for group in self._groups(m):
            queue = self.wgmma_groups.get(group, [])
            finished = queue[: len(queue) - keep] if keep else queue
            left = queue[len(queue) - keep :] if keep else []
            self.wgmma_groups[group] = left
            still = {key for g in left for keys, _, _ in g for key in keys}
            still |= {key for keys, _, _ in self.wgmma_open.get(group, []) for key in keys}
            for operations in finished:
                for keys, words, warps in operations:
                    if self.races:
                        self.races.finish_wgmma(words, warps)
                    for key in keys:
                        if key in still or key not in self.wgmma_values:
                            continue
                        array, value = self.wgmma_values.pop(key)
                        first = key[1] * 128
                        array[first : first + 128] = value.view(U4)
                        if not any(k[0] == key[0] for k in self.wgmma_values):
                            self.wgmma_arrays.pop(key[0], None)
