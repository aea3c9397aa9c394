"""What a sweep's file asks for: lists of values, fields that change together, and how a search chooses among them.

    [sweep]
    "draft.method" = ["dflash", "domino"]      # every combination of the lists
    "draft.layers" = [[1, 9], [1, 5, 9]]
    [sweep.paired]                             # entry i of all these lists together, crossed with the lists above
    "draft.block_size" = [8, 16]
    "train.lr" = [5e-3, 3e-3]

The last list varies fastest; the paired ones count as one, in their table's place. A search takes a value of each list,
or one of a range, for each of its trials:

    [sweep]
    search = "optuna"
    trials = 20
    "train.lr" = {low = 1e-4, high = 1e-2, log = true}
"""

import copy
import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean
from pipeline.runs.recipe import Recipe, make_recipe, read_toml
from pipeline.runs.sweep_record import setting_text

SEED = "train.seed"
MEASURED = ("train.heldout", "train.eval_samples")  # they decide which samples accept length is measured on
EXAMPLE = '"train.lr" = [1e-3, 3e-3]'
RANGE = '"train.lr" = {low = 1e-4, high = 1e-2, log = true}'
PAIRED = "paired"
SECTIONS = tuple(Recipe.model_fields)

Setting = dict[str, object]  # one combination: "section.field" -> value


class Search(BaseModel):
    """How settings are chosen. `trials` is a number of different settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    search: str
    trials: PositiveInt
    seed: NonNegativeInt = 0  # of the sampler
    # Give up a run whose accept length is below the median of the others' at the same step. Optuna's pruner compares
    # with finished trials only, and prunes none before five of them.
    prune: bool = True


class Range(BaseModel):
    """The values of one field from `low` to `high`, both included; whole numbers where both are."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    low: int | float
    high: int | float
    log: bool = False


@dataclass(frozen=True)
class Axis:
    """Fields that change together, one alone or those that are paired, and their values, one of each field."""

    keys: tuple[str, ...]
    values: list[tuple]

    def setting(self, number: int) -> Setting:
        return dict(zip(self.keys, self.values[number], strict=True))


@dataclass(frozen=True)
class SweepFile:
    """A sweep's file as it is read. base: its recipe's sections. sets: what --set changes in them."""

    path: Path
    base: dict
    sets: tuple[str, ...]
    axes: list[Axis]
    ranges: dict[str, Range] = field(default_factory=dict)
    search: Search | None = None

    def combinations(self) -> list[Setting]:
        """Return every combination of the lists, in grid order."""
        numbered = itertools.product(*(range(len(axis.values)) for axis in self.axes))
        return [self.setting(numbers) for numbers in numbered]

    def setting(self, numbers: tuple[int, ...], drawn: Setting | None = None) -> Setting:
        """Return the setting of one value of each axis, by its number, and of values drawn from the ranges."""
        parts = [axis.setting(number) for axis, number in zip(self.axes, numbers, strict=True)]
        return {key: value for part in parts for key, value in part.items()} | (drawn or {})

    def recipe(self, setting: Setting) -> Recipe:
        """Return the recipe of a setting. Raises UsageError, naming the setting."""
        stated = copy.deepcopy(self.base)
        for key, value in setting.items():
            section, _, name = key.partition(".")
            stated.setdefault(section, {})[name] = value
        return make_recipe(stated, self.sets, f"{self.path} with {setting_text(setting)}")

    def examples(self) -> list[Setting]:
        """Return a setting for each value of a list and each end of a range, all else being the first: what a search
        can be checked by before it begins."""
        lows, first = {key: of.low for key, of in self.ranges.items()}, [0] * len(self.axes)
        numbers = [
            (*first[:at], number, *first[at + 1 :])
            for at, axis in enumerate(self.axes)
            for number in range(len(axis.values))
        ]
        of_lists = [self.setting(each, lows) for each in numbers or [()]]
        return of_lists + [self.setting(tuple(first), lows | {key: of.high}) for key, of in self.ranges.items()]

    def digest(self) -> str:
        """Return a hash of what is swept over and of the base recipe; of a search without its number of trials, so that
        a larger number goes on with the same study."""
        search = self.search and self.search.model_dump(exclude={"trials"})
        ranges = {key: of.model_dump() for key, of in self.ranges.items()}
        facts = [self.base, self.sets, [asdict(axis) for axis in self.axes], ranges, search]
        return hashlib.blake2b(json.dumps(facts, default=str).encode(), digest_size=5).hexdigest()


def read_sweep_file(path: Path, sets: tuple[str, ...] = ()) -> SweepFile:
    """Read a sweep's file; `sets` change the base recipe.

    Raises UsageError for a table that is no sweep, and for a base recipe that `load_recipe` refuses.
    """
    path = Path(path)
    base = read_toml(path)
    table = base.pop("sweep", None)
    make_recipe(copy.deepcopy(base), sets, str(path))
    if not isinstance(table, dict):
        table = {}
    search = _search(table, path)
    fields = _by_field({key: value for key, value in table.items() if key not in Search.model_fields}, path)
    if not fields or fields == {PAIRED: {}}:
        raise UsageError(f"{path} has no [sweep] table; add one with lists such as {EXAMPLE}, or use `train-draft`")
    axes, ranges = [], {}
    for name, value in fields.items():  # in the file's order, which is the grid's
        if name == PAIRED:
            axes.append(_paired_axis(value, fields, path))
        elif isinstance(value, dict):
            ranges[name] = _range(name, value, search, path)
        else:
            axes.append(Axis((name,), [(each,) for each in _values(name, value, path)]))
    found = SweepFile(path, base, tuple(sets), axes, ranges, search)
    _check(found)
    return found


