"""The rows that certify a shard's lossy columns: a few samples' first rows as computed, compared with those on disk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.error_certificate import Certificate, shadow_samples
from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.cache.samples import ShardPlan
from pipeline.cache.writer import ShardWriter
from pipeline.tensors import as_states
from stages.cache_hidden.engine_hf import Engine, ForwardOutput


class CertificateRows:
    """Holds the exact states of the first block of some `samples` in a shard's lossy columns; empty without such."""

    def __init__(self, columns: Sequence[ColumnSpec], shard: ShardPlan):
        self.columns = columns
        self.lossy = {spec.name: spec for spec in columns if CODECS[spec.codec].lossy}
        self.samples = shadow_samples(shard) if self.lossy else []
        self._states: dict[str, dict[int, Tensor]] = {name: {} for name in self.lossy}

    def encoded(self, engine: Engine, name: str, parts: Sequence[Tensor]) -> Encoded:
        """Return the rows of a column that the engine encoded, in the form that is stored."""
        return CODECS[self.lossy[name].codec].pack(parts, engine.calibrations[name], self.lossy[name].dtype)

    def add(self, output: ForwardOutput) -> None:
        """Collect the exact rows that come with one forward's output."""
        for name, states_SD in output.certificate_rows.items():
            at = 0
            for row, count in zip(output.rows, output.counts[name], strict=True):
                if row in self.samples:
                    stored = min(CHECKSUM_ROWS, count)
                    self._states[name][row] = states_SD[at : at + stored]
                    at += stored

    def certify(self, engine: Engine, writer: ShardWriter) -> dict[str, dict]:
        """Compare with what is read back from disk; return each lossy column's facts. ProofError past a bound."""
        found = {}
        for name, spec in self.lossy.items():
            head = engine.head if name == "final" else None
            certificate = Certificate(name, spec.codec, engine.calibrations[name], head)
            for row, truth_RD in self._states[name].items():
                if row not in writer.refused:
                    stored_RD = as_states(writer.read(name, row, blocks=1)).to(engine.device)
                    certificate.add(truth_RD.to(engine.device), stored_RD)
            if certificate.rows:
                rows = int(spec.bounds(writer.shard)[-1])
                with torch.no_grad():
                    found[name] = {"certificate": certificate.facts(writer.outliers(name) / rows)}
        return found
