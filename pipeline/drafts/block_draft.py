"""The base of methods that predict blocks: the backbone and the target's frozen head, in training and in decoding.

N blocks   S slots   K layers   T new rows   R context rows   D hidden size   P proposals   V vocabulary
U rank of a correction
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.drafts.backbone import Backbone, DecodeAttention, DraftKV, GroupedAttention, backbone_shapes
from pipeline.drafts.blocks import Blocks, Cell, dpace_weights
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.draft import BlockRequest, Draft, Loss, ProbeBlock, Proposal, Sampling, Shapes
from pipeline.drafts.flex import FlexAttention
from pipeline.drafts.fused import compiles
from pipeline.drafts.head_loss import HeadLoss
from pipeline.drafts.objectives import Objective, TargetStates, slot_sums, term_name
from pipeline.drafts.vocabulary import missed
from pipeline.errors import DataError, UsageError
from pipeline.matrix_products import write_product
from pipeline.target.head import TargetHead, chunk_blocks
from pipeline.tensors import at_least_float32, draw, uniforms


class BlockDraft(Backbone, Draft):
    """The backbone with the target's head. One whose logits depend on the tokens already chosen adds `correction` (all
    slots at once, in training) and `correction_step` (slot by slot, in decoding), and for its published form
    `head_tensors` and `reference_correction`.
    """

    architectures = ("DFlashDraftModel",)  # of every method that SGLang reads by its projector_type
    forms = ("sglang",)
    attention = GroupedAttention  # in training

    def __init__(self, config: DraftConfig, head: TargetHead):
        if (config.vocab_size, config.hidden_size) != (head.vocab_size, head.hidden_size):
            raise UsageError(
                f"the draft has vocabulary {config.vocab_size} and width {config.hidden_size}, the target's head "
                f"{head.vocab_size} and {head.hidden_size}; take both from the cache the draft is trained on"
            )
        super().__init__(config)
        self.target = head

    def hidden(self, cell: Cell, blocks: Blocks) -> Tensor:
        """Return the states [N, S, D] of every slot in training, final norm applied."""
        embedded_QD, positions_Q = self._embed(blocks.input_ids_NS.flatten()), blocks.positions_NS.flatten()
        attention = (FlexAttention if self.training and compiles(self.device) else self.attention)(blocks, self.windows)
        out_QD = self.slot_states(embedded_QD, positions_Q, cell.aux_KRD, cell.pos_R, attention)
        return out_QD.unflatten(0, blocks.input_ids_NS.shape)

    def embedded_ids(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        return blocks.input_ids_NS, blocks.prev_NS

    @property
    def head(self) -> TargetHead:
        """The target's head at the ids that may be proposed, all by default; W is their number."""
        return self.target

    def learned(self, blocks: Blocks) -> Blocks:
        """Return blocks whose labels are rows of `head`; what it has no row for is neither scored nor weighted."""
        return blocks

    def target_ids(self, ids: Tensor) -> Tensor:
        """Return the target's ids of rows of `head`."""
        return ids

    def over_vocabulary(self, values: Tensor, rest: float) -> Tensor:
        """Return values [..., W] of the rows of `head` as [..., V], `rest` where it has none."""
        return values

    def _embed(self, ids: Tensor) -> Tensor:
        return self.target.embed(ids).to(self.fc.weight.dtype)

    def logit_kinds(self, scheduled: dict[str, float]) -> dict[str, float]:
        """Return the weight of each kind of logits in the loss: "final", and "base" where they are corrected."""
        return {"final": 1.0}

    def correction(self, hidden_NSD: Tensor, prev_NS: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the low-rank correction of the head's logits, (z [N, S, U], W_out [W, U]) for z W_out^T, or None.

        prev_NS: the true token before each label.
        """
        return None

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """Return each term's denominator from one cell, to be summed: the weights' sum, or for D-PACE the samples."""
        blocks = self.learned(blocks)
        den = blocks.weights_NS.double().sum()
        if self.config.weighting != "decay":
            den = den.new_full((), len(blocks.lengths))
        kinds, terms = self.logit_kinds({}), self.config.term_weights
        return {term_name(kind, term): den for kind in kinds for term in terms}

    def loss(self, cell: Cell, blocks: Blocks, scheduled: dict[str, float], dens: dict, metrics: bool = False) -> Loss:
        """As `Draft.loss`. Where the corrected logits weigh nothing, their head's gradient is 0, not None."""
        learned = self.learned(blocks)
        objective = self.objective(cell, learned, scheduled, dens, metrics)
        hidden_NSD = self.hidden(cell, blocks)
        z_NSU, out_VU = self.correction(hidden_NSD, blocks.prev_NS) or (None, None)
        chunk = self.blocks_per_chunk(hidden_NSD)
        with self.clock.phase("head"):
            total = HeadLoss.apply(hidden_NSD, z_NSU, out_VU, self.head, objective, chunk)
        terms, per_slot = objective.numerators, objective.slot_values()
        if learned is not blocks:
            per_slot = missed(per_slot, learned.scored_NS)
        sums = slot_sums(per_slot, blocks.scored_NS) if metrics else {}
        own = self.own_loss(hidden_NSD, blocks, per_slot, dens)
        if own is None:
            return Loss(total, terms, sums)
        return Loss(total + own.total, terms | own.terms, sums | own.sums if metrics else {})

    def own_loss(self, hidden_NSD: Tensor, blocks: Blocks, per_slot: dict[str, Tensor], dens: dict) -> Loss | None:
        """Return the loss of the method's own modules beside the logits', None without any.

        per_slot: what the objective recorded for every slot. dens: as of `loss`.
        """
        return None

    def blocks_per_chunk(self, hidden_NSD: Tensor) -> int:
        """Return how many of these blocks have their logits in memory at once."""
        return chunk_blocks(hidden_NSD.shape[1], self.head.vocab_size, hidden_NSD.device.type, self.chunk_rule)

    def objective(
        self, cell: Cell, blocks: Blocks, scheduled: dict[str, float], dens: dict, metrics: bool
    ) -> Objective:
        """Return the configured objective on these blocks; nothing is computed yet."""
        config, terms = self.config, self.config.term_weights
        scales = {
            kind: {term: kind_weight * weight / dens[term_name(kind, term)] for term, weight in terms.items()}
            for kind, kind_weight in self.logit_kinds(scheduled).items()
        }
        target_states = None
        if config.final_reader is not None:
            if cell.final_FD is None:
                raise DataError(
                    f"objective {config.objective!r} of {config.method} learns from the target's final states, and "
                    f"{cell.names[0]} came without them; read the cache's column `final`, or set "
                    'draft.objective = "ce"'
                )
            at_NS = torch.where(blocks.scored_NS, cell.final_at_R[blocks.final_row_NS], 0)
            target_states = TargetStates(cell.final_FD, at_NS)

        def weigh(part: slice, ce_NS: Tensor) -> Tensor:
            if config.weighting == "decay":
                return blocks.weights_NS[part]
            return dpace_weights(ce_NS, blocks.scored_NS[part], config.dpace_alpha, config.weighting)

        record_accept = config.has_confidence
        return Objective(blocks.labels_NS, weigh, scales, config.objective, target_states, record_accept, metrics)

    def logits(self, hidden_NSD: Tensor, prev_NS: Tensor) -> dict[str, Tensor]:
        """Return all teacher-forced logits [N, S, V] at once, "final" and where they are corrected also "base"; -inf
        where an id is never proposed. For probes and tests: a few blocks only."""
        raw_NSV = self.head.raw_logits(hidden_NSD)
        base_NSV = raw_NSV.to(at_least_float32(raw_NSV.dtype))
        correction = self.correction(hidden_NSD, prev_NS)
        kinds = {"final": base_NSV}
        if correction is not None:
            added_NSV = nn.functional.linear(*correction).to(base_NSV.dtype)
            kinds = {"base": base_NSV, "final": base_NSV + added_NSV}
        return {kind: self.over_vocabulary(self.target.cap(of_NSV), -torch.inf) for kind, of_NSV in kinds.items()}

    @torch.no_grad()
    def teacher_forced(self, cell: Cell, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        hidden_NSD = self.hidden(cell, blocks)
        confidence_NS = self.confidence(hidden_NSD, blocks.prev_NS) if self.config.has_confidence else None
        return self.logits(hidden_NSD, blocks.prev_NS)["final"], confidence_NS

    def new_kv(self) -> DraftKV:
        return DraftKV()

    @torch.no_grad()
    def block_hidden(self, requests: Sequence[BlockRequest]) -> Tensor:
        """Return the states [N, S, D] of the next block of each text. Slot k is at position start + k.

        The states in the requests enter the kv caches; the slots' own keys and values do not.
        """
        for request in requests:
            K, T, _ = request.features_KTD.shape
            length, start = request.kv.length, request.start
            assert length + T == start, f"kv holds {length} positions and {T} came, for an anchor at {start}"
            assert len(self.config.target_layer_ids) == K, f"{K} layers for {self.config.target_layer_ids}"
        device, S = self.device, self.config.block_size
        ids_NS = torch.full((len(requests), S), self.config.mask_token_id, device=device)
        ids_NS[:, 0] = torch.tensor([request.anchor_id for request in requests], device=device)
        starts_N = torch.tensor([request.start for request in requests], device=device)
        positions_NS = starts_N[:, None] + torch.arange(S, device=device)
        new_rows = [range(request.kv.length, request.start) for request in requests]
        positions_R = torch.tensor([row for rows in new_rows for row in rows], dtype=torch.long, device=device)
        features_KRD = torch.cat([request.features_KTD.to(device) for request in requests], dim=1)
        attention = DecodeAttention(S, [request.kv for request in requests], list(map(len, new_rows)), device)
        embedded_QD = self._embed(ids_NS.flatten())
        out_QD = self.slot_states(embedded_QD, positions_NS.flatten(), features_KRD, positions_R, attention)
        for request in requests:
            request.kv.length = request.start
        return out_QD.unflatten(0, (-1, S))

    @torch.no_grad()
    def propose(
        self, requests: Sequence[BlockRequest], sampling: Sampling | None = None, threshold: float = 0.0
    ) -> list[Proposal]:
        hidden_NSD = self.block_hidden(requests)
        anchors_N = torch.tensor([request.anchor_id for request in requests], device=hidden_NSD.device)
        ids_NP, logits_NPV = self.rollout_logits(hidden_NSD, anchors_N, sampling)
        counts = self.confident_counts(hidden_NSD, anchors_N, ids_NP, threshold)
        if sampling is None:
            return [Proposal(ids_P[:count], None) for ids_P, count in zip(ids_NP, counts, strict=True)]
        return [
            Proposal(
                ids_P[:count], self.over_vocabulary(self.probabilities(logits_PV[:count], sampling.temperature), 0.0)
            )
            for ids_P, logits_PV, count in zip(ids_NP, logits_NPV, counts, strict=True)
        ]

    @torch.no_grad()
    def greedy_proposals(
        self, cell: Cell, blocks: Blocks, thresholds: Sequence[float] = (0.0,)
    ) -> list[list[list[int]]]:
        hidden_NSD, anchor_ids_N = self.hidden(cell, blocks), cell.ids_R[blocks.anchors_N]
        ids_NP = self.rollout(hidden_NSD, anchor_ids_N)
        whole, proposed = ids_NP.tolist(), []
        for threshold in thresholds:
            counts = self.confident_counts(hidden_NSD, anchor_ids_N, ids_NP, threshold)
            proposed.append([ids[:count] for ids, count in zip(whole, counts, strict=True)])
        return proposed

    @torch.no_grad()
    def rollout(self, hidden_NSD: Tensor, anchor_ids_N: Tensor) -> Tensor:
        """Return greedy proposals [N, P], each corrected by those before it over the whole vocabulary, by chunks."""
        blocks = self.blocks_per_chunk(hidden_NSD[:, self.config.first_slot :])
        parts = zip(hidden_NSD.split(blocks), anchor_ids_N.split(blocks), strict=True)
        return torch.cat([self.rollout_logits(hidden, anchors)[0] for hidden, anchors in parts])

    def rollout_logits(
        self, hidden_NSD: Tensor, anchor_ids_N: Tensor, sampling: Sampling | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return proposals [N, P], chosen one after the other, and the logits [N, P, W] before the soft cap."""
        guessing_NPD = hidden_NSD[:, self.config.first_slot :]
        logits_NPV = self.head.raw_logits(guessing_NPD)  # one multiplication for all proposals
        proposals_NP = torch.empty(guessing_NPD.shape[:2], dtype=torch.long, device=hidden_NSD.device)
        last_N, state = anchor_ids_N, None
        for k in range(self.config.proposals):
            correction, state = self.correction_step(k, guessing_NPD[:, k], last_N, state)
            if correction is not None:
                z_NU, out_VU = (part.to(logits_NPV.dtype) for part in correction)
                write_product(logits_NPV[:, k], z_NU, out_VU.T, added_TO=logits_NPV[:, k])
            last_N = self.target_ids(self._choose(logits_NPV[:, k], sampling))
            proposals_NP[:, k] = last_N
        return proposals_NP, logits_NPV

    def _choose(self, raw_NV: Tensor, sampling: Sampling | None) -> Tensor:
        if sampling is None:
            return raw_NV.argmax(-1)
        probabilities_NV = self.probabilities(raw_NV, sampling.temperature)
        return draw(probabilities_NV, torch.cat([uniforms(1, generator) for generator in sampling.generators]))

    def probabilities(self, raw_NV: Tensor, temperature: float) -> Tensor:
        """Return the probabilities [..., V] of uncapped logits at a temperature, in float32 or wider."""
        return (self.target.cap(raw_NV.to(at_least_float32(raw_NV.dtype))) / temperature).softmax(-1)

    def correction_step(self, k: int, hidden_ND: Tensor, last_N: Tensor, state):
        """Return the correction (z [N, U], W_out [W, U]) of proposal k, or None, and the recurrent state after it.

        last_N: the target's id of the token before proposal k. state: None for the first proposal.
        """
        return None, None

    def confidence(self, hidden_NSD: Tensor, prev_NS: Tensor) -> Tensor:
        """Return the confidence's logits [N, S], in float32 or wider, of a draft whose config `has_confidence`."""
        raise NotImplementedError

    def confident_counts(self, hidden_NSD: Tensor, anchor_ids_N: Tensor, ids_NP: Tensor, threshold: float) -> list[int]:
        """Return how many proposals of each block come before the first whose confidence is below the threshold."""
        if threshold <= 0:
            return [self.config.proposals] * len(ids_NP)
        if not self.config.has_confidence:
            raise UsageError(
                f"a {self.config.method} draft without a confidence head cannot cut its blocks at {threshold}; "
                "leave the threshold out"
            )
        prev_NP = torch.cat([anchor_ids_N[:, None], ids_NP[:, :-1]], dim=1)
        confident_NP = self.confidence(hidden_NSD[:, self.config.first_slot :], prev_NP).sigmoid() >= threshold
        return confident_NP.long().cumprod(-1).sum(-1).tolist()

    @classmethod
    def tensors(cls, config: DraftConfig, proposed: int | None = None) -> Shapes:
        return backbone_shapes(config) | cls.head_tensors(config, proposed)

    @classmethod
    def head_tensors(cls, config: DraftConfig, proposed: int | None = None) -> Shapes:
        """Return name and shape of what the method adds to the backbone; as `tensors`."""
        return {}

    @classmethod
    def starting_tensors(cls, config: DraftConfig, source: type[Draft]) -> Shapes | None:
        """As `Draft.starting_tensors`; the bare backbone starts any other draft, whose head is then random."""
        return backbone_shapes(config) if source.only_backbone else super().starting_tensors(config, source)

    @classmethod
    def reference(cls, config: DraftConfig, block: ProbeBlock) -> tuple[Tensor, Tensor | None]:
        hidden_SD = block.backbone_states()
        added_SC, confidence_S = cls.reference_correction(config, block, hidden_SD)
        return hidden_SD @ block.head_CD.T + added_SC, confidence_S

    @classmethod
    def reference_correction(
        cls, config: DraftConfig, block: ProbeBlock, hidden_SD: Tensor
    ) -> tuple[Tensor | float, Tensor | None]:
        """Return what the method adds to the head's logits [S, C], and confidence logits [S] or None."""
        return 0.0, None


def init_weights(draft: Draft, seed: int) -> None:
    """Initialise all parameters as Hugging Face: N(0, initializer_range), biases 0, norms 1; a GRU as PyTorch does.

    Drawn on the CPU in the order of the modules' names, so that every device starts with the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in sorted(draft.named_modules(), key=lambda named: named[0]):
            for name, weight in module.named_parameters(recurse=False):
                weight.copy_(_initial_values(module, name, weight.shape, draft.config.initializer_range, generator))


def _initial_values(module: nn.Module, name: str, shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    if bound := getattr(module, "init_bound", None):
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if isinstance(module, nn.Linear | nn.Embedding) and name == "weight":
        return torch.empty(shape).normal_(0, std, generator=generator)
    return torch.zeros(shape) if name == "bias" else torch.ones(shape)
