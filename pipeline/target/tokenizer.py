"""Loads the target's tokenizer without importing any model code, which would take longer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import UsageError, first_line
from pipeline.os_errors import refuse_limit


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer. UsageError when its files are damaged or incomplete."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_limit(folder, error)
        cause = first_line(error)
        if "trust_remote_code" in cause:
            raise UsageError(
                f"{folder}: its tokenizer or config is code of its own, and code that comes with a model is never run; "
                "take a target that transformers itself knows"
            ) from error
        raise UsageError(f"{folder}: its tokenizer cannot be loaded ({cause}); fetch its files again") from error
