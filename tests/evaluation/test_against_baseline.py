"""Drafts against a baseline, paired by prompt."""

import re

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from reports import evaluation

from pipeline import cli
from pipeline.errors import UsageError
from pipeline.evaluation.plot import steps_to_reach
from pipeline.evaluation.tables import against_baseline

SAMPLES = [("sql", [2, 4]), ("sql", [1]), ("copy", [8, 8, 8]), ("copy", [3, 1]), ("noise", [1, 1, 1, 2])]


def times(factor, samples=SAMPLES):
    return [(domain, [length * factor for length in lengths]) for domain, lengths in samples]


def table(paths, *baseline):
    parts = against_baseline(paths, baseline, markdown=True).split("\n\n")
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]] for part in parts]


def test_a_draft_twice_as_good_on_every_prompt_is_that_for_certain(tmp_path):
    base = evaluation(tmp_path / "base.json", samples=SAMPLES)
    twice = evaluation(tmp_path / "twice.json", method="dflash", samples=times(2))

    ((row,),) = table([twice], base)

    assert row[0] == "dflash, 700 steps" and row[2] == "0"
    assert row[4] == "2.000 [2.000, 2.000]", "what differs between prompts differs in both"
    low, high = map(float, row[3].split("[")[1].strip("]").split(", "))
    assert high - low > 2, "unpaired it would be far from certain"


def test_the_interval_is_that_of_resampled_prompts(tmp_path):
    other = [("sql", [3, 3]), ("sql", [2]), ("copy", [6, 8, 8]), ("copy", [1, 3]), ("noise", [1, 2, 1, 1])]
    base = evaluation(tmp_path / "base.json", samples=SAMPLES)
    ours = evaluation(tmp_path / "ours.json", samples=other, method="dflash")

    ((row,),) = table([ours], base)

    def ratio_of(prompts):
        one, two = (np.mean([length for number in prompts for length in of[number][1]]) for of in (other, SAMPLES))
        return one / two

    generator = np.random.default_rng(9)
    drawn = [ratio_of(generator.integers(0, 5, 5)) for _ in range(4000)]
    ratio, low, high = (float(part.strip("[],")) for part in row[4].split())
    assert ratio == pytest.approx(ratio_of(range(5)), abs=6e-4)
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.02)


def test_seeds_are_pooled_and_their_spread_is_of_equal_seeds(tmp_path):
    ours = [
        evaluation(tmp_path / f"a{seed}.json", method="dflash", seed=seed, samples=times(factor))
        for seed, factor in ((0, 2), (1, 3), (2, 6))
    ]
    base = [evaluation(tmp_path / f"b{seed}.json", seed=seed, samples=times(seed + 1)) for seed in (1, 0)]

    ((row,),) = table(ours, *base)

    assert row[1] == "3"
    assert row[4].startswith(f"{(2 + 3 + 6) / 3 / 1.5:.3f} [")
    assert row[5] == "1.500 - 2.000", "seed 0: 2 / 1, seed 1: 3 / 2, and there is no other seed 2"


def test_drawn_replies_have_a_row_of_their_own(tmp_path):
    base = evaluation(tmp_path / "base.json", samples=SAMPLES, sampled=(SAMPLES, 1.0, 1.0))
    ours = evaluation(tmp_path / "ours.json", method="dflash", samples=times(2), sampled=(times(3), 1.0, 1.0))
    greedy = evaluation(tmp_path / "greedy.json", method="dspark", objective="dspark", samples=times(4))

    ((first, second, third),) = table([ours, greedy], base)

    assert first[4] == "2.000 [2.000, 2.000]"
    assert second[0] == "" and second[2] == "1" and second[4] == "3.000 [3.000, 3.000]"
    assert third[4] == "4.000 [4.000, 4.000]"


def test_what_cannot_be_paired_is_refused(tmp_path):
    base = evaluation(tmp_path / "base.json", samples=SAMPLES)
    fewer = evaluation(tmp_path / "fewer.json", samples=SAMPLES[:4])
    other = evaluation(tmp_path / "other.json", method="dflash", samples=SAMPLES)
    with pytest.raises(UsageError, match=r"of other prompts .* and cannot be paired"):
        table([fewer], base)
    with pytest.raises(UsageError, match="domino, 700 steps and dflash, 700 steps are several drafts"):
        table([fewer], base, other)
    done = CliRunner().invoke(cli.commands, ["report", str(base), "--against", str(base), "--forced"])
    assert isinstance(done.exception, UsageError) and "leave one out" in str(done.exception)


