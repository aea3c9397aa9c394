"""Recipes: all settings that decide the trained draft, their defaults, and how they are resolved against a cache.

A recipe is a TOML file with the sections [draft] and [train]; it states only what differs from the defaults, and
`--set section.field=value` changes one more field. `resolve` fills the rest from a cache: sizes and layers from the
target's config, the mask token from its tokenizer, the learning rate from the size. The resolved recipe is printed,
saved in the run's folder, and loads back as the same recipe.

    H hidden size   L layers of the target   V vocabulary   b block size
"""

import dataclasses
import hashlib
import json
import math
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)

from pipeline.bundled_files import no_recipe
from pipeline.drafts import DRAFTS, DraftConfig, draft_config
from pipeline.drafts.draft import SMALL_HIDDEN
from pipeline.drafts.rope import RopeScaling, draft_rope_scaling, rope_theta
from pipeline.errors import UsageError, cause_of
from pipeline.json_files import read_file
from pipeline.nearest_name import did_you_mean
from pipeline.runs.recipe_errors import explain
from pipeline.runs.training_data import check_final, layers_to_read, resolve_mask_token, training_config

# TOML has only lists; everything else keeps the type that was written.
Layers = Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
LayerTypes = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)]
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def options_model() -> type[BaseModel]:
    """Return a model of the options of all methods, each of which a recipe may leave out."""
    return _model_of_options(*DRAFTS.values())


@cache  # making it takes 10 ms, and a start asks for it a dozen times
def _model_of_options(*drafts: type) -> type[BaseModel]:
    fields = {name: option for draft in drafts for name, option in draft.Config.options().items()}
    kinds = {
        name: Annotated[option.annotation, *option.metadata] if option.metadata else option.annotation
        for name, option in fields.items()
    }
    return create_model("Options", __config__=STRICT, **{name: (kind | None, None) for name, kind in kinds.items()})


class DraftSection(BaseModel):
    """The draft's architecture and loss. Fields left out follow from the method and the target; see `resolve`.

    The options of methods are further keys beside these, which `Draft.Config` of each defines with their bounds.
    """

    model_config = STRICT | {"extra": "allow"}

    method: str = "domino"
    objective: str | None = None  # the loss of a slot's logits; the published one of the method
    alpha_ce: NonNegativeFloat | None = None  # weights of the objective's terms of these names
    alpha_l1: NonNegativeFloat | None = None
    layers: Layers | None = None  # target layers read; left out: all that the cache holds
    num_hidden_layers: PositiveInt | None = None  # min(5, L // 3)
    block_size: int | None = Field(None, ge=2)  # 16, 8 when H <= SMALL_HIDDEN, unless the method has its own
    mask_token_id: int | None = Field(None, ge=0)
    shift_label: bool | None = None  # next-position labels: as the method is published
    gamma: NonNegativeFloat | None = None  # decay constant of the slots' weights; 0: no decay
    weighting: str | None = None  # "decay", or one of the D-PACE forms
    dpace_alpha: float | None = Field(None, ge=0, le=1)
    # Left out: the target's own. State them where the target's mean something else (experts, latent attention).
    intermediate_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    layer_types: LayerTypes | None = None  # all full_attention
    sliding_window: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, fields):
        """Check the keys that are no fields: options of methods, and keys that nobody knows."""
        if not isinstance(fields, dict):
            return fields
        options = {name: value for name, value in fields.items() if name not in cls.model_fields}
        return fields | options_model().model_validate(options).model_dump(exclude_unset=True)

    @classmethod
    def keys(cls) -> list[str]:
        """Return every key in the order that all versions write them: the options of methods before the sizes."""
        fields = list(cls.model_fields)
        sizes = fields.index("intermediate_size")
        return [*fields[:sizes], *options_model().model_fields, *fields[sizes:]]

    @model_serializer(mode="wrap")
    def _in_order(self, serialise) -> dict:
        fields = serialise(self)
        return {name: fields[name] for name in sorted(fields, key=self.keys().index)}


class TrainSection(BaseModel):
    """Training length, batch and optimiser. At most one of `steps` and `epochs` is stated. Cell: packed micro-batch."""

    model_config = STRICT

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None  # 6
    batch: PositiveInt = 16  # samples of a global batch
    context: PositiveInt = 3072  # rows of a cell; of a longer sample one window of so many rows
    anchors: PositiveInt = 512  # blocks a sample and epoch, at most
    # Consecutive steps that use a batch once it is read (data echoing, arXiv:1907.05550), each with fresh anchors, so
    # that the cache is read once for so many epochs. It equals them only in expectation: a sample's uses follow one
    # another, with one order, one window and the same companions. A sample with no more than `anchors` eligible rows
    # uses all of them each time, so its blocks are repeated. Two batches are held in the host's memory.
    echo: PositiveInt = 1
    cell_anchors: PositiveInt | None = None  # blocks of a cell; max(512, anchors)
    cells: PositiveInt = 1  # cells of a global batch, at least; more where the samples do not fit
    optimizer: Literal["adamw", "muon"] | None = None  # adamw, as published; toys: muon for the layers' matrices
    lr: PositiveFloat | None = None  # peak; see `default_lr`
    warmup: float = Field(0.04, ge=0, lt=1)  # share of the steps
    schedule: Literal["cosine", "wsd"] = "cosine"
    clip: PositiveFloat = 1.0  # global norm of the gradient
    seed: int = Field(0, ge=0, lt=2**64)  # decides weights, sample order, windows and anchors
    dtype: Literal["float32", "bfloat16"] | None = None  # of the arithmetic; weights are float32. The cache's own
    log_every: PositiveInt = 10
    eval_every: PositiveInt | None = None  # a quarter of the steps; always at the end
    eval_samples: PositiveInt = 64  # held-out samples the accept length is measured on
    heldout: float = Field(0.05, ge=0, lt=1)  # share of the prompts held out where the corpus does not say
    save_every: PositiveInt | None = None  # a tenth of the steps, at most 500
    keep: PositiveInt = 2  # checkpoints
    track: Trackers = ()  # what shows the figures, too; no part of what a run is, and may change


