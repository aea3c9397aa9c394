"""RoPE scaling: which of a target's kinds a draft uses too, and its parameters.

A draft rotates its own queries and keys, so it works without scaling; but it must be served with the positions that it
was trained with. Engines compute scaling from the draft's config.json, each in its own code. In transformers, SGLang
(0.5.23) and vLLM (0.32), `linear`, `llama3` and `yarn` agree, within the limits of `draft_rope_scaling`. `dynamic`
follows the longest text of a batch in transformers and a fixed length in the engines, each by a formula of its own;
`longrope` chooses between two sets of factors by the text in transformers and by the model's length in the engines; and
SGLang does not read a yarn `attention_factor` other than the default. In these cases the draft has plain RoPE, and the
user is told.

    E head size   f frequencies of the pairs of channels, radians a token, [E / 2]
"""

import math
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

KEYS = {  # (required keys, optional keys)
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


class RopeScaling(BaseModel):
    """One RoPE scaling, its fields named as in config.json. Raises ValueError for a missing or an unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None  # 32
    beta_slow: PositiveFloat | None = None  # 1
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: bool | None = None  # yes

    @model_validator(mode="after")
    def _check(self):
        must, may = KEYS[self.rope_type]
        stated = self.as_config().keys() - {"rope_type"}
        for key in must:
            if key not in stated:
                raise ValueError(f"{self.rope_type} without {key}")
        if others := sorted(stated - {*must, *may}):
            raise ValueError(f"{self.rope_type} has no {others[0]}")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor:g} is not above low_freq_factor")
        return self

    def as_config(self) -> dict:
        """Return it as config.json has it."""
        return self.model_dump(exclude_none=True)

    @property
    def attention_factor(self) -> float:
        """The factor that cosine and sine are multiplied by; 1 for all but yarn."""
        if self.rope_type != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor)

    def __str__(self) -> str:
        return f"{self.rope_type}, factor {self.factor:g}"


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rope_parameters(config: dict) -> dict:
    """Return a config's RoPE parameters as transformers reads them: `rope_scaling` before `rope_parameters`, and those
    of full attention where they differ between kinds of layers."""
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        return {"rope_type": stated}
    nested = stated.get("full_attention")
    return dict(nested if isinstance(nested, dict) else stated)


def rope_type_of(parameters: dict) -> str:
    """Return the RoPE type under its current name: `su` is now `longrope`; a text-only `mrope` is the default."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return {"su": "longrope", "mrope": "default"}.get(kind, kind)


def draft_rope_scaling(target: dict) -> tuple[RopeScaling | None, str | None]:
    """Return the scaling that a draft uses, from its target's text config, or None and why the target's is not used.

    (None, None) for a target with plain RoPE.
    """
    parameters = rope_parameters(target)
    kind = rope_type_of(parameters)
    if kind == "default":
        return None, None
    if kind not in KEYS:
        return None, f"{kind}, which engines compute otherwise than transformers, or not at all"
    try:
        scaling = read_scaling(parameters, target)
    except ValueError as error:
        return None, f"{kind}, but {error}"
    usual, stated = scaling.attention_factor, parameters.get("attention_factor")
    if kind == "yarn" and not (stated is None or (isinstance(stated, int | float) and abs(stated - usual) <= 1e-6)):
        return None, f"yarn with attention_factor {stated} where {usual:g} is usual, which SGLang does not read"
    return scaling, None


def read_scaling(parameters: dict, config: dict) -> RopeScaling:
    """Return the scaling that RoPE parameters describe. Raises ValueError, with a message, for an unknown or wrong one.

    config: the whole text config, which may hold lengths that the parameters lack.
    """
    kind = rope_type_of(parameters)
    if kind not in KEYS:
        raise ValueError(f"rope_type {kind!r} is none of {', '.join(KEYS)}")
    fields = {key: parameters.get(key) for key in (*KEYS[kind][0], *KEYS[kind][1])}
    if "original_max_position_embeddings" in fields:
        # As in transformers: the config's own key first, then the parameters', then max_position_embeddings.
        original = config.get("original_max_position_embeddings") or fields["original_max_position_embeddings"]
        fields["original_max_position_embeddings"] = original or config.get("max_position_embeddings")
    if kind == "yarn":
        lengths = config.get("max_position_embeddings"), fields["original_max_position_embeddings"]
        if parameters.get("factor", 1) is None and all(type(length) is int and length > 0 for length in lengths):
            fields["factor"] = lengths[0] / lengths[1]
        if not (fields["mscale"] and fields["mscale_all_dim"]):
            fields["mscale"] = fields["mscale_all_dim"] = None  # SGLang would read a zero where the others do not
        for key in ("beta_fast", "beta_slow"):
            fields[key] = fields[key] or None
    try:
        return RopeScaling(rope_type=kind, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{where}: {message}, found {first['input']!r}" if where else message) from None
