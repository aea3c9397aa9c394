"""What a user may choose about a capture. None means: what the cache already has, else the rule stated here."""

from dataclasses import dataclass

from pipeline.errors import UsageError


@dataclass(frozen=True)
class CaptureOptions:
    """Everything of the command line but model, corpus and folder."""

    layers: str | None = None  # "1,9,17"; None: `taps` layers placed by rule
    taps: int | None = None  # None: `pipeline.capture.default_taps`
    final: str = "needed"  # rows that keep `final`: needed (beside supervised ones), all, none
    max_length: int | None = None  # tokens a sample, cut behind. None: 3072, or the target's positions if fewer
    batch_tokens: int | None = None  # padded tokens a forward; part of the cache's identity. None: 8192
    max_samples: int | None = None  # stop reading the corpus after so many usable samples
    device: str | None = None  # None: cuda where there is one
    dtype: str | None = None  # bfloat16, float32; None: float32 on a CPU, else the target's own
    revision: str | None = None  # of a hub model
    codec: str | None = None  # "int8", "aux=int8,final=zstd"; None: as it is in the cache, else raw

    def __post_init__(self):
        if self.layers is not None and self.taps is not None:
            raise UsageError(f"--layers {self.layers} and --taps {self.taps} say two things; give one")
        if self.final not in ("needed", "all", "none"):
            raise UsageError(f"--final {self.final}: wanted needed, all or none")
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: a sample is two tokens at least")

    def layer_list(self) -> list[int] | None:
        """Return the layers named, in order, or None when they are left to the rule."""
        if self.layers is None:
            return None
        try:
            return [int(part) for part in self.layers.split(",")]
        except ValueError as error:
            raise UsageError(f"--layers {self.layers}: wanted numbers with commas, such as 1,9,17") from error
