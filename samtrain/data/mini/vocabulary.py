"""The things that appear in mmlink-mini's pictures, and how English speaks of them.

A hand-picked list of emojibase labels: nameable things that look alike enough in every drawing style to be called by
one name, and unlike each other. Left out: people, faces, flags, symbols, signs, scenes, and near-doubles
(`oncoming bus` beside `bus`). Kinds follow emojibase's subgroups; a thing of no kind ("") is named, but never
part of a category question.
"""

import hashlib
import re
from dataclasses import dataclass

ANIMAL, VEHICLE, CONCEPTUAL = "animal", "vehicle", "conceptual"
FOOD, PLANTS, WORN = "all food", "all plants", "all that is worn"


@dataclass(frozen=True)
class Kind:
    """A category a question can ask for: `singular` with its article, `plural` without.

    family: a wider category; a picture's bystanders must not make it an answer too.
    """

    name: str
    singular: str
    plural: str
    task: str
    family: str
    labels: tuple[str, ...]


def _kind(name: str, singular: str, plural: str, task: str, labels: str, *, family: str = "") -> Kind:
    family = family or {ANIMAL: "all animals", VEHICLE: "all vehicles"}.get(task, name)
    return Kind(name, singular, plural, task, family, tuple(re.split(r"\s*,\s*", labels.strip())))


