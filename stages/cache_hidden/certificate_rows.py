"""The shadow of a shard: a few samples' first rows, kept as they were until what was written of them is proven."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.cache.codecs import LOSSY
from pipeline.cache.codecs.certificate import Certificate, shadow_samples
from pipeline.cache.codecs.int8 import as_states, pack_encoded
from pipeline.cache.codecs.int8_files import Encoded
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.cache.samples import ShardPlan
from pipeline.cache.writer import ShardWriter
from stages.cache_hidden.engine_hf import Engine, Piece


class Shadow:
    """Collects, of a shard's lossy `columns`, what the samples in `rows` were; nothing where no column is lossy."""

    def __init__(self, columns: Sequence[ColumnSpec], shard: ShardPlan):
        self.columns = columns
        self.lossy = {spec.name: spec for spec in columns if spec.codec in LOSSY}
        self.rows = shadow_samples(shard) if self.lossy else []
        self._held: dict[str, dict[int, Tensor]] = {name: {} for name in self.lossy}

    def encoded(self, engine: Engine, name: str, parts: Sequence[Tensor]) -> Encoded:
        """What the engine encoded of a column, as it is stored."""
        return pack_encoded(parts, engine.calibrations[name], self.lossy[name].dtype)

    def take(self, piece: Piece) -> None:
        """Keep what a piece holds of the shadow."""
        for name, states_SD in piece.shadow.items():
            at = 0
            for row, count in zip(piece.rows, piece.counts[name], strict=True):
                if row in self.rows:
                    kept = min(CHECKSUM_ROWS, count)
                    self._held[name][row] = states_SD[at : at + kept]
                    at += kept

    def certificates(self, engine: Engine, writer: ShardWriter) -> dict[str, dict]:
        """Compare with what is read back from disk: facts for each lossy column. Raises ProofError past a bound."""
        found = {}
        for name, spec in self.lossy.items():
            head = engine.head if name == "final" else None
            certificate = Certificate(name, spec.codec, engine.calibrations[name], head)
            for row, truth_RD in self._held[name].items():
                if row not in writer.refused:
                    stored_RD = as_states(writer.read(name, row, blocks=1)).to(engine.device)
                    certificate.add(truth_RD.to(engine.device), stored_RD)
            if certificate.rows:
                rows = int(spec.bounds(writer.shard)[-1])
                with torch.no_grad():
                    found[name] = {"certificate": certificate.facts(writer.outliers(name) / rows)}
        return found
