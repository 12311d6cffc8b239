"""Memory of the emulated card: every access is checked before a byte moves."""

import numpy as np

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
UNWRITTEN, AGREED, SEVERAL = -1, -2, -3  # of a shared byte: who wrote or read it last, if not a warp


class Fault(Exception):
    """A program did what a card punishes, or what it leaves undefined."""


def aligned(addresses, nbytes):
    """Refuse addresses that are no multiples of what is accessed."""
    if (addresses % nbytes).any():
        wrong = addresses[addresses % nbytes != 0][0]
        raise Fault(f"misaligned: {nbytes} bytes at an address with remainder {wrong % nbytes}")


class Global:
    """Tensors by name, uint8 views of their memory; each lane's access belongs to exactly one."""

    def __init__(self, regions):
        self.regions = {name: (start, view) for name, (start, view) in regions.items() if len(view)}
        self.widths = {}  # bytes of one access per lane, by tensor

    def load(self, addresses, nbytes):
        """(lanes, nbytes) bytes."""
        found = np.empty((len(addresses), nbytes), np.uint8)
        for view, lanes, at in self._find(addresses, nbytes, "load"):
            found[lanes] = view[at]
        return found

    def store(self, addresses, values):
        """Write (lanes, nbytes) bytes."""
        for view, lanes, at in self._find(addresses, values.shape[1], "store"):
            view[at] = values[lanes]

    def _find(self, addresses, nbytes, what):
        """Of each tensor: its memory, the lanes that reach it, and where. Raises Fault if one reaches none."""
        aligned(addresses, nbytes)
        left = np.ones(addresses.shape, bool)
        for name, (start, view) in self.regions.items():
            lanes = left & (start <= addresses) & (addresses + nbytes <= start + len(view))
            if lanes.any():
                left &= ~lanes
                self.widths.setdefault(name, set()).add(nbytes)
                yield view, lanes, (addresses[lanes] - start)[:, None] + np.arange(nbytes)
            if not left.any():
                return
        raise Fault(self._nearest(int(addresses[left][0]), nbytes, what))

    def _nearest(self, address, nbytes, what):
        for name, (start, view) in self.regions.items():
            if start - 4096 < address < start + len(view) + 4096:
                at = address - start
                return f"out of bounds: a {what} of bytes {at} to {at + nbytes} of {name}, which has {len(view)}"
        return f"out of bounds: a {what} at {address:#x}, where no tensor is"


class Shared:
    """Shared memory of all programs, and between which accesses a barrier must be."""

    def __init__(self, programs, nbytes, threads):
        self.nbytes, self.threads = nbytes, threads
        self.bytes = np.zeros((programs * nbytes,), np.uint8)
        self.writer = np.full(programs * nbytes, UNWRITTEN)
        self.reader = np.full(programs * nbytes, AGREED)

    def barrier(self):
        """From here on, everyone sees what was written."""
        self.writer[self.writer != UNWRITTEN] = AGREED
        self.reader[:] = AGREED

    def load(self, lanes, addresses, nbytes):
        """(lanes, nbytes) bytes for these lanes, numbered through all programs."""
        at, warps = self._at(lanes, addresses, nbytes)
        writer = self.writer[at]
        if (writer == UNWRITTEN).any():
            raise Fault("unwritten: a load from shared memory that nothing was stored to")
        if ((writer != AGREED) & (writer != warps)).any():
            raise Fault("no barrier: a load from shared memory that another warp has just written")
        reader = self.reader[at]
        self.reader[at] = np.where((reader == AGREED) | (reader == warps), warps, SEVERAL)
        return self.bytes[at]

    def store(self, lanes, addresses, values):
        """Write (lanes, nbytes) bytes."""
        at, warps = self._at(lanes, addresses, values.shape[1])
        for last in (self.reader[at], self.writer[at]):
            if ((last != AGREED) & (last != UNWRITTEN) & (last != warps)).any():
                raise Fault("no barrier: a store to shared memory that another warp has just used")
        self.writer[at], self.bytes[at] = warps, values

    def _at(self, lanes, addresses, nbytes):
        aligned(addresses, nbytes)
        if addresses.min() < 0 or addresses.max() + nbytes > self.nbytes:
            raise Fault(f"out of bounds: shared memory has {self.nbytes} B")
        at = (lanes // self.threads * self.nbytes + addresses)[:, None] + np.arange(nbytes)
        return at, (lanes % self.threads // 32)[:, None]
