"""The certificate of int8 and int6: what they do right passes whatever the states, what is broken is refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.cache.codecs import CODECS, error_certificate
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.error_certificate import Certificate, calibrate, checked_calibration
from pipeline.cache.codecs.lossy import Encoded
from pipeline.errors import ProofError
from pipeline.target.head import TargetHead
from pipeline.tensors import as_stored

INT8, INT6 = CODECS["int8"], CODECS["int6"]
ROWS, WIDTH, V = 400, 256, 512


def states(kind: str, seed: int = 0) -> torch.Tensor:
    """States [R, D] in bfloat16, as layers of targets are. In order of how much of the norm a few channels hold."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((ROWS, WIDTH))
    std, mean = np.exp(rng.standard_normal(WIDTH) * 0.5), rng.standard_normal(WIDTH)
    if kind == "massive":
        # Three channels hold nearly all of the norm of most tokens and none of some: what is left of those is small
        # against the step of a channel that is wide.
        std[:3], mean[:3] = (300, 500, 800), (-600, 900, 2500)
        z[::7, :3] = -mean[:3] / std[:3]
    if kind == "sinks":
        z[::50] *= 12
        z[::50, :2] = 2000
    if kind == "heavy tails":
        z = rng.standard_t(3, z.shape)
    return torch.from_numpy((z * std + mean).astype(np.float32)).bfloat16()


KINDS = ("ordinary", "massive", "sinks", "heavy tails")


def measured(truth_RD: torch.Tensor, held: Encoded, head: TargetHead | None = None) -> dict:
    found = Certificate("final" if head else "aux.9", held.codec.name, calibrate(as_stored(truth_RD)), head)
    found.add(truth_RD, held.decode())
    return found.facts(0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 31, 32, ROWS])
@pytest.mark.parametrize(("codec", "of_token", "of_channels"), [("int8", 0.012, 0.015), ("int6", 0.04, 0.037)])
def test_states_of_every_kind_pass(kind, dtype, rows, codec, of_token, of_channels):
    truth_RD = states(kind).to(dtype)
    calibration = calibrate(as_stored(truth_RD))
    part_RD = truth_RD[7 : 7 + rows]
    found = Certificate("aux.9", codec, calibration)
    found.add(part_RD, CODECS[codec].encode_to_host(part_RD, calibration).decode())
    says = found.facts(0.0)
    assert says["of_token"] < of_token and says["of_channels"] < of_channels and says["of_promise"] < 1


def test_a_token_whose_norm_lies_in_other_channels_is_judged_in_their_spread():
    says = measured(truth_RD := states("massive"), INT8.encode_to_host(truth_RD, calibrate(as_stored(truth_RD))))
    assert says["worst_token"] > 0.2 > 0.005 > says["error"], "relative to its norm such a token seems lost"
    assert says["of_token"] < 0.0095


def with_values(change: Callable[[np.ndarray], None]) -> Callable[[Encoded], Encoded]:
    def broken(held: Encoded) -> Encoded:
        values, scale = held.arrays[0].copy(), held.arrays[1]
        change(values)
        return replace(held, arrays=(values, scale))

    return broken


def with_scale(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Encoded], Encoded]:
    """`change` is given the scales as float32 [R, G]."""

    def broken(held: Encoded) -> Encoded:
        scale_RG = change((held.arrays[1].astype(np.uint32) << 16).view(np.float32).copy())
        scale = (scale_RG.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return replace(held, arrays=(held.arrays[0], scale))

    return broken


def with_channels(change: Callable[[np.ndarray, np.ndarray], None]) -> Callable[[Encoded], Encoded]:
    """`change` is given mean and spread [D]."""

    def broken(held: Encoded) -> Encoded:
        mean, std = held.calibration.mean.copy(), held.calibration.std.copy()
        change(mean, std)
        return replace(held, calibration=Calibration(mean, std))

    return broken


def times(column: slice | int, factor: float, rows: slice = slice(None)) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[rows, column] *= factor
        return values

    return change


def swapped(values: np.ndarray) -> None:
    values[:, [40, 41]] = values[:, [41, 40]]


def put(values: np.ndarray, others: np.ndarray) -> None:
    values[:] = others


def moved(held: Encoded, row: int, column: int) -> Encoded:
    """Its escapes moved by so many rows and channels."""
    outliers = held.outliers.copy()
    outliers[:, 0], outliers[:, 1] = (outliers[:, 0] + row) % ROWS, (outliers[:, 1] + column) % WIDTH
    return replace(held, outliers=outliers)


# What a codec may get wrong, and the bounds that then are passed, on states some of whose channels are massive.
ENTRY, TOKEN, CHANNELS = "an entry is off by", "a token by", "a tenth of the channels by"
BROKEN: dict[str, tuple[Callable[[Encoded], Encoded], tuple[str, ...]]] = {
    "the scale of one group doubled": (with_scale(times(1, 2.0)), (ENTRY, TOKEN, CHANNELS)),
    "the scale of one group halved": (with_scale(times(0, 0.5)), (ENTRY, TOKEN, CHANNELS)),
    "the scale of one group of one row doubled": (
        with_scale(times(1, 2.0, slice(9, 10))),
        (ENTRY, TOKEN, CHANNELS),
    ),
    "the scales of two groups exchanged": (with_scale(lambda scale_RG: scale_RG[:, ::-1]), (ENTRY, TOKEN, CHANNELS)),
    "the scales of the next row": (
        with_scale(lambda scale_RG: np.roll(scale_RG, 1, axis=0)),
        (ENTRY, TOKEN, CHANNELS),
    ),
    "one scale for the whole column": (
        with_scale(lambda scale_RG: np.full_like(scale_RG, scale_RG.mean())),
        (ENTRY, TOKEN, CHANNELS),
    ),
    "mean dropped": (with_channels(lambda mean, std: mean.fill(0)), (ENTRY, TOKEN, CHANNELS)),
    "mean dropped of one channel": (
        with_channels(lambda mean, std: times(np.abs(mean).argmax(), 0)(mean[None])),
        (ENTRY, TOKEN),
    ),
    "spread dropped": (with_channels(lambda mean, std: std.fill(1)), (ENTRY, TOKEN, CHANNELS)),
    "spread of one channel doubled": (
        with_channels(lambda mean, std: times(77, 2.0)(std[None])),
        (ENTRY, TOKEN),
    ),
    "means of two channels exchanged": (with_channels(lambda mean, std: swapped(mean[None])), (ENTRY, TOKEN)),
    "decoded with another layer's calibration": (
        lambda held: replace(held, calibration=calibrate(as_stored(states("ordinary", seed=5)))),
        (ENTRY, TOKEN, CHANNELS),
    ),
    "two channels exchanged": (with_values(swapped), (ENTRY, TOKEN)),
    "the last group lost": (with_values(times(slice(128, None), 0)), (ENTRY, TOKEN, CHANNELS)),
    "the next row's values": (with_values(lambda q: put(q, np.roll(q, 1, axis=0))), (ENTRY, TOKEN, CHANNELS)),
    "one row lost": (with_values(times(slice(None), 0, slice(100, 101))), (ENTRY, TOKEN, CHANNELS)),
    "clamped at 64": (with_values(lambda q: put(q, q.clip(-64, 64))), (ENTRY, TOKEN, CHANNELS)),
    "negative values clamped at 0": (with_values(lambda q: put(q, q.clip(0, 127))), (ENTRY, TOKEN, CHANNELS)),
    "half of the bits": (with_values(lambda q: put(q, q // 16 * 16)), (ENTRY, TOKEN, CHANNELS)),
    "rounded down, not to the nearest": (with_values(lambda q: put(q, np.maximum(q, -126) - 1)), (TOKEN,)),
    "two levels towards zero": (
        with_values(lambda q: put(q, np.sign(q) * np.maximum(np.abs(q) - 2, 0))),
        (ENTRY, TOKEN, CHANNELS),
    ),
    "escapes dropped": (lambda held: replace(held, outliers=held.outliers[:0]), (ENTRY, TOKEN)),
    "one escape dropped": (lambda held: replace(held, outliers=held.outliers[1:]), (ENTRY, TOKEN)),
    "escapes a channel further": (lambda held: moved(held, row=0, column=1), (ENTRY, TOKEN)),
    "escapes a row further": (lambda held: moved(held, row=1, column=0), (ENTRY, TOKEN)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_codec_broken_by_hand_is_refused_by_these_bounds(how):
    truth_RD = states("massive")
    held, (broken, bounds) = INT8.encode_to_host(truth_RD, calibrate(as_stored(truth_RD))), BROKEN[how]
    with pytest.raises(ProofError, match=r"aux\.9 does not fit int8: .*; keep this column whole: --codec") as refused:
        measured(truth_RD, broken(held))
    assert tuple(bound for bound in (ENTRY, TOKEN, CHANNELS) if bound in str(refused.value)) == bounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", BROKEN)
def test_a_codec_broken_by_hand_is_refused_on_states_of_every_kind(how, kind):
    truth_RD = states(kind)
    with pytest.raises(ProofError, match="does not fit int8"):
        measured(truth_RD, BROKEN[how][0](INT8.encode_to_host(truth_RD, calibrate(as_stored(truth_RD)))))


@pytest.mark.parametrize("levels", [63, 31, 15])
def test_a_coarser_encoder_is_refused_as_it_does_worse_on_a_token(levels, monkeypatch):
    monkeypatch.setattr(INT8, "largest", levels)
    with pytest.raises(ProofError, match=r"aux\.9 does not fit int8: a token by so much of its own deviation: "):
        checked_calibration("aux.9", "int8", states("massive"), "cpu")


# What an encoder or decoder of int6 may get wrong beyond what one of int8 may.
SIX: dict[str, Callable[[np.ndarray], None]] = {
    "the fourth quarter lost": lambda values: put(values, values & 63),
    "the fourth quarter's bits in another order": lambda values: put(
        values, np.roll(values & 192, WIDTH // 4, axis=1) | values & 63
    ),
    "the first quarters exchanged": lambda values: put(values, np.roll(values & 63, WIDTH // 4, axis=1) | values & 192),
    "one channel's code off by one": lambda values: put(values[:, 5], values[:, 5] ^ 1),
    "the lowest bit lost": lambda values: put(values, values & 0xFE),
    "one row lost": lambda values: put(values[100], values[100] * 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SIX)
def test_an_int6_broken_by_hand_is_refused_on_states_of_every_kind(how, kind):
    truth_RD = states(kind)
    held = INT6.encode_to_host(truth_RD, calibrate(as_stored(truth_RD)))
    with pytest.raises(ProofError, match="does not fit int6"):
        measured(truth_RD, with_values(SIX[how])(held))


@pytest.mark.parametrize("kind", KINDS)
def test_an_int6_of_half_the_levels_is_refused(kind, monkeypatch):
    fine, truth_RD = INT6.round_, states(kind)
    monkeypatch.setattr(INT6, "round_", lambda z_rD: fine(z_rD).div_(2).round_().mul_(2).clamp_(-30, 30))
    with pytest.raises(ProofError, match=r"aux\.9 does not fit int6: .*a token by"):
        measured(truth_RD, INT6.encode_to_host(truth_RD, calibrate(as_stored(truth_RD))))


def test_one_token_that_its_group_cannot_hold_is_refused_without_the_second_rule_of_escapes(monkeypatch):
    truth_RD = states("ordinary")
    calibration = calibrate(as_stored(truth_RD))
    mean_D, std_D = calibration.on("cpu")
    truth_RD[5, ::128] = (mean_D + 15.5 * std_D)[::128].bfloat16()  # one channel of each group
    found = Certificate("aux.9", "int8", calibration)
    found.add(truth_RD, INT8.encode_to_host(truth_RD, calibration).decode())
    found.facts(0.0)
    monkeypatch.setattr(INT8, "outlier_rms", 1e9)
    found = Certificate("aux.9", "int8", calibration)
    found.add(truth_RD, INT8.encode_to_host(truth_RD, calibration).decode())
    with pytest.raises(ProofError, match="a token by so much of its own deviation"):
        found.facts(0.0)


def test_states_in_the_spreads_of_another_layer_are_judged_by_how_far_they_range_themselves():
    truth_RD = states("ordinary")
    # The wide half of the channels sets the step of every group, and the others are narrow.
    narrow_RD = (truth_RD.float() - truth_RD.float().mean(0)) / truth_RD.float().std(0)
    narrow_RD[:, ::2] *= 0.02
    narrow_RD = narrow_RD.bfloat16()
    wrong = Calibration(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    found = Certificate("aux.9", "int8", wrong)
    found.add(narrow_RD, INT8.encode_to_host(narrow_RD, wrong).decode())
    with pytest.raises(ProofError, match=r"does not fit int8: a tenth of the channels by more of their range"):
        found.facts(0.0)
    checked_calibration("aux.9", "int8", narrow_RD, "cpu")


def test_a_final_state_is_judged_by_what_the_head_makes_of_it():
    truth_RD = states("ordinary")
    head_VD = torch.from_numpy(np.random.default_rng(2).standard_normal((V, WIDTH)).astype(np.float32)).bfloat16()
    calm, sharp = (TargetHead(weight_VD, weight_VD) for weight_VD in (0.02 * head_VD, 2 * head_VD))
    held = INT8.encode_to_host(truth_RD, calibrate(as_stored(truth_RD)))

    says = measured(truth_RD, held, calm)
    assert 0 < says["kl"] < 1e-4 and says["top1"] > 0.95
    with pytest.raises(ProofError, match=r"final does not fit int8: what the head makes of it differs by a KL of .*"):
        measured(truth_RD, held, sharp)


def test_figures_that_are_not_numbers_are_refused():
    truth_RD = states("ordinary")
    found_RD = truth_RD.clone()
    found_RD[3, 3] = float("nan")
    found = Certificate("aux.9", "int8", calibrate(as_stored(truth_RD)))
    found.add(truth_RD, found_RD)
    found.add(truth_RD, truth_RD)
    with pytest.raises(ProofError, match="does not fit int8"):
        found.facts(0.0)


def test_of_a_large_vocabulary_some_rows_are_judged_by_the_head_and_they_say_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, WIDTH, generator=generator) / WIDTH**0.5
    head = TargetHead(weight, weight)
    truth_RD = states("ordinary")
    calibration = calibrate(as_stored(truth_RD))
    decoded_RD = INT8.encode_to_host(truth_RD, calibration).decode()

    def judged(most: int) -> tuple[int, dict]:
        monkeypatch.setattr(error_certificate, "MOST_LOGITS", most)
        found = Certificate("final", "int8", calibration, head)
        for first in range(0, ROWS, 100):
            found.add(truth_RD[first : first + 100], decoded_RD[first : first + 100])
        return found.judged, found.facts(0.0)

    (all_rows, whole), (some_rows, part) = judged(1 << 26), judged(error_certificate.SHADOW_ROWS * V // 8)

    assert (all_rows, some_rows) == (ROWS, 4 * 13)  # every eighth of 100
    assert part["kl"] == pytest.approx(whole["kl"], rel=0.5) and abs(part["top1"] - whole["top1"]) < 0.05
    same = whole.keys() - {"kl", "top1"}
    assert {name: whole[name] for name in same} == {name: part[name] for name in same}
