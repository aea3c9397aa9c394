"""DeepSpec's target cache: `manifest.json`, `samples.idx`, and shards of raw bytes.

The index has 56 bytes a sample, little-endian: sample (u64), shard (u32), T (u32), and where in the shard five arrays
begin (u64 each): input_ids int32 [T], attention_mask uint8 [T], loss_mask uint8 [T], target_hidden_states [T, K * D]
and target_last_hidden_states [T, D], both bfloat16. The manifest names the layers: counted from 0, -1 being what enters
layer 0. The last state is after the norm. There is no checksum anywhere.

    T tokens   K layers   D hidden size
"""

import struct
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.atomic import read_errors
from pipeline.cache.manifest import has_form
from pipeline.errors import DataError, UsageError
from pipeline.os_errors import refuse_limit
from pipeline.untrusted import parse_json, read_file
from stages.import_cache.foreign_sample import Foreign, Place, Stated, broken, listing, loss_mask, tokens

MANIFEST, INDEX = "manifest.json", "samples.idx"
VERSION = 2
RECORD = struct.Struct("<QIIQQQQQ")
FORM = {"version": int, "num_samples": int, "hidden_size": int, "shards": [{"shard_id": int, "file_name": str}]}
KINDS = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": RECORD.size}
MOST_MANIFEST = 64 << 20


class DeepSpec:
    """A folder with a manifest; its layers are those that the manifest names, of width `width`."""

    form = "deepspec"

    def __init__(self, folder: Path, width: int):
        self.folder, self.width = folder, width
        facts = read_manifest(folder / MANIFEST)
        if facts["hidden_size"] != width:
            raise UsageError(
                f"{folder / MANIFEST}: states of width {facts['hidden_size']}, the target's are {width}; name the "
                "--model it was made with"
            )
        self.layers = len(facts["target_layer_ids"])
        self.stated = Stated(tuple(facts["target_layer_ids"]), count_from=0, last="normed")
        self._shards = [folder / entry["file_name"] for entry in facts["shards"]]
        for path in self._shards:
            if not path.is_file():
                raise broken(path, "missing, though the manifest names it")
        self._index = folder / INDEX
        samples = facts["num_samples"]
        if not self._index.is_file() or self._index.stat().st_size != samples * RECORD.size:
            raise broken(self._index, f"missing or cut short: {samples} samples take {samples * RECORD.size} bytes")
        self.places: list[Place] = [(INDEX, line) for line in range(1, samples + 1)]

    def listing(self) -> dict:
        """What the plan says of this source."""
        return listing(self.folder, self.form, [self.folder / MANIFEST, self._index, *self._shards])

    def open(self, file: str, line: int) -> Foreign:
        """Read one sample's tokens. DataError for an index or a shard that is not whole."""
        with open(self._index, "rb") as index:
            index.seek((line - 1) * RECORD.size)
            data = index.read(RECORD.size)
        if len(data) != RECORD.size:
            raise broken(self._index, "cut short")
        sample, shard, T, *starts = RECORD.unpack(data)
        if sample != line - 1 or shard >= len(self._shards) or not T:
            raise broken(self._index, f"its record {line} is of sample {sample}, shard {shard}, {T} tokens: damaged")
        path, where = self._shards[shard], f"{self._shards[shard]}, sample {line - 1}"
        wide, row = 2 * self.layers * self.width, 2 * self.width  # bytes of a row's layers, and of its last state
        limit = path.stat().st_size
        for start, size in zip(starts, (4 * T, T, T, T * wide, T * row), strict=True):
            if start + size > limit:
                raise broken(where, f"its bytes to {start + size:,} are not in the shard's {limit:,}: cut short")
        ids, attended, mask, layers, last = starts
        if set(_bytes(path, attended, T)) != {1}:
            raise broken(where, "has padding among its tokens")
        ids_T = tokens(np.frombuffer(_bytes(path, ids, 4 * T), "<i4"), where)
        mask_T = loss_mask(np.frombuffer(_bytes(path, mask, T), np.uint8), where)

        def rows(first: int, end: int) -> tuple[Tensor, Tensor]:
            layers_RKD = _states(path, layers + first * wide, (end - first, self.layers, self.width))
            return layers_RKD, _states(path, last + first * row, (end - first, self.width))

        return Foreign(where, ids_T, mask_T, torch.bfloat16, True, rows)


def _bytes(path: Path, start: int, count: int) -> bytearray:
    """Bytes of a shard, read and not mapped: a shard may have 64 GB, and a failing disk ends no process."""
    data = bytearray(count)
    with read_errors(path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        rest = memoryview(data)
        while rest and (got := file.readinto(rest)):
            rest = rest[got:]
    if rest:
        raise broken(path, f"ends before byte {start + count:,}")
    return data


def _states(path: Path, start: int, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(_bytes(path, start, 2 * prod(shape)), dtype=torch.bfloat16).view(shape)


def read_manifest(path: Path) -> dict:
    """Return a manifest of the version and types that are read. DataError for any other, or a damaged one."""
    try:
        facts = parse_json(read_file(path, MOST_MANIFEST))
    except (OSError, ValueError) as error:
        refuse_limit(path, error)
        raise broken(path, f"cannot be read ({str(error)[:120]})") from error
    layers = facts.get("target_layer_ids") if isinstance(facts, dict) else None
    whole = isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)
    if not whole or not has_form(facts, FORM) or not facts["num_samples"]:
        raise broken(path, "damaged, or the manifest of something else")
    if facts["version"] != VERSION:
        raise DataError(f"{path}: version {facts['version']}, only {VERSION} is read; capture again with that")
    for key, wanted in KINDS.items():
        if facts.get(key) != wanted:
            raise DataError(
                f"{path}: {key} is {facts.get(key)!r}, only {wanted!r} is read (fp8 has lost 2.5 % already); capture "
                "again with `pipeline cache-hidden`"
            )
    for number, entry in enumerate(facts["shards"]):
        if entry["shard_id"] != number or Path(entry["file_name"]).name != entry["file_name"]:
            raise broken(path, f"names {entry['file_name']!r} as shard {number}: out of order, or elsewhere")
    return facts
