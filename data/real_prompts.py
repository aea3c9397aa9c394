"""Write prompts for a target that nobody here made: instructions of twelve kinds, in English, German and French.

    python data/real_prompts.py OUT.jsonl [--each 34] [--split train]

One JSON object a line: `messages` with one user turn, `domain` (the kind), `split`. The same lines on every machine: no
chance is involved. Topics are dealt to the phrasings in turn. The last seventh of every kind is held out: its topics
occur in no other prompt of that kind.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path


def parts(text: str) -> list[str]:
    """Return the parts of a text that lines and bars divide."""
    return text.strip().replace("\n", "|").split("|")


SUBJECTS = parts("""
the tides|a sourdough starter|photosynthesis|a suspension bridge|the water cycle|a bicycle gear|inflation
an eclipse|a compost heap|the immune system|a sailing boat|volcanoes|a library catalogue|the periodic table
a thermostat|honey bees|a glacier|the printing press|a hot air balloon|coral reefs|a piano|the stock market
a microwave oven|earthquakes|a vaccine|the silk road|a telescope|a rain forest|a steam engine|the human heart
a lighthouse|migration of birds|a refrigerator|the solar system|a windmill|memory|a volcano island|paper making
a submarine|the alphabet|tea|a desert|fermentation|a violin|the moon
""")

NAMES = parts("Anna|Bruno|Chloe|Dario|Elif|Fiona|Goran|Hanna|Igor|Julia|Karim|Lena|Marco|Nadia|Oscar|Petra|Rosa|Samir")
TOWNS = parts("Lisbon|Oslo|Prague|Turin|Galway|Ghent|Malmo|Bergen|Porto|Krakow|Nantes|Dresden|Seville|Bristol|Trieste")
GOODS = parts("apples|pencils|tickets|bricks|candles|books|eggs|chairs|bottles|stamps|lamps|ropes")
TASKS = parts("""
reverses a string|counts the vowels of a word|returns the largest of three numbers|checks for a palindrome
adds up the even numbers of a list|converts Celsius to Fahrenheit|removes duplicates from a list
computes a factorial|finds the longest word of a sentence|merges two sorted lists
tests whether a number is prime|reads a file line by line|counts how often each letter occurs
returns the last element of a list|squares every number of a list|joins words with commas
finds the median of a list|rounds a price to two digits|sorts names by length|splits a date|swaps two values
prints a multiplication table|capitalises a title|sums the digits of a number|zips two lists
filters out empty strings|finds the index of a value|rotates a list by one|flattens a nested list
computes an average|builds a dictionary from two lists|validates an email address|counts the lines of a file
picks a random element|computes the Fibonacci numbers|draws a triangle of stars|converts minutes to hours
finds common elements of two lists|encodes a text with a shift of three|generates a password
compares two versions|measures the length of a vector
""")

SENTENCES = parts("""
The cat sleeps on the warm chair.|We will meet at the station tomorrow morning.|My sister plays the piano.
The bread is fresh and smells good.|He lost his keys in the garden.|It rained all night long.
Where can I buy a map?|The children are drawing a big house.|She has been working here for ten years.
Please close the window.|The train to the coast leaves at noon.|I would like a cup of tea.
The old bridge was built of stone.|They live near the lake.|Our neighbour repairs old bicycles.
The soup is too hot to eat.|We forgot to water the plants.|The museum opens at nine.|A dog ran across the field.
The teacher read a long story.|Winter came early this year.|He speaks three languages.
The market is full of people.|I found a letter under the door.|The river is very deep here.
You should see a doctor.|The lights went out at midnight.|She painted the door blue.
The shop sells shoes and hats.|There is snow on the mountains.|My father bakes a cake on Sundays.
The boat drifted out to sea.|We need more chairs for the guests.|The clock is slow.
He wrote the answer on the board.|The birds fly south in autumn.|I cannot open this jar.
The garden needs some rain.|The village has only one street.|They sang until the sun came up.
The road was closed after the storm.|Nobody saw the fox.
""")

GERMAN = parts("""
der Regenbogen|ein Apfelkuchen|die Eisenbahn|der Wald im Herbst|ein guter Freund|das Fahrrad|die Gezeiten
ein Gewitter|der Wochenmarkt|die Bienen|ein Museum|das Meer|der Winter|ein Leuchtturm|die Brücke|ein Spaziergang
das Frühstück|der Mond|ein Garten|die Schule|ein altes Haus|der Bahnhof|das Klavier|die Katze|ein Brief|der Berg
das Wetter|ein Fest im Dorf|die Zeitung|der Fluss|ein Traum|das Brot|die Uhr|der Arzt|ein Schiff|das Dorf
die Sterne|ein Rezept|der Sommer|die Stadt|ein Handwerker|das Buch
""")

FRENCH = parts("""
l'arc-en-ciel|une tarte aux pommes|le chemin de fer|la forêt en automne|un bon ami|le vélo|les marées|un orage
le marché|les abeilles|un musée|la mer|l'hiver|un phare|le pont|une promenade|le petit déjeuner|la lune
un jardin|l'école|une vieille maison|la gare|le piano|le chat|une lettre|la montagne|la météo
une fête au village|le journal|la rivière|un rêve|le pain|l'horloge|le médecin|un bateau|le village|les étoiles
une recette|l'été|la ville|un artisan|le livre
""")


def sums() -> Iterator[str]:
    """Yield small problems of arithmetic, as text."""
    for at in range(60):
        name, goods, a, b = NAMES[at % len(NAMES)], GOODS[at % len(GOODS)], 7 + 5 * at, 3 + 2 * at
        yield (
            f"What is {a} + {b}?",
            f"{name} has {a} {goods} and gives away {b}. How many {goods} are left?",
            f"Compute {a % 13 + 2} times {b % 11 + 2} and explain each step.",
            f"A box holds {b % 9 + 3} {goods}. How many boxes are needed for {a} {goods}?",
        )[at % 4]


def notes() -> Iterator[str]:
    """Yield short messages that hold names, places, days and numbers."""
    days = parts("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday")
    for at in range(60):
        first, second = NAMES[at % len(NAMES)], NAMES[(5 * at + 3) % len(NAMES)]
        town, day, goods = TOWNS[at % len(TOWNS)], days[at % 7], GOODS[(3 * at) % len(GOODS)]
        yield f"{first} met {second} in {town} on {day} and bought {at % 8 + 2} {goods} for {3 * at + 4} euros."


# Of every kind: its phrasings, and what is put in their {}.
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "maths": (["{}"], list(sums())),
    "code": (["Write a Python function that {}.", "Write a short JavaScript function that {}."], TASKS),
    "explanation": (["Explain {} to a child.", "How does one understand {}? Answer in a few sentences."], SUBJECTS),
    "translation": (
        ["Translate into German: {}", "Translate into French: {}", "Translate into Spanish: {}"],
        SENTENCES,
    ),
    "extraction": (
        ["List the names and the place as JSON. {}", "Who did what, where and when? {}", "Copy only the numbers. {}"],
        list(notes()),
    ),
    "rewriting": (
        ["Say this more politely: {}", "Make this sentence longer: {}", "Rewrite in the past tense: {}"],
        SENTENCES[::-1],
    ),
    "chat": (
        ["Hi! I have been thinking about {} today. What do you make of it?", "Can we talk about {}? Begin, please."],
        SUBJECTS[::-1],
    ),
    "lists": (
        ["Name five facts about {}.", "Give a numbered list of questions about {}."],
        SUBJECTS[7:] + SUBJECTS[:7],
    ),
    "story": (
        ["Write a short story that begins in {} with a letter.", "Write a poem about a morning in {}."],
        [f"{town}, where {name} lives" for town, name in islice(product(TOWNS, NAMES[::6]), 60)],
    ),
    "table": (
        ["Make a table with three columns about {}.", "Compare {} with something similar, in a table."],
        SUBJECTS[19:] + SUBJECTS[:19],
    ),
    "german": (["Erkläre in einfachen Worten: {}.", "Schreibe einen kurzen Text. Thema: {}."], GERMAN),
    "french": (["Explique simplement : {}.", "Écris un texte court. Sujet : {}."], FRENCH),
}


def prompts(each: int) -> Iterator[dict]:
    """Yield `each` prompts of every kind, kind after kind in turn."""
    for at in range(each):
        for domain, (phrasings, topics) in KINDS.items():
            text = phrasings[at % len(phrasings)].format(topics[at])
            split = "heldout" if at >= each - each // 7 else "train"
            yield {"domain": domain, "split": split, "messages": [{"role": "user", "content": text}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=34, help="prompts of each kind, at most 42")
    parser.add_argument("--split", choices=("train", "heldout"), help="only these")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(prompt, ensure_ascii=False)
        for prompt in prompts(options.each)
        if options.split in (None, prompt["split"])
    ]
    text = "\n".join(lines) + "\n"
    if not options.out.exists() or options.out.read_text(encoding="utf-8") != text:  # a rerun leaves even its time
        options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(lines)} prompts of {len(KINDS)} kinds")


if __name__ == "__main__":
    main()
