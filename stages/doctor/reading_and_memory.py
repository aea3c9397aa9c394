"""Slow reading and too little memory: what a run waits for, and what it takes of a device."""

import time
from collections.abc import Callable

import torch

from pipeline.cache.atomic import size_text
from pipeline.cache.disk_speed import read_speed
from pipeline.runs.training_data import stratified_subset, training_config
from pipeline.tensors import device_bytes
from stages.doctor.examined_run import Case, in_time
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding
from stages.doctor.mismatch import command

WAIT = 0.05  # share of the time
LEAST_WAIT_S = 3.0  # in all: below it, a run's first batches are all there is to see
READ_BYTES, READ_S = 128 << 20, 3.0
SMALL_FILE = 4 << 20  # bytes of a column's file: below it, opening it takes as long as reading it
READS = 8  # samples read to see what checksums and codecs take
# Of a resolved recipe, whether embedding and head are one, and a device's bytes: whether a step fits, whether whole,
# and lines in words.
FitOn = Callable[..., tuple[bool, bool, list[str]]]


def slow_reading(case: Case) -> Finding:
    """The share of the time that the run waited for data; where that is much, what it waited for."""
    name, timing = "slow reading", case.timing
    if timing is None:
        return Finding(name, NOTE, "no step is timed")
    share, seconds = timing["data_wait"], timing["seconds"]
    step_s, per_second = timing["step_seconds"], timing["tokens_s"]
    facts = {"data_wait": share, "seconds": seconds, "tokens_s": per_second}
    words = f"{share:.0%} of {seconds:,.0f} s spent waiting for data, at {per_second:,.0f} tokens/s"
    if share <= WAIT or share * seconds < LEAST_WAIT_S:
        return Finding(name, OK, words, facts=facts)
    wanted = per_second / (1 - share) * _token_bytes(case)  # without the wait
    files = _column_files(case)
    disk = read_speed(files, READ_BYTES, READ_S)
    size = sum(path.stat().st_size for path in files) / max(1, len(files))
    cpu = _decode_seconds(case) * per_second * step_s  # of a step
    facts |= {"wanted_bytes_s": wanted, "disk_bytes_s": disk, "file_bytes": size, "cpu_s_a_step": cpu, "step_s": step_s}
    words += f"; it asks for {wanted / 1e6:,.0f} MB/s, its disk reads {disk / 1e6:,.0f} MB/s"
    words += f", checksums and codec take {cpu:.2f} s of processor time in a step of {step_s:.2f} s"
    if disk < 1.2 * wanted:
        remedy = f"a faster disk, `pipeline recode {case.cache.path} --codec int8`, or `--set train.echo=4`"
        return Finding(name, PROBLEM, words, "the disk is what it waits for", remedy, facts)
    if cpu > 0.5 * step_s:
        remedy = "more processors for this process, or a codec that is cheaper to decode (raw, int8)"
        return Finding(name, PROBLEM, words, "checksums and codec are what it waits for", remedy, facts)
    if size < SMALL_FILE:
        words += f", {len(files):,} files of {size_text(int(size))}"
        remedy = "a cache of one larger capture, or `--set train.echo=4`, which reads each batch once for four steps"
        return Finding(name, PROBLEM, words, "many small files are what it waits for", remedy, facts)
    remedy = "see what else reads that disk or uses the processors; `--set train.echo=4` reads a quarter"
    return Finding(name, PROBLEM, words, "neither disk nor codec is that slow now", remedy, facts)


def _columns(case: Case) -> list[str]:
    draft = case.resolved.draft
    return [f"aux.{layer}" for layer in draft.target_layer_ids] + ["final"] * draft.needs_final_states


def _column_files(case: Case) -> list:
    """The files of the columns that the run reads, of every shard."""
    folders = [case.cache.path / "shards" / f"{shard:06d}" for shard in range(case.cache.shards)]
    found = []
    for folder in folders:
        for column in _columns(case):
            place = folder / column
            found += [path for path in place.rglob("*") if path.is_file() and path.stat().st_size > 4096]
            arrow = folder / f"{column}.arrow"
            found += [arrow] if arrow.is_file() else []
    return found


def _token_bytes(case: Case) -> float:
    """The bytes that a token's states take on disk, of the columns that are read."""
    total = sum(path.stat().st_size for path in _column_files(case))
    return total / max(1, int(case.cache.samples.length.sum()))


def _decode_seconds(case: Case) -> float:
    """The processor time that reading a token takes, its checksums and codec included."""
    samples, draft = stratified_subset(case.cache, case.split.train, READS).tolist(), case.resolved.draft
    tokens, began = 0, 0.0
    for warm in (True, False):
        tokens, began = 0, time.process_time()
        read = in_time(samples, lambda i: len(case.cache.read(i, draft.target_layer_ids, draft.needs_final_states).ids))
        tokens = sum(read)
        if warm:
            continue
    return (time.process_time() - began) / max(1, tokens)


def out_of_memory(case: Case, fit_on: FitOn, memory: int | None = None) -> Finding:
    """The memory that a step takes against a device's: the one named, else this machine's GPU; and what the run did for
    want of memory."""
    name, state = "out of memory", case.state
    size = memory or device_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    did = {
        key: value
        for key in ("blocks_per_pass", "moments_on_host", "recomputes_layers", "embedding_on_host")
        if state is not None and (value := getattr(state, key))
    }
    facts = {"device_bytes": size, "done_for_want_of_memory": did}
    done = f"for want of memory the run did: {', '.join(f'{key} {value}' for key, value in did.items())}"
    if size is None:
        if did:
            return Finding(name, NOTE, done, "slower, the same loss", "", facts)
        return Finding(name, OK, "a CPU's memory is paged; --device-memory SIZE tells of a GPU", facts=facts)
    tied = bool(training_config(case.cache.target_config).get("tie_word_embeddings"))
    fits, whole, lines = fit_on(case.resolved, tied, size)
    words = "; ".join(lines)
    facts |= {"fits": fits, "whole": whole}
    if not fits:
        smaller = command(case, train__context=max(64, case.recipe.train.context // 2))
        remedy = f"{smaller}, or share it: torchrun and --shard"
        return Finding(name, PROBLEM, words, "", remedy, facts)
    if whole and not did:
        return Finding(name, OK, words, facts=facts)
    return Finding(name, NOTE, "; ".join([words, *[done] * bool(did)]), "slower, the same loss", "", facts)
