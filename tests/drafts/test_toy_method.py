"""A method is one file, an objective one entry: toys of both here, with nothing else touched."""

import json

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

from pipeline.drafts import DRAFTS, BlockDraft, DraftConfig
from pipeline.drafts.objectives import OBJECTIVES, LossTerm
from pipeline.errors import UsageError
from pipeline.published import load_draft_folder
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.published.init_from import InitialDraft
from pipeline.published.reading import read_description
from pipeline.runs import checkpoint
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train
from stages.train_draft.step import Trainer

SMALL = ("draft.method=toy", "draft.block_size=4", "train.batch=4", "train.anchors=6", "train.steps=4")


class ToyConfig(DraftConfig):
    toy_rank: int = Field(4, ge=1, le=8)


class Toy(BlockDraft):
    """Adds a low-rank function of the previous token, and how often the training samples have each token."""

    Config = ToyConfig
    title = "Toy"
    sglang = ("TOY", 0)

    def __init__(self, config, head):
        super().__init__(config, head)
        self.read = nn.Linear(config.hidden_size, config.toy_rank, bias=False)
        self.score = nn.Linear(config.toy_rank, config.vocab_size, bias=False)
        self.register_buffer("frequency", torch.zeros(config.vocab_size))

    def before_training(self, samples):
        counts_V = np.sum([np.bincount(ids_T, minlength=len(self.frequency)) for ids_T in samples], axis=0)
        self.frequency.copy_(torch.from_numpy(counts_V / counts_V.sum()))

    def correction(self, hidden_NSD, prev_NS):
        z_NSU = self.read(self._embed(prev_NS))
        ones_NS1 = torch.ones_like(z_NSU[..., :1])
        return torch.cat([z_NSU, ones_NS1], -1), torch.cat([self.score.weight, self.frequency[:, None]], 1)

    def correction_step(self, k, hidden_ND, last_N, state):
        z_N1U, out_VU = self.correction(hidden_ND[:, None], last_N[:, None])
        return (z_N1U[:, 0], out_VU), None

    @classmethod
    def head_tensors(cls, config, proposed=None):
        D, V = config.hidden_size, config.vocab_size
        return {"read.weight": (config.toy_rank, D), "score.weight": (V, config.toy_rank), "frequency": (V,)}

    @classmethod
    def reference_correction(cls, config, block, hidden_SD):
        columns_CU = block.get("score.weight")[block.columns_C]
        return block.prev_SD @ block.get("read.weight").T @ columns_CU.T + block.get("frequency")[block.columns_C], None

    @classmethod
    def card_rows(cls, config):
        return [("toy head", f"rank {config.toy_rank}")]


class OwnForm(Toy):
    """The same, published in a form of its own."""

    @classmethod
    def own_config(cls, config, form, common):
        return {"toy": config.model_dump(mode="json")} if form == "sglang" else None

    @classmethod
    def read_own_config(cls, flat):
        fields = flat.get("toy")
        return fields and {name: value for name, value in fields.items() if name != "method"}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(DRAFTS, "toy", Toy)


@pytest.fixture(scope="module")
def trained(tiny_cache, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DRAFTS, "toy", Toy)
        return train(tiny_cache, None, SMALL, tmp_path_factory.mktemp("toy") / "run", "cpu").run


def loaded(run, cache):
    from pipeline.cache import HiddenCache

    return checkpoint.load_draft(run, HiddenCache.open(cache).head())


def test_its_option_has_a_default_and_bounds_and_is_another_methods_nonsense(trained, tiny_cache, tmp_path):
    assert "toy_rank = 4" in (trained / "recipe.toml").read_text()
    assert checkpoint.load_config(trained).toy_rank == 4
    for sets, message in (
        (("draft.toy_rank=9",), r"`draft\.toy_rank` = 9: input should be less than or equal to 8"),
        (("draft.toy_rnk=3",), r"did you mean `draft\.toy_rank`.*toy_rank"),
        (("draft.method=dflash", "draft.toy_rank=3"), "toy_rank = 3 means nothing to dflash"),
        (("draft.emb_dim=3",), "emb_dim = 3 means nothing to toy"),
    ):
        with pytest.raises(UsageError, match=message):
            train(tiny_cache, None, (*SMALL, *sets), tmp_path / "run", "cpu")


