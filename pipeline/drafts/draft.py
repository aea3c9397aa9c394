"""What a method of drafting is to the rest of the project: `Draft`. A method is one file and one line in `DRAFTS`.

K layers   T rows   D hidden size   N blocks   S slots   P proposals   V vocabulary   G key/value heads   E head size
C columns: ids whose logits are computed
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.drafts.blocks import Blocks, Cell
from pipeline.drafts.config import DraftConfig, default_gamma
from pipeline.drafts.step_clock import StoppedClock
from pipeline.errors import UsageError
from pipeline.target.head import NEWEST, TargetHead

# Hidden size up to which a target counts as a toy for a CPU: its drafts have blocks of 8 slots instead of 16.
SMALL_HIDDEN = 512
# Who reads each published form. DeepSpec evaluates and serves nobody.
ENGINES = {"sglang": "SGLang", "speculators": "speculators and vLLM", "deepspec": "DeepSpec's evaluator"}
SERVING = ("sglang", "speculators")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sampling:
    """Sample proposals from softmax(logits / temperature) instead of taking the most likely token."""

    temperature: float  # above 0
    generators: Sequence[torch.Generator]  # one a block, of any device: no text depends on the others in its batch


@dataclass(frozen=True)
class Proposal:
    """The proposed tokens of one block, in order."""

    ids_P: Tensor  # int64; P is `config.proposals`, or fewer where the confidence head cuts; 0 is a step without draft
    q_PV: Tensor | None  # the distribution each was sampled from, float32 or wider; None if greedy


@dataclass(frozen=True)
class BlockRequest:
    """A request for the next block of one text: its anchor, and the target's states that the kv cache lacks."""

    features_KTD: Tensor  # the target's states at positions kv.length .. start - 1: those verified since the last block
    anchor_id: int
    start: int  # the anchor's true position
    kv: object  # what `Draft.new_kv` returned


@dataclass(frozen=True)
class Loss:
    """What one cell (packed micro-batch) contributes to a global batch's loss; cells add up.

    total: sum over terms of coefficient * numerator / global denominator. terms: the numerators, detached. sums:
    additive sums for `metrics_of`, empty unless asked for.
    """

    total: Tensor
    terms: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeBlock:
    """One block for `Draft.reference`: what an engine has when it runs the published tensors. The anchor is at T."""

    get: Callable[[str], Tensor]  # a tensor by its published name, in float32
    backbone_states: Callable[[], Tensor]  # the states [S, D] that the block backbone computes of them
    features_KTD: Tensor  # the target's states of the context
    slots_SD: Tensor  # the target's embeddings of the anchor and the mask tokens
    prev_S: Tensor  # the token before each slot's guess
    prev_SD: Tensor  # the target's embeddings of these
    columns_C: Tensor
    head_CD: Tensor  # the target's head at these ids


@dataclass(frozen=True)
class PublishedKeys:
    """A published config.json taken apart: its top level, and the keys that its form nests. file: for messages."""

    file: object
    flat: dict
    nested: dict
    deepspec: bool = False  # DeepSpec's form: flat, and its drafts guess from the anchor on

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(self.flat.get("architectures") or ())

    def find(self, key: str, *otherwise):
        """Return the value of a key that releases keep in one of two places. KeyError, or `otherwise`, for neither."""
        flat, nested = self.flat, self.nested
        if key in flat and key in nested and flat[key] != nested[key]:
            raise UsageError(
                f"{self.file}: {key} is {flat[key]} and, in dflash_config, {nested[key]}; correct the wrong one"
            )
        value = nested.get(key, flat.get(key))
        if value is not None:
            return value
        if otherwise:
            return otherwise[0]
        raise KeyError(key)


