"""What is wrong with a recipe, in one line, and what may have been meant."""

import re

from pydantic import ValidationError

from pipeline.nearest_name import did_you_mean

CHOICES = re.compile(r"'([^']*)'")


def explain(error: ValidationError, source: str, keys: dict[str, list[str]]) -> str:
    """Return the first error of a recipe in one line. keys: the known ones of each section."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][:2])
    if first["type"] == "extra_forbidden":
        return f"{source}: unknown key `{place}`{unknown_key(first['loc'], keys)}"
    choices = CHOICES.findall(str(first.get("ctx", {}).get("expected", "")))
    meant = did_you_mean(first["input"], choices, "{!r}") if isinstance(first["input"], str) else ""
    return f"{source}: `{place}` = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{meant}"


def unknown_key(place: tuple, keys: dict[str, list[str]]) -> str:
    """Return what may have been meant by a key, which another section may have, and which keys there are."""
    *section, key = map(str, place)
    known, where = (keys[section[0]], f"keys of [{section[0]}]") if section else (list(keys), "sections")
    elsewhere = [other for other, names in keys.items() if key in names]
    if elsewhere:
        meant = f"; did you mean `{elsewhere[0]}.{key}`?"
    else:
        meant = did_you_mean(key, known, f"`{'.'.join([*section, '{}'])}`")
    return f"{meant or ';'} Known {where}: {', '.join(known)}"
