"""A sweep's figures: each run's, seeds pooled, settings paired by reply, and what makes runs hard to compare.

B resamples   n replies
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.evaluation.accept_length import bootstrap, resamples
from pipeline.evaluation.reports import QUANTILES
from pipeline.runs.folder import read_result
from pipeline.runs.run_logs import TIMING, cumulative_seconds, read_log
from pipeline.runs.sweep_record import PrunedAt, setting_text
from stages.train_draft.batches import READING
from stages.train_draft.sweep_plan import PlannedRun
from stages.train_draft.sweep_settings import SEED, Axis, Setting

HELDOUT_DIFFERS = (
    "not all runs are measured on the same held-out samples: ratios are over the replies that both measured"
)

Facts = dict  # of a run, as in `SweptRun`, and its `replies`: sample, first row, tokens, calls


def run_facts(
    run: PlannedRun, failed: str | None = None, pruned: PrunedAt | None = None, trial: int | None = None
) -> Facts:
    """Return what is known of a run; `accept_len` is None where it is not finished or nothing could be measured."""
    result = None if failed or pruned else read_result(run.path)
    figures = result and result.eval
    measured = bool(figures and figures.calls)
    state = "failed" if failed else "pruned" if pruned else "finished" if result else "unfinished"
    return {
        "setting": run.setting,
        "run": str(run.path),
        "state": state,
        "steps": run.steps,
        "parameters": result and result.parameters,
        "accept_len": figures.accept_len if measured else None,
        "interval": figures.interval if measured else None,
        "calls": figures.calls if figures else 0,
        "failed": failed,
        "pruned": pruned and pruned.model_dump(),
        "data": run.data,
        "heldout": run.heldout,
        "seconds": training_seconds(run.path),
        "trial": trial,
        "replies": figures.replies if figures else [],
    }


def refused_facts(setting: Setting, folder: Path, failed: str, trial: int) -> Facts:
    """Return the facts of a trial that no run can be made of. folder: of its sweep."""
    return {
        "setting": setting,
        "run": str(folder),
        "state": "failed",
        "steps": 0,
        "parameters": None,
        "accept_len": None,
        "interval": None,
        "calls": 0,
        "failed": failed,
        "pruned": None,
        "data": "",
        "heldout": "",
        "seconds": None,
        "trial": trial,
        "replies": [],
    }


def training_seconds(run: Path) -> float | None:
    """Return the seconds that a run spent on its steps, over all its starts; None where its log says nothing."""
    try:
        lines = read_log(run / TIMING)
    except PipelineError:  # no figure of the draft depends on it
        return None
    seconds = cumulative_seconds(lines)
    return round(seconds[-1][1], 3) if seconds else None


def without_seed(setting: Setting) -> Setting:
    return {key: value for key, value in setting.items() if key != SEED}


def by_setting(facts: Sequence[Facts]) -> list[list[Facts]]:
    """Return the runs in groups that differ only in their seed."""
    groups = defaultdict(list)
    for fact in facts:
        groups[setting_text(without_seed(fact["setting"]))].append(fact)
    return list(groups.values())


def pool_seeds(facts: Sequence[Facts]) -> list[dict]:
    """Return one entry for runs that differ only in their seed: accept length over all seeds, and that of each seed.

    The 95 % interval is a bootstrap over replies. The seeds' decodings of one reply are resampled together, since they
    are not independent: the interval is that of these seeds' mean, and `seeds` shows how far seeds differ.
    """
    return [_pool(members) for members in by_setting(facts)]


def _pool(members: list[Facts]) -> dict:
    counts = list(_counts(members).values())
    tokens_n, calls_n = np.stack(counts).T if counts else np.zeros((2, 0))
    measured = [fact for fact in members if fact["accept_len"] is not None]
    return {
        "setting": without_seed(members[0]["setting"]),
        "accept_len": float(tokens_n.sum() / calls_n.sum()) if measured else None,
        "interval": bootstrap(tokens_n, calls_n, seed=0) if measured else None,
        "runs": len(members),
        "measured": len(measured),
        "seeds": [fact["accept_len"] for fact in measured],
    }


def _counts(facts: Sequence[Facts]) -> dict[tuple[int, int], np.ndarray]:
    """Return tokens and calls [2] of each reply, by its sample and first row, summed over runs."""
    replies = defaultdict(lambda: np.zeros(2))
    for sample, start, tokens, calls in itertools.chain.from_iterable(fact["replies"] for fact in facts):
        replies[sample, start] += tokens, calls
    return replies


def ratios(facts: Sequence[Facts], axes: Sequence[Axis]) -> list[dict]:
    """Return the ratio of each setting to the best one, and of any two that differ in the value of one axis only, the
    better one over the other. axes: those of a grid; none: only the ratios to the best.

    The best of many is so by luck, too: its ratios flatter it, the more the more settings there are.
    """
    groups = {setting_text(without_seed(members[0]["setting"])): members for members in by_setting(facts)}
    ranked = [entry for entry in rank_by_accept_length(pool_seeds(facts)) if entry["accept_len"] is not None]
    found = []
    for at, better in enumerate(ranked):
        for other in ranked[at + 1 :]:
            changed = [axis for axis in axes if _differs(better["setting"], other["setting"], axis.keys)]
            pair = [groups[setting_text(entry["setting"])] for entry in (better, other)]
            if at == 0 and (of_best := paired_ratio(*reversed(pair))):
                found.append(of_best)
            if len(changed) == 1 and (ratio := paired_ratio(*pair)):
                found.append(ratio)
    return found


def _differs(one: Setting, other: Setting, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key in one and one[key] != other[key]]


def paired_ratio(members: Sequence[Facts], base: Sequence[Facts]) -> dict | None:
    """Return the ratio of two settings' accept lengths over the seeds and replies that both measured; None without any.

    Every resample takes the same replies of both, as `reports.paired_accept_lengths` does of prompts.
    """
    mine, others = (
        {fact["setting"].get(SEED): fact for fact in facts if fact["accept_len"] is not None}
        for facts in (members, base)
    )
    seeds = [seed for seed in mine if seed in others]
    counts = [_counts([of[seed] for seed in seeds]) for of in (mine, others)]
    replies = sorted(counts[0].keys() & counts[1].keys())
    if not replies:
        return None
    weights_Bn = resamples(len(replies), seed=0)
    (tokens_n, calls_n), (base_tokens_n, base_calls_n) = (_arrays(of, replies) for of in counts)
    drawn_B = (weights_Bn @ tokens_n) / (weights_Bn @ calls_n)
    base_B = (weights_Bn @ base_tokens_n) / (weights_Bn @ base_calls_n)
    one, other = without_seed(members[0]["setting"]), without_seed(base[0]["setting"])
    return {
        "setting": one,
        "to": other,
        "differs": _differs(one, other, list(one)),
        "value": float(tokens_n.sum() / calls_n.sum() / (base_tokens_n.sum() / base_calls_n.sum())),
        "interval": [float(edge) for edge in np.quantile(drawn_B / base_B, QUANTILES)],
        "by_seed": [_length(mine[seed], replies) / _length(others[seed], replies) for seed in seeds],
        "replies": len(replies),
        "same_data": all(mine[seed]["data"] == others[seed]["data"] for seed in seeds),
    }


def _arrays(counts: Mapping[tuple[int, int], np.ndarray], replies: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return tokens and calls [2, n] of these replies."""
    return np.stack([counts[reply] for reply in replies]).T


