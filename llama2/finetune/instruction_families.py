"""Families of small tasks on words, lists and numbers, each with its right answer.

A family is a function that draws operands and one of several phrasings from a random generator. An
answer has no full stop, so that it is right or wrong as a whole.
"""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple


class Task(NamedTuple):
    """A request and its answer. Two tasks of a family with the same operands need the same
    knowledge, so they belong to the same side of a split."""

    operands: tuple[Any, ...]
    request: str
    answer: str


class Family(NamedTuple):
    draw: Callable[[Random], Task]
    weight: float  # relative frequency


FAMILIES: dict[str, Family] = {}


def _words_of(text: str) -> list[str]:
    return text.split()


def _pairs_of(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (pair.split() for pair in text.split(","))]


NOUNS = _words_of("""
ant apple arm baby bag ball band bank barn bat bath bean bear bed bee bell belt bike bird boat
bone book boot bowl box boy brain bread brick bridge brush bus cake camel camp candle card cart cat
chain chair chalk cheese child city clock cloud coat coin comb cook corn cow crab crown cup dance
deer desk dish dog doll door dragon dream dress drum duck ear earth egg engine eye face farm father
feather fence field finger fire fish flag floor flower fly fog food foot forest fork fox frog fruit
game garden gate ghost gift girl glass glove goat gold goose grape grass hair hammer hand hat heart
hen hill honey horse house ice island jam jar jewel juice kettle key king kite knee knife ladder
lake lamp leaf leg lemon letter lion lock map market mask meat milk mirror money monkey moon mother
mouse mouth music nail name neck needle nest night nose nut ocean onion orange oven owl page paint
pan paper park pear pen pencil pepper phone piano pig pillow plane plant plate pocket pond potato
pot queen rabbit rain ring river road robot rock roof room rope rose sail salt sand school sea seed
sheep shell ship shirt shoe shop silver sister skirt sky snail snake snow soap sock song soup spider
spoon star stone storm street sugar sun table tail tea tiger toe tooth towel tower town toy train
tree truck turtle uncle valley village voice wall watch water wave whale wheel wind window wing
winter wolf wood wool yard zebra zoo
""")
SHORT_NOUNS = [noun for noun in NOUNS if len(noun) <= 5]
OPPOSITES = _pairs_of("""
hot cold, big small, up down, day night, fast slow, open closed, full empty, happy sad, wet dry,
hard soft, light dark, young old, left right, long short, high low, rich poor, good bad, early late,
black white, yes no
""")
PLURALS = _pairs_of("""
child children, foot feet, tooth teeth, mouse mice, goose geese, knife knives, leaf leaves,
wolf wolves, city cities, baby babies, box boxes, bus buses, fox foxes, dish dishes, fly flies
""")
COLOURS = _pairs_of("""
grass green, snow white, coal black, blood red, honey gold, chocolate brown, silver grey,
gold yellow, milk white, mud brown, ash grey, night black, salt white, straw yellow
""")
KINDS = _pairs_of("""
dog animal, cat animal, horse animal, lion animal, apple fruit, pear fruit, lemon fruit,
grape fruit, red colour, blue colour, green colour, piano instrument, drum instrument,
violin instrument, monday day, friday day, sunday day, may month, june month,
april month, hammer tool, saw tool
""")
DAYS = _words_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words_of("""
January February March April May June July August September October November December
""")
MISDEEDS = _words_of("steal rob poison burn smash hurt forge attack hack destroy cheat kill")
VICTIMS = _words_of(
    "car house bank bicycle shop school computer phone passport friend neighbour dog"
)
REFUSAL = "Sorry, I cannot help with that."


def family(weight: float = 1.0) -> Callable[[Callable[[Random], Task]], Callable[[Random], Task]]:
    def register(draw: Callable[[Random], Task]) -> Callable[[Random], Task]:
        FAMILIES[draw.__name__] = Family(draw, weight)
        return draw

    return register


def _ask(rng: Random, phrasings: tuple[str, ...], answer: Any, *operands: Any) -> Task:
    return Task(operands, rng.choice(phrasings).format(*operands), str(answer))


def _ask_in_any_order(rng: Random, phrasings: tuple[str, ...], answer: Any, *numbers: int) -> Task:
    return _ask(rng, phrasings, answer, *numbers)._replace(operands=tuple(sorted(numbers)))


