"""What a training says before a step that its user may not want to wait for."""

import pytest
import torch
from test_train_draft import lines, prepared, take_step, trained

from stages.train_draft import training_time as estimate
from stages.train_draft.optimizers import make_optimizer
from stages.train_draft.step import Trainer
from stages.train_draft.training_time import duration, step_seconds, worth_saying


def test_an_estimate_is_made_of_a_few_blocks_and_changes_nothing_of_the_training(tiny_cache):
    first, loader = prepared(tiny_cache)
    second, _ = prepared(tiny_cache)
    plain = Trainer(first, make_optimizer("adamw", first), loader)
    estimated = Trainer(second, make_optimizer("adamw", second), loader)

    assert step_seconds(estimated, loader.sampler.batch(0)) > 0
    assert all(weight.grad is None or not weight.grad.any() for weight in second.parameters())
    assert take_step(plain, 0) == take_step(estimated, 0)
    for weight, same in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, same)


def test_a_long_run_says_before_its_first_step_how_long_it_takes_and_what_shortens_it(
    tiny_cache, tmp_path, capsys, monkeypatch
):
    trained(tiny_cache, tmp_path / "short", "train.steps=2", method="dflash")
    assert "a step takes about" not in capsys.readouterr().out

    monkeypatch.setattr(estimate, "SAID_FROM", 0.0)
    trained(tiny_cache, tmp_path / "long", "train.steps=2", method="dflash")
    out = capsys.readouterr().out

    assert out.index("a step takes about") < out.index("step 1/2")
    assert "2 steps about" in out and "train.anchors" in out and "draft.num_hidden_layers" in out
    assert lines(tmp_path / "short") == lines(tmp_path / "long")


def test_a_slow_step_is_worth_saying_and_so_is_a_long_run():
    assert worth_saying(148.0, 1) and worth_saying(0.5, 2000)
    assert not worth_saying(0.5, 100)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (148, "148 s"), (1500, "25 min"), (19_500, "5.4 hours"), (900_000, "10.4 days")],
)
def test_a_duration_is_written_in_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