class Draft(nn.Module, ABC):
    """One method of drafting: how it learns, how it proposes, and how it is published.

    Nothing but its own file names a method. The state_dict has exactly the names of published checkpoints; the target's
    frozen embedding and head (`target`) are not in it. `BlockDraft` is the base of methods on the block backbone that
    add a correction of the target's logits at most (DFlash, Domino, DSpark). Others fit so; the tests have both small:

    EAGLE-3 derives from this class. Slot k is step k of a chain, which reads the embedding of token anchor + k and the
    state before (the fused target states, then its own): `Config` fixes shift_label = true, `block_size` is the number
    of steps, `new_kv` its own cache, and it has a form of config.json of its own (`own_config`, `read_own_config`). Its
    reduced vocabulary is an option `draft_vocab_size` and the buffers d2t and t2d, which `before_training` fills:
    losses leave out labels that it cannot propose, proposals are mapped to the target's ids, `tensors` names both maps,
    and `reduces_vocabulary` lets such a folder be opened.

    `ReducesVocabulary` has such a vocabulary for methods on `BlockDraft`, which derive from it besides.

    DFlash-2 derives from `BlockDraft`. The convolutions are in its `layer_class`, and so in `tensors` and `reference`.
    Its selector scores candidates by A[prev] * (W h) against B, a `correction` and `correction_step` (z, B);
    `rollout_logits` keeps the head's best candidates only, and `own_loss` adds the term over them.
    """

    Config: ClassVar[type[DraftConfig]] = DraftConfig
    title: ClassVar[str]
    paper: ClassVar[str | None] = None  # its number on arXiv
    published_fields: ClassVar[dict] = {}  # of [draft], where `recipe_defaults` has others
    published_sizes: ClassVar[dict[str, int]] = {}  # the same, and at most the target's hidden size
    reads_final: ClassVar[bool] = False  # whether its published loss reads the target's final states
    fused_matrices: ClassVar[tuple[str, ...]] = ()  # linear modules that are several matrices in one, as a GRU's are
    recomputes_layers: bool = False  # whether a gradient computes a backbone's layers again; methods without one do not
    chunk_rule: int = NEWEST  # the rule of `target/head.py` that sizes the chunks of logits
    heldout: float | None = None  # share of prompts that its training held out where the corpus does not say which
    clock: StoppedClock = StoppedClock()  # told what a loss is doing; a training puts a running one here
    config: DraftConfig
    target: TargetHead

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def recipe_defaults(cls, stated: dict, hidden_size: int) -> dict:
        """Return what a recipe leaves open. stated: the fields of [draft] that it states."""
        options = {name: option.default for name, option in cls.Config.options().items() if not option.is_required()}
        options = {name: default for name, default in options.items() if default is not None}
        filled = {"block_size": 8 if hidden_size <= SMALL_HIDDEN else 16, "shift_label": True, "objective": "ce"}
        filled |= {"weighting": "decay"} | options | cls.Config.defaults(stated) | cls.published_fields
        filled |= {name: min(size, hidden_size) for name, size in cls.published_sizes.items()}
        return filled | {"gamma": default_gamma(stated.get("block_size", filled["block_size"]))}

    def before_training(self, samples: Iterable[np.ndarray]) -> None:
        """Prepare buffers from the supervised ids of each training sample, which are read as they are asked for.

        Called when a run makes its draft, before initial weights or a checkpoint are loaded.
        """

    def schedule(self, step: int, total_steps: int) -> dict[str, float]:
        """Return, by the names in logs, what changes in the loss after `step` of `total_steps` optimiser steps."""
        return {}

    def embedded_ids(self, blocks: Blocks) -> Sequence[Tensor] | None:
        """Return tensors with all ids that a loss on these blocks embeds by the target's rows; None: not known."""
        return None

    @abstractmethod
    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """Return each loss term's denominator from one cell; the sum over the batch's cells is given to `loss`."""

    @abstractmethod
    def loss(self, cell: Cell, blocks: Blocks, scheduled: dict[str, float], dens: dict, metrics: bool = False) -> Loss:
        """Return one cell's part of the loss. dens: each term's denominator, summed over all cells of the batch.

        Raises DataError where the loss reads the target's final states and the cell has none.
        """

    @abstractmethod
    def teacher_forced(self, cell: Cell, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        """Return the logits [N, S, V] after the true tokens, and the confidence's logits [N, S] or None; for probes."""

    @abstractmethod
    def greedy_proposals(
        self, cell: Cell, blocks: Blocks, thresholds: Sequence[float] = (0.0,)
    ) -> list[list[list[int]]]:
        """Return the ids that decoding would propose from the cell's states, for each threshold and each block."""

    @abstractmethod
    def new_kv(self):
        """Return an empty kv cache of one text, with `length`, the number of positions in it."""

    @abstractmethod
    def propose(
        self, requests: Sequence[BlockRequest], sampling: Sampling | None = None, threshold: float = 0.0
    ) -> list[Proposal]:
        """Propose, for each text, the tokens at positions start + 1 .. start + P, greedily or sampled.

        threshold: cut each block before the first token whose confidence is below it; 0 keeps all.
        """

    # Published: names, shapes and keys in the forms of others, arithmetic, and what the card says.

    architectures: ClassVar[tuple[str, ...]] = ()  # classes that hold drafts of this method; an export names the first
    head_name: ClassVar[str] = "head"  # what messages call its own part
    forms: ClassVar[tuple[str, ...]] = ()  # those of ENGINES that have a place for it
    sglang: ClassVar[tuple[str, int]]  # its algorithm there, and how many tokens are verified beside a block's slots
    top_level: ClassVar[tuple[str, ...]] = ()  # options that SGLang seeks at the top level as well
    renamed_tensors: ClassVar[dict[str, str]] = {}  # regular expressions of others' names -> ours
    ignored_keys: ClassVar[frozenset[str]] = frozenset()  # nested keys of its files besides its options
    only_backbone: ClassVar[bool] = False  # the bare backbone, from which any draft on it can start
    reduces_vocabulary: ClassVar[bool] = False  # whether it proposes fewer ids than the target has
    rows_of_ids: ClassVar[tuple[str, ...]] = ()  # its own tensors with a row for each id that may then be proposed

    @classmethod
    @abstractmethod
    def tensors(cls, config: DraftConfig, proposed: int | None = None) -> Shapes:
        """Return name and shape of every tensor, written out from the publication, not asked of the module.

        proposed: the number of ids that may be proposed, where it is not the whole vocabulary.
        """

    def published_copies(self) -> dict[str, Tensor]:
        """Return copies of the target's tensors that are published with the draft, by name: what it has of its head
        where it proposes fewer ids."""
        return {}

    @classmethod
    @abstractmethod
    def reference(cls, config: DraftConfig, block: ProbeBlock) -> tuple[Tensor, Tensor | None]:
        """Return logits [S, C], before the soft cap, and confidence logits [S] or None, in plain torch.

        Written a second time from the publication: what the two computations agree on is no mistake of one of them.
        """

    @classmethod
    def starting_tensors(cls, config: DraftConfig, source: type["Draft"]) -> Shapes | None:
        """Return the tensors that a draft of the method `source` can start this one with; None: it cannot."""
        return cls.tensors(config) if source is cls else None

    @classmethod
    def publishes(cls, keys: PublishedKeys) -> bool:
        """Return whether a file without a projector_type, of an architecture of several methods, holds this one."""
        return False

    @classmethod
    def absent(cls, keys: PublishedKeys) -> dict:
        """Return the options, and `shift_label`, that a file may leave out, with the values that it then means."""
        return {}

    @classmethod
    def read_options(cls, keys: PublishedKeys) -> dict:
        """Return the options that a published config states. KeyError for one that is missing."""
        absent = cls.absent(keys)
        names = cls.Config.published_options()
        return {name: keys.find(name, *([absent[name]] if name in absent else [])) for name in names}

    @classmethod
    def write_options(cls, config: DraftConfig, form: str) -> tuple[dict, dict]:
        """Return the keys that a config of this form has besides those of every method: at the top level, and nested
        (which speculators has no place for)."""
        options = {name: getattr(config, name) for name in cls.Config.published_options()}
        if form == "speculators":
            return options, {}
        method = {} if cls.only_backbone else {"projector_type": config.method}
        return {name: options[name] for name in cls.top_level}, method | options

    @classmethod
    def own_config(cls, config: DraftConfig, form: str, common: dict) -> dict | None:
        """Return the whole config.json where the form is the method's own; None: one of the shared forms.

        common: the keys that every Qwen3-like config has.
        """
        return None

    @classmethod
    def read_own_config(cls, flat: dict) -> dict | None:
        """Return the fields of `Config` where config.json is of the method's own form; None: it is not."""
        return None

    @classmethod
    def refusal(cls, config: DraftConfig, form: str) -> str | None:
        """Return why the engine of that form cannot serve this draft, and what to do; None: it can."""
        if form in cls.forms:
            return None
        remedy = f"export it with --format {cls.forms[0]}" if cls.forms else "train a draft of another method"
        lost = f"its {cls.head_name} would be dropped and the backbone alone served"
        have = "has" if form == "deepspec" else "have"
        return f"{ENGINES[form]} {have} no {cls.title}: {lost}; {remedy}"

    @classmethod
    def card_rows(cls, config: DraftConfig) -> list[tuple[str, str]]:
        """Return further rows of the card's first table."""
        return []

    @classmethod
    def card_notes(cls, config: DraftConfig, form: str) -> list[str]:
        """Return lines of the card on how the engine of that form serves it otherwise than it was measured."""
        return []
