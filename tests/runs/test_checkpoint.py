"""Checkpoints: whole or not there, exact, checked, pruned only after the next one is safe."""

import errno
import json
import os

import pytest
import torch

from pipeline.drafts import DRAFTS, draft_config, init_weights
from pipeline.errors import CacheError, RoomError, UsageError
from pipeline.runs import checkpoint
from pipeline.target.head import TargetHead

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "num_target_layers": 6,
    "target_layer_ids": (1, 3),
    "block_size": 4,
    "mask_token_id": 39,
}
OWN = {
    "dflash": {"shift_label": False},
    "domino": {"shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8},
    "dspark": {"shift_label": True, "markov_rank": 4, "markov_head_type": "gated"},
}


def head() -> TargetHead:
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    return TargetHead(weight, weight)


def fresh(method: str = "domino", seed: int = 0):
    draft = DRAFTS[method](draft_config(method=method, **SIZES, **OWN[method]), head())
    init_weights(draft, seed)
    return draft


def moments(draft) -> dict:
    return {f"exp_avg.{name}": torch.full_like(weight, 0.5) for name, weight in draft.named_parameters()}


def save(run, step, draft=None, keep=2):
    draft = draft or fresh()
    return checkpoint.save(run, step, draft, moments(draft), {"metrics": "9"}, keep)


@pytest.mark.parametrize("method", DRAFTS)
def test_a_draft_comes_back_to_the_bit_from_run_or_checkpoint(tmp_path, method):
    draft = fresh(method, seed=3)
    path = save(tmp_path, 7, draft)

    for place in (tmp_path, path):
        again = checkpoint.load_draft(place, head())
        assert again.config == draft.config
        assert not again.training
        for name, weight in draft.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name


def test_the_newest_checkpoint_is_found_with_its_state(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 5)
    save(tmp_path, 12)

    found = checkpoint.latest(tmp_path)

    assert (found.step, found.state.metrics, found.path.name) == (12, "9", "step-00000012")


def test_older_checkpoints_go_only_once_the_new_one_is_there(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [2, 3]

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "rename", no_room)
    with pytest.raises(RoomError, match="No space left"):
        save(tmp_path, 4)

    assert checkpoint.steps(tmp_path) == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / "tmp-step-00000004"
    left.mkdir(parents=True)
    (left / "draft.safetensors").write_bytes(b"half")

    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 4)

    assert checkpoint.steps(tmp_path) == [4] and not left.exists()
    checkpoint.latest(tmp_path)


def test_saving_a_step_twice_changes_nothing(tmp_path):
    save(tmp_path, 4, fresh(seed=0))
    before = (tmp_path / "checkpoints/step-00000004/draft.safetensors").read_bytes()

    save(tmp_path, 4, fresh(seed=1))

    assert (tmp_path / "checkpoints/step-00000004/draft.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["draft.safetensors", "optimizer.safetensors", "config.json", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_refused_by_name_with_a_remedy(tmp_path, name, damage):
    save(tmp_path, 4)
    file = tmp_path / "checkpoints/step-00000004" / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[0 if name == "state.json" else -9] ^= 1
        file.write_bytes(data)

    with pytest.raises(CacheError, match=r"step-00000004.*remove .* checkpoint before"):
        checkpoint.latest(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run with a checkpoint"):
        checkpoint.load_draft(tmp_path / "nowhere", head())


def test_only_safetensors_and_json_are_written(tmp_path):
    path = save(tmp_path, 4)

    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "draft.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert draft_config(**json.loads((path / "config.json").read_text())) == fresh().config


def test_a_folder_nobody_may_write_is_a_matter_of_room(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RoomError, match="Permission denied"):
            save(tmp_path, 4)
    finally:
        tmp_path.chmod(0o700)
