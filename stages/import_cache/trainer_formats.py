"""The forms of other trainers' caches: SpecForge's, speculators' and DeepSpec's, each a `Source`.

SpecForge: a folder of `.ckpt` files, one sample each, written by torch.save: a dict of `input_ids` [T], `loss_mask` [T]
and states, all with or without a leading axis of 1. DFlash, Domino, DSpark: `hidden_states` [T, K * D], layers side by
side, and (DSpark) `target_last_hidden_states` [T, D]. EAGLE-3: `aux_hidden_state` [T, K * D], `hidden_state` [T, D].
The files state neither which layers they hold nor whether the last state is normed.

speculators: `hs_<i>.safetensors`, and the prepared data set, which has the loss masks. `token_ids` [T] and
`hidden_states` [T, K + 1, D]: the layers asked for and, unless left out, the last one. File i belongs to row i of the
data set (`input_ids`, `loss_mask`), a folder that `datasets` saved. vLLM numbers layers by their input, so that 1 is
the first one's output, and gives the last state before the norm; the files do not state it.

DeepSpec: `manifest.json`, `samples.idx`, and shards of raw bytes. The index has 56 bytes a sample, little-endian:
sample (u64), shard (u32), T (u32), and where in the shard five arrays begin (u64 each): input_ids int32 [T],
attention_mask uint8 [T], loss_mask uint8 [T], target_hidden_states [T, K * D] and target_last_hidden_states [T, D],
both bfloat16. The manifest names the layers: counted from 0, -1 being what enters layer 0. The last state is after the
norm. There is no checksum anywhere.

    T tokens   K layers   D hidden size
"""

import re
import struct
from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.cache.atomic import read_errors
from pipeline.errors import DataError, UsageError, first_line, refuse_limit
from pipeline.json_files import Count, parse_json, read_file
from stages.import_cache.source import (
    ForeignSample,
    PartialConvention,
    Source,
    bad_file,
    check_loss_mask,
    check_plain,
    check_states,
    check_token_ids,
    digest_listing,
    load,
    mapped_sample,
)

SUFFIX = ".ckpt"
SPECFORGE_KEYS = (("hidden_states", "target_last_hidden_states"), ("aux_hidden_state", "hidden_state"))
NAME = re.compile(r"hs_(0|[1-9][0-9]*)\.safetensors")
SAVED = "state.json"  # of a data set that `datasets` saved
MASKS = "loss_mask"
SPECULATORS_KEYS = frozenset({"token_ids", "hidden_states"})
MANIFEST, INDEX = "manifest.json", "samples.idx"
VERSION = 2
RECORD = struct.Struct("<QIIQQQQQ")
WANTED = "SpecForge's *.ckpt, speculators' hs_<i>.safetensors, or DeepSpec's manifest.json and samples.idx"
KINDS = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": RECORD.size}
MOST_MANIFEST = 64 << 20


class SpecForge(Source):
    """A folder of `.ckpt` files, at any depth. Each holds `layers` layers of hidden size `width`, side by side."""

    form = "specforge"
    stated = PartialConvention()

    def __init__(self, folder: Path, layers: int, width: int):
        self.folder, self.layers, self.width = folder, layers, width
        packed = next(folder.rglob(f"*{SUFFIX}.gz"), None)
        if packed:
            raise UsageError(f"{packed}: compressed, so it cannot be mapped; unpack it (gunzip -r) and import that")
        self.files = sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())
        self.locations = [(path.relative_to(folder).as_posix(), 1) for path in self.files]

    def open(self, file: str, line: int) -> ForeignSample:
        """Memory-map one sample. DataError for a file that holds none."""
        path = self.folder / file
        record, limit, where = load(path), path.stat().st_size, str(path)
        layers, last = next((pair for pair in SPECFORGE_KEYS if pair[0] in record), SPECFORGE_KEYS[0])
        absent = [key for key in ("input_ids", "loss_mask", layers) if key not in record]
        if absent:
            raise bad_file(where, f"has {sorted(map(str, record))[:8]}, not {absent[0]}")
        ids, mask = (check_plain(record[key], key, where, limit) for key in ("input_ids", "loss_mask"))
        wide = _as_matrix(check_states(record[layers], layers, where, limit), layers, where)
        if wide.shape[1] != self.layers * self.width:
            raise DataError(
                f"{where}: its {layers} are {wide.shape[1]} wide, {self.layers} layers of {self.width} are "
                f"{self.layers * self.width}; name with --layers as many as it holds, of the --model it was made with"
            )
        last_TD = None
        if record.get(last) is not None:
            last_TD = _as_matrix(check_states(record[last], last, where, limit), last, where)
        layers_TKD = wide.unflatten(1, (self.layers, self.width))
        ids_T, mask_T = check_token_ids(_as_array(ids), where), check_loss_mask(_as_array(mask), where)
        return mapped_sample(where, ids_T, mask_T, layers_TKD, last_TD)


def _as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor of shape [T] or [1, T] as an array [T]."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return (tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor).numpy()


