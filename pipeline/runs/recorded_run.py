"""A run's folder as others than the training read it, each part once: its records, and its logs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import CacheError
from pipeline.runs.folder import Evaluation, Result, RunRecord, read_recipe, read_result, read_run
from pipeline.runs.recipe import Recipe
from pipeline.runs.run_logs import METRICS, TIMING, read_log


@dataclass
class RecordedRun:
    """A run. path: its folder. What is read raises CacheError where it is damaged."""

    path: Path

    @cached_property
    def record(self) -> RunRecord:
        return read_run(self.path)

    @cached_property
    def recipe(self) -> Recipe:
        return read_recipe(self.path)

    @cached_property
    def result(self) -> Result | None:
        """None while the run is not finished."""
        return read_result(self.path)

    @cached_property
    def _metrics(self) -> list[dict]:
        return read_log(self.path / METRICS)

    @cached_property
    def steps(self) -> list[dict]:
        """The steps that were logged, of each its metrics."""
        return [line for line in self._metrics if "loss" in line]

    @cached_property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """Accept lengths on held-out samples, each with the step after which it was measured."""
        found = [line for line in self._metrics if (line.get("eval") or {}).get("calls")]
        try:
            return [(line["step"], Evaluation.model_validate(line["eval"])) for line in found]
        except ValidationError:
            raise CacheError(f"{self.path / METRICS}: damaged, or of another version: no accept length") from None

    @cached_property
    def timings(self) -> list[dict]:
        """The lines of timing.jsonl."""
        return read_log(self.path / TIMING)
