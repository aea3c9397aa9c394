"""`train-draft --init-from`: the weights of anyone's draft, where they fit, and a word on what is fresh."""

import json

import pytest
import torch
from forms import DSPARK, FORMS, backbone, deepspec_dspark, domino, dspark, speculators_reduced, target, zlab_dflash
from safetensors.torch import load_file

from pipeline.cache import HiddenCache
from pipeline.cli import commands
from pipeline.drafts import DRAFTS, DraftConfig, draft_config, init_weights
from pipeline.drafts.vocabulary import MAPS, ids_of
from pipeline.errors import UsageError
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.published.init_from import InitialDraft
from pipeline.published.reading import read_description
from pipeline.runs import checkpoint
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.target.head import TargetHead
from stages.train_draft.run import make_draft, run

OF_DOMINO = {"method": "domino", "shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8}
OF_DSPARK = {"method": "dspark", "shift_label": True, "markov_head_type": "vanilla", **DSPARK}


def head() -> TargetHead:
    return TargetHead(target(), target())


def wanted(folder, **changes) -> DraftConfig:
    """The draft that a folder describes, but for what changes."""
    fields = read_description(folder, 6).config.model_dump()
    return draft_config(**{**fields, **changes})


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_weights_and_nothing_is_fresh(tmp_path, name):
    folder = FORMS[name](tmp_path / "folder")
    start = InitialDraft(folder).weights_for(wanted(folder), head())
    own = {"dflash": {}, "domino": domino(), "dspark": dspark()}[name.split()[1].replace("training", "domino")]
    everything = backbone() | (own if name != "deepspec dflash" else {})
    assert start.fresh == ()
    assert start.tensors.keys() == everything.keys()
    assert all(torch.equal(start.tensors[key], everything[key]) for key in everything)


@pytest.mark.parametrize("kind", ["gated", "rnn"])
@pytest.mark.parametrize("name", ["specforge dspark", "sglang dspark", "deepspec dspark", "model-optimizer dspark"])
def test_every_kind_of_markov_head_is_found_by_its_name(tmp_path, name, kind):
    folder = FORMS[name](tmp_path / "folder", kind)
    start = InitialDraft(folder).weights_for(wanted(folder))
    assert all(torch.equal(start.tensors[key], tensor) for key, tensor in dspark(kind).items())


@pytest.mark.parametrize(
    ("method", "heads"), [(OF_DOMINO, "embed_proj, prefix_gru"), (OF_DSPARK, "confidence_head, markov_head")]
)
def test_dflash_weights_start_another_method_whose_head_is_fresh_and_this_is_said(tmp_path, method, heads):
    config = wanted(zlab_dflash(tmp_path / "folder"), **method)
    draft = DRAFTS[config.method](config, head())
    init_weights(draft, 5)
    fresh = {name: tensor.clone() for name, tensor in draft.state_dict().items() if name not in backbone()}

    start = InitialDraft(tmp_path / "folder").weights_for(config, head())
    start.load_into(draft)

    assert set(start.fresh) == fresh.keys()
    assert f"{heads} fresh" in start.summary and "guessed anchor + k, now learns anchor + k + 1" in start.summary
    assert all(torch.equal(tensor, (backbone() | fresh)[name]) for name, tensor in draft.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4}, r"num_attention_heads = 2, wanted is 4"),
        ({"intermediate_size": 32}, r"intermediate_size = 24, wanted is 32"),
        ({"target_layer_ids": (1, 4)}, r"target_layer_ids = \[1, 3\], wanted is \[1, 4\]"),
        ({"mask_token_id": 38}, "mask_token_id = 39, wanted is 38"),
        ({"rope_theta": 1e6}, "rope_theta = 10000.0, wanted is 1000000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-06, wanted is 1e-05"),
        ({"shift_label": True}, "shift_label = False, wanted is True"),
        ({"num_target_layers": 8}, "for a target of 6 layers, this one has 8"),
        ({"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 8}, r"layer_types = \['full"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(tmp_path, change, message):
    folder = zlab_dflash(tmp_path / "folder")
    with pytest.raises(UsageError, match=message):
        InitialDraft(folder).weights_for(wanted(folder, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"markov_head_type": "rnn"}, "markov_head_type = vanilla, wanted is rnn"),
        ({"markov_rank": 8}, "markov_rank = 6, wanted is 8"),
        ({"confidence_head_with_markov": False}, "confidence_head_with_markov = True, wanted is False"),
    ],
)
def test_another_head_of_the_same_method_is_refused(tmp_path, change, message):
    folder = deepspec_dspark(tmp_path / "folder")
    with pytest.raises(UsageError, match=message):
        InitialDraft(folder).weights_for(wanted(folder, **change))


def test_a_head_is_not_taken_off_for_another_method(tmp_path):
    folder = FORMS["published domino"](tmp_path / "folder")
    config = draft_config(**wanted(zlab_dflash(tmp_path / "dflash")).model_dump() | OF_DSPARK)
    with pytest.raises(UsageError, match=r"a domino draft, wanted is dspark: .* start from a dspark or dflash draft"):
        InitialDraft(folder).weights_for(config)
    with pytest.raises(UsageError, match=r"a domino draft, wanted is dflash: .* start from a dflash draft, or set"):
        InitialDraft(folder).weights_for(wanted(zlab_dflash(tmp_path / "another")))


def test_another_block_size_is_taken_and_said(tmp_path):
    folder = zlab_dflash(tmp_path / "folder")
    assert "blocks of 8, which were 4" in InitialDraft(folder).weights_for(wanted(folder, block_size=8)).summary


def test_copies_of_another_targets_head_are_refused(tmp_path):
    folder = deepspec_dspark(tmp_path / "folder")
    with pytest.raises(UsageError, match="not the target's"):
        InitialDraft(folder).weights_for(wanted(folder), TargetHead(target() + 1, target()))


@pytest.mark.parametrize("vocabulary", [14, 10, None])
@pytest.mark.parametrize("method", ["dflash", "dspark"])
def test_a_draft_of_fewer_ids_starts_any_other_and_rows_of_ids_that_it_had_not_stay_fresh(tmp_path, method, vocabulary):
    folder = speculators_reduced(tmp_path / "folder", method)
    config = wanted(folder, vocabulary=vocabulary)
    draft = DRAFTS[method](config, head())
    init_weights(draft, 5)
    draft.before_training([torch.arange(5, 30).numpy()])  # of which every third was proposed
    begun = {name: tensor.clone() for name, tensor in draft.state_dict().items()}

    start = InitialDraft(folder).weights_for(config, head())
    start.load_into(draft)

    own, rows = dspark() if method == "dspark" else {}, "markov_head.markov_w2.weight"
    loaded = draft.state_dict()
    assert start.fresh == () and start.tensors.keys() == backbone().keys() | own.keys()
    assert all(torch.equal(loaded[name], begun[name]) for name in loaded.keys() & MAPS)  # counted, not taken over
    assert all(torch.equal(loaded[name], tensor) for name, tensor in (backbone() | own).items() if name != rows)
    assert ("fresh in markov_head.markov_w2.weight the rows of ids" in start.summary) == (method == "dspark")
    if method == "dspark":
        ids = torch.arange(40) if vocabulary is None else ids_of(draft.d2t)
        had = ids % 3 == 0
        assert had.any() and not had.all()
        assert torch.equal(loaded[rows][had], own[rows][ids[had]])
        assert torch.equal(loaded[rows][~had], begun[rows][~had])


def test_a_draft_of_all_ids_starts_one_of_fewer_by_their_rows(tmp_path):
    folder = deepspec_dspark(tmp_path / "folder")
    config = wanted(folder, vocabulary=10)
    draft = DRAFTS["dspark"](config, head())
    draft.before_training([torch.arange(5, 30).numpy()])

    InitialDraft(folder).weights_for(config, head()).load_into(draft)

    assert ids_of(draft.d2t).tolist() == list(range(5, 15))
    rows = "markov_head.markov_w2.weight"
    assert torch.equal(draft.state_dict()[rows], dspark()[rows][5:15])


SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=2", "draft.layers=[1,3]")


def trained(cache, out, method="dflash", *sets, **more):
    return run(cache, None, (*SETS, f"draft.method={method}", *sets), out, "cpu", **more).run


@pytest.fixture(scope="module")
def first(tiny_cache, tmp_path_factory):
    """A finished run of DFlash."""
    return trained(tiny_cache, tmp_path_factory.mktemp("first") / "run")


def test_a_run_begins_with_the_weights_of_another_runs_export(tiny_cache, first, tmp_path):
    export(first, tmp_path / "out")
    resolved = resolve(load_recipe(None, (*SETS, "draft.method=dflash")), HiddenCache.open(tiny_cache))
    start = InitialDraft(tmp_path / "out").weights_for(resolved.draft)

    made = make_draft(resolved, HiddenCache.open(tiny_cache), torch.device("cpu"), start).state_dict()

    there = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == there.keys()
    assert all(torch.equal(made[name], there[name].float()) for name in there)


@pytest.mark.parametrize("scales", [{"logit_scale": 0.25}, {"logits_scaling": 8.0}, {"lm_head_multiplier": 0.5}])
def test_a_correction_of_scaled_logits_is_exported_nowhere(tiny_cache, first, tmp_path, monkeypatch, scales):
    corrected = trained(tiny_cache, tmp_path / "run", "domino", "draft.objective=ce", "train.steps=1")
    scaled = HiddenCache.open(tiny_cache).target_config | scales
    monkeypatch.setattr(HiddenCache, "target_config", scaled)
    with pytest.raises(UsageError, match=r"without the target's factor of 0\.(25|125|5)"):
        export(corrected, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    export(first, tmp_path / "out")  # a factor alone changes no greedy guess


def test_weights_rounded_by_an_export_in_bfloat16_are_checked_and_begun_with(tiny_cache, tmp_path):
    half = trained(tiny_cache, tmp_path / "half", "dspark", "train.dtype=bfloat16", "train.steps=1")
    export(half, tmp_path / "out")
    checked = check_export(tmp_path / "out")
    assert checked["dtypes"] == ["bfloat16"] and checked["probe"]["difference"] < 1e-5

    begun = trained(tiny_cache, tmp_path / "run", "dspark", "train.steps=1", init_from=InitialDraft(tmp_path / "out"))

    assert json.loads((begun / "run.json").read_text())["start"]["fresh"] == []


def test_a_run_goes_on_only_with_the_weights_it_began_with(tiny_cache, first, tmp_path):
    begun = trained(tiny_cache, tmp_path / "run", init_from=InitialDraft(first))
    weights = load_file(checkpoint.latest(begun).path / checkpoint.DRAFT)
    plain = load_file(checkpoint.latest(first).path / checkpoint.DRAFT)

    trained(tiny_cache, tmp_path / "run", init_from=InitialDraft(first))  # finished, so nothing moves
    with pytest.raises(UsageError, match=r"initial weights = .*, this command asks for fresh"):
        trained(tiny_cache, tmp_path / "run")
    with pytest.raises(UsageError, match="was started with initial weights = fresh, this command asks for"):
        trained(tiny_cache, first, init_from=InitialDraft(begun))

    again = load_file(checkpoint.latest(begun).path / checkpoint.DRAFT)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["fc.weight"], plain["fc.weight"])


def test_the_default_folder_is_another_where_the_start_is(tiny_cache, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trained(tiny_cache, None) != trained(tiny_cache, None, init_from=InitialDraft(first))


def test_the_command_says_what_it_starts_from_and_the_card_names_it(tiny_cache, first, tmp_path, capsys):
    sets = [word for entry in (*SETS, "draft.method=domino") for word in ("--set", entry)]
    where = ["--cache", str(tiny_cache), "--out", str(tmp_path / "run"), "--device", "cpu"]

    commands.main(["train-draft", *where, *sets, "--init-from", str(first)], standalone_mode=False)

    said = capsys.readouterr().out
    assert f"starting from the dflash draft {first}; embed_proj, prefix_gru fresh" in said
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["start"]
    export(tmp_path / "run", tmp_path / "out")
    assert f"| started from | run, {recorded['digest']} |" in (tmp_path / "out" / "README.md").read_text()


def test_a_start_that_is_not_there_is_refused_before_anything_is_made(tiny_cache, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        trained(tiny_cache, tmp_path / "run", init_from=InitialDraft(tmp_path / "no"))
    assert not (tmp_path / "run").exists()