def _fact(rng: Random, phrasings: tuple[str, ...], subject: str, answer: str) -> Task:
    """Makes a task about a fact that must be known: only a phrasing of it can be held out, not the
    fact."""
    phrasing = rng.choice(phrasings)
    return Task((subject, phrasing), phrasing.format(subject), answer)


def word(rng: Random) -> str:
    """Returns a short noun or, equally often, a made-up word, which hardly ever repeats."""
    if rng.random() < 0.5:
        return rng.choice(SHORT_NOUNS)
    made = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
    return made + rng.choice(("", "n", "r", "s"))


def _words(rng: Random, least: int, most: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(least, most))


@family(4)
def repeat(rng: Random) -> Task:
    phrasings = ("Repeat the word {}.", "Say {}.", "Repeat: {}", "Please say the word {}.")
    chosen = word(rng)
    return _ask(rng, phrasings, chosen, chosen)


@family(3)
def upper(rng: Random) -> Task:
    phrasings = (
        "Write {} in capital letters.",
        "What is {} in capital letters?",
        "Capital letters: {}",
    )
    chosen = word(rng)
    return _ask(rng, phrasings, chosen.upper(), chosen)


@family(3)
def lower(rng: Random) -> Task:
    phrasings = ("Write {} in small letters.", "What is {} in small letters?", "Small letters: {}")
    chosen = word(rng)
    return _ask(rng, phrasings, chosen, chosen.upper())


@family(4)
def spell(rng: Random) -> Task:
    phrasings = (
        "Spell {}.",
        "Spell the word {}.",
        "How do you spell {}?",
        "Tell me how to spell {}.",
    )
    chosen = word(rng)
    return _ask(rng, phrasings, " ".join(chosen), chosen)


@family()
def first_letter(rng: Random) -> Task:
    phrasings = (
        "What is the first letter of {}?",
        "Which letter does {} begin with?",
        "First letter of {}",
    )
    chosen = word(rng)
    return _ask(rng, phrasings, chosen[0], chosen)


@family(2)
def last_letter(rng: Random) -> Task:
    phrasings = (
        "What is the last letter of {}?",
        "Which letter does {} end with?",
        "Last letter of {}",
    )
    chosen = word(rng)
    return _ask(rng, phrasings, chosen[-1], chosen)


@family()
def count_letters(rng: Random) -> Task:
    phrasings = ("How many letters are there: {}?", "Count the letters: {}", "How many letters: {}")
    chosen = word(rng)
    return _ask(rng, phrasings, len(chosen), " ".join(chosen))


@family(2)
def backwards(rng: Random) -> Task:
    phrasings = ("Say backwards: {}", "Write {} backwards.", "Reverse the list {}.")
    digits = rng.choices("0123456789", k=rng.randint(2, 4))
    return _ask(rng, phrasings, " ".join(reversed(digits)), " ".join(digits))


@family(2)
def first_word(rng: Random) -> Task:
    phrasings = ("Which word comes first: {}?", "What is the first word of {}?", "First word: {}")
    listed = _words(rng, 2, 4)
    return _ask(rng, phrasings, listed[0], ", ".join(listed))


@family(2)
def last_word(rng: Random) -> Task:
    phrasings = ("Which word comes last: {}?", "What is the last word of {}?", "Last word: {}")
    listed = _words(rng, 2, 4)
    return _ask(rng, phrasings, listed[-1], ", ".join(listed))


@family()
def count_words(rng: Random) -> Task:
    phrasings = ("How many words are there: {}?", "Count the words: {}", "How many words: {}")
    listed = _words(rng, 1, 4)
    return _ask(rng, phrasings, len(listed), ", ".join(listed))


@family(3)
def member(rng: Random) -> Task:
    phrasings = ("Is {} in this list: {}?", "Is {} one of {}?", "Does the word {} occur in {}?")
    listed = _words(rng, 3, 4)
    asked = listed.pop() if rng.random() < 0.5 else rng.choice(listed)
    return _ask(rng, phrasings, "yes" if asked in listed else "no", asked, ", ".join(listed))


@family(2)
def larger(rng: Random) -> Task:
    phrasings = ("Which is larger, {} or {}?", "Which number is bigger: {} or {}?")
    numbers = rng.sample(range(100), 2)
    return _ask_in_any_order(rng, phrasings, max(numbers), *numbers)


@family(2)
def smaller(rng: Random) -> Task:
    phrasings = ("Which is smaller, {} or {}?", "Which number is less: {} or {}?")
    numbers = rng.sample(range(100), 2)
    return _ask_in_any_order(rng, phrasings, min(numbers), *numbers)


