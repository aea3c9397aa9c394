"""Why a draft is accepted little: the likely causes, each checked on the run and its cache, those that bring about
others first.

A check returns a Finding: PROBLEM, this is it; NOTE, it may be a part of it, or cannot be told here; OK, not it.
"""

import math
import shlex

import numpy as np

from pipeline.cache import HiddenCache
from pipeline.cache.schema import CaptureRequest, read_log
from pipeline.runs.recipe import default_lr
from pipeline.target.on_policy import WARN_BELOW
from stages.doctor.examined_run import LOW, Case
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding
from stages.doctor.mismatch import command, gauge

LEAST_LOGGED = 8  # steps: losses of single batches differ
UNTOLD = "cannot be told here"


def off_policy(case: Case) -> Finding:
    """Whether the replies are the target's own, by the gauge of the capture, else by the final states."""
    agree, rows = gauge(case.cache)
    source = "at capture"
    if not rows:
        (agree, rows), source = case.greedy_share, "by the final states"
    return off_policy_of(case.cache, agree, rows, source)


def off_policy_of(cache: HiddenCache, agree: int, rows: int, source: str) -> Finding:
    """As `off_policy`, of the counts. source: how they were counted."""
    request = read_log(cache.path).request or CaptureRequest()
    corpus, model = request.corpus or "CORPUS", request.model or cache.identity.target.name or "MODEL"
    rewrite = f"`{shlex.join(['pipeline', 'regenerate', '--corpus', corpus, '--model', model, '--out', 'own.jsonl'])}`"
    facts = {"agree": agree, "rows": rows}
    if not rows:
        return Finding("off-policy corpus", NOTE, f"{UNTOLD}: the cache has no gauge and no final states", facts=facts)
    words = f"{agree / rows:.0%} of {rows:,} reply tokens are the target's own greedy choice ({source})"
    if agree < WARN_BELOW * rows:
        remedy = f"let the target itself write the replies, capture and train on those: {rewrite}"
        cost = f"below {WARN_BELOW:.0%} a draft learns another author's words, which the target does not accept"
        return Finding("off-policy corpus", PROBLEM, words, cost, remedy, facts)
    return Finding("off-policy corpus", OK, words, facts=facts)


def few_supervised(case: Case) -> Finding:
    """How many tokens of the samples are learned from."""
    table, train = case.cache.samples, case.split.train
    return mask_of(case.cache, table.supervised[train], table.length[train], case.split.unusable)


def mask_of(cache: HiddenCache, supervised_n: np.ndarray, length_n: np.ndarray, unusable_count: int) -> Finding:
    """As `few_supervised`, of samples' supervised tokens and lengths, and how many more cannot be learned from."""
    supervised, length, train = supervised_n, length_n, range(len(length_n))
    share, middle = supervised.sum() / max(1, length.sum()), float(np.median(supervised)) if len(supervised) else 0.0
    unusable = unusable_count / max(1, len(cache))
    facts = {"share": float(share), "median": middle, "samples": len(train), "unusable": unusable_count}
    words = f"{share:.0%} of {int(length.sum()):,} tokens, {middle:.0f} in the middle one of {len(train):,} samples"
    words += f"; {unusable_count} samples unusable" if unusable else ""
    if share < 0.05 or middle < 4 or unusable > 0.5:
        remedy = f"look at them with `pipeline inspect {cache.path} --sample 0`, then mend roles, template or --turns"
        return Finding("loss mask", PROBLEM, words, "hardly anything to learn from", remedy, facts)
    return Finding("loss mask", OK, words, facts=facts)


