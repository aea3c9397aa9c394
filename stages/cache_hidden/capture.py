"""Capture of shards: the target computes, a thread writes, the probe compares, and only then is a shard committed.

Shards are independent and their bytes depend on nothing but the plan, so a stopped capture continues with the next
missing shard, and every worker computes the same bytes.
"""

from collections.abc import Iterator, Sequence
from types import MappingProxyType

import numpy as np
import torch
import transformers
from torch import Tensor

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.catalog import Catalog, Work
from pipeline.cache.codecs.int8 import as_stored
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.micro_batches import micro_batches
from pipeline.cache.target_files import HEAD, target_file
from pipeline.cache.writer import ShardWriter
from pipeline.errors import DataError
from pipeline.target.copy_to_cache import store_target
from pipeline.target.head import TargetHead
from pipeline.target.model import head_of, load_target, stop_tokens
from pipeline.target.on_policy import OnPolicyStats, on_policy_column, on_policy_share, sum_scores
from pipeline.target.probe import probe
from stages.cache_hidden.background_writer import BackgroundWriter
from stages.cache_hidden.calibrate import load_or_make_calibrations
from stages.cache_hidden.certificate_rows import CertificateRows
from stages.cache_hidden.engine_hf import Engine, ForwardOutput
from stages.cache_hidden.plan_report import Lost
from stages.cache_hidden.progress import Progress
from stages.cache_hidden.settings import CaptureSettings

QUEUED = 2  # micro-batches that wait for the writer
REFUSED_SHARE = 0.01  # of a plan's samples; more means that something is wrong with the target or its dtype


def capture_shards(
    catalog: Catalog,
    settings: CaptureSettings,
    work: Work,
    device: str,
    refused: int,
    lost: Lost = MappingProxyType({}),
) -> None:
    """Run the target over every shard in `work` and commit each that passes its probe.

    refused: how many samples earlier runs refused. lost: damaged (shard, column)s to capture again, each with its
    former manifest if known, which is written again where the same bytes come out.
    Raises ProofError, DataError (too many refused), RoomError, UsageError.
    """
    out, plan = catalog.path, catalog.plan
    model = load_target(str(settings.folder), device=device, dtype=settings.dtype)
    store_target(catalog, settings.folder, head_of(model), model.config, stop_tokens(model))
    head = TargetHead.load(target_file(catalog, HEAD), device, getattr(torch, settings.dtype))
    engine = Engine(model, head, 0.0)
    with_stats = on_policy_columns(catalog, settings.columns)
    with write_errors(out, "a calibration"), process_lock(out, "calibration"):  # by one process, for all
        engine.calibrations = load_or_make_calibrations(engine, out, plan, settings.columns, settings.batch_tokens)
    with Progress(sum(shard.rows for shard, _ in work), len(work)) as progress:
        for shard, wanted in work:
            catalog.refresh(shard.number)  # another worker may have captured this shard since the work was listed
            key = shard.number
            columns = [spec for spec in wanted if (key, spec.name) in lost or not catalog.captured(key, spec.name)]
            if not columns:
                progress.add_shard()
                continue
            engine.on_policy_share = on_policy_share(plan.segment(shard.number)["supervised"])
            with ShardWriter(catalog, shard, columns) as writer:
                earlier = repeat_refusals(writer, settings.columns)
                certificate_rows = CertificateRows(columns, shard)
                on_policy = write_states(engine, writer, certificate_rows, settings.batch_tokens, progress)
                refused += len(writer.refused) - earlier
                check_refused(refused, plan.samples, writer.refused)
                writer.seal()
                facts = probe_and_certify(engine, writer, certificate_rows)
                for name in with_stats & facts.keys():
                    facts[name]["gauge"] = on_policy.as_facts()
                previous = {name: lost[shard.number, name] for name in facts if (shard.number, name) in lost}
                writer.commit(facts, previous)
            progress.add_shard()


