"""Rotary positions (RoPE): which scaling of a target's a draft uses too, and the tables of angles.

A draft rotates its own queries and keys, so it works without scaling; but it must be served with the positions that it
was trained with. Engines compute scaling from the draft's config.json, each in its own code. In transformers, SGLang
(0.5.23) and vLLM (0.32), `linear`, `llama3` and `yarn` agree, within the limits of `draft_rope_scaling`. `dynamic`
follows the longest text of a batch in transformers and a fixed length in the engines, each by a formula of its own;
`longrope` chooses between two sets of factors by the text in transformers and by the model's length in the engines; and
SGLang does not read a yarn `attention_factor` other than the default. In these cases the draft has plain RoPE, and the
user is told.

    T tokens   A heads   E head size   f frequencies of the pairs of channels, radians a token, [E / 2]
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator
from torch import Tensor

from pipeline.errors import UsageError

Tables = tuple[Tensor, Tensor]  # cos and sin [T, E / 2] of some positions

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
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
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


def rope_theta(target: dict) -> float:
    """Return the target's RoPE base, from `rope_parameters` (transformers 5, maybe for each kind of layer) or, before,
    `rope_theta`.

    Raises UsageError where both are stated and differ: of a draft trained with one and served with the other, no
    proposal would be accepted.
    """
    parameters = target.get("rope_parameters") or {}
    new = parameters.get("rope_theta", (parameters.get("full_attention") or {}).get("rope_theta"))
    legacy = target.get("rope_theta")
    if new is not None and legacy is not None and float(new) != float(legacy):
        raise UsageError(
            f"the target's config states rope_theta {legacy:g} and rope_parameters.rope_theta {new:g}; "
            "correct the target's config.json and capture again"
        )
    return float(next((theta for theta in (new, legacy) if theta is not None), 10_000.0))


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
        scaling = RopeScaling(rope_type=kind, **_scaling_fields(kind, parameters, target))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = str(first["msg"]).removeprefix("Value error, ")
        return None, f"{kind}, but " + (f"{where}: {message}, found {first['input']!r}" if where else message)
    usual, stated = scaling.attention_factor, parameters.get("attention_factor")
    if kind == "yarn" and not (stated is None or (isinstance(stated, int | float) and abs(stated - usual) <= 1e-6)):
        return None, f"yarn with attention_factor {stated} where {usual:g} is usual, which SGLang does not read"
    return scaling, None


def _scaling_fields(kind: str, parameters: dict, config: dict) -> dict:
    """Return the fields of `RopeScaling`. config: the whole text config, with lengths that the parameters may lack."""
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
    return fields


def rope_tables(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tables:
    """Return cos and sin [..., E / 2] of positions [...], in float32 whatever the draft's dtype.

    Serving engines compute them so: tables rounded to bfloat16 would drift from theirs with the position.
    """
    angles = positions.float()[..., None] * frequencies(head_dim, theta, scaling, positions.device)
    if scaling is None or scaling.attention_factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * scaling.attention_factor, angles.sin() * scaling.attention_factor


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | str = "cpu") -> Tensor:
    """Return the angle per position of each pair of channels, radians, float32 [E / 2]."""
    exponent_F = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    plain_F = 1.0 / theta**exponent_F
    if scaling is None:
        return plain_F
    if scaling.rope_type == "linear":
        return plain_F / scaling.factor
    keep_F = _kept_llama3(plain_F, scaling) if scaling.rope_type == "llama3" else _kept_yarn(plain_F, theta, scaling)
    return plain_F * keep_F + plain_F / scaling.factor * (1 - keep_F)


def _kept_llama3(plain_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the fraction [E / 2] of each frequency that is not scaled: 1 for fast pairs, which turn often within the
    original length, 0 for slow ones."""
    turns_F = scaling.original_max_position_embeddings * plain_F / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_F - low) / (high - low)).clamp(0, 1)


def _kept_yarn(plain_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Return the same by a ramp over the pairs (arXiv:2309.00071, equation 18), its ends rounded to whole pairs."""
    width = 2 * len(plain_F)

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings / (2 * math.pi * times)
        return width * math.log(length) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast or 32.0), pair_that_turns(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 * (first == last)
    pairs_F = torch.arange(len(plain_F), dtype=torch.float32, device=plain_F.device)
    return 1 - ((pairs_F - first) / (last - first)).clamp(0, 1)
