"""Check an untrusted file of torch.save before torch opens it: no code in it can run, and it cannot claim more memory
than it has bytes.

`weights_only=True` keeps code out, and would still make a `bytearray(10**12)`, resize a storage to what a tensor
claims, or hash nested tuples for years. So the pickle is interpreted first, opcode by opcode, with stand-ins for plain
values, containers, storages in the archive, and tensors that fit into them. Anything else is refused before torch sees
the file. Time and memory are proportional to the pickle, whose size is bounded.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

MAX_LISTING = 16 << 20  # bytes of an archive's list of entries; ten thousand tensors take 1 MiB
MAX_DIMENSIONS = 64
ORDERED, SIZE = "collections OrderedDict", "torch Size"
REBUILT, REBUILT_TYPED = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
PARAMETER = "torch._utils _rebuild_parameter"
OTHER_TENSORS = "torch._utils _rebuild_", "torch.sparse", "torch.serialization _get_layout"
ITEM_BYTES = {
    f"{kind}Storage": size
    for size, kinds in ((8, "Double Long"), (4, "Float Int"), (2, "BFloat16 Half Short"), (1, "Char Byte Bool"))
    for kind in kinds.split()
}
UNTYPED = ("torch.storage UntypedStorage", "torch UntypedStorage")
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING")
COUNTED = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1}  # items they take
MARKED = ("TUPLE", "SETITEMS", "APPENDS")  # they take what is above the last mark
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
MARK = object()


class RefusedPickle(Exception):
    """A file of torch.save that is refused.

    `kind` is "layout", "names" (of what it would call), "tensor" (not a plain one) or "damaged".
    """

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


class _Name(NamedTuple):
    """A class or function that the pickle names."""

    name: str


class _Storage(NamedTuple):
    """A storage in the archive: its bytes, and the bytes of an item (None where each tensor states its dtype)."""

    size: int
    item: int | None


class _Tensor:
    """Stand-in for a tensor that lies inside its storage."""


def check_pickle(path: Path, max_other_bytes: int) -> int:
    """Refuse a file that is not plain tensors, values, lists and dicts as torch.save writes them; nothing in it is run.

    At most `max_other_bytes` may be outside of tensors. Returns the storages' bytes. Raises RefusedPickle, OSError.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        listing = zipfile._EndRecData(file)
        if listing is None:
            raise RefusedPickle("damaged", "no archive of torch.save")
        if listing[zipfile._ECD_SIZE] > min(size, MAX_LISTING):
            raise RefusedPickle("layout", f"{listing[zipfile._ECD_SIZE]:,} bytes of names in {size:,}")
        try:
            with zipfile.ZipFile(file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                root = _check_layout(archive.infolist(), entries, size, max_other_bytes)
                code = archive.read(f"{root}/data.pkl")
        except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError, LookupError) as error:
            raise RefusedPickle("damaged", str(error)) from error
    prefix = f"{root}/data/"
    stored = {name.removeprefix(prefix): entry.file_size for name, entry in entries.items() if name.startswith(prefix)}
    _Interpreter(stored).run(code)
    return sum(stored.values())


def _check_layout(listed: list, entries: dict, size: int, max_other_bytes: int) -> str:
    """Return the name of the archive's one folder. RefusedPickle where it would unpack to more than its size."""
    packed = any(
        entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in listed
    )
    claimed = sum(entry.file_size for entry in listed)
    other = sum(entry.file_size for entry in listed if "/data/" not in entry.filename)
    roots = [entry.filename.removesuffix("/data.pkl") for entry in listed if entry.filename.endswith("/data.pkl")]
    if packed or claimed > size or other > max_other_bytes or len(entries) < len(listed) or len(roots) != 1:
        raise RefusedPickle("layout", f"{claimed:,} bytes in {size:,}, {other:,} of them no tensor's")
    return roots[0]


