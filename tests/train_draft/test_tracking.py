"""Trackers: the figures of metrics.jsonl in TensorBoard and W&B, each step once, whatever happens to the run."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_draft import Killed, kill, stopping

from pipeline.errors import UsageError
from pipeline.runs.recipe import Recipe, load_recipe
from pipeline.runs.run_logs import read_log
from stages.train_draft.run import run
from stages.train_draft.tracking import TRACKERS, TensorBoard, Tracking, tracker_id, values_of

SETS = ("draft.method=dflash", "draft.block_size=4", "train.batch=4", "train.anchors=6", "train.log_every=1")
SETS += ("train.steps=8", "train.save_every=3", "train.eval_every=4")
TRACK = 'train.track=["tensorboard"]'


def trained(cache: Path, out: Path, *sets: str):
    return run(cache, None, (*SETS, *sets), out, "cpu")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds, nothing purged: (step, value) of each tag, in the order of the files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def logged(run_folder: Path, tag: str) -> list[tuple[int, float]]:
    lines = [line for line in read_log(run_folder / "metrics.jsonl") if tag in line]
    return [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines]


def test_tensorboard_has_every_step_of_the_log_once_after_a_kill_too(tiny_cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 5, kill)  # the checkpoint is of step 3
        trained(tiny_cache, tmp_path / "run", TRACK)
    before = scalars(tmp_path / "run" / "tensorboard")["train/loss"]
    assert 3 < before[-1][0] <= 5, "steps that are taken again"

    done = trained(tiny_cache, tmp_path / "run", TRACK)
    found = scalars(done.run / "tensorboard")
    assert found["train/loss"] == logged(done.run, "loss") and len(found["train/loss"]) == 8
    assert [step for step, _ in found["time/head"]] == [*range(1, 9)]
    assert {"train/accept_len_tf", "speed/tokens_s", "time/data", "time/other"} <= found.keys()


def test_a_tensorboard_that_is_open_forgets_the_steps_that_are_written_again(tiny_cache, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 5, kill)
        trained(tiny_cache, tmp_path / "run", TRACK)
    shutil.copytree(tmp_path / "run" / "tensorboard", tmp_path / "both")  # what it has read before
    done = trained(tiny_cache, tmp_path / "run", TRACK)
    shutil.copytree(done.run / "tensorboard", tmp_path / "both", dirs_exist_ok=True)
    reader = EventAccumulator(str(tmp_path / "both")).Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [*range(1, 9)]


def test_trackers_decide_nothing_and_may_change(tiny_cache, tmp_path, monkeypatch):
    plain = trained(tiny_cache, tmp_path / "plain")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 5, kill)
        trained(tiny_cache, tmp_path / "run")
    tracked = trained(tiny_cache, tmp_path / "run", TRACK)  # the same run goes on
    for name in ("metrics.jsonl", "recipe.toml", "checkpoints/step-00000008/draft.safetensors"):
        assert (tracked.run / name).read_bytes() == (plain.run / name).read_bytes(), name
    assert len(scalars(tracked.run / "tensorboard")["train/loss"]) == 8, "the steps before, too"
    both = Recipe(), load_recipe(None, (TRACK,))
    assert both[0].digest() == both[1].digest() and both[1].train.track == ("tensorboard",)


def test_what_a_tracker_shows_of_a_line():
    assert values_of({"step": 3, "epoch": 0, "loss": 2.5, "slot_ce": [1.0]}) == {"train/epoch": 0.0, "train/loss": 2.5}
    timing = {"step": 3, "seconds": 9.0, "tokens_s": 8.0, "data_wait": 0.5, "eta": 1.0, "time": {"data": 0.5}}
    assert values_of(timing) == {"speed/tokens_s": 8.0, "speed/data_wait": 0.5, "time/data": 0.5}
    assert values_of({"step": 3, "tokens_s": 8.0}) == {"speed/tokens_s": 8.0}, "a log of before"
    figures = {"accept_len": 2.0, "interval": [1.5, 2.5], "calls": 9}
    domains = {name: {"accept_len": 3.0, "calls": 4} for name in ("code", "accept_len", "")}
    assert values_of({"step": 3, "eval": figures | {"domains": domains}}) == {
        "eval/accept_len": 2.0, "eval/accept_len_low": 1.5, "eval/accept_len_high": 2.5,
        "eval/domain/code": 3.0, "eval/domain/accept_len": 3.0,
    }  # fmt: skip
    assert values_of({"step": 3, "eval": {"accept_len": 0.0, "interval": [0.0, 0.0], "calls": 0}}) == {}


def test_a_missing_package_is_refused_before_anything_is_written(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoard, "package", "no_such_package_at_all")
    with pytest.raises(UsageError, match=r"pip install 'draft-pipeline\[tensorboard\]'"):
        trained(tiny_cache, tmp_path / "run", TRACK)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tracker_that_fails_in_the_middle_costs_one_line(tiny_cache, tmp_path, monkeypatch, capsys):
    log = TensorBoard.log

    def failing(self, step, values):
        if step == 3:
            raise ConnectionError("https://me:hunter2@host is gone\nand more")
        log(self, step, values)

    monkeypatch.setattr(TensorBoard, "log", failing)
    done = trained(tiny_cache, tmp_path / "run", TRACK)
    printed = capsys.readouterr().out
    assert printed.count("tensorboard failed (ConnectionError: https://***@host is gone): the training goes on") == 1
    assert "hunter2" not in printed and len(logged(done.run, "loss")) == 8
    assert [step for step, _ in scalars(done.run / "tensorboard")["train/loss"]] == [1, 2]


def test_a_tracker_that_cannot_begin_or_end_costs_one_line_each(tmp_path, monkeypatch):
    said = []
    for broken in ("__init__", "close"):
        monkeypatch.setattr(TensorBoard, broken, lambda *_: 1 / 0)
        tracked = Tracking(tmp_path, ["tensorboard"], {}, said.append)
        tracked.add({"step": 1, "loss": 2.0})
        tracked.close()
        monkeypatch.undo()
    assert len([line for line in said if line.startswith("tensorboard failed (ZeroDivisionError")]) == 2


class Growing:
    """A tracker that cannot take back what it has, as a server. store: what it has, of the only run."""

    package, store, place = "json", (), "there"

    def __init__(self, *_):
        self.last = self.store[-1][0] if self.store else -1

    def log(self, step, values):
        self.store.append((step, dict(values)))

    def close(self):
        pass


@pytest.mark.parametrize("kept", [9, 1])  # steps that had reached it: more than the checkpoint's, and fewer
def test_a_tracker_that_only_grows_goes_on_behind_its_last_step(tiny_cache, tmp_path, monkeypatch, kept):
    monkeypatch.setitem(TRACKERS, "wandb", Growing)
    monkeypatch.setattr(Growing, "store", store := [])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 5, kill)
        trained(tiny_cache, tmp_path / "run", 'train.track=["wandb"]')
    del store[kept:]
    trained(tiny_cache, tmp_path / "run", 'train.track=["wandb"]')
    assert [step for step, _ in store] == [*range(1, 9)]
    assert [values["train/loss"] for _, values in store] == [value for _, value in logged(tmp_path / "run", "loss")]


def test_a_run_keeps_its_name_for_life_and_a_new_one_in_its_place_has_another(tmp_path):
    (tmp_path / "run").mkdir()
    name = tracker_id(tmp_path / "run")
    assert name == tracker_id(tmp_path / "run") and name.startswith("run-")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert tracker_id(tmp_path / "run") != name


def wandb_records(path: Path) -> list:
    """The records of a W&B file: after 7 bytes, a log of LevelDB's form in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, held, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        held, at = held + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its last part
            found.append(Record.FromString(held))
            held = b""
    return found


def test_wandb_offline_needs_no_network_and_has_every_step_once(tiny_cache, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 5, kill)
        trained(tiny_cache, tmp_path / "run", 'train.track=["wandb"]')
    done = trained(tiny_cache, tmp_path / "run", 'train.track=["wandb"]')
    (file,) = (done.run / "wandb").glob("offline-run-*/*.wandb")
    losses = []
    for record in wandb_records(file):
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "train/loss" in items:
            losses.append((record.history.step.num, json.loads(items["train/loss"])))
    assert losses == logged(done.run, "loss")


def test_the_recipe_knows_the_trackers_there_are():
    for name in TRACKERS:
        assert load_recipe(None, (f'train.track=["{name}"]',)).train.track == (name,)
    with pytest.raises(UsageError, match="track"):
        load_recipe(None, ('train.track=["mlflow"]',))


def test_training_without_a_tracker_imports_none():
    code = "import sys, stages.train_draft.run; print({'tensorboard', 'wandb', 'trackio'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
