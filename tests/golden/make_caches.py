"""Makes the small cache of each codec that today's reader must still read, with the values it must give.

    python tests/golden/make_caches.py

Only to be run when the format changes on purpose; a released format's caches stay for good.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

# ruff: noqa: E402  the path first
from cache_maker import COLUMNS, make_cache, random_samples

from pipeline.cache import HiddenCache
from pipeline.cache.codecs import CODECS
from pipeline.tensors import as_stored


def main() -> None:
    for codec in CODECS:
        folder = HERE / f"cache-{codec}"
        shutil.rmtree(folder, ignore_errors=True)
        columns = [replace(spec, codec=codec, width=32) for spec in COLUMNS]
        cache = HiddenCache.open(make_cache(folder / "cache", random_samples(2, longest=60, seed=5), columns))
        samples = [cache.read(i, final=True) for i in range(len(cache))]
        expected = [
            {
                "ids": sample.ids.tolist(),
                "final_rows": sample.final_rows.tolist(),
                "aux": as_stored(sample.aux).tobytes().hex(),
                "final": as_stored(sample.final).tobytes().hex(),
            }
            for sample in samples
        ]
        (folder / "expected.json").write_text(json.dumps({"samples": expected}) + "\n")


if __name__ == "__main__":
    main()
