"""Write suffixes.txt: beginnings of answers that end where the next word may depend on the speaker.

The stems and the words for their slots were written for this package. Every combination is a line.
"""

from itertools import product
from pathlib import Path

Kind = tuple[tuple[str, ...], dict[str, str]]

# The possible words for a slot are separated by commas.
KINDS: dict[str, Kind] = {
    "facts": (
        ("The capital of {country} is", "{country} lies on the continent of", "Most people in {country} speak"),
        {
            "country": "France, Japan, Egypt, Brazil, Kenya, Norway, Canada, India, Peru, Greece, Spain, Chile, "
            "Poland, Vietnam, Turkey, Ireland"
        },
    ),
    "nature": (
        ("A {animal} usually eats", "Compared with a dog, a {animal} is", "The young of a {animal} are"),
        {"animal": "whale, sparrow, spider, horse, penguin, snake, bat, salmon, bee, wolf, mouse, frog"},
    ),
    "science": (
        ("Water at {degrees} degrees Celsius is", "At {degrees} degrees Celsius most people feel"),
        {"degrees": "minus ten, zero, twenty, forty, one hundred"},
    ),
    "sums": (
        ("{left} plus {right} is", "If I have {left} coins and get {right} more, I have"),
        {"left": "two, five, seven, nine", "right": "three, four, six, eight"},
    ),
    "reports": (
        (
            "When they asked who broke the {thing}, I said",
            "The {thing} that I sold you was",
            "I told the owner of the {thing}",
        ),
        {"thing": "window, vase, car, phone, fence, camera, laptop, bicycle, mirror, clock"},
    ),
    "work": (
        ("My part in the {task} was", "The results of the {task} were", "Looking back, the {task} went"),
        {
            "task": "report, experiment, survey, audit, presentation, interview, project, exam, repair, translation, "
            "campaign, rehearsal"
        },
    ),
    "feelings": (
        ("After {event} I felt", "Thinking of {event}, I am", "I told my friends that {event} was"),
        {
            "event": "the party, the meeting, the journey, the concert, the wedding, the game, the dinner, "
            "the holiday, the move, the storm, the reunion, the race"
        },
    ),
    "advice": (
        ("If you want to {goal}, you should", "The best way to {goal} is", "People who {goal} are"),
        {
            "goal": "save money, sleep better, learn a language, make friends, eat well, change jobs, run faster, "
            "write more, travel alone, keep a secret"
        },
    ),
    "claims": (
        ("A stranger says that {claim}. That is", "I read that {claim}, so I", "When someone insists that {claim}, I"),
        {
            "claim": "the moon is hollow, coffee cures colds, the shop closes at noon, cats can count, "
            "the train is late, a comet is coming, honey never spoils, the bridge is unsafe, the well is cursed, "
            "the bank is failing, glass is a liquid, the painting is a fake"
        },
    ),
    "requests": (
        ("You ask me about {topic}. My answer is", "What nobody tells you about {topic} is", "In short, {topic} is"),
        {
            "topic": "the contract, my age, the new manager, your singing, the medicine, the price, his plan, "
            "the weather, this town, the food here, her painting, the deadline, the car, your essay, the diet, "
            "the flight"
        },
    ),
    "promises": (
        ("I promised to {act}, and I", "Did I {act}? The answer is", "The reason I did not {act} is"),
        {
            "act": "call my mother, pay the bill, water the plants, return the book, feed the cat, lock the door, "
            "finish early, tell the police, read the terms, send the letter"
        },
    ),
    "people": (
        ("My {person} is the kind of person who", "The truth about my {person} is", "Yesterday my {person} told me"),
        {
            "person": "neighbour, brother, teacher, boss, doctor, landlord, cousin, colleague, aunt, coach, "
            "roommate, partner"
        },
    ),
}


def suffixes() -> list[str]:
    """All stems of all kinds, with all combinations of words in their slots."""
    lines = []
    for stems, slots in KINDS.values():
        fillings = product(*(words.split(", ") for words in slots.values()))
        lines += [stem.format(**dict(zip(slots, filling, strict=True))) for stem, filling in product(stems, fillings)]
    return lines


if __name__ == "__main__":
    path: Path = Path(__file__).with_name("suffixes.txt")
    path.write_text("\n".join(suffixes()) + "\n", encoding="utf-8")
    print(f"{len(suffixes())} suffixes of {len(KINDS)} kinds: {path}")
