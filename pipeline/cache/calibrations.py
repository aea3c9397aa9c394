"""The calibrations that a cache stores, `calibration/<column>.json`. On disk the std is named `spread`."""

import numpy as np

from pipeline.cache.atomic import commit_lock, write_errors, write_file
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.layout import CALIBRATION
from pipeline.cache.manifest import canonical, read_record
from pipeline.cache.records import CalibrationManifest
from pipeline.errors import CacheError


def read_calibration(catalog: Catalog, column: str, width: int) -> Calibration | None:
    """Read the cache's calibration of a column; None when it has none. CacheError for a damaged or foreign one."""
    path = catalog.path / CALIBRATION / f"{column}.json"
    if not path.exists():
        return None
    facts = read_record(path, CalibrationManifest)
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite, and is refused
        mean, std = (np.array(values, np.float64).astype(np.float32) for values in (facts.mean, facts.spread))
    right = (facts.cache, facts.column) == (catalog.hash, column)
    right = right and len(mean) == len(std) == width and np.isfinite([mean, std]).all() and (std > 0).all()
    if not right:
        raise CacheError(f"{path}: another cache's or column's; remove it, and every {column} that was encoded with it")
    return Calibration(mean, std)


def store_calibration(catalog: Catalog, column: str, calibration: Calibration, rows: int) -> Calibration:
    """Write a calibration, unless another process has written one; return the one in the cache. Raises RoomError."""
    mean, spread = _shortest(calibration.mean), _shortest(calibration.std)
    made = CalibrationManifest(cache=catalog.hash, column=column, rows=rows, mean=mean, spread=spread)
    with write_errors(catalog.path, "a calibration"), commit_lock(catalog.path):
        existing = read_calibration(catalog, column, len(mean))
        if existing is None:
            write_file(catalog.path / CALIBRATION / f"{column}.json", canonical(made.as_dict()))
    return existing or calibration


def _shortest(values: np.ndarray) -> list[float]:
    """The shortest decimals that read back as the same float32 values."""
    return [float(str(value)) for value in values]
