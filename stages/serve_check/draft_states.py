"""What the engine's draft computes against what ours computes from the same files: a wrong kernel shows here, and a
wrong export does not.

For a few prompts the engine's process records the draft's states and proposals of every call. Ours are computed in one
teacher-forced pass over the same reply, from the exported folder alone.

    T rows   K layers   D hidden size   C calls   P proposals
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache import Sample
from pipeline.drafts import Draft, lay_blocks, pack
from pipeline.errors import ProofError
from pipeline.json_files import Count, Number, Record
from pipeline.target.model import tap_layers

# Of the largest difference of a block's states, relative to their norm. Two right float32 computations differ by 1e-6,
# a wrong norm weight shows as 2 to 9 %; in bfloat16 right ones differ by up to 3 %, which hides a small fault.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NOT_FINITE = 1e9  # JSON has no NaN


class DraftStates(Record):
    """How far the engine's states are from ours, relative, at worst."""

    prompts: Count
    blocks: Count
    equal_proposals: Count = Field(description="blocks whose proposals are all ours")
    features: Number | None = Field(description="of a target layer that the draft reads; null: not recorded")
    states: Number = Field(description="of the draft's last normed states of a block")
    tolerance: Number

    @property
    def draft_equal(self) -> bool:
        return self.states <= self.tolerance

    @property
    def features_equal(self) -> bool:
        return self.features is None or self.features <= self.tolerance


@torch.no_grad()
def compare_states(
    path: Path, target: PreTrainedModel, draft: Draft, prompts: Sequence[list[int]], replies: Sequence[dict]
) -> DraftStates | None:
    """Compare the states that an engine recorded with ours; None where it recorded no block. ProofError.

    target and draft are in evaluation mode on one device.
    """
    errors, features, equal, count, recorded = [], [], 0, 0, 0
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
                if f"states.{index}" not in names or not reply["gains"]:
                    continue
                ours_CPD, proposals_CP, aux_KTD = _ours(target, draft, prompt, reply)
                states_CPD = file.get_tensor(f"states.{index}")[: len(ours_CPD)].to(ours_CPD)
                drafts_CP = file.get_tensor(f"drafts.{index}").view(-1, ours_CPD.shape[1])[: len(ours_CPD)]
                errors += _relative(states_CPD.flatten(1), ours_CPD.flatten(1))
                equal += sum(map(list.__eq__, drafts_CP.tolist(), proposals_CP))
                if f"features.{index}" in names:
                    read_TKD = file.get_tensor(f"features.{index}").unflatten(-1, (len(aux_KTD), -1))
                    features += _relative(read_TKD.transpose(0, 1).flatten(1), aux_KTD[:, : len(prompt)].flatten(1))
                recorded, count = recorded + 1, count + len(ours_CPD)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ProofError(f"{path}: the states that the engine recorded are not a draft's ({error})") from error
    if not errors:
        return None
    return DraftStates(
        prompts=recorded,
        blocks=count,
        equal_proposals=equal,
        features=max(features, default=None),
        states=max(errors),
        tolerance=TOLERANCE[target.dtype],
    )


def _ours(
    target: PreTrainedModel, draft: Draft, prompt: list[int], reply: dict
) -> tuple[Tensor, list[list[int]], Tensor]:
    """Return our states [C, P, D] and proposals [C][P] of the blocks that the reply was decoded with, and the target's
    states [K, T, D]."""
    config, device = draft.config, draft.device
    ids_T = torch.tensor([*prompt, *reply["ids"]], device=device)
    with tap_layers(target, config.target_layer_ids) as taken:
        target(input_ids=ids_T[None], use_cache=False, logits_to_keep=1)
    aux_KTD = torch.cat([taken[layer] for layer in config.target_layer_ids])
    sample = Sample(ids_T.cpu(), torch.ones(len(ids_T)).bool(), aux_KTD.cpu())
    gains = torch.tensor([0, *reply["gains"][:-1]])
    cell = pack([sample], ["reply"])
    blocks = lay_blocks(cell, len(prompt) + gains.cumsum(0), config).to(device)
    cell = cell.to(device)
    slots = slice(config.first_slot, config.first_slot + config.proposals)
    (proposals_CP,) = draft.greedy_proposals(cell, blocks, (0.0,))
    return draft.hidden(cell, blocks)[:, slots].float().cpu(), proposals_CP, aux_KTD.float().cpu()


def _relative(found_ND: Tensor, wanted_ND: Tensor) -> list[float]:
    """Return how far each row is off, relative to its norm; NOT_FINITE where it holds no numbers."""
    if found_ND.shape != wanted_ND.shape:
        raise RuntimeError(f"{list(found_ND.shape)} where {list(wanted_ND.shape)} are expected")
    off_N = (found_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)
    return off_N.nan_to_num(NOT_FINITE, NOT_FINITE).tolist()
