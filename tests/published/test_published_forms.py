"""Published folders of every form: read right, checked without the training code, exported as they were."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from forms import DSPARK, FORMS, SIZES, backbone, domino, dspark, speculators_reduced, target, zlab_dflash
from safetensors.torch import load_file, save_file

from pipeline.drafts import DRAFTS, DraftConfig, draft_config, init_weights, lay_blocks, pack
from pipeline.drafts.draft import ProbeBlock
from pipeline.errors import ProofError, UsageError
from pipeline.published import check as arithmetic
from pipeline.published import export, load_draft_folder
from pipeline.published.check import check_export
from pipeline.published.init_from import InitialDraft
from pipeline.published.reading import published_names, read_description
from pipeline.runs import checkpoint
from pipeline.target.head import TargetHead

OF_DOMINO = {"method": "domino", "shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8}
OF_DSPARK = {"method": "dspark", "shift_label": True, "markov_head_type": "vanilla", **DSPARK}
READ = {
    "z-lab dflash": {"method": "dflash", "shift_label": False},
    "specforge domino": OF_DOMINO,
    "published domino": OF_DOMINO,
    "specforge training": OF_DOMINO,
    "deepspec dflash": {"method": "dflash", "shift_label": True},
    "speculators dflash": {"method": "dflash", "shift_label": False},
    **{f"{who} dspark": OF_DSPARK for who in ("specforge", "sglang", "deepspec", "model-optimizer", "speculators")},
}
OWN = {"dflash": dict, "domino": domino, "dspark": dspark}
FIXED = {"dflash": {"shift_label": False}, "domino": OF_DOMINO, "dspark": OF_DSPARK}


def head() -> TargetHead:
    return TargetHead(target(), target())


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    """A form's name and a folder of it."""
    return request.param, FORMS[request.param](tmp_path / "folder")


def test_every_form_is_read_as_the_draft_it_is(form):
    name, folder = form
    config = read_description(folder, 6).config
    assert {key: getattr(config, key) for key in SIZES | READ[name]} == SIZES | READ[name]


def test_every_form_holds_the_same_draft(form):
    name, folder = form
    draft = load_draft_folder(folder, head(), target_layers=6)
    wanted = backbone() | OWN[READ[name]["method"]]()
    assert draft.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in draft.state_dict().items())


def test_every_form_passes_the_check_and_says_that_no_probe_lies_with_it(form):
    name, folder = form
    found = check_export(folder, 6)
    wanted = backbone() | OWN[READ[name]["method"]]()
    assert (found["tensors"], found["parameters"]) == (len(wanted), sum(map(torch.numel, wanted.values())))
    assert (found["layers"], found["proposals"], found["probe"]) == ([1, 3], 3 + READ[name]["shift_label"], None)


# What an export does not have as the folder had it: classes and remote code of others, names that SGLang does not know.
OTHERWISE = {"architectures", "auto_map", "speculators_version", "num_anchors", "confidence_head_alpha"}
OTHERWISE |= {"use_confidence_head", "eos_token_id", "verifier"}
OTHERWISE |= {"sliding_window_non_causal"}  # false by default, by which vLLM would mask every layer


def same_keys(found: dict, wanted: dict) -> list[str]:
    """Keys of `wanted` that `found` lacks or has otherwise."""
    wrong = []
    for key in wanted.keys() - OTHERWISE:
        if isinstance(wanted[key], dict):
            wrong += same_keys(found.get(key, {}), wanted[key])
        elif key not in found or found[key] != wanted[key]:
            wrong.append(f"{key}: {found.get(key)} for {wanted[key]}")
    return wrong


def imported(folder, run):
    """A run that has started from the folder and trained for no step."""
    wanted = read_description(folder, 6).config
    draft = DRAFTS[wanted.method](wanted, head())
    init_weights(draft, 0)
    InitialDraft(folder).weights_for(wanted, head()).load_into(draft)
    checkpoint.save(run, 1, draft, {}, {}, 1)


@pytest.mark.parametrize("name", sorted(FORMS.keys() - {"deepspec dflash"}))  # which is served by DeepSpec alone
def test_import_then_export_gives_the_same_tensors_and_keys(name, tmp_path):
    folder = FORMS[name](tmp_path / "folder")
    imported(folder, tmp_path / "run")

    export.export(tmp_path / "run", tmp_path / "out", "speculators" if "speculators" in name else "sglang")

    tensors, wanted = load_file(tmp_path / "out" / "model.safetensors"), backbone() | OWN[READ[name]["method"]]()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert same_keys(new, old) == []
    again = read_description(tmp_path / "out").config
    assert again == read_description(folder, 6).config


