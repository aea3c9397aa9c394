"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere, and the speed that both show."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stages.train_draft.loader import Batch

LINE_INTERVAL = 5.0  # seconds


class Throughput:
    """The speed of a run since it (re)started: context rows and steps over seconds spent training."""

    def __init__(self, start: int, total_steps: int):
        self.start = self.step = start
        self.total_steps = total_steps
        self.began = time.perf_counter()
        self.rows, self.excluded = 0, 0.0

    def count(self, batch: Batch) -> None:
        """Add a batch that was trained on."""
        self.step, self.rows = batch.step + 1, self.rows + batch.rows

    def exclude(self, seconds: float) -> None:
        """Leave `seconds` of evaluating and saving out of the speed."""
        self.excluded += seconds

    def timing(self, waited: float) -> dict[str, float]:
        """Return seconds, seconds a step, context rows a second, the fraction of time spent waiting for data, and
        the seconds still to go. `waited`: seconds waited for data in all.
        """
        seconds = max(1e-9, time.perf_counter() - self.began - self.excluded)
        step_seconds = seconds / max(1, self.step - self.start)
        return {
            "seconds": round(seconds, 3),
            "step_seconds": round(step_seconds, 5),
            "tokens_s": round(self.rows / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "eta": round(step_seconds * (self.total_steps - self.step), 1),
        }


class Display:
    """Prints the newest metrics of a run. A context manager."""

    def __init__(self, out: Console, start: int, total_steps: int):
        self.out, self.last = out, 0.0
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=out, transient=True) if out.is_terminal else None
        self.task = self.bar.add_task("", total=total_steps, completed=start, text="") if self.bar else None
        self.total_steps = total_steps

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, step: int, metrics: dict | None, timing: dict) -> None:
        """Show that `step` is done, with its metrics when it logged any."""
        if self.bar:
            text = metrics_text(metrics, timing) if metrics else self.bar.tasks[0].fields["text"]
            self.bar.update(self.task, completed=step, text=text)
        elif metrics and time.perf_counter() - self.last >= LINE_INTERVAL:
            self.last = time.perf_counter()
            self.print_line(f"step {step}/{self.total_steps}  {metrics_text(metrics, timing)}")

    def print_line(self, text: str) -> None:
        """Print a line above the bar, which stays."""
        self.out.print(text, markup=False, soft_wrap=True)


def metrics_text(metrics: dict, timing: dict) -> str:
    """Return the metrics and the speed of one step as text."""
    minutes, seconds = divmod(int(timing["eta"]), 60)
    lambda_text = f"lambda {metrics['lambda_base']:.2f}  " if "lambda_base" in metrics else ""
    return (
        f"loss {metrics['loss']:.3f}  accept_len_tf {metrics['accept_len_tf']:.2f}  {lambda_text}"
        f"lr {metrics['lr']:.1e}  {timing['tokens_s']:,.0f} tokens/s  "
        f"data wait {timing['data_wait']:.0%}  ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )
