"""The guard before torch.load: what torch.save writes of tensors passes, and what would harm is refused unopened."""

import collections
import io
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, UsageError
from pipeline.pickles import RefusedPickle, check_pickle
from pipeline.published.weights import open_weights
from stages.import_cache.source import load

ROOT = Path(__file__).resolve().parent.parent
MOST = 1 << 20


def module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))


TIED = torch.arange(6.0)
SAVED = {
    "a state dict with its metadata": module().state_dict(),
    "parameters": dict(module().named_parameters()),
    "a training state": {"model": module().state_dict(), "step": 3, "lr": 1e-3, "done": False, "best": None},
    "an optimizer's state": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    "every type": {str(dtype): torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int8)},
    "whole numbers and masks": {"ids": torch.arange(5), "mask": torch.arange(5) > 2, "bytes": torch.ones(2).byte()},
    "fp8": {"states": torch.ones(4).to(torch.float8_e4m3fn)},
    "views of one storage": {"all": TIED, "tail": TIED[2:], "turned": TIED.view(2, 3).T, "wide": TIED[:1].expand(4)},
    "no dimension, no value": {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 7)},
    "sizes, types and lists": {"shape": torch.Size([2, 3]), "dtype": torch.bfloat16, "layers": [1, (2, 3)], "who": "é"},
    "large numbers": {"many": 1 << 60, "more": 1 << 200, "less": -5},
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_of_tensors_and_values_passes(name, tmp_path):
    torch.save(SAVED[name], tmp_path / "x.ckpt")
    check_pickle(tmp_path / "x.ckpt", MOST)
    held = load(tmp_path / "x.ckpt")
    assert held.keys() == SAVED[name].keys()


