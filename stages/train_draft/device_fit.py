"""What of a run depends on its devices: what fits, whether ranks divide the draft, and which kernels are used."""

from dataclasses import astuple, replace

import torch

from pipeline.cache import HiddenCache
from pipeline.drafts import Draft
from pipeline.drafts.fused import compiles
from pipeline.errors import UsageError
from pipeline.runs.recipe import Resolved
from pipeline.runs.training_data import training_config
from pipeline.tensors import device_bytes
from pipeline.visible_text import print_visible
from stages.train_draft.kernels import kernels_of, machine_facts
from stages.train_draft.memory import Fit, memory_lines, step_memory
from stages.train_draft.ranks import Ranks
from stages.train_draft.sharding import sharded_memory


def run_facts(ranks: Ranks) -> dict[str, str]:
    """Return what a run's exact bits depend on besides versions: what `machine_facts` says of the device, and the
    ranks, which divide the draft or do not."""
    return machine_facts(ranks.device) | {"ranks": f"{ranks.size}, sharded" if ranks.sharded else str(ranks.size)}


def shards(asked: bool | None, ranks: Ranks, store: HiddenCache, resolved: Resolved) -> bool:
    """Return whether to divide the draft among the ranks: as asked, else where some rank's device does not hold all of
    the weights, gradients and moments. Raises UsageError where it is asked of one rank."""
    if asked and ranks.size == 1:
        raise UsageError("--shard divides a draft among several ranks, and there is one; start them with torchrun")
    if ranks.size == 1 or asked is not None:
        return bool(asked)
    lacking, memory = False, device_bytes(ranks.device)
    if memory is not None:
        train, tied = resolved.recipe.train, bool(training_config(store.target_config).get("tie_word_embeddings"))
        compiled = kernels_of(ranks.device) == "compiled"
        fit = step_memory(resolved.draft, train, getattr(torch, train.dtype), tied, compiled).fit(memory)
        lacking = fit.moments_on_host or not fit.at_once
    return ranks.any(lacking)


def fit_device(resolved: Resolved, draft: Draft, ranks: Ranks, taken: int = 0, shared_head: bool = False) -> Fit | None:
    """Return what of a step every rank's device has memory for, where other runs have `taken` bytes of it, and print
    it; None on CPUs. shared_head: whether other runs use the same head, which then stays where it is."""
    memory, train = device_bytes(draft.device), resolved.recipe.train
    if memory is None:
        return None
    head, memory = draft.target, memory - taken
    step = step_memory(resolved.draft, train, head.head_VD.dtype, head.tied, compiles(draft.device))
    step = replace(step, embedding=0) if shared_head else step
    if ranks.sharded:
        print_visible(f"sharded over {ranks.size} ranks (FSDP2); what each then needs is an estimate:")
        step = sharded_memory(step, draft, ranks.size)
    for line in memory_lines(step, train.context, memory):
        print_visible(line)
    fit = step.fit(memory)
    return fit.over([Fit(*values) for values in ranks.gather(list(astuple(fit)))])
