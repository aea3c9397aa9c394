"""What a check found, how long a check may take, and how findings are shown."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from rich.console import Group
from rich.text import Text

from pipeline.errors import PipelineError, first_line
from pipeline.visible_tables import grid
from pipeline.visible_text import visible

OK, NOTE, PROBLEM = "ok", "note", "problem"
STYLES = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line. state: OK, NOTE (it works, something is lost) or PROBLEM (it hinders). found: what is there. used: what
    will be used and why, or what is missing and what that costs. remedy: what to do. facts: the same as JSON values."""

    check: str
    state: str
    found: str
    used: str = ""
    remedy: str = ""
    facts: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


Check = Callable[[], "Finding | list[Finding]"]


def within(seconds: float, name: str, check: Check, cost: str = "", failed: str = PROBLEM) -> list[Finding]:
    """Return what a check finds; a PROBLEM where it raises a typed error, `failed` where it fails otherwise or hangs.

    It runs in a thread of its own, which is left behind where a driver or a disk does not answer. cost: what a user
    loses by that.
    """
    found: list[Finding] = []

    def run() -> None:
        try:
            of_check = check()
            found.extend(of_check if isinstance(of_check, list) else [of_check])
        except PipelineError as error:
            what, _, remedy = str(error).partition("; ")
            found.append(Finding(name, PROBLEM, what, cost, remedy))
        except Exception as error:  # of any library: a check that fails is a finding, and the others go on
            found.append(Finding(name, failed, f"{type(error).__name__}: {first_line(error)}", cost))

    thread = threading.Thread(target=run, name=f"doctor: {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        text = f"no answer within {seconds:g} s"
        return [Finding(name, failed, text, cost, "see whether that hangs elsewhere, too")]
    return found


def findings_table(findings: Iterable[Finding], words: dict[str, str] | None = None) -> Group:
    """Return findings as one table. words: what a state is called."""
    table = grid("", "", "")
    for finding in findings:
        state = Text((words or {}).get(finding.state, finding.state), style=STYLES[finding.state])
        text = "; ".join(part for part in (finding.found, finding.used) if part)
        if finding.remedy and finding.state != OK:
            text += f" -> {finding.remedy}"
        table.add_row(Text(visible(finding.check)), state, Text(visible(text)))
    return Group(table)
