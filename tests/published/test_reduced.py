"""Drafts with a draft vocabulary, of each method that has one: trained, decoded, exported, and read back."""

import json

import numpy as np
import pytest
import torch
from forms import sglang_dspark, speculators_reduced, target, zlab_dflash
from greedy import make_greedy_cache, save_stopping_target
from safetensors.torch import load_file, save_file

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS
from pipeline.drafts.vocabulary import ids_of
from pipeline.errors import UsageError
from pipeline.published import load_draft_folder
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.published.init_from import InitialDraft
from pipeline.published.reading import read_description
from pipeline.runs.checkpoint import load_draft
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.target.head import TargetHead
from stages.evaluate.run import SamplingOptions
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train
from stages.train_draft.run import split_for

METHODS = [name for name, draft in DRAFTS.items() if draft.reduces_vocabulary]
MARKOV = ("draft.method=dspark", "draft.markov_rank=6")
SETS = ("draft.vocabulary=12", "draft.block_size=4", "train.steps=4", "train.batch=4", "train.anchors=6")


def trained(cache, out, *sets, **more):
    return train(cache, None, (*SETS, *sets), out, "cpu", **more).run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_counts_its_supervised_ids_and_its_export_is_read_back_with_both_maps(tiny_cache, tmp_path, method):
    sets = (*SETS, f"draft.method={method}")
    run, store = trained(tiny_cache, tmp_path / "run", sets[-1]), HiddenCache.open(tiny_cache)
    draft = load_draft(run, store.head())
    split, counts = split_for(resolve(load_recipe(None, sets), store), store), np.zeros(draft.config.vocab_size, int)
    for ids, mask in map(store.tokens_of, map(int, split.train)):
        counts += np.bincount(ids[mask], minlength=len(counts))
    chosen = ids_of(draft.d2t).numpy()
    assert counts[chosen].sum() < counts.sum() and counts[chosen].min() >= np.delete(counts, chosen).max()

    for form in ("sglang", "deepspec"):
        with pytest.raises(UsageError):
            export(run, tmp_path / form, form)
    with pytest.raises(UsageError, match=rf"sglang has no place .* {draft.title} draft .* --format speculators"):
        export(run, tmp_path / "sglang")
    done = export(run, tmp_path / "out", "speculators")
    assert "logits and proposals equal" in done["proof"] and "plain arithmetic" in done["proof"]
    checked = check_export(tmp_path / "out")
    assert checked["proposed_ids"] == 12 and checked["probe"] is not None
    opened = load_draft_folder(tmp_path / "out", store.head())
    assert torch.equal(opened.d2t, draft.d2t) and opened.config.vocabulary == 12
    started = InitialDraft(tmp_path / "out").weights_for(draft.config.model_copy(update={"vocabulary": None}))
    assert not started.fresh
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| ids that may be proposed | 12 of {draft.config.vocab_size:,}, by d2t and t2d |" in card
    assert "--format sglang" not in card


def test_what_is_published_of_dspark_has_the_names_keys_and_rows_that_vllm_reads(tiny_cache, tmp_path):
    """`qwen3_dspark.py`: lm_head and markov_w2 over `draft_vocab_size`, markov_w1 over `vocab_size`, and d2t."""
    run = trained(tiny_cache, tmp_path / "run", *MARKOV)
    export(run, tmp_path / "out", "speculators")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    V = config["transformer_layer_config"]["vocab_size"]

    assert (config["draft_vocab_size"], config["markov_rank"], config["markov_head_type"]) == (12, 6, "vanilla")
    assert "vocabulary" not in config
    assert tensors["lm_head.weight"].shape[0] == len(tensors["markov_head.markov_w2.weight"]) == 12
    assert tensors["markov_head.markov_w1.weight"].shape == (V, 6)
    assert tensors["d2t"].dtype == torch.int64 and len(tensors["t2d"]) == V
    ids = tensors["d2t"] + torch.arange(12)
    head = HiddenCache.open(tiny_cache).head().head_VD
    assert torch.equal(tensors["lm_head.weight"], head[ids].to(tensors["lm_head.weight"].dtype))


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_a_markov_head_that_only_another_form_has_is_exported_nowhere_and_no_remedy_leads_in_circles(
    tiny_cache, tmp_path, kind
):
    run = trained(tiny_cache, tmp_path / "run", *MARKOV, f"draft.markov_head_type={kind}")
    with pytest.raises(UsageError, match=r"sglang has no place .* ids; train one without draft\.vocabulary"):
        export(run, tmp_path / "sglang")
    with pytest.raises(UsageError, match=rf'markov_head_type "{kind}"; train one with "vanilla"'):
        export(run, tmp_path / "out", "speculators")


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_of_fewer_ids_that_others_publish_is_opened_and_decodes(tmp_path, method):
    folder = speculators_reduced(tmp_path / "folder", method)

    draft = load_draft_folder(folder, TargetHead(target(), target()), target_layers=6)

    assert ids_of(draft.d2t).tolist() == list(range(0, 40, 3)) and draft.config.vocabulary == 14
    hidden = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(0))
    assert not (draft.rollout(hidden, torch.arange(5)) % 3).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [5, -2, 1 << 60])
