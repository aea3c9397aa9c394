"""What every installation brings: the bundled target, its chats and recipes. Links in a checkout, files in a wheel."""

from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"


def bundled_recipes() -> dict[str, Path]:
    """Return the bundled recipes by name: the published one of each method, the demo's, and a sweep."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.toml"))}


def no_recipe(path: Path) -> str:
    """Return what to say where no recipe is at a path."""
    return f"no recipe at {path}; name a TOML file, or one that is bundled: {', '.join(bundled_recipes())}"
