"""What every JSON file of a cache says, field by field; `make tables` prints README.md's tables from it.

Pydantic models, immutable and read strictly. What a file says beyond is kept: a later version may say more, and nothing
it wrote is taken for damage. `manifest.py` has the form of the files: canonical JSON that ends with its own hash.
"""

import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, RootModel

from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.zarr_file import DTYPES, METADATA
from pipeline.cache.layout import FORMAT, FORMATS, LOG, SAMPLES, shard_folder
from pipeline.cache.manifest import NAMED, FileFact, read_record
from pipeline.cache.samples import ShardPlan
from pipeline.errors import UPGRADE, CacheError, VersionError
from pipeline.json_files import Count, Number, Record

ROW = re.compile(r"0|[1-9][0-9]{0,8}")  # a sample of the shard, in `refused`
MAX_WIDTH = 1 << 17  # values of a row; a manifest that claims more is damaged

Files = dict[str, FileFact]  # by path from the manifest's folder


def _field(description: str, **kwargs) -> Any:
    return Field(description=description, **kwargs)


class OpenRecord(Record):
    """A part of a manifest; what it says beyond is kept."""

    model_config = ConfigDict(extra="allow", defer_build=True)


class Manifest(OpenRecord):
    """A file of its own. `format` and `hash` are written by `canonical`."""

    FILE: ClassVar[str]
    format: Literal[FORMATS] = FORMAT
    hash: str = ""

    def as_dict(self) -> dict:
        """Return the fields that were stated, as JSON values, without `format` and `hash`."""
        return self.model_dump(exclude={"format", "hash"}, exclude_unset=True)


# cache.json. Every part may be absent: earlier versions stated less.


class TargetName(OpenRecord):
    digest: str | None = _field("of its config and parts of its weights", default=None)
    name: str | None = _field("a hub name or a folder", default=None)
    quantisation: dict[str, Any] | None = _field("of a quantised one: its config's method and parameters", default=None)
    revision: str | None = _field('of the hub; "" for a folder', default=None)


class TokenizerDigests(OpenRecord):
    chat_template: str | None = _field("digest of the chat template", default=None)
    digest: str | None = _field("digest of the tokenizer's files", default=None)


class SampleRules(OpenRecord):
    mask: str | None = _field("how tokens come to be supervised", default=None)
    max_length: int | None = _field("tokens a sample is cut to; null where it was imported", default=None)
    stops: list[int] | None = _field("ids that end a reply", default=None)
    template_date: str | None = _field("the date that the chat template is given", default=None)
    template_kwargs: dict[str, Any] | None = _field("further arguments of the chat template", default=None)
    trimmed: bool | None = _field("whether all but one token after the last supervised one are left out", default=None)
    turns: str | None = _field('"last" or "each": which replies of a conversation are supervised', default=None)


class ImportFacts(OpenRecord):
    count_from: int = _field("what the files call the first layer")
    form: str = _field("whose files they were")
    last: str = _field("what their last state was: raw, normed or none")
    layers: list[int] = _field("as the files count them")
    proven: bool = _field("whether states were compared with the target")


class CaptureRules(OpenRecord):
    batch_tokens: Count | None = _field("padded tokens of a micro-batch", default=None)
    dtype: str | None = _field("of the states", default=None)
    engine: str | None = _field("what ran the target", default=None)
    engine_options: dict[str, Any] | None = _field(
        "what it was told, as far as states depend on it; absent where nothing was", default=None
    )
    imported: ImportFacts | None = _field("where the states were imported from", default=None)


class Identity(Manifest):
    """What the cache is; never edited. Its hash is the cache's identity, which others name as `cache`."""

    FILE = "cache.json"
    capture: CaptureRules = _field("how states were computed", default=CaptureRules())
    samples: SampleRules = _field("how conversations became samples", default=SampleRules())
    target: TargetName = _field("whose states these are", default=TargetName())
    tokenizer: TokenizerDigests = _field("the target's tokenizer", default=TokenizerDigests())


