"""What the stages share: corpora, targets, the hidden-state cache, drafts, runs, and the command line.

And what notebooks import: `from pipeline import HiddenCache, load_draft, accept_length, load_target, decode`. Each is
imported when it is first asked for, so that `import pipeline` and the command line's help import no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.cache import HiddenCache, Sample
    from pipeline.python_api import TargetCall, accept_length, decode, load_draft, load_target

__version__ = "0.12.0"
__all__ = ["HiddenCache", "Sample", "TargetCall", "accept_length", "decode", "load_draft", "load_target"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(
        import_module("pipeline.cache" if name in ("HiddenCache", "Sample") else "pipeline.python_api"), name
    )


def __dir__() -> list[str]:
    return [*globals(), *__all__]
