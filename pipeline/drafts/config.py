"""The configuration of a draft: shapes, the target's layers, label convention and loss weights, validated together.

`DraftConfig` has what every method reads; a method's own class adds its options. A wrong value must fail here, before
any work: a draft trained with the wrong label convention or layer ids runs without an error, and no proposal of it is
ever accepted.
"""

import re
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pipeline.drafts.objectives import OBJECTIVES
from pipeline.drafts.rope import RopeScaling
from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean

QUOTED = re.compile(r"'([^']*)'")  # pydantic's choices


def default_gamma(block_size: int) -> float:
    """Return the decay constant by block size: 7 for 16, 5 for 10, 4 for 8 (DFlash, appendix A.1) and 7 (DeepSpec)."""
    # Only these four are published; other sizes take the constant of the nearest one.
    known = {7: 4.0, 8: 4.0, 10: 5.0, 16: 7.0}
    return known[min(known, key=lambda size: (abs(size - block_size), size))]


class DraftConfig(BaseModel):
    """The configuration of one draft. Raises UsageError, with a remedy, for every invalid combination.

    `shift_label` is the label convention: slot k predicts the token at anchor + k (False) or anchor + k + 1 (True).
    A subclass states a method's options as further fields, with bounds and defaults; `draft_config` finds the class by
    the method's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Whether slots behind a gap in the loss mask are left out, and whether slot k may predict the token at anchor + k.
    scores_up_to_gap: ClassVar[bool] = False
    may_keep_position: ClassVar[bool] = True
    # What training alone reads, so that a published folder does not hold it.
    training_only: ClassVar[frozenset[str]] = frozenset(
        ("objective", "alpha_ce", "alpha_l1", "gamma", "weighting", "dpace_alpha")
    )

    method: str
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling | None = None  # None: plain rotary positions
    max_position_embeddings: PositiveInt
    attention_bias: bool = False
    initializer_range: PositiveFloat = 0.02
    # Empty: every layer attends to all of the context.
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    sliding_window: PositiveInt | None = None

    num_target_layers: PositiveInt  # the target's depth L
    target_layer_ids: tuple[int, ...]
    block_size: int = Field(ge=2)
    mask_token_id: int = Field(ge=0)
    shift_label: bool

    # The loss of each slot's logits, an entry of OBJECTIVES.
    objective: str = "ce"
    alpha_ce: float | None = Field(None, ge=0)  # weights of the objective's terms of these names
    alpha_l1: float | None = Field(None, ge=0)

    gamma: PositiveFloat | None = None  # None: no decay
    weighting: Literal["decay", "dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"] = "decay"
    dpace_alpha: float = Field(0.5, ge=0, le=1)

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "config"
            if first["type"] == "missing":
                raise UsageError(f"a {fields['method']} draft needs {where}; state it") from None
            meant = did_you_mean(first["input"], QUOTED.findall(first["msg"])) or "; correct that field"
            raise UsageError(f"draft {where}: {first['msg']}, found {first['input']!r}{meant}") from None

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Return the fields that only this method has, by name."""
        return {name: field for name, field in cls.model_fields.items() if name not in DraftConfig.model_fields}

    @classmethod
    def published_options(cls) -> list[str]:
        """Return the options that decide what a trained draft computes."""
        return [name for name in cls.options() if name not in cls.training_only]

    @classmethod
    def defaults(cls, stated: dict) -> dict:
        """Return the published defaults that depend on the fields in `stated`: weights of the objective's terms."""
        terms = OBJECTIVES.get(stated.get("objective", "ce"), {})
        weights = {f"alpha_{name}": term.weight for name, term in terms.items()}
        return {name: weight for name, weight in weights.items() if name in cls.model_fields}

    @property
    def proposals(self) -> int:
        """The number of tokens that a block proposes: b with next-position labels, b - 1 with same-position ones."""
        return self.block_size - (not self.shift_label)

    @property
    def proposable(self) -> int:
        """The number of ids that may be proposed."""
        return self.vocab_size

    @property
    def first_slot(self) -> int:
        """The slot of the first proposal."""
        return int(not self.shift_label)

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the objective, without terms of weight 0; "" names a single term."""
        terms = OBJECTIVES[self.objective]
        weights = {name: getattr(self, f"alpha_{name}", term.weight) for name, term in terms.items()}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def final_reader(self) -> tuple[str, str] | None:
        """What in the loss reads the target's final states, and the setting that does without; None: nothing does."""
        if all(OBJECTIVES[self.objective][name].reads == ("ce",) for name in self.term_weights):
            return None
        return f'objective "{self.objective}"', 'draft.objective = "ce"'

    @property
    def needs_final_states(self) -> bool:
        """Whether the loss reads the target's final states."""
        return self.final_reader is not None

    @property
    def has_confidence(self) -> bool:
        """Whether the draft predicts for each proposal how likely it is to be accepted."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields):
        """Fill in defaults that depend on other fields: all layers full, and those of `defaults`."""
        fields = dict(fields)
        if not fields.get("layer_types") and isinstance(fields.get("num_hidden_layers"), int):
            fields["layer_types"] = ("full_attention",) * fields["num_hidden_layers"]
        stated = {key: value for key, value in fields.items() if value is not None}
        return cls.defaults(stated) | stated

    @model_validator(mode="after")
    def _check(self):
        _check_heads(self)
        _check_window(self)
        _check_target(self)
        _check_loss(self)
        return self


def _check_heads(config: DraftConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}; choose a divisor"
        )
    if config.head_dim % 2:
        raise UsageError(f"head_dim {config.head_dim} is odd; rotary positions turn pairs, so make it even")


def _check_window(config: DraftConfig) -> None:
    if len(config.layer_types) != config.num_hidden_layers:
        raise UsageError(
            f"layer_types has {len(config.layer_types)} entries for {config.num_hidden_layers} layers; give one a layer"
        )
    sliding = "sliding_attention" in config.layer_types
    if sliding and config.sliding_window is None:
        raise UsageError("layer_types has sliding_attention but sliding_window is not set; set it in tokens")
    if not sliding and config.sliding_window is not None:
        raise UsageError(
            f"sliding_window is {config.sliding_window} but no layer slides; leave it out, "
            "or name sliding_attention layers in layer_types"
        )


def _check_target(config: DraftConfig) -> None:
    ids, deepest = config.target_layer_ids, config.num_target_layers - 2
    if not ids or any(later <= sooner for sooner, later in pairwise(ids)):
        raise UsageError(f"target_layer_ids {list(ids)} must be at least one id, strictly increasing; sort them")
    if ids[0] < -1 or ids[-1] > deepest:
        raise UsageError(
            f"target_layer_ids {list(ids)} must lie in -1..{deepest} for a target of {config.num_target_layers} layers "
            "(the last layer is normed in one engine, raw in another, and cannot be hooked when serving); choose others"
        )
    if config.mask_token_id >= config.vocab_size:
        raise UsageError(
            f"mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size}; "
            "choose an unused id below it"
        )


def _check_loss(config: DraftConfig) -> None:
    if config.objective not in OBJECTIVES:
        *names, last = map(repr, OBJECTIVES)
        meant = did_you_mean(config.objective, OBJECTIVES) or "; correct that field"
        raise UsageError(
            f"draft objective: Input should be {', '.join(names)} or {last}, found {config.objective!r}{meant}"
        )
    for name in ("alpha_ce", "alpha_l1"):
        value, term = getattr(config, name), name.removeprefix("alpha_")
        if value is not None and term not in OBJECTIVES[config.objective]:
            weighted = " and ".join(f'"{key}"' for key, terms in OBJECTIVES.items() if term in terms)
            raise UsageError(
                f"{name} = {value} is a weight of objective {weighted}; leave it out of {config.objective!r}"
            )
    if not config.term_weights:
        raise UsageError("alpha_ce and alpha_l1 are both 0, so nothing is learned; published are 0.1 and 0.9")
