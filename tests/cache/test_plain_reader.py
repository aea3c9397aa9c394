"""The format's text is enough: a reader written from `pipeline/cache/README.md` alone reads what we read."""

from dataclasses import replace

import numpy as np
import pytest
from cache_maker import COLUMNS, flip, make_cache
from plain_reader import PlainCache

from pipeline.cache import HiddenCache


def cache_in(folder, codec: str, dtype: str):
    columns = [replace(spec, dtype=dtype, codec=codec, width=192) for spec in COLUMNS]
    return make_cache(folder / "cache", columns=columns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", ["raw", "zstd", "int8", "int6"])
def test_a_reader_written_from_the_text_reads_every_value(codec, dtype, tmp_path):
    cache = cache_in(tmp_path, codec, dtype)
    plain, ours = PlainCache(cache), HiddenCache.open(cache)
    assert len(plain.samples()) == len(ours)
    for i, (shard, number, ids, mask) in enumerate(plain.samples()):
        sample = ours.read(i, final=True)
        assert np.array_equal(ids, sample.ids) and np.array_equal(mask, sample.mask)
        for layer, states in zip(ours.layers, sample.aux, strict=True):
            assert np.array_equal(plain.read(shard, number, f"aux.{layer}"), states.float().numpy())
        assert np.array_equal(plain.read(shard, number, "final"), sample.final.float().numpy())


@pytest.mark.parametrize("codec", ["raw", "zstd", "int8", "int6"])
def test_it_finds_a_flipped_bit_by_the_text_alone(codec, tmp_path):
    cache = cache_in(tmp_path, codec, "bfloat16")
    data = next(
        path
        for path in sorted((cache / "shards" / "000000").rglob("c/0/0"))
        if "values" in str(path) or codec in ("raw", "zstd")
    )
    flip(data, 1000)
    plain = PlainCache(cache)
    name = data.relative_to(cache / "shards" / "000000").parts[0].removesuffix(f".{codec}")
    with pytest.raises(ValueError, match=r"damaged|does not unpack"):
        for shard, number, *_ in plain.samples():
            if shard == 0:
                plain.read(shard, number, name)
