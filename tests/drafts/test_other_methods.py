"""Methods of other kinds fit as they are: one without the block backbone, a chain of its own steps over a reduced
vocabulary, as EAGLE-3 is; and one that changes the layer and selects among candidates, as DFlash-2 does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, BlockDraft, Draft, DraftConfig, Proposal
from pipeline.drafts.backbone import Layer
from pipeline.drafts.draft import Loss
from pipeline.drafts.objectives import slot_sums
from pipeline.errors import ProofError
from pipeline.evaluation.decode import SamplingOptions
from pipeline.published import load_draft_folder
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.runs import checkpoint
from pipeline.tensors import draw, uniforms
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train


class ChainConfig(DraftConfig):
    may_keep_position = False
    draft_vocab_size: int = 48


class Chain(Draft):
    """h = tanh(M [h ; e]) from the target's states before the anchor; a head over the ids that are frequent."""

    Config = ChainConfig
    title = "Chain"
    forms = ("sglang",)
    sglang = ("CHAIN", 1)
    reduces_vocabulary = True

    def __init__(self, config, head):
        super().__init__()
        D, W = config.hidden_size, config.draft_vocab_size
        self.config, self.target = config, head
        self.fc = nn.Linear(len(config.target_layer_ids) * D, D, bias=False)
        self.mix = nn.Linear(2 * D, D, bias=False)
        self.lm_head = nn.Linear(D, W, bias=False)
        self.register_buffer("d2t", torch.zeros(W, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def before_training(self, samples):
        counts_V = np.sum([np.bincount(ids_T, minlength=len(self.t2d)) for ids_T in samples], axis=0)
        ids_W = torch.from_numpy(np.sort(np.argsort(-counts_V, kind="stable")[: len(self.d2t)]))
        self.d2t.copy_(ids_W - torch.arange(len(ids_W)))
        self.t2d.zero_()[ids_W] = True

    @property
    def ids_W(self):
        return self.d2t + torch.arange(len(self.d2t))

    def step(self, state_ND, tokens_N):
        return torch.tanh(self.mix(torch.cat([state_ND, self.target.embed(tokens_N).to(state_ND.dtype)], -1)))

    def first_states(self, cell, blocks):
        features_NF = cell.aux_KRD[:, (blocks.anchors_N - 1).clamp(min=0)].transpose(0, 1).flatten(1)
        return self.fc(features_NF) * (blocks.anchors_N > blocks.starts_N)[:, None]

    def reduced_logits(self, cell, blocks):
        state_ND, logits = self.first_states(cell, blocks), []
        for prev_N in blocks.prev_NS.unbind(1):
            state_ND = self.step(state_ND, prev_N)
            logits.append(self.lm_head(state_ND))
        return torch.stack(logits, 1)

    def over_vocabulary(self, values, rest=0.0):
        full = values.new_full((*values.shape[:-1], len(self.t2d)), rest)
        return full.index_copy(-1, self.ids_W, values)

    def weights(self, blocks):
        return blocks.weights_NS * self.t2d[blocks.labels_NS]

    def denominators(self, blocks):
        return {"ce": self.weights(blocks).double().sum()}

    def loss(self, cell, blocks, scheduled, dens, metrics=False):
        logits_NSV = self.over_vocabulary(self.reduced_logits(cell, blocks), -1e4)
        ce_NS = F.cross_entropy(logits_NSV.transpose(1, 2), blocks.labels_NS, reduction="none")
        numerator = (self.weights(blocks) * ce_NS).sum()
        per_slot = {"correct": logits_NSV.argmax(-1) == blocks.labels_NS, "ce": ce_NS.detach()}
        sums = slot_sums(per_slot, blocks.scored_NS) if metrics else {}
        return Loss(numerator / dens["ce"], {"ce": numerator.detach()}, sums)

    @torch.no_grad()
    def teacher_forced(self, cell, blocks):
        return self.over_vocabulary(self.reduced_logits(cell, blocks)), None

    def roll(self, state_ND, tokens_N, choose):
        ids, logits = [], []
        for _ in range(self.config.proposals):
            state_ND = self.step(state_ND, tokens_N)
            logits.append(self.lm_head(state_ND))
            tokens_N = choose(logits[-1])
            ids.append(tokens_N)
        return torch.stack(ids, 1), torch.stack(logits, 1)

    def greedy(self, logits_NW):
        return self.ids_W[logits_NW.argmax(-1)]

    @torch.no_grad()
    def greedy_proposals(self, cell, blocks, thresholds=(0.0,)):
        ids_NP, _ = self.roll(self.first_states(cell, blocks), cell.ids_R[blocks.anchors_N], self.greedy)
        return [ids_NP.tolist() for _ in thresholds]

    def new_kv(self):
        return SimpleNamespace(length=0, state_1D=torch.zeros(1, self.config.hidden_size))

    @torch.no_grad()
    def propose(self, requests, sampling=None, threshold=0.0):
        for request in requests:
            if request.start > request.kv.length:
                request.kv.state_1D = self.fc(request.features_KTD[:, -1].flatten()[None].to(self.fc.weight.dtype))
                request.kv.length = request.start
        states_ND = torch.cat([request.kv.state_1D for request in requests])
        anchors_N = torch.tensor([request.anchor_id for request in requests])
        if sampling is None:
            return [Proposal(ids_P, None) for ids_P in self.roll(states_ND, anchors_N, self.greedy)[0]]

        def probabilities(logits):
            return self.over_vocabulary((logits.float() / sampling.temperature).softmax(-1))

        def sampled(logits_NW):
            return draw(probabilities(logits_NW), torch.cat([uniforms(1, one) for one in sampling.generators]))

        ids_NP, logits_NPW = self.roll(states_ND, anchors_N, sampled)
        return [Proposal(*both) for both in zip(ids_NP, probabilities(logits_NPW), strict=True)]

    @classmethod
    def tensors(cls, config, proposed=None):
        D, V, W = config.hidden_size, config.vocab_size, config.draft_vocab_size
        shapes = {"fc.weight": (D, len(config.target_layer_ids) * D), "mix.weight": (D, 2 * D)}
        return shapes | {"lm_head.weight": (W, D), "d2t": (W,), "t2d": (V,)}

    @classmethod
    def reference(cls, config, block):
        T = block.features_KTD.shape[1]
        state_D = block.get("fc.weight") @ block.features_KTD[:, -1].flatten() if T else torch.zeros(config.hidden_size)
        ids_W, rows = block.get("d2t").long() + torch.arange(config.draft_vocab_size), []
        for embedded_D in block.prev_SD:
            state_D = torch.tanh(block.get("mix.weight") @ torch.cat([state_D, embedded_D]))
            logits_V = torch.zeros(config.vocab_size)
            logits_V[ids_W] = block.get("lm_head.weight") @ state_D
            rows.append(logits_V[block.columns_C])
        return torch.stack(rows), None

    @classmethod
    def own_config(cls, config, form, common):
        return (
            common
            | {"architectures": ["ChainModel"], "chain": config.model_dump(mode="json")}
            | {"draft_vocab_size": config.draft_vocab_size}
        )

    @classmethod
    def read_own_config(cls, flat):
        fields = flat.get("chain")
        return fields and {name: value for name, value in fields.items() if name != "method"}


class SelectorConfig(DraftConfig):
    conv_kernel_size: int = 2
    selector_rank: int = 4
    selector_top_k: int = 3


class ConvolvedLayer(Layer):
    """Adds to each slot a share of the slot before it in its block, channel by channel."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.block_size = config.block_size
        self.attention_conv = nn.Linear(1, config.hidden_size, bias=False)

    def forward(self, x_QD, *rest):
        x_NSD = x_QD.unflatten(0, (-1, self.block_size))
        before_NSD = F.pad(x_NSD[:, :-1], (0, 0, 1, 0))
        return super().forward((x_NSD + self.attention_conv.weight[:, 0] * before_NSD).flatten(0, 1), *rest)


class Selector(BlockDraft):
    """Scores candidates by A[prev] * (W h) against B, and chooses among the head's best ones only."""

    Config = SelectorConfig
    title = "Selector"
    sglang = ("SELECTOR", 0)
    layer_class = ConvolvedLayer

    def __init__(self, config, head):
        super().__init__(config, head)
        self.predecessor, self.successor = (nn.Embedding(config.vocab_size, config.selector_rank) for _ in range(2))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def correction(self, hidden_NSD, prev_NS):
        return self.predecessor(prev_NS) * self.hidden_projection(hidden_NSD), self.successor.weight

    def correction_step(self, k, hidden_ND, last_N, state):
        return self.correction(hidden_ND, last_N), None

    def rollout_logits(self, hidden_NSD, anchor_ids_N, sampling=None):
        raw_NPV = self.target.raw_logits(hidden_NSD[:, self.config.first_slot :])
        best_NPK = raw_NPV.topk(self.config.selector_top_k).indices
        self.shut_NPV = torch.full_like(raw_NPV, -1e4).scatter(-1, best_NPK, 0.0)
        return super().rollout_logits(hidden_NSD, anchor_ids_N, sampling)

    def _choose(self, raw_NV, sampling):
        self.shut_NPV, shut_NV = self.shut_NPV[:, 1:], self.shut_NPV[:, 0]
        return super()._choose(raw_NV.add_(shut_NV), sampling)

    @classmethod
    def head_tensors(cls, config, proposed=None):
        D, V, rank = config.hidden_size, config.vocab_size, config.selector_rank
        shapes = {"predecessor.weight": (V, rank), "successor.weight": (V, rank), "hidden_projection.weight": (rank, D)}
        layers = range(config.num_hidden_layers)
        return shapes | {f"layers.{layer}.attention_conv.weight": (D, 1) for layer in layers}


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(DRAFTS, "chain", Chain)
    monkeypatch.setitem(DRAFTS, "selector", Selector)


SMALL = ("draft.block_size=4", "train.batch=4", "train.anchors=6", "train.steps=30")


def test_a_chain_over_few_ids_trains_decodes_and_is_published_in_a_form_of_its_own(tiny_cache, tmp_path):
    sets = (*SMALL, "draft.method=chain")
    run = train(tiny_cache, None, sets, tmp_path / "run", "cpu").run
    draft = checkpoint.load_draft(run, HiddenCache.open(tiny_cache).head())
    assert int(draft.t2d.sum()) == 48 and draft.t2d[draft.ids_W].all()

    report = evaluate(
        run, count=3, max_new=8, device="cpu", out=run / "evaluation.json", sampling=SamplingOptions(1.0, 1.0, 0)
    )
    assert (
        report.overall.calls > 0 and report.agreement.equal == report.agreement.prompts
    )  # by decoding, and from the cache

    export(run, tmp_path / "out")

    opened = load_draft_folder(tmp_path / "out", draft.target)
    assert all(torch.equal(weight, draft.state_dict()[name]) for name, weight in opened.state_dict().items())
    checked = check_export(tmp_path / "out")
    assert checked["probe"]["difference"] < 1e-4 and checked["proposed_ids"] == 48


def test_a_changed_layer_and_a_selector_train_and_decode_and_need_their_own_arithmetic(tiny_cache, tmp_path):
    sets = (*SMALL, "draft.method=selector")
    run = train(tiny_cache, None, sets, tmp_path / "run", "cpu").run
    report = evaluate(run, count=3, max_new=8, device="cpu", out=run / "evaluation.json")
    assert report.overall.calls > 0 and report.agreement.equal == report.agreement.prompts
    with pytest.raises(ProofError, match="logits recomputed from its files differ"):  # of the backbone without these
        export(run, tmp_path / "out")
