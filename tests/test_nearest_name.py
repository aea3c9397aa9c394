"""Whoever mistypes a name hears the nearest one, once, whatever it is a name of."""

from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.nearest_name import nearest

TARGET = str(Path(__file__).parent.parent / "data/tiny-qwen3")
MISTYPED = {
    "trein": "train-draft",
    "evalute --draft x": "evaluate",
    "verfy": "verify",
    "recipe shw": "show",
    "plan --model x --codecs raw": "--codec",
    "plan --mdoel x": "--model",
    "plan -m x": "--model",
    "train-draft --no-shrad": "--no-shard",
    "train-draft --recipe x": None,  # the name of an argument is no option
    "evaluate --temp 1": "--temperature",
    "evaluate --max_new 3": "--max-new",
    "cache-hidden --dtyp=bfloat16": "--dtype",
    "--debugg inspect": "--debug",
    "plan --model x --final al": "all",
    "plan --model x --dtype bf16": "bfloat16",
    "plan --model x --engine vlm": "vllm",
    f"export --draft {TARGET} --out y --format sglan": "sglang",
    f"plan --model {TARGET} --codec it8": "int8",
    f"plan --model {TARGET} --codec finl=int8": "final",
    f"plan --model {TARGET} --budget 1GB --methods domno": "`domino`",
    f"plan --model {TARGET} --roles bard=asistant": "assistant",
    "recipe show --set draft.method=domno": "`domino`",
    "recipe show --set draft.blocksize=4": "`draft.block_size`",
    "recipe show --set trian.steps=4": "`train`",
    "recipe show --set train.block_size=4": "`draft.block_size`",
    "recipe show --set train.schedule=cosin": "'cosine'",
    "recipe show --set draft.markov_head_type=gate": "'gated'",
    "inspect --zzz": None,
    "qqq": None,
}


@pytest.mark.parametrize("line", MISTYPED)
def test_a_mistyped_name_is_answered_once_with_the_nearest_one(line, capfd, tmp_path):
    words = [*line.split(), *(["--out", str(tmp_path / "c")] if f"--model {TARGET}" in line else [])]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capfd.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.lower().count("did you mean") == (MISTYPED[line] is not None), said
    assert MISTYPED[line] is None or f"; did you mean {MISTYPED[line]}?" in said, said


def test_what_draft_config_refuses_says_it_too(tiny_cache, capfd, tmp_path):
    for entry, meant in (("draft.objective=dsparc", "dspark"), ("draft.weighting=dpce", "dpace")):
        with pytest.raises(SystemExit):
            main(["recipe", "show", "--set", entry, "--cache", str(tiny_cache)])
        assert f"; did you mean {meant}?" in capfd.readouterr().err


def test_names_of_other_options_are_not_guessed_from_nothing():
    assert nearest("xyzzy", ["steps", "seed"]) is None and nearest("", []) is None
    assert nearest("block", ["block_size", "lock"]) == "block_size"
