"""What a target answered: one reply, as every engine gives it and as the journal and the corpus hold it."""

from dataclasses import dataclass

CUT, EMPTY = "length", "empty"  # stops after which a row is not asked on; others that end it are the engine's own


@dataclass(frozen=True)
class Reply:
    """One reply of the target.

    stop: why it ended: "stop", "length" at the limit, "tool_calls", or what else a server says. token_ids: what the
    target wrote, the token that ended it included; prompt_token_ids: what it was asked with; None where a server says
    neither. tokens: how many were written, None where a server does not count.
    """

    content: str
    stop: str
    reasoning_content: str | None = None
    tool_calls: list[dict] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    tokens: int | None = None

    @property
    def empty(self) -> bool:
        return not (self.content.strip() or self.reasoning_content or self.tool_calls)

    @property
    def ends_the_row(self) -> bool:
        """Whether no further turn is asked: a cut or an empty reply is nothing to go on from, a call wants a result."""
        return self.stop != "stop" or self.empty or bool(self.tool_calls)

    def message(self) -> dict:
        """Return the reply as a message, as a server is asked with it in later turns."""
        more = {"reasoning_content": self.reasoning_content, "tool_calls": self.tool_calls}
        return {"role": "assistant", "content": self.content, **{key: value for key, value in more.items() if value}}

    def as_dict(self) -> dict:
        """Return what is not None, for the journal."""
        return {key: value for key, value in vars(self).items() if value is not None}