# Ordered: a set limited to few identities takes the first kinds, one task after the other.
KINDS: tuple[Kind, ...] = (
    _kind(
        "mammal",
        "a mammal",
        "mammals",
        ANIMAL,
        """dog, cat, elephant, pig, horse, cow, rabbit, koala, tiger, goat, ram, mouse, monkey, fox, bear, panda, wolf,
        lion, gorilla, deer, poodle, camel, boar, chipmunk, hamster, rhinoceros, bat, leopard, giraffe, zebra, kangaroo,
        orangutan, raccoon, donkey, bison, llama, hippopotamus, beaver, hedgehog, sloth, otter, skunk, badger""",
    ),
    _kind(
        "road vehicle",
        "a road vehicle",
        "road vehicles",
        VEHICLE,
        """bus, ambulance, taxi, automobile, tractor, bicycle, minibus, fire engine, motorcycle, delivery truck,
        police car, racing car, articulated lorry, sport utility vehicle, motor scooter, kick scooter, pickup truck,
        auto rickshaw""",
    ),
    _kind(
        "fruit",
        "a fruit",
        "fruits",
        CONCEPTUAL,
        """grapes, tangerine, lemon, pear, peach, cherries, banana, watermelon, pineapple, strawberry, melon, red apple,
        kiwi fruit, green apple, mango, coconut, blueberries""",
        family=FOOD,
    ),
    _kind(
        "bird",
        "a bird",
        "birds",
        ANIMAL,
        """rooster, penguin, baby chick, turkey, duck, owl, eagle, dove, swan, flamingo, peacock, parrot, dodo, goose,
        hatching chick""",
    ),
    _kind(
        "boat",
        "a boat",
        "boats",
        VEHICLE,
        "sailboat, speedboat, ship, canoe, passenger ship, ferry, motor boat",
    ),
    _kind(
        "musical instrument",
        "a musical instrument",
        "musical instruments",
        CONCEPTUAL,
        "guitar, saxophone, trumpet, violin, drum, musical keyboard, accordion, banjo, maracas, flute, long drum",
    ),
    _kind(
        "sea animal",
        "a sea animal",
        "sea animals",
        ANIMAL,
        """dolphin, octopus, blowfish, tropical fish, whale, crab, shark, shrimp, squid, seal, jellyfish, lobster,
        oyster""",
    ),
    _kind(
        "flying machine",
        "a flying machine",
        "flying machines",
        VEHICLE,
        "airplane, helicopter, rocket, small airplane, satellite, flying saucer",
    ),
    _kind(
        "bug",
        "a bug",
        "bugs",
        ANIMAL,
        "ant, honeybee, lady beetle, spider, butterfly, scorpion, cricket, beetle, mosquito, fly, cockroach",
    ),
    _kind(
        "rail vehicle",
        "a rail vehicle",
        "rail vehicles",
        VEHICLE,
        "locomotive, railway car, metro, tram, high-speed train, monorail, suspension railway, mountain railway",
    ),
    _kind(
        "vegetable",
        "a vegetable",
        "vegetables",
        CONCEPTUAL,
        """carrot, eggplant, potato, ear of corn, hot pepper, cucumber, bell pepper, leafy green, broccoli, garlic,
        onion""",
        family=FOOD,
    ),
    _kind(
        "sweet",
        "a sweet",
        "sweets",
        CONCEPTUAL,
        """candy, cookie, custard, lollipop, doughnut, shortcake, birthday cake, chocolate bar, ice cream,
        soft ice cream, shaved ice, cupcake, pie""",
        family=FOOD,
    ),
    _kind(
        "piece of clothing",
        "a piece of clothing",
        "pieces of clothing",
        CONCEPTUAL,
        """jeans, dress, kimono, necktie, t-shirt, bikini, scarf, gloves, coat, socks, shorts, briefs, lab coat,
        safety vest, one-piece swimsuit""",
        family=WORN,
    ),
    _kind(
        "electronic device",
        "an electronic device",
        "electronic devices",
        CONCEPTUAL,
        """radio, television, camera, printer, telephone, laptop, mobile phone, desktop computer, keyboard,
        computer mouse, video camera, fax machine""",
    ),
    _kind(
        "flower",
        "a flower",
        "flowers",
        CONCEPTUAL,
        "rose, hibiscus, tulip, sunflower, cherry blossom, wilted flower, lotus, hyacinth",
        family=PLANTS,
    ),
    _kind(
        "drink",
        "a drink",
        "drinks",
        CONCEPTUAL,
        """wine glass, cocktail glass, beer mug, tropical drink, glass of milk, hot beverage, tumbler glass,
        cup with straw, bubble tea, beverage box""",
        family=FOOD,
    ),
    _kind(
        "tool",
        "a tool",
        "tools",
        CONCEPTUAL,
        "wrench, hammer, scissors, pick, axe, screwdriver, carpentry saw, clamp, broom, nut and bolt",
    ),
    _kind(
        "shoe",
        "a shoe",
        "shoes",
        CONCEPTUAL,
        """running shoe, man's shoe, high-heeled shoe, woman's sandal, woman's boot, hiking boot, flat shoe,
        ballet shoes, thong sandal""",
        family=WORN,
    ),
    _kind(
        "building",
        "a building",
        "buildings",
        CONCEPTUAL,
        """hospital, factory, school, castle, church, bank, hotel, house, office building, convenience store, mosque,
        Japanese castle, classical building, hut""",
    ),
    _kind(
        "dish",
        "a dish",
        "dishes",
        CONCEPTUAL,
        """spaghetti, sushi, hamburger, pizza, hot dog, taco, burrito, sandwich, curry rice, green salad, bento box,
        rice ball, stuffed flatbread, pancakes, french fries""",
        family=FOOD,
    ),
    _kind("reptile", "a reptile", "reptiles", ANIMAL, "crocodile, turtle, snake, lizard, T-Rex, sauropod"),
    _kind(
        "ball",
        "a ball",
        "balls",
        CONCEPTUAL,
        "baseball, basketball, soccer ball, volleyball, american football",
    ),
    _kind(
        "bag",
        "a bag",
        "bags",
        CONCEPTUAL,
        "briefcase, handbag, backpack, clutch bag, luggage, money bag",
    ),
    _kind("", "", "", ANIMAL, "snail, frog, dragon, unicorn, worm"),
    _kind("", "", "", VEHICLE, "aerial tramway, manual wheelchair"),
    _kind(
        "",
        "",
        "",
        CONCEPTUAL,
        """tomato, olive, avocado, peanuts, chestnut, ginger root, beans, bread, croissant, baguette bread, pretzel,
        bagel, waffle, cheese wedge, meat on bone, poultry leg, bacon, egg, popcorn, butter, fried shrimp, dango,
        dumpling, fortune cookie, honey pot""",
        family=FOOD,
    ),
    _kind(
        "",
        "",
        "",
        CONCEPTUAL,
        """mushroom, cactus, palm tree, evergreen tree, deciduous tree, potted plant, herb, four leaf clover,
        maple leaf, sheaf of rice""",
        family=PLANTS,
    ),
    _kind(
        "",
        "",
        "",
        CONCEPTUAL,
        "crown, top hat, woman's hat, graduation cap, billed cap, glasses, sunglasses, goggles, ring",
        family=WORN,
    ),
    _kind(
        "",
        "",
        "",
        CONCEPTUAL,
        """spiral shell, spider web, teapot, baby bottle, spoon, kitchen knife, chopsticks, jar, amphora, bell, anchor,
        balloon, door, toilet, bathtub, bed, chair, window, mirror, shopping cart, soap, toothbrush, sponge, bucket,
        basket, razor, plunger, fire extinguisher, safety pin, lipstick, umbrella, bomb, shield, bow and arrow, magnet,
        ladder, gear, key, balance scale, syringe, pill, stethoscope, microscope, telescope, thermometer, test tube,
        candle, light bulb, flashlight, closed book, open book, books, newspaper, scroll, pencil, fountain pen,
        paintbrush, crayon, paperclip, pushpin, straight ruler, envelope, package, postbox, watch, alarm clock,
        stopwatch, hourglass done, battery, electric plug, floppy disk, microphone, headphone, megaphone, trophy,
        teddy bear, game die, puzzle piece, nesting dolls, crystal ball, magic wand, kite, yo-yo, joystick, video game,
        boxing glove, ice skate, skateboard, roller skate, fishing pole, tennis, bowling, badminton, ping pong, skis,
        sled, thread, yarn, artist palette, wrapped gift, ribbon, Christmas tree, jack-o-lantern, coin, credit card,
        moai, coffin, barber pole, fountain, ferris wheel, circus tent, tent, fuel pump, vertical traffic light,
        stop sign, wheel, parachute, ring buoy, snowman, snowflake, fire, rainbow""",
    ),
)

