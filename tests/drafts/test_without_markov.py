"""DSpark without a Markov head, `markov_rank` 0: trained, decoded, exported, and read as others publish it."""

import pytest
import torch
from draft_cases import all_blocks, assert_near, build, cell_of, gradients, loss_of
from forms import PLACED, QWEN3, D, backbone, target, values, write
from greedy import make_greedy_cache, save_stopping_target

from pipeline.errors import UsageError
from pipeline.published import load_draft_folder
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.published.reading import read_description
from pipeline.target.head import TargetHead
from stages.evaluate.run import SamplingOptions
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train

CONFIDENCE = {"confidence_head.proj.weight": (1, D), "confidence_head.proj.bias": (1,)}


def test_it_is_dflash_with_next_position_labels_and_learns_as_dspark_does():
    draft, plain, cell = build("dspark", markov_rank=0, markov_head_type="vanilla"), build("dflash", True), cell_of(30)
    assert {name for name in draft.state_dict() if name not in plain.state_dict()} == set(CONFIDENCE)
    plain.load_state_dict({name: draft.state_dict()[name] for name in plain.state_dict()})
    blocks = all_blocks(draft, cell)
    with torch.no_grad():
        hidden, anchors = draft.hidden(cell, blocks), cell.ids_R[blocks.anchors_N]
        assert_near(draft.logits(hidden, blocks.prev_NS)["final"], plain.logits(hidden, blocks.prev_NS)["final"], 1e-6)
        assert torch.equal(draft.rollout(hidden, anchors), plain.rollout(hidden, anchors))
    loss = loss_of(draft, cell, blocks)
    assert set(loss.terms) == {"ce", "l1", "confidence"}
    assert all(gradient.any() for gradient in gradients(draft, loss.total).values())


@pytest.mark.parametrize("confident", [True, False], ids=["confidence", "bare"])
def test_a_run_is_trained_decoded_exported_and_checked(tmp_path, confident):
    model = save_stopping_target(tmp_path / "target")
    cache, run = make_greedy_cache(model, tmp_path / "cache"), tmp_path / "run"
    small = ('draft.method="dspark"', "draft.markov_rank=0", "draft.block_size=4", "draft.intermediate_size=48")
    head = f"draft.enable_confidence_head={str(confident).lower()}"
    train(cache, None, (*small, head, "train.steps=10", "train.batch=6", "train.save_every=10"), run, "cpu")

    threshold = 0.4 if confident else 0.0
    report = evaluate(
        run, count=3, max_new=8, device="cpu", sampling=SamplingOptions(1.0, 1.0), threshold=threshold, batch=2
    )
    assert report.lossless.prompts == 3 and report.draft.proposals == 4

    for form in ("sglang", "speculators"):
        done = export(run, tmp_path / form, form)
        assert "logits and proposals equal" in done["proof"] and "plain arithmetic" in done["proof"]
        config, checked = read_description(tmp_path / form).config, check_export(tmp_path / form)
        assert (config.method, config.markov_rank, config.enable_confidence_head) == ("dspark", 0, confident)
        assert checked["probe"] is not None and checked["tensors"] == done["tensors"]
        assert "| Markov head | none, " in (tmp_path / form / "README.md").read_text()


def published(folder, architecture, nested, confident, **flat):
    """A draft as SpecForge (its head's keys nested) or DeepSpec (at the top level) writes it."""
    head = {"markov_rank": 0, "enable_confidence_head": confident, "confidence_head_with_markov": False}
    where = {"dflash_config": PLACED | head | {"projector_type": "dspark"}} if nested else PLACED | head
    config = QWEN3 | {"architectures": [architecture], "num_target_layers": 6, "block_size": 4} | where | flat
    return write(folder, config, backbone() | (values(CONFIDENCE) if confident else {}))


@pytest.mark.parametrize("confident", [True, False], ids=["confidence", "bare"])
@pytest.mark.parametrize("flat", [{}, {"markov_head_type": "vanilla"}, {"markov_head_type": "gated"}], ids=str)
@pytest.mark.parametrize(("architecture", "nested"), [("DSparkDraftModel", True), ("Qwen3DSparkModel", False)])
def test_what_others_publish_is_read(tmp_path, architecture, nested, flat, confident):
    folder = published(tmp_path / "folder", architecture, nested, confident, **flat)

    config, draft = read_description(folder).config, load_draft_folder(folder, TargetHead(target(), target()))

    baseline = not nested and not confident  # DeepSpec's name for DFlash with next-position labels
    assert (config.method, config.shift_label) == ("dflash" if baseline else "dspark", True)
    assert getattr(config, "markov_rank", None) == (None if baseline else 0)
    assert draft.state_dict().keys() == backbone().keys() | (CONFIDENCE.keys() if confident else set())
    assert check_export(folder)["tensors"] == len(draft.state_dict())


def test_a_confidence_that_would_read_the_absent_table_is_refused(tmp_path):
    folder = published(tmp_path / "folder", "Qwen3DSparkModel", False, True, confidence_head_with_markov=True)
    with pytest.raises(UsageError, match="a confidence head with markov_rank 0 has no table to read"):
        read_description(folder)
