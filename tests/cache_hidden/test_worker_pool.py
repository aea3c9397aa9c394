"""Rows prepared by worker processes: in order, the same for any number of workers; a bad row costs only itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from templates import prepared_here
from tiny import CHAT_TEMPLATE, config, conversations, tokenizer, write_jsonl

from pipeline.corpus.record_formats import parse_record
from pipeline.corpus.rejections import Tally
from pipeline.corpus.sources import corpus_chunks, read_records
from pipeline.errors import DataError, UsageError
from stages.cache_hidden import worker_pool as pool
from stages.cache_hidden.prepare_records import Job, samples_of
from stages.cache_hidden.worker_pool import WorkerPool

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path):
    """Return a function that makes a job for a target with that chat template."""

    def made(template: str = CHAT_TEMPLATE, **told) -> Job:
        folder = tmp_path / "target"
        config().save_pretrained(folder)
        tokenizer(template).save_pretrained(folder)
        return Job(folder, 512, 264, **told)

    return made


def outcomes(job: Job, corpus: Path, workers: int = 2) -> list:
    with WorkerPool(job, workers) as workers:
        return list(workers.outcomes(corpus_chunks(str(corpus), [corpus])))


def asks(*questions: str) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"to {at}"}]}
        for at, question in enumerate(questions)
    ]


def test_any_number_of_workers_gives_the_same_in_the_corpuss_order(job, tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [*conversations(700), "no JSON", *conversations(300, seed=1)])
    made = job()
    one, two, five = (outcomes(made, corpus, workers) for workers in (1, 2, 5))
    assert one == two == five
    assert [outcome.line for outcome in one] == list(range(1, 1002))
    assert one[700].rejected[0] == "broken line"


def test_a_sample_travels_unchanged(job, tmp_path):
    corpus, made = write_jsonl(tmp_path / "a.jsonl", conversations(40)), job()
    here = list(prepared_here(read_records(str(corpus), [corpus]), made.folder, 512, Tally(), 264))
    there = [sample for outcome in outcomes(made, corpus) for sample in samples_of(outcome, Tally())]
    for one, other in zip(here, there, strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.mask, other.mask)
        assert (one.digest, one.domain, one.split, one.line) == (other.digest, other.domain, other.split, other.line)


HOSTILE = (
    "{%- if 'divide' in m %}{{ 1 // 0 }}{% endif -%}"
    "{%- if 'recurse' in m %}{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}{% endif -%}"
    "{%- if 'range' in m %}{% for i in range(10 ** 12) %}x{% endfor %}{% endif -%}"
    "{%- if 'loop' in m %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{% endif -%}"
    "{%- if 'power' in m %}{{ ((m | length) ** (10 ** 9)) % 7 }}{% endif -%}"
    "{%- if 'repeat' in m %}{{ (m * 10 ** 12) | length }}{% endif -%}"
    "{%- if 'grow' in m %}{% set g = namespace(s='x' * 1000000) %}"
    "{% for i in range(99) %}{% set g.s = g.s ~ g.s %}{% endfor %}{% endif -%}"
)
LOUD = "{%- set m = messages[0]['content'] -%}" + HOSTILE + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("kinds", "reason", "says"),
    [
        (["divide"], "template error", "ZeroDivisionError"),
        (["recurse"], "template error", "RecursionError"),
        (["range"], "template error", "OverflowError"),
        (["repeat", "grow"], "too large", "more than 0.2 GiB"),
        (["loop", "power"], "too slow", "more than 1 s"),
    ],
)
def test_a_rendering_that_fails_hangs_or_grows_costs_its_row(job, tmp_path, kinds, reason, says):
    fine = ["fine"] * 9
    corpus = write_jsonl(tmp_path / "a.jsonl", asks(*fine, *kinds, *fine))
    bounds = {"record_seconds": 1.0, "record_bytes": (1 << 28) - (1 << 25)}
    made = outcomes(job(LOUD, **bounds), corpus)
    faulty = [outcome for outcome in made if outcome.rejected]
    assert [(outcome.file, outcome.line) for outcome in faulty] == [("a.jsonl", 10 + at) for at in range(len(kinds))]
    for outcome in faulty:
        assert outcome.rejected[0] == reason and says in outcome.rejected[1]
    assert sum(len(outcome.samples) for outcome in made) == 18


def test_what_ends_a_worker_is_a_fault_of_its_row(job, tmp_path):
    """A row of which the system lets nothing be caught: there is less address space than its rendering takes."""
    question = "x" * 30_000_000
    corpus = write_jsonl(tmp_path / "a.jsonl", asks("fine", question, "fine"))
    made = outcomes(job(record_bytes=1 << 26), corpus)
    assert [bool(outcome.rejected) for outcome in made] == [False, True, False]


def test_the_record_that_ends_a_worker_is_found_in_a_table_and_in_a_stream(job, tmp_path):
    records = asks("fine", "power", "fine")
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(records), table)
    stream = [parse_record(record, "hub", line) for line, record in enumerate(records, 1)]
    made = job(LOUD, record_seconds=1.0)
    for work, file in ((corpus_chunks(str(table), [table]), "a.parquet"), ([stream], "hub")):
        with WorkerPool(made, 2) as workers:
            found = list(workers.outcomes(work))
        assert [bool(outcome.rejected) for outcome in found] == [False, True, False]
        assert (found[1].file, found[1].line, found[1].rejected[0]) == (file, 2, "too slow")


def test_a_worker_that_somebody_else_ends_costs_no_row(job, tmp_path):
    corpus, made = write_jsonl(tmp_path / "a.jsonl", conversations(400)), job()
    with WorkerPool(made, 2) as workers:
        outcomes_here = workers.outcomes(corpus_chunks(str(corpus), [corpus]))
        found = [next(outcomes_here)]
        for worker in list(workers.workers):
            os.kill(worker.pid, signal.SIGKILL)
        found += outcomes_here
    assert found == outcomes(made, corpus) and not any(outcome.rejected for outcome in found)


def test_a_template_that_ends_every_worker_ends_the_plan(job, tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", asks(*["loop"] * 40))
    with pytest.raises(
        DataError, match=r"17 of the first 40 rows cannot be prepared, such as a\.jsonl:\d+ \(takes more"
    ):
        outcomes(job(LOUD, record_seconds=0.05), corpus)


def test_a_template_that_is_no_jinja_is_refused_in_one_line(job, tmp_path):
    for _ in range(2):  # by the same fork server
        with pytest.raises(UsageError, match="its chat template is no Jinja"):
            WorkerPool(job("{% for m in messages %}{{ m }"))


def test_a_plan_may_stop_at_any_sample_and_leaves_no_worker(job, tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", conversations(600))
    with WorkerPool(job(), 3) as workers:
        made = workers.outcomes(corpus_chunks(str(corpus), [corpus]))
        assert [next(made).line for _ in range(7)] == list(range(1, 8))
        pids = [worker.pid for worker in workers.workers]
    assert len(pids) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_fork_server_that_has_ended_is_replaced(job, tmp_path):
    corpus, made = write_jsonl(tmp_path / "a.jsonl", conversations(20)), job()
    first = outcomes(made, corpus)
    pool._idle[-1].process.kill()
    assert outcomes(made, corpus) == first


def test_a_fork_server_whose_client_left_before_the_answer_ends_silently(job):
    ours, theirs = socket.socketpair()
    with theirs:
        fork_server = subprocess.Popen(
            [sys.executable, "-c", f"from stages.cache_hidden.worker_pool import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
    with Connection(ours.detach()) as connection:
        connection.send(job())
    _, said = fork_server.communicate(timeout=60)
    assert (fork_server.returncode, said) == (0, "")


def test_rows_in_flight_are_bounded(job, tmp_path, monkeypatch):
    """A slow first row keeps those behind it waiting, not piling up."""
    monkeypatch.setattr(pool, "IN_FLIGHT", 1 << 16)
    corpus = write_jsonl(tmp_path / "a.jsonl", asks("loop", *["fine" * 2000] * 400))
    read = 0

    def counted():
        nonlocal read
        for chunk in corpus_chunks(str(corpus), [corpus]):
            read += 1
            yield chunk

    with WorkerPool(job(LOUD, record_seconds=0.5), 2) as workers:
        made = workers.outcomes(counted())
        assert next(made).rejected[0] == "too slow" and read <= 2
        assert sum(1 for _ in made) == 400


PLAN_SLOWLY = """
import signal
import sys
from pathlib import Path
from pipeline.corpus.sources import corpus_chunks
from stages.cache_hidden.prepare_records import Job
from stages.cache_hidden.worker_pool import WorkerPool
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this test may ignore it
corpus = Path(sys.argv[2])
with WorkerPool(Job(Path(sys.argv[1]), 512, 264), 2) as workers:
    for outcome in workers.outcomes(corpus_chunks(str(corpus), [corpus])):
        print([worker.pid for worker in workers.workers] + [workers.fork_server.process.pid], flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_a_plan_stops_its_workers_even_inside_one_call(job, tmp_path, sent):
    corpus = write_jsonl(tmp_path / "a.jsonl", asks(*["fine"] * 128, "power", *["fine"] * 127, "power"))
    command = [sys.executable, "-c", PLAN_SLOWLY, str(job(LOUD).folder), str(corpus)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        pids = json.loads(process.stdout.readline())
        time.sleep(0.5)  # the workers are at their powers
        process.send_signal(sent)
        process.wait(timeout=20)
        told = process.stderr.read()
    ended = time.monotonic() + 5
    while any(_runs(pid) for pid in pids) and time.monotonic() < ended:
        time.sleep(0.05)
    assert len(pids) == 3 and not any(_runs(pid) for pid in pids)
    assert told.count("Traceback") == (1 if sent == signal.SIGINT else 0), told


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False
