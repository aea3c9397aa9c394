"""Capturing shards: the target computes, a thread writes, the probe looks, and only then does a shard exist.

Shards are independent and their bytes depend on nothing but the plan, so a stopped capture goes on with the next
shard that is missing, and whoever computes one computes the same.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import transformers
from torch import Tensor

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.codecs.int8 import as_stored
from pipeline.cache.columns import ColumnSpec, complete_manifest
from pipeline.cache.micro_batches import micro_batches
from pipeline.cache.plan import Plan
from pipeline.cache.target_folder import HEAD, target_file
from pipeline.cache.writer import ShardWriter
from pipeline.errors import DataError
from pipeline.target.cached_copy import store_target
from pipeline.target.head import TargetHead
from pipeline.target.model import head_of, load_target, stop_tokens
from pipeline.target.on_policy import Gauge, gauge_column, gauge_share, totals
from pipeline.target.probe import probe
from stages.cache_hidden.background_writer import Drain
from stages.cache_hidden.calibrate import calibrations
from stages.cache_hidden.certificate_rows import Shadow
from stages.cache_hidden.engine_hf import Engine, Piece
from stages.cache_hidden.plan_report import Lost, Work
from stages.cache_hidden.progress import Progress
from stages.cache_hidden.settings import Settings

QUEUED = 2  # micro-batches that wait for the writer
REFUSED_SHARE = 0.01  # of a plan's samples; more means that something is wrong with the target or its type


def capture_shards(
    out: Path, settings: Settings, plan: Plan, work: Work, device: str, refused: int, lost: Lost = MappingProxyType({})
) -> None:
    """Run the target over every shard in `work` and commit each as it passes its probe.

    `refused` samples were refused before. A (shard, column) in `lost` is replaced though it looks whole; it maps to
    the manifest that it had, if that is known, and gets the same again where the same bytes come out.
    Raises ProofError, DataError (too many refused), RoomError, UsageError.
    """
    model = load_target(str(settings.folder), device=device, dtype=settings.dtype)
    store_target(out, settings.folder, head_of(model), model.config, stop_tokens(model))
    head = TargetHead.load(target_file(out, HEAD), device, getattr(torch, settings.dtype))
    engine = Engine(model, head, 0.0)
    gauged = gauged_columns(out, plan, settings.columns)
    with write_errors(out, "a calibration"), process_lock(out, "calibration"):  # by one process, for all
        engine.calibrations = calibrations(engine, out, plan, settings.columns, settings.batch_tokens)
    with Progress(sum(shard.rows for shard, _ in work), len(work)) as progress:
        for shard, wanted in work:
            columns = [spec for spec in wanted if still_wanted(out, shard.number, spec.name, lost)]
            if not columns:  # another worker has this share, too, and was quicker
                progress.shard()
                continue
            engine.gauge_share = gauge_share(plan.segment(shard.number)["supervised"])
            with ShardWriter(out, shard, columns) as writer:
                earlier = refuse_again(out, writer, settings.columns)
                shadow = Shadow(columns, shard)
                gauge = fill(engine, writer, shadow, settings.batch_tokens, progress)
                refused += len(writer.refused) - earlier
                check_refused(refused, plan.samples, writer.refused)
                writer.seal()
                facts = proven_facts(engine, writer, shadow)
                for name in gauged & facts.keys():
                    facts[name]["gauge"] = gauge.as_facts()
                had = {name: lost[shard.number, name] for name in facts if (shard.number, name) in lost}
                writer.commit(facts, had)
            progress.shard()


def still_wanted(out: Path, shard: int, column: str, lost: Lost) -> bool:
    """Whether a column of the plan of work is still to be captured, by whoever gets there first."""
    return (shard, column) in lost or complete_manifest(out, shard, column) is None


def gauged_columns(out: Path, plan: Plan, columns: Sequence[ColumnSpec]) -> set[str]:
    """Return the columns whose manifests hold the gauge: those that do in the cache, else the one it belongs to."""
    for shard in plan.shards:
        held = [manifest for spec in columns if (manifest := complete_manifest(out, shard.number, spec.name))]
        found = {manifest["spec"]["name"] for manifest in held if "gauge" in manifest["facts"]}
        if found:
            return found
    return {gauge_column(columns)}


def refuse_again(out: Path, writer: ShardWriter, columns: Sequence[ColumnSpec]) -> int:
    """Refuse what columns of this shard that exist already refused, with their reasons; return how many samples.

    So a shard whose commit was cut short ends up as if it had not been.
    """
    for spec in columns:
        held = complete_manifest(out, writer.shard.number, spec.name) or {"refused": {}}
        for row, reason in held["refused"].items():
            writer.refuse(int(row), reason)
    return len(writer.refused)


def fill(engine: Engine, writer: ShardWriter, shadow: Shadow, batch_tokens: int, progress: Progress) -> Gauge:
    """Write every row of a shard's columns; return the gauge over it. At most a few micro-batches are in memory."""
    gauge, shard = Gauge(), writer.shard

    def consume(piece: Piece) -> None:
        nonlocal gauge
        piece.wait()
        for row, reason in unfit(piece):
            if row not in writer.refused:
                writer.refuse(row, reason)
        written = 0
        for name, states in piece.states.items():
            rows = as_stored(states) if isinstance(states, Tensor) else shadow.encoded(engine, name, states)
            writer.write(name, rows)
            written += rows.nbytes
        shadow.take(piece)
        gauge += totals(piece.gauge)
        progress.add(int(shard.lengths[piece.rows].sum()), written)

    engine.split, engine.shadow = False, frozenset(shadow.rows)
    drain = Drain(consume, QUEUED)
    try:
        for rows in micro_batches(shard.lengths, batch_tokens):
            for piece in engine.pieces(shard, rows, shadow.columns):
                drain.put(piece)
        drain.finish()
    finally:
        drain.stop()
    return gauge


def proven_facts(engine: Engine, writer: ShardWriter, shadow: Shadow) -> dict[str, dict]:
    """Probe a sealed shard and return what its columns' manifests say of it. Raises ProofError."""
    certified = shadow.certificates(engine, writer)
    probed = probe(engine.model, engine.head, writer.shard, shadow.columns, {*writer.refused}, writer.read)
    made_by = {
        "engine": "transformers",
        "attention": engine.model.config._attn_implementation,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": engine.device.type,
        "split": engine.split,
    }
    return {name: {**made_by, "probe": found, **certified.get(name, {})} for name, found in probed.items()}


def unfit(piece: Piece) -> Iterator[tuple[int, str]]:
    """Yield the samples of a piece whose states cannot be kept, with the reason."""
    reasons: dict[int, str] = {}
    for name, worst_R in piece.worst.items():
        starts = np.cumsum([0, *piece.counts[name]])
        for row, start, stop in zip(piece.rows, starts, starts[1:], strict=False):
            rows = worst_R[start:stop].numpy()
            if not np.isfinite(rows).all():
                reasons.setdefault(row, f"{name} is not finite")
            elif (rows == 0).any():
                reasons.setdefault(row, f"{name} has a row of zeros")
    yield from sorted(reasons.items())


def check_refused(refused: int, samples: int, newest: dict[int, str]) -> None:
    """Stop when more samples are refused than bad luck explains."""
    if refused > max(1, REFUSED_SHARE * samples):
        reason = next(iter(newest.values()), "see `pipeline inspect`")
        raise DataError(
            f"{refused} of {samples} samples gave states that cannot be kept ({reason}); "
            "the target's weights are damaged, or its type is too narrow: try --dtype bfloat16 or float32"
        )