def test_a_stopped_run_ends_with_the_same_bytes(trained, tiny_cache, tmp_path, monkeypatch):
    step = Trainer.step

    def stopped(trainer, batch, *rest):
        if batch.step == 3:
            raise KeyboardInterrupt
        return step(trainer, batch, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stopped)
        train(tiny_cache, None, (*SMALL, "train.save_every=1"), tmp_path / "run", "cpu")
    resumed = train(tiny_cache, None, (*SMALL, "train.save_every=1"), tmp_path / "run", "cpu").run
    weights = [loaded(run, tiny_cache).state_dict() for run in (trained, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in Toy.tensors(checkpoint.load_config(trained)))
    assert weights[0]["frequency"].sum() == pytest.approx(1)


def test_it_is_evaluated_exported_read_back_and_checked(trained, tiny_cache, tmp_path):
    report = evaluate(trained, count=3, max_new=6, device="cpu", out=trained / "evaluation.json")
    assert report.draft.method == "toy" and report.overall.calls > 0

    export(trained, tmp_path / "out")

    flat = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"projector_type": "toy", "toy_rank": 4}.items() <= flat["dflash_config"].items()
    draft = loaded(trained, tiny_cache)
    weights = load_draft_folder(tmp_path / "out", draft.target).state_dict()
    assert all(torch.equal(weight, draft.state_dict()[name]) for name, weight in weights.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Toy draft for" in card and "| toy head | rank 4 |" in card and "--speculative-algorithm TOY" in card
    probe = check_export(tmp_path / "out")["probe"]
    assert probe["difference"] < 1e-4
    with pytest.raises(UsageError, match=r"speculators and vLLM have no Toy: .* export it with --format sglang"):
        export(trained, tmp_path / "vllm", "speculators")


def test_it_starts_from_the_bare_backbone_and_nothing_else_starts_from_it(trained, tiny_cache, tmp_path):
    bare = ("train.steps=1", "draft.method=dflash", *SMALL[1:4])
    backbone = train(tiny_cache, None, bare, tmp_path / "backbone", "cpu").run
    train(tiny_cache, None, SMALL, tmp_path / "run", "cpu", init_from=InitialDraft(backbone))
    with pytest.raises(UsageError, match=r"a toy draft, wanted is dflash: .* start from a dflash draft"):
        train(tiny_cache, None, bare, tmp_path / "other", "cpu", init_from=InitialDraft(trained))


def test_a_form_of_its_own_is_written_and_read(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(DRAFTS, "toy", OwnForm)
    export(trained, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).keys() == {"toy", "trained_on"}
    assert read_description(tmp_path / "out").config.toy_rank == 4


def test_an_objective_is_one_entry(tiny_cache, tmp_path, monkeypatch):
    near = LossTerm(("kl",), lambda distances: (distances["kl"], {"kl": 1.0}), weight=0.5)
    miss = LossTerm(
        ("accept",), lambda distances: ((1 - distances["accept"]) ** 2, {"accept": 2 * distances["accept"] - 2})
    )
    monkeypatch.setitem(OBJECTIVES, "squared", {"near": near, "miss": miss})
    run = train(tiny_cache, None, (*SMALL, "draft.objective=squared", "train.log_every=1"), tmp_path / "run", "cpu").run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 4
    for logged in steps:
        assert logged["loss"] == pytest.approx(0.5 * logged["near_loss"] + logged["miss_loss"])
    assert checkpoint.load_config(run).final_reader == ('objective "squared"', 'draft.objective = "ce"')
    with pytest.raises(UsageError, match="'dspark' or 'squared', found 'cubed'"):
        train(tiny_cache, None, (*SMALL, "draft.objective=cubed"), tmp_path / "other", "cpu")