class _Interpreter:
    """Interprets one pickle with stand-ins; `stored` has the bytes of each storage of its archive, by key."""

    def __init__(self, stored: dict[str, int]):
        self.stored, self.stack, self.memo = stored, [], {}

    def run(self, code: bytes) -> None:
        try:
            for opcode, value, _ in pickletools.genops(code):
                self._step(opcode.name, value)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RefusedPickle("damaged", f"no pickle of tensors ({str(error)[:80]})") from error

    def _step(self, name: str, value) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(value)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in COUNTED or name in MARKED:
            self._collect(name, self._pop(name))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif name == "GLOBAL":
            stack.append(_check_name(value))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._reduce(called, arguments))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "BUILD":
            state, _ = stack.pop(), self._top(dict)
            if not isinstance(state, dict) or {*state} - {"_metadata"}:  # a state_dict's own attribute
                raise RefusedPickle("names", "BUILD")
        elif name != "STOP" and (name, value) != ("PROTO", 2):
            raise RefusedPickle("names", name)

    def _top(self, kind: type):
        """Return the container on top of the stack. ValueError for anything else."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} is filled")
        return self.stack[-1]

    def _pop(self, name: str) -> list:
        """Pop and return the items that an opcode takes; the mark below them goes too. ValueError without them."""
        if name in COUNTED:
            kept = first = len(self.stack) - COUNTED[name]
        else:
            kept = next((at for at in reversed(range(len(self.stack))) if self.stack[at] is MARK), -1)
            first = kept + 1
        if kept < 0:
            raise ValueError("a mark or an item is missing")
        items = self.stack[first:]
        del self.stack[kept:]
        return items

    def _collect(self, name: str, items: list) -> None:
        """Make a tuple of items, or put them into the list or dict on top of the stack."""
        if name.startswith("APPEND"):
            self._top(list).extend(items)
        elif name.startswith("SETITEM"):
            if len(items) % 2 or not all(isinstance(key, str | int | float | None) for key in items[::2]):
                raise ValueError("a key that is no text or number")
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        else:  # nested at most once: hashing shared tuples that are nested deeper takes exponential time
            if any(type(inner) is tuple and any(type(deep) is tuple for deep in inner) for inner in items):
                raise RefusedPickle("names", "tuples in tuples")
            self.stack.append(tuple(items))

    def _storage(self, named: object) -> _Storage:
        kind, of, key, _, count = named
        item = 1 if isinstance(of, _Name) and of.name in UNTYPED else ITEM_BYTES[of.name.removeprefix("torch ")]
        if kind != "storage" or type(count) is not int or not 0 <= count * item <= self.stored[key]:
            raise ValueError("a storage that the archive does not hold")
        return _Storage(count * item, None if of.name in UNTYPED else item)

    def _reduce(self, called: object, arguments: tuple) -> object:
        name = called.name if isinstance(called, _Name) else type(called).__name__
        if name == ORDERED and arguments == ():
            return {}
        if name == SIZE and _are_counts(*arguments):
            return arguments[0]
        if name == PARAMETER and isinstance(arguments[0], _Tensor) and arguments[2] == {}:
            return arguments[0]
        if name == REBUILT:
            return _check_tensor(*arguments[:6])
        if name == REBUILT_TYPED:
            return _check_tensor(*arguments[:6], arguments[6])
        raise RefusedPickle("names", name.replace(" ", "."))


def _check_name(name: str) -> _Name:
    """Return a global name that such a file may use. RefusedPickle for any other."""
    module, _, what = name.partition(" ")
    known = name in (ORDERED, SIZE, REBUILT, REBUILT_TYPED, PARAMETER, *UNTYPED)
    if known or (module == "torch" and (what in ITEM_BYTES or isinstance(getattr(torch, what, None), torch.dtype))):
        return _Name(name)
    kind = "tensor" if name.startswith(OTHER_TENSORS) else "names"
    raise RefusedPickle(kind, name.replace(" ", "."))


def _are_counts(*shapes: object) -> bool:
    """Return whether each is a list of non-negative integers, as sizes and strides are."""
    return all(
        isinstance(shape, tuple | list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(length) is int and 0 <= length < 1 << 62 for length in shape)
        for shape in shapes
    )


def _check_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, grad, hooks, dtype=None) -> _Tensor:
    """Return a stand-in for a tensor. ValueError where it does not fit its storage, which torch would enlarge."""
    plain = isinstance(storage, _Storage) and _are_counts(size, stride, (offset,))
    if not plain or len(size) != len(stride) or hooks:
        raise ValueError("a tensor that is not laid out plainly")
    item = storage.item or getattr(torch, dtype.name.removeprefix("torch ")).itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * item > storage.size:
        raise ValueError("a tensor larger than its storage")
    return _Tensor()
