"""Numbers of bytes as text."""


def size_text(count: int) -> str:
    """Format a number of bytes: `1.5 GiB`, `20.0 MiB`."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{max(count, 0) / 1024:.1f} KiB"
