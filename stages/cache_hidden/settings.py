"""The settings of a capture: the command's options, completed from the target's files and from the existing cache.

Imports no torch unless the device has to be looked at, so that a run with nothing to do stays quick.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.catalog import Catalog, shards_per_column
from pipeline.cache.codecs import codec_of, parse_codecs
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import FINAL, aux_column, layer_of
from pipeline.cache.locks import in_use
from pipeline.cache.records import Identity, SampleRules, TargetName
from pipeline.errors import UsageError
from pipeline.target.files import (
    find_target,
    read_json,
    read_text_config,
    stop_ids,
    target_name,
    template_arguments,
    template_digest,
    tokenizer_digest,
)
from pipeline.target.layers import check_layers, default_layers, default_taps
from pipeline.target.text_config import max_positions
from pipeline.target.weights import target_digest
from stages.cache_hidden.options import CaptureOptions
from stages.cache_hidden.shard_assignment import Worker

BATCH_TOKENS = 4096  # padded tokens a micro-batch; padding is 1 to 2.4 % in shards of 4 GiB of an 8B target
MAX_LENGTH = 3072  # tokens a sample
DTYPES = ("bfloat16", "float32")
HUB_CORPUS = "mlabonne/open-perfectblend"
HUB_SAMPLES = 20_000  # taken of it when no corpus is named
BUNDLED_CORPUS = "chats.jsonl"
MASK_RULE = "proven"  # every supervised turn by three renderings, `turn_proof.py`


@dataclass(frozen=True)
class CaptureSettings:
    """The resolved settings: the target's name and folder, the identity for cache.json, and the columns to capture."""

    model: str
    folder: Path
    identity: Identity
    columns: tuple[ColumnSpec, ...]

    @property
    def max_length(self) -> int:
        return self.identity.samples.max_length

    @property
    def engine(self) -> str:
        """The name of the engine that computes the states, a key of `engine.ENGINES`."""
        return self.identity.capture.engine

    @property
    def batch_tokens(self) -> int:
        return self.identity.capture.batch_tokens

    @property
    def dtype(self) -> str:
        return self.identity.capture.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row summed over all columns, before encoding."""
        return sum(spec.row_bytes for spec in self.columns)


def resolve_settings(model: str, catalog: Catalog, options: CaptureOptions) -> CaptureSettings:
    """Return the settings that the options, the target's files and the cache, if there is one, give together.

    An option takes precedence over the cache, the cache over the defaults. Columns that the cache has in full are
    always included, so that an appended corpus does not lose one for training. Raises UsageError for a target that is
    not there, and for layers or dtypes that it does not have.
    """
    folder = find_target(model, options.revision)
    config = read_text_config(folder)
    cached = catalog.identity if catalog.exists else Identity()
    max_length = _max_length(options.max_length, cached.samples.max_length, config)
    complete = complete_columns(catalog) if catalog.exists else []
    dtype = options.dtype or cached.capture.dtype or _default_dtype(folder, options.device)
    identity = {
        "target": _target(model, folder, cached.target),
        "tokenizer": {"digest": tokenizer_digest(folder), "chat_template": template_digest(folder)},
        "samples": {"max_length": max_length, **_sample_rules(catalog, folder, options)},
        "capture": {
            "engine": "transformers",
            "dtype": dtype,
            "batch_tokens": options.batch_tokens or cached.capture.batch_tokens or BATCH_TOKENS,
        },
    }
    requested = _requested_columns(options, config, dtype, complete, catalog)
    columns = requested + [spec for spec in complete if spec.name not in {other.name for other in requested}]
    columns.sort(key=lambda spec: (spec.name == "final", layer_of(spec.name)))
    if not (options.dtype or options.device or catalog.exists):
        _warn_of_float32(folder, dtype)
    return CaptureSettings(model, folder, Identity.model_validate(identity), tuple(columns))


def _requested_columns(
    options: CaptureOptions, config: dict, dtype: str, complete: list[ColumnSpec], catalog: Catalog
) -> list[ColumnSpec]:
    """Return the columns the options name; what they leave open is by default, or as in the cache with --append."""
    depth, width = config["num_hidden_layers"], config["hidden_size"]
    keep_columns = options.append and bool(complete)
    layers = options.layer_list() or []
    if options.append:
        layers_named = bool(layers or options.taps)
        check_no_partial_columns(
            catalog,
            layers_left_open=not layers_named,
            final_left_open=not options.final and (keep_columns or not layers_named),
        )
    if options.taps or not (layers or keep_columns):
        layers = default_layers(depth, options.taps or default_taps(depth))
    if layers:
        check_layers(layers, depth)
    codecs = parse_codecs(options.codec) if options.codec else {}
    codecs_there = existing_codecs(catalog)

    def column(name: str, keeps: str = "all") -> ColumnSpec:
        return ColumnSpec(name, dtype, width, codec_of(codecs, name) or codecs_there.get(name, "raw"), keeps)

    columns = [column(aux_column(layer)) for layer in layers]
    final = options.final or ("none" if keep_columns else "needed")
    return columns + [column("final", final)] * (final != "none")


def existing_codecs(catalog: Catalog) -> dict[str, str]:
    """Return the codec of every captured column by name, as in the first shard that has the column."""
    found: dict[str, str] = {}
    for shard in range(catalog.shards if catalog.planned else 0):
        for name, manifest in catalog.captured_columns(shard).items():
            found.setdefault(name, manifest.spec.codec)
    return found


def complete_columns(catalog: Catalog) -> list[ColumnSpec]:
    """Return the columns that every shard of the first corpus has, sorted by name; none where nothing is planned."""
    if not catalog.planned:
        return []
    shards = range(catalog.segments[0].shards)
    names = sorted(catalog.captured_columns(0))
    manifests = {name: [catalog.captured(shard, name) for shard in shards] for name in names}
    return [found[0].spec for found in manifests.values() if all(found)]


def check_no_partial_columns(catalog: Catalog, *, layers_left_open: bool, final_left_open: bool) -> None:
    """Refuse to append with the cache's columns where only some shards of its first corpus have one. UsageError.

    That column would be missing from the appended samples, and so from training. Passes while a capture is running.
    """
    if not catalog.planned:
        return
    shards = range(catalog.segments[0].shards)
    counts = shards_per_column([catalog.entries(shard) for shard in shards])
    partial = {
        name: count
        for name, count in counts.items()
        if count < len(shards) and (final_left_open if name == FINAL else layers_left_open)
    }
    if partial and not in_use(catalog.path):
        what = ", ".join(f"{name} in {count} of {len(shards)} shards" for name, count in partial.items())
        raise UsageError(
            f"{catalog.path} is incomplete, and nobody is capturing it: {what}; finish it with the command that began "
            "it, or name with --layers and --final what the added samples get"
        )


def _max_length(requested: int | None, cached: int | None, config: dict) -> int:
    """Return the tokens a sample may have: as requested, as in the cache, or the default. UsageError for too many."""
    limit, why = max_positions(config)
    if requested is None:
        return cached or min(MAX_LENGTH, limit or MAX_LENGTH)
    if limit is not None and requested > limit:
        raise UsageError(f"--max-length {requested}: this target has {limit} positions{why}; pass {limit} or less")
    return requested


def _sample_rules(catalog: Catalog, folder: Path, options: CaptureOptions) -> dict:
    """Return the identity's `samples` entry: how conversations become samples. `turns` is None until a plan decides.

    A plan of an earlier version is finished by its own rules; UsageError for --append to it.
    """
    cached = catalog.identity.samples if catalog.exists else SampleRules()
    stated = cached.model_fields_set
    if stated and "turns" not in stated and cached.mask != "imported":
        if options.append:
            raise UsageError(
                f"{catalog.path} was planned by an earlier version, before loss masks were proven turn by turn, and "
                "nothing can be added to it; pass another --out and leave out --append"
            )
        print(
            "warning: an earlier version planned this cache, before loss masks were proven turn by turn; it is "
            "finished as planned, a plan in another --out has them proven",
            file=sys.stderr,
        )
        return {key: value for key, value in cached.as_dict().items() if key != "max_length"}
    kwargs = options.template_kwargs
    if kwargs is None and "template_kwargs" in stated:
        kwargs = json.dumps(cached.template_kwargs)
    return {
        "mask": MASK_RULE,
        "trimmed": True,
        "turns": options.turns or cached.turns,
        **template_arguments(kwargs, options.template_date or cached.template_date),
        "stops": stop_ids(folder),
    }


def _target(model: str, folder: Path, cached: TargetName) -> dict:
    """Return name, revision and digest. A folder that was only moved keeps the name it has in the cache."""
    digest = target_digest(folder)
    if cached.digest == digest:
        return cached.as_dict()
    revision = folder.name if folder.parent.name == "snapshots" else ""
    return {"name": target_name(model), "revision": revision, "digest": digest}


def _default_dtype(folder: Path, device: str | None) -> str:
    """Return float32 on a CPU, else the dtype of the target's config. UsageError for one that captures cannot have."""
    if Worker().device(device) == "cpu":
        return "float32"
    native = _config_dtype(folder)
    if native not in DTYPES:
        raise UsageError(f"the target's config names the type {native}; choose one with --dtype: {' or '.join(DTYPES)}")
    return native


def _config_dtype(folder: Path) -> str | None:
    """Return the dtype that the target's config names for its weights."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config") or {}
    return next(
        (section[key] for section in (config, nested) for key in ("dtype", "torch_dtype") if section.get(key)), None
    )


def _warn_of_float32(folder: Path, dtype: str) -> None:
    """Warn where planning without a GPU fixes float32 for a half-precision target, for the whole life of the cache.

    Not for the bundled target, which a CPU is meant to capture.
    """
    native = _config_dtype(folder)
    if dtype == "float32" and native in ("bfloat16", "float16") and default_corpus(folder) == HUB_CORPUS:
        print(
            f"warning: no GPU here, so this plan fixes float32 for the cache of a {native} target, at twice the bytes; "
            "if a GPU will capture it, plan with --dtype bfloat16",
            file=sys.stderr,
        )


def default_corpus(folder: Path) -> str:
    """Return the corpus when none is named: the chats beside a bundled target, else a hub data set."""
    bundled = folder.resolve().parent / BUNDLED_CORPUS
    return str(bundled) if bundled.is_file() else HUB_CORPUS
