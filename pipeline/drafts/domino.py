"""Domino (arXiv:2605.29707): DFlash's parallel backbone, corrected by a small causal head that reads the tokens
already chosen inside the block.

A GRU reads the target's embeddings of the tokens from the anchor on; from its state g and the backbone's h, a
bottleneck of rank U gives z = SiLU(W1 [h ; g]), and the corrected logits are head(h) + W2 z. The first
`pure_draft_prefix_len` proposals are not corrected.

    N blocks   S slots   D hidden size   H width of the GRU   U rank   V vocabulary
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.drafts.block_draft import BlockDraft
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.draft import ProbeBlock, PublishedKeys, Shapes
from pipeline.errors import UsageError
from pipeline.matrix_products import Linear, linear, product
from pipeline.target.head import TargetHead
from pipeline.tensors import at_least_float32, product_dtype


class DominoConfig(DraftConfig):
    """The options of Domino. Raises UsageError for a causal head that would have no proposal to correct."""

    training_only = DraftConfig.training_only | {"lambda_start", "lambda_decay"}

    pure_draft_prefix_len: NonNegativeInt  # proposals left to the backbone
    emb_dim: PositiveInt  # rank of the correction
    gru_hidden_dim: PositiveInt
    lambda_start: float = Field(1.0, ge=0, le=1)
    lambda_decay: float = Field(1.0, ge=0, le=1)  # share of the run's steps over which lambda falls to 0

    @model_validator(mode="after")
    def _check_prefix(self):
        most = self.proposals - 1
        if self.pure_draft_prefix_len > most:
            raise UsageError(
                f"pure_draft_prefix_len {self.pure_draft_prefix_len} leaves the causal head nothing to correct; "
                f"use 0..{most} with blocks of {self.block_size} and shift_label {self.shift_label}"
            )
        return self


class PrefixGRU(nn.Module):
    """A GRU without biases, its parameters named as torch's.

    Written out because autocast runs torch's GRU on CUDA in float16, whatever dtype it is asked for: at the width of an
    8B target 69 to 100 % of its gradient is then below float16's smallest number, and the head never learns. Here only
    the matrix products are in the autocast dtype, all inputs' in one; gates and state are in float32 at least.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.size = size
        self.init_bound = 1 / math.sqrt(size)
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * size, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * size, size))

    def forward(self, x_NPD: Tensor, state_NH: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the states [N, P, H] after each of P tokens, in the dtype of the products, and the last one [N, H].

        state: the one before the first token, 0 if None; it gets no gradient. Nor does x, which is frozen.
        """
        dtype = product_dtype(x_NPD)
        if state_NH is None:
            state_NH = x_NPD.new_zeros(len(x_NPD), self.size, dtype=at_least_float32(x_NPD.dtype))
        with torch.autocast(x_NPD.device.type, enabled=False):
            return _Recurrence.apply(x_NPD.to(dtype), state_NH, self.weight_ih_l0, self.weight_hh_l0)


class _Recurrence(torch.autograd.Function):
    """r, z = sigmoid(W_ih x + W_hh h), n = tanh(W_ih x + r * W_hh h), h' = n + z * (h - n).

    The weights' gradients are one product each over all tokens, made at the end; autograd's would be one a token.
    """

    @staticmethod
    def forward(ctx, x_NPD, state_NH, w_in, w_state):
        H, dtype = state_NH.shape[1], x_NPD.dtype
        from_state_HJ = w_state.to(dtype).T
        states, gates, news, from_states = [state_NH], [], [], []
        for input_NJ in linear(x_NPD, w_in.to(dtype)).unbind(1):
            state_NJ = product(states[-1].to(dtype), from_state_HJ)
            gates.append(torch.add(input_NJ[:, : 2 * H], state_NJ[:, : 2 * H]).to(state_NH.dtype).sigmoid_())
            reset_NH, keep_NH = gates[-1].chunk(2, -1)
            from_states.append(state_NJ[:, 2 * H :].to(state_NH.dtype))
            news.append(torch.addcmul(input_NJ[:, 2 * H :].to(state_NH.dtype), reset_NH, from_states[-1]).tanh_())
            states.append(torch.lerp(news[-1], states[-1], keep_NH))
        ctx.save_for_backward(x_NPD, w_in, w_state, *states, *gates, *news, *from_states)
        ctx.mark_non_differentiable(states[-1])
        return torch.stack(states[1:], 1).to(dtype), states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NPH, _):
        x_NPD, w_in, w_state, *saved = ctx.saved_tensors
        (N, P, H), dtype = grad_NPH.shape, x_NPD.dtype
        states, gates, news, from_states = saved[: P + 1], saved[P + 1 : 2 * P + 1], saved[2 * P + 1 : -P], saved[-P:]
        w_state_JH = w_state.to(dtype)
        d_input_NPJ = x_NPD.new_empty(N, P, 3 * H)  # by W_ih x
        d_state_NPJ = x_NPD.new_empty(N, P, 3 * H)  # by W_hh h, which differs in n alone
        d_NH = torch.zeros_like(states[0])
        for token in reversed(range(P)):
            reset_NH, keep_NH = gates[token].chunk(2, -1)
            new_NH = news[token]
            d_NH = d_NH + grad_NPH[:, token]
            d_keep_NH = d_NH * (states[token] - new_NH) * keep_NH * (1 - keep_NH)
            d_new_NH = d_NH * (1 - keep_NH) * (1 - new_NH * new_NH)
            d_reset_NH = d_new_NH * from_states[token] * reset_NH * (1 - reset_NH)
            d_input_NPJ[:, token] = torch.cat([d_reset_NH, d_keep_NH, d_new_NH], -1)
            d_state_NPJ[:, token] = torch.cat([d_reset_NH, d_keep_NH, d_new_NH * reset_NH], -1)
            d_NH = d_NH * keep_NH + product(d_state_NPJ[:, token], w_state_JH)
        before_NPH = torch.stack(states[:-1], 1).to(dtype)
        d_in = product(d_input_NPJ.flatten(0, 1).T, x_NPD.flatten(0, 1))
        d_w_state = product(d_state_NPJ.flatten(0, 1).T, before_NPH.flatten(0, 1))
        return None, None, d_in.to(w_in.dtype), d_w_state.to(w_state.dtype)


class Domino(BlockDraft):
    """The backbone and its causal correction."""

    Config = DominoConfig
    title = "Domino"
    paper = "2605.29707"
    published_fields: ClassVar = {"pure_draft_prefix_len": 1}
    published_sizes: ClassVar = {"emb_dim": 256, "gru_hidden_dim": 1024}
    architectures = ("DFlashDraftModel", "DominoDraftModel")
    sglang = ("DFLASH", 0)
    head_name = "causal head"
    top_level = ("emb_dim",)
    # SpecForge's training checkpoints once nested the head's parts.
    renamed_tensors: ClassVar = {r"^logit_head\.(?=(prefix_gru|embed_proj)\.)": ""}

    def __init__(self, config: DraftConfig, head: TargetHead):
        super().__init__(config, head)
        width, gru, rank = config.hidden_size, config.gru_hidden_dim, config.emb_dim
        self.prefix_gru = PrefixGRU(width, gru)
        self.embed_proj = nn.Sequential(
            Linear(width + gru, rank, bias=False), nn.SiLU(), Linear(rank, config.vocab_size, bias=False)
        )

    def schedule(self, step: int, total_steps: int) -> dict[str, float]:
        """Return lambda, which decays linearly from its start to 0 over `lambda_decay` of the run's steps.

        step: optimizer steps completed. Raises UsageError without `total_steps`, where lambda would silently be 0.
        """
        if not total_steps or total_steps < 1:
            raise UsageError(f"lambda needs the number of steps of the whole run, found {total_steps}; set train.steps")
        span = max(1, int(total_steps * self.config.lambda_decay))
        return {"lambda_base": self.config.lambda_start * (1 - min(step / span, 1))}

    def logit_kinds(self, scheduled: dict[str, float]) -> dict[str, float]:
        """Return the weights of the corrected and the base logits: 1 - lambda and lambda."""
        base = scheduled.get("lambda_base", 0.0)
        return {"final": 1 - base, "base": base}

    def correction(self, hidden_NSD: Tensor, prev_NS: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockDraft.correction`; z is 0 on the slots that are not corrected.

        The GRU's state for slot k has read the tokens from the anchor to the one before slot k's label.
        """
        prefix = self.config.pure_draft_prefix_len
        first = self.config.first_slot + prefix
        states_NPH, _ = self.prefix_gru(self._embed(prev_NS[:, : self.config.proposals]))
        z_NSU = self._mix(hidden_NSD[:, first:], states_NPH[:, prefix:])
        return F.pad(z_NSU, (0, 0, first, 0)), self.embed_proj[2].weight

    def _mix(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Return the bottleneck of [backbone state ; GRU state], in the published order."""
        return self.embed_proj[1](self.embed_proj[0](torch.cat([hidden, state], dim=-1)))

    def correction_step(self, k: int, hidden_ND: Tensor, last_N: Tensor, state_NH: Tensor | None):
        """As `BlockDraft.correction_step`; the state is the GRU's, and the first proposals are not corrected."""
        states_N1H, state_NH = self.prefix_gru(self._embed(last_N)[:, None], state_NH)
        if k < self.config.pure_draft_prefix_len:
            return None, state_NH
        return (self._mix(hidden_ND, states_N1H[:, 0]), self.embed_proj[2].weight), state_NH

    @classmethod
    def head_tensors(cls, config: DominoConfig, proposed: int | None = None) -> Shapes:
        D, gru, rank = config.hidden_size, config.gru_hidden_dim, config.emb_dim
        return {
            "prefix_gru.weight_ih_l0": (3 * gru, D),
            "prefix_gru.weight_hh_l0": (3 * gru, gru),
            "embed_proj.0.weight": (rank, D + gru),
            "embed_proj.2.weight": (proposed or config.vocab_size, rank),
        }

    @classmethod
    def reference_correction(
        cls, config: DominoConfig, block: ProbeBlock, hidden_SD: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return W2 silu(W1 [h ; g]), g the GRU's state after the tokens up to the one before the slot's guess.

        Labels at their own position have slot 0 as the anchor: slot k then reads the state that slot k - 1 would else.
        """
        w_in, w_state = block.get("prefix_gru.weight_ih_l0"), block.get("prefix_gru.weight_hh_l0")
        first = config.pure_draft_prefix_len + (0 if config.shift_label else 1)
        states, state = [], torch.zeros(config.gru_hidden_dim)
        for embedded_D in block.prev_SD:
            r_in, z_in, n_in = (w_in @ embedded_D).chunk(3)
            r_old, z_old, n_old = (w_state @ state).chunk(3)
            z = torch.sigmoid(z_in + z_old)
            state = (1 - z) * torch.tanh(n_in + torch.sigmoid(r_in + r_old) * n_old) + z * state
            states.append(state)
        if not config.shift_label:
            states = [torch.zeros_like(state), *states[:-1]]
        mixed = F.silu(torch.cat([hidden_SD, torch.stack(states)], -1) @ block.get("embed_proj.0.weight").T)
        out_SC = mixed @ block.get("embed_proj.2.weight")[block.columns_C].T
        out_SC[:first] = 0
        return out_SC, None

    @classmethod
    def absent(cls, keys: PublishedKeys) -> dict:
        """As `Draft.absent`: SpecForge's own class, with its defaults."""
        specforge = keys.architectures == ("DominoDraftModel",)
        return {"shift_label": False, "pure_draft_prefix_len": 0} if specforge else {}

    @classmethod
    def refusal(cls, config: DominoConfig, form: str) -> str | None:
        if form == "sglang" and not (config.shift_label and config.pure_draft_prefix_len == 1):
            return (
                f"SGLang serves Domino with shift_label true and pure_draft_prefix_len 1 only, this draft has "
                f"{str(config.shift_label).lower()} and {config.pure_draft_prefix_len}; train one with these"
            )
        return super().refusal(config, form)

    @classmethod
    def card_rows(cls, config: DominoConfig) -> list[tuple[str, str]]:
        return [(cls.head_name, f"GRU of {config.gru_hidden_dim}, rank {config.emb_dim}")]

    @classmethod
    def card_notes(cls, config: DominoConfig, form: str) -> list[str]:
        return [
            "SGLang has to know Domino; older builds pass over its head without a word. Greedy drafts only,",
            f"and {config.proposals - 1} proposals a block, where the figures below have {config.proposals};",
            f"`pipeline evaluate --proposals {config.proposals - 1}` measures that.",
        ]
