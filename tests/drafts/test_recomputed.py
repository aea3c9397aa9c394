"""Layers that a gradient computes again, and embeddings on the host: the same loss and gradients to the bit."""

from types import SimpleNamespace

import pytest
import torch
from draft_cases import all_blocks, build, cell_of, every_method, loss_of

from stages.train_draft.step import Trainer


def loss_and_gradients(draft, dtype: str) -> list[torch.Tensor]:
    cell = cell_of(20, 37, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = loss_of(draft, cell, all_blocks(draft, cell)).total
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in draft.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_method
def test_layers_that_are_computed_again_give_the_same_loss_and_gradients_to_the_bit(method, dtype):
    kept, draft, calls = loss_and_gradients(build(method), dtype), build(method), []
    draft.recomputes_layers = True
    draft.layers[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    again = loss_and_gradients(draft, dtype)
    assert len(calls) == 2 and len(kept) == len(again) > 10
    assert all(map(torch.equal, kept, again))


@every_method
def test_an_embedding_on_the_host_gives_the_same_loss_and_gradients_to_the_bit(method):
    found = []
    for on_host in (False, True):
        draft, cell = build(method), cell_of(20, 37, 9)
        draft.target = draft.target.with_embedding_on_host() if on_host else draft.target
        assert (draft.target.on_host is not None) == on_host
        train = SimpleNamespace(dtype="float32")
        trainer = Trainer(draft, None, SimpleNamespace(sampler=SimpleNamespace(train=train)))
        trainer.blocks_per_pass = 4
        loss = trainer.add_gradients([cell], [all_blocks(draft, cell)], draft.schedule(1, 2), metrics=True)
        found.append([loss.total, *(weight.grad for weight in draft.parameters() if weight.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10 and all(map(torch.equal, *found))


def test_an_embedding_on_the_host_has_the_rows_of_the_named_ids_and_waits_for_any_others():
    target = build("dflash").target
    on_host, ids = target.with_embedding_on_host(), torch.tensor([[3, 5], [3, 9]])
    assert torch.equal(on_host.embed(ids), target.embed(ids)) and on_host.equals(target)
    with on_host.embedding([ids, torch.tensor([4])]):
        assert torch.equal(on_host.embed(ids), target.embed(ids))
        assert torch.equal(on_host.embed(torch.tensor([4])), target.embed(torch.tensor([4])))
        with pytest.raises(IndexError):
            on_host.embed(torch.tensor([6]))
    assert torch.equal(on_host.embed(torch.tensor([6])), target.embed(torch.tensor([6])))