def test_a_dflash_draft_with_next_position_labels_is_exported_nowhere(tmp_path):
    imported(FORMS["deepspec dflash"](tmp_path / "folder"), tmp_path / "run")
    for form in ("sglang", "speculators"):
        with pytest.raises(UsageError, match="same-position labels only"):
            export.export(tmp_path / "run", tmp_path / "out", form)


SLIDING = ("sliding_attention", "full_attention")
VARIANTS = [
    {"method": "dflash", "shift_label": False},
    {"method": "dflash", "shift_label": True, "attention_bias": True},
    {
        "method": "dflash",
        "shift_label": False,
        "layer_types": SLIDING,
        "sliding_window": 3,
    },
    OF_DOMINO,
    OF_DOMINO | {"pure_draft_prefix_len": 0},
    OF_DOMINO | {"shift_label": False, "pure_draft_prefix_len": 0},
    OF_DOMINO | {"shift_label": False, "pure_draft_prefix_len": 2},
    OF_DSPARK,
    OF_DSPARK | {"markov_head_type": "gated", "confidence_head_with_markov": False},
    OF_DSPARK | {"markov_head_type": "rnn"},
    OF_DSPARK | {"markov_head_type": "rnn", "enable_confidence_head": False, "confidence_head_with_markov": False},
]


def noisy(config: DraftConfig):
    draft = DRAFTS[config.method](config, head())
    init_weights(draft, 3)
    with torch.no_grad():  # norms of 1 and biases of 0 would hide a lost one
        for weight in draft.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return draft.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_plain_arithmetic_on_the_tensors_gives_what_the_modules_give(variant):
    config = draft_config(**SIZES | variant)
    draft = noisy(config)
    tensors, method = dict(draft.state_dict()), DRAFTS[config.method]
    rows = export.shorter(export.make_rows(config, None)[0])
    cell, anchors_N = pack([rows], ["one"]), torch.tensor([1, 5, 23])
    blocks = lay_blocks(cell, anchors_N, config)
    hidden_NSD = draft.hidden(cell, blocks)
    wanted_NSV = draft.logits(hidden_NSD, blocks.prev_NS)["final"]

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == method.tensors(config)
    for n, anchor in enumerate(anchors_N.tolist()):
        slots_SD, prev_S, columns = target()[blocks.input_ids_NS[n]], blocks.prev_NS[n], torch.arange(40)
        features_KTD = rows.aux[:, :anchor]
        states = partial(arithmetic.block_states, tensors.get, config, features_KTD, slots_SD)
        block = ProbeBlock(tensors.get, states, features_KTD, slots_SD, prev_S, target()[prev_S], columns, target())
        logits_SV, confidence_S = method.reference(config, block)
        torch.testing.assert_close(logits_SV, wanted_NSV[n], rtol=2e-5, atol=2e-5)
        if config.has_confidence:
            wanted_S = draft.confidence(hidden_NSD, blocks.prev_NS)[n]
            torch.testing.assert_close(confidence_S, wanted_S, rtol=2e-5, atol=2e-5)


EXPORTS = [("dflash", "sglang"), ("domino", "sglang"), ("dspark", "sglang"), ("dflash", "speculators")]
EXPORTS += [("dspark", "speculators")]


def exported(place, method, form="sglang", **changes):
    """An export of a fresh draft."""
    draft = noisy(draft_config(**SIZES | {"method": method} | FIXED[method] | changes))
    checkpoint.save(place / "run", 7, draft, {}, {}, 1)
    export.export(place / "run", place / "out", form)
    return place / "out"


