"""DSpark (arXiv:2607.05147): DFlash's parallel backbone with next-position labels, corrected by a Markov head that
reads the previous token, and a confidence head that predicts how likely each proposal is to be accepted. A rank of 0
leaves the Markov head out.

e is the embedding of the previous token, h the backbone's state; the corrected logits are head(h) + W2 z with

    vanilla   z = e
    gated     z = sigmoid(G [h ; e]) * e
    rnn       z = tanh(o), (a, c, o) = J [s ; e ; h], s' = sigmoid(a) s + (1 - sigmoid(a)) tanh(c), s = 0 at first

The confidence head learns `accept`, the probability that rejection sampling accepts a token sampled at the slot, as a
constant; its own gradient reaches the backbone and the embedding (DeepSpec's `loss.py`). Parameter names as published.

Over a draft vocabulary W1 has a row for every id of the target, as any may be the previous token, and W2 one for each
id that may be proposed; `accept` is then that of the target's distribution over these ids.

    N blocks   S slots   P proposals   D hidden size   U rank   V vocabulary   W ids that may be proposed
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, model_validator
from torch import Tensor, nn

from pipeline.drafts.block_draft import BlockDraft
from pipeline.drafts.blocks import Blocks
from pipeline.drafts.draft import Loss, ProbeBlock, PublishedKeys, Shapes
from pipeline.drafts.vocabulary import ReducesVocabulary, VocabularyConfig
from pipeline.errors import UsageError
from pipeline.matrix_products import Linear, linear
from pipeline.target.head import TargetHead
from pipeline.tensors import at_least_float32


class DSparkConfig(VocabularyConfig):
    """The options of DSpark. Raises UsageError for same-position labels, a confidence head without a loss, or a loss
    without the head."""

    scores_up_to_gap = True  # DeepSpec's `build_eval_mask`
    may_keep_position = False
    training_only = VocabularyConfig.training_only | {"alpha_confidence"}

    objective: str = "dspark"
    markov_rank: NonNegativeInt = 256  # 0: no Markov head
    markov_head_type: Literal["vanilla", "gated", "rnn"] = "vanilla"
    enable_confidence_head: bool
    confidence_head_with_markov: bool = False  # whether it reads the token before as well
    alpha_confidence: float | None = None  # weight of its loss; None without such a head

    @classmethod
    def defaults(cls, stated: dict) -> dict:
        objective = stated.get("objective", "dspark")
        # A confidence head learns from the target's final state, which plain cross-entropy has no need of.
        head = stated.get("enable_confidence_head", objective != "ce")
        own = {"objective": objective, "enable_confidence_head": head} | ({"alpha_confidence": 1.0} if head else {})
        return super().defaults(own) | own

    @property
    def final_reader(self) -> tuple[str, str] | None:
        head = ("the confidence head", "draft.enable_confidence_head = false") if self.has_confidence else None
        return super().final_reader or head

    @property
    def has_confidence(self) -> bool:
        return self.enable_confidence_head

    @model_validator(mode="after")
    def _check_heads(self):
        if not self.shift_label:
            raise UsageError("dspark guesses from the anchor on: its labels are next-position; set shift_label = true")
        if not self.markov_rank and self.markov_head_type != "vanilla":
            raise UsageError(
                f'markov_head_type "{self.markov_head_type}" means nothing with markov_rank 0, which leaves the head '
                "out; leave one of the two out"
            )
        if not self.markov_rank and self.confidence_head_with_markov:
            raise UsageError(
                "a confidence head with markov_rank 0 has no table to read; set confidence_head_with_markov = false, "
                "or a rank above 0"
            )
        if not self.enable_confidence_head:
            for name in ("alpha_confidence", "confidence_head_with_markov"):
                if getattr(self, name):
                    raise UsageError(
                        f"{name} = {getattr(self, name)} means nothing without a confidence head; "
                        "leave it out or set enable_confidence_head = true"
                    )
        elif not self.alpha_confidence or self.alpha_confidence < 0:
            raise UsageError(
                f"alpha_confidence {self.alpha_confidence} would leave the confidence head untrained; "
                "published is 1.0, or set enable_confidence_head = false"
            )
        return self


class MarkovHead(nn.Module):
    """The correction of a slot's logits by the previous token: W2 z."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.kind, rank, width = config.markov_head_type, config.markov_rank, config.hidden_size
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = Linear(rank, config.proposable, bias=False)
        if self.kind == "gated":
            self.gate_proj = Linear(width + rank, rank)
        if self.kind == "rnn":
            self.joint_proj = Linear(2 * rank + width, 3 * rank)

    def forward(self, hidden_NSD: Tensor, prev_NS: Tensor, state_NU: Tensor | None = None):
        """Return z [N, S, U] of consecutive slots and the state [N, U] after them (rnn only, else None)."""
        e_NSU = self.markov_w1(prev_NS)
        if self.kind == "vanilla":
            return e_NSU, None
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden_NSD, e_NSU], dim=-1))) * e_NSU, None
        return self._recur(hidden_NSD, e_NSU, state_NU)

    def _recur(self, hidden_NSD: Tensor, e_NSU: Tensor, state_NU: Tensor | None) -> tuple[Tensor, Tensor]:
        # The part that does not depend on the state is one matrix product for all slots.
        of_state, of_inputs = self.joint_proj.weight.split([e_NSU.shape[-1], e_NSU.shape[-1] + hidden_NSD.shape[-1]], 1)
        joint_NSJ = linear(torch.cat([e_NSU, hidden_NSD], dim=-1), of_inputs, self.joint_proj.bias)
        state_NU = torch.zeros_like(e_NSU[:, 0]) if state_NU is None else state_NU
        z = []
        for slot_NJ in joint_NSJ.unbind(1):
            keep_NU, new_NU, out_NU = (slot_NJ + linear(state_NU, of_state)).chunk(3, dim=-1)
            z.append(torch.tanh(out_NU))
            keep_NU = torch.sigmoid(keep_NU)
            state_NU = keep_NU * state_NU + (1 - keep_NU) * torch.tanh(new_NU)
        return torch.stack(z, dim=1), state_NU