# The plan and what is derived from it


class SegmentManifest(Manifest):
    """One segment of the plan: the samples of one corpus."""

    FILE = "plan/N.json"
    segment: Count = _field("N")
    first_shard: Count = _field("the number of its first shard")
    shards: Count = _field("how many shards it has")
    samples: Count = _field("how many samples")
    tokens: Count = _field("rows of all samples")
    supervised: Count = _field("supervised tokens")
    final_rows: Count = _field("rows that a `final` of `keeps` needed has")
    duplicates: Count = _field("samples that were planned already, and so left out")
    row_bytes: Count = _field("bytes of a row over all columns of the first capture")
    sources: list[dict[str, Any]] = _field("files or data sets, with digests")
    notes: dict[str, Any] = _field("what was left out and why")
    files: Files = _field("`N.arrow`")


class IndexManifest(Manifest):
    """Derived from the plan; neither it nor the fields of `index.arrow` are part of the format."""

    FILE = "index.json"
    files: Files = _field("`index.arrow`")
    segments: list[Files] = _field("`files` of every segment, of which it was made")


class RefusedSample(OpenRecord):
    sample: Count = _field("its number in the cache")
    sample_id: str = _field("in hex")
    shard: Count = _field("its shard")
    row: Count = _field("its number in the shard")
    reason: str = _field("why")
    columns: list[str] = _field("which columns refuse it")
    source: str = _field("the corpus file")
    line: int = _field("from 1")


class RefusedList(Manifest):
    """Derived from the columns; absent where no sample was refused."""

    FILE = "quarantine/samples.json"
    samples: list[RefusedSample] = _field("the samples refused in any column")


# Columns


@dataclass(frozen=True)
class ColumnSpec:
    """A column's name (`aux.<layer>` or `final`), dtype, width, codec, and which rows it keeps ("all" or "needed")."""

    # To pass over a part of it could be to read other values.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, _field("`aux.<layer>` or `final`")]
    dtype: Annotated[Literal["bfloat16", "float32"], _field("of the states")]
    width: Annotated[int, _field("D", gt=0, le=MAX_WIDTH)]
    codec: Annotated[str, _field("raw, zstd, int8 or int6")] = "raw"
    keeps: Annotated[Literal["all", "needed"], _field("which rows of a sample it has")] = "all"

    @property
    def stem(self) -> str:
        """Name of the folder of its values, and of its `.arrow`. It names the codec, so that a recode can write the new
        column beside the old one, and the manifest decides which of them is valid."""
        return self.name + CODECS[self.codec].suffix

    @property
    def other_stems(self) -> list[str]:
        """The stems that the column would have in the other codecs."""
        stems = {replace(self, codec=codec).stem for codec in CODECS}
        return sorted(stems - {self.stem})

    def bounds(self, shard: ShardPlan) -> np.ndarray:
        """First row of each sample in this column, and the end: int64 [n + 1]."""
        return shard.bounds if self.keeps == "all" else shard.final_bounds

    @cached_property
    def row_bytes(self) -> int:
        """Size of an unencoded row in bytes."""
        return self.width * DTYPES[self.dtype].itemsize

    def as_dict(self) -> dict:
        return asdict(self)


class ProbeFacts(OpenRecord):
    error: Number = _field("the largest relative error against the target computing the samples again")


class GaugeFacts(OpenRecord):
    rows: Count = _field("supervised tokens looked at")
    agree: Count = _field("how many are the target's own greedy choice")
    logprob: Number = _field("the sum of their log-probabilities")


class CertificateFacts(OpenRecord):
    rows: Count | None = _field("rows compared", default=None)
    error: Number | None = _field("relative to the states' norm; others are in `error_certificate.py`", default=None)


