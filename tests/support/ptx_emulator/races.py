"""Happens-before between the warps of a CTA, over shared memory.

Every warp has a clock and a vector of the clocks of other warps as of their last common barrier.
For each word of shared memory, the detector stores the last writer and its clock, and for each warp
the clock of its last read. An access races if it conflicts with one that no barrier orders before
it.
"""

import numpy as np


class SharedRaces:
    """The race detector of one CTA's shared memory."""

    def __init__(self, size: int, unit: int, num_threads: int, report, async_proxy=False) -> None:
        self.unit, self.report = unit, report
        self.num_warps = -(-num_threads // 32)
        words = -(-size // unit)
        self.writer = np.full(words, -1, np.int32)  # thread
        self.written = np.zeros(words, np.int64)  # clock of its warp
        self.written_sync = np.zeros(words, np.int64)
        self.read = np.zeros((self.num_warps, words), np.int64)
        self.in_flight = np.zeros(words, bool)  # asynchronous copies without a wait so far
        self.read_by_wgmma = np.zeros(words, np.int16)
        self.read_by_store = np.zeros(words, np.int16)  # bulk copies to global memory that read it
        self.generic = np.zeros(words, bool)  # last written by the generic proxy
        # The clock of each warp's first proxy fence after the last write; 0: none.
        self.fenced = np.zeros((self.num_warps, words), np.int64) if async_proxy else None
        self.line = np.zeros(words, np.int32)  # of the last write
        # Clocks start at 1, so that 0 means never.
        self.clock = np.ones(self.num_warps, np.int64)
        self.seen = np.zeros((self.num_warps, self.num_warps), np.int64)
        self.warp_sync = np.ones(self.num_warps, np.int64)
        # The clock of each warp when its lanes last synchronised, and the lanes with accesses
        # since.
        self.synced = np.zeros(self.num_warps, np.int64)
        self.dirty = np.zeros((self.num_warps, 32), bool)
        self.used_wgmma = self.used_store = False
        self.last_read = np.zeros(words, np.int64)  # the largest clock over the warps
        self.floor = 0  # a clock that all warps have seen of all others: older accesses cannot race
        self.num_in_flight = 0

    def _words(self, addresses, size):
        """Word indices [k, lanes] of accesses of `size` bytes."""
        first = addresses.astype(np.int64) // self.unit
        count = max(size // self.unit, 1)
        return first[None] + np.arange(count)[:, None] if count > 1 else first[None]

    def _complain(self, kind, line, words, bad, threads):
        at = np.argwhere(bad)[0]
        word = int(np.broadcast_to(words, bad.shape)[tuple(at)])
        thread = int(np.broadcast_to(threads, bad.shape)[tuple(at)])
        self.report(
            kind,
            line,
            f"byte {word * self.unit} of shared memory, thread {thread}, last written by thread "
            f"{self.writer[word]} at line {self.line[word]}; {int(bad.sum())} words",
        )

    def on_read(self, line, addresses, size, threads, barrier=False):
        """Checks reads; `barrier` means those of an mbarrier by its own instructions."""
        words = self._words(addresses, size)
        warps = threads >> 5
        if not barrier:
            self.dirty[warps, threads & 31] = True
        if self.num_in_flight and self.in_flight[words].any():
            self._complain(
                "read of an asynchronous copy before its wait", line, words,
                self.in_flight[words], threads,
            )  # fmt: skip
        bad = self._unseen_writes(words, threads)
        if bad is not None and bad.any():
            self._complain("read after write without barrier", line, words, bad, threads)
        self.read[warps, words] = self.clock[warps]
        self.last_read[words] = self.clock.max()

    def _unseen_writes(self, words, threads):
        """Where another thread wrote last, not ordered before this one by a barrier; None if
        nowhere."""
        clock = self.written[words]
        if clock.max() <= self.floor:
            return None
        warps = threads >> 5
        writer = self.writer[words]
        writer_warp = writer >> 5
        same = writer_warp == warps
        bad = (writer >= 0) & ~same & (clock > self.seen[warps, writer_warp])
        bad |= same & (writer != threads) & (self.written_sync[words] >= self.warp_sync[warps])
        return bad

    def _check_write(self, line, words, threads, kind, same_values=None):
        warps = threads >> 5
        if self.num_in_flight and self.in_flight[words].any():
            self._complain(
                f"{kind} over an asynchronous copy before its wait", line, words,
                self.in_flight[words], threads,
            )  # fmt: skip
        if self.used_wgmma and self.read_by_wgmma[words].any():
            self._complain(
                f"{kind} over an operand of a wgmma before its wait", line, words,
                self.read_by_wgmma[words] > 0, threads,
            )  # fmt: skip
        if self.used_store and self.read_by_store[words].any():
            self._complain(
                f"{kind} over the source of a bulk store before its wait", line, words,
                self.read_by_store[words] > 0, threads,
            )  # fmt: skip
        bad = self._unseen_writes(words, threads)
        if bad is not None and bad.any() and same_values is not None:
            bad &= ~same_values()  # replicas of one value
        if bad is not None and bad.any():
            self._complain(f"{kind} after write without barrier", line, words, bad, threads)
        if self.last_read[words].max() <= self.floor:
            return
        reads = self.read[:, words]  # [warps, k, lanes]
        limit = self.seen.T[:, warps][:, None, :]  # [u, 1, lanes]: what the lane's warp saw of u
        others = (np.arange(self.num_warps)[:, None] != warps[None])[:, None, :]
        bad = (reads > limit) & others
        if bad.any():
            self._complain(f"{kind} after read without barrier", line, words, bad.any(0), threads)

    def on_write(
        self, line, addresses, size, threads, kind="write", generic=True, same_values=None
    ):
        words = self._words(addresses, size)
        self._check_write(line, words, threads, kind, same_values)
        warps = threads >> 5
        self.writer[words] = threads
        self.written[words] = self.clock[warps]
        self.written_sync[words] = self.warp_sync[warps]
        self.line[words] = line
        if generic:
            self.dirty[warps, threads & 31] = True
        self.generic[words] = generic
        if self.fenced is not None:
            self.fenced[:, words] = 0
        return words

    def unfenced(self, words, warp):
        """Which words the generic proxy wrote without a fence that this warp has seen since."""
        bad = self.generic[words]
        if not bad.any():
            return bad
        fenced = self.fenced[:, words]
        seen = self.seen[warp][:, None] + np.zeros_like(fenced)
        seen[warp] = self.clock[warp]
        return bad & ~((fenced > 0) & (fenced <= seen)).any(0)

    def start_copy(self, line, addresses, size, threads, generic=True):
        if not generic:
            words = self._words(addresses, size).ravel()
            bad = self.unfenced(words, int(threads[0]) >> 5)
            if bad.any():
                self._complain(
                    "bulk copy over a generic write without proxy fence", line, words, bad,
                    np.broadcast_to(threads[:1], words.shape),
                )  # fmt: skip
        words = self.on_write(line, addresses, size, threads, "asynchronous copy", generic)
        self.in_flight[words] = True
        self.num_in_flight += 1

    def land(self, addresses, size):
        words = self._words(addresses, size)
        self.in_flight[words] = False
        self.num_in_flight = int(self.in_flight.any())

    def signal(self, line, address, thread, must_be_fenced):
        """Checks the mbarrier on which a bulk copy will complete: its initialisation must be
        ordered before the copy and, if `must_be_fenced`, fenced."""
        at, threads = np.array([address]), np.array([thread])
        self.on_read(line, at, 8, threads, barrier=True)
        words = self._words(at, 8).ravel()
        bad = self.unfenced(words, thread >> 5)
        if must_be_fenced and bad.any():
            self._complain(
                "bulk copy on an mbarrier whose initialisation is not fenced", line, words, bad,
                np.broadcast_to(threads, words.shape),
            )  # fmt: skip

    def start_store(self, line, words, thread):
        """Checks unique words that the async proxy reads on behalf of one thread."""
        self.used_store = True
        warp = thread >> 5
        threads = np.full(len(words), thread)
        if self.num_in_flight and self.in_flight[words].any():
            self._complain(
                "bulk store of an asynchronous copy before its wait", line, words,
                self.in_flight[words], threads,
            )  # fmt: skip
        writer = self.writer[words]
        writer_warp = writer >> 5
        clock = self.written[words]
        same = writer_warp == warp
        bad = (writer >= 0) & ~same & (clock > self.seen[warp, writer_warp])
        bad |= same & (writer != thread) & (self.written_sync[words] >= self.warp_sync[warp])
        if bad.any():
            self._complain("bulk store after write without barrier", line, words, bad, threads)
        bad = self.unfenced(words, warp)
        if bad.any():
            self._complain(
                "bulk store after generic write without proxy fence", line, words, bad, threads
            )
        self.read_by_store[words] += 1

    def finish_store(self, words, thread):
        self.read_by_store[words] -= 1
        self.read[thread >> 5, words] = self.clock[thread >> 5]
        self.last_read[words] = self.clock.max()

    def finish_copy(self, addresses, size, threads):
        words = self._words(addresses, size)
        warps = threads >> 5
        self.in_flight[words] = False
        self.num_in_flight = int(self.in_flight.any())
        self.writer[words] = threads
        self.written[words] = self.clock[warps]
        self.written_sync[words] = self.warp_sync[warps]

    def start_wgmma(self, line, words, warps):
        """Checks unique operand words that the async proxy reads on behalf of four warps."""
        self.used_wgmma = True
        if self.num_in_flight and self.in_flight[words].any():
            self._complain(
                "wgmma of an asynchronous copy before its wait", line, words,
                self.in_flight[words], np.zeros_like(words),
            )  # fmt: skip
        writer = self.writer[words]
        writer_warp = writer >> 5
        clock = self.written[words]
        for warp in warps:
            bad = (writer >= 0) & (writer_warp != warp) & (clock > self.seen[warp, writer_warp])
            if bad.any():
                self._complain(
                    "wgmma after write without barrier", line, words, bad,
                    np.full_like(words, warp * 32),
                )  # fmt: skip
                break
        for warp in warps:
            bad = self.unfenced(words, warp)
            if bad.any():
                self._complain(
                    "wgmma after generic write without proxy fence", line, words, bad,
                    np.full_like(words, warp * 32),
                )  # fmt: skip
                break
        self.read_by_wgmma[words] += 1

    def finish_wgmma(self, words, warps):
        self.read_by_wgmma[words] -= 1
        for warp in warps:
            self.read[warp, words] = self.clock[warp]
        self.last_read[words] = self.clock.max()

    def fence_proxy(self, warps):
        if self.fenced is None:
            return
        words = np.flatnonzero(self.generic)
        writer_warp, written = self.writer[words] >> 5, self.written[words]
        for warp in warps:
            ordered = (writer_warp == warp) | (written <= self.seen[warp, writer_warp])
            mine = words[ordered]
            fenced = self.fenced[warp, mine]
            # Keeps the first fence after the write, which other warps see earliest.
            self.fenced[warp, mine] = np.where(fenced == 0, self.clock[warp], fenced)

    def barrier(self, warps):
        self.synced[warps] = self.clock[warps]
        self.dirty[warps] = False
        if len(warps) == self.num_warps:
            self.seen[:] = self.clock
            self.floor = int(self.clock.min())
            self.clock += 1
            self.warp_sync += 1
            return
        joined = self.seen[warps].max(0)
        joined[warps] = self.clock[warps]
        self.seen[warps] = joined
        self.clock[warps] += 1
        self.warp_sync[warps] += 1

    def sync_warp(self, warps):
        self.warp_sync[warps] += 1
        self.synced[warps] = self.clock[warps]
        self.clock[warps] += 1
        self.dirty[warps] = False

    def release(self, warp, thread=None):
        """The clocks that an arrival of this warp publishes; that of a single thread excludes what
        other lanes did since the lanes last synchronised."""
        published = self.seen[warp].copy()
        published[warp] = self.clock[warp]
        if thread is not None and self.dirty[warp].any():
            others = self.dirty[warp].copy()
            others[thread & 31] = False
            if others.any():
                published[warp] = self.synced[warp]
        self.clock[warp] += 1
        return published

    def acquire(self, warps, published):
        self.seen[warps] = np.maximum(self.seen[warps], published)


class RacesOfUnit:
    """The CTA's race detector for a `specialised.Unit`, which counts threads and warps from 0."""

    def __init__(self, races, first: int) -> None:
        self.races, self.first, self.first_warp = races, first, first >> 5
        self.unit = races.unit
        self.land = races.land

    def on_read(self, line, addresses, size, threads, barrier=False):
        self.races.on_read(line, addresses, size, threads + self.first, barrier)

    def on_write(self, line, addresses, size, threads, *args, **kwargs):
        return self.races.on_write(line, addresses, size, threads + self.first, *args, **kwargs)

    def start_copy(self, line, addresses, size, threads, generic=True):
        self.races.start_copy(line, addresses, size, threads + self.first, generic)

    def finish_copy(self, addresses, size, threads):
        self.races.finish_copy(addresses, size, threads + self.first)

    def signal(self, line, address, thread, must_be_fenced):
        self.races.signal(line, address, thread + self.first, must_be_fenced)

    def start_store(self, line, words, thread):
        self.races.start_store(line, words, thread + self.first)

    def finish_store(self, words, thread):
        self.races.finish_store(words, thread + self.first)

    def start_wgmma(self, line, words, warps):
        self.races.start_wgmma(line, words, [w + self.first_warp for w in warps])

    def finish_wgmma(self, words, warps):
        self.races.finish_wgmma(words, [w + self.first_warp for w in warps])

    def fence_proxy(self, warps):
        self.races.fence_proxy(warps + self.first_warp)

    def sync_warp(self, warps):
        self.races.sync_warp(warps + self.first_warp)

    def release(self, warp, thread=None):
        return self.races.release(warp + self.first_warp, thread)

    def acquire(self, warps, published):
        self.races.acquire(warps + self.first_warp, published)
