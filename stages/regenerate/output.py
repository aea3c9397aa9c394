"""The finished corpus, in the order of the prompts, and beside it what failed: files that exist whole or not at all."""

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
    """Return a row of the corpus: its messages with the target's own replies, what it passes on, and the record."""
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
        **row.kept,
        "messages": messages[: last + 1],
        **{key: value for key, value in more.items() if value},
        "regenerated": record.model_dump() | stops,
    }


def failed_row(failure: Failure) -> dict:
    """Return what is written of a prompt that was given up, itself a row of a corpus: replies stand empty in it."""
    row = failure.row
    messages = row.messages([{"role": "assistant", "content": ""}] * failure.turn)
    return {**row.kept, "messages": messages, "place": row.place, "turn": failure.turn, "failed": failure.cause}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator:
    """Yield a file that takes the place of `path` when the block is done. RoomError where there is no room."""
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
    """Write rows as JSON lines, whole or not at all; return how many."""
    count = 0
    with _replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count