def on_policy_columns(catalog: Catalog, columns: Sequence[ColumnSpec]) -> set[str]:
    """Return the columns whose manifests hold the on-policy figures: as the cache has it, else the default one."""
    for shard in range(catalog.shards):
        manifests = [manifest for spec in columns if (manifest := catalog.captured(shard, spec.name))]
        found = {manifest["spec"]["name"] for manifest in manifests if "gauge" in manifest["facts"]}
        if found:
            return found
    return {on_policy_column(columns)}


def repeat_refusals(writer: ShardWriter, columns: Sequence[ColumnSpec]) -> int:
    """Refuse the samples that this shard's committed columns refuse, with their reasons; return how many.

    So a shard whose commit was interrupted ends up as if it had not been.
    """
    for spec in columns:
        manifest = writer.catalog.captured(writer.shard.number, spec.name) or {"refused": {}}
        for row, reason in manifest["refused"].items():
            writer.refuse(int(row), reason)
    return len(writer.refused)


def write_states(
    engine: Engine, writer: ShardWriter, certificate_rows: CertificateRows, batch_tokens: int, progress: Progress
) -> OnPolicyStats:
    """Write every row of a shard's columns; return its on-policy figures. At most a few micro-batches are in memory."""
    on_policy, shard = OnPolicyStats(), writer.shard

    def write_output(output: ForwardOutput) -> None:
        nonlocal on_policy
        output.wait()
        for row, reason in unusable_samples(output):
            if row not in writer.refused:
                writer.refuse(row, reason)
        written = 0
        for name, states in output.states.items():
            rows = as_stored(states) if isinstance(states, Tensor) else certificate_rows.encoded(engine, name, states)
            writer.write(name, rows)
            written += rows.nbytes
        certificate_rows.add(output)
        on_policy += sum_scores(output.on_policy)
        progress.add(int(shard.lengths[output.rows].sum()), written)

    engine.split, engine.certified_samples = False, frozenset(certificate_rows.samples)
    background = BackgroundWriter(write_output, QUEUED)
    try:
        for rows in micro_batches(shard.lengths, batch_tokens):
            for output in engine.forward_outputs(shard, rows, certificate_rows.columns):
                background.put(output)
        background.finish()
    finally:
        background.stop()
    return on_policy


def probe_and_certify(engine: Engine, writer: ShardWriter, certificate_rows: CertificateRows) -> dict[str, dict]:
    """Probe a sealed shard; return the facts for each column's manifest. Raises ProofError."""
    certified = certificate_rows.certify(engine, writer)
    probed = probe(engine.model, engine.head, writer.shard, certificate_rows.columns, {*writer.refused}, writer.read)
    made_by = {
        "engine": "transformers",
        "attention": engine.model.config._attn_implementation,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": engine.device.type,
        "split": engine.split,
    }
    return {name: {**made_by, "probe": found, **certified.get(name, {})} for name, found in probed.items()}


def unusable_samples(output: ForwardOutput) -> Iterator[tuple[int, str]]:
    """Yield the samples of a forward's output whose states are not finite or all zero in a row, with the reason."""
    reasons: dict[int, str] = {}
    for name, largest_R in output.largest.items():
        starts = np.cumsum([0, *output.counts[name]])
        for row, start, stop in zip(output.rows, starts, starts[1:], strict=False):
            rows = largest_R[start:stop].numpy()
            if not np.isfinite(rows).all():
                reasons.setdefault(row, f"{name} is not finite")
            elif (rows == 0).any():
                reasons.setdefault(row, f"{name} has a row of zeros")
    yield from sorted(reasons.items())


def check_refused(refused: int, samples: int, newest: dict[int, str]) -> None:
    """Raise DataError when more samples are refused than REFUSED_SHARE. newest: the last shard's, with reasons."""
    if refused > max(1, REFUSED_SHARE * samples):
        reason = next(iter(newest.values()), "see `pipeline inspect`")
        raise DataError(
            f"{refused} of {samples} samples gave states that cannot be kept ({reason}); "
            "the target's weights are damaged, or its type is too narrow: try --dtype bfloat16 or float32"
        )
