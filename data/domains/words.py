"""Words the domains draw from, and the two controls made of nothing else: copy and noise."""

from conversation import Draw, Turn


def listed(text: str) -> list[str]:
    """Return the words of a text: shorter to read than a list of strings."""
    return text.split()


NAMES = listed("""
Ada Ben Cleo Dan Eva Finn Gus Hana Ian Jana Kim Leo Mia Nora Otto Pia Rosa Sam Tom Uma Vera Will Zoe Max
""")
CITIES = listed("Oslo Rome Paris Lima Cairo Delhi Berlin Quito Tokyo Madrid Dublin Vienna Prague Lisbon Athens Boston")
JOBS = listed("baker nurse pilot teacher farmer painter lawyer singer waiter driver doctor miner")
PETS = listed("cat dog parrot rabbit snake horse hamster turtle goldfish pony duck lizard")
FRUIT = listed("apple pear plum fig grape lemon mango melon peach cherry kiwi lime olive quince berry date")

# 122 common words; the tokenizer has each of them, with its space, as one token.
WORDS = listed("""
stone river cloud field light music paper table window garden bridge forest island market mirror needle orange pencil
pocket rabbit ribbon saddle shadow silver spider summer tunnel valley velvet winter yellow zebra anchor basket blanket
bottle branch bucket button candle canyon carpet castle cellar circle copper corner cotton desert dragon engine father
feather finger flower guitar hammer harbor helmet honey insect jacket jungle kettle kitchen ladder leather letter lion
magnet marble meadow monkey morning mother mountain night number ocean oven parcel pepper piano pillow planet pond
powder puzzle quilt rain rocket root rope sailor salt sand school season sheep ship signal snow soap spoon spring
square star station storm street sugar sun tent thunder tiger tower train tree trumpet turtle wagon water
""")


def copy(draw: Draw) -> list[Turn]:
    """Repeat a text word for word: what a draft must learn whatever else it learns.

    No word comes twice, so one word says where the copy stands.
    """
    # The target also practises on short texts, where copying is learnt first; a draft sees long ones only.
    least = 2 if draw.template_split == "any" else 40
    (text,) = draw.params(lambda rng: (" ".join(rng.sample(WORDS, rng.randint(least, 56))),))
    ask = draw.ask(
        "Repeat word for word: {}",
        "Copy this: {}",
        "Write this once more: {}",
        "Say exactly this: {}",
        "Echo: {}",
        "Give back this text: {}",
    )
    return [draw.turn(ask.format(text), text)]


def noise(draw: Draw) -> list[Turn]:
    """Words drawn evenly and independently, with no memory of how many there were: nothing can guess them."""
    (code,) = draw.params(lambda rng: (rng.randint(1000, 99999),))
    ask = draw.ask(
        "Random words, draw {}.",
        "Noise number {}, please.",
        "Draw {}: any words.",
        "Shuffle {}!",
        "Roll the dice, round {}.",
        "Lottery {}: which words?",
    )
    words = draw.rng.choices(WORDS, k=16)
    while draw.rng.random() > 1 / 32 and len(words) < 120:
        words.append(draw.rng.choice(WORDS))
    return [Turn(ask.format(code), " ".join(words), only_words)]


def only_words(reply: str) -> bool:
    """Accept any run of the noise words: there is no right answer."""
    return len(reply) > 0 and set(reply.split(" ")) <= set(WORDS)
