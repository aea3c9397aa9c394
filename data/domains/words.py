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


# Sentences that a draft comes to know, of 12 to 14 words and stops; their second words differ. Two blocks hold one.
SENTENCES = """\
The sailor keeps a silver anchor and a rope in the tower.
The mother gives a blanket and a pillow to the people on the ship.
The engine gives light and music to each station from the harbor up.
The rabbit comes to the garden at night for salt and sugar.
The spider makes a silver ladder from the lime tree to the window.
The lion keeps the meadow and the zebra keeps the forest by night.
The father makes a yellow table and a bucket for the kitchen in spring.
The storm comes over the ocean with rain and thunder and snow.
The tiger keeps a parcel of honey below the bridge in the jungle.
The letter on the piano is for the singer and for the father.
The turtle is on the river in summer and in the pond in winter.
The monkey gives a lemon and a fig for the guitar and the trumpet.
The candle in the cellar gives light to the carpet and the mirror.
The rocket makes thunder over the desert and a cloud over the valley.
The sheep are in the field by morning and in the castle at night.
The needle is in the basket with the ribbon and the cotton jacket.
The school keeps a pencil and paper on each table in the corner.
The market is on the square by the copper tower in the morning.
The kettle is on the oven and the pepper is in the bottle.
The train comes from the island to the station with sand and stone.
The planet is a circle of water and light with a yellow sun.
The insect keeps to the flower and the feather keeps to the water.
The magnet gives back the button and the needle from the leather saddle.
The soap makes the marble stone on the street like a mirror.
""".splitlines()


def copy(draw: Draw) -> list[Turn]:
    """Repeat sentences word for word: what a draft must gain on whatever else it gains on.

    The sentences are always the same, only their order is new: a draft that guesses eight words at once cannot follow
    eight look-ups in the prompt, but it can know how a sentence that was begun goes on.
    """
    (text,) = draw.params(lambda rng: ("\n".join(rng.sample(SENTENCES, rng.randint(3, 5))),))
    ask = draw.ask(
        "Repeat word for word:\n{}",
        "Copy this:\n{}",
        "Write this once more:\n{}",
        "Say exactly this:\n{}",
        "Echo:\n{}",
        "Give back this text:\n{}",
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
