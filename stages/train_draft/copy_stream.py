"""Cells on their way to a GPU: copied on a stream of their own, while the GPU computes the cell before.

What a copy reads and writes may be used again only behind it, and three waits see to that, none of them the host's.

- The copies of a cell wait for all that was asked of the GPU before: their memory was freed by cells that may still be
  computed with.
- Who uses a cell waits for the event behind its copies.
- The loader's thread, before it reads a further cell into the same pinned memory, waits for that event, too.

Lossy states are copied encoded, which are fewer bytes, and decoded when their cell is used. In the GPU's memory are two
cells, the one in use and the next.
"""

from dataclasses import dataclass, replace

import torch

from pipeline.drafts import Cell
from pipeline.tensors import out_of_memory
from stages.train_draft.states import StatesInPieces


@dataclass(frozen=True)
class CopiedCell:
    """A cell whose copies to a GPU were begun; its states may still be encoded. copied: the event behind them."""

    cell: Cell
    copied: torch.cuda.Event

    def to(self, device: torch.device) -> Cell:
        """Return the cell for what is asked of the device from now on, which waits for the copies."""
        torch.cuda.current_stream(device).wait_event(self.copied)
        return self.cell.to(device)


class CopyStream:
    """Copies cells to a GPU on a stream of its own. lacked_memory: whether there once was no memory for a second cell;
    then no further one is copied ahead."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.lacked_memory = device, torch.cuda.Stream(device), False

    def copy(self, cell: Cell) -> CopiedCell | None:
        """Begin to copy a cell, whose states are in pinned memory; None where the device has no memory for it."""
        if self.lacked_memory:
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                encoded = {
                    name: states.copied(self.device)
                    for name, states in (("aux_KRD", cell.aux_KRD), ("final_FD", cell.final_FD))
                    if isinstance(states, StatesInPieces)
                }
                moved = replace(replace(cell, **dict.fromkeys(encoded)).to(self.device), **encoded)
        except RuntimeError as error:
            out_of_memory(error)  # raises any other
            self.lacked_memory = True
            return None
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return CopiedCell(moved, copied)
