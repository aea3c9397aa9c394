"""Reports of evaluations, as `pipeline evaluate` writes them."""

import json
from pathlib import Path


def evaluation(
    file: Path,
    method: str = "domino",
    seed: int = 0,
    steps: int = 700,
    samples: list[tuple[str, list[int]]] = (),
    forced: dict[str, float] | None = None,
    sampled: tuple[list[tuple[str, list[int]]], float, float] | None = None,
    speed: dict[str, float] | None = None,
    **draft,
) -> Path:
    """Write an evaluation's report and return its path.

    samples: a domain and the lengths of its calls each. sampled: such samples, the target's and the draft's
    temperature. Other arguments change the report's `draft`.
    """
    report = {
        "target": "tiny",
        "draft": {"method": method, "steps": steps, "block_size": 8, "parameters": 1000, "seed": seed}
        | {"proposals": 8, **draft},
        "settings": {"max_new": 64},
        **replies(samples),
        "teacher_forced": forced or {},
        "speed": speed or {"speedup": 2.0},
        "lossless": {"prompts": len(samples), "identical": len(samples), "near_ties": 0},
    }
    if sampled is not None:
        drawn, temperature, of_draft = sampled
        report["sampled"] = {
            "temperature": temperature,
            "draft_temperature": of_draft,
            **replies(drawn),
            "lossless": {"tokens": 9, "place": 0.5, "spreads": 0.1},
        }
    file.write_text(json.dumps(report))
    return file


def replies(samples: list[tuple[str, list[int]]]) -> dict:
    """Return the parts of a report that are made of replies."""
    domains = sorted({domain for domain, _ in samples})
    return {
        "overall": figures([lengths for _, lengths in samples]),
        "domains": {name: figures([lengths for domain, lengths in samples if domain == name]) for name in domains},
        "samples": [{"domain": domain, "lengths": lengths} for domain, lengths in samples],
    }


def figures(replies: list[list[int]]) -> dict:
    tokens, calls = sum(map(sum, replies)), sum(map(len, replies))
    counts = {"prompts": len(replies), "calls": calls, "tokens": tokens}
    mean = tokens / max(calls, 1)
    return {**counts, "accept_len": mean, "interval": [mean, mean], "per_slot": [], "calls_saved": 0.5}
