"""A draft vocabulary: the ids that a draft may propose, where these are fewer than the target's.

The head is most of a draft's work where the target's vocabulary is large, and most texts use little of it. A draft with
`draft.vocabulary = W` has the W ids that its training samples' replies use most, as EAGLE-3 does, and the target's head
at these ids only. It learns to tell them apart: slots whose label is another id are not learned from, and where the
target's distribution is learned, that distribution over these ids, normalised to 1. Another id is never proposed; the
target then writes it itself, so that decoding stays lossless and every measured accept length counts it as a miss.
What reads a token, such as the table of a correction by the previous one, has all of the target's ids; what scores
proposals has a row for each id that may be proposed.

Published beside the weights, as speculators has them: d2t, of each of the draft's ids the target's id minus it, and
t2d, whether an id of the target may be proposed.

    V vocabulary of the target   W ids that may be proposed
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from pipeline.drafts.blocks import Blocks
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.draft import Draft, PublishedKeys, Shapes
from pipeline.errors import UsageError
from pipeline.target.head import TargetHead

# Weights' sum where no label of a batch may be proposed: the loss is then 0, where 0 / 0 would end the training.
NOTHING = 1e-30
MAPS = frozenset(("d2t", "t2d"))


def most_frequent(samples: Iterable[np.ndarray], vocabulary: int, count: int) -> Tensor:
    """Return the `count` ids that occur most often in samples of ids, ascending; among equals the lowest."""
    counts_V = np.zeros(vocabulary, np.int64)
    for ids_T in samples:
        counts_V += np.bincount(ids_T, minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-counts_V, kind="stable")[:count]))


def write_maps(ids_W: Tensor, d2t_W: Tensor, t2d_V: Tensor) -> None:
    """Fill the two maps with ascending ids."""
    d2t_W.copy_(ids_W - torch.arange(len(ids_W)))
    t2d_V.zero_()
    t2d_V[ids_W.to(t2d_V.device)] = True


def ids_of(d2t_W: Tensor) -> Tensor:
    """Return the target's id of each of the draft's."""
    return d2t_W + torch.arange(len(d2t_W), device=d2t_W.device)


def within(blocks: Blocks, t2d_V: Tensor) -> Blocks:
    """Return blocks whose labels are the draft's ids; slots whose label it has not are neither scored nor weighted."""
    may_V = t2d_V.to(blocks.labels_NS.device)
    may_NS = may_V[blocks.labels_NS]
    labels_NS = (may_V.cumsum(0)[blocks.labels_NS] - 1).clamp_(min=0)
    return replace(
        blocks, labels_NS=labels_NS, scored_NS=blocks.scored_NS & may_NS, weights_NS=blocks.weights_NS * may_NS
    )


def missed(per_slot: dict[str, Tensor], may_NS: Tensor) -> dict[str, Tensor]:
    """Return what an objective recorded of every slot, with no slot right, and none accepted, whose label the draft
    has not."""
    masked = {"correct", "agree", "accept", "ce"}
    return {name: torch.where(may_NS, value, 0) if name in masked else value for name, value in per_slot.items()}


def carry_rows(from_W: Tensor | None, rows_WU: Tensor, to_X: Tensor, rows_XU: Tensor) -> Tensor:
    """Return on the CPU the rows of the ids `to_X`: those that ids `from_W` (None: all) have, else as in `rows_XU`."""
    from_W = torch.arange(len(rows_WU)) if from_W is None else from_W
    to_X, carried_XU = to_X.cpu(), rows_XU.cpu().clone()
    at_V = torch.full((int(max(from_W.max(), to_X.max())) + 1,), -1)
    at_V[from_W] = torch.arange(len(from_W))
    there_X = at_V[to_X] >= 0
    carried_XU[there_X] = rows_WU[at_V[to_X[there_X]]].to(carried_XU.dtype)
    return carried_XU


class HeadRows:
    """The target's head at a draft's ids, gathered once, and anew where the map or the head is another."""

    def __init__(self):
        self._of: TargetHead | None = None
        self._map_W, self._version, self._head = None, -1, None

    def head(self, target: TargetHead, d2t_W: Tensor) -> TargetHead:
        version = 0 if d2t_W.is_inference() else d2t_W._version  # it changes with the map's values
        if self._of is not target or self._map_W is not d2t_W or self._version != version:
            with torch.inference_mode(False), torch.no_grad():  # training may use what an evaluation has made
                rows_WD = target.head_VD[ids_of(d2t_W).to(target.head_VD.device)]
            self._head = TargetHead(rows_WD, rows_WD, logit_softcap=target.logit_softcap)
            self._of, self._map_W, self._version = target, d2t_W, version
        return self._head


