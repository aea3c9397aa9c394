"""`pipeline doctor RUN`: each symptom played on a small run, and the cause that is told."""

import fcntl
import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from reports import evaluation
from rewritten_caches import rewrite
from run_folders import with_recipe

from pipeline.cache import HiddenCache
from pipeline.cache.manifest import FileFact
from pipeline.cache.samples import PlannedSample
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.json_files import parse_checksummed, record_bytes, with_checksum
from pipeline.published.export import export
from pipeline.runs.folder import read_recipe
from pipeline.target.layers import final_rows
from pipeline.visible_tables import VisibleConsole
from stages.doctor import acceptance, mismatch
from stages.doctor.examined_run import Case
from stages.doctor.finding import NOTE, OK, PROBLEM
from stages.doctor.symptoms import examine, symptoms_table
from stages.train_draft.planned_memory import fit_on
from stages.train_draft.run import run as train

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "data" / "tiny-qwen3"
SETS = ("draft.method=dflash", "draft.block_size=4", "draft.num_hidden_layers=1", "train.batch=4", "train.anchors=16")
SETS += ("train.log_every=1", "train.save_every=1000", "train.eval_samples=8")
TRAINED, HELDOUT = 64, 6
doctor = partial(examine, fit_on=fit_on)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """States of the bundled target for chats of one domain that is quickly learned."""
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    folder = tmp_path_factory.mktemp("doctor")
    chats = [json.loads(line) for line in (ROOT / "data" / "chats.jsonl").read_text().splitlines()]
    chats = [chat for chat in chats if chat["domain"] == "json"]
    chosen = [chat for chat in chats if chat["split"] == "train"][:TRAINED]
    chosen += [chat for chat in chats if chat["split"] == "heldout"][:HELDOUT]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chosen))
    run(str(TARGET), str(folder / "chats.jsonl"), folder / "cache", options=CaptureOptions(layers="1,3,6"))
    return folder / "cache"


@pytest.fixture(scope="module")
def healthy(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("healthy") / "run"
    train(cache, None, (*SETS, "train.steps=60"), out, "cpu")
    return out


@pytest.fixture
def trained(cache, tmp_path):
    """Return a function that trains a few steps from a cache."""

    def training(*sets, steps=4, of=cache):
        train(of, None, (*SETS, f"train.steps={steps}", *sets), tmp_path / "run", "cpu")
        return tmp_path / "run"

    return training


def verdicts(report: dict) -> dict[str, str]:
    return {found["check"]: found["state"] for found in report["findings"]}


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def change_checkpoint(run: Path, out: Path, changed) -> Path:
    """Copy a run and let `changed(folder)` change its newest checkpoint, whose state.json then says so."""
    shutil.copytree(run, out)
    folder = newest(out)
    changed(folder)
    facts, _ = parse_checksummed((folder / "state.json").read_bytes())
    facts["files"] = {name: FileFact.of_file(folder / name).as_dict() for name in facts["files"]}
    (folder / "state.json").write_bytes(record_bytes(facts))
    result, _ = parse_checksummed((out / "done.json").read_bytes())
    result["state"] = FileFact.of_file(folder / "state.json").as_dict()
    (out / "done.json").write_bytes(record_bytes(result))
    return out


def test_a_run_is_looked_at_on_the_samples_it_had_though_more_were_appended_since(cache, healthy, tmp_path):
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    grown = shutil.copytree(cache, tmp_path / "cache")
    chats = [json.loads(line) for line in (ROOT / "data" / "chats.jsonl").read_text().splitlines()]
    more = [chat for chat in chats if chat["domain"] == "sql" and chat["split"] == "train"][:100]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in more))
    run(str(TARGET), str(tmp_path / "more.jsonl"), grown, options=CaptureOptions(append=True))
    assert len(HiddenCache.open(grown)) > 2 * TRAINED
    before, after = Case(healthy).split, Case(healthy, named_cache=grown).split
    assert after.digest == before.digest and len(after.train) == len(before.train) == TRAINED
    assert after.unusable == before.unusable
    assert [finding["state"] for finding in doctor(healthy, cache=grown)["findings"]].count(PROBLEM) == 0


def with_config(**changes):
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return changed


def test_a_healthy_run_is_told_healthy(healthy, capfd):
    report = doctor(healthy)
    assert report["cause"] is None and report["state"] == "ok", report["cause"]
    assert report["seen"]["accept_len"] > 1.5 and report["seen"]["steps"] == 60
    assert set(verdicts(report).values()) == {OK}, report["findings"]
    capfd.readouterr()
    main(["doctor", str(healthy), "--json"])
    assert json.loads(capfd.readouterr().out)["cause"] is None
    VisibleConsole().print(symptoms_table(report))
    screen = capfd.readouterr().out
    assert "healthy" in screen and "this is it" not in screen and len(screen.splitlines()) < 40


