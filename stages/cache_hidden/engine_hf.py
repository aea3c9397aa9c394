"""The Hugging Face engine: micro-batches of token ids in, packed rows of hidden states out.

Batches are right-padded. A causal decoder's real rows never see what stands behind them, so no attention mask is
needed, and the rows of padding are dropped on the device before anything is copied.

    B samples of a micro-batch   T rows of the longest   R packed rows   D hidden size   V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.codecs.calibration import Calibration
from pipeline.cache.codecs.int8 import encode
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import CHECKSUM_ROWS, layer_of
from pipeline.cache.samples import ShardPlan
from pipeline.errors import RoomError
from pipeline.target.head import TargetHead
from pipeline.target.model import run_decoder, tap_layers
from pipeline.target.on_policy import gauge_rows, measure
from pipeline.tensors import out_of_memory


@dataclass
class Piece:
    """What one forward gave, on its way to the host: `wait` before reading.

    states: column -> rows [R, D], or what `int8.encode` makes of them; worst: column -> the largest magnitude of each
    row [R], fp32, not finite where the row is not; counts: column -> rows of each sample; gauge: agreement and
    log-probability of each gauge row; shadow: encoded column -> the first rows of the samples in `Engine.shadow`.
    """

    rows: range  # of the shard's samples
    states: dict[str, Tensor | tuple[Tensor, ...]]
    worst: dict[str, Tensor]
    counts: dict[str, list[int]]
    gauge: Tensor
    shadow: dict[str, Tensor]
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when everything is on the host."""
        if self.copied is not None:
            self.copied.synchronize()


class Engine:
    """Runs the target over micro-batches. `split` says whether memory ever forced a smaller group.

    Columns in `calibrations` are encoded on the device; of the samples in `shadow`, rows of the shard in hand, what
    they were is kept beside.
    """

    def __init__(self, model: PreTrainedModel, head: TargetHead, gauge_share: float):
        self.model = model
        self.head = head
        self.gauge_share = gauge_share
        self.device = next(model.parameters()).device
        self.split = False
        self.calibrations: dict[str, Calibration] = {}
        self.shadow: frozenset[int] = frozenset()
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def pieces(self, shard: ShardPlan, rows: range, columns: Sequence[ColumnSpec]) -> Iterator[Piece]:
        """Yield the states of a micro-batch, whole or, where memory is short, in pieces at the same padded length.

        Raises RoomError when one sample alone does not fit.
        """
        longest = int(shard.lengths[rows].max())
        waiting = [rows]
        while waiting:
            group = waiting.pop(0)
            try:
                piece = self._forward(shard, group, longest, columns)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                piece = None
                cause = str(error).strip().split("\n")[0][:160]
            if piece is not None:  # out of the handler: the failed forward's memory hangs on its exception
                yield piece
                continue
            if len(group) == 1:
                raise RoomError(
                    f"{self.device} has no memory for one sample of {longest} tokens ({cause}); "
                    "lower --max-length, or use a larger device"
                )
            self.split = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            half = group.start + len(group) // 2
            waiting[:0] = [range(group.start, half), range(half, group.stop)]

    @torch.no_grad()
    def _forward(self, shard: ShardPlan, rows: range, longest: int, columns: Sequence[ColumnSpec]) -> Piece:
        ids_BT = np.zeros((len(rows), longest), np.int64)
        for at, row in enumerate(rows):
            ids_BT[at, : shard.lengths[row]] = shard.ids(row)
        layers = [layer for spec in columns if (layer := layer_of(spec.name)) is not None]
        kept = {spec.keeps: [stored_rows(shard, row, spec.keeps) for row in rows] for spec in columns}
        packed = {keeps: _runs(_flat(each, longest)) for keeps, each in kept.items()}
        with tap_layers(self.model, layers) as taken:
            output = run_decoder(self.model, self._send(ids_BT))
        last_BTD = output.last_hidden_state
        counts = {spec.name: [len(each) for each in kept[spec.keeps]] for spec in columns}
        states, worst, shadow = {}, {}, {}
        for spec in columns:
            layer = layer_of(spec.name)
            full_BTD = last_BTD if layer is None else taken.pop(layer)
            flat_ND = full_BTD.flatten(0, 1)
            # Runs of rows are copied, not gathered by an index: on a CPU a quarter of the time.
            rows_RD = torch.cat([flat_ND[start:stop] for start, stop in packed[spec.keeps]] or [flat_ND[:0]])
            worst[spec.name] = largest(rows_RD)
            if spec.name in self.calibrations:
                shadow[spec.name] = rows_RD[self._send(self._shadowed(rows, counts[spec.name]))]
                # A sample with such a row is refused; as it is, every value of the row would escape.
                rows_RD = rows_RD.masked_fill_(~worst[spec.name].isfinite()[:, None], 0)
                rows_RD = encode(rows_RD, self.calibrations[spec.name])
            states[spec.name] = rows_RD
        gauge = self._gauge(shard, rows, longest, last_BTD)
        return self._to_host(Piece(rows, states, worst, counts, gauge, shadow))

    def _shadowed(self, rows: range, counts: list[int]) -> np.ndarray:
        """Which of the packed rows are the first of the samples in the shadow."""
        starts = np.cumsum([0, *counts])
        spans = [
            np.arange(start, start + min(CHECKSUM_ROWS, count))
            for row, start, count in zip(rows, starts, counts, strict=False)
            if row in self.shadow
        ]
        return np.concatenate(spans or [np.empty(0, np.int64)])

    def _send(self, values: np.ndarray) -> Tensor:
        """Numbers on the device, without waiting for what it is busy with."""
        tensor = torch.from_numpy(values)
        if self._copying is None:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _gauge(self, shard: ShardPlan, rows: range, longest: int, last_BTD: Tensor) -> Tensor:
        """Measure the gauge rows of these samples: [2, rows], agreement and log-probability of the data's token."""
        chosen = [gauge_rows(shard, row, self.gauge_share) for row in rows]
        tokens = np.concatenate([shard.ids(row)[at] for row, at in zip(rows, chosen, strict=True)])
        states_RD = last_BTD.flatten(0, 1)[self._send(_flat([at - 1 for at in chosen], longest))]
        return measure(self.head, states_RD, self._send(tokens.astype(np.int64)))

    def _to_host(self, piece: Piece) -> Piece:
        """Start copying a piece to pinned memory on a stream of its own, so that the next forward need not wait."""
        if self._copying is None:
            return piece
        self._copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copying):
            piece.states = {
                name: tuple(map(self._pinned, held)) if isinstance(held, tuple) else self._pinned(held)
                for name, held in piece.states.items()
            }
            piece.shadow = {name: self._pinned(tensor) for name, tensor in piece.shadow.items()}
            piece.worst = {name: self._pinned(tensor) for name, tensor in piece.worst.items()}
            piece.gauge = self._pinned(piece.gauge)
            piece.copied = torch.cuda.Event()
            piece.copied.record(self._copying)
        return piece

    def _pinned(self, tensor: Tensor) -> Tensor:
        tensor.record_stream(self._copying)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def largest(rows_RD: Tensor) -> Tensor:
    """Each row's largest magnitude, float32 [R]; NaN where the row has one. On a CPU far quicker than a norm."""
    return torch.maximum(rows_RD.amax(-1), -rows_RD.amin(-1)).float()


def _flat(rows_of_each: list[np.ndarray], longest: int) -> np.ndarray:
    """Rows of each sample as one index into [B * T]."""
    return np.concatenate([at * longest + rows for at, rows in enumerate(rows_of_each)])


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending rows into runs without a gap: (first, stop) each."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]
