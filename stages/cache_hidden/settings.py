"""A capture's settings: what was asked for, completed from the target's files and from the cache that is there.

Imports no torch unless the device has to be looked at, so that a run with nothing to do stays quick.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import in_use
from pipeline.cache.catalog import shards_per_column
from pipeline.cache.codecs import codec_of, parse_codecs
from pipeline.cache.columns import ColumnSpec, complete_manifest
from pipeline.cache.layout import FINAL, IDENTITY, aux_column, layer_of, shard_folder
from pipeline.cache.manifest import read_canonical
from pipeline.cache.plan import read_manifests, segment_numbers
from pipeline.cache.rebuild import shard_columns
from pipeline.errors import UsageError
from pipeline.target.files import (
    find_target,
    positions,
    read_json,
    stop_ids,
    target_digest,
    target_name,
    template_arguments,
    template_digest,
    text_config,
    tokenizer_digest,
)
from pipeline.target.layers import check_layers, default_layers, default_taps
from stages.cache_hidden.options import CaptureOptions
from stages.cache_hidden.shard_assignment import Worker

BATCH_TOKENS = 4096  # padded tokens a forward; pads 1 to 2.4 % in shards of 4 GiB of an 8B target
MAX_LENGTH = 3072  # tokens a sample
DTYPES = ("bfloat16", "float32")
HUB_CORPUS = "mlabonne/open-perfectblend"
HUB_SAMPLES = 20_000  # of it, when nobody named a corpus
BUNDLED_CORPUS = "chats.jsonl"
MASK_RULE = "proven"  # every supervised turn by three renderings, `turn_proof.py`


@dataclass(frozen=True)
class Settings:
    """Everything decided: where the target is, what the cache is to be, which columns are wanted."""

    model: str
    folder: Path
    identity: dict
    columns: tuple[ColumnSpec, ...]

    @property
    def max_length(self) -> int:
        return self.identity["samples"]["max_length"]

    @property
    def batch_tokens(self) -> int:
        return self.identity["capture"]["batch_tokens"]

    @property
    def dtype(self) -> str:
        return self.identity["capture"]["dtype"]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row over all columns, were every row kept in each."""
        return sum(spec.row_bytes for spec in self.columns)


def settle(model: str, out: Path, options: CaptureOptions) -> Settings:
    """Complete the options. UsageError for a target that is not there, or layers and types that cannot be.

    Columns that are whole are wanted in every case, so that a corpus that is added takes none of them from training.
    """
    folder = find_target(model, options.revision)
    config = text_config(folder)
    held = read_canonical(out / IDENTITY) if (out / IDENTITY).is_file() else {}
    kept = held.get("capture", {})
    max_length = _max_length(options.max_length, held.get("samples", {}).get("max_length"), config)
    whole = whole_columns(out) if held else []
    dtype = options.dtype or kept.get("dtype") or _default_dtype(folder, options.device)
    identity = {
        "target": _target(model, folder, held.get("target", {})),
        "tokenizer": {"digest": tokenizer_digest(folder), "chat_template": template_digest(folder)},
        "samples": {"max_length": max_length, **_sample_rules(out, folder, options, held.get("samples", {}))},
        "capture": {
            "engine": "transformers",
            "dtype": dtype,
            "batch_tokens": options.batch_tokens or kept.get("batch_tokens") or BATCH_TOKENS,
        },
    }
    asked = _asked_columns(options, config, dtype, whole, out)
    columns = asked + [spec for spec in whole if spec.name not in {other.name for other in asked}]
    columns.sort(key=lambda spec: (spec.name == "final", layer_of(spec.name)))
    if not (options.dtype or options.device or held):
        _warn_of_float32(folder, dtype)
    return Settings(model, folder, identity, tuple(columns))


def _asked_columns(
    options: CaptureOptions, config: dict, dtype: str, whole: list[ColumnSpec], out: Path
) -> list[ColumnSpec]:
    """Return the columns the options name; what they leave open is by rule, or as it is where a corpus is added."""
    depth, width = config["num_hidden_layers"], config["hidden_size"]
    as_it_is = options.append and bool(whole)
    layers = options.layer_list() or []
    if options.append:
        named = bool(layers or options.taps)
        check_partial(out, layers_left_open=not named, final_left_open=not options.final and (as_it_is or not named))
    if options.taps or not (layers or as_it_is):
        layers = default_layers(depth, options.taps or default_taps(depth))
    if layers:
        check_layers(layers, depth)
    codecs = parse_codecs(options.codec) if options.codec else {}
    held = held_codecs(out)

    def column(name: str, keeps: str = "all") -> ColumnSpec:
        return ColumnSpec(name, dtype, width, codec_of(codecs, name) or held.get(name, "raw"), keeps)

    columns = [column(aux_column(layer)) for layer in layers]
    final = options.final or ("none" if as_it_is else "needed")
    return columns + [column("final", final)] * (final != "none")


