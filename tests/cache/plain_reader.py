"""Reads a cache of hidden states from the description of its format alone, with neither the pipeline nor zarr.

Slow, short and strict: whatever is used is checked first, and ValueError says what did not agree.
"""

import hashlib
import json
from pathlib import Path

import numcodecs.blosc
import numpy as np
import pyarrow as pa
import xxhash

FORMATS = "1", "1-rc2"  # the same but for this name
SPEC = {"name", "dtype", "width", "codec", "keeps"}
BLOCK = 256  # rows under one checksum


def check(holds, what):
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(what)


def manifest(path):
    """A manifest, once its last key agrees with the bytes before it."""
    body, mark, tail = path.read_bytes().rpartition(b',\n "hash": "')
    digest = hashlib.blake2b(body + b"\n}", digest_size=16).hexdigest()
    check(mark and tail == digest.encode() + b'"\n}\n', f"{path}: its hash does not agree")
    return json.loads(body + mark + tail)


def checked(folder, files, name):
    """The bytes of a file that a manifest lists, once size and xxh3-128 agree."""
    data = (folder / name).read_bytes()
    agrees = len(data) == files[name]["size"] and xxhash.xxh3_128_hexdigest(data) == files[name]["xxh3"]
    check(agrees, f"{folder / name}: not what its manifest says")
    return data


def table(folder, files, name):
    """A listed Arrow IPC file as a list of dicts."""
    return pa.ipc.open_file(pa.BufferReader(checked(folder, files, name))).read_all().to_pylist()


def plain_rows(path, first, count, width, dtype):
    """Rows of an uncompressed array: its chunks lie one behind the other, so row r begins at r x width x size."""
    dtype = np.dtype(dtype)
    data = np.fromfile(path / "c/0/0", dtype, count * width, offset=first * width * dtype.itemsize)
    check(data.size == count * width, f"{path}: too short")
    return data.reshape(count, width)


