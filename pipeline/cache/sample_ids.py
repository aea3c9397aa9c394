"""SampleIdSet: a set of 16-byte sample ids in 22 to 43 bytes of memory each; a Python set takes over a hundred."""

_SIZE = 16
_EMPTY = bytes(_SIZE)  # marks a free slot: no digest is 16 zeros in practice


class SampleIdSet:
    """A hash table with open addressing, keyed by the first bytes of an id, which is a digest already."""

    def __init__(self):
        self.count, self.slots = 0, 1024
        self.table = bytearray(_SIZE * self.slots)

    def __len__(self) -> int:
        return self.count

    def add(self, name: bytes) -> bool:
        """Add an id of 16 bytes. Returns whether it is new."""
        assert len(name) == _SIZE and name != _EMPTY, f"{name!r} is no sample's name"
        if not self._put(name):
            return False
        self.count += 1
        if 4 * self.count > 3 * self.slots:
            self._grow()
        return True

    def _put(self, name: bytes) -> bool:
        table, slots = self.table, self.slots
        slot = int.from_bytes(name[:8], "little") % slots
        while (held := table[_SIZE * slot : _SIZE * (slot + 1)]) != _EMPTY:
            if held == name:
                return False
            slot = (slot + 1) % slots
        table[_SIZE * slot : _SIZE * (slot + 1)] = name
        return True

    def _grow(self) -> None:
        old, size = self.table, len(self.table)
        self.slots *= 2
        self.table = bytearray(2 * size)
        for at in range(0, size, _SIZE):
            name = old[at : at + _SIZE]
            if name != _EMPTY:
                self._put(name)
