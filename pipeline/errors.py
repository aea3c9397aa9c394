"""Typed errors for what a user can get wrong or the machine lacks, each with its exit code.

`pipeline/process.py` prints each as one line on standard error. A message states what was found, what was wanted and
what to do.
"""


class PipelineError(Exception):
    """Base of every error that is not a bug in this program."""

    code = 1


class ProofError(PipelineError):
    """A proof failed: outputs differ, an export does not match, a loss is not finite. Exit code 1."""


class UsageError(PipelineError):
    """A wrong option, recipe, path or model, or an identity that does not match. Exit code 2."""

    code = 2


class DataError(PipelineError):
    """An unusable corpus or chat template, or too many refused samples. Exit code 3."""

    code = 3


class CacheError(PipelineError):
    """A damaged cache or an unknown format version. Exit code 4."""

    code = 4


class RoomError(PipelineError):
    """Not enough disk or memory, or a read-only disk. Exit code 5."""

    code = 5


def first_line(error: object, most: int | None = 160) -> str:
    """Return the first line of an error's message, `most` characters of it; its type's name where it says nothing."""
    return str(error).strip().split("\n")[0][:most] or type(error).__name__


def cause_of(error: Exception) -> str:
    """Return what the system says of an error, such as "No such file or directory", else the error's own text."""
    return getattr(error, "strerror", None) or str(error)