def test_a_rate_that_learns_nothing_is_the_cause_and_its_command_is_told(trained, capfd):
    report = doctor(trained("train.lr=1e-9", steps=6))
    cause = report["cause"]
    assert cause["check"] == "too little training" and "--set train.lr=0.005" in cause["remedy"], report["findings"]
    assert cause["facts"]["lr"] == 1e-9 and "ln V = 6.9" in cause["found"]
    capfd.readouterr()
    VisibleConsole().print(symptoms_table(report))
    verdict = capfd.readouterr().out.partition("\n\n")[0].splitlines()
    assert any(line.startswith("most likely: too little training: 6 steps") for line in verdict[:3])
    assert any(line.startswith("what mends it: `pipeline train-draft") for line in verdict)
    main(shlex.split(report["cause"]["remedy"].strip("`"))[1:])  # as it is printed
    assert read_recipe(Path(f"{report['path']}-again")).train.lr == 0.005


def test_too_few_steps_are_the_cause(trained):
    cause = doctor(trained(steps=4))["cause"]
    assert cause["check"] == "too little training" and "--set train.steps=400" in cause["remedy"]


def scrambled(index: int, sample: PlannedSample) -> PlannedSample:
    ids, rng = sample.ids.copy(), np.random.default_rng(index)
    ids[sample.mask] = rng.permutation(ids[sample.mask])
    return PlannedSample(ids, sample.mask, sample.domain, sample.split)


def test_replies_that_are_not_the_targets_own_are_the_cause(cache, trained, tmp_path):
    other = rewrite(cache, tmp_path / "scrambled", samples=scrambled)
    report = doctor(trained(of=other))
    assert report["cause"]["check"] == "off-policy corpus", report["findings"]
    assert "pipeline regenerate" in report["cause"]["remedy"]
    of_cache = doctor(other)
    assert of_cache["kind"] == "cache" and of_cache["cause"]["check"] == "off-policy corpus"
    assert doctor(cache)["cause"] is None


def test_a_checkpoint_of_the_other_label_convention_is_the_cause_by_value(healthy, tmp_path):
    changed = change_checkpoint(healthy, tmp_path / "run", with_config(shift_label=True))
    report = doctor(changed)
    assert report["cause"]["check"] == "labels, layers, config"
    assert "shift_label is True, the recipe says False" in report["cause"]["found"]
    assert report["cause"]["facts"]["other_convention"] > report["seen"]["accept_len"] + 0.3
    # Where recipe and checkpoint agree, only the measure tells.
    both = with_recipe(changed, tmp_path / "both", "shift_label = false", "shift_label = true")
    found = mismatch.other_draft(Case(both))
    assert found.state == PROBLEM and "with the other label convention" in found.found and not found.facts["differing"]


def test_other_layers_than_the_recipes_are_named(healthy, tmp_path):
    changed = change_checkpoint(healthy, tmp_path / "run", with_config(target_layer_ids=[0, 3, 6]))
    found = mismatch.other_draft(Case(changed, None, None))
    assert found.state == PROBLEM and "target_layer_ids is (0, 3, 6)" in found.found


def test_weights_that_are_not_those_measured_are_the_cause(healthy, trained, tmp_path):
    untrained = trained("train.lr=1e-9", steps=2)
    other = newest(untrained) / "draft.safetensors"
    changed = change_checkpoint(healthy, tmp_path / "swapped", lambda folder: shutil.copy(other, folder))
    cause = doctor(changed)["cause"]
    assert cause["check"] == "labels, layers, config" and "when the run measured them" in cause["found"], cause


def test_damage_is_named_first_and_nothing_else_is_said(healthy, tmp_path):
    shutil.copytree(healthy, tmp_path / "run")
    weights = newest(tmp_path / "run") / "draft.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    report = doctor(tmp_path / "run")
    assert report["cause"]["check"] == "records and cache" and "draft.safetensors" in report["cause"]["found"]
    assert len(report["findings"]) == 1


def test_a_cache_that_is_not_there_is_named_with_what_to_pass(healthy, cache, tmp_path):
    moved = with_recipe(healthy, tmp_path / "run", "seed = 0", "seed = 0")
    facts, _ = parse_checksummed((moved / "run.json").read_bytes())
    facts["cache"]["path"] = "/gone"
    (moved / "run.json").write_bytes(record_bytes(facts))
    cause = doctor(moved)["cause"]
    assert "/gone, is not there" in cause["found"] and "--cache DIR" in cause["remedy"]
    assert doctor(moved, cache=cache)["cause"] is None


