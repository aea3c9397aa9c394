"""The configuration of a draft: shapes, the target's layers, label convention and loss weights, validated together.

A wrong value must fail here, before any work: a draft trained with the wrong label convention or layer ids runs without
an error, and no proposal of it is ever accepted.
"""

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from pipeline.drafts.rope_scaling import RopeScaling
from pipeline.errors import UsageError

LAYER_TYPES = ("full_attention", "sliding_attention")
DSPARK_OPTIONS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "alpha_confidence",
)
DOMINO_OPTIONS = ("pure_draft_prefix_len", "emb_dim", "gru_hidden_dim", "lambda_start", "lambda_decay")


def default_gamma(block_size: int) -> float:
    """Return the decay constant by block size: 7 for 16, 5 for 10, 4 for 8 (DFlash, appendix A.1) and 7 (DeepSpec)."""
    # Only these four are published; other sizes take the constant of the nearest one.
    known = {7: 4.0, 8: 4.0, 10: 5.0, 16: 7.0}
    return known[min(known, key=lambda size: (abs(size - block_size), size))]


class DraftConfig(BaseModel):
    """The configuration of one draft. Raises UsageError, with a remedy, for every invalid combination.

    `shift_label` is the label convention: slot k predicts the token at anchor + k (False) or anchor + k + 1 (True).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    layer_types: tuple[str, ...] = ()  # empty: every layer attends to all of the context
    sliding_window: PositiveInt | None = None

    num_target_layers: PositiveInt  # the target's depth L
    target_layer_ids: tuple[int, ...]
    block_size: PositiveInt
    mask_token_id: NonNegativeInt
    shift_label: bool

    # Read by domino only, None for the others.
    pure_draft_prefix_len: NonNegativeInt | None = None
    emb_dim: PositiveInt | None = None  # rank of the correction
    gru_hidden_dim: PositiveInt | None = None
    lambda_start: float | None = None
    lambda_decay: float | None = None  # fraction of the run's steps over which lambda falls to 0

    # Read by dspark only, None for the others.
    markov_rank: NonNegativeInt | None = None  # 0: no Markov head
    markov_head_type: Literal["vanilla", "gated", "rnn"] | None = None
    enable_confidence_head: bool | None = None
    confidence_head_with_markov: bool | None = None  # it reads the token before as well
    alpha_confidence: float | None = None  # weight of its loss; None without such a head

    # The loss of each slot's logits; all but "ce" read the target's final state. See `objectives.py`.
    objective: Literal["ce", "kl", "tv", "lk-alpha", "lk-hybrid", "dspark"] = "ce"
    alpha_ce: float | None = None  # of objective "dspark" only
    alpha_l1: float | None = None

    gamma: float | None = None  # None: no decay
    weighting: Literal["decay", "dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"] = "decay"
    dpace_alpha: float = 0.5

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "config"
            found = "" if first["type"] == "missing" else f", found {first['input']!r}"
            raise UsageError(f"draft {where}: {first['msg']}{found}; correct that field") from None

    @property
    def proposals(self) -> int:
        """The number of tokens that a block proposes: b with next-position labels, b - 1 with same-position ones."""
        return self.block_size - (not self.shift_label)

    @property
    def first_slot(self) -> int:
        """The slot of the first proposal."""
        return int(not self.shift_label)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields):
        """Fill in defaults that depend on other fields: all layers full, and those of `defaults`."""
        fields = dict(fields)
        if not fields.get("layer_types") and isinstance(fields.get("num_hidden_layers"), int):
            fields["layer_types"] = ("full_attention",) * fields["num_hidden_layers"]
        stated = {key: value for key, value in fields.items() if value is not None}
        return fields | defaults(stated) | stated

    @model_validator(mode="after")
    def _check(self):
        _check_heads(self)
        _check_window(self)
        _check_target(self)
        _check_loss(self)
        from pipeline.drafts import DRAFTS  # here: the methods' files import this one

        if self.method not in DRAFTS:
            raise UsageError(f"no method {self.method!r}; there are {', '.join(sorted(DRAFTS))}")
        DRAFTS[self.method].check(self)
        return self


def defaults(stated: dict) -> dict:
    """Return the published defaults that depend on the method and the objective, for the fields in `stated`."""
    method = stated.get("method")
    if method == "domino":
        return {"lambda_start": 1.0, "lambda_decay": 1.0} | _alphas(stated)
    if method != "dspark":
        return _alphas(stated)
    objective = stated.get("objective", "dspark")
    # A confidence head learns from the target's final state, which plain cross-entropy has no need of.
    head = stated.get("enable_confidence_head", objective != "ce")
    filled = {"objective": objective, "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": head}
    filled |= {"confidence_head_with_markov": False} | ({"alpha_confidence": 1.0} if head else {})
    return filled | _alphas(stated | filled)


def _alphas(stated: dict) -> dict:
    return {"alpha_ce": 0.1, "alpha_l1": 0.9} if stated.get("objective") == "dspark" else {}


def needs_final_states(config: DraftConfig) -> bool:
    """Return whether the loss reads the target's final states."""
    soft = config.objective != "ce" and config.alpha_l1 != 0
    return soft or bool(config.enable_confidence_head)


def refuse_options(config: DraftConfig, *names: str) -> None:
    """Raise UsageError for options that the method does not read."""
    for name in names:
        if getattr(config, name) is not None:
            raise UsageError(
                f"{name} = {getattr(config, name)} means nothing to {config.method}; leave it out or change the method"
            )


def _check_heads(config: DraftConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}; choose a divisor"
        )
    if config.head_dim % 2:
        raise UsageError(f"head_dim {config.head_dim} is odd; rotary positions turn pairs, so make it even")


def _check_window(config: DraftConfig) -> None:
    unknown = sorted(set(config.layer_types) - set(LAYER_TYPES))
    if unknown:
        raise UsageError(f"layer_types names {unknown[0]!r}; a draft's layers are {' or '.join(LAYER_TYPES)}")
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
    if config.block_size < 2:
        raise UsageError(f"block_size {config.block_size} leaves nothing to guess; use 2 or more")


def _check_loss(config: DraftConfig) -> None:
    if config.gamma is not None and config.gamma <= 0:
        raise UsageError(f"gamma {config.gamma} must be above 0; leave it out for no decay")
    if not 0 <= config.dpace_alpha <= 1:
        raise UsageError(f"dpace_alpha {config.dpace_alpha} must lie in 0..1; 0.5 is the published value")
    for name in ("alpha_ce", "alpha_l1"):
        value = getattr(config, name)
        if value is not None and config.objective != "dspark":
            raise UsageError(
                f'{name} = {value} is a weight of objective "dspark"; leave it out of {config.objective!r}'
            )
        if value is not None and value < 0:
            raise UsageError(f"{name} {value} must be 0 or more; published are 0.1 for alpha_ce and 0.9 for alpha_l1")
    if config.objective == "dspark" and config.alpha_ce == config.alpha_l1 == 0:
        raise UsageError("alpha_ce and alpha_l1 are both 0, so nothing is learned; published are 0.1 and 0.9")
    for name in ("lambda_start", "lambda_decay"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} {value} must lie in 0..1; published recipes use 1.0")
