"""The catalog: which columns the shards of a cache have, and their manifests.

All of it is read lazily: the names when they are first needed; a manifest, validated against the others, when its
column is first used. So a cache of a thousand shards opens as quickly as one of sixteen.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import read_errors
from pipeline.cache.codecs import column_of_files
from pipeline.cache.columns import column_manifest
from pipeline.cache.layout import COLUMN, NUMBER, SAMPLES, SHARDS, numbered, shard_folder
from pipeline.errors import CacheError


def columns_of(entries: Iterable[str]) -> list[str]:
    """The columns, sorted, of a shard with these file names: those with a manifest."""
    stems = (entry.removesuffix(".json") for entry in entries if entry.endswith(".json"))
    return sorted(stem for stem in stems if COLUMN.fullmatch(stem))


def shards_per_column(shards: Sequence[Iterable[str]]) -> dict[str, int]:
    """How many shards have each column, by name, given the file names of every shard.

    A column with values but no manifest in any shard has the count 0.
    """
    counts = Counter(name for entries in shards for name in columns_of(entries))
    stems = {entry.removesuffix(".arrow") for entries in shards for entry in entries}
    counts.update(dict.fromkeys((column for stem in stems if (column := column_of_files(stem))), 0))
    return dict(sorted(counts.items()))


class Catalog:
    """The columns of a cache with `shards` planned shards and this identity. Thread-safe."""

    def __init__(self, cache: Path, shards: int, identity: str):
        self.cache, self.shards, self._identity = cache, shards, identity
        self._manifests: dict[tuple[int, str], dict] = {}
        self._samples: dict[int, dict] = {}
        self._kinds: dict[tuple, str] = {}
        self._refused: dict[str, list[tuple[int, np.ndarray]]] = {}

    @cached_property
    def names(self) -> list[list[str]]:
        """The columns of each shard, sorted."""
        return [columns_of(entries) for entries in self._entries]

    @cached_property
    def _entries(self) -> list[list[str]]:
        return [self._listed(shard) for shard in range(self.shards)]

    def _listed(self, shard: int) -> list[str]:
        folder = shard_folder(self.cache, shard)
        if not folder.exists():
            return []
        with read_errors(folder):
            return os.listdir(folder)

    @cached_property
    def partial(self) -> dict[str, int]:
        """How many shards have each column that some lack, by name: see `shards_per_column`."""
        return {name: count for name, count in shards_per_column(self._entries).items() if count < self.shards}

    @cached_property
    def unplanned_shards(self) -> list[int]:
        """Shards with columns that no segment of the plan has: a segment was lost."""
        if not (self.cache / SHARDS).is_dir():
            return []
        with read_errors(self.cache / SHARDS):
            numbers = sorted(int(name) for name in os.listdir(self.cache / SHARDS) if NUMBER.fullmatch(name))
        return [number for number in numbers if number >= self.shards and columns_of(self._listed(number))]

    def manifest(self, shard: int, name: str) -> dict:
        """The manifest of a column. CacheError when it is damaged, another cache's, or inconsistent with the others."""
        manifest = self._manifests.get((shard, name))
        if manifest is None:
            manifest = column_manifest(self.cache, shard, name)
            self._check(shard, name, manifest)
            self._manifests[shard, name] = manifest
        return manifest

    def _check(self, shard: int, name: str, manifest: dict) -> None:
        folder = shard_folder(self.cache, shard)
        if manifest["cache"] != self._identity:
            raise CacheError(f"{folder}, column {name}: belongs to another cache; run `pipeline verify`")
        if self._samples.setdefault(shard, manifest["files"][SAMPLES]) != manifest["files"][SAMPLES]:
            where = f"{self.cache}, shard {numbered(shard)}"
            raise CacheError(f"{where}: columns of different samples; run `pipeline verify`")
        kind = manifest["spec"]["dtype"], manifest["spec"]["width"]
        self._kinds.setdefault(kind, name)
        if len(self._kinds) > 1:
            raise CacheError(f"{self.cache}: columns of several kinds, {sorted(self._kinds)}; run `pipeline verify`")

    def columns(self, shard: int) -> dict[str, dict]:
        """Manifests of the columns that a shard has, by name."""
        return {name: self.manifest(shard, name) for name in self.names[shard]}

    @cached_property
    def whole(self) -> dict[str, dict]:
        """Columns that every shard has, by name, each with its spec."""
        everywhere = sorted(set.intersection(*map(set, self.names))) if self.names else []
        return {name: self.manifest(0, name)["spec"] for name in everywhere}

    @cached_property
    def kind(self) -> tuple[str, int] | None:
        """The dtype and width that all columns share; None where there is no column."""
        first = next(((shard, names[0]) for shard, names in enumerate(self.names) if names), None)
        spec = first and self.manifest(*first)["spec"]
        return spec and (spec["dtype"], spec["width"])

    def codecs(self, name: str) -> set[str]:
        """The codecs of a column over all shards: several during a recode, or after one was stopped."""
        return {self.manifest(shard, name)["spec"]["codec"] for shard in range(self.shards)}

    def refused(self, name: str) -> list[tuple[int, np.ndarray]]:
        """Where samples were refused in a column: (shard, rows of the shard)."""
        found = self._refused.get(name)
        if found is None:
            shards = [shard for shard, names in enumerate(self.names) if name in names]
            refused = [(shard, self.manifest(shard, name)["refused"]) for shard in shards]
            found = [(shard, np.array([*map(int, rows)])) for shard, rows in refused if rows]
            self._refused[name] = found
        return found