def test_a_run_that_was_stopped_is_unfinished_and_the_command_goes_on(healthy, tmp_path):
    stopped = with_recipe(healthy, tmp_path / "run", "steps = 60", "steps = 600")
    (stopped / "done.json").unlink()
    report = doctor(stopped)
    assert report["cause"]["check"] == "unfinished" and "step 60 of 600" in report["cause"]["found"]
    with open(stopped / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert verdicts(doctor(stopped))["unfinished"] == NOTE, "somebody trains it"
    shutil.rmtree(stopped / "checkpoints")
    assert doctor(stopped)["cause"]["check"] == "unfinished"


def test_the_command_that_goes_on_with_a_run_does(healthy, tmp_path):
    run = Path(shutil.copytree(healthy, tmp_path / "a run"))
    (run / "done.json").unlink()
    cause = doctor(run)["cause"]
    assert cause["check"] == "unfinished"
    main(shlex.split(cause["remedy"].strip("`"))[1:])
    assert doctor(run)["cause"] is None


def test_a_loss_that_rose_again_is_divergence(healthy, trained):
    report = doctor(trained("train.lr=20.0", "train.warmup=0.5", "train.optimizer=adamw", steps=10))
    assert report["cause"]["check"] == "divergence" and "--set train.lr=4" in report["cause"]["remedy"], report[
        "findings"
    ]


def test_a_draft_vocabulary_that_misses_the_replies_is_the_cause(trained):
    cause = doctor(trained("draft.vocabulary=8"))["cause"]
    assert cause["check"] == "draft vocabulary" and "8 ids it may propose" in cause["found"]
    assert cause["facts"]["share"] < 0.75


def test_masks_with_hardly_any_supervised_token_are_the_cause(cache, trained, tmp_path):
    store = HiddenCache.open(cache)

    def two(index, sample):
        mask = np.zeros_like(sample.mask)
        mask[-2:] = True
        return PlannedSample(sample.ids, mask, sample.domain, sample.split)

    def states(index, sample, column):
        if column == "final":
            return store.read(index, final=True).final[-final_rows(sample.mask).sum() :].numpy()

    other = rewrite(cache, tmp_path / "masked", samples=two, states=states)
    assert doctor(trained(of=other))["cause"]["check"] == "loss mask"
    assert doctor(other)["cause"]["check"] == "loss mask"


def test_prompts_of_other_domains_are_the_cause(cache, trained, tmp_path):
    def moved(index, sample):
        return PlannedSample(sample.ids, sample.mask, f"about {sample.split}", sample.split)

    report = doctor(trained(of=rewrite(cache, tmp_path / "moved", samples=moved)))
    assert report["cause"]["check"] == "other domains" and "about heldout" in report["cause"]["found"]


def test_final_states_that_lost_their_norm_are_told_by_value(cache, trained, tmp_path, monkeypatch):
    store, noise = HiddenCache.open(cache), torch.Generator().manual_seed(0)

    def states(index, sample, column):
        if column == "final":
            final_RD = store.read(index, final=True).final
            return (final_RD * torch.randn(final_RD.shape[1], generator=noise)).numpy()

    run = trained(of=rewrite(cache, tmp_path / "unnormed", states=states))
    at_capture = mismatch.gauge(store)
    monkeypatch.setattr(mismatch, "gauge", lambda cache: at_capture)  # a rewritten cache was never captured
    cause = doctor(run)["cause"]
    assert cause["check"] == "cache, norm, codec" and "at capture 9" in cause["found"], cause


def test_another_cache_than_the_one_trained_from_is_the_cause(cache, healthy, tmp_path):
    other = rewrite(cache, tmp_path / "other", samples=scrambled)
    cause = doctor(healthy, cache=other)["cause"]
    assert cause["check"] == "cache, norm, codec" and "--cache DIR" in cause["remedy"]


def test_memory_that_does_not_suffice_is_the_cause(healthy):
    report = doctor(healthy, memory=1 << 20)
    assert report["cause"]["check"] == "out of memory" and "IT DOES NOT FIT" in report["cause"]["found"]
    assert verdicts(doctor(healthy, memory=80 << 30))["out of memory"] == OK


def test_a_run_that_waits_for_data_is_told_what_it_waits_for(healthy, tmp_path):
    shutil.copytree(healthy, tmp_path / "run")
    log = tmp_path / "run" / "timing.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = {name: value for name, value in lines[-1].items() if name != "xxh3"}
    log.write_bytes(with_checksum(json.dumps(last | {"data_wait": 0.4, "seconds": 600.0})))
    cause = doctor(tmp_path / "run")["cause"]
    assert cause["check"] == "slow reading" and "40% of 600 s" in cause["found"]
    assert cause["facts"]["disk_bytes_s"] > 0 and cause["facts"]["cpu_s_a_step"] > 0 and cause["remedy"]


def test_a_target_of_another_chat_template_and_an_export_of_other_labels_are_told(healthy, tmp_path):
    assert mismatch.other_target(Case(healthy), TARGET).state == OK
    other = shutil.copytree(TARGET, tmp_path / "target")
    place = other / "chat_template.jinja"
    place.write_text(place.read_text() + " ")
    found = mismatch.other_target(Case(healthy), other)
    assert found.state == PROBLEM and "another chat template" in found.found

    export(healthy, tmp_path / "export", "sglang")
    assert mismatch.other_export(Case(healthy), tmp_path / "export").state == OK
    file = tmp_path / "export" / "config.json"
    config = json.loads(file.read_text())
    config["dflash_config"]["target_layer_ids"] = [0, 3, 6]
    file.write_text(json.dumps(config))
    cause = doctor(healthy, export=tmp_path / "export")["cause"]
    assert cause["check"] == "export" and "target_layer_ids is (0, 3, 6)" in cause["found"]


def test_samples_learned_by_heart_are_told_from_a_draft_that_knows_its_target():
    seen = {"accept_len_tf": 3.9, "accuracy": 0.98}
    assert acceptance.overfitted_of(seen, {"accept_len_tf": 1.2, "accuracy": 0.1}).state == PROBLEM
    assert acceptance.overfitted_of(seen, {"accept_len_tf": 3.5, "accuracy": 0.9}).state == OK


def test_a_draft_that_learned_its_few_samples_by_heart_is_told_so(cache, trained, tmp_path):
    def few(index, sample):
        return PlannedSample(sample.ids, sample.mask, sample.domain, "train" if index < 2 else "heldout")

    run = trained("train.batch=2", "train.eval_every=1000", steps=100, of=rewrite(cache, tmp_path / "few", samples=few))
    report = doctor(run)
    found = next(each for each in report["findings"] if each["check"] == "learned by heart")
    assert found["facts"]["train_accuracy"] > 0.8 and found["state"] == PROBLEM, found
    assert report["cause"] == found


def test_high_accuracy_and_low_acceptance_are_told_slot_by_slot():
    forced = {"accept_len_tf": 3.9, "accuracy": 0.98}
    late = acceptance.exposure_of("x", forced, {"accept_len": 1.9, "per_slot": [0.8, 0.1, 0.0]}, 4)
    assert late.state == PROBLEM and "own earlier proposals" in late.used and "98%" in late.found
    early = acceptance.exposure_of("x", forced, {"accept_len": 1.1, "per_slot": [0.1, 0.0, 0.0]}, 4)
    assert early.state == PROBLEM and "even the first proposal" in early.used
    assert acceptance.exposure_of("x", forced, {"accept_len": 3.6, "per_slot": [0.9, 0.9, 0.8]}, 4).state == OK


def test_a_report_leads_to_its_run_and_what_it_measured_counts(healthy, tmp_path):
    file = evaluation(tmp_path / "report.json", "dflash", 0, 60, [("law", [1, 1, 1]), ("json", [1])])
    facts, _ = parse_checksummed(file.read_bytes())
    facts["draft"]["path"] = str(healthy)
    file.write_bytes(record_bytes(facts))
    cause = doctor(file)["cause"]
    assert cause["check"] == "other domains" and "law" in cause["found"]
    facts["draft"]["path"] = "nowhere"
    file.write_bytes(record_bytes(facts))
    with pytest.raises(UsageError, match="nowhere"):
        doctor(file)


def test_a_cache_that_lacks_columns_is_unfinished(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "shards" / "000000"
    for entry in shard.glob("aux.3*"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    cause = doctor(tmp_path / "cache")["cause"]
    assert cause["check"] == "unfinished" and "aux.3 in" in cause["found"]


def test_a_cause_that_costs_nothing_yet_is_a_note(healthy):
    assert verdicts(doctor(healthy, memory=80 << 30))["divergence"] == OK
    found = acceptance.off_policy_of(Case(healthy).cache, 1, 10, "at capture")
    from stages.doctor.symptoms import of_low

    assert found.state == PROBLEM and of_low(Case(healthy), found).state == NOTE


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run, no report"):
        doctor(tmp_path)
