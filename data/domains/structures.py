"""Domains of form: JSON, SQL, tables, Python functions, lists."""

import json

from conversation import Draw, Text, Turn

from domains.words import CITIES, FRUIT, JOBS, NAMES, PETS, listed

FIELDS = {"name": NAMES, "city": CITIES, "job": JOBS, "pet": PETS, "age": range(10, 100)}
TABLES = {
    "books": ("title", "author", "price", "pages", "year"),
    "cars": ("brand", "color", "price", "speed", "year"),
    "people": ("name", "city", "age", "height", "job"),
    "shops": ("name", "city", "street", "size", "rent"),
    "songs": ("title", "singer", "length", "year", "style"),
}
STEPS = {  # the user's words: the operator
    "adds {}": "+",
    "subtracts {}": "-",
    "multiplies by {}": "*",
    "divides by {}": "/",
}
NOUNS = listed("price score weight speed total height count size width level")


def as_json(draw: Draw) -> list[Turn]:
    """Turn a written list of fields into a JSON object; at times a field is dropped in a second turn."""

    def person(rng):
        return tuple((key, rng.choice(FIELDS[key])) for key in rng.sample(list(FIELDS), rng.randint(3, 5)))

    person = dict(draw.params(person))
    ask = draw.ask(
        "Make JSON: {}.",
        "As JSON please: {}.",
        "Write an object with {}.",
        "{}. Give me JSON.",
        "Turn {} into JSON.",
        "Encode {} for me.",
    )
    turns = [draw.turn(ask.format(", ".join(f"{key} {value}" for key, value in person.items())), json_text(person))]
    if draw.rng.random() < 0.35:
        gone = draw.rng.choice(list(person))
        ask = draw.ask("Drop the {}.", "Leave out the {}.", "Now without the {}.")
        rest = {key: value for key, value in person.items() if key != gone}
        turns.append(draw.turn(ask.format(gone), json_text(rest)))
    return turns


def json_text(row: dict) -> Text:
    """Return the object on one line or on many."""
    return (
        ["Here is the object:\n", json.dumps(row)],
        ["As JSON, one field a line:\n", json.dumps(row, indent=2)],
    )


def sql(draw: Draw) -> list[Turn]:
    """Write the query for a question with two columns, a condition and an order."""

    def question(rng):
        table = rng.choice(list(TABLES))
        first, second, tested, order = rng.sample(TABLES[table], 4)
        return table, first, second, tested, order, rng.choice(["above", "below"]), rng.randint(10, 99)

    table, first, second, tested, order, side, n = draw.params(question)
    ask = draw.ask(
        "Show {} and {} of {} with {} {} {}, sorted by {}.",
        "SQL: {} and {} from {}, {} {} {}, order by {}.",
        "List the {} and the {} of all {} whose {} is {} {}, by {}.",
        "I want {} and {} of the {} having {} {} {}, in order of {}.",
        "Query {} and {} of {}, only {} {} {}, by {}.",
        "Which {} and {} have the {} of {} {} {}? Sort by {}.",
    )
    compare = ">" if side == "above" else "<"
    sign = "greater" if side == "above" else "smaller"
    query: Text = [
        (f"SELECT {first}, {second}\nFROM {table}\n", f"SELECT {first}, {second} FROM {table} "),
        f"WHERE {tested} {compare} {n}",
        ("\n", " "),
        f"ORDER BY {order};",
    ]
    closer = (f"\nIt keeps the {table} with a {tested} {sign} than {n}.", f"\nSorted by {order}, smallest first.", "")
    opener = ("The query is:\n", f"You can ask the {table} like this:\n")
    return [draw.turn(ask.format(first, second, table, tested, side, n, order), [opener, query, closer])]


