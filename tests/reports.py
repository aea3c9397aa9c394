"""Reports of evaluations, as `pipeline evaluate` writes them."""

import json


def evaluation(file, method="domino", seed=0, steps=700, samples=(), forced=None, drawn=None, speed=None, **draft):
    """Write an evaluation's report of `samples`, pairs of a domain and its lengths; return its path."""
    domains = sorted({domain for domain, _ in samples})
    of = {name: [lengths for domain, lengths in samples if domain == name] for name in domains}
    report = {
        "target": "tiny",
        "draft": {"method": method, "steps": steps, "block_size": 8, "parameters": 1000, "seed": seed}
        | {"proposals": 8, **draft},
        "settings": {"max_new": 64},
        "overall": {"accept_len": 0.0, "calls_saved": 0.5},
        "domains": {
            name: {"accept_len": sum(map(sum, of[name])) / sum(map(len, of[name])), "calls": 1} for name in domains
        },
        "teacher_forced": forced or {},
        "speed": speed or {"speedup": 2.0},
        "lossless": {"prompts": len(samples), "identical": len(samples), "near_ties": 0},
        "samples": [{"domain": domain, "lengths": lengths} for domain, lengths in samples],
    }
    if drawn is not None:
        of_drawn, temperature, of_draft = drawn
        report["sampled"] = {
            "temperature": temperature,
            "draft_temperature": of_draft,
            "domains": {name: {"accept_len": 3.0, "calls": 1} for name, _ in of_drawn},
            "samples": [{"domain": domain, "lengths": lengths} for domain, lengths in of_drawn],
        }
    file.write_text(json.dumps(report))
    return file