def other_domains(case: Case) -> Finding:
    """Whether what is measured is of domains that were trained on."""
    table = case.cache.samples
    trained = {table.domain[index] for index in case.split.train.tolist()}
    if case.report:
        counts = {name: figures.calls for name, figures in case.report.domains.items()}
    else:
        counts: dict[str, int] = {}
        for index in case.split.heldout.tolist():
            counts[table.domain[index]] = counts.get(table.domain[index], 0) + int(table.supervised[index])
    unseen = sorted(name for name in counts if name not in trained)
    share = sum(counts[name] for name in unseen) / max(1, sum(counts.values()))
    facts = {"trained": sorted(trained), "unseen": unseen, "share": share}
    if share > 0.5:
        words = (
            f"{share:.0%} of what is measured is of domains not trained on: {', '.join(name or '-' for name in unseen)}"
        )
        remedy = "add such conversations with `pipeline cache-hidden --append`, or measure on the training's domains"
        return Finding("other domains", PROBLEM, words, "", remedy, facts)
    state = NOTE if unseen else OK
    return Finding("other domains", state, f"{share:.0%} of what is measured is of domains not trained on", facts=facts)


def vocabulary(case: Case) -> Finding:
    """The share of held-out reply tokens that the draft may propose."""
    name = "draft vocabulary"
    if getattr(case.config, "vocabulary", None) is None:
        return Finding(name, OK, "all of the target's ids may be proposed")
    may_V = case.draft.t2d.numpy()
    tokens = [ids[mask] for ids, mask in map(case.cache.tokens_of, case.heldout or case.split.train[:64].tolist())]
    found = float(may_V[np.concatenate(tokens)].mean())
    facts = {"vocabulary": case.config.vocabulary, "share": found}
    words = f"{found:.0%} of held-out tokens are among the {case.config.vocabulary:,} ids it may propose"
    if found < 0.75:
        used = len(
            np.unique(np.concatenate([ids[mask] for ids, mask in map(case.cache.tokens_of, case.split.train.tolist())]))
        )
        remedy = command(case, draft__vocabulary=min(used, case.config.vocab_size - 1))
        return Finding(
            name, PROBLEM, words, f"{1 - found:.0%} of first proposals are lost whatever it learns", remedy, facts
        )
    return Finding(name, OK if found > 0.9 else NOTE, words, facts=facts)


def diverged(case: Case) -> Finding:
    """Whether the loss rose again, or never was finite."""
    losses = np.array([line["loss"] for line in case.steps])
    if len(losses) < LEAST_LOGGED:
        return Finding("divergence", NOTE, f"{UNTOLD}: {len(losses)} steps are logged")
    last, first, best = float(np.median(losses[-3:])), float(losses[0]), float(losses.min())
    at = case.steps[int(losses.argmin())]["step"]
    facts = {"first": first, "best": best, "best_step": at, "last": last}
    words = f"loss {first:.2f} at first, {best:.2f} at best (step {at}), {last:.2f} at last"
    if last > first * 1.05 or (last - best > 0.5 * max(first - best, 1e-9) and last > 1.2 * best):
        remedy = command(case, train__lr=f"{peak_lr(case) / 5:.1g}")
        return Finding("divergence", PROBLEM, words, f"it rose again at lr {peak_lr(case):.1e}", remedy, facts)
    return Finding("divergence", OK, words, facts=facts)


def peak_lr(case: Case) -> float:
    return case.recipe.train.lr or max((line["lr"] for line in case.steps), default=0.0)


def untrained(case: Case) -> Finding:
    """Steps, loss against ln V, rate, and how often the gradient was clipped."""
    name, train = "too little training", case.recipe.train
    if not case.steps:
        return Finding(name, PROBLEM, "no step is logged", "", command(case), {})
    ordinary = default_lr(case.resolved.draft.hidden_size, case.resolved.recipe.train.optimizer)
    lr, chance = peak_lr(case), math.log(case.resolved.draft.proposable)
    last = case.steps[-1]
    scored = [value for value in last.get("slot_ce", ()) if value > 0]
    loss = sum(scored) / len(scored) if scored else last["loss"]
    accuracy = last.get("accuracy")
    clipped = float(np.mean([line["grad_norm"] > train.clip for line in case.steps]))
    scale = float(np.median([min(1.0, train.clip / max(line["grad_norm"], 1e-12)) for line in case.steps]))
    epochs = last["step"] * train.batch / max(1, len(case.split.train))
    facts = {
        "steps": last["step"], "epochs": epochs, "ce": loss, "ln_v": chance, "accuracy": accuracy, "lr": lr,
        "usual_lr": ordinary, "clipped": clipped, "clip_scale": scale,
    }  # fmt: skip
    words = (
        f"{last['step']:,} steps ({epochs:.1f} epochs), cross-entropy {loss:.2f} (a guess: ln V = {chance:.2f}), "
        f"accuracy {accuracy or 0:.0%}, lr {lr:.1e} (usual {ordinary:.1e}), {clipped:.0%} of steps clipped"
    )
    if lr < ordinary / 20 and loss > 0.3 * chance:
        return Finding(
            name, PROBLEM, words, "the rate is far below what learns", command(case, train__lr=f"{ordinary:g}"), facts
        )
    if loss > 0.5 * chance or (accuracy is not None and accuracy < 0.25):
        more = max(10 * last["step"], 400)
        remedy = command(case, train__steps=more)
        if clipped > 0.9 and scale < 0.02:
            remedy = command(case, train__clip=f"{100 * train.clip:g}")
            words += f", to {scale:.1%} of the gradient"
        return Finding(name, PROBLEM, words, "it has hardly learned yet", remedy, facts)
    return Finding(name, OK, words, facts=facts)