class VocabularyConfig(DraftConfig):
    """The option of a draft vocabulary. Raises UsageError for one that is no smaller than the target's."""

    vocabulary: PositiveInt | None = None  # ids that may be proposed; None: all

    @model_validator(mode="after")
    def _check_vocabulary(self):
        if self.vocabulary is not None and self.vocabulary >= self.vocab_size:
            raise UsageError(
                f"draft.vocabulary = {self.vocabulary} is no less than the target's {self.vocab_size} ids; leave it "
                "out to propose all"
            )
        return self

    @property
    def proposable(self) -> int:
        return self.vocabulary or self.vocab_size


class ReducesVocabulary(Draft):
    """What a method on `BlockDraft` derives from beside it, and first, so that its drafts may have a draft vocabulary.

    Its `Config` derives from `VocabularyConfig`; modules that score proposals have `config.proposable` rows.
    """

    reduces_vocabulary = True
    config: VocabularyConfig

    def __init__(self, config: VocabularyConfig, head: TargetHead):
        super().__init__(config, head)
        self.reduced, self.rows = config.vocabulary is not None, HeadRows()
        if self.reduced:
            self.register_buffer("d2t", torch.zeros(config.vocabulary, dtype=torch.int64))
            self.register_buffer("t2d", torch.arange(config.vocab_size) < config.vocabulary)

    def before_training(self, samples: Iterable[np.ndarray]) -> None:
        if self.reduced:
            write_maps(most_frequent(samples, self.config.vocab_size, self.config.vocabulary), self.d2t, self.t2d)

    @property
    def head(self) -> TargetHead:
        return self.rows.head(self.target, self.d2t) if self.reduced else self.target

    def learned(self, blocks: Blocks) -> Blocks:
        return within(blocks, self.t2d) if self.reduced else blocks

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        dens = super().denominators(blocks)
        return {term: den.clamp(min=NOTHING) for term, den in dens.items()} if self.reduced else dens

    def target_ids(self, ids: Tensor) -> Tensor:
        return ids_of(self.d2t)[ids] if self.reduced else ids

    def over_vocabulary(self, values: Tensor, rest: float) -> Tensor:
        if not self.reduced:
            return values
        full = values.new_full((*values.shape[:-1], self.config.vocab_size), rest)
        return full.index_copy_(-1, ids_of(self.d2t), values)

    @classmethod
    def head_tensors(cls, config: VocabularyConfig, proposed: int | None = None) -> Shapes:
        maps = {"d2t": (config.vocabulary,), "t2d": (config.vocab_size,)} if config.vocabulary is not None else {}
        return super().head_tensors(config, proposed) | maps

    def published_copies(self) -> dict[str, Tensor]:
        return {"lm_head.weight": self.head.head_VD} if self.reduced else {}

    @classmethod
    def starting_tensors(cls, config: VocabularyConfig, source: type[Draft]) -> Shapes | None:
        """As `Draft.starting_tensors`, without the maps, which are counted anew."""
        shapes = super().starting_tensors(config, source)
        return shapes and {name: shape for name, shape in shapes.items() if name not in MAPS}

    @classmethod
    def absent(cls, keys: PublishedKeys) -> dict:
        return super().absent(keys) | {"vocabulary": None}

    @classmethod
    def write_options(cls, config: VocabularyConfig, form: str) -> tuple[dict, dict]:
        """As `Draft.write_options`; the vocabulary has a key that every draft of a form has."""
        return tuple(
            {name: value for name, value in keys.items() if name != "vocabulary"}
            for keys in super().write_options(config, form)
        )

    @classmethod
    def refusal(cls, config: VocabularyConfig, form: str) -> str | None:
        if config.vocabulary is None or form == "speculators":
            return super().refusal(config, form)
        export = "export it with --format speculators, which vLLM reads, or "
        return (
            f"{form} has no place for the maps d2t and t2d of a draft vocabulary, and this {cls.title} draft proposes "
            f"{config.vocabulary:,} of {config.vocab_size:,} ids; "
            f"{'' if cls.refusal(config, 'speculators') else export}train one without draft.vocabulary"
        )

    @classmethod
    def card_rows(cls, config: VocabularyConfig) -> list[tuple[str, str]]:
        if config.vocabulary is None:
            return super().card_rows(config)
        ids = f"{config.vocabulary:,} of {config.vocab_size:,}, by d2t and t2d"
        return [("ids that may be proposed", ids), *super().card_rows(config)]