def archive(path: Path, code: bytes, storages: dict[str, bytes] | None = None, extra=()) -> Path:
    """An archive laid out as torch.save does, with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", code)
        for key, data in (storages or {"0": bytes(64)}).items():
            made.writestr(f"x/data/{key}", data)
        for name, data in (("x/version", b"3\n"), *extra):
            made.writestr(name, data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(16) + b"tQ"


def tensor(size: bytes, stride: bytes, offset: int = 0, storage: bytes = STORAGE) -> bytes:
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", storage, number(offset), size, stride, b"\x89", hooks)


def shape(*lengths: int) -> bytes:
    return b"(" + b"".join(map(number, lengths)) + b"t"


def held(value: bytes) -> bytes:
    return b"\x80\x02}" + text("x") + value + b"s."


BIG_CLAIM = STORAGE.replace(number(16), number(1 << 40))
DEEP = b"".join([b"\x80\x02}", text("x"), b"K\x01q\x00", *[b"h\x00h\x00\x86q\x00"] * 60, b"s."])
HOSTILE = {
    "bytearray of 3e9": (held(called("__builtin__", "bytearray", number(3 * 10**9))), "names"),
    "bytearray by its new name": (held(called("builtins", "bytearray", number(3 * 10**9))), "names"),
    "zeros of torch": (held(called("torch", "zeros", number(10**12))), "names"),
    "a function of the system": (held(called("posix", "system", text("true"))), "names"),
    "an encoded text": (held(called("_codecs", "encode", text("x"), text("utf_8"))), "names"),
    "numpy": (held(called("numpy.core.multiarray", "_reconstruct")), "names"),
    "counters": (held(called("collections", "Counter", text("x" * 9))), "names"),
    "a name from the stack": (b"\x80\x04" + text("posix") + text("system") + b"\x93.", "names"),
    "a byte array of 2^60": (b"\x80\x02\x96" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
    "bytes of 2^31": (b"\x80\x02\x8e" + struct.pack("<Q", 1 << 31) + b".", "damaged"),
    "a frame of 2^60": (b"\x80\x02\x95" + struct.pack("<Q", 1 << 60) + b"N.", "names"),
    "a text of 4 GB": (b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b".", "damaged"),
    "a place of 2^32 in the memo, and a call": (
        b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b"cos\ngetcwd\n)R.",
        "names",
    ),
    "tuples in tuples, as a key": (b"\x80\x02}K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00K\x01s.", "names"),
    "tuples in tuples": (DEEP, "names"),
    "a key that is a tuple": (b"\x80\x02})K\x01s.", "damaged"),
    "a storage larger than its bytes": (held(tensor(shape(4), shape(1), storage=BIG_CLAIM)), "damaged"),
    "a storage that is not there": (
        held(tensor(shape(4), shape(1), storage=STORAGE.replace(text("0"), text("9")))),
        "damaged",
    ),
    "a tensor larger than its storage": (held(tensor(shape(1 << 40), shape(1))), "damaged"),
    "a tensor one past the end": (held(tensor(shape(16), shape(1), 1)), "damaged"),
    "a tensor of wide steps": (held(tensor(shape(2), shape(1 << 50))), "damaged"),
    "a tensor before the beginning": (held(tensor(shape(2), shape(-1), 4)), "damaged"),
    "a tensor of a thousand dimensions": (held(tensor(shape(*[1] * 1000), shape(*[1] * 1000))), "damaged"),
    "attributes of a dict": (
        b"\x80\x02" + called("collections", "OrderedDict") + b"}" + text("get") + b"K\x01sb.",
        "names",
    ),
    "nothing": (b"", "damaged"),
    "a call of nothing": (b"\x80\x02R.", "damaged"),
    "marks without end": (b"\x80\x02t.", "damaged"),
    "text in the place of a number": (held(b"I99999999999x\n"), "damaged"),
    "a number of a megabyte": (held(b"L" + b"9" * 900_000 + b"L\n"), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_harm_is_refused_unopened_by_both_doors(name, tmp_path, monkeypatch):
    code, kind = HOSTILE[name]
    path = archive(tmp_path / "pytorch_model.bin", code)
    began = time.process_time()
    with pytest.raises(RefusedPickle) as refused:
        check_pickle(path, MOST)
    assert refused.value.kind == kind, refused.value
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch opened it"))
    with pytest.raises(DataError) as imported:
        load(path)
    with pytest.raises(UsageError) as published:
        open_weights(tmp_path)
    assert "\n" not in str(imported.value) + str(published.value)
    assert time.process_time() - began < 2


def test_the_harmless_neighbour_of_the_hostile_ones_passes(tmp_path):
    path = archive(tmp_path / "x.ckpt", held(tensor(shape(2, 8), shape(8, 1))))
    assert check_pickle(path, MOST) == 64
    assert load(path)["x"].shape == (2, 8)


def test_a_megabyte_of_opcodes_takes_seconds_and_little_memory(tmp_path):
    path = archive(tmp_path / "x.ckpt", b"\x80\x02" + b"N" * ((1 << 20) - 200) + b".")
    script = (
        "import resource, sys; from pathlib import Path; from pipeline.pickles import check_pickle\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "check_pickle(Path(sys.argv[1]), 1 << 20)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print((used.ru_maxrss - before) // 1024, used.ru_utime)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    grown, seconds = map(float, done.stdout.split())
    assert grown < 64 and seconds < 30


def layout(path: Path, change: str) -> Path:
    torch.save({"x": torch.ones(4)}, path)
    data = io.BytesIO(path.read_bytes())
    if change == "two pickles":
        with zipfile.ZipFile(path, "a") as made:
            made.writestr("y/data.pkl", b"\x80\x02N.")
    elif change == "one name twice":
        with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w") as made, pytest.warns(UserWarning):
            for entry in (*old.infolist(), old.infolist()[0]):
                made.writestr(entry.filename, old.read(entry))
    elif change == "packed":
        with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for entry in old.infolist():
                made.writestr(entry.filename, old.read(entry))
    elif change == "a megabyte beside the tensors":
        with zipfile.ZipFile(path, "a") as made:
            made.writestr("archive/note", bytes(MOST + 1))
    elif change == "a list of gigabytes":
        archive(path, b"\x80\x02N.")
        path.write_bytes(path.read_bytes()[:-22] + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 3 << 30, 0, 0))
    return path


CHANGES = ("two pickles", "one name twice", "packed", "a megabyte beside the tensors", "a list of gigabytes")


@pytest.mark.parametrize("change", CHANGES)
def test_an_archive_that_is_laid_out_otherwise_is_refused(change, tmp_path):
    path = layout(tmp_path / "archive.ckpt", change)
    with pytest.raises(RefusedPickle) as refused:
        check_pickle(path, MOST)
    assert refused.value.kind == "layout"


@pytest.mark.parametrize("data", [b"", b"PK", pickle.dumps({"x": 1}), bytes(100), b"PK\5\6" + bytes(18)])
def test_no_archive_is_named_as_such(data, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(RefusedPickle) as refused:
        check_pickle(path, MOST)
    assert refused.value.kind in ("damaged", "layout")
    with pytest.raises(DataError):
        load(path)


def test_every_bit_of_a_pickle_may_flip(tmp_path):
    """Refused, or loaded as tensors: no other error, and no memory that the file does not hold."""
    torch.save(collections.OrderedDict(a=torch.arange(4.0), b=torch.ones(2, 3)), tmp_path / "x.ckpt")
    data = (tmp_path / "x.ckpt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.ckpt") as made:
        code = made.read(next(entry for entry in made.infolist() if entry.filename.endswith("data.pkl")))
        storages = {name.split("/")[-1]: made.read(name) for name in made.namelist() if "/data/" in name}
    assert len(data) > len(code)
    passed = 0
    for bit in range(8 * len(code)):
        flipped = bytearray(code)
        flipped[bit // 8] ^= 1 << bit % 8
        path = archive(tmp_path / "flipped.ckpt", bytes(flipped), storages)
        try:
            load(path)
            passed += 1
        except DataError:
            continue
    assert passed
