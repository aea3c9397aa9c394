"""How far the cross-entropy is from the command: every call between is one more function to read."""

import traceback
from pathlib import Path

import torch
from draft_cases import every_method

from pipeline.cli import commands

ROOT = Path(__file__).parents[2]
MOST = 9


def our_calls() -> list[str]:
    """The functions of the package that are running, outermost first."""
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    return [name for file, name in frames if {ROOT / "pipeline", ROOT / "stages"} & {*file.parents}]


@every_method
def test_a_command_reaches_the_cross_entropy_in_few_calls(method, tiny_cache, tmp_path, monkeypatch):
    seen, amax = [], torch.Tensor.amax

    def noted(logits, *given):
        calls = our_calls()
        if "step" in calls and "_record_predictions" not in calls:  # not an evaluation's, not the metrics'
            seen.append(calls[calls.index("train_draft") :])
        return amax(logits, *given)

    monkeypatch.setattr(torch.Tensor, "amax", noted)
    sets = (f"draft.method={method}", "train.steps=1", "train.batch=2", "draft.block_size=4")
    arguments = ["train-draft", "--cache", tiny_cache, "--out", tmp_path / "run", "--device", "cpu"]
    commands.main([*map(str, arguments), *(word for entry in sets for word in ("--set", entry))], standalone_mode=False)

    assert seen and seen[0][0] == "train_draft"
    assert max(map(len, seen)) <= MOST, seen[0]
