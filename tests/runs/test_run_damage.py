"""The folder of a finished run, damaged or forged: what it serves is what was trained, or one line says it is not.

`pytest tests/runs/test_run_damage.py --flips 1000` flips five times that many bits; the suite, 200.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_maker import flip
from run_folders import without_checksums

from pipeline.cache import HiddenCache
from pipeline.errors import CacheError
from pipeline.evaluation.reports import load_report
from pipeline.json_files import parse_checksummed, record_bytes
from pipeline.published.card import provenance
from pipeline.runs import checkpoint
from stages.evaluate.run import describe_draft
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train

SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=4", "train.log_every=1")
SETS += ("train.save_every=2", "train.eval_every=2", "draft.method=dspark")
LAST = "checkpoints/step-00000004"
ANSWER = re.compile(r"remove (/\S+|it)[: ]")  # what an error says to remove
NOT_SERVED = ("timing.jsonl", "optimizer.safetensors")  # a finished run reads neither


@pytest.fixture(scope="module")
def whole(tiny_cache, tmp_path_factory):
    run = train(tiny_cache, None, SETS, tmp_path_factory.mktemp("whole") / "run", "cpu").run
    evaluate(run, count=3, max_new=6, device="cpu", out=run / "evaluation.json")
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def served(run: Path, cache: Path) -> dict:
    """Everything that commands take from the folder of a finished run."""
    done = train(cache, None, SETS, run, "cpu")
    draft = checkpoint.load_draft(run, HiddenCache.open(cache).head())
    known = provenance(run)
    return {
        "result": (done.steps, done.accept_len),
        "weights": {name: weight.clone() for name, weight in draft.state_dict().items()},
        "config": draft.config,
        "described": describe_draft(run).facts(draft).model_copy(update={"path": ""}),
        "export": known[1],
        "report": load_report(run / "evaluation.json"),
    }


def resumed(run: Path, cache: Path, out: Path) -> bytes:
    """What a run says of itself that goes on from its last checkpoint: the result, made of metrics and weights."""
    shutil.copytree(run, out)
    (out / "done.json").unlink()
    train(cache, None, SETS, out, "cpu")
    said = (out / "done.json").read_bytes() + (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out)
    return said


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_every_flipped_bit_of_a_run_is_refused_or_changes_nothing(whole, run, tiny_cache, tmp_path, request):
    flips, rng = 5 * request.config.getoption("--flips"), np.random.default_rng(11)
    truth, again = served(run, tiny_cache), resumed(run, tiny_cache, tmp_path / "again")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in files])
    kept = {path: path.read_bytes() for path in files}
    refused = dict.fromkeys((path.relative_to(run).as_posix() for path in files), 0)
    for trial in range(flips):
        # half of them anywhere in the folder's bytes, half in any file: records are small and matter most
        at = rng.choice(len(files), p=sizes / sizes.sum() if trial % 2 else None)
        bit, name = int(rng.integers(8 * sizes[at])), files[at].relative_to(run).as_posix()
        flip(files[at], bit)
        try:
            assert same(served(run, tiny_cache), truth), (name, bit)
            if files[at].suffix != ".safetensors":
                assert resumed(run, tiny_cache, tmp_path / "again") == again, (name, bit)
        except CacheError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), (name, bit, error)
            refused[name] += 1
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
        files[at].write_bytes(kept[files[at]])
    for name, count in refused.items() if flips >= 200 else ():
        older = name.startswith("checkpoints/") and not name.startswith(LAST)
        assert (count > 0) != (older or name.endswith(NOT_SERVED)), (name, count)
    assert same(served(run, tiny_cache), truth)


# Remedies: each is tried as it is said


def bytes_of(run: Path) -> dict[str, bytes]:
    """All of a run but what tells of time: seconds, and the command line."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("timing.jsonl", "run.json"))
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def do_as_said(error: CacheError) -> None:
    """Remove what an error says to remove: what it names, or "it", the file that it is about."""
    found = ANSWER.search(str(error))
    named = Path(str(error).partition(":")[0] if found[1] == "it" else found[1])
    shutil.rmtree(named) if named.is_dir() else named.unlink()


@pytest.mark.parametrize(
    "name", [f"{LAST}/draft.safetensors", f"{LAST}/config.json", f"{LAST}/state.json", "done.json"]
)
def test_a_finished_run_that_is_damaged_comes_out_the_same_when_one_does_as_it_says(whole, run, tiny_cache, name):
    flip(run / name, 999)
    with pytest.raises(CacheError, match=f"{name}: .*damaged.*; remove") as refused:
        train(tiny_cache, None, SETS, run, "cpu")
    do_as_said(refused.value)
    train(tiny_cache, None, SETS, run, "cpu")
    assert bytes_of(run) == bytes_of(whole)


def test_a_result_counts_only_with_the_checkpoint_that_it_is_of(whole, run, tiny_cache, capsys):
    shutil.rmtree(run / LAST)
    train(tiny_cache, None, SETS, run, "cpu")
    assert "going on after step 2 of 4" in capsys.readouterr().out and bytes_of(run) == bytes_of(whole)

    shutil.rmtree(run / "checkpoints")
    train(tiny_cache, None, SETS, run, "cpu")
    assert "starting at step 0 of 4" in capsys.readouterr().out and bytes_of(run) == bytes_of(whole)


def stopped(run: Path) -> Path:
    """Make of a finished run one that was stopped after step 2."""
    shutil.rmtree(run / LAST)
    (run / "done.json").unlink()
    return run


