"""Drafts that no single device holds with their gradients and moments: sharded over the ranks by FSDP2.

Every layer is sharded by itself, and what is left by the draft. A layer's weights are whole only while it computes, and
its gradients are summed over the ranks as its backward ends. So all ranks have to make the same number of passes:
`empty_pass` is one that adds nothing. Checkpoints are those of a draft that is not sharded, and so is what an
evaluation computes with: `whole_draft`.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.drafts import DRAFTS, Blocks, Cell, Draft, DraftConfig, lay_blocks, pack
from stages.train_draft.ranks import Ranks

if TYPE_CHECKING:
    from stages.train_draft.memory import StepMemory


def shard(draft: Draft, ranks: Ranks) -> Draft:
    """Shard a draft in place over all ranks; return it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in [*getattr(draft, "layers", ()), draft]:
        fully_shard(module, mesh=mesh)
        # A sum and no mean: losses are divided by what the whole batch has. Else a factor of 1 needs NCCL.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(draft, "loss")
    return draft


def sharded_memory(memory: "StepMemory", draft: Draft, ranks: int) -> "StepMemory":
    """Return what a step takes of one of the ranks' devices: a share of the weights, gradients and moments, and the
    largest module whole, with its gradient, and another that is fetched meanwhile."""
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in getattr(draft, "layers", ())]
    largest = max([*layers, memory.parameters - sum(layers)])
    head = draft.target.embed_VD.nbytes + (0 if draft.target.tied else draft.target.head_VD.nbytes)
    kept = (memory.static - head) // ranks
    static = head + kept
    saved = memory.static - static + memory.gradients - memory.gradients // ranks - 4 * 3 * largest

    def less(peaks: Mapping[int, int]) -> dict[int, int]:
        return {blocks: peak - max(0, saved) for blocks, peak in peaks.items()}

    again = memory.recompute and (lambda: less(memory.recomputed_peaks))
    # the moments of sharded weights stay on the device
    return replace(memory, static=static, moments=0, peaks=less(memory.peaks), recompute=again)


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather sharded tensors, one after the other, to the host's memory of the rank that keeps them; the others return
    none. Every rank has to call it."""
    kept = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            whole = whole_tensor(tensor)
            if keep:
                kept[name] = whole.cpu()
    return kept


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole on every rank, any other as it is. Every rank has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_draft(draft: Draft) -> Draft:
    """Return a copy of a sharded draft that is whole on every rank, without gradients; any other as it is."""
    states = draft.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in states.values()):
        return draft
    with draft.device, torch.no_grad():
        copy = DRAFTS[draft.config.method](draft.config, draft.target).requires_grad_(False)
        copy.chunk_rule = draft.chunk_rule
        for name, tensor in copy.state_dict().items():
            tensor.copy_(whole_tensor(states[name]))
    return copy


def empty_pass(config: DraftConfig, device: torch.device) -> tuple[Cell, Blocks]:
    """Return two rows and a block that scores nothing: their loss, gradients and metrics are exactly 0."""
    rows = 2
    sample = SimpleNamespace(
        ids=torch.zeros(rows, dtype=torch.long),
        mask=torch.ones(rows, dtype=torch.bool),
        aux=torch.zeros(len(config.target_layer_ids), rows, config.hidden_size),
        final=torch.zeros(rows, config.hidden_size),
        final_rows=torch.arange(rows),
    )
    cell = pack([sample], ["nothing"], final=config.needs_final_states)
    blocks = lay_blocks(cell, torch.zeros(1, dtype=torch.long), config)
    nothing = {"scored_NS": torch.zeros_like(blocks.scored_NS), "weights_NS": torch.zeros_like(blocks.weights_NS)}
    return cell.to(device), replace(blocks, **nothing).to(device)
