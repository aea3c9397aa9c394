"""The target's tokenizer, without the target: importing the models' code takes longer than reading it."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import UsageError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer. UsageError when its files are damaged or incomplete."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        cause = str(error).strip().split("\n")[0][:160]
        raise UsageError(f"{folder}: its tokenizer cannot be loaded ({cause}); fetch its files again") from error