def overfitted(case: Case) -> Finding:
    """Teacher-forced figures on samples trained on against those held out."""
    return overfitted_of(case.forced_train, case.forced_heldout)


def overfitted_of(train: dict, heldout: dict) -> Finding:
    """As `overfitted`, of figures."""
    name = "learned by heart"
    if not train or not heldout:
        return Finding(name, NOTE, f"{UNTOLD}: nothing is held out, or no final states are there")
    seen, unseen = train["accept_len_tf"], heldout["accept_len_tf"]
    facts = {
        "train": seen,
        "heldout": unseen,
        "train_accuracy": train["accuracy"],
        "heldout_accuracy": heldout["accuracy"],
    }
    words = (
        f"teacher-forced {seen:.2f} (accuracy {train['accuracy']:.0%}) on samples trained on, {unseen:.2f} "
        f"({heldout['accuracy']:.0%}) on those held out"
    )
    if seen > LOW and unseen - 1 < 0.5 * (seen - 1):
        remedy = "more conversations (`pipeline cache-hidden --append`), or fewer epochs"
        return Finding(name, PROBLEM, words, "it knows its samples, not the target", remedy, facts)
    return Finding(name, OK, words, facts=facts)


def exposure(case: Case) -> Finding:
    """Teacher-forced figures against decoding on the same held-out samples, slot by slot."""
    name, forced, exact = "teacher forcing", case.forced_heldout, case.accepted
    if not forced or exact is None:
        return Finding(name, NOTE, f"{UNTOLD}: no held-out reply could be followed")
    return exposure_of(name, forced, exact, case.config.block_size)


def exposure_of(name: str, forced: dict, exact: dict, block: int) -> Finding:
    """As `exposure`, of figures."""
    slots = ", ".join(f"{share:.0%}" for share in exact["per_slot"])
    facts = {
        "forced": forced["accept_len_tf"],
        "accuracy": forced["accuracy"],
        "exact": exact["accept_len"],
        "per_slot": exact["per_slot"],
    }
    words = (
        f"accuracy {forced['accuracy']:.0%}, teacher-forced {forced['accept_len_tf']:.2f}, decoding "
        f"{exact['accept_len']:.2f}; calls that keep proposal 1, 2, ...: {slots}"
    )
    if forced["accept_len_tf"] - 1 > 2 * (exact["accept_len"] - 1) and forced["accept_len_tf"] > LOW:
        first = exact["per_slot"][0] if exact["per_slot"] else 0.0
        if first < 0.3:
            cost = "even the first proposal fails in decoding: where blocks start there, training's anchors were not"
            return Finding(
                name, PROBLEM, words, cost, "more train.anchors, so that every row is one; check the labels", facts
            )
        cost = f"later slots of {block} fail on the draft's own earlier proposals, which training showed it right"
        return Finding(
            name,
            PROBLEM,
            words,
            cost,
            f"a smaller draft.block_size (now {block}), or gamma so that early slots weigh more",
            facts,
        )
    return Finding(name, OK, words, facts=facts)
