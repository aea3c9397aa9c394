"""Plain replies kept in a file: taken where all that decided them agrees, refused elsewhere, and judged like any."""

import json
import threading

import pytest
import torch
from click.testing import CliRunner
from greedy import make_greedy_cache, save_stopping_target
from rich.console import Console
from verify_steps import StepRecorder, diverged

from pipeline import cli
from pipeline.cache.manifest import read_canonical, write_canonical
from pipeline.errors import ProofError, RoomError, UsageError
from pipeline.evaluation.evaluation_table import evaluation_table
from pipeline.evaluation.reports import Speed
from pipeline.target.loading import load_target
from stages.evaluate import measure
from stages.evaluate import run as evaluation
from stages.evaluate.lossless import DecidedBy, PlainReplies, digest_of, plain_decode, reply_settings
from stages.evaluate.run import run


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_stopping_target(tmp_path_factory.mktemp("target") / "stopping")


@pytest.fixture(scope="module")
def trained(target, tmp_path_factory):
    """A Domino run of 5 steps."""
    from stages.train_draft.run import run as train

    cache, out = make_greedy_cache(target, tmp_path_factory.mktemp("cache") / "greedy"), tmp_path_factory.mktemp("run")
    small = ("draft.block_size=4", "draft.emb_dim=8", "draft.gru_hidden_dim=16", "draft.intermediate_size=48")
    train(cache, None, (*small, "train.steps=5", "train.batch=6", "train.save_every=5"), out / "domino", "cpu")
    return out / "domino"


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory):
    """The file of a first evaluation, and its report."""
    path = tmp_path_factory.mktemp("kept") / "plain.json"
    return path, evaluate(trained, path)


@pytest.fixture
def file(kept, tmp_path):
    """A copy of that file."""
    path = tmp_path / "plain.json"
    path.write_bytes(kept[0].read_bytes())
    return path


def evaluate(trained, path, count=4, max_new=12, **options):
    return run(trained, count=count, max_new=max_new, device="cpu", plain=path, **options)


def counted(monkeypatch):
    """Return the prompts that the plain loop decodes from now on, as they come."""
    seen = []

    def decode(target, prompt_ids, *rest):
        seen.append(prompt_ids)
        return plain_decode(target, prompt_ids, *rest)

    monkeypatch.setattr(measure, "plain_decode", decode)
    return seen


def test_a_second_evaluation_runs_no_plain_loop_and_reports_the_same_but_for_speed(kept, trained, monkeypatch):
    path, first = kept
    before = path.read_bytes()
    monkeypatch.setattr(measure, "plain_decode", lambda *_: pytest.fail("decoded again"))

    again = evaluate(trained, path)

    assert set(first.as_dict()["speed"]) == {"plain_tokens_s", "speculative_tokens_s", "speedup"}
    assert set(again.as_dict()["speed"]) == {"speculative_tokens_s"} and again.speed.speculative_tokens_s > 0
    assert (first.lossless.from_file, again.lossless.from_file) == (0, 4)
    lossless = first.lossless.model_copy(update={"from_file": 4})
    assert again == first.model_copy(update={"speed": again.speed, "lossless": lossless})
    assert path.read_bytes() == before


def test_a_prompt_that_the_file_lacks_is_decoded_and_added_and_no_ratio_is_claimed(file, trained, target, monkeypatch):
    seen = counted(monkeypatch)
    before = read_canonical(file)["plain_replies"]

    more = evaluate(trained, file, count=6)

    after = read_canonical(file)["plain_replies"]
    assert len(seen) == 2 and more.lossless.from_file == 4 and more.speed.speedup is None
    assert after == before | {digest_of(ids): after[digest_of(ids)] for ids in seen} and len(after) == 6
    model = load_target(str(target))
    assert all(plain_decode(model, ids, 12, evaluation.stop_tokens(model)).ids == after[digest_of(ids)] for ids in seen)


def test_what_was_decoded_before_an_interruption_is_kept(kept, trained, tmp_path, monkeypatch):
    def until_the_third(*args):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return decode(*args)

    seen = counted(monkeypatch)
    decode, path = measure.plain_decode, tmp_path / "plain.json"
    monkeypatch.setattr(measure, "plain_decode", until_the_third)

    with pytest.raises(KeyboardInterrupt):
        evaluate(trained, path)

    held = read_canonical(path)["plain_replies"]
    assert held.items() < read_canonical(kept[0])["plain_replies"].items() and len(held) == 3


def test_what_ends_it_is_said_even_where_replies_cannot_be_kept(trained, tmp_path, monkeypatch):
    def refuse(*_):
        raise ProofError("the proof failed")

    def full(*_):
        raise RoomError("no room for plain replies")

    monkeypatch.setattr(measure.LosslessCheck, "compare", refuse)
    monkeypatch.setattr(PlainReplies, "write", full)
    with pytest.raises(ProofError, match="the proof failed"):
        evaluate(trained, tmp_path / "plain.json")


@pytest.mark.parametrize(("batch", "remedy"), [(1, "shorter prompts"), (3, "smaller --batch")])
def test_a_device_too_small_is_no_bug(trained, monkeypatch, batch, remedy):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure.LosslessCheck, "compare", full)
    with pytest.raises(RoomError, match=f"no memory on the device for decoding .*{remedy}"):
        evaluate(trained, None, batch=batch)


