"""Exported drafts: what engines read, nothing missing or surplus, and the trainer's own logits."""

import json
import os
import signal

import pytest
import torch
from forms import SIZES
from run_folders import METHOD_FIELDS, save_draft_run, small_head
from safetensors.torch import load_file, save_file

from pipeline.cache.atomic import Scratch
from pipeline.drafts import BlockRequest
from pipeline.errors import ProofError, UsageError
from pipeline.published import export, load_draft_folder
from pipeline.published.reading import read_description

BACKBONE = {"fc.weight", "hidden_norm.weight", "norm.weight"} | {
    f"layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}
DOMINO = {"prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight"}


@pytest.fixture(params=sorted(METHOD_FIELDS))
def method(request):
    return request.param


def test_an_export_holds_exactly_the_published_tensors_and_keys(tmp_path, method):
    save_draft_run(tmp_path / "run", method)

    done = export.export(tmp_path / "run", tmp_path / "out")

    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors", "probe.tensors"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == BACKBONE | (DOMINO if method == "domino" else set())
    assert done["tensors"] == len(tensors)
    assert done["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    flat = json.loads((tmp_path / "out" / "config.json").read_text())
    nested = {"block_size": 4, "mask_token_id": 39, "target_layer_ids": [1, 3], "shift_label": method == "domino"}
    if method == "domino":
        nested |= {"projector_type": "domino", "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8}
        assert flat.pop("emb_dim") == 4
    assert flat == {
        **{name: value for name, value in SIZES.items() if name not in ("target_layer_ids", "mask_token_id")},
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dflash_config": nested,
        "dtype": "float32",
        "eos_token_id": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "is_causal": False,
        "layer_types": ["full_attention"] * 2,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "rope_scaling": None,
        "sample_from_anchor": method == "domino",
        "shift_label": method == "domino",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
    }


def test_an_export_reads_back_as_the_trained_draft(tmp_path, method):
    draft = save_draft_run(tmp_path / "run", method)

    export.export(tmp_path / "run", tmp_path / "out")

    opened = load_draft_folder(tmp_path / "out", small_head())
    assert {name: getattr(opened.config, name) for name in [*SIZES, *METHOD_FIELDS[method]]} == {
        **SIZES,
        **METHOD_FIELDS[method],
    }
    features = torch.randn(2, 5, 16)
    guesses = [one.propose([BlockRequest(features, 3, 5, one.new_kv())])[0].ids_P.tolist() for one in (opened, draft)]
    assert guesses[0] == guesses[1]


def test_transformers_reads_the_config(tmp_path):
    from transformers import AutoConfig

    save_draft_run(tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out")

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config).__name__ == "Qwen3Config"
    assert (config.head_dim, config.rope_parameters["rope_theta"], config.block_size) == (12, 1e4, 4)


def test_sliding_layers_are_exported_and_read_back(tmp_path):
    kinds = ("full_attention", "sliding_attention")
    save_draft_run(tmp_path / "run", layer_types=kinds, sliding_window=8)

    export.export(tmp_path / "run", tmp_path / "out")

    flat = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (flat["use_sliding_window"], flat["sliding_window"]) == (True, 8)
    assert "is_causal" not in flat  # one flag cannot say: sliding layers causal, the others not
    assert read_description(tmp_path / "out").config.layer_types == kinds


def test_the_same_export_again_is_left_alone_and_another_is_refused(tmp_path):
    save_draft_run(tmp_path / "run")
    save_draft_run(tmp_path / "other", "dflash")
    export.export(tmp_path / "run", tmp_path / "out")
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns

    export.export(tmp_path / "run", tmp_path / "out")

    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="is there already and differs"):
        export.export(tmp_path / "other", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["other", "out", "run"]


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("domino", {"pure_draft_prefix_len": 0}, "pure_draft_prefix_len 1 only"),
        ("domino", {"shift_label": False}, "shift_label true"),
        ("dflash", {"shift_label": True}, "same-position labels only"),
    ],
)
def test_what_sglang_cannot_serve_is_refused_with_the_reason(tmp_path, method, changes, reason):
    save_draft_run(tmp_path / "run", method, **changes)
    with pytest.raises(UsageError, match=reason):
        export.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def swap_key_and_value(tensors):
    names = [f"layers.0.self_attn.{part}_proj.weight" for part in "kv"]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


FAULTS = {
    "lost": (lambda tensors: tensors.pop("norm.weight"), "lacks norm.weight"),
    "surplus": (lambda tensors: tensors.update(extra=torch.ones(2)), "has surplus extra"),
    "shape": (lambda tensors: tensors.update({"norm.weight": torch.ones(8)}), r"norm.weight is \[8\]"),
    "nan": (lambda tensors: tensors["norm.weight"].fill_(float("nan")), "not finite"),
    "swapped": (swap_key_and_value, "logits of the exported draft differ"),
    "nudged": (lambda tensors: tensors["norm.weight"].mul_(1 + 1e-5), "logits of the exported draft differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_export_is_caught_and_leaves_nothing(tmp_path, monkeypatch, fault):
    save_draft_run(tmp_path / "run")
    change, message = FAULTS[fault]
    write = export._write

    def faulty(folder, *rest):
        write(folder, *rest)
        broken_weights(folder, change)

    monkeypatch.setattr(export, "_write", faulty)
    with pytest.raises(ProofError, match=message):
        export.export(tmp_path / "run", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "block_size", "shift_label"])
def test_a_wrong_value_in_the_config_is_caught(tmp_path, monkeypatch, key):
    save_draft_run(tmp_path / "run", "dflash")
    right = export.published_config

    def wrong(config, *rest):
        changes = {"rope_theta": 2e4, "rms_norm_eps": 1e-3, "block_size": 5, "shift_label": True}
        return right(config.model_copy(update={key: changes[key]}), *rest)

    monkeypatch.setattr(export, "published_config", wrong)
    with pytest.raises(ProofError, match=f"reads {key} = "):
        export.export(tmp_path / "run", tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
    save_draft_run(tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


def edit(folder, change):
    flat = json.loads((folder / "config.json").read_text())
    change(flat, flat["dflash_config"])
    (folder / "config.json").write_text(json.dumps(flat))


def drop(flat, nested, *keys):
    for key in keys:
        flat.pop(key, None)
        nested.pop(key, None)


def test_the_block_size_may_stand_in_either_place(folder):
    edit(folder, lambda flat, nested: flat.pop("block_size"))
    assert read_description(folder).config.block_size == 4
    edit(folder, lambda flat, nested: flat.update(block_size=nested.pop("block_size")))
    assert read_description(folder).config.block_size == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flat, nested: drop(flat, nested, "block_size"), "'block_size' is missing"),
        (lambda flat, nested: flat.update(block_size=8), "block_size is 8 and, in dflash_config, 4"),
        (lambda flat, nested: nested.update(projector_type="eagle"), "projector_type 'eagle' is unknown"),
        (lambda flat, nested: flat.update(sample_from_anchor=False), "contradict"),
        (lambda flat, nested: drop(flat, nested, "shift_label", "sample_from_anchor"), "shift_label is missing"),
        (lambda flat, nested: nested.pop("mask_token_id"), "'mask_token_id' is missing"),
        (lambda flat, nested: nested.pop("gru_hidden_dim"), "'gru_hidden_dim' is missing"),
        (lambda flat, nested: flat.update(rope_theta=5e5), "rope_theta"),
        (lambda flat, nested: flat.update(rope_scaling={"type": "yarn"}), "scaled rotary positions"),
        (lambda flat, nested: flat.update(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
        (lambda flat, nested: flat.update(model_type="llama"), "only qwen3"),
        (lambda flat, nested: nested.update(target_layer_ids=[3, 5]), "-1..4"),
        (lambda flat, nested: flat.pop("dflash_config"), "'dflash_config' is missing"),
        (lambda flat, nested: flat.update(is_causal=True), "is_causal is true"),
        (lambda flat, nested: nested.update(causal=True), "causal is true"),
        (lambda flat, nested: nested.update(use_swa=True), "use_swa is true"),
        (lambda flat, nested: flat.update(logit_scale=0.5), "logit_scale is 0.5"),
        (lambda flat, nested: flat.update(quantization_config={"bits": 4}), "quantization_config is"),
        (lambda flat, nested: nested.update(attention_sink_bias=True), "attention_sink_bias is true"),
        (lambda flat, nested: nested.update(selector="top"), "dflash_config has selector = 'top'"),
        (lambda flat, nested: flat.update(num_hidden_layers=10**9), "more than 1024 no draft has"),
        (lambda flat, nested: drop(flat, nested, "num_target_layers"), "add num_target_layers"),
    ],
)
def test_a_config_that_leaves_something_open_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(UsageError, match=message):
        load_draft_folder(folder, small_head())


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        load_draft_folder(folder, small_head())


def test_an_absent_convention_means_same_position_for_plain_dflash_only(tmp_path):
    save_draft_run(tmp_path / "run", "dflash")
    export.export(tmp_path / "run", tmp_path / "out")
    edit(tmp_path / "out", lambda flat, nested: drop(flat, nested, "shift_label", "sample_from_anchor"))
    assert read_description(tmp_path / "out").config.shift_label is False


def killed_export(run, out, monkeypatch):
    """An export that is killed when all its files are written, in a process of its own."""
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(export, "_rename_into_place", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        export.export(run, out)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def unfinished(folder):
    return sorted(path for path in folder.iterdir() if path.name.startswith("tmp-"))


@pytest.mark.parametrize("name", ["out", "another"])
def test_what_a_killed_export_left_goes_with_the_next(tmp_path, monkeypatch, name):
    save_draft_run(tmp_path / "run", "domino")
    killed_export(tmp_path / "run", tmp_path / "out", monkeypatch)
    [left] = unfinished(tmp_path)
    assert (left / "draft" / "model.safetensors").is_file() and not (tmp_path / "out").exists()

    export.export(tmp_path / "run", tmp_path / name)

    assert unfinished(tmp_path) == []
    assert sorted(os.listdir(tmp_path / name)) == sorted(export.FILES)


def test_an_export_removes_nothing_of_one_that_is_running_nor_of_others(tmp_path):
    save_draft_run(tmp_path / "run", "domino")
    theirs = [tmp_path / "tmp-export-notes", tmp_path / f"tmp-other-{'a' * 32}", tmp_path / "tmp-export-file"]
    for path in theirs[:2]:
        path.mkdir()
    theirs[2].write_text("")
    (tmp_path / f"tmp-export-{'b' * 32}").symlink_to(theirs[0])
    with Scratch(tmp_path, export.SCRATCH_LABEL) as running:
        (running.path / "draft").mkdir()
        export.export(tmp_path / "run", tmp_path / "out")
        assert (running.path / "draft").is_dir()
    assert len(unfinished(tmp_path)) == 4
