"""The target's files beside its weights: finding, checking and digesting them. Imports no torch."""

import hashlib
import json
from datetime import date
from pathlib import Path

from pipeline.bundled_files import BUNDLED
from pipeline.errors import UsageError, first_line, is_present, refuse_limit
from pipeline.target.layers import text_config

CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
TEMPLATE_DATE = "2024-07-26"  # a template's default for today, as in Llama's templates without `strftime_now`
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_REDIRECT = "fast_tokenizer_files"
REDIRECTING_KEYS = ("configuration_files", "transformers_weights")  # they make loaders read other files
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
)
SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")  # what a capture reads of a config
# What training also reads; a config may leave any of them to the defaults of its class, as Gemma 3's do.
TRAINING_SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "initializer_range",
)
HUB_FILES = [CONFIG, "generation_config.json", "model*.safetensors", WEIGHTS_INDEX, *TOKENIZER_FILES]
HUB_FILES += ["chat_template.json", f"{MORE_TEMPLATES}/*.jinja"]


def find_target(model: str, revision: str | None = None) -> Path:
    """Return the folder of a target's files: the one named, the bundled one of that name, or the hub's snapshot,
    downloaded if needed.

    Raises UsageError when there is no such folder, no config in it, or no such model on the hub.
    """
    folder = Path(model).expanduser()
    present = is_present(folder)
    if folder.is_dir():
        if not is_present(folder / CONFIG):
            raise UsageError(f"{model} is a folder without {CONFIG}; name the folder that a model was saved to")
        return folder
    if present:
        raise UsageError(f"{model} is a file; name the folder that holds {CONFIG}")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UsageError(f"{model}: no such folder; name a folder that holds {CONFIG}, or a hub model like org/name")
    if "/" not in model and (BUNDLED / model / CONFIG).is_file():
        return BUNDLED / model
    return _snapshot(model, revision)


def _snapshot(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, HFValidationError) as error:  # every error of the hub's client, offline ones too, is an OSError
        cause = first_line(error)
        raise UsageError(
            f"{model}: no such folder here, and the hub gave no such model ({cause}); check the name, "
            "the network and the access to gated models, or name a folder"
        ) from error
    if not (found / CONFIG).is_file():
        raise UsageError(f"{model}: the hub holds no {CONFIG} for it; name a transformers model")
    return found


def target_name(model: str) -> str:
    """Return a target's name in a cache: the hub's name, or the folder's last part (a cache holds no paths)."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def read_json(path: Path) -> dict:
    """Return the object a JSON file of the target holds; UsageError when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse_limit(path, error)
        raise UsageError(f"{path} cannot be read ({error}); fetch the target's files again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object; fetch the target's files again")
    return content


def read_text_config(folder: Path) -> dict:
    """Return the part of config.json that describes the decoder, which multi-modal targets nest.

    Sizes that it lacks, or has under other names, come from its transformers class. UsageError when it is no decoder's.
    """
    config = read_json(folder / CONFIG)
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{folder / CONFIG} is an encoder-decoder's; a target is a decoder alone, name another model")
    text = text_config(config)
    if not all(isinstance(text.get(key), int) for key in SIZES):
        text = {**_sizes_by_class(folder), **text}
    for key in SIZES:
        if not isinstance(text.get(key), int):
            raise UsageError(f"{folder / CONFIG} names no {key}; this is no decoder of the transformers library")
    return text


def max_positions(text: dict) -> tuple[int | None, str]:
    """Return (the longest sequence that a decoder's config allows, None where it does not say; a reason or "")."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    short = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    if short and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
        return short, ", beyond which its rotary scaling follows the longest sample of a batch"
    limit = text.get("max_position_embeddings")
    return (limit if isinstance(limit, int) else None), ""


def _sizes_by_class(folder: Path) -> dict:
    from transformers import AutoConfig

    try:
        return _sizes(
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no model that transformers knows


def _sizes(config: object) -> dict:
    """Return the sizes of a transformers config under their standard names, as far as they are numbers or dicts."""
    found = {key: getattr(config, key, None) for key in (*SIZES, *TRAINING_SIZES)}
    return {key: value for key, value in found.items() if isinstance(value, int | float | dict)}


def complete_config(folder: Path, config: object) -> bytes:
    """Return config.json completed with every size that training reads, taken from the loaded target's `config`.

    Unchanged where it lacks none. They go into `text_config` where the decoder's part is nested there.
    """
    config_json, text = read_json(folder / CONFIG), config.get_text_config()
    part = config_json if text is config else config_json.get("text_config") or {}
    missing_sizes = {key: value for key, value in _sizes(text).items() if part.get(key) is None}
    if not missing_sizes:
        return (folder / CONFIG).read_bytes()
    part = {**part, **missing_sizes}
    return (json.dumps(part if text is config else {**config_json, "text_config": part}, indent=2) + "\n").encode()


def quantisation(folder: Path) -> dict | None:
    """Return what config.json says of a target's quantisation, method and parameters; None where there is none."""
    config = read_json(folder / CONFIG)
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    return found if isinstance(found, dict) and found else None


