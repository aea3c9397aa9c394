"""Calibration of int8 columns before the first shard: the target runs over the samples that come first by hash.

R rows   D hidden size
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache.codecs import LOSSY
from pipeline.cache.codecs.calibration import (
    TOKENS,
    Calibration,
    calibration_samples,
    read_calibration,
    store_calibration,
)
from pipeline.cache.codecs.certificate import checked_calibration
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.micro_batches import micro_batches
from pipeline.cache.plan import Plan
from pipeline.cache.samples import PlannedSample, ShardPlan, make_batch
from stages.cache_hidden.engine_hf import Engine

ROOM = 1 << 30  # bytes of states held at a time; what does not fit takes another run over the samples


def calibrations(
    engine: Engine, out: Path, plan: Plan, columns: Sequence[ColumnSpec], batch_tokens: int
) -> dict[str, Calibration]:
    """Return the calibration of every column that needs one, made now where the cache has none.

    Raises ProofError for states that the codec would keep worse than promised, before any of them is written.
    """
    lossy = [spec for spec in columns if spec.codec in LOSSY]
    held = {spec.name: read_calibration(out, spec.name, spec.width) for spec in lossy}
    todo = [spec for spec in lossy if held[spec.name] is None]
    step = max(1, ROOM // (TOKENS * max((spec.row_bytes for spec in todo), default=1)))
    for first in range(0, len(todo), step):
        group = todo[first : first + step]
        for name, states_RD in _states(engine, _sampled(plan), group, batch_tokens).items():
            codec = next(spec.codec for spec in group if spec.name == name)
            made = checked_calibration(name, codec, states_RD, engine.device)
            held[name] = store_calibration(out, name, made, len(states_RD))
    return held


def _sampled(plan: Plan) -> ShardPlan:
    """The samples looked at, as if they were a shard."""
    chosen: list[tuple[PlannedSample, bytes]] = []
    tokens = 0
    first = plan.shards[: plan.manifests[0]["shards"]]  # so that an append changes nothing
    for shard, row in calibration_samples(first):
        chosen.append((PlannedSample(shard.ids(row), shard.mask(row)), shard.batch.column("sample_id")[row].as_py()))
        tokens += len(chosen[-1][0].ids)
        if tokens >= TOKENS:
            break
    chosen.sort(key=lambda entry: (-len(entry[0].ids), entry[1]))
    samples, names = zip(*chosen, strict=True)
    return ShardPlan(make_batch(samples, names, 0), 0)


def _states(engine: Engine, samples: ShardPlan, columns: Sequence[ColumnSpec], batch_tokens: int) -> dict[str, Tensor]:
    """States of all samples on the host, [R, D] by column."""
    found: dict[str, list[Tensor]] = {spec.name: [] for spec in columns}
    for rows in micro_batches(samples.lengths, batch_tokens):
        for piece in engine.pieces(samples, rows, columns):
            piece.wait()
            for name, states_RD in piece.states.items():
                found[name].append(states_RD)
    return {name: torch.cat(found.pop(name)) for name in [*found]}
