"""Names and words that long texts are made of."""

import random


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "Ada Alan Anna Boris Carla Clara David Diana Edgar Elena Emil Erik Fatima Felix Frida Georg Greta Hanna Hugo "
    "Ida Igor Irene Ivan Jana Jonas Judith Karl Kira Laura Leo Lena Lucas Maria Marta Max Mila Nadia Nils Nora Olga "
    "Oscar Paul Petra Rita Robert Rosa Samir Sara Sofia Stefan Tara Theo Tina Uma Vera Victor Walter Wanda Yara Zoe"
)
LAST_NAMES = _words(
    "Adler Baker Berg Blum Brown Carter Chen Cohen Costa Dahl Diaz Dorn Ellis Falk Fischer Flynn Fox Garcia Gold "
    "Grant Green Gruber Haas Hall Hartmann Hill Hoffman Holm Ibsen Jansen Jones Keller King Klein Kumar Lang Lee Lopez "
    "Lund Mayer Meyer Moore Moreau Nagy Novak Olsen Park Petrov Quinn Reed Rossi Sato Silva Stein Stone Tanaka "
    "Turner Weber Wolf Young"
)
ADJECTIVES = _words(
    "amber ancient bitter brave bright broken calm clever cold curious dark deep distant dusty eager early empty "
    "fancy fierce gentle golden grand happy heavy hidden hollow honest humble icy jolly keen late lazy light little "
    "lonely lucky merry mighty narrow noble odd pale patient plain proud quick quiet rapid rough royal rusty sharp "
    "shiny silent silver simple sleepy slow smooth soft steady stormy strange sunny swift tall tender tiny tired "
    "warm wild wise young"
)
NOUNS = _words(
    "anchor apple arrow badger barrel basket beacon bell bishop blanket boat bottle bridge bucket button candle "
    "canyon carpet castle cellar chimney circle clock cloud comet copper corner cottage cradle desert donkey dragon "
    "eagle engine falcon feather fiddle forest fountain garden glacier hammer harbor helmet island jacket kettle "
    "ladder lantern lemon lizard magnet marble meadow mirror mountain needle orchard organ otter paddle parrot "
    "pebble pepper pillow pirate planet pocket rabbit ribbon river saddle salmon shadow spider table temple thunder "
    "tiger tower tunnel turtle valley velvet violin wagon walnut whistle window winter"
)
CITIES = _words(
    "Accra Athens Bergen Berlin Bogota Boston Cairo Dakar Delhi Dublin Geneva Havana Helsinki Jakarta Kyoto Lagos "
    "Lima Lisbon Madrid Manila Milan Nairobi Oslo Paris Porto Prague Quito Rabat Riga Rome Seoul Sofia Sydney "
    "Tehran Tokyo Toronto Tunis Vienna Warsaw Zagreb"
)
JOBS = _words("baker barber carpenter chemist dentist driver farmer gardener jeweler lawyer nurse painter pilot")
# Sentences that say nothing, for texts in which something is hidden.
NOISE = (
    "The morning was quiet and the street was empty.",
    "A light wind moved the leaves of the old tree.",
    "Somebody had left a chair in front of the door.",
    "The train came late, as it did on most days.",
    "Nobody spoke while the rain fell on the roof.",
    "The shop across the road sells bread and milk.",
    "They walked along the canal until it was dark.",
    "In the evening the lamps were lit one by one.",
)


def noise(draw: random.Random) -> str:
    """Returns a sentence that says nothing, after a space."""
    return f" {draw.choice(NOISE)}"


def pair(draw: random.Random) -> str:
    """Returns an adjective and a noun."""
    return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"


def different_pairs(draw: random.Random, count: int) -> list[str]:
    """Returns so many pairs of an adjective and a noun, no two of them equal."""
    numbers = draw.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[number // len(NOUNS)]} {NOUNS[number % len(NOUNS)]}" for number in numbers]


def different_numbers(draw: random.Random, count: int, *, digits: int) -> list[str]:
    """Returns so many numbers of that many digits, no two of them equal, the first digit not 0."""
    return [str(number) for number in draw.sample(range(10 ** (digits - 1), 10**digits), count)]
