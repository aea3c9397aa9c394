"""Write the finished corpus, in the order of the prompts, and the failed prompts: atomically, as JSON Lines."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.cache.atomic import sync_folder, write_errors
from pipeline.corpus.regenerated import Regenerated
from stages.regenerate.pending import Failure
from stages.regenerate.prompts import PromptRow
from stages.regenerate.replies import Reply


def out_row(row: PromptRow, replies: list[Reply], record: Regenerated, token_ids: bool) -> dict:
    """Return a row of the output corpus: messages with the target's replies, fields passed on, generation record."""
    turns = []
    for reply in replies:
        message = reply.message()
        if token_ids and reply.token_ids is not None:
            message["token_ids"] = reply.token_ids
            if reply.prompt_token_ids is not None:
                message["prompt_token_ids"] = reply.prompt_token_ids
        turns.append(message)
    messages = row.messages(turns)
    last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
    more = {"tools": row.tools, "chat_template_kwargs": row.template_kwargs}
    stops = {"stops": [reply.stop for reply in replies]}
    return {
        **row.passed_on,
        "messages": messages[: last + 1],
        **{key: value for key, value in more.items() if value},
        "regenerated": record.model_dump() | stops,
    }


def failed_row(failure: Failure) -> dict:
    """Return the row of a prompt that was given up; it can be read as a corpus row, with empty replies."""
    row = failure.row
    messages = row.messages([{"role": "assistant", "content": ""}] * failure.turn)
    return {**row.passed_on, "messages": messages, "place": row.location, "turn": failure.turn, "failed": failure.cause}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator:
    """Yield a file that replaces `path` when the block ends. RoomError when the disk is full."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with write_errors(path, "the corpus"):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            sync_folder(path.absolute().parent)
        finally:
            unfinished.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSON Lines, atomically; return how many."""
    count = 0
    with _replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count