@pytest.fixture(scope="module", params=EXPORTS, ids=" ".join)
def sound(request, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("export"), *request.param)


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of an export, to damage."""
    return shutil.copytree(sound, tmp_path / "out")


def test_an_export_gives_the_logits_stored_with_it(sound):
    probe = check_export(sound)["probe"]
    assert probe["blocks"] == 2 and probe["difference"] < 1e-5


def test_no_engine_takes_the_probe_for_weights(sound):
    # vLLM and SGLang glob these three, and the strict ones end on a name they do not know
    loaded = {file.name for pattern in ("*.safetensors", "*.bin", "*.pt") for file in sound.glob(pattern)}
    assert loaded == {"model.safetensors"}


def weights_of(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config_of(folder, change):
    flat = json.loads((folder / "config.json").read_text())
    change(flat)
    (folder / "config.json").write_text(json.dumps(flat))


def misspell(tensors):
    tensors["hidden_norms.weight"] = tensors.pop("hidden_norm.weight")


BROKEN = {
    "misspelt": (weights_of, misspell, "lacks hidden_norm.weight"),
    "surplus": (weights_of, lambda tensors: tensors.update({"mask_hidden": torch.ones(16)}), "has surplus mask_hidden"),
    "shape": (weights_of, lambda tensors: tensors.update({"norm.weight": torch.ones(8)}), r"norm.weight is \[8\]"),
    "nan": (weights_of, lambda tensors: tensors["fc.weight"][3].fill_(float("nan")), "not finite"),
    "type": (
        weights_of,
        lambda tensors: tensors.update({"norm.weight": torch.ones(16).long()}),
        "stored as torch.int64",
    ),
    "nudged": (weights_of, lambda tensors: tensors["norm.weight"].mul_(1 + 1e-6), "its bytes have changed"),
    "a key more": (config_of, lambda flat: flat.update(license="mit"), "its bytes have changed"),
    "mask": (config_of, lambda flat: (flat.get("dflash_config") or flat).update(mask_token_id=40), "mask_token_id"),
    "no heads": (
        config_of,
        lambda flat: flat.get("transformer_layer_config", flat).update(num_attention_heads=0, head_dim=None),
        "num_attention_heads: Input should be greater than 0",
    ),
    "no size": (config_of, lambda flat: flat.pop("block_size") and flat.get("dflash_config", {}).clear(), "is missing"),
    "no list": (config_of, lambda flat: flat.update(architectures=5), "a value in it is malformed"),
    "causal": (config_of, lambda flat: flat.update(is_causal=True), "is_causal is true"),
    "two files": (lambda folder, _: (folder / "old.bin").write_bytes(b""), None, "engines load every such file"),
    "no weights": (lambda folder, _: (folder / "model.safetensors").unlink(), None, "holds no model.safetensors"),
    "torn": (lambda folder, _: os.truncate(folder / "model.safetensors", 999), None, "cannot be read"),
    "mask vector": (lambda folder, _: (folder / "mask_embedding.pt").touch(), None, "mask vector of its own"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_folder_fails_the_check_which_says_why(folder, fault):
    damage, how, message = BROKEN[fault]
    damage(folder, how)
    with pytest.raises(ProofError, match=message) as failed:
        check_export(folder)
    assert str(failed.value).startswith(f"check-export: {folder}"), "it names the folder or a file in it"


def test_logits_that_do_not_come_out_again_fail_the_check(folder):
    probe = folder / "probe.tensors"
    from safetensors import safe_open

    with safe_open(probe, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["logits_NSC"][0, 1] += 0.01
    save_file(tensors, probe, metadata=metadata)
    with pytest.raises(ProofError, match="differ from those stored at export"):
        check_export(folder)


@pytest.mark.parametrize("name", ["logits_NSC", "ids_I", "columns_C", "prev_NS"])
def test_a_probe_of_another_draft_is_refused(folder, name):
    probe = folder / "probe.tensors"
    from safetensors import safe_open

    with safe_open(probe, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[name] = tensors[name][:1] if name == "logits_NSC" else tensors[name] + 40
    save_file(tensors, probe, metadata=metadata)
    with pytest.raises(ProofError, match=r"probe\.tensors"):
        check_export(folder)


@pytest.mark.parametrize("method", ["dflash", "dspark"])
def test_maps_of_reduced_ids_are_checked(tmp_path, method):
    folder = speculators_reduced(tmp_path / "folder", method)
    assert check_export(folder, 6)["proposed_ids"] == 14

    weights_of(folder, lambda tensors: tensors["d2t"][:1].add_(1))
    with pytest.raises(ProofError, match="d2t and t2d name different ids"):
        check_export(folder, 6)
    weights_of(folder, lambda tensors: tensors["d2t"].add_(5))
    with pytest.raises(ProofError, match="outside the vocabulary of 40"):
        check_export(folder, 6)
    weights_of(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ProofError, match=r"lacks lm_head.weight"):
        check_export(folder, 6)


def test_a_folder_that_does_not_state_the_depth_asks_for_it(tmp_path):
    folder = FORMS["speculators dflash"](tmp_path / "folder")
    with pytest.raises(ProofError, match="num_target_layers"):
        check_export(folder)
    with pytest.raises(ProofError, match=r"must lie in -1\.\.2"):
        check_export(folder, 4)


def test_a_draft_of_dspark_is_exported_with_every_key_twice_for_sglang(tmp_path):
    flat = json.loads((exported(tmp_path, "dspark") / "config.json").read_text())
    said = {"markov_rank": 6, "markov_head_type": "vanilla", "enable_confidence_head": True}
    said |= {"confidence_head_with_markov": True, "mask_token_id": 39, "target_layer_ids": [1, 3], "block_size": 4}
    assert flat["architectures"] == ["Qwen3DSparkModel"]
    assert said.items() <= {key: value for key, value in flat.items() if key in said}.items()
    nested = flat["dflash_config"]
    assert nested == said | {"projector_type": "dspark", "attention_mode": "gqa", "shift_label": True}
    explicit = ("shift_label", "sample_from_anchor", "is_causal", "rope_theta", "head_dim", "num_target_layers")
    assert [flat[key] for key in explicit] == [True, True, False, 1e4, 12, 6]


def test_an_export_for_speculators_has_its_keys_and_its_own_counting(tmp_path):
    flat = json.loads((exported(tmp_path, "dspark", "speculators") / "config.json").read_text())
    layer = flat.pop("transformer_layer_config")
    assert flat == {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "block_size": 4,
        "aux_hidden_state_layer_ids": [2, 4],
        "mask_token_id": 39,
        "draft_vocab_size": 40,
        "target_hidden_size": 16,
        "num_target_layers": 6,
        "sample_from_anchor": True,
        "sliding_window_non_causal": True,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": []},
        },
    }
    explicit = ("model_type", "is_causal", "rope_theta", "head_dim", "vocab_size", "num_hidden_layers")
    assert [layer[key] for key in explicit] == ["qwen3", False, 1e4, 12, 40, 2]


@pytest.mark.parametrize("method", ["dflash", "dspark"])
@pytest.mark.parametrize("kind", SLIDING)
def test_vllm_masks_a_block_as_it_was_trained(tmp_path, method, kind):
    window = {"sliding_window": 8} if kind == "sliding_attention" else {}
    folder = exported(tmp_path, method, "speculators", layer_types=(kind, kind), **window)
    flat = json.loads((folder / "config.json").read_text())
    # Its translation: one `causal` for every layer, whatever its kind.
    assert (not flat.get("sliding_window_non_causal", True)) == (kind == "sliding_attention")
    assert read_description(folder).config.layer_types == (kind, kind)


@pytest.mark.parametrize(
    ("form", "method", "changes", "reason"),
    [
        ("speculators", "domino", {}, "no Domino"),
        ("speculators", "dspark", {"markov_head_type": "gated"}, "vanilla Markov head only"),
        ("speculators", "dspark", {"markov_head_type": "rnn"}, "vanilla Markov head only"),
        ("sglang", "domino", {"pure_draft_prefix_len": 0}, "pure_draft_prefix_len 1 only"),
        ("sglang", "dflash", {"target_layer_ids": (-1, 3)}, "-1 is the embedding"),
        ("sglang", "dflash", {"layer_types": SLIDING, "sliding_window": 3}, "sliding_window 3 is below block_size 4"),
        ("speculators", "dflash", {"layer_types": SLIDING, "sliding_window": 8}, "one flag for all layers"),
        ("speculators", "dspark", {"layer_types": SLIDING, "sliding_window": 8}, "one flag for all layers"),
        ("trt", "dflash", {}, "unknown format"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused_with_the_reason(tmp_path, form, method, changes, reason):
    with pytest.raises(UsageError, match=reason):
        exported(tmp_path, method, form, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("speculators dspark", lambda flat: flat.update(sample_from_anchor=False), "older releases of speculators"),
        ("speculators dspark", lambda flat: flat.pop("sample_from_anchor"), "older releases of speculators"),
        (
            "speculators dflash",
            lambda flat: slide(flat["transformer_layer_config"]) or flat.update(sliding_window_non_causal=True),
            "sliding_window_non_causal is true",
        ),
        ("z-lab dflash", lambda flat: slide(flat) or flat.update(is_causal=False), "is_causal is false"),
        ("z-lab dflash", lambda flat: slide(flat) or flat["dflash_config"].update(causal=False), "causal is false"),
        ("deepspec dspark", lambda flat: slide(flat, SLIDING) or flat.update(is_causal=True), "is_causal is true"),
        (
            "speculators dflash",
            lambda flat: flat["transformer_layer_config"].update(is_causal=True),
            "is_causal is true",
        ),
        ("speculators dflash", lambda flat: flat.update(projector_type="domino"), "projector_type 'domino'"),
        ("speculators dflash", lambda flat: flat.update(shift_label=True), "anchor \\+ k \\+ 1 or anchor"),
        (
            "speculators dflash",
            lambda flat: flat.update(block_size=3),
            r"speculative_tokens \[3\], where .* proposes 2",
        ),
        ("speculators dflash", lambda flat: flat.update(target_hidden_size=32), "target_hidden_size 32"),
        ("speculators dflash", lambda flat: flat.update(draft_vocab_size=41), "draft_vocab_size is 41"),
        ("speculators dflash", lambda flat: flat.update(speculators_model_type="eagle3"), "only dflash and dspark"),
        ("sglang dspark", lambda flat: flat.update(markov_rank=8), "markov_rank is 8 and, in dflash_config, 6"),
        ("sglang dspark", lambda flat: flat.update(sample_from_anchor=False), "contradict each other or dspark"),
        ("deepspec dspark", lambda flat: flat.update(is_causal=True), "is_causal is true"),
        ("deepspec dspark", lambda flat: flat.update(use_swa=True), "use_swa is true"),
        ("deepspec dspark", lambda flat: flat.update(markov_rank=0), "a confidence head with markov_rank 0"),
        ("specforge dspark", lambda flat: flat["dflash_config"].update(use_swa=True), "use_swa is true"),
        ("specforge dspark", lambda flat: flat.update(architectures=["DominoDraftModel"]), "correct one"),
    ],
)
def test_what_would_compute_otherwise_is_refused(tmp_path, name, change, message):
    folder = FORMS[name](tmp_path / "folder")
    config_of(folder, change)
    with pytest.raises(UsageError, match=message):
        load_draft_folder(folder, head(), target_layers=6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("speculators dflash", lambda flat: flat.update(sliding_window_non_causal=True)),
        ("speculators dspark", lambda flat: flat.update(shift_label=False)),  # of Domino there, and always stated
        ("z-lab dflash", lambda flat: flat.update(is_causal=False)),
        ("z-lab dflash", lambda flat: slide(flat) or flat.update(is_causal=True)),
        ("z-lab dflash", lambda flat: slide(flat, SLIDING)),
    ],
)
def test_flags_that_say_what_is_computed_here_are_taken(tmp_path, name, change):
    folder = FORMS[name](tmp_path / "folder")
    config_of(folder, change)
    load_draft_folder(folder, head(), target_layers=6)


def slide(flat: dict, kinds=("sliding_attention",) * 2) -> None:
    flat.update(layer_types=list(kinds), use_sliding_window=True, sliding_window=8)


def test_copies_of_another_targets_tensors_are_refused(tmp_path):
    folder = FORMS["deepspec dspark"](tmp_path / "folder")
    other = TargetHead(target(), target() + 1)
    with pytest.raises(UsageError, match=r"brings a lm_head\.weight that is not the target's"):
        load_draft_folder(folder, other)


def test_weights_may_lie_in_several_files(tmp_path):
    folder = zlab_dflash(tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + name.startswith('layers')}-of-00002.safetensors" for name in tensors}
    for file in set(parts.values()):
        save_file({name: tensors[name] for name in parts if parts[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert check_export(folder)["tensors"] == len(tensors)


def test_a_trainers_whole_state_gives_the_draft_alone(tmp_path):
    folder = zlab_dflash(tmp_path / "folder")
    state = {f"model.dflash_module.{name}": tensor for name, tensor in backbone().items()}
    state |= {"model.embed_tokens.weight": target(), "model.dflash_module.layers.0.rotary_emb.inv_freq": torch.ones(6)}
    save_file(state, folder / "model.safetensors")
    draft = load_draft_folder(folder, head())
    assert all(torch.equal(draft.state_dict()[name], tensor) for name, tensor in backbone().items())


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(UsageError, match=r"are both markov_head\.markov_w1\.weight"):
        published_names(["markov_head.markov_w1.weight", "markov_w1.weight"])