def table(draw: Draw) -> list[Turn]:
    """Lay out counts as a table and give the largest; at times the smallest in a second turn."""

    def counts(rng):
        size = rng.randint(3, 4)
        tens = rng.sample(range(1, 10), size)  # distinct, so the tens decide
        return tuple(zip(rng.sample(FRUIT, size), (10 * ten + rng.randint(0, 9) for ten in tens), strict=True))

    rows = draw.params(counts)
    ask = draw.ask(
        "Tabulate {}.",
        "Make a table: {}.",
        "Put this in a table: {}.",
        "{} as a table, please.",
        "Draw up a table of {}.",
        "Arrange {} in rows.",
    )
    head = ("| item | count |\n| --- | --- |\n", "| fruit | number |\n| :-- | --: |\n")
    lines = "".join(f"| {name} | {count} |\n" for name, count in rows)
    counted = [count for _, count in rows]
    closer = (f"The most is {max(counted)}.", f"With {max(counted)} the first place is taken.")
    turns = [draw.turn(ask.format(", ".join(f"{name} {count}" for name, count in rows)), [head, lines, closer])]
    if draw.rng.random() < 0.35:
        ask = draw.ask("And the least?", "Which is the smallest?", "What comes last?")
        fewest: Text = (f"The least is {min(counted)}.", f"With {min(counted)} the last place is taken.")
        turns.append(draw.turn(ask, fewest))
    return turns


def python(draw: Draw) -> list[Turn]:
    """Write a small function of two or three steps."""

    def steps(rng):
        return rng.choice(NOUNS), tuple(
            (step, rng.randint(2, 99)) for step in rng.sample(list(STEPS), rng.randint(2, 3))
        )

    noun, steps = draw.params(steps)
    spoken = [step.format(n) for step, n in steps]
    ask = draw.ask(
        "Write a Python function for a {} that {}.",
        "Python: take a {}; it {}.",
        "Define a function on a {} which {}.",
        "I need code that gets a {} and {}.",
        "Code a {} function that {}.",
        "Program this: given a {}, it {}.",
    )
    head = (f"def change_{noun}({noun}):\n", f"def {noun}_after({noun}):\n")
    doc = (f'    """Return the new {noun}."""\n', f"    # {len(steps)} steps\n", "")
    lines = [(f"    {noun} = {noun} {STEPS[step]} {n}\n", f"    {noun} {STEPS[step]}= {n}\n") for step, n in steps]
    return [draw.turn(ask.format(noun, ", then ".join(spoken)), [head, doc, lines, f"    return {noun}"])]


def lists(draw: Draw) -> list[Turn]:
    """Reverse, sort or thin out a list; at times reverse the outcome in a second turn."""

    def numbers(rng):
        tens = rng.sample(range(1, 10), rng.randint(4, 5))  # distinct, so the tens decide
        return tuple(10 * ten + rng.randint(0, 9) for ten in tens)

    given = draw.params(numbers)
    ask, name, done = draw.rng.choice(
        [
            (("Reverse {}.", "Turn {} around.", "Write {} backwards."), "reversed", given[::-1]),
            (("Sort {}.", "Put {} in order.", "Order {} by size."), "sorted", tuple(sorted(given))),
            (("Keep what is above 50 in {}.", "Only those over 50: {}.", "Drop what is below 50 from {}."), "over 50",
             tuple(n for n in given if n >= 50)),
        ]
    )  # fmt: skip
    turns = [draw.turn(draw.ask(*ask).format(list(given)), list_text(name, done))]
    if len(done) > 1 and draw.rng.random() < 0.4:
        ask = draw.ask("Now reverse it.", "And backwards?", "Turn that around.")
        turns.append(draw.turn(ask, list_text("reversed", done[::-1])))
    return turns


def list_text(name: str, numbers: tuple[int, ...]) -> Text:
    """Return the list and one more fact about it."""
    opener = (f"The list {name} is ", f"Here it comes, {name}: ", f"{name.capitalize()}, this gives ")
    if not numbers:
        return [opener, "[]", (".", ", so nothing is left.")]
    facts = (f". It begins with {numbers[0]}.", f", which ends in {numbers[-1]}.", f" with {len(numbers)} numbers.")
    return [opener, str(list(numbers)), facts]