def test_replies_without_a_call_have_no_ratio(tmp_path):
    base, silent = evaluation(tmp_path / "base.json", samples=SAMPLES), tmp_path / "silent.json"
    silent.write_text(re.sub(r'"lengths": \[[^]]*\]', '"lengths": []', base.read_text()))

    ((row,),) = table([base], silent)

    assert row[3] != "-" and row[4:] == ["-", "-"]
    assert table([silent], base)[0][0][3:] == ["-", "-", "-"]


def curve(tmp_path, *points, name="kl", method="dflash"):
    return [
        evaluation(tmp_path / f"{name}{steps}.json", method=method, objective=name, steps=steps, samples=times(factor))
        for steps, factor in points
    ]


def test_how_many_steps_would_have_done(tmp_path):
    base = evaluation(tmp_path / "base.json", steps=400, samples=times(4))
    found = table(curve(tmp_path, (100, 2), (400, 6), (1600, 7)), base)

    assert len(found[0]) == 3, "a row a draft"
    assert found[1] == [["DFlash, kl", "100, 400, 1,600", "200 [200, 200]", "0.50"]], "half way in the logarithm"

    early = curve(tmp_path, (100, 5), (400, 6), name="tv")
    late = curve(tmp_path, (100, 2), (400, 3), name="lk-alpha")
    rows = table([*early, *late], base)[1]
    assert [row[2:] for row in rows] == [["≤ 100 [≤ 100, ≤ 100]", "-"], ["> 400 [> 400, > 400]", "-"]]
    assert len(table(early[:1], base)) == 1, "one number of steps is no curve"


def test_the_screen_says_what_it_is_compared_with(tmp_path):
    base = evaluation(tmp_path / "base.json", steps=400, samples=times(2))
    drafts = map(str, curve(tmp_path, (100, 1), (400, 3)))
    done = CliRunner().invoke(cli.commands, ["report", *drafts, "--against", str(base)])
    assert done.exit_code == 0, done.output
    assert "ratio to domino, 400 steps" in done.output and "as good as domino, 400 steps" in done.output


def test_other_blocks_recipes_and_caches_are_no_points_of_one_curve(tmp_path):
    base = evaluation(tmp_path / "base.json", steps=400, samples=times(4))
    small = curve(tmp_path, (100, 2), (400, 3))
    for changes in ({"block_size": 16}, {"parameters": 7}, {"recipe": "another"}):
        odd = evaluation(tmp_path / "odd.json", method="dflash", objective="kl", steps=400, samples=times(9), **changes)
        reached = table([*small, odd], base)[1:]
        assert reached == [] if "recipe" in changes else reached[0][0][2] == "> 400 [> 400, > 400]"


def test_prompts_without_a_call_are_no_part_of_a_resample(tmp_path):
    samples = [("sql", [2, 4]), ("sql", [3, 3]), *[("noise", [1])] * 6]
    paths = [evaluation(tmp_path / f"{factor}.json", samples=times(factor, samples)) for factor in (1, 2)]
    for path in paths:
        path.write_text(re.sub(r'"lengths": \[[12]\]', '"lengths": []', path.read_text()))
    ((row,),) = table(paths[1:], paths[0])
    assert row[4] == "2.000 [2.000, 2.000]"


def test_prompts_are_told_apart_by_their_tokens(tmp_path):
    base, ours = (evaluation(tmp_path / f"{name}.json", method=name, samples=SAMPLES) for name in ("domino", "dflash"))
    ours.write_text(ours.read_text().replace('"lengths"', '"prompt": "ab", "lengths"'))
    with pytest.raises(UsageError, match="of other prompts"):
        table([ours], base)


@given(st.lists(st.floats(1, 9), min_size=2, max_size=6), st.floats(1, 9), st.data())
def test_a_crossing_lies_between_the_points_around_it(lengths, wanted, data):
    steps = sorted(data.draw(st.sets(st.integers(1, 10_000), min_size=len(lengths), max_size=len(lengths))))

    found = steps_to_reach(steps, lengths, wanted)

    if max(lengths) < wanted:
        assert found == np.inf
    elif lengths[0] >= wanted:
        assert found == steps[0]
    else:
        assert steps[0] <= found <= steps[-1]
        assert np.interp(np.log(found), np.log(steps), lengths) == pytest.approx(wanted, abs=1e-6)
        assert all(length < wanted for count, length in zip(steps, lengths, strict=True) if count < found * (1 - 1e-9))