def check_config(folder: Path) -> None:
    """Raise UsageError for a config that makes loaders read files elsewhere, or run code from a hub."""
    config = read_json(folder / CONFIG)
    for key in REDIRECTING_KEYS:
        if config.get(key) is not None:
            raise UsageError(
                f"{folder / CONFIG} sends readers to other files ({key}); save the model with `save_pretrained`"
            )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in KERNEL_KEYS:
            if "/" in str(part.get(key)):
                raise UsageError(
                    f"{folder / CONFIG} names code on a hub ({key} = {str(part[key])[:80]!r}), and code that comes "
                    "with a model is never run; take the key out"
                )


def is_quantised(folder: Path) -> bool:
    """Return whether the target's config says that its weights are quantised."""
    config = read_json(folder / CONFIG)
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    return any(part.get("quantization_config") for part in parts)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files; UsageError when the target has none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in files):
        raise UsageError(f"{folder} holds no tokenizer; save the target's tokenizer beside its weights")
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file() and read_json(tokenizer_config).get(TOKENIZER_REDIRECT) is not None:
        raise UsageError(
            f"{tokenizer_config} sends readers to other files ({TOKENIZER_REDIRECT}); save it with `save_pretrained`"
        )
    return files


def tokenizer_digest(folder: Path) -> str:
    """Return the digest of every tokenizer file but the chat template, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for path in tokenizer_files(folder):
        if path.name != CHAT_TEMPLATE:
            content = path.read_bytes()
            digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def template_digest(folder: Path) -> str:
    """Return the digest of the chat templates, 32 hex digits. UsageError when the tokenizer has none."""
    texts = chat_templates(folder)
    digest = hashlib.blake2b(texts.pop("default").encode(), digest_size=16)
    for name, text in sorted(texts.items()):
        digest.update(f"\n{name} {len(text)}\n{text}".encode())
    return digest.hexdigest()


def chat_templates(folder: Path) -> dict[str, str]:
    """Return a target's chat templates by name: `default` and, where there is one, `tool_use`.

    Where several files have one, the order of precedence is transformers': chat_template.jinja and the folder
    additional_chat_templates, the tokenizer's config, chat_template.json (a processor's). UsageError without a default.
    """
    found = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            found = {**_named_templates(read_json(folder / name).get("chat_template")), **found}
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / CHAT_TEMPLATE).is_file():
        files["default"] = folder / CHAT_TEMPLATE
    found |= {name: _template_text(path) for name, path in files.items()}
    if not found.get("default"):
        raise UsageError(
            f"{folder} has no chat template, so conversations cannot be rendered as the target knows them; "
            f"add a {CHAT_TEMPLATE} beside its tokenizer"
        )
    return {name: text for name, text in found.items() if name in ("default", "tool_use")}


def _named_templates(templates: object) -> dict[str, str]:
    """Return the templates in a config's `chat_template`: one text, or a list of names and texts."""
    if isinstance(templates, str):
        return {"default": templates}
    entries = [entry for entry in templates if isinstance(entry, dict)] if isinstance(templates, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _template_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); fetch the target's files again") from error


def stop_ids(folder: Path) -> list[int]:
    """Return the stop tokens that generation_config.json names; none where it names none."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    return [token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int]


def template_arguments(kwargs: str | None, day: str | None) -> dict:
    """Return a run's `template_kwargs` and `template_date` as the identity stores them, from the options' texts.

    UsageError for arguments that are no JSON object, or that each row sets itself, and for an invalid date.
    """
    example = '{"enable_thinking": false}'
    try:
        date.fromisoformat(day or TEMPLATE_DATE)
    except ValueError as error:
        raise UsageError(f"--template-date {day}: no day; write it as {TEMPLATE_DATE}") from error
    try:
        found = json.loads(kwargs) if kwargs else {}
    except RecursionError as error:
        raise UsageError(f"--template-kwargs is nested too deeply; write such as '{example}'") from error
    except ValueError as error:
        raise UsageError(f"--template-kwargs {kwargs}: no JSON ({error}); write such as '{example}'") from error
    if not isinstance(found, dict):
        raise UsageError(f"--template-kwargs {kwargs}: wanted a JSON object, such as '{example}'")
    own = sorted({"messages", "tools", "documents", "add_generation_prompt"} & found.keys())
    if own:
        raise UsageError(f"--template-kwargs states {', '.join(own)}, which every row states itself; leave it out")
    return {"template_kwargs": found, "template_date": day or TEMPLATE_DATE}