@pytest.mark.parametrize("lost", ["a bit", "the first line", "the last line", "all lines"])
def test_metrics_that_are_not_those_before_the_checkpoint_are_refused_and_can_be_given_up(run, tiny_cache, lost):
    path, lines = stopped(run) / "metrics.jsonl", (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines = [line for line in lines if json.loads(line)["step"] <= 2 and "eval" not in json.loads(line)]
    kept = {"a bit": lines, "the first line": lines[1:], "the last line": lines[:-1], "all lines": []}[lost]
    path.write_bytes(b"".join(kept))
    if lost == "a bit":
        flip(path, 300)
    with pytest.raises(CacheError, match=r"metrics.jsonl: damaged \(.*\); remove it to go on without") as refused:
        train(tiny_cache, None, SETS, run, "cpu")
    do_as_said(refused.value)
    for _ in range(2):  # and so it goes on after the next stop, too
        train(tiny_cache, None, SETS, run, "cpu")
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps[0] == 2 and steps[-1] == 4 and "removed" in json.loads(path.read_text().splitlines()[0])
        stopped(run)


def test_metrics_after_the_checkpoint_are_written_again_whatever_became_of_them(whole, run, tiny_cache):
    path, lines = stopped(run) / "metrics.jsonl", (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"\0" * 100 + b"\n" + lines[4][:-7])
    train(tiny_cache, None, SETS, run, "cpu")
    assert bytes_of(run) == bytes_of(whole)


def test_runs_of_version_0_5_0_have_no_checksums_and_still_open(run, tiny_cache, tmp_path):
    truth = served(run, tiny_cache)
    without_checksums(run)
    assert b"xxh3" not in (run / "metrics.jsonl").read_bytes() + (run / "done.json").read_bytes()
    assert same(served(run, tiny_cache), truth)
    train(tiny_cache, None, SETS, stopped(run), "cpu")
    assert same(served(run, tiny_cache), truth)
    with open(run / f"{LAST}/draft.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(CacheError, match=r"draft.safetensors: damaged"):
        served(run, tiny_cache)


# Forgeries: sound in themselves


def rewrite(path: Path, **changes) -> None:
    facts, _ = parse_checksummed(path.read_bytes())
    path.write_bytes(record_bytes(facts | changes))


def forged_files(**more):
    """What says of a checkpoint that it has these files, too, or others."""

    def forge(step: Path) -> None:
        held = parse_checksummed((step / "state.json").read_bytes())[0]["files"] if more else {}
        rewrite(step / "state.json", files=held | more)

    return forge


def instead(make, *names):
    """Put something else in the place of a file of a checkpoint."""

    def forge(step: Path) -> None:
        for name in names:
            (step / name).unlink()
            make(step / name)

    return forge


def outside(path: Path) -> None:
    """A link to the same weights in another place."""
    there = path.parent.parent / path.name
    shutil.copy(path.parents[3] / "sound", there)
    path.symlink_to(there)


def deep(path: Path) -> None:
    path.write_text('{"step": ' + "[" * 100_000 + "]" * 100_000 + "}")


def large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


ZERO = {"size": 1 << 40, "xxh3": "0" * 32}
FORGERIES = {
    "no files": forged_files(),
    "an absolute path": forged_files(**{"/dev/zero": ZERO}),
    "a path that leads out": forged_files(**{"../../run.json": ZERO}),
    "a link to /dev/zero": instead(lambda path: path.symlink_to("/dev/zero"), "draft.safetensors"),
    "a link to another place": instead(outside, "draft.safetensors"),
    "a pipe": instead(os.mkfifo, "config.json"),
    "a pipe for its record": instead(os.mkfifo, "state.json"),
    "a folder": instead(Path.mkdir, "draft.safetensors"),
    "a folder for its record": instead(Path.mkdir, "state.json"),
    "deep JSON": instead(deep, "state.json"),
    "a large record": instead(large, "state.json"),
    "large weights": instead(large, "draft.safetensors"),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_checkpoint_is_refused_before_it_is_followed(run, tiny_cache, tmp_path, forge):
    step = run / LAST
    shutil.copy(step / "draft.safetensors", tmp_path / "sound")
    flip(step / "draft.safetensors", 800_000)
    forge(step)
    (run / "done.json").unlink()
    head = HiddenCache.open(tiny_cache).head()
    for use in (
        lambda: checkpoint.load_draft(run, head),
        lambda: train(tiny_cache, None, SETS, run, "cpu"),
        lambda: provenance(run),
        lambda: describe_draft(run),
    ):
        try:
            use()
        except CacheError as error:
            assert "\n" not in str(error) and f"remove {step}" in str(error) and len(str(error)) < 500
        else:
            # The weights alone are looked at by neither of these.
            assert use.__code__.co_names[0] in ("provenance", "describe_draft")
            with pytest.raises(CacheError):
                checkpoint.load_draft(run, head)


@pytest.mark.parametrize("name", ["run.json", "done.json", "recipe.toml", "metrics.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, large, lambda path: path.symlink_to("/dev/zero"), deep])
def test_what_is_no_file_in_a_run_is_refused_by_name(run, tiny_cache, name, make):
    if name == "metrics.jsonl":
        stopped(run)
    (run / name).unlink()
    make(run / name)
    with pytest.raises(CacheError, match=rf"{name}: .*; (put it back|remove it)") as refused:
        train(tiny_cache, None, SETS, run, "cpu")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