class Recipe(BaseModel):
    """A whole recipe, resolved or not."""

    model_config = STRICT

    draft: DraftSection = DraftSection()
    train: TrainSection = TrainSection()

    def _written(self) -> dict[str, dict]:
        """Return what is written of each section: what decides the draft, and so no trackers; no None, and no echo of
        1, so that recipes of before there was echo keep their digest, and with it their runs' names and checkpoints."""
        sections = self.model_dump(exclude_none=True)
        del sections["train"]["track"]
        if self.train.echo == 1:
            del sections["train"]["echo"]
        return sections

    def toml(self) -> str:
        """Return the recipe as TOML, without fields that are None. These types are written alike in TOML and JSON."""
        tables = []
        for name, fields in self._written().items():
            tables.append("\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]))
        return "\n\n".join(tables) + "\n"

    def seedless_digest(self) -> str:
        """Return the digest of all but the seed, which is equal for runs that differ in it alone."""
        return self.model_copy(update={"train": self.train.model_copy(update={"seed": 0})}).digest()

    def digest(self) -> str:
        """Return a hash of all fields, independent of their order."""
        text = json.dumps(self._written(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_recipe(path: Path | None, sets: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply each `section.field=value` of `sets`.

    Raises UsageError for a missing file, invalid TOML, an unknown key (naming the closest), or an invalid value.
    """
    return make_recipe(read_toml(Path(path)) if path else {}, sets, str(path or "the recipe"))


def make_recipe(stated: dict, sets: tuple[str, ...], source: str) -> Recipe:
    """Return the recipe from sections of fields, with each of `sets` applied; `source` names it in errors."""
    if "sweep" in stated:
        raise UsageError(f"{source} holds a [sweep] table, so it is many recipes; run it with `pipeline sweep`")
    for entry in sets:
        _set(stated, entry)
    try:
        recipe = Recipe.model_validate(stated)
    except ValidationError as error:
        keys = {"draft": DraftSection.keys(), "train": list(TrainSection.model_fields)}
        raise UsageError(explain(error, source, keys)) from None
    if recipe.train.steps and recipe.train.epochs:
        raise UsageError(
            f"{source} states train.steps = {recipe.train.steps} and train.epochs = {recipe.train.epochs}; "
            "they say the same thing twice: leave one out"
        )
    return recipe


MAX_BYTES = 1 << 20  # of a recipe, which has 1 KiB


def read_toml(path: Path) -> dict:
    """Return the contents of a recipe file. Raises UsageError when it is missing or not TOML."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; the recipe of a run is {path / 'recipe.toml'}")
    try:
        return tomllib.loads(read_file(path, MAX_BYTES).decode())
    except FileNotFoundError:
        raise UsageError(no_recipe(path)) from None
    except (OSError, ValueError, RecursionError) as error:  # tomllib's own is a ValueError
        raise UsageError(f"{path} is not TOML: {cause_of(error)}") from None


def _set(stated: dict, entry: str) -> None:
    """Apply one `section.field=value`; the value is TOML, or a bare word."""
    key, equals, text = entry.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot and section and field):
        raise UsageError(f"--set {entry}: write section.field=value, such as --set train.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    fields = stated.setdefault(section, {})
    if not isinstance(fields, dict):
        raise UsageError(f"`{section}` is a value in the recipe, not a section; write [{section}] above its fields")
    fields[field] = value


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe with every field filled, and the draft it describes. `recipe.train.steps` is None until `with_steps`."""

    recipe: Recipe
    draft: DraftConfig

    def with_steps(self, samples: int) -> "Resolved":
        """Fill in what depends on the number of training samples: steps, and how often to evaluate and save.

        An epoch is samples // batch steps, at least one; the samples left over are not used in that epoch. With echo
        it is as many steps, and reads 1 / echo of the samples, so `echo` changes no schedule.
        """
        recipe = self.recipe.model_copy(update={"train": with_schedule(self.recipe.train, samples)})
        return dataclasses.replace(self, recipe=recipe)

    def with_rope_scaling(self, scaling: RopeScaling | None) -> "Resolved":
        """Return the same with the rotary scaling (or none) of weights that are there already."""
        return dataclasses.replace(self, draft=self.draft.model_copy(update={"rope_scaling": scaling}))


def with_schedule(train: TrainSection, samples: int) -> TrainSection:
    """Return [train] with its number of steps, and how often to evaluate and save. samples: read only for epochs."""
    steps = train.steps or train.epochs * max(1, samples // train.batch)
    filled = {
        "steps": steps,
        "epochs": None,
        "eval_every": train.eval_every or max(1, math.ceil(steps / 4)),
        "save_every": train.save_every or max(1, min(500, steps // 10)),
    }
    return train.model_copy(update=filled)


def train_defaults(train: TrainSection) -> dict:
    """Return what of [train] follows from [train] alone."""
    return {
        "epochs": train.epochs or (None if train.steps else 6),
        "cell_anchors": train.cell_anchors or max(512, train.anchors),
    }


def draft_defaults(draft: DraftSection, hidden_size: int) -> dict:
    """Return what of [draft] follows from its method, what else it states, and the target's hidden size."""
    dpace = {} if (draft.weighting or "decay") == "decay" else {"dpace_alpha": 0.5}
    return dpace | DRAFTS[draft.method].recipe_defaults(draft.model_dump(exclude_none=True), hidden_size)


def resolve(recipe: Recipe, cache) -> Resolved:
    """Fill a recipe from an open HiddenCache. Raises UsageError for an invalid method, layers, mask token or sizes."""
    target = training_config(cache.target_config)
    draft = _resolve_draft(recipe.draft, target, cache)
    config = _draft_config(draft, target)
    if config.final_reader is not None:  # a loss reads the target's final states
        check_final(cache, *config.final_reader)
    train = recipe.train
    optimizer = train.optimizer or ("adamw" if config.hidden_size > SMALL_HIDDEN else "muon")
    filled = train_defaults(train) | {
        "optimizer": optimizer,
        "lr": train.lr or default_lr(config.hidden_size, optimizer),
        "dtype": train.dtype or str(cache.dtype).removeprefix("torch."),
    }
    if filled["cell_anchors"] < train.anchors:
        raise UsageError(
            f"train.cell_anchors = {filled['cell_anchors']} is below train.anchors = {train.anchors}: "
            "a sample's blocks share a cell; raise the one or lower the other"
        )
    return Resolved(recipe.model_copy(update={"draft": draft, "train": train.model_copy(update=filled)}), config)


def check_method(draft: DraftSection) -> None:
    """Raise UsageError for a method that there is not."""
    if draft.method not in DRAFTS:
        meant = did_you_mean(draft.method, DRAFTS, "`{}`")
        raise UsageError(f"unknown draft.method `{draft.method}`{meant or ';'} there are {', '.join(DRAFTS)}")


def default_lr(hidden_size: int, optimizer: str) -> float:
    """Return the peak learning rate: 6e-4, as published for targets from 0.6B to 8B, and more for toys."""
    # Toys: see configs/demo.toml. With AdamW 3e-3 was the best of 1e-3, 3e-3, 6e-3 and 1e-2 on the bundled target;
    # widths between its 256 and 1024 were not tried, nor Muon on larger targets.
    toys = 5e-3 if optimizer == "muon" else 3e-3
    return 6e-4 if hidden_size > SMALL_HIDDEN else toys


def _resolve_draft(draft: DraftSection, target: dict, cache) -> DraftSection:
    check_method(draft)
    hidden, stated = target["hidden_size"], draft.model_dump(exclude_none=True)
    depth = draft.num_hidden_layers or min(5, max(1, target["num_hidden_layers"] // 3))
    filled = {
        "layers": layers_to_read(cache, draft.layers),
        "num_hidden_layers": depth,
        "mask_token_id": resolve_mask_token(draft.mask_token_id, cache.tokens, target["vocab_size"]),
        "intermediate_size": target.get("intermediate_size") or 4 * hidden,  # Falcon, say, states none
        "num_attention_heads": target["num_attention_heads"],
        "num_key_value_heads": target.get("num_key_value_heads") or target["num_attention_heads"],
        "head_dim": target.get("head_dim") or hidden // target["num_attention_heads"],
        "layer_types": ("full_attention",) * depth,
    }
    filled |= draft_defaults(draft, hidden)
    return draft.model_copy(update=filled | stated | {"layers": filled["layers"]})


def _draft_config(draft: DraftSection, target: dict) -> DraftConfig:
    """Return the validated config. The target's fields are named one by one, so that no other leaks into the draft."""
    fields = draft.model_dump(exclude_none=True)
    fields["target_layer_ids"] = fields.pop("layers")
    fields["gamma"] = fields["gamma"] or None
    return draft_config(
        **fields,
        hidden_size=target["hidden_size"],
        vocab_size=target["vocab_size"],
        num_target_layers=target["num_hidden_layers"],
        rms_norm_eps=target.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(target),
        rope_scaling=draft_rope_scaling(target)[0],
        max_position_embeddings=target["max_position_embeddings"],
        attention_bias=bool(target.get("attention_bias", False)),
        initializer_range=target.get("initializer_range", 0.02),
    )
