"""Teacher-forced figures of cached samples: a loss over every eligible anchor, whoever wrote the replies; no target
runs."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from pipeline.drafts import Draft, eligible_anchors, lay_blocks, pack
from pipeline.evaluation.accept_length import SLOTS_AT_ONCE

if TYPE_CHECKING:
    from pipeline.cache import HiddenCache


@torch.no_grad()
def add_metric_sums(sums: dict, draft: Draft, cache: "HiddenCache", indices: Iterable[int]) -> None:
    """Add what `metrics_of` takes, of a loss over every eligible anchor of samples, to `sums`."""
    final, device = draft.config.needs_final_states, draft.device
    for index in map(int, indices):
        sample = cache.read(index, layers=draft.config.target_layer_ids, final=final)
        cell = pack([sample], [cache.samples.hex(index)], final=final)
        anchors_N = eligible_anchors(sample.mask).nonzero()[:, 0]
        for part_N in anchors_N.split(max(1, SLOTS_AT_ONCE // draft.config.block_size)) if len(anchors_N) else ():
            blocks = lay_blocks(cell, part_N, draft.config).to(device)
            loss = draft.loss(cell.to(device), blocks, {}, draft.denominators(blocks), metrics=True)
            for name, value in loss.sums.items():
                sums[name] = sums.get(name, 0) + value
