"""The jobs that are left: rows whose conversation is unfinished, each with its replies so far."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from stages.regenerate.prompts import PromptRow
from stages.regenerate.replies import Reply


@dataclass
class Job:
    """A row and its replies so far. The next turn's prompt holds the target's own earlier replies."""

    row: PromptRow
    replies: list[Reply] = field(default_factory=list)

    @property
    def turn(self) -> int:
        """The next turn to generate, from 0."""
        return len(self.replies)

    @property
    def done(self) -> bool:
        """Whether all replies are there."""
        return self.turn == len(self.row.segments) or bool(self.replies and self.replies[-1].ends_conversation)

    def messages(self) -> list[dict]:
        """Return the messages of the next prompt."""
        return self.row.messages([reply.message() for reply in self.replies])


@dataclass(frozen=True)
class Failure:
    """A prompt that was given up."""

    row: PromptRow
    turn: int
    cause: str


def pending_jobs(rows: Iterable[PromptRow], replies) -> Iterator[Job]:
    """Yield a job for each unfinished row. replies: returns the replies so far for a row's key."""
    for row in rows:
        job = Job(row, replies(row.key))
        if not job.done:
            yield job