class ColumnFacts(OpenRecord):
    certificate: CertificateFacts | None = _field("of a lossy codec: its error", default=None)
    device: str | None = _field("the kind of processor", default=None)
    engine: str | None = _field("what ran the target", default=None)
    gauge: GaugeFacts | None = _field(
        "in one column of a shard: how often the corpus has the token that the target would choose", default=None
    )
    probe: ProbeFacts | None = _field("states compared with the target before they were kept", default=None)
    torch: str | None = _field("its version", default=None)
    transformers: str | None = _field("its version", default=None)
    vllm: str | None = _field("where that ran the target: its package and version", default=None)


class ColumnManifest(Manifest):
    """One column of one shard. Written last: with it the column exists."""

    FILE = "shards/N/COLUMN.json"
    cache: str = _field("the hash of cache.json")
    shard: Count = _field("N")
    spec: ColumnSpec = _field("what the column is")
    rows: Count = _field("rows of this column")
    samples: Count = _field("samples of the shard")
    files: Files = _field("`samples.arrow`, the column's checksums and its values")
    refused: dict[str, str] = _field("samples of the shard that were refused, by number as text, and why")
    facts: ColumnFacts = _field("how it was made; no reader needs them")


class CalibrationManifest(Manifest):
    """Of a column in a lossy codec: what its values are normalised by. Every such column repeats it."""

    FILE = "calibration/COLUMN.json"
    cache: str = _field("the hash of cache.json")
    column: str = _field("COLUMN")
    rows: Count = _field("rows measured")
    mean: list[Number] = _field("of each channel, [D]")
    spread: list[Number] = _field("the standard deviation of each channel, [D]")


class TargetManifest(Manifest):
    """What training needs of the target."""

    FILE = "target/manifest.json"
    cache: str = _field("the hash of cache.json")
    files: Files = _field("all other files of the folder")


class WeightsRecord(RootModel[Files]):
    """`target/weights.json`, no manifest: the files of the target's weights."""


# capture.log


class CaptureRequest(OpenRecord):
    model: str | None = _field("as it was named", default=None)
    corpus: str | None = _field("as it was named", default=None)
    options: dict[str, Any] = _field("the command's other options", default={})


class TargetFiles(OpenRecord):
    folder: str = _field("where the target was")
    files: dict[str, list[int]] = _field("size and modification time of its files", default={})


class CaptureRecord(Manifest):
    """The last command; for speed and for people, nothing depends on it. Every part may be absent."""

    FILE = "capture.log"
    request: CaptureRequest | None = _field("the command", default=None)
    identity: Identity | None = _field("a second copy of cache.json, should that be lost", default=None)
    target: TargetFiles | None = _field("the target's files", default=None)
    corpus: dict[str, list[int]] | None = _field("size and modification time of the corpus' files", default=None)
    columns: list[ColumnSpec] | None = _field("what the command captures", default=None)


def read_log(cache: Path) -> CaptureRecord:
    """The log of a cache's last capture; one that states nothing where there is none or it cannot be read."""
    try:
        return read_record(cache / LOG, CaptureRecord)
    except (CacheError, VersionError):
        return CaptureRecord()


def column_manifest(cache: Path, shard: int, column: str) -> ColumnManifest:
    """Read the manifest of a column. CacheError when it is absent, damaged or another column's; VersionError."""
    path = f"{shard_folder(cache, shard)}/{column}.json"  # a Path takes longer to make than the file to read
    manifest = read_record(path, ColumnManifest)
    spec = manifest.spec
    if spec.codec not in CODECS:
        raise VersionError(f"{path}: codec {spec.codec[:NAMED]!r} is unknown to this version; {UPGRADE}")
    listed = {SAMPLES, f"{spec.stem}.arrow", f"{spec.stem}/{METADATA}"} <= manifest.files.keys()
    right = listed and (manifest.shard, spec.name) == (shard, column)
    if not right or not all(ROW.fullmatch(row) and int(row) < manifest.samples for row in manifest.refused):
        raise CacheError(f"{path}: the manifest of another column or shard; run `pipeline verify`")
    return manifest
