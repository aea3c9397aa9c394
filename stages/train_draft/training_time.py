"""How long a training will take on a CPU, said before its first step: with a large vocabulary and the defaults of a
GPU, that one step may take an hour.

A few blocks of the next batch are computed and their gradient dropped; what a step takes follows from the time that a
block more takes, and from the number of blocks. Muon's own work is added. Where even a slow core would be done soon,
nothing is measured.
"""

import time

import torch

from pipeline.drafts import Draft
from pipeline.tensors import out_of_memory
from stages.train_draft.batches import Batch, forward_cost
from stages.train_draft.optimizers import AdamW, Muon, orthogonalize
from stages.train_draft.step import Trainer

FEW, MORE = 1, 17  # blocks: with more than one, and enough for the chunk of the head's logits to be a usual one
SAID_FROM = 600.0  # seconds of what is left of a run
SLOW_STEP = 20.0  # seconds
LARGE = 1 << 16  # ids
SLOW_CORE = 2e10  # floating-point operations a second


def time_to_tell(trainer: Trainer, batch: Batch, steps: int) -> str | None:
    """Return what a user should know before so many steps, None where they do not take long.

    None, too, where memory lacks for it: the step itself then computes fewer blocks at once.
    """
    operations = 6 * sum(
        forward_cost(trainer.draft.config, sum(blocks.lengths), (blocks.anchors_N - blocks.starts_N).numpy())
        for blocks in batch.blocks
    )
    if not worth_saying(operations / SLOW_CORE, steps):
        return None
    try:
        seconds = step_seconds(trainer, batch)
    except RuntimeError as error:
        out_of_memory(error)  # raises any other
        return None
    return estimate_text(trainer.draft, batch, steps, seconds) if worth_saying(seconds, steps) else None


def step_seconds(trainer: Trainer, batch: Batch) -> float:
    """Return about how long one step takes, in seconds; nothing of the training changes."""
    biggest = max(range(len(batch.cells)), key=lambda number: len(batch.blocks[number].anchors_N))
    cell, blocks = trainer.loader.read(batch, biggest), batch.blocks[biggest]

    def seconds(count: int) -> tuple[float, int]:
        part = blocks.split(count)[0]
        began = time.perf_counter()
        trainer.add_gradients([cell], [part], trainer.draft.schedule(batch.step, trainer.train.steps), metrics=False)
        return time.perf_counter() - began, len(part.anchors_N)

    try:
        seconds(FEW)  # memory is made, and code loaded
        few, more = seconds(FEW), seconds(MORE)
    finally:
        trainer.draft.zero_grad()
    a_block = max(0.0, more[0] - few[0]) / max(1, more[1] - few[1])
    count = sum(len(of_cell.anchors_N) for of_cell in batch.blocks)
    of_cells = len(batch.cells) * few[0] + max(0, count - len(batch.cells)) * a_block
    return of_cells + muon_seconds(trainer.optimizer)


def muon_seconds(optimizer: AdamW) -> float:
    """Return how long Muon takes for its matrices, which in a step of few slots is the most; nothing is changed."""
    began = time.perf_counter()
    for matrix in optimizer.matrices.values() if isinstance(optimizer, Muon) else ():
        orthogonalize(matrix.detach())
    return time.perf_counter() - began


def estimate_text(draft: Draft, batch: Batch, steps: int, seconds: float) -> str:
    """Return in words how long a step and all that are left take, and which settings shorten it."""
    reducible = draft.reduces_vocabulary and draft.config.proposable == draft.config.vocab_size > LARGE
    vocabulary = ", and so does a draft vocabulary, such as draft.vocabulary = 32768" if reducible else ""
    slots = sum(len(blocks.anchors_N) for blocks in batch.blocks) * draft.config.block_size
    return (
        f"a step takes about {duration(seconds)} here ({slots:,} slots over {draft.config.proposable:,} ids, "
        f"{draft.config.num_hidden_layers} layers, {torch.get_num_threads()} threads), {steps:,} steps about "
        f"{duration(seconds * steps)}; fewer train.anchors, train.batch, train.epochs or draft.num_hidden_layers take "
        f"less{vocabulary}"
    )


def duration(seconds: float) -> str:
    """Return seconds as text, such as 0.2 s, 148 s, 25 min, 5.4 hours, 10.4 days."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86_400:.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def worth_saying(seconds: float, steps: int) -> bool:
    """Return whether a step or the run is so long that its user should know before waiting."""
    return seconds >= SLOW_STEP or seconds * steps >= SAID_FROM