def test_maps_that_leave_the_vocabulary_are_refused_wherever_a_folder_is_opened(tmp_path, method, offset):
    folder = speculators_reduced(tmp_path / "folder", method)
    config, weights = read_description(folder, 6).config, folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["d2t"][-1 if offset > 0 else 0] += offset
    save_file(tensors, weights)
    with pytest.raises(UsageError, match="d2t leads outside the vocabulary of 40"):
        load_draft_folder(folder, TargetHead(target(), target()), target_layers=6)
    with pytest.raises(UsageError, match="d2t leads outside the vocabulary of 40"):
        InitialDraft(folder).weights_for(config)


@pytest.mark.parametrize("place", ["top", "nested"])
@pytest.mark.parametrize("form", [zlab_dflash, sglang_dspark])
def test_a_vocabulary_that_the_form_has_no_key_for_is_refused(tmp_path, form, place):
    folder = form(tmp_path / "folder")
    flat = json.loads((folder / "config.json").read_text())
    (flat if place == "top" else flat["dflash_config"])["vocabulary"] = 14
    (folder / "config.json").write_text(json.dumps(flat))
    with pytest.raises(UsageError, match="vocabulary is 14 and draft_vocab_size is 40"):
        load_draft_folder(folder, TargetHead(target(), target()))


@pytest.mark.parametrize("method", METHODS)
def test_it_decodes_losslessly_from_its_run_and_from_its_export(tmp_path, method):
    model = save_stopping_target(tmp_path / "target")
    cache = make_greedy_cache(model, tmp_path / "cache")
    run = trained(cache, tmp_path / "run", f"draft.method={method}", "train.steps=10")
    export(run, tmp_path / "out", "speculators")

    drawn = SamplingOptions(1.0, 1.0)
    found = [
        evaluate(draft, count=3, max_new=8, device="cpu", sampling=drawn, batch=2, cache=cache)
        for draft in (run, tmp_path / "out")
    ]
    assert all(report.lossless.prompts == 3 for report in found)


@pytest.mark.parametrize("vocabulary", [20, None], ids=["more", "all"])
def test_a_run_goes_on_from_one_with_another_vocabulary(tiny_cache, tmp_path, vocabulary):
    first = trained(tiny_cache, tmp_path / "first", *MARKOV)
    sets = [*SETS[1:], *MARKOV, "train.lr=1e-30", *([f"draft.vocabulary={vocabulary}"] if vocabulary else [])]
    second = train(tiny_cache, None, tuple(sets), tmp_path / "run", "cpu", init_from=InitialDraft(first)).run

    head, rows = HiddenCache.open(tiny_cache).head(), "markov_head.markov_w2.weight"
    there, here = load_draft(first, head), load_draft(second, head)
    ids = ids_of(here.d2t) if vocabulary else torch.arange(here.config.vocab_size)
    at = torch.isin(ids, ids_of(there.d2t)).nonzero()[:, 0]
    assert len(ids) == here.config.proposable and len(at) == 12
    torch.testing.assert_close(here.state_dict()[rows][at], there.state_dict()[rows])
    torch.testing.assert_close(here.state_dict()["fc.weight"], there.state_dict()["fc.weight"])
