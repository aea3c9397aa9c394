"""The Hugging Face engine: micro-batches of token ids in, packed rows of hidden states out.

Batches are right-padded. A causal decoder's rows never attend to the padding after them, so no attention mask is
needed, and padding rows are dropped on the device before anything is copied.

    B samples of a micro-batch   T rows of the longest   R packed rows   D hidden size   V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.calibration import Calibration
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import CHECKSUM_ROWS, layer_of
from pipeline.cache.samples import ShardPlan
from pipeline.errors import RoomError
from pipeline.target.head import TargetHead
from pipeline.target.model import run_decoder, tap_layers
from pipeline.target.on_policy import on_policy_rows, score_tokens
from pipeline.tensors import is_out_of_memory


@dataclass
class ForwardOutput:
    """The output of one forward, on its way to the host: call `wait` before reading.

    states: column -> rows [R, D], or what its codec's `encode` returns; largest: column -> the largest magnitude of
    each row [R], fp32, not finite where the row is not; counts: column -> rows of each sample; on_policy: see
    `score_tokens`; certificate_rows: encoded column -> exact first rows of the samples in `Engine.certified_samples`.
    """

    rows: range  # of the shard's samples
    states: dict[str, Tensor | tuple[Tensor, ...]]
    largest: dict[str, Tensor]
    counts: dict[str, list[int]]
    on_policy: Tensor
    certificate_rows: dict[str, Tensor]
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Block until everything is on the host."""
        if self.copied is not None:
            self.copied.synchronize()


class Engine:
    """Runs the target over micro-batches. `split`: whether memory forced any micro-batch to be halved.

    Columns in `calibrations` are encoded on the device; for the samples in `certified_samples`, numbers of the current
    shard's samples, the exact first rows are returned as well.
    """

    def __init__(self, model: PreTrainedModel, head: TargetHead, on_policy_share: float):
        self.model = model
        self.head = head
        self.on_policy_share = on_policy_share
        self.device = next(model.parameters()).device
        self.split = False
        self.calibrations: dict[str, Calibration] = {}
        self.certified_samples: frozenset[int] = frozenset()
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def forward_outputs(self, shard: ShardPlan, rows: range, columns: Sequence[ColumnSpec]) -> Iterator[ForwardOutput]:
        """Yield the states of a micro-batch, in one or, where memory is short, several forwards of equal padded length.

        Raises RoomError when one sample alone does not fit.
        """
        longest = int(shard.lengths[rows].max())
        waiting = [rows]
        while waiting:
            group = waiting.pop(0)
            try:
                output = self._forward(shard, group, longest, columns)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                output = None
                cause = str(error).strip().split("\n")[0][:160]
            if output is not None:  # outside the handler: the exception keeps the failed forward's memory alive
                yield output
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
    def _forward(self, shard: ShardPlan, rows: range, longest: int, columns: Sequence[ColumnSpec]) -> ForwardOutput:
        ids_BT = np.zeros((len(rows), longest), np.int64)
        for at, row in enumerate(rows):
            ids_BT[at, : shard.lengths[row]] = shard.ids(row)
        layers = [layer for spec in columns if (layer := layer_of(spec.name)) is not None]
        rows_of = {spec.keeps: [stored_rows(shard, row, spec.keeps) for row in rows] for spec in columns}
        runs = {keeps: _contiguous_runs(_flat_index(each, longest)) for keeps, each in rows_of.items()}
        with tap_layers(self.model, layers) as taps:
            output = run_decoder(self.model, self._to_device(ids_BT))
        last_BTD = output.last_hidden_state
        counts = {spec.name: [len(each) for each in rows_of[spec.keeps]] for spec in columns}
        states, largest, certificate_rows = {}, {}, {}
        for spec in columns:
            layer = layer_of(spec.name)
            full_BTD = last_BTD if layer is None else taps.pop(layer)
            flat_ND = full_BTD.flatten(0, 1)
            # Contiguous runs of rows are copied, not gathered by an index: on a CPU in a quarter of the time.
            rows_RD = torch.cat([flat_ND[start:stop] for start, stop in runs[spec.keeps]] or [flat_ND[:0]])
            largest[spec.name] = largest_magnitude(rows_RD)
            if spec.name in self.calibrations:
                certificate_rows[spec.name] = rows_RD[self._to_device(self._certificate_rows(rows, counts[spec.name]))]
                # A sample with such a row is refused anyway; encoded as is, every value of it would be an outlier.
                rows_RD = rows_RD.masked_fill_(~largest[spec.name].isfinite()[:, None], 0)
                rows_RD = CODECS[spec.codec].encode(rows_RD, self.calibrations[spec.name])
            states[spec.name] = rows_RD
        on_policy = self._score_on_policy(shard, rows, longest, last_BTD)
        return self._to_host(ForwardOutput(rows, states, largest, counts, on_policy, certificate_rows))

    def _certificate_rows(self, rows: range, counts: list[int]) -> np.ndarray:
        """Return which of the packed rows are the first block of a sample in `certified_samples`."""
        starts = np.cumsum([0, *counts])
        spans = [
            np.arange(start, start + min(CHECKSUM_ROWS, count))
            for row, start, count in zip(rows, starts, counts, strict=False)
            if row in self.certified_samples
        ]
        return np.concatenate(spans or [np.empty(0, np.int64)])

    def _to_device(self, values: np.ndarray) -> Tensor:
        """Copy an array to the device without waiting for its queued work."""
        tensor = torch.from_numpy(values)
        if self._copying is None:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _score_on_policy(self, shard: ShardPlan, rows: range, longest: int, last_BTD: Tensor) -> Tensor:
        """Score the on-policy rows of these samples, as `score_tokens` returns them."""
        chosen = [on_policy_rows(shard, row, self.on_policy_share) for row in rows]
        tokens = np.concatenate([shard.ids(row)[at] for row, at in zip(rows, chosen, strict=True)])
        states_RD = last_BTD.flatten(0, 1)[self._to_device(_flat_index([at - 1 for at in chosen], longest))]
        return score_tokens(self.head, states_RD, self._to_device(tokens.astype(np.int64)))

    def _to_host(self, output: ForwardOutput) -> ForwardOutput:
        """Start copying to pinned memory on a separate CUDA stream, so that the next forward need not wait."""
        if self._copying is None:
            return output
        self._copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copying):
            output.states = {
                name: tuple(map(self._pinned, value)) if isinstance(value, tuple) else self._pinned(value)
                for name, value in output.states.items()
            }
            output.certificate_rows = {name: self._pinned(tensor) for name, tensor in output.certificate_rows.items()}
            output.largest = {name: self._pinned(tensor) for name, tensor in output.largest.items()}
            output.on_policy = self._pinned(output.on_policy)
            output.copied = torch.cuda.Event()
            output.copied.record(self._copying)
        return output

    def _pinned(self, tensor: Tensor) -> Tensor:
        tensor.record_stream(self._copying)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def largest_magnitude(rows_RD: Tensor) -> Tensor:
    """Return each row's largest magnitude, float32 [R]; NaN where the row has one. On a CPU much faster than a norm."""
    return torch.maximum(rows_RD.amax(-1), -rows_RD.amin(-1)).float()


def _flat_index(rows_of_each: list[np.ndarray], longest: int) -> np.ndarray:
    """Return the rows of each sample as one index into [B * T]."""
    return np.concatenate([at * longest + rows for at, rows in enumerate(rows_of_each)])


def _contiguous_runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending rows into runs without a gap: (first, stop) each."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]