@pytest.mark.parametrize("batch", [3, 50])
def test_prompts_decoded_at_once_give_the_same_report_but_for_speed_and_rounding(trained, monkeypatch, batch):
    recorder, reports, recorded = StepRecorder(monkeypatch), [], []
    for size in (1, batch):
        reports.append(evaluate(trained, None, count=6, sampling=evaluation.SamplingOptions(1.0, 1.0), batch=size))
        recorded.append(recorder.take())
    one, many = reports
    by_rounding = {(digest_of(prompt), drawn) for prompt, drawn in diverged(*recorded)}

    assert len(recorded[0]) == 12 and many.speed == Speed()
    assert many.settings == one.settings.model_copy(update={"batch": min(batch, 6)})
    for drawn, here, there in ((False, one, many), (True, one.sampled, many.sampled)):
        whole = not any(of_drawn == drawn for _, of_drawn in by_rounding)
        for sample, other in zip(here.samples, there.samples, strict=True):
            assert sample == other or (sample.prompt, drawn) in by_rounding
        for key in type(here).model_fields.keys() - {"speed", "settings", "sampled", "lossless", "agreement"}:
            assert getattr(here, key) == getattr(there, key) or (key in ("samples", "overall", "domains") and not whole)
    assert one.lossless.prompts == many.lossless.prompts == 6
    console = Console(width=200)
    with console.capture() as text:
        console.print(evaluation_table(many))
    assert "tokens a second: only measured with one prompt at a time" in text.get()


def test_a_difference_says_what_to_leave_out_first(file, trained, monkeypatch):
    from pipeline.target import kv_cache as memory

    masks = memory.BatchedKV._masks
    monkeypatch.setattr(memory.BatchedKV, "_masks", lambda self: torch.zeros_like(masks(self)))
    with pytest.raises(ProofError, match=r"; first evaluate without --plain .* and without --batch$"):
        evaluate(trained, file, batch=4)


def test_the_table_claims_no_speed_up_and_says_whence_the_replies_are(kept, trained):
    shown = []
    for report in (kept[1], evaluate(trained, kept[0])):
        console = Console(width=200)
        with console.capture() as text:
            console.print(evaluation_table(report))
        shown.append(text.get())
    assert "times as fast" in shown[0] and "from a file" not in shown[0]
    assert "times as fast" not in shown[1] and " plain," not in shown[1] and " speculative" in shown[1]
    assert "4 of 4 replies identical to plain decoding; 4 plain replies from a file" in shown[1]


def test_a_stored_reply_that_was_tampered_with_is_a_difference(file, trained):
    facts = read_canonical(file)
    replies = facts["plain_replies"]
    first = next(name for name, ids in replies.items() if len(ids) > 3)
    replies[first][2] = (replies[first][2] + 1) % 250
    write_canonical(file, {"decided_by": facts["decided_by"], "plain_replies": replies})

    with pytest.raises(ProofError, match=r"At token 2 of the reply .*the plain reply is from .*plain\.json"):
        evaluate(trained, file)


def test_replies_under_another_limit_are_refused_before_anything_is_decoded(file, trained, monkeypatch):
    monkeypatch.setattr(evaluation, "decode_greedily", lambda *_: pytest.fail("decoded"))
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"decoded with max_new 12, and here it is 13; name another file"):
        evaluate(trained, file, max_new=13)
    assert file.read_bytes() == before


@pytest.mark.parametrize("key", DecidedBy.model_fields)
def test_whatever_else_decided_a_reply_has_to_agree(file, target, key):
    decided_by = read_canonical(file)["decided_by"]
    model = load_target(str(target))
    here = reply_settings(model, decided_by["target"], 12, decided_by["stops"])
    assert here.model_dump() == decided_by
    assert PlainReplies.open(file, here).stored

    other = {str: "other", int: 77, list: [3]}[type(decided_by[key])]
    with pytest.raises(UsageError, match=f"decoded with {key} .* and here it is .*; name another file"):
        PlainReplies.open(file, here.model_copy(update={key: other}))


def test_threads_and_compute_type_are_those_in_use(target):
    model, threads = load_target(str(target)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        found = reply_settings(model.to(torch.bfloat16), "digest", 9, {7, 3})
    finally:
        torch.set_num_threads(threads)
    assert (found.threads, found.dtype, found.stops) == (threads + 1, "bfloat16", [3, 7])
    assert found.device.startswith("cpu")


def test_a_damaged_or_foreign_file_is_refused_in_one_line_and_stays(file, trained):
    whole = file.read_bytes()
    at = whole.index(b"plain_replies") + 70
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for data in (whole[:-9], flipped, b"", b"\xff", b"[]", json.dumps({"draft": {"method": "domino"}}).encode()):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=r"--plain .*plain\.json.*; remove it or name another file") as refused:
            evaluate(trained, file)
        assert "\n" not in str(refused.value) and "verify" not in str(refused.value)
        assert file.read_bytes() == data
    write_canonical(file, {"decided_by": {}, "plain_replies": {}})
    with pytest.raises(UsageError, match="remove it or name another file"):
        evaluate(trained, file)
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        evaluate(trained, file.parent)


def test_evaluations_at_once_lose_none_of_each_other_s_replies(file):
    decided_by = DecidedBy(**read_canonical(file)["decided_by"])
    before = PlainReplies.open(file, decided_by).stored
    reply = next(iter(before.values()))

    def add(worker):
        for number in range(6):
            replies = PlainReplies(file, decided_by, before)  # opened before any other wrote
            replies.new[digest_of([worker, number])] = reply
            replies.write()

    workers = [threading.Thread(target=add, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    added = {digest_of([worker, number]): reply for worker in range(4) for number in range(6)}
    assert PlainReplies.open(file, decided_by).stored == before | added
    assert [path.name for path in file.parent.iterdir()] == ["plain.json"]


def test_the_command_takes_a_file(file, trained):
    options = ["evaluate", "--draft", str(trained), "--count", "4", "--max-new", "12", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli.commands, [*options, "--plain", str(file)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["lossless"]["from_file"] == 4
