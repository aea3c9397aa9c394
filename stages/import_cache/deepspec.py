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
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pipeline.cache.atomic import read_errors
from pipeline.cache.manifest import Count
from pipeline.errors import DataError, UsageError, refuse_limit
from pipeline.json_files import parse_json, read_file
from stages.import_cache.foreign_sample import (
    ForeignSample,
    PartialConvention,
    SampleLocation,
    bad_file,
    check_loss_mask,
    check_token_ids,
    source_facts,
)

MANIFEST, INDEX = "manifest.json", "samples.idx"
VERSION = 2
RECORD = struct.Struct("<QIIQQQQQ")
KINDS = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": RECORD.size}
MOST_MANIFEST = 64 << 20


class ShardFile(BaseModel):
    """A file of states, as the manifest names it."""

    model_config = ConfigDict(strict=True)
    shard_id: Count
    file_name: str


class Manifest(BaseModel):
    """What is read of the manifest."""

    model_config = ConfigDict(strict=True)
    version: Count
    num_samples: Annotated[Count, Field(gt=0)]
    hidden_size: Count
    target_layer_ids: Annotated[list[int], Field(min_length=1)]
    shards: list[ShardFile]


class DeepSpec:
    """A DeepSpec folder. Its manifest names the layers; `width` is the hidden size D."""

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
        self.stated = PartialConvention(tuple(facts["target_layer_ids"]), count_from=0, last="normed")
        self._shards = [folder / entry["file_name"] for entry in facts["shards"]]
        for path in self._shards:
            if not path.is_file():
                raise bad_file(path, "missing, though the manifest names it")
        self._index = folder / INDEX
        samples = facts["num_samples"]
        if not self._index.is_file() or self._index.stat().st_size != samples * RECORD.size:
            raise bad_file(self._index, f"missing or cut short: {samples} samples take {samples * RECORD.size} bytes")
        self.locations: list[SampleLocation] = [(INDEX, line) for line in range(1, samples + 1)]

    def source_facts(self) -> dict:
        """Return this source's entry in the plan."""
        return source_facts(self.folder, self.form, [self.folder / MANIFEST, self._index, *self._shards])

    def open(self, file: str, line: int) -> ForeignSample:
        """Read one sample's tokens and masks; its states on demand. DataError for a damaged index or shard."""
        with open(self._index, "rb") as index:
            index.seek((line - 1) * RECORD.size)
            data = index.read(RECORD.size)
        if len(data) != RECORD.size:
            raise bad_file(self._index, "cut short")
        sample, shard, T, *starts = RECORD.unpack(data)
        if sample != line - 1 or shard >= len(self._shards) or not T:
            raise bad_file(self._index, f"its record {line} is of sample {sample}, shard {shard}, {T} tokens: damaged")
        path, where = self._shards[shard], f"{self._shards[shard]}, sample {line - 1}"
        layers_bytes, last_bytes = (
            2 * self.layers * self.width,
            2 * self.width,
        )  # bytes a row: all layers, the last state
        limit = path.stat().st_size
        for start, size in zip(starts, (4 * T, T, T, T * layers_bytes, T * last_bytes), strict=True):
            if start + size > limit:
                raise bad_file(where, f"its bytes to {start + size:,} are not in the shard's {limit:,}: cut short")
        ids, attended, mask, layers, last = starts
        if set(_read_bytes(path, attended, T)) != {1}:
            raise bad_file(where, "has padding among its tokens")
        ids_T = check_token_ids(np.frombuffer(_read_bytes(path, ids, 4 * T), "<i4"), where)
        mask_T = check_loss_mask(np.frombuffer(_read_bytes(path, mask, T), np.uint8), where)

        def rows(first: int, end: int) -> tuple[Tensor, Tensor]:
            layers_RKD = _read_states(path, layers + first * layers_bytes, (end - first, self.layers, self.width))
            return layers_RKD, _read_states(path, last + first * last_bytes, (end - first, self.width))

        return ForeignSample(where, ids_T, mask_T, torch.bfloat16, True, rows)


def _read_bytes(path: Path, start: int, count: int) -> bytearray:
    """Return bytes of a shard, read, not mapped: a disk error under a mapping would kill the process."""
    data = bytearray(count)
    with read_errors(path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        rest = memoryview(data)
        while rest and (got := file.readinto(rest)):
            rest = rest[got:]
    if rest:
        raise bad_file(path, f"ends before byte {start + count:,}")
    return data


def _read_states(path: Path, start: int, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(_read_bytes(path, start, 2 * prod(shape)), dtype=torch.bfloat16).view(shape)


def read_manifest(path: Path) -> dict:
    """Read the manifest. DataError for a version or dtype that is not supported, or for damage."""
    try:
        facts = parse_json(read_file(path, MOST_MANIFEST))
    except (OSError, ValueError) as error:
        refuse_limit(path, error)
        raise bad_file(path, f"cannot be read ({str(error)[:120]})") from error
    try:
        Manifest.model_validate(facts)
    except ValidationError:
        raise bad_file(path, "damaged, or the manifest of something else") from None
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
            raise bad_file(path, f"names {entry['file_name']!r} as shard {number}: out of order, or elsewhere")
    return facts
