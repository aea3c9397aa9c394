"""`pipeline doctor`: the machine on one screen; of a run, what is wrong with it."""

from pathlib import Path

from rich.console import Group
from rich.text import Text

from pipeline.errors import ProofError
from pipeline.visible_text import visible
from stages.doctor import devices, disk_hub_engines, machine
from stages.doctor.finding import NOTE, PROBLEM, Finding, findings_table, within


def examine_machine(cache: Path, python: Path | None = None) -> dict:
    """Return what this machine has, what will be used and why, and what is missing, as JSON values.

    cache: the folder where a cache lies or would lie. python: an engine's. Every check has a limit of time.
    """
    checks = [
        (5, "Python", machine.python, ""),
        (20, "packages", machine.packages, ""),
        (90, "torch", devices.torch_build, "nothing runs without torch"),  # a cold disk's first import
        (30, "GPU", devices.gpus, "everything would run on the CPU"),
        (15, "kernels", devices.kernels, ""),
        (5, "processors", machine.processors, ""),
        (5, "memory", machine.memory, ""),
        (5, "ulimits", machine.limits, ""),
        (30, "disk", lambda: disk_hub_engines.disk(cache), "captures and trainings wait for it"),
        (5, "/dev/shm", disk_hub_engines.shared_memory, ""),
        (2 * disk_hub_engines.HUB_S, "hub", disk_hub_engines.hub, "models and data sets have to be folders here"),
        (60, "engines", lambda: disk_hub_engines.engines(python), "no `serve-check` and no `--engine vllm`"),
    ]
    findings = [found for seconds, name, check, cost in checks for found in within(seconds, name, check, cost)]
    return {
        "state": "problem" if any(found.state == PROBLEM for found in findings) else "ok",
        "findings": [found.as_dict() for found in findings],
    }


def machine_table(report: dict) -> Group:
    """Return the machine's findings as one screen, and how many of them hinder."""
    findings = [Finding(**each) for each in report["findings"]]
    hinders = [found.check for found in findings if found.state == PROBLEM]
    notes = sum(found.state == NOTE for found in findings)
    last = f"hinders: {', '.join(hinders)}" if hinders else f"nothing hinders; {notes} notes"
    return Group(findings_table(findings), "", Text(visible(last), style="bold red" if hinders else "green"))


def examine_run(place: Path, **chosen) -> dict:
    """As `symptoms.examine`, which brings torch."""
    from stages.doctor.symptoms import examine

    return examine(place, **chosen)


def symptoms_table(report: dict) -> Group:
    from stages.doctor.symptoms import symptoms_table

    return symptoms_table(report)


def check_well(report: dict) -> None:
    """Raise ProofError, exit code 1, where something hinders."""
    hinders = [each for each in report["findings"] if each["state"] == PROBLEM]
    if hinders:
        first, of = hinders[0], len(report["findings"])
        remedy = f"; {first['remedy']}" if first["remedy"] else ""
        raise ProofError(f"{len(hinders)} of {of} checks failed, the first {first['check']}{remedy}")
