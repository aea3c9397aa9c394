"""What every method is: a backbone, the target's frozen head, and the two ways to run them, training and decoding.

N blocks   S slots   K layers   T new rows   R context rows   D hidden size   P proposals   V vocabulary
U rank of a correction
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.drafts.attention import Decode, Dense, Grouped
from pipeline.drafts.backbone import Backbone
from pipeline.drafts.blocks import Blocks, Cell
from pipeline.drafts.config import DraftConfig, needs_teacher
from pipeline.drafts.decoding import Ask, DraftKV, Proposal, Sampling
from pipeline.drafts.losses import head_loss
from pipeline.drafts.metrics import slot_sums
from pipeline.drafts.norm_and_rope import wide
from pipeline.drafts.objectives import Objective, Teacher, dpace_weights, parts_of, term
from pipeline.errors import DataError, UsageError
from pipeline.sampling import draw, uniforms
from pipeline.target.head import TargetHead
from pipeline.target.logit_chunks import NEWEST, chunk_blocks


@dataclass(frozen=True)
class Knobs:
    """What a schedule turns from step to step."""

    lambda_base: float = 0.0  # weight of the base logits' loss


@dataclass(frozen=True)
class Loss:
    """One cell's share of a global batch's loss.

    total: sum over terms of coefficient * numerator / global denominator; shares of cells add up. terms: the
    numerators, detached. sums: additive metric sums (`metrics.py`), empty unless asked for.
    """

    total: Tensor
    terms: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)


class Draft(Backbone):
    """A backbone with the target's head. A method adds `check`; one that reads the tokens already chosen also
    `correction` (all slots at once, in training) and `advance` (slot by slot).

    The head is no part of the state_dict, whose keys are exactly those of published checkpoints. `reads_final` says
    whether the published loss reads the target's final state (`needs_teacher` knows of any); the accept length always
    does. `chunk_rule` is the rule of `target/logit_chunks.py` by which its logits are cut.
    """

    reads_final = False
    chunk_rule = NEWEST

    def __init__(self, config: DraftConfig, head: TargetHead):
        if (config.vocab_size, config.hidden_size) != (head.vocab_size, head.hidden_size):
            raise UsageError(
                f"the draft has vocabulary {config.vocab_size} and width {config.hidden_size}, the target's head "
                f"{head.vocab_size} and {head.hidden_size}; take both from the cache the draft is trained on"
            )
        super().__init__(config)
        self.target = head

    def hidden(self, cell: Cell, blocks: Blocks, dense: bool = False) -> Tensor:
        """States [N, S, D] of every slot in the training layout, final norm applied.

        `dense` takes the reference path, one mask over all keys; it is quadratic in the cell.
        """
        if dense:
            attention = Dense(blocks, len(cell.ids_R), self.windows)
        else:
            attention = Grouped(blocks, self.windows)
        memory = self.context_keys_values(cell.aux_KRD, cell.pos_R)
        noise_QD = self._noise(blocks.noise_ids_NS.flatten())
        out_QD = self.slots(noise_QD, blocks.positions_NS.flatten(), memory, attention)
        return out_QD.unflatten(0, blocks.noise_ids_NS.shape)

    def _noise(self, ids: Tensor) -> Tensor:
        return self.target.embed(ids).to(self.fc.weight.dtype)

    def schedule(self, step: int, total_steps: int) -> Knobs:
        """What changes over a run: nothing. step: optimizer steps completed, of `total_steps`."""
        return Knobs()

    def kinds(self, knobs: Knobs) -> dict[str, float]:
        """The kinds of logits that are trained, with their weights."""
        return {"final": 1.0}

    def correction(self, hidden_NSD: Tensor, prev_NS: Tensor) -> tuple[Tensor, Tensor] | None:
        """What is added to the head's logits: (z [N, S, U], W_out [V, U]), from the true token before each label."""
        return None

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """This cell's share of each term's global denominator: the weights' sum, or the samples for D-PACE."""
        share = blocks.weights_NS.double().sum()
        if self.config.weighting != "decay":
            share = torch.tensor(len(blocks.lengths), dtype=torch.float64, device=share.device)
        return {term(kind, part): share for kind in self.kinds(Knobs()) for part in parts_of(self.config)}

    def loss(self, cell: Cell, blocks: Blocks, knobs: Knobs, dens: dict, metrics: bool = False) -> Loss:
        """Every term of the objective over its global denominator. At lambda 1 a causal head's gradient is 0, not None.

        DataError when the objective reads final states and the cell has none.
        """
        objective = self.objective(cell, blocks, knobs, dens, metrics)
        hidden_NSD = self.hidden(cell, blocks)
        total = self.head_loss(hidden_NSD, blocks, objective)
        return Loss(total, objective.numerators, slot_sums(objective.slots(), blocks.scored_NS) if metrics else {})

    def head_loss(self, hidden_NSD: Tensor, blocks: Blocks, objective: Objective) -> Tensor:
        """Total loss of the head's logits, corrected where the method corrects them, chunk by chunk."""
        correction = self.correction(hidden_NSD, blocks.prev_NS)
        return head_loss(hidden_NSD, self.target, objective, correction, self.blocks_at_once(hidden_NSD))

    def blocks_at_once(self, hidden_NSD: Tensor) -> int:
        """How many blocks of these have their logits at once."""
        return chunk_blocks(hidden_NSD.shape[1], self.target.vocab_size, hidden_NSD.device.type, self.chunk_rule)

    def objective(self, cell: Cell, blocks: Blocks, knobs: Knobs, dens: dict, metrics: bool) -> Objective:
        """The configured objective on these blocks; nothing is computed yet."""
        parts = parts_of(self.config)
        scales = {
            kind: {part: weight * share / dens[term(kind, part)] for part, share in parts.items()}
            for kind, weight in self.kinds(knobs).items()
        }
        teacher = _teacher(cell, blocks, self.config) if needs_teacher(self.config) else None
        confident = bool(self.config.enable_confidence_head)
        return Objective(
            blocks.labels_NS, self._weigh(blocks), scales, self.config.objective, teacher, confident, metrics
        )

    def _weigh(self, blocks: Blocks):
        kind, alpha = self.config.weighting, self.config.dpace_alpha
        if kind == "decay":
            return lambda part, ce_NS: blocks.weights_NS[part]
        return lambda part, ce_NS: dpace_weights(ce_NS, blocks.scored_NS[part], alpha, kind)

    def logits(self, hidden_NSD: Tensor, prev_NS: Tensor) -> dict[str, Tensor]:
        """All teacher-forced logits [N, S, V] at once, "final" and where they are corrected also "base": for probes
        and tests of a few blocks."""
        raw_NSV = self.target.raw_logits(hidden_NSD)
        base_NSV = raw_NSV.to(wide(raw_NSV.dtype))
        correction = self.correction(hidden_NSD, prev_NS)
        if correction is None:
            return {"final": self.target.cap(base_NSV)}
        added_NSV = nn.functional.linear(*correction).to(base_NSV.dtype)
        return {"base": self.target.cap(base_NSV), "final": self.target.cap(base_NSV + added_NSV)}

    def new_kv(self) -> DraftKV:
        return DraftKV()

    @torch.no_grad()
    def block_hidden(self, asks: Sequence[Ask]) -> Tensor:
        """States [N, S, D] of one block of each text at decode time.

        Slot k sits at start + k; the blocks' own keys are dropped afterwards.
        """
        device, S = self.fc.weight.device, self.config.block_size
        self._remember(asks, device)
        ids_NS = torch.full((len(asks), S), self.config.mask_token_id, device=device)
        ids_NS[:, 0] = torch.tensor([ask.anchor_id for ask in asks], device=device)
        starts = [ask.start for ask in asks]
        positions_NS = torch.tensor(starts, device=device)[:, None] + torch.arange(S, device=device)
        memory = list(zip(*(ask.kv.layers() for ask in asks), strict=True))
        attention = Decode(S, starts, device)
        return self.slots(self._noise(ids_NS.flatten()), positions_NS.flatten(), memory, attention).unflatten(
            0, (-1, S)
        )

    def _remember(self, asks: Sequence[Ask], device: torch.device) -> None:
        """Add the keys and values of what was verified to each text's memory, computed for all at once."""
        for ask in asks:
            K, T, _ = ask.features_KTD.shape
            held = ask.kv.length
            assert held + T == ask.start, f"kv holds {held} positions and {T} came, for an anchor at {ask.start}"
            assert len(self.config.target_layer_ids) == K, f"{K} layers for {self.config.target_layer_ids}"
        fresh = [ask for ask in asks if ask.start > ask.kv.length]
        if not fresh:
            return
        counts = [ask.start - ask.kv.length for ask in fresh]
        positions_R = torch.cat([torch.arange(ask.kv.length, ask.start, device=device) for ask in fresh])
        features_KRD = torch.cat([ask.features_KTD.to(device) for ask in fresh], dim=1)
        layers = self.context_keys_values(features_KRD, positions_R)
        parts = [list(zip(k.split(counts, dim=1), v.split(counts, dim=1), strict=True)) for k, v in layers]
        for ask, of_text in zip(fresh, zip(*parts, strict=True), strict=True):
            ask.kv.append(of_text)

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask], sampling: Sampling | None = None, threshold: float = 0.0) -> list[Proposal]:
        """Guess, for each text, the tokens at positions start + 1 .. start + P, greedily or drawn.

        threshold: cut each block before the first token whose confidence is below it; 0 keeps all.
        """
        hidden_NSD = self.block_hidden(asks)
        anchors_N = torch.tensor([ask.anchor_id for ask in asks], device=hidden_NSD.device)
        ids_NP, logits_NPV = self.roll(hidden_NSD, anchors_N, sampling)
        kept = [ids_NP.shape[1]] * len(asks)
        if threshold > 0:
            kept = self.kept(hidden_NSD, anchors_N, ids_NP, threshold).tolist()
        if sampling is None:
            return [Proposal(ids_P[:count], None) for ids_P, count in zip(ids_NP, kept, strict=True)]
        return [
            Proposal(ids_P[:count], self.chances(logits_PV[:count], sampling.temperature))
            for ids_P, logits_PV, count in zip(ids_NP, logits_NPV, kept, strict=True)
        ]

    @torch.no_grad()
    def rollout(self, hidden_NSD: Tensor, anchor_ids_N: Tensor) -> Tensor:
        """Greedy proposals [N, P] in order, each corrected by those before it, exactly, over the whole vocabulary."""
        blocks = self.blocks_at_once(hidden_NSD[:, self.config.first_slot :])
        parts = zip(hidden_NSD.split(blocks), anchor_ids_N.split(blocks), strict=True)
        return torch.cat([self.roll(hidden, anchors)[0] for hidden, anchors in parts])

    def roll(
        self,
        hidden_NSD: Tensor,
        anchor_ids_N: Tensor,
        sampling: Sampling | None = None,
        forced_NP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Proposals [N, P] one after the other and the uncapped logits [N, P, V] each was taken from.

        forced_NP: tokens to go on from instead of the proposals, as teacher forcing does.
        """
        guessing_NPD = hidden_NSD[:, self.config.first_slot :]
        logits_NPV = self.target.raw_logits(guessing_NPD)  # one multiplication for all proposals
        proposals_NP = torch.empty(guessing_NPD.shape[:2], dtype=torch.long, device=hidden_NSD.device)
        last_N, state = anchor_ids_N, None
        for k in range(self.config.proposals):
            correction, state = self.advance(k, guessing_NPD[:, k], last_N, state)
            if correction is not None:
                z_NU, out_VU = (part.to(logits_NPV.dtype) for part in correction)
                logits_NPV[:, k] = torch.addmm(logits_NPV[:, k], z_NU, out_VU.T)
            proposals_NP[:, k] = self._pick(logits_NPV[:, k], sampling)
            last_N = proposals_NP[:, k] if forced_NP is None else forced_NP[:, k]
        return proposals_NP, logits_NPV

    def _pick(self, raw_NV: Tensor, sampling: Sampling | None) -> Tensor:
        if sampling is None:
            return raw_NV.argmax(-1)
        chances_NV = self.chances(raw_NV, sampling.temperature)
        return draw(chances_NV, torch.cat([uniforms(1, generator) for generator in sampling.generators]))

    def chances(self, raw_NV: Tensor, temperature: float) -> Tensor:
        """Probabilities [..., V] of uncapped logits at a temperature, in float32 at least."""
        return (self.target.cap(raw_NV.to(wide(raw_NV.dtype))) / temperature).softmax(-1)

    def advance(self, k: int, hidden_ND: Tensor, last_N: Tensor, state):
        """Return the correction (z [N, U], W_out [V, U]) of proposal k, None for no correction, and the next state.

        last_N: the token before it; `state` is None for the first one.
        """
        return None, None

    def kept(self, hidden_NSD: Tensor, anchor_ids_N: Tensor, ids_NP: Tensor, threshold: float) -> Tensor:
        """How many of the proposals [N] come before the first with a confidence below the threshold."""
        raise UsageError(
            f"a {self.config.method} draft without a confidence head cannot cut its blocks at {threshold}; "
            "leave the threshold out"
        )


def _teacher(cell: Cell, blocks: Blocks, config: DraftConfig) -> Teacher:
    if cell.final_FD is None or cell.final_at_R is None:
        raise DataError(
            f"objective {config.objective!r} of {config.method} learns from the target's final states, and "
            f'{cell.names[0]} came without them; read the cache\'s column `final`, or set draft.objective = "ce"'
        )
    return Teacher(cell.final_FD, torch.where(blocks.scored_NS, cell.final_at_R[blocks.teacher_NS], 0))


def init_weights(draft: Draft, seed: int) -> None:
    """Fill all parameters as Hugging Face would: N(0, initializer_range), biases 0, norms 1; a GRU as PyTorch does.

    Drawn on the CPU in the order of the parameters' names, so that every device starts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in sorted(draft.named_modules(), key=lambda named: named[0]):
            for kind, weight in module.named_parameters(recurse=False):
                weight.copy_(_fresh(module, kind, weight.shape, draft.config.initializer_range, generator))


def _fresh(module: nn.Module, kind: str, shape: torch.Size, spread: float, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.GRU):
        bound = 1 / math.sqrt(module.hidden_size)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if isinstance(module, nn.Linear | nn.Embedding) and kind == "weight":
        return torch.empty(shape).normal_(0, spread, generator=generator)
    return torch.zeros(shape) if kind == "bias" else torch.ones(shape)