def held_codecs(out: Path) -> dict[str, str]:
    """Return the codec of every column that a shard has, by name, as the first that has it keeps it."""
    found: dict[str, str] = {}
    for shard in range(sum(manifest["shards"] for manifest in read_manifests(out)) if segment_numbers(out) else 0):
        for name, manifest in shard_columns(out, shard).items():
            found.setdefault(name, manifest["spec"]["codec"])
    return found


def whole_columns(out: Path) -> list[ColumnSpec]:
    """Return the columns that every shard of the first corpus has, in order of name; none where nothing is planned."""
    if not segment_numbers(out):
        return []
    shards = range(read_manifests(out)[0]["shards"])
    names = sorted(name for name in shard_columns(out, 0))
    held = {name: [complete_manifest(out, shard, name) for shard in shards] for name in names}
    return [ColumnSpec(**found[0]["spec"]) for found in held.values() if all(found)]


def check_partial(out: Path, *, layers_left_open: bool, final_left_open: bool) -> None:
    """Refuse to add samples "as the cache is" where some shards of its first corpus lack a column that others have.

    UsageError, unless somebody is capturing it: that column would be missing from what is added, and from training.
    """
    if not segment_numbers(out):
        return
    shards = range(read_manifests(out)[0]["shards"])
    held = shards_per_column([[path.name for path in shard_folder(out, shard).glob("*")] for shard in shards])
    partial = {
        name: count
        for name, count in held.items()
        if count < len(shards) and (final_left_open if name == FINAL else layers_left_open)
    }
    if partial and not in_use(out):
        what = ", ".join(f"{name} in {count} of {len(shards)} shards" for name, count in partial.items())
        raise UsageError(
            f"{out} is incomplete, and nobody is capturing it: {what}; finish it with the command that began it, or "
            "name with --layers and --final what the added samples get"
        )


def _max_length(stated: int | None, kept: int | None, config: dict) -> int:
    """Return the tokens a sample may have: as stated, as the cache has it, or by rule. UsageError for too many."""
    most, why = positions(config)
    if stated is None:
        return kept or min(MAX_LENGTH, most or MAX_LENGTH)
    if most is not None and stated > most:
        raise UsageError(f"--max-length {stated}: this target has {most} positions{why}; pass {most} or less")
    return stated


def _sample_rules(out: Path, folder: Path, options: CaptureOptions, kept: dict) -> dict:
    """Return how conversations become samples, as an identity states it. `turns` is None until a corpus has decided.

    A plan of an earlier version is finished by its own rules. UsageError where samples are to be added to it.
    """
    if kept and "turns" not in kept and kept.get("mask") != "imported":
        if options.append:
            raise UsageError(
                f"{out} was planned by an earlier version, before loss masks were proven turn by turn, and nothing can "
                "be added to it; pass another --out and leave out --append"
            )
        print(
            "warning: an earlier version planned this cache, before loss masks were proven turn by turn; it is "
            "finished as planned, a plan in another --out has them proven",
            file=sys.stderr,
        )
        return {key: value for key, value in kept.items() if key != "max_length"}
    kwargs = options.template_kwargs
    if kwargs is None and "template_kwargs" in kept:
        kwargs = json.dumps(kept["template_kwargs"])
    return {
        "mask": MASK_RULE,
        "trimmed": True,
        "turns": options.turns or kept.get("turns"),
        **template_arguments(kwargs, options.template_date or kept.get("template_date")),
        "stops": stop_ids(folder),
    }


def _target(model: str, folder: Path, held: dict) -> dict:
    """Name, revision and digest. A folder that was only moved keeps the name it has in the cache."""
    digest = target_digest(folder)
    if held.get("digest") == digest:
        return held
    revision = folder.name if folder.parent.name == "snapshots" else ""
    return {"name": target_name(model), "revision": revision, "digest": digest}


def _default_dtype(folder: Path, device: str | None) -> str:
    """Return float32 on a CPU, else the type the target's weights are meant for."""
    if Worker().device(device) == "cpu":
        return "float32"
    named = _named_dtype(folder)
    if named not in DTYPES:
        raise UsageError(f"the target's config names the type {named}; choose one with --dtype: {' or '.join(DTYPES)}")
    return named


def _named_dtype(folder: Path) -> str | None:
    """Return the type that the target's config names for its weights."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config") or {}
    return next((place[key] for place in (config, nested) for key in ("dtype", "torch_dtype") if place.get(key)), None)


def _warn_of_float32(folder: Path, dtype: str) -> None:
    """Warn where a machine without a GPU settles, for good, that a half-width target is computed in float32.

    Not for the bundled target, which a CPU is meant to capture.
    """
    named = _named_dtype(folder)
    if dtype == "float32" and named in ("bfloat16", "float16") and default_corpus(folder) == HUB_CORPUS:
        print(
            f"warning: no GPU here, so this plan fixes float32 for the cache of a {named} target, at twice the bytes; "
            "if a GPU will capture it, plan with --dtype bfloat16",
            file=sys.stderr,
        )


def default_corpus(folder: Path) -> str:
    """Return the corpus when none is named: the chats beside a bundled target, else a data set of the hub."""
    bundled = folder.resolve().parent / BUNDLED_CORPUS
    return str(bundled) if bundled.is_file() else HUB_CORPUS