def _check(found: SweepFile) -> None:
    swept = [key for axis in found.axes for key in axis.keys] + list(found.ranges)
    for key in swept:
        if any(entry.partition("=")[0].strip() == key for entry in found.sets):
            raise UsageError(f"{found.path} sweeps over {key} and --set states it; leave one out")
    if found.search and SEED in swept:
        raise UsageError(
            f"{found.path}: a search over {SEED} would find the luckiest seed; state one in [train], and "
            "train the best setting with several afterwards"
        )
    if found.search and (measured := next((key for key in swept if key in MEASURED), None)):
        raise UsageError(
            f"{found.path}: a search over {measured} would compare accept lengths on different samples; state one in "
            "[train]"
        )


def _search(table: dict, path: Path) -> Search | None:
    """Return how a search chooses, None for a grid."""
    stated = {key: table[key] for key in Search.model_fields if key in table}
    if not stated:
        return None
    if "search" not in stated:
        raise UsageError(f'{path}: `{next(iter(stated))}` in [sweep] is of a search; add search = "optuna"')
    if stated["search"] != "optuna":
        raise UsageError(
            f'{path}: search = {stated["search"]!r} in [sweep]; there is "optuna", or leave it out: a grid'
        )
    try:
        return Search.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: `{first['loc'][0]}` in [sweep]: {first['msg']}; such as trials = 20") from None


def _by_field(table: dict, path: Path) -> dict[str, object]:
    """Return a table's values by "section.field", a key that may be written with or without quotes; `paired` as it is.
    Raises UsageError for a key that is no field, and for a field that is there in both ways."""
    found = {}
    for key, value in table.items():
        if key in SECTIONS and isinstance(value, dict):  # TOML reads train.lr without quotes as a table in a table
            of_key = {f"{key}.{name}": of_field for name, of_field in value.items()}
        elif key == PAIRED or key.count(".") == 1:
            of_key = {key: value}
        else:
            meant = did_you_mean(key, [PAIRED, *Search.model_fields], "`{}`")
            raise UsageError(
                f"{path}: `{key}` in [sweep] is no field{meant}; write section.field, such as {EXAMPLE}; further keys: "
                f"{', '.join([PAIRED, *Search.model_fields])}"
            )
        if twice := next((name for name in of_key if name in found), None):
            raise UsageError(f"{path}: `{twice}` is there twice, with quotes and without; leave one out")
        found |= of_key
    return found


def _values(key: str, values: object, path: Path) -> list:
    if not isinstance(values, list) or not values:
        raise UsageError(f"{path}: `{key}` = {values!r} in [sweep]; wanted a list of values, such as {EXAMPLE}")
    if any(value in values[:at] for at, value in enumerate(values)):
        raise UsageError(f"{path}: `{key}` = {values!r} in [sweep] holds a value twice; leave one out")
    return values


def _paired_axis(paired: object, lists: dict, path: Path) -> Axis:
    """Return the axis of [sweep.paired]. Raises UsageError for lists that cannot be paired."""
    if not isinstance(paired, dict) or not paired:
        raise UsageError(
            f"{path}: `paired` in [sweep] is no table of lists; write [sweep.paired] above lists like {EXAMPLE}"
        )
    lists_of = _by_field(paired, path)
    for key, values in lists_of.items():
        if key in lists:
            raise UsageError(f"{path}: `{key}` is in [sweep] and in [sweep.paired]; leave one out")
        if not isinstance(values, list) or not values:
            raise UsageError(f"{path}: `{key}` = {values!r} in [sweep.paired]; wanted a list of values")
    if len({len(values) for values in lists_of.values()}) > 1:
        lengths = ", ".join(f"`{key}` has {len(values)}" for key, values in lists_of.items())
        raise UsageError(f"{path}: lists in [sweep.paired] are taken entry by entry and need one length: {lengths}")
    entries = list(zip(*lists_of.values(), strict=True))
    if any(entry in entries[:at] for at, entry in enumerate(entries)):
        raise UsageError(f"{path}: [sweep.paired] holds an entry twice; leave one out")
    return Axis(tuple(lists_of), entries)


def _range(key: str, value: dict, search: Search | None, path: Path) -> Range:
    """Return a range. Raises UsageError for what is none, and where no search takes values of it."""
    if search is None:
        raise UsageError(
            f'{path}: `{key}` is a range, which a grid has no values of; write a list, or add search = "optuna"'
        )
    try:
        found = Range.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        meant = did_you_mean(first["loc"][0], Range.model_fields, "`{}`")
        raise UsageError(
            f"{path}: `{key}`: `{first['loc'][0]}`: {first['msg']}{meant}; wanted a range such as {RANGE}"
        ) from None
    if found.low >= found.high or (found.log and found.low <= 0):
        raise UsageError(f"{path}: `{key}` = {value!r}: low has to be below high, and above 0 where log = true")
    return found
