"""The target an export is for, and the prompts it is checked on."""

from pathlib import Path

from pipeline.errors import UsageError
from pipeline.evaluation.prompts import Prompt, file_prompts
from pipeline.json_files import parse_json, read_file
from pipeline.published.reading import CONFIG, TRAINED_ON, read_json
from pipeline.target.config import load_config
from pipeline.target.files import find_target, stop_ids, target_name

CHATS, HELD_OUT = "chats.jsonl", "heldout"
MOST_BYTES = 64 << 20


def find_export_target(folder: Path, model: str | None) -> tuple[Path, str]:
    """Return the folder and name of the target that an export is for: the one named, or the one that it names itself.

    UsageError where there is none.
    """
    if model is not None:
        return find_target(model), target_name(model)
    flat = read_json(folder / CONFIG)
    verifier = (flat.get("speculators_config") or {}).get("verifier") or {}
    name = (flat.get(TRAINED_ON) or {}).get("target") or verifier.get("name_or_path")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{folder / CONFIG} does not name the draft's target; pass --model")
    try:
        return find_target(name), name
    except UsageError as error:
        raise UsageError(f"the target {name} that {folder} is for is not found ({error}); pass --model") from error


def find_prompts(data: Path | None, target: Path, count: int, scratch: Path) -> tuple[list[Prompt], str]:
    """Return at most `count` prompts and where they are from: lines of `data`, or the bundled target's held-out chats.

    UsageError, DataError.
    """
    if data is not None:
        return file_prompts(data, target, count), str(data)
    chats = target.resolve().parent / CHATS
    if not chats.is_file():
        raise UsageError(f"no prompts lie beside {target}; pass --data FILE, JSONL of messages")
    lines = read_file(chats, MOST_BYTES).decode().splitlines()
    held_out = [line for line in lines if parse_json(line).get("split") == HELD_OUT]
    kept = scratch / CHATS
    kept.write_text("".join(f"{line}\n" for line in held_out))
    return file_prompts(kept, target, count), f"held-out chats of {chats.name}"


def reply_stops(target: Path) -> list[int]:
    """Return the tokens that end a reply, from all of the target's config files, as `evaluate` has them. UsageError."""
    config = load_config(target)
    found = [config.get_text_config().eos_token_id, getattr(config, "eos_token_id", None), stop_ids(target)]
    return sorted({stop for stops in found for stop in ([stops] if type(stops) is int else stops or ())})