def _as_matrix(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return a tensor of shape [T, width] or [1, T, width] as [T, width]. DataError for any other shape."""
    if tensor.ndim == 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 2:
        raise bad_file(where, f"its {name} are {list(tensor.shape)}, wanted [tokens, width]")
    return tensor


class Speculators(Source):
    """A folder of `hs_<i>.safetensors`. `masks`: the data set's folder, by default this folder or its parent."""

    form = "speculators"
    stated = PartialConvention()

    def __init__(self, folder: Path, layers: int, width: int, masks: Path | None):
        self.folder, self.layers, self.width = folder, layers, width
        named = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
        self._numbers = {path.name: number for number, path in named.items()}
        self.files = [named[number] for number in sorted(named)]
        self.locations = [(path.name, 1) for path in self.files]
        self.masks = masks or next((place for place in (folder, folder.parent) if (place / SAVED).is_file()), None)
        if self.masks is None:
            raise UsageError(
                f"{folder}: hidden states without loss masks, which the prepared data set has; name its folder, the "
                f"one that holds {SAVED}, with --masks"
            )
        self._rows = self._open_rows()

    def _open_rows(self):
        from datasets import load_from_disk

        try:
            rows = load_from_disk(str(self.masks)).with_format("numpy")
            lacks = {"input_ids", MASKS} - {*rows.column_names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            refuse_limit(self.masks, error)
            cause = first_line(error)
            raise UsageError(f"{self.masks}: no saved data set ({cause}); name its folder with --masks") from error
        if lacks:
            raise UsageError(f"{self.masks}: its rows have no {sorted(lacks)[0]}; name another data set with --masks")
        return rows

    def source_facts(self) -> dict:
        """Return this source's entry in the plan, the masks' folder included."""
        masks = sorted(path for path in self.masks.iterdir() if path.suffix == ".arrow")
        return {**super().source_facts(), "masks": digest_listing(self.masks, masks)[-1]}

    def open(self, file: str, line: int) -> ForeignSample:
        """Memory-map one sample. DataError for a file that holds none, or belongs to another data set."""
        path = self.folder / file
        where, limit = str(path), path.stat().st_size
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in {*opened.keys()} & SPECULATORS_KEYS}
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            refuse_limit(path, error)
            raise bad_file(where, f"cut short or damaged ({str(error)[:120]})") from error
        absent = SPECULATORS_KEYS - tensors.keys()
        if absent:
            raise bad_file(where, f"has no {sorted(absent)[0]}")
        ids_T = check_token_ids(check_plain(tensors["token_ids"], "token_ids", where, limit).numpy(), where)
        states_TKD = check_states(tensors["hidden_states"], "hidden_states", where, limit)
        if states_TKD.shape[1:] not in ((self.layers, self.width), (self.layers + 1, self.width)):
            raise DataError(
                f"{where}: its hidden_states are {list(states_TKD.shape)}, wanted [tokens, {self.layers} and the last, "
                f"{self.width}]; name with --layers those it holds but the last, of the --model it was made with"
            )
        last_TD = states_TKD[:, self.layers] if states_TKD.shape[1] > self.layers else None
        return mapped_sample(where, ids_T, self._mask(path, ids_T), states_TKD[:, : self.layers], last_TD)

    def _mask(self, path: Path, ids_T: np.ndarray) -> np.ndarray:
        number = self._numbers[path.name]
        if number >= len(self._rows):
            raise DataError(
                f"{path}: {self.masks} has {len(self._rows)} rows, not that one; name its own data set with --masks"
            )
        row = self._rows[number]
        if not np.array_equal(np.asarray(row["input_ids"]), ids_T):
            raise DataError(
                f"{path}: its tokens are not those of row {number} of {self.masks}; name its own data set with --masks"
            )
        return check_loss_mask(np.asarray(row[MASKS]), str(path))


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


class DeepSpec(Source):
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
        self.files = [folder / MANIFEST, self._index, *self._shards]
        self.locations = [(INDEX, line) for line in range(1, samples + 1)]

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
        limit, last_bytes = path.stat().st_size, 2 * self.width  # of a row
        layers_bytes = self.layers * last_bytes
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
    """Read DeepSpec's manifest. DataError for a version or dtype that is not supported, or for damage."""
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


def find_source(folder: Path, layers: tuple[int, ...] | None, width: int, masks: Path | None) -> Source:
    """Return the source that a folder's files form. `width`: the target's hidden size. `layers`: those of --layers.

    Raises UsageError where there is none or --layers is missing; DataError for a damaged one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one that holds {WANTED}")
    inner = folder / "hidden_states" if (folder / "hidden_states").is_dir() else folder  # where speculators puts them
    deepspec = (folder / INDEX).exists()
    speculators = next(
        (place for place in (folder, inner) if any(NAME.fullmatch(path.name) for path in place.iterdir())), None
    )
    specforge = next(folder.rglob(f"*{SUFFIX}*"), None)
    if sum(map(bool, (deepspec, speculators, specforge))) != 1:
        raise UsageError(f"{folder}: holds {'none or several'} of these: {WANTED}; name a folder with one of them")
    if masks is not None and not speculators:
        raise UsageError(
            f"{folder}: its files hold each sample's loss mask, and --masks is for speculators' hs_<i>.safetensors, "
            "which have none; leave it out"
        )
    if deepspec:
        source = DeepSpec(folder, width)
        if layers not in (None, source.stated.layers):
            stated = ",".join(map(str, source.stated.layers))
            raise UsageError(f"{folder}: its manifest names the layers {stated}; pass the same, or leave out --layers")
        return source
    if layers is None:
        raise UsageError(
            f"{folder}: no file of it says which layers it holds; name them in their order with --layers, such as "
            "--layers 1,9,17,25,33"
        )
    source = (
        Speculators(speculators, len(layers), width, masks) if speculators else SpecForge(folder, len(layers), width)
    )
    if not source.locations:
        raise UsageError(f"{folder}: no sample in it; name a folder that holds {WANTED}")
    return source