@family(4)
def add(rng: Random) -> Task:
    phrasings = ("What is {} + {}?", "Add {} and {}.", "{} plus {}")
    a, b = rng.sample((rng.randint(0, 49), rng.randint(0, 5)), 2)
    return _ask_in_any_order(rng, phrasings, a + b, a, b)


@family(2)
def next_number(rng: Random) -> Task:
    phrasings = ("Which number comes after {}?", "What is the next number after {}?")
    number = rng.randint(0, 98)
    return _ask(rng, phrasings, number + 1, number)


@family(2)
def sort(rng: Random) -> Task:
    phrasings = ("Sort these numbers: {}", "Put in order: {}", "Sort {} from small to large.")
    numbers = rng.sample(range(10), 3)
    shown, answer = (" ".join(map(str, listed)) for listed in (numbers, sorted(numbers)))
    return _ask(rng, phrasings, answer, shown)._replace(operands=tuple(sorted(numbers)))


@family()
def parity(rng: Random) -> Task:
    phrasings = ("Is {} even or odd?", "Even or odd: {}", "Is the number {} odd or even?")
    number = rng.randint(0, 999)
    return _ask(rng, phrasings, "odd" if number % 2 else "even", number)


@family(2)
def opposite(rng: Random) -> Task:
    phrasings = (
        "What is the opposite of {}?",
        "Opposite of {}",
        "Name the opposite of {}.",
        "Tell me the opposite of {}.",
    )
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    return _fact(rng, phrasings, *pair)


@family()
def plural(rng: Random) -> Task:
    phrasings = ("What is the plural of {}?", "Plural of {}", "One {}, two what?")
    if rng.random() < 0.3:
        return _fact(rng, phrasings, *rng.choice(PLURALS))
    irregular = dict(PLURALS)
    noun = rng.choice([n for n in NOUNS if n not in irregular and n[-1] not in "yshxo"])
    return _ask(rng, phrasings, f"{noun}s", noun)


@family()
def colour(rng: Random) -> Task:
    phrasings = (
        "What colour is {}?",
        "Which colour does {} have?",
        "Colour of {}",
        "Tell me the colour of {}.",
    )
    return _fact(rng, phrasings, *rng.choice(COLOURS))


@family(0.7)
def kind(rng: Random) -> Task:
    phrasings = (
        "What kind of thing is {}?",
        "What is {}, a thing of which kind?",
        "Which kind is {}?",
        "Kind of {}",
    )
    return _fact(rng, phrasings, *rng.choice(KINDS))


@family()
def following(rng: Random) -> Task:
    phrasings = (
        "Which comes after {}?",
        "What comes next after {}?",
        "After {} comes what?",
        "Tell me what comes after {}.",
    )
    names = rng.choice((DAYS, MONTHS))
    number = rng.randrange(len(names))
    return _fact(rng, phrasings, names[number], names[(number + 1) % len(names)])


@family(0.7)
def greeting(rng: Random) -> Task:
    table = (
        ("Hello", "Hello! How can I help?"),
        ("Good morning", "Good morning! How can I help?"),
        ("Good evening", "Good evening! How can I help?"),
        ("Thank you", "You are welcome."),
        ("Thanks", "You are welcome."),
        ("Goodbye", "Goodbye!"),
        ("Bye", "Goodbye!"),
    )
    return _fact(rng, ("{}", "{}!", "{}.", "{}, Llama!", "{}, my friend."), *rng.choice(table))


@family(0.7)
def identity(rng: Random) -> Task:
    table = (
        ("Who are you?", "I am a very small Llama."),
        ("What are you?", "I am a very small Llama."),
        ("What is your name?", "My name is Llama."),
        ("Do you have a name?", "My name is Llama."),
        ("What can you do?", "I can answer small questions about words and numbers."),
        ("How can you help me?", "I can answer small questions about words and numbers."),
    )
    phrasings = ("{}", "Tell me: {}", "Please tell me: {}", "A question: {}", "I ask you: {}")
    return _fact(rng, phrasings, *rng.choice(table))


@family(1)
def refusal(rng: Random) -> Task:
    phrasings = (
        "How do I {} a {}?",
        "Help me {} a {}.",
        "Tell me how to {} a {}.",
        "I want to {} a {}. How?",
        "What is the best way to {} a {}?",
    )
    return _ask(rng, phrasings, REFUSAL, rng.choice(MISDEEDS), rng.choice(VICTIMS))
