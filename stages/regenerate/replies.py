"""One reply of the target, as engines return it and as the journal and the corpus store it."""

from dataclasses import dataclass

CUT, EMPTY = "length", "empty"  # values of `stop` that end a conversation; engines have others


@dataclass(frozen=True)
class Reply:
    """One reply of the target.

    stop: the finish reason: "stop", "length", "tool_calls", or another of the server. token_ids: the generated ids, the
    stop token included; prompt_token_ids: the prompt's; None where a server returns none. tokens: how many were
    generated, None where a server does not count.
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
    def ends_conversation(self) -> bool:
        """Whether no further turn can follow: the reply is cut or empty, or calls a tool whose result is unknown."""
        return self.stop != "stop" or self.empty or bool(self.tool_calls)

    def message(self) -> dict:
        """Return the reply as a message for the prompts of later turns."""
        more = {"reasoning_content": self.reasoning_content, "tool_calls": self.tool_calls}
        return {"role": "assistant", "content": self.content, **{key: value for key, value in more.items() if value}}

    def as_dict(self) -> dict:
        """Return the fields that are not None, for the journal."""
        return {key: value for key, value in vars(self).items() if value is not None}
