"""A set of samples' names, 16 bytes each, in 22 to 43 bytes of memory a name; a Python set takes a hundred and more."""

_SIZE = 16
_EMPTY = bytes(_SIZE)  # the name of no sample: a digest of 16 zeros is not to be met with


class SampleIdSet:
    """Names seen so far. A table with open addresses: a name's own first bytes say where it is looked for."""

    def __init__(self):
        self.count, self.slots = 0, 1024
        self.table = bytearray(_SIZE * self.slots)

    def __len__(self) -> int:
        return self.count

    def add(self, name: bytes) -> bool:
        """Add a name of 16 bytes. Returns whether it is new."""
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
