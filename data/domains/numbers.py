"""Domains of numbers: written-out addition, sequences, unit conversion. Every digit is one token."""

from conversation import Draw, Text, Turn, joined

UNITS = {  # from, to: how many
    ("weeks", "days"): 7,
    ("gallons", "quarts"): 4,
    ("gallons", "pints"): 8,
    ("yards", "feet"): 3,
    ("quarts", "pints"): 2,
    ("nickels", "cents"): 5,
    ("spiders", "legs"): 8,
    ("ants", "legs"): 6,
    ("rings", "mm"): 9,
    ("cm", "mm"): 10,
    ("dimes", "cents"): 10,
    ("meters", "cm"): 100,
    ("kg", "grams"): 1000,
}


def arithmetic(draw: Draw) -> list[Turn]:
    """Add two numbers of three digits in columns; at times a third one is added to their sum."""
    a, b = draw.params(lambda rng: (rng.randint(100, 399), rng.randint(100, 399)))
    ask = draw.ask("What is {}+{}?", "Add {}+{}.", "Work out {}+{}.", "How much is {}+{}?", "Compute {}+{}.", "{}+{}=?")
    turns = [draw.turn(ask.format(a, b), addition(a, b))]
    if draw.rng.random() < 0.3:
        (c,) = draw.params(lambda rng: (rng.randint(100, 999 - a - b),))
        ask = draw.ask("Now add {} to it.", "And {} more?", "Then add {}.")
        turns.append(draw.turn(ask.format(c), addition(a + b, c)))
    return turns


def addition(a: int, b: int) -> Text:
    """Return the sum in columns from the right, each `digit+digit+carry=column`."""
    columns, carry = [], 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        columns.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    steps = joined(columns, (", then ", "; after that "))
    opener = ("We add from the right: ", "Starting with the ones, ", "Column by column this gives ")
    closer = (f". The sum is {a + b}.", f". That makes {a + b} in total.", f", so {a}+{b}={a + b}.")
    return [opener, steps, closer]


def sequence(draw: Draw) -> list[Turn]:
    """Go on with an arithmetic sequence of two-digit numbers, up or down."""
    start, step, more = draw.params(lambda rng: (rng.randint(10, 45), rng.randint(2, 7), rng.randint(4, 6)))
    terms = [start + step * i for i in range(3 + more)]
    rising = draw.rng.random() < 0.6
    if not rising:
        terms.reverse()
    ask = draw.ask(
        "Continue {} with {} more numbers.",
        "What are the next numbers after {}? Give {}.",
        "{} and so on: give {} more.",
        "Extend {} by {} terms.",
        "The list starts {}. Write the next {}.",
        "Find what follows {}. I need {} numbers.",
    )
    rule = f"{step} {'more' if rising else 'less'}"
    opener = (f"Each number is {rule} than the one before: ", f"We go {'up' if rising else 'down'} by {step}: ")
    steps = joined([str(term) for term in terms[3:]], ", ")
    closer = (".", f". The last one is {terms[-1]}.", f", which ends at {terms[-1]}.")
    return [draw.turn(ask.format(", ".join(map(str, terms[:3])), more), [opener, steps, closer])]


def units(draw: Draw) -> list[Turn]:
    """Convert units: tens and ones apart, then their sum."""
    (source, into), n = draw.params(lambda rng: (rng.choice(list(UNITS)), rng.randint(1, 9) * 10 + rng.randint(1, 9)))
    factor = UNITS[source, into]
    ask = draw.ask(
        "Convert {} {} to {}.",
        "{} {} in {}?",
        "How much are {} {} in {}?",
        "Turn {} {} into {}.",
        "Express {} {} in {}.",
        "I have {} {}. What is that in {}?",
    )
    tens, ones = n // 10 * 10, n % 10
    rate = (f"Since {source} count {factor} {into} each, ", f"With {factor} {into} for each of the {source}, ")
    parts = [f"{tens}*{factor}={tens * factor}", (" and ", ", also "), f"{ones}*{factor}={ones * factor}"]
    work = f"{tens * factor}+{ones * factor}={n * factor}"
    closer = (f". Together: {work} {into}.", f", so {n} {source} are {work} {into}.")
    return [draw.turn(ask.format(n, source, into), [rate, parts, closer])]