class DSpark(ReducesVocabulary, BlockDraft):
    """The backbone, its Markov correction and, where configured, its confidence head."""

    Config = DSparkConfig
    title = "DSpark"
    paper = "2607.05147"
    published_fields: ClassVar = {"block_size": 7}
    published_sizes: ClassVar = {"markov_rank": 256}
    reads_final = True
    fused_matrices = ("joint_proj",)
    rows_of_ids = ("markov_head.markov_w2.weight",)
    architectures = ("Qwen3DSparkModel", "DSparkDraftModel", "DFlashDraftModel", "DSparkSpeculator")
    forms = ("sglang", "speculators", "deepspec")
    sglang = ("DSPARK", 1)  # its block holds proposals only, and the anchor is verified, too
    top_level = tuple(DSparkConfig.published_options())
    # Model-Optimizer has the head's parts at the top level; SpecForge's training checkpoints once nested them.
    renamed_tensors: ClassVar = {
        r"^logit_head\.(?=(markov_head|confidence_head)\.)": "",
        r"^(?=(markov_w1|markov_w2|gate_proj|joint_proj)\.)": "markov_head.",
        r"^confidence_proj\.": "confidence_head.proj.",
    }
    ignored_keys = frozenset(("confidence_head_alpha", "use_confidence_head"))

    def __init__(self, config: DSparkConfig, head: TargetHead):
        super().__init__(config, head)
        if config.markov_rank:
            self.markov_head = MarkovHead(config)
        if config.enable_confidence_head:
            rank = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = nn.ModuleDict({"proj": Linear(config.hidden_size + rank, 1)})

    def correction(self, hidden_NSD: Tensor, prev_NS: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `BlockDraft.correction`, on every slot."""
        if not self.config.markov_rank:
            return None
        return self.markov_head(hidden_NSD, prev_NS)[0], self.markov_head.markov_w2.weight

    def correction_step(self, k: int, hidden_ND: Tensor, last_N: Tensor, state_NU: Tensor | None):
        """As `BlockDraft.correction_step`; only the rnn has a state."""
        if not self.config.markov_rank:
            return None, None
        z_N1U, state_NU = self.markov_head(hidden_ND[:, None], last_N[:, None], state_NU)
        return (z_N1U[:, 0], self.markov_head.markov_w2.weight), state_NU

    def confidence(self, hidden_NSD: Tensor, prev_NS: Tensor) -> Tensor:
        """As `BlockDraft.confidence`, of the state and, where configured, the previous token's embedding."""
        if self.config.confidence_head_with_markov:
            hidden_NSD = torch.cat([hidden_NSD, self.markov_head.markov_w1(prev_NS)], dim=-1)
        logits_NS = self.confidence_head["proj"](hidden_NSD)[..., 0]
        return logits_NS.to(at_least_float32(logits_NS.dtype))

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """As `BlockDraft.denominators`, and the confidence loss's, which is the same."""
        dens = super().denominators(blocks)
        return dens | ({"confidence": next(iter(dens.values()))} if self.config.enable_confidence_head else {})

    def own_loss(self, hidden_NSD: Tensor, blocks: Blocks, per_slot: dict[str, Tensor], dens: dict) -> Loss | None:
        """Return the confidence head's cross-entropy against `accept`, with the other terms' weights."""
        if not self.config.enable_confidence_head:
            return None
        weights_NS, accept_NS = per_slot["weights"], per_slot["accept"]
        logits_NS = self.confidence(hidden_NSD, blocks.prev_NS)
        bce_NS = F.binary_cross_entropy_with_logits(logits_NS, accept_NS, reduction="none")
        numerator = (weights_NS * bce_NS).sum()
        total = self.config.alpha_confidence / dens["confidence"] * numerator
        # The error's weights are the loss's, as SpecForge and DeepSpec have it.
        error_NS = (logits_NS.detach().sigmoid() - accept_NS).abs().double()
        sums = {"confidence_error": (error_NS * weights_NS).sum(), "confidence_weight": weights_NS.double().sum()}
        return Loss(total, {"confidence": numerator.detach()}, sums)

    @classmethod
    def head_tensors(cls, config: DSparkConfig, proposed: int | None = None) -> Shapes:
        D, V, W = config.hidden_size, config.vocab_size, proposed or config.proposable
        rank, kind, shapes = config.markov_rank, config.markov_head_type, super().head_tensors(config, proposed)
        if rank:
            shapes |= {"markov_head.markov_w1.weight": (V, rank), "markov_head.markov_w2.weight": (W, rank)}
        if kind == "gated":
            shapes |= {"markov_head.gate_proj.weight": (rank, D + rank), "markov_head.gate_proj.bias": (rank,)}
        if kind == "rnn":
            shapes |= {
                "markov_head.joint_proj.weight": (3 * rank, 2 * rank + D),
                "markov_head.joint_proj.bias": (3 * rank,),
            }
        if config.enable_confidence_head:
            width = D + rank if config.confidence_head_with_markov else D
            shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
        return shapes

    @classmethod
    def reference_correction(
        cls, config: DSparkConfig, block: ProbeBlock, hidden_SD: Tensor
    ) -> tuple[Tensor | float, Tensor | None]:
        get, e_SU, bias_SC = block.get, None, 0.0
        if config.markov_rank:
            e_SU = get("markov_head.markov_w1.weight")[block.prev_S]
            read_SU = cls._reference_states(get, config.markov_head_type, hidden_SD, e_SU)
            rows_C = block.columns_C
            if config.vocabulary is not None:
                ids_W = get("d2t").long() + torch.arange(config.vocabulary)
                rows_C = (ids_W == rows_C[:, None]).long().argmax(-1)
            bias_SC = read_SU @ get("markov_head.markov_w2.weight")[rows_C].T
        if not config.enable_confidence_head:
            return bias_SC, None
        seen = torch.cat([hidden_SD, e_SU], -1) if config.confidence_head_with_markov else hidden_SD
        return bias_SC, (seen @ get("confidence_head.proj.weight").T + get("confidence_head.proj.bias"))[:, 0]

    @staticmethod
    def _reference_states(get, kind: str, hidden_SD: Tensor, e_SU: Tensor) -> Tensor:
        if kind == "gated":
            weight, bias = get("markov_head.gate_proj.weight"), get("markov_head.gate_proj.bias")
            return torch.sigmoid(torch.cat([hidden_SD, e_SU], -1) @ weight.T + bias) * e_SU
        if kind != "rnn":
            return e_SU
        weight, bias = get("markov_head.joint_proj.weight"), get("markov_head.joint_proj.bias")
        outs, state = [], torch.zeros_like(e_SU[0])
        for hidden_D, e_U in zip(hidden_SD, e_SU, strict=True):
            forget, new, out = (weight @ torch.cat([state, e_U, hidden_D]) + bias).chunk(3)
            outs.append(torch.tanh(out))
            state = torch.sigmoid(forget) * state + (1 - torch.sigmoid(forget)) * torch.tanh(new)
        return torch.stack(outs)

    @classmethod
    def publishes(cls, keys: PublishedKeys) -> bool:
        """As `Draft.publishes`; without any head DeepSpec's class holds its baseline, the bare backbone."""
        confidence = keys.find("enable_confidence_head", cls.absent(keys)["enable_confidence_head"])
        return keys.deepspec and bool(keys.find("markov_rank", 1) or confidence)

    @classmethod
    def absent(cls, keys: PublishedKeys) -> dict:
        """As `Draft.absent`: SpecForge once let the weight of its loss say whether there is a confidence head;
        Model-Optimizer's always reads the token before, and has no key that says so."""
        weighted = bool(keys.find("confidence_head_alpha", 0))
        confidence = keys.find("use_confidence_head", None)
        own = {
            "shift_label": True,
            "enable_confidence_head": weighted if confidence is None else confidence,
            "confidence_head_with_markov": bool(confidence),
        } | ({"markov_head_type": "vanilla"} if keys.find("markov_rank", 1) == 0 else {})
        return super().absent(keys) | own

    @classmethod
    def read_options(cls, keys: PublishedKeys) -> dict:
        """As `Draft.read_options`; the kind of a head that is not there means nothing."""
        options = super().read_options(keys)
        if options["markov_rank"] == 0:
            options["markov_head_type"] = "vanilla"
        options["confidence_head_with_markov"] &= options["enable_confidence_head"]
        return options

    @classmethod
    def write_options(cls, config: DSparkConfig, form: str) -> tuple[dict, dict]:
        """As `Draft.write_options`; vLLM seeks the ids of the flat form at the top level, too."""
        flat, nested = super().write_options(config, form)
        if form == "speculators":
            return flat, nested
        ids = {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.target_layer_ids)}
        grouped = config.num_key_value_heads < config.num_attention_heads
        return flat | ids, nested | {"attention_mode": "gqa" if grouped else "mha"}

    @classmethod
    def refusal(cls, config: DSparkConfig, form: str) -> str | None:
        if form == "speculators" and config.markov_head_type != "vanilla":
            export = "export it with --format sglang, or " if config.vocabulary is None else ""
            return (
                f"vLLM computes the vanilla Markov head only, this draft has markov_head_type "
                f'"{config.markov_head_type}"; {export}train one with "vanilla"'
            )
        return super().refusal(config, form)

    @classmethod
    def card_rows(cls, config: DSparkConfig) -> list[tuple[str, str]]:
        confidence = "with" if config.enable_confidence_head else "without"
        markov = f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none"
        return [("Markov head", f"{markov}, {confidence} confidence head"), *super().card_rows(config)]

    @classmethod
    def card_notes(cls, config: DSparkConfig, form: str) -> list[str]:
        if form == "deepspec":
            return []
        if form == "speculators":
            builds = "vLLM has to heed `sample_from_anchor`; builds that take it for false accept nothing"
            if config.vocabulary is not None:  # which only this form has
                return [f"{builds}."]
            return [f"{builds}, and serve", "the same draft exported with `--format sglang`."]
        notes = []
        if config.markov_rank == 0:
            notes.append(
                "SGLang has so far refused `markov_rank` 0, which DeepSpec's and SpecForge's own decoding takes."
            )
        if not config.enable_confidence_head:
            notes.append("Without a confidence head SGLang serves it in its default, static verify mode only.")
        return notes
