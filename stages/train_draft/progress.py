"""What people see of a run: a bar on a terminal, a line every few seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stages.train_draft.loader import Batch

LINE_EVERY = 5.0  # seconds


class Clock:
    """How fast the run goes since it (re)started."""

    def __init__(self, start: int, horizon: int):
        self.start = self.step = start
        self.horizon = horizon
        self.began = time.perf_counter()
        self.rows, self.paused = 0, 0.0

    def done(self, batch: Batch) -> None:
        """Count a batch that was trained on."""
        self.step, self.rows = batch.step + 1, self.rows + batch.rows

    def pause(self, seconds: float) -> None:
        """Leave seconds of evaluating and saving out of the speed."""
        self.paused += seconds

    def facts(self, waited: float) -> dict[str, float]:
        """Seconds a step, context rows a second, the share of time spent waiting for data, seconds to go.

        `waited` is what has been waited for data in all.
        """
        seconds = max(1e-9, time.perf_counter() - self.began - self.paused)
        a_step = seconds / max(1, self.step - self.start)
        return {
            "seconds": round(seconds, 3),
            "step_seconds": round(a_step, 5),
            "tokens_s": round(self.rows / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "eta": round(a_step * (self.horizon - self.step), 1),
        }


class Display:
    """Shows the newest metrics. A context manager."""

    def __init__(self, out: Console, start: int, horizon: int):
        self.out, self.last = out, 0.0
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=out, transient=True) if out.is_terminal else None
        self.task = self.bar.add_task("", total=horizon, completed=start, text="") if self.bar else None
        self.horizon = horizon

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, step: int, metrics: dict | None, facts: dict) -> None:
        """Show that `step` is done, with its metrics when it logged any."""
        if self.bar:
            text = line(metrics, facts) if metrics else self.bar.tasks[0].fields["text"]
            self.bar.update(self.task, completed=step, text=text)
        elif metrics and time.perf_counter() - self.last >= LINE_EVERY:
            self.last = time.perf_counter()
            self.say(f"step {step}/{self.horizon}  {line(metrics, facts)}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.out.print(text, markup=False, soft_wrap=True)


def line(metrics: dict, facts: dict) -> str:
    """Return the figures of one step as text."""
    minutes, seconds = divmod(int(facts["eta"]), 60)
    balance = f"lambda {metrics['lambda_base']:.2f}  " if "lambda_base" in metrics else ""
    return (
        f"loss {metrics['loss']:.3f}  accept_len_tf {metrics['accept_len_tf']:.2f}  {balance}"
        f"lr {metrics['lr']:.1e}  {facts['tokens_s']:,.0f} tokens/s  "
        f"data wait {facts['data_wait']:.0%}  ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )
