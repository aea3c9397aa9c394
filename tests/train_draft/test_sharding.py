"""A draft whose layers are sharded by FSDP2 takes the same step as a whole one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from draft_cases import all_blocks, assert_near, build, cell_of, every_method, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from stages.train_draft.optimizers import make_optimizer


@pytest.fixture
def one_rank():
    """A mesh of one process, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(draft, mesh):
    """Shard every layer by itself, and what is left by the draft."""
    for layer in draft.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(draft, mesh=mesh)
    register_fsdp_forward_method(draft, "loss")
    return draft


def weights_after_a_step(draft, optimizer: str, recomputes: bool = False) -> dict[str, torch.Tensor]:
    cell, draft.recomputes_layers = cell_of(20, 37, 9), recomputes
    update = make_optimizer(optimizer, draft)
    draft.zero_grad()
    loss_of(draft, cell, all_blocks(draft, cell)).total.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
    update.step(1e-2)
    named = draft.state_dict().items()
    return {name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight for name, weight in named}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@every_method
def test_a_draft_sharded_layer_by_layer_takes_the_step_of_a_whole_one(method, optimizer, one_rank):
    whole = weights_after_a_step(build(method), optimizer)
    sharded = weights_after_a_step(shard(build(method), one_rank), optimizer)
    before = build(method).state_dict()

    assert sharded.keys() == whole.keys()
    for name in whole:
        assert not torch.equal(whole[name], before[name])
        assert_near(sharded[name], whole[name])


@every_method
def test_the_layers_of_a_sharded_draft_can_be_computed_again(method, one_rank):
    kept, again = (weights_after_a_step(shard(build(method), one_rank), "adamw", which) for which in (False, True))
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def steps_on_rank(rank: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after a step of either optimiser, of a draft sharded over this process and another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        return {kind: weights_after_a_step(shard(build("domino"), mesh), kind) for kind in ("adamw", "muon")}
    finally:
        dist.destroy_process_group()


def on_the_other_rank(_: int, folder: str) -> None:
    steps_on_rank(1, folder)
    os._exit(0)  # one time in ten Python's own exit aborts on a thread of gloo that still runs


def test_two_ranks_take_the_step_of_one(tmp_path):
    other = mp.spawn(on_the_other_rank, (str(tmp_path),), nprocs=1, join=False)
    found = steps_on_rank(0, str(tmp_path))
    other.join()

    for optimizer, sharded in found.items():
        whole = weights_after_a_step(build("domino"), optimizer)
        assert sharded.keys() == whole.keys()
        for name in whole:
            assert_near(sharded[name], whole[name])
