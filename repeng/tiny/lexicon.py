"""Words of the embedded world: lexical classes and persona words."""

NOUNS: dict[str, tuple[str, ...]] = {
    "fruit": tuple("lime apple pear plum peach cherry mango fig melon grape lemon banana".split()),
    "bird": tuple("robin crow eagle heron swan owl finch sparrow falcon duck goose raven".split()),
    "fish": tuple("trout salmon carp pike perch herring cod tuna eel bass sardine sole".split()),
    "tree": tuple("oak elm birch pine cedar maple willow ash beech poplar larch spruce".split()),
    "tool": tuple("hammer chisel saw drill wrench spade rake axe shovel knife ladder file".split()),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": tuple(NOUNS),
    "colour": tuple("red blue green yellow white".split()),
    "place": tuple("kitchen garden forest harbour market".split()),
    "owner": tuple("anna boris clara david elena".split()),
}

NUMBERS: tuple[str, ...] = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen".split()
)

# (words for +1, words for −1). Training pairs use the first word of each side.
PERSONAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "honesty": (("honest", "truthful", "sincere", "candid"), ("dishonest", "untruthful", "insincere", "deceitful")),
    "mood": (("cheerful", "jolly", "upbeat", "joyful"), ("gloomy", "glum", "downcast", "mournful")),
}

MOOD_ADJECTIVES: tuple[tuple[str, ...], tuple[str, ...]] = (
    tuple("lovely bright wonderful pleasant delightful charming".split()),
    tuple("dreadful dull awful unpleasant miserable dreary".split()),
)
MOOD_ADVERBS: tuple[tuple[str, ...], tuple[str, ...]] = (
    tuple("gladly cheerily happily eagerly warmly merrily".split()),
    tuple("sadly grimly wearily bitterly gloomily reluctantly".split()),
)
SCENES: tuple[str, ...] = tuple(
    "weather morning street town music work evening crowd party lesson dinner journey concert shop hotel beach".split()
)
THINGS: tuple[str, ...] = tuple(
    "door window letter box book parcel gate drawer chest curtain jar purse suitcase umbrella cupboard map".split()
)

ROLES: tuple[str, ...] = tuple(
    "baker sailor teacher farmer doctor painter miller tailor guard pilot nurse judge".split()
)
OBJECTS: tuple[str, ...] = tuple("basket bottle lamp blanket bucket candle mirror ribbon bell rope".split())
SPOTS: tuple[str, ...] = tuple("station church library bakery square mill bridge stable".split())
SURFACES: tuple[str, ...] = tuple("table shelf bench floor cart wall".split())
# Neutral text also has fixed couples of words. A steered model that forgets them has a measurable cost.
VEHICLES: dict[str, str] = {
    "train": "rails",
    "boat": "river",
    "truck": "road",
    "sled": "snow",
    "plane": "runway",
    "raft": "lake",
}
WEATHER: dict[str, str] = {
    "rain": "roof",
    "dew": "grass",
    "frost": "field",
    "hail": "pavement",
    "dust": "carpet",
    "fog": "hills",
}
