"""Times as text."""


def clock_text(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: `0:01:23`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def pace_text(seconds: float) -> str:
    """Return how fast steps of so many seconds are: `1.5 s/step`, below a second `4.0 steps/s`."""
    return f"{seconds:.1f} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-5):.1f} steps/s"
