"""The options of `pipeline regenerate`."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.corpus.sources import corpus_files
from pipeline.errors import UsageError
from pipeline.target.files import TEMPLATE_DATE

LOWEST = 1e-3  # the lowest temperature above 0


@dataclass(frozen=True)
class Options:
    """The corpus, the engine, sampling and request limits.

    model: the target's files; decodes here where there is no `endpoint`. max_new: tokens of a reply at most. rate:
    requests a minute. batch: prompts decoded here at once. backoff_s: the pause before the first retry.
    """

    corpus: str
    out: Path
    endpoint: str | None = None
    model: str | None = None
    served_model: str | None = None
    engine: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new: int = 2048
    template_kwargs: dict = field(default_factory=dict)
    template_date: str = TEMPLATE_DATE
    token_ids: bool = True
    concurrency: int = 32
    rate: float | None = None
    retries: int = 8
    timeout: float = 600.0
    backoff_s: float = 0.5
    batch: int = 64
    device: str | None = None
    max_samples: int | None = None
    roles: str | None = None

    def check(self) -> None:
        """UsageError for missing, conflicting or out-of-range options."""
        if not (self.endpoint or self.model):
            raise UsageError("nobody to ask: pass --endpoint with a server's address, or --model to decode here")
        if not (self.temperature == 0 or LOWEST <= self.temperature < float("inf")):
            raise UsageError(f"--temperature {self.temperature}: draws need {LOWEST} or more; 0 is for greedy replies")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: wanted more than 0, at most 1")
        if self.out.suffix != ".jsonl":
            raise UsageError(f"--out {self.out}: its name has to end with .jsonl, as a corpus' does")
        folder = Path(self.corpus).expanduser()
        if folder.is_dir() and self.out.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"--out {self.out} lies in the corpus {self.corpus} and would be read with it; name a place outside"
            )
        if self.out.exists() and any(self.out.samefile(file) for file in corpus_files(self.corpus)):
            raise UsageError(f"--out {self.out} is the corpus itself, or a file of it; name another file")
