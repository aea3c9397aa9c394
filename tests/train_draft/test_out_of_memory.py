"""A device that is too small for part of a run: less at a time where that helps, else one line, and nothing is lost."""

import pytest
import torch
from test_train_draft import Killed, kill, lines, stopping, trained, unused_token

from pipeline.drafts import DRAFTS
from pipeline.errors import RoomError
from pipeline.runs import checkpoint
from stages.train_draft.optimizers import AdamW

MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"
SETS = ("train.save_every=3", "train.eval_every=100")


def too_small(monkeypatch, most: int, training: bool = True) -> list[int]:
    """Let the device have memory for so many blocks at a time; returns the blocks of each forward."""
    hidden, seen = DRAFTS["domino"].hidden, []

    def small(draft, cell, blocks):
        if draft.training == training:
            seen.append(len(blocks.anchors_N))
            if seen[-1] > most:
                raise torch.OutOfMemoryError(MEMORY)
        return hidden(draft, cell, blocks)

    monkeypatch.setattr(DRAFTS["domino"], "hidden", small)
    return seen


def test_a_resumed_run_goes_on_with_the_parts_that_fitted(tiny_cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        too_small(patch, 3)
        straight = trained(tiny_cache, tmp_path / "straight", *SETS)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        too_small(patch, 3)
        stopping(patch, 5, kill)
        trained(tiny_cache, tmp_path / "killed", *SETS)

    def full(*_):
        raise torch.OutOfMemoryError(MEMORY)

    with monkeypatch.context() as patch, pytest.raises(RoomError, match="step-00000003: Cannot allocate memory; free"):
        patch.setattr(checkpoint, "load_tensors", full)
        trained(tiny_cache, tmp_path / "killed", *SETS)  # it was said that another program wrote this: remove it

    resumed = trained(tiny_cache, tmp_path / "killed", *SETS)  # on a device that is large enough for all

    for name in ("metrics.jsonl", "checkpoints/step-00000008/draft.safetensors"):
        assert (resumed.run / name).read_bytes() == (straight.run / name).read_bytes(), name
    assert checkpoint.latest(resumed.run).state.blocks_per_pass in (2, 3)


def test_a_run_with_memory_enough_records_no_parts(tiny_cache, tmp_path):
    run = trained(tiny_cache, tmp_path / "run", *SETS).run
    assert "blocks_per_pass" not in checkpoint.latest(run).state.as_dict()


def test_an_evaluation_computes_fewer_blocks_at_a_time_and_the_same_figures(greedy_cache, tmp_path, monkeypatch):
    sets = (*SETS, f"draft.mask_token_id={unused_token(greedy_cache)}")
    wanted = trained(greedy_cache, tmp_path / "whole", *sets)
    seen = too_small(monkeypatch, 5, training=False)
    found = trained(greedy_cache, tmp_path / "parts", *sets)
    assert max(seen) > 5 >= seen[-1]
    assert lines(found.run)[-1] == lines(wanted.run)[-1] and "eval" in lines(found.run)[-1]


def test_an_evaluation_that_has_no_memory_saves_the_step(greedy_cache, tmp_path, monkeypatch):
    sets = ("train.save_every=100", "train.eval_every=5", f"draft.mask_token_id={unused_token(greedy_cache)}")
    straight = trained(greedy_cache, tmp_path / "straight", *sets)
    with monkeypatch.context() as patch, pytest.raises(RoomError, match=r"for the evaluation of step 5 \(CUDA out of "):
        too_small(patch, 0, training=False)
        trained(greedy_cache, tmp_path / "run", *sets)
    assert checkpoint.steps(tmp_path / "run") == [5]
    resumed = trained(greedy_cache, tmp_path / "run", *sets)
    assert (resumed.run / "metrics.jsonl").read_bytes() == (straight.run / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (torch.nn.utils, "clip_grad_norm_", "for the gradient's norm .*lower train.context"),
        (AdamW, "step", "for the optimiser's step .*use a larger device"),
    ],
)
def test_where_nothing_smaller_can_be_done_the_error_says_what_did_not_fit(
    tiny_cache, tmp_path, monkeypatch, owner, name, said
):
    def fail(*args):
        raise torch.OutOfMemoryError(MEMORY)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RoomError, match=said):
        trained(tiny_cache, tmp_path / "run", *SETS)
