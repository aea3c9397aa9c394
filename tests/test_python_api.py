"""What notebooks import from `pipeline`: drafts opened from anywhere, measured without the target, decoding with it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from tiny import write_jsonl

import pipeline
from pipeline import HiddenCache, accept_length, decode, load_draft, load_target
from pipeline.errors import CacheError, DataError, UsageError
from pipeline.evaluation.decode import speculative_decode
from pipeline.evaluation.prompts import cached_prompts, typed_prompt
from pipeline.json_files import with_checksum
from pipeline.published.export import export
from pipeline.runs.folder import read_result
from pipeline.runs.training_data import split_samples, stratified_subset
from pipeline.target.chat_template import load_tokenizer
from pipeline.target.model import stop_tokens
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "data/tiny-qwen3"
SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=4", "draft.method=dflash")
SETS += ("draft.mask_token_id=261",)


@pytest.fixture(scope="module")
def trained(greedy_cache, tmp_path_factory):
    """A run on a cache of the target's own replies, its export and its cache."""
    folder = tmp_path_factory.mktemp("notebook")
    train(greedy_cache, None, SETS, folder / "run", "cpu")
    export(folder / "run", folder / "published", "speculators")
    return folder / "run", folder / "published", greedy_cache


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled target, and a draft that learned a few steps from a few samples of it."""
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    folder = tmp_path_factory.mktemp("bundled")
    chats = [json.loads(line) for line in (BUNDLED.parent / "chats.jsonl").read_text().splitlines()]
    few = [chat for split in ("train", "heldout") for chat in [each for each in chats if each["split"] == split][:12]]
    run(str(BUNDLED), str(write_jsonl(folder / "chats.jsonl", few)), folder / "hs_cache", options=CaptureOptions())
    sets = ("draft.method=dflash", "train.steps=2", "train.eval_samples=2", "train.batch=4")
    train(folder / "hs_cache", None, sets, folder / "demo/dflash", "cpu")
    return folder / "demo/dflash", folder / "hs_cache"


def test_importing_it_imports_no_torch_and_lists_what_there_is():
    code = "import sys, pipeline; print('torch' in sys.modules, *dir(pipeline))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert done[0] == "False" and set(pipeline.__all__) <= set(done)
    with pytest.raises(AttributeError, match="no attribute 'load_drafts'"):
        pipeline.load_drafts  # noqa: B018
    with pytest.raises(ImportError, match="load_drafts"):
        exec("from pipeline import load_drafts")


def test_every_name_is_there_and_says_what_it_does():
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, name


def test_the_accept_length_is_the_one_that_training_reports(trained):
    run, _, cache = trained
    reported = read_result(run).eval
    found = accept_length(load_draft(run), cache, samples=64)
    assert found.replies == reported.replies and found.calls == reported.calls > 0
    assert (found.accept_len, found.interval, found.per_slot) == (
        reported.accept_len,
        reported.interval,
        reported.per_slot,
    )
    assert found.domains.keys() == reported.domains.keys() and len(found.per_slot) == 3


def test_samples_are_all_held_out_ones_or_so_many_or_those_named(trained):
    run, _, path = trained
    cache = HiddenCache.open(path)
    draft = load_draft(run, cache)
    heldout = split_samples(cache, draft.config.mask_token_id, 0.05).heldout
    assert {reply[0] for reply in accept_length(draft, cache).replies} <= set(heldout.tolist())
    few = accept_length(draft, cache, samples=2)
    assert few == accept_length(draft, cache, samples=stratified_subset(cache, heldout, 2))
    assert {reply[0] for reply in accept_length(draft, cache, samples=[0, 3]).replies} <= {0, 3}
    assert all(tokens <= 3 + 3 for _, _, tokens, _ in accept_length(draft, cache, max_new=3).replies)
    with pytest.raises(IndexError):
        accept_length(draft, cache, samples=[len(cache)])


def test_a_run_a_checkpoint_and_a_published_folder_are_one_draft(trained):
    run, published, cache = trained
    figures = [accept_length(load_draft(place, cache), cache) for place in (run, run / "checkpoints/step-00000004")]
    assert figures[0] == figures[1]
    stored = load_draft(str(published), str(cache)).state_dict()
    for name, weight in load_draft(run).state_dict().items():
        assert torch.equal(stored[name], weight), name


def test_what_is_no_draft_and_what_does_not_say_its_cache_is_refused(trained, tmp_path):
    run, published, cache = trained
    with pytest.raises(UsageError, match="no run with a checkpoint and no checkpoint"):
        load_draft(tmp_path, cache)
    with pytest.raises(UsageError, match=r"does not say which cache.*pass a cache or a target"):
        load_draft(published)
    with pytest.raises((UsageError, CacheError)):
        load_draft(run, tmp_path)
    with pytest.raises(UsageError, match="width 32, the target's head 1024 and 256"):
        load_draft(run, load_target(str(BUNDLED)))


def test_a_run_whose_cache_is_another_one_by_now_needs_it_named(trained, tiny_cache, tmp_path):
    run, _, cache = trained
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["cache"]["path"] = str(tiny_cache)
    del record["xxh3"]
    (tmp_path / "run" / "run.json").write_bytes(with_checksum(json.dumps(record)))
    digests = HiddenCache.open(cache).digest, HiddenCache.open(tiny_cache).digest
    with pytest.raises(UsageError, match="of digest {}.*has {} now.*cache_or_target=".format(*digests)):
        load_draft(tmp_path / "run")
    load_draft(tmp_path / "run", cache)


def test_the_samples_that_a_run_held_out_are_measured(trained, tmp_path, monkeypatch):
    _, _, path = trained
    cache = HiddenCache.open(path)
    cache.samples.split[:] = [""] * len(cache)  # a corpus that does not say what is held out
    monkeypatch.setattr(HiddenCache, "open", lambda _: cache)
    train(path, None, (*SETS, "train.steps=1", "train.heldout=0.5"), tmp_path / "run", "cpu")
    export(tmp_path / "run", tmp_path / "published", "speculators")
    heldout = {share: split_samples(cache, 261, share).heldout.tolist() for share in (0.05, 0.5)}
    assert len(heldout[0.05]) < len(heldout[0.5])
    for place in (tmp_path / "run", tmp_path / "published"):
        draft = load_draft(place, cache)
        assert draft.heldout == 0.5 and accept_length(draft, cache) == accept_length(draft, cache, heldout[0.5])
        assert accept_length(draft, cache, heldout=0.05) == accept_length(draft, cache, heldout[0.05])
        draft.heldout = None
        assert accept_length(draft, cache) == accept_length(draft, cache, heldout[0.05])


def test_a_corpus_that_holds_nothing_out_is_refused(trained):
    draft, cache = load_draft(trained[0]), HiddenCache.open(trained[2])
    cache.samples.split[:] = ["train"] * len(cache)
    with pytest.raises(DataError, match="holds nothing out; pass the samples"):
        accept_length(draft, cache)


def test_the_bundled_target_accepts_what_evaluate_says(bundled):
    run, cache = bundled
    report = evaluate(run, count=2, max_new=16)
    target, of_cache = load_target(str(BUNDLED)), HiddenCache.open(cache)
    draft = load_draft(run, target)
    heldout = split_samples(of_cache, draft.config.mask_token_id, 0.05).heldout
    for prompt, sample in zip(cached_prompts(of_cache, heldout, 2), report.samples, strict=True):
        gained = [len(call.ids) for call in decode(draft, target, prompt.ids, max_new=17)][1:]
        assert gained[:-1] == sample.lengths[: len(gained) - 1] and len(gained) == len(sample.lengths) > 1


def test_decoding_yields_the_reply_call_by_call(bundled):
    target = load_target(str(BUNDLED))
    draft = load_draft(bundled[0], target)
    asked = "Count from 3 to 9."
    calls = list(decode(draft, target, asked, max_new=24))
    assert calls == list(decode(draft, target, [{"role": "user", "content": asked}], max_new=24))
    whole = speculative_decode(target, draft, typed_prompt(asked, BUNDLED).ids, 24, stop_tokens(target))
    reply = [token for call in calls for token in call.ids]
    assert reply == whole.ids and 0 < len(reply) <= 24
    assert calls[0].proposed == 0 and [len(call.ids) for call in calls[1:-1]] == whole.lengths[: len(calls) - 2]
    assert [call.matched for call in calls[1:-1]] == whole.matched[: len(calls) - 2]
    assert all(len(call.texts) == len(call.ids) >= call.matched for call in calls)
    assert "".join(call.text for call in calls) == load_tokenizer(BUNDLED).decode(reply)


def test_decoding_refuses_what_is_no_prompt_and_what_is_too_long(bundled):
    target = load_target(str(BUNDLED))
    draft = load_draft(bundled[0], target)
    for wrong in ([], [1.5], 7):
        with pytest.raises(DataError, match="the prompt"):
            next(decode(draft, target, wrong))
    with pytest.raises(UsageError, match="exceed the target's"):
        next(decode(draft, target, "hello", max_new=10**6))


def test_the_notebook_runs_from_top_to_bottom_and_is_kept_without_outputs(bundled, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from run_notebook import NOTEBOOK, executed

    kept = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in kept.cells)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = executed(bundled[1].parent, methods=["dflash"], samples=2, most_tokens=8)
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "24 samples of tiny-qwen3" in printed and "dflash " in printed and "a call; gained [" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    coloured = next(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert coloured.count("<span") == 8
    with pytest.raises(KeyError, match="sample"):
        executed(bundled[1].parent, sample=2)
