"""A cell's states that are still to be put together, or decoded.

K layers   R rows of a cell   D hidden size   r rows of a piece
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.cache.codecs.lossy import Encoded, EncodedOnDevice


@dataclass(frozen=True)
class StatesInPieces:
    """States [K, R, D] that are still to be put together, or decoded: on the device, so that the host has no work.

    pieces: (index of the layer, first row, rows), the rows encoded, which are fewer bytes to copy, or a tensor [r, D].
    """

    shape: tuple[int, int, int]
    final: bool
    pieces: list[tuple[int, int, Encoded | EncodedOnDevice | Tensor]]

    def copied(self, device: torch.device) -> "StatesInPieces":
        """Return the same with its pieces on a device, not decoded yet."""
        return replace(self, pieces=[(k, first, rows.to(device, non_blocking=True)) for k, first, rows in self.pieces])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Tensor:
        """Return the states as a cell has them, decoded on a device."""
        kind = self.pieces[0][2].dtype
        dtype = kind if isinstance(kind, torch.dtype) else getattr(torch, kind)
        states_KRD = torch.empty(self.shape, dtype=dtype, device=device)
        for k, first, rows in self.pieces:
            out_rD = states_KRD[k, first : first + len(rows)]
            if isinstance(rows, Tensor):
                out_rD.copy_(rows, non_blocking=non_blocking)
            else:
                rows.to(device).decode(out_rD)
        return states_KRD[0] if self.final else states_KRD
