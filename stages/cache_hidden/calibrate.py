"""Calibration of lossy columns before the first shard is captured: the target runs over the first samples by hash.

R rows   D hidden size
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.cache.calibrations import read_calibration, store_calibration
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.calibration import (
    TOKENS,
    Calibration,
    calibration_samples,
)
from pipeline.cache.codecs.error_certificate import checked_calibration
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.plan import Plan, micro_batches
from pipeline.cache.samples import PlannedSample, ShardPlan, make_batch
from stages.cache_hidden.engine import Engine
from stages.cache_hidden.pack import Packer

STATES_BYTES = 1 << 30  # bytes of states in memory at a time; further columns take another run over the samples


def load_or_make_calibrations(
    engine: Engine, catalog: Catalog, columns: Sequence[ColumnSpec], batch_tokens: int
) -> dict[str, Calibration]:
    """Return the calibration of every lossy column by name, computed and stored now where the cache has none.

    Raises ProofError for states that the codec cannot store within its error bounds, before any of them is written.
    """
    lossy = [spec for spec in columns if CODECS[spec.codec].lossy]
    by_column = {spec.name: read_calibration(catalog, spec.name, spec.width) for spec in lossy}
    todo = [spec for spec in lossy if by_column[spec.name] is None]
    step = max(1, STATES_BYTES // (TOKENS * max((spec.row_bytes for spec in todo), default=1)))
    for first in range(0, len(todo), step):
        group = todo[first : first + step]
        for name, states_RD in _states(engine, _sampled(catalog.plan), group, batch_tokens).items():
            codec = next(spec.codec for spec in group if spec.name == name)
            made = checked_calibration(name, codec, states_RD, engine.device)
            by_column[name] = store_calibration(catalog, name, made, len(states_RD))
    return by_column


def _sampled(plan: Plan) -> ShardPlan:
    """Return the calibration samples, longest first, as if they were a shard."""
    chosen: list[tuple[PlannedSample, bytes]] = []
    tokens = 0
    first = plan.shards[: plan.manifests[0].shards]  # so that an append changes nothing
    for shard, row in calibration_samples(first):
        chosen.append((PlannedSample(shard.ids(row), shard.mask(row)), shard.batch.column("sample_id")[row].as_py()))
        tokens += len(chosen[-1][0].ids)
        if tokens >= TOKENS:
            break
    chosen.sort(key=lambda entry: (-len(entry[0].ids), entry[1]))
    samples, names = zip(*chosen, strict=True)
    return ShardPlan(make_batch(samples, names, 0), 0)


def _states(engine: Engine, samples: ShardPlan, columns: Sequence[ColumnSpec], batch_tokens: int) -> dict[str, Tensor]:
    """Return the states of all samples on the host, [R, D] by column."""
    states: dict[str, list[Tensor]] = {spec.name: [] for spec in columns}
    packer = Packer(engine, samples, columns)
    for batch in micro_batches(samples.lengths, batch_tokens):
        for packed in packer.pack(batch):
            packed.wait()
            for name, states_RD in packed.rows.items():
                states[name].append(states_RD)
    return {name: torch.cat(states.pop(name)) for name in [*states]}