def zstd_rows(path, meta, first, count, width, dtype):
    """Rows of an array of blosc frames, found by the index at the end of the file."""
    chunk_rows = meta["codecs"][0]["configuration"]["chunk_shape"][0]
    chunks = meta["chunk_grid"]["configuration"]["chunk_shape"][0] // chunk_rows
    data = (path / "c/0/0").read_bytes()
    check(len(data) >= 16 * chunks + 4, f"{path}: too short")
    index = np.frombuffer(data, "<u8", 2 * chunks, len(data) - 16 * chunks - 4).reshape(chunks, 2)
    out = [np.empty((0, width), dtype)]
    for n in range(first // chunk_rows, -(-(first + count) // chunk_rows) if count else 0):
        offset, size = (int(x) for x in index[n])
        try:
            chunk = np.frombuffer(numcodecs.blosc.decompress(data[offset : offset + size]), dtype)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: chunk {n} does not unpack: {error}") from error
        check(chunk.size == chunk_rows * width, f"{path}: chunk {n} has another size")
        start = max(first - n * chunk_rows, 0)
        out.append(chunk.reshape(chunk_rows, width)[start : first + count - n * chunk_rows])
    return np.concatenate(out)


def six_bits(stored, width):
    """The whole numbers q that rows of int6 hold, int8 [R, D]."""
    Q = -(-width // 4)
    high = stored >> 6
    last = high[:, :Q] + (high[:, Q : 2 * Q] << 2) + (high[:, 2 * Q :] << 4)
    return np.concatenate([stored & 63, last], axis=1)[:, :width].astype(np.int8) - np.int8(32)


def widen(bits):
    """The float32 whose upper 16 bits are these of a bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values):
    """Finite float32 rounded to bfloat16, to nearest and ties to even, as float32."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return widen((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


class PlainCache:
    """A cache on disk: its samples, the columns of its shards, and a sample's rows of a column."""

    def __init__(self, path):
        """Check what the cache says of itself, and read its plan."""
        self.path = Path(path)
        said = manifest(self.path / "cache.json")
        check(said["format"] in FORMATS, f"{path}: format {said['format']} is not known here")
        self.identity, self.plan, count = said["hash"], [], {}
        for entry in sorted((self.path / "plan").glob("*.json"), key=lambda p: int(p.stem)):
            for row in table(entry.parent, manifest(entry)["files"], entry.stem + ".arrow"):
                number = count[row["shard"]] = count.get(row["shard"], -1) + 1
                self.plan.append((row["shard"], number, row))

    def samples(self):
        """(shard, number in the shard, ids, mask) of every sample, in the order of the plan."""
        return [(s, n, np.array(r["input_ids"], np.int32), np.array(r["loss_mask"], bool)) for s, n, r in self.plan]

    def columns(self, shard):
        """The columns that a shard has, by name, each with its checked manifest."""
        found = {p.stem: manifest(p) for p in sorted((self.path / "shards" / f"{shard:06d}").glob("*.json"))}
        for name, said in found.items():
            mine = (said["cache"], said["shard"], said["spec"]["name"]) == (self.identity, shard, name)
            check(mine, f"shard {shard}, {name}: a manifest from elsewhere")
            check(said["spec"].keys() == SPEC, f"shard {shard}, {name}: a spec that is not known here")
        return found

    def read(self, shard, number, column):
        """One sample's rows of a column as float32, [R, D], each block checked."""
        folder, said = self.path / "shards" / f"{shard:06d}", self.columns(shard)[column]
        check(str(number) not in said["refused"], f"shard {shard}, {column}: sample {number} was refused")
        files, spec, width = said["files"], said["spec"], said["spec"]["width"]
        sample = table(folder, files, "samples.arrow")[number]
        near = np.pad(np.array(sample["loss_mask"], bool), 1)
        first, count = sample["offset"], sample["length"]
        if spec["keeps"] == "needed":
            first, count = sample["final_offset"], int((near[:-2] | near[1:-1] | near[2:]).sum())
        base = column if spec["codec"] == "raw" else f"{column}.{spec['codec']}"
        check(spec["codec"] in ("raw", "zstd", "int8", "int6"), f"codec {spec['codec']} is not known here")
        check(spec["dtype"] in ("bfloat16", "float32"), f"dtype {spec['dtype']} is not known here")
        check(spec["keeps"] in ("all", "needed"), f"{spec['keeps']} rows are not known here")
        sums, half = table(folder, files, base + ".arrow")[number], spec["dtype"] == "bfloat16"
        where, stored = f"shard {shard}, {column}, sample {number}", "<u2" if half else "<f4"
        scale, escapes = np.empty((count, 0), "<u2"), np.empty((0, 3), "<i4")
        if spec["codec"] == "raw":
            values = plain_rows(folder / base, first, count, width, stored)
        elif spec["codec"] == "zstd":
            meta = json.loads(checked(folder, files, base + "/zarr.json"))
            values = zstd_rows(folder / base, meta, first, count, width, stored)
        else:
            six = spec["codec"] == "int6"
            group = max(d for d in range(1, 65 if six else 129) if width % d == 0)
            stored = (3 * -(-width // 4), "u1") if six else (width, "i1")
            values = plain_rows(folder / base / "values", first, count, *stored)
            scale = plain_rows(folder / base / "scale", first, count, width // group, "<u2")
            checked(folder, files, base + "/channels/c/0/0")  # no block covers it
            mean, spread = plain_rows(folder / base / "channels", 0, 2, width, "<f4")
            kept = json.loads(checked(folder, files, base + "/zarr.json"))["attributes"]["escapes"]
            escapes = plain_rows(folder / base / "escapes", 0, kept, 3, "<i4")
            escapes = escapes[(escapes[:, 0] >= first) & (escapes[:, 0] < first + count)] - np.array(
                [first, 0, 0], "<i4"
            )
        check(len(escapes) == sums["escapes"], f"{where}: escapes are missing")
        check(len(sums["blocks"]) == -(-count // BLOCK), f"{where}: blocks are missing")
        for n, wanted in enumerate(sums["blocks"]):
            rows = slice(n * BLOCK, (n + 1) * BLOCK)
            data = values[rows].tobytes() + scale[rows].tobytes() + escapes[escapes[:, 0] // BLOCK == n].tobytes()
            check(xxhash.xxh3_64_intdigest(data) == wanted, f"{where}: block {n} is damaged")
        if spec["codec"] in ("raw", "zstd"):
            return widen(values) if half else values.astype(np.float32)
        level = (six_bits(values, width) if six else values).astype(np.float32)
        level = level * (level * level + 1024) if six else level
        out = ((level * np.repeat(widen(scale), group, axis=1)) * spread) + mean
        out = to_bfloat16(out) if half else out
        bits = escapes[:, 2].astype(np.int32).view(np.uint32)
        out[escapes[:, 0], escapes[:, 1]] = widen(bits & 0xFFFF) if half else bits.view(np.float32)
        return out
