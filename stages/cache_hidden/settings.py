"""The options of a capture, and its settings: those options completed from the target's files and the existing cache.

An option that is None is as in the existing cache, else the default stated beside it.

Imports no torch unless the device has to be looked at, so that a run with nothing to do stays quick.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.atomic import in_use
from pipeline.cache.catalog import Catalog, shards_per_column
from pipeline.cache.codecs import codec_of, parse_codecs
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import FINAL, aux_column, layer_of
from pipeline.cache.schema import Identity, SampleRules
from pipeline.errors import UsageError
from pipeline.options import size_bytes
from pipeline.target.files import (
    find_target,
    max_positions,
    quantisation,
    read_json,
    read_text_config,
    stop_ids,
    template_arguments,
    template_digest,
    tokenizer_digest,
)
from pipeline.target.layers import check_layers, default_layers, default_taps
from pipeline.target.weights import named_target
from stages.cache_hidden.engine_options import IN_PROCESSES, ChosenEngine, choose_engine, parse_options, shares_itself
from stages.cache_hidden.shard_assignment import Worker

BATCH_TOKENS = 4096  # padded tokens a micro-batch; padding is 1 to 2.4 % in shards of 4 GiB of an 8B target
MAX_LENGTH = 3072  # tokens a sample
DTYPES = ("bfloat16", "float32")
HUB_CORPUS = "mlabonne/open-perfectblend"
HUB_SAMPLES = 20_000  # taken of it when no corpus is named
BUNDLED_CORPUS = "chats.jsonl"
MASK_RULE = "proven"  # every supervised turn by three renderings, `turn_proof.py`
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


@dataclass(frozen=True)
class CaptureOptions:
    """All options of the command line but model, corpus and output folder."""

    layers: str | None = None  # "1,9,17"; None: `taps` evenly spaced layers, with `append` those of the cache
    taps: int | None = None  # None: `pipeline.target.layers.default_taps`
    final: str | None = None  # rows stored: needed (beside supervised), all, none. None: needed, or as in the cache
    max_length: int | None = None  # tokens a sample, truncated at the end. None: 3072, or the target's maximum if less
    batch_tokens: int | None = None  # padded tokens a forward; part of the cache's identity. None: 4096
    max_samples: int | None = None  # stop reading the corpus after so many usable samples
    device: str | None = None  # None: cuda where there is one
    dtype: str | None = None  # bfloat16, float32; None: float32 on a CPU, else the target's own
    revision: str | None = None  # of a hub model
    budget: str | None = None  # bytes of the whole cache, "2TB"; see budget.py. None: all samples, or the plan's own
    methods: str | None = None  # "dflash,domino": whose drafts will be trained, for the budget. None: all
    seed: int = 0  # which samples a budget takes
    turns: str | None = None  # "last": one sample a conversation; "each": all turns. None: as the cache, else by rule
    template_kwargs: str | None = None  # arguments of the chat template, a JSON object. None: as the cache, else none
    template_date: str | None = None  # today's date for the template, "2024-07-26". None: as the cache, else that
    codec: str | None = None  # "int8", "aux=int8,final=zstd"; None: as it is in the cache, else raw
    roles: str | None = None  # "bard=assistant,narrator=user": who speaks, beside those in `messages.ROLES`
    append: bool = False  # add the corpus to those the cache has
    worker: str | None = None  # "I/N"; None: the variables of torchrun or SLURM, else the only one
    tensor_parallel: int = 1  # ranks of torchrun that are one worker and share the target
    device_map: str | None = None  # spreads the target's layers: "auto", or a JSON object of devices by module
    engine: str | None = None  # what runs the target, see engine_options.py. None: as in the cache, else transformers
    python: Path | None = None  # of the engine's process. None: that of `make engines`, else this one
    engine_options: str | None = None  # what it is told, KEY=VALUE a line. None: as in the cache, else nothing

    def __post_init__(self):
        if self.layers is not None and self.taps is not None:
            raise UsageError(f"--layers {self.layers} and --taps {self.taps} say two things; give one")
        if self.final not in (None, "needed", "all", "none"):
            raise UsageError(f"--final {self.final}: wanted needed, all or none")
        if self.turns not in (None, "last", "each"):
            raise UsageError(f"--turns {self.turns}: wanted last or each")
        if self.budget is not None:
            size_bytes(self.budget)
        elif self.methods is not None or self.seed:
            raise UsageError("--methods and --seed say what a budget may leave out; give --budget too")
        if self.max_samples is not None and self.max_samples > sys.maxsize:
            raise UsageError(f"--max-samples {self.max_samples}: no corpus has as many; leave it out for all of them")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: wanted 0 or more, and less than 2^64")
        if self.device is not None and not DEVICE.fullmatch(self.device):
            raise UsageError(f"--device {self.device}: wanted cpu, cuda, or one of several such as cuda:1")
        if self.device_map is not None and (self.device or self.tensor_parallel > 1):
            other = "--device" if self.device else "--tensor-parallel"
            raise UsageError(f"--device-map and {other} both say where the target goes; give one")
        if self.tensor_parallel > 1 and ":" in (self.device or ""):
            raise UsageError(f"--device {self.device}: each of {self.tensor_parallel} ranks takes a GPU; leave it out")
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: a sample is two tokens at least")
        if self.tensor_parallel > 1 and self.engine in IN_PROCESSES:
            raise UsageError(shares_itself(self.engine, self.tensor_parallel))
        parse_options(self.engine_options)

    def layer_list(self) -> list[int] | None:
        """Return the layers named, in order, or None for the default layers. UsageError for anything but numbers."""
        if self.layers is None:
            return None
        try:
            return [int(part) for part in self.layers.split(",")]
        except ValueError as error:
            raise UsageError(f"--layers {self.layers}: wanted numbers with commas, such as 1,9,17") from error

    def checked_device_map(self, environment: Mapping[str, str]) -> str | dict | None:
        """Return the device map. UsageError where it is none, and where several processes here would each have it."""
        if self.device_map is None:
            return None
        from pipeline.target.several_devices import parse_device_map  # brings torch and transformers

        beside = environment.get("LOCAL_WORLD_SIZE", "1")
        if beside != "1":
            raise UsageError(
                f"--device-map gives one process all devices, and torchrun started {beside} here; start it without "
                f"torchrun, or share the target among them with --tensor-parallel {beside}"
            )
        return parse_device_map(self.device_map)


@dataclass(frozen=True)
class CaptureSettings:
    """The resolved settings: the target's name and folder, the identity for cache.json, and the columns to capture."""

    model: str
    folder: Path
    identity: Identity
    columns: tuple[ColumnSpec, ...]
    engine: ChosenEngine = field(default_factory=ChosenEngine)

    @property
    def max_length(self) -> int:
        return self.identity.samples.max_length

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

    @property
    def head_bytes(self) -> int:
        """Bytes of the target's embedding and LM head, which go into the cache."""
        config, whole = read_text_config(self.folder), read_json(self.folder / "config.json")
        tied = config.get("tie_word_embeddings", whole.get("tie_word_embeddings", False))
        return config["vocab_size"] * self.row_bytes // len(self.columns) * (1 if tied else 2)


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
    engine = choose_engine(options.engine, options.python, options.engine_options, cached.capture)
    identity = {
        "target": named_target(model, folder, cached.target),
        "tokenizer": {"digest": tokenizer_digest(folder), "chat_template": template_digest(folder)},
        "samples": {"max_length": max_length, **_sample_rules(catalog, folder, options)},
        "capture": {
            **engine.identity,
            "dtype": dtype,
            "batch_tokens": options.batch_tokens or cached.capture.batch_tokens or BATCH_TOKENS,
        },
    }
    requested = _requested_columns(options, config, dtype, complete, catalog)
    columns = requested + [spec for spec in complete if spec.name not in {other.name for other in requested}]
    columns.sort(key=lambda spec: (spec.name == "final", layer_of(spec.name)))
    if not (options.dtype or options.device or catalog.exists):
        _warn_of_float32(folder, dtype)
    return CaptureSettings(model, folder, Identity.model_validate(identity), tuple(columns), engine)


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


def _default_dtype(folder: Path, device: str | None) -> str:
    """Return float32 on a CPU, else the dtype of the target's config. UsageError for one that captures cannot have."""
    if Worker().device(device) == "cpu":
        return "float32"
    native = _config_dtype(folder)
    if native == "float16" and quantisation(folder):
        print("warning: this quantised target's float16 is run as bfloat16; --dtype float32 is exact", file=sys.stderr)
        return "bfloat16"
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