def _length(fact: Facts, replies: Sequence[tuple[int, int]]) -> float:
    tokens_n, calls_n = _arrays(_counts([fact]), replies)
    return float(tokens_n.sum() / calls_n.sum())


def data_warnings(runs: Sequence[PlannedRun], names: Mapping[Path, str]) -> list[str]:
    """Return a line for runs that differ in the samples they learn from, or are measured on, though their recipes are
    alike in all that should decide these: the comparison of such runs is one of data, too."""
    groups: dict[tuple, list[PlannedRun]] = defaultdict(list)
    for run in runs:
        train = run.resolved.recipe.train
        groups[tuple(getattr(train, name) for name in (*READING, "heldout"))].append(run)
    lines = [line for group in groups.values() for line in _data_warning(group, names)]
    if len({run.heldout for run in runs}) > 1:
        lines.append(HELDOUT_DIFFERS)
    return lines


def _data_warning(runs: Sequence[PlannedRun], names: Mapping[Path, str]) -> list[str]:
    by_data: dict[str, list[PlannedRun]] = defaultdict(list)
    for run in runs:
        by_data[run.data].append(run)
    if len(by_data) < 2:
        return []
    parts = [f"{_named(of, names)} on {len(of[0].split.train):,} samples" for of in by_data.values()]
    seed = runs[0].resolved.recipe.train.seed
    return [
        f"train.seed = {seed}, but not the same data: {'; '.join(parts)}: samples whose states were refused in a "
        "column that a draft reads do not train it; choose draft.layers that all samples have, for a fair comparison"
    ]


def _named(runs: Sequence[PlannedRun], names: Mapping[Path, str]) -> str:
    numbers = [names[run.path].removeprefix("run ") for run in runs]
    shown = ", ".join(numbers[:8]) + ", …" * (len(numbers) > 8)
    return f"{'runs' if len(numbers) > 1 else 'run'} {shown}"


def rank_by_accept_length(facts: Sequence[dict]) -> list[dict]:
    """Return runs by accept length, best first; those without one come last. Ties keep the grid's order."""
    return sorted(facts, key=lambda fact: math.inf if fact["accept_len"] is None else -fact["accept_len"])