# What a person would say where emojibase's label is not that.
SPOKEN: dict[str, str] = {
    "american football": "American football",
    "automobile": "car",
    "badminton": "badminton racket",
    "baguette bread": "baguette",
    "beer mug": "mug of beer",
    "beverage box": "juice box",
    "bowling": "bowling ball",
    "bread": "loaf of bread",
    "cheese wedge": "wedge of cheese",
    "closed book": "book",
    "cocktail glass": "cocktail",
    "game die": "die",
    "headphone": "pair of headphones",
    "high-speed train": "fast train",
    "hot beverage": "hot drink",
    "hourglass done": "hourglass",
    "lady beetle": "ladybug",
    "luggage": "suitcase",
    "manual wheelchair": "wheelchair",
    "package": "cardboard box",
    "ping pong": "ping-pong paddle",
    "spaghetti": "plate of spaghetti",
    "tennis": "tennis racket",
    "thread": "spool of thread",
    "tumbler glass": "tumbler",
    "vertical traffic light": "traffic light",
    "video game": "game controller",
    "wine glass": "glass of wine",
    "yarn": "ball of yarn",
}
_PLURAL = frozenset(
    re.split(
        r",\s*",
        """grapes, cherries, blueberries, gloves, socks, shorts, briefs, jeans, pancakes, peanuts, beans, chopsticks,
        glasses, sunglasses, goggles, skis, scissors, maracas, books, french fries, ballet shoes, nesting dolls""",
    )
)
_MASS = frozenset(
    re.split(r",\s*", "broccoli, garlic, bacon, butter, popcorn, sushi, soap, fire, curry rice, shaved ice")
)
_CONSONANT_SOUND = ("uni", "one-")  # vowel letters, yet "a unicorn"
_SILENT_H = ("hour",)


def slug(label: str) -> str:
    """The name of an icon as Iconify spells a label: "man's shoe" -> "mans-shoe"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’]", "", label.lower())).strip("-")


def is_plural(label: str) -> bool:
    """Whether the verb after this thing is a plural one."""
    return label in _PLURAL


def phrase(label: str) -> str:
    """The thing with its article: "a bus", "an owl", "grapes", "broccoli"."""
    name = SPOKEN.get(label, label)
    if label in _PLURAL or label in _MASS:
        return name
    vowel = name[0].lower() in "aeiou" and not name.startswith(_CONSONANT_SOUND)
    return f"{'an' if vowel or name.startswith(_SILENT_H) else 'a'} {name}"


def stable_fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but `parts`: roles stay the same from build to build."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
