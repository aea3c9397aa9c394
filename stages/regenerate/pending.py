"""What is left to ask: the rows whose conversation is not through, each with the replies that it has."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from stages.regenerate.prompts import PromptRow
from stages.regenerate.replies import Reply


@dataclass
class Job:
    """A row and its replies so far. The next turn is asked after the target's own earlier replies."""

    row: PromptRow
    replies: list[Reply] = field(default_factory=list)

    @property
    def turn(self) -> int:
        """Which turn is asked next, from 0."""
        return len(self.replies)

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask."""
        return self.turn == len(self.row.segments) or bool(self.replies and self.replies[-1].ends_the_row)

    def messages(self) -> list[dict]:
        """Return what is asked next."""
        return self.row.messages([reply.message() for reply in self.replies])


@dataclass(frozen=True)
class Failure:
    """A prompt that was given up."""

    row: PromptRow
    turn: int
    cause: str


def open_jobs(rows: Iterable[PromptRow], replies) -> Iterator[Job]:
    """Yield a job for each row that is not through. replies: a row's key to what it has."""
    for row in rows:
        job = Job(row, replies(row.key))
        if not job.done:
            yield job
