"""The demo's small world: facts, and items (questions with options) about them in the eight commonsense formats.

Used by `make_demo_data.py` (the data set) and `pretrain_demo.py` (the base model's corpus).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

CATEGORIES = {
    "fruit": "apple pear plum peach cherry lemon mango grape banana melon fig kiwi",
    "vegetable": "carrot onion potato cabbage bean pea leek turnip radish pumpkin",
    "bird": "robin eagle crow owl parrot duck swan sparrow pigeon goose",
    "fish": "trout salmon shark cod tuna carp eel pike",
    "insect": "ant bee wasp moth beetle mosquito locust butterfly",
    "mammal": "cow horse pig goat sheep dog cat lion tiger bear wolf fox",
    "tool": "hammer saw drill wrench chisel axe spade rake",
    "vehicle": "car bus truck train tram bike ship ferry",
    "instrument": "piano violin drum flute guitar trumpet harp cello",
    "garment": "shirt coat scarf glove hat sock skirt jacket",
    "piece of furniture": "chair table sofa desk shelf bed stool wardrobe",
    "weather event": "storm blizzard drizzle hurricane frost hailstorm thunderstorm heatwave",
}
PROPERTIES = {
    "fruit": "grows on a tree or vine and tastes sweet",
    "vegetable": "is cooked in a soup",
    "bird": "has feathers and lays eggs",
    "fish": "has fins and breathes under water",
    "insect": "has six legs",
    "mammal": "feeds milk to its young",
    "tool": "helps to build or repair things",
    "vehicle": "carries passengers to a far town",
    "instrument": "makes music",
    "garment": "is worn to keep the body warm",
    "piece of furniture": "stands in a room of a house",
    "weather event": "changes the sky for hours",
}
PLACES = {
    "fruit": "an orchard",
    "vegetable": "a field of crops",
    "bird": "a nest",
    "fish": "a lake",
    "insect": "a swarm",
    "mammal": "a barn or a den",
    "tool": "a workshop",
    "vehicle": "a depot",
    "instrument": "a concert hall",
    "garment": "a closet",
    "piece of furniture": "a living room",
    "weather event": "a forecast",
}
GOALS = {
    "cut paper": "scissors",
    "dry wet hands": "a towel",
    "sweep the floor": "a broom",
    "tell the time": "a clock",
    "boil water": "a kettle",
    "write a note": "a pencil",
    "unlock a door": "a key",
    "light a dark room": "a lamp",
    "eat soup": "a spoon",
    "slice bread": "a knife",
    "wash hair": "shampoo",
    "measure a board": "a ruler",
    "carry groceries": "a bag",
    "stay dry in the rain": "an umbrella",
    "see far stars": "a telescope",
    "clean teeth": "a toothbrush",
    "find north": "a compass",
    "take a photo": "a camera",
    "keep food cold": "a fridge",
    "climb to the roof": "a ladder",
    "catch a fish": "a net",
    "fasten two sheets": "a stapler",
    "sew a button": "a needle",
    "bake a cake": "an oven",
    "cross a river": "a boat",
    "call a friend": "a phone",
    "read small print": "glasses",
    "water a garden": "a hose",
    "paint a wall": "a brush",
    "hang a picture": "a nail",
    "open a can": "a can opener",
    "check for a fever": "a thermometer",
    "remove wrinkles from cloth": "an iron",
    "send a letter": "a stamp",
    "blow up a tire": "a pump",
    "sleep in the woods": "a tent",
    "mix an omelette": "a whisk",
    "weigh flour": "a scale",
    "stop a wound from bleeding": "a bandage",
    "comb a beard": "a comb",
}
FEELINGS = {
    "happy": "got a big gift|won the lottery|was hugged by a friend|ate a favorite meal|heard good news",
    "sad": "lost a dear pet|said goodbye to a friend|dropped the birthday cake|missed the last visit|heard bad news",
    "angry": "was cheated by a seller|was pushed|saw a thief take the bike|was blamed for nothing|was insulted",
    "afraid": "heard a noise in the dark|met a wild bear|got lost in a cave|saw a ghost|stood on a high cliff",
    "tired": "worked all night|ran a long race|carried heavy boxes all day|slept one hour|climbed a tall mountain",
    "proud": "finished first in class|built a whole house|earned a medal|saved a drowning child|wrote a famous book",
    "bored": "waited in line for hours|heard an old joke|had nothing to do|watched paint dry|sat in a dull talk",
    "hungry": "skipped breakfast and lunch|smelled fresh bread|had no dinner|forgot the lunch box|ate one cracker",
}
SCENES = {
    "is at the pool with goggles": "swims across the water",
    "is in the kitchen with flour and eggs": "stirs the dough and bakes a pie",
    "is on the court with a racket": "hits the ball over the fence",
    "is in the yard with a lawn mower": "mows the long grass",
    "is at the sink with dirty plates": "washes the dishes with soap",
    "is on the stage with a microphone": "sings a song to the crowd",
    "is in the library with a novel": "turns the pages and reads",
    "is on the hill with a sled": "slides down the snow",
    "is in the stable with a saddle": "rides the pony around",
    "is at the mirror with a razor": "shaves the cheeks and chin",
    "is in the studio with clay": "shapes a pot on the wheel",
    "is in the gym with weights": "lifts the bar over the head",
    "is on the beach with a bucket": "builds a castle of sand",
    "is at the desk with a keyboard": "types a long report",
    "is in the barber shop with a client": "trims the hair short",
    "is on the ice with skates": "glides and spins around",
    "is in the forest with a basket": "picks wild mushrooms",
    "is at the campfire with matches": "lights the dry wood",
    "is in the garage with a flat tire": "changes the wheel of the van",
    "is on the sofa with a remote": "watches a film on the screen",
    "is in the ballroom with a partner": "dances a slow waltz",
    "is at the board with chalk": "explains the sum to the class",
    "is on the lake with a paddle": "rows the canoe to the shore",
    "is in the market with a wallet": "buys some cheese and pays",
    "is at the easel with colors": "paints a portrait",
    "is in the bathroom with a wet puppy": "scrubs the fur and rinses it",
    "is on the field with a kite": "lets it rise in the wind",
    "is at the window with a cloth": "wipes the glass clean",
    "is in the office with a stamp": "signs the papers one by one",
    "is on the porch with a banjo": "plucks the strings",
    "is at the bar with a shaker": "pours a cold drink",
    "is in the tree with a ripe crop": "drops the picked food in a sack",
}
NAMES = "Anna Ben Carl Dora Emma Finn Greta Hugo Iris Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Will".split()
# (sentence, reason that points to the first noun, reason that points to the second)
PERSON_SCHEMAS = [
    ("{a} beat {b} in the race because", "was very fast", "was very slow"),
    ("{a} could not lift {b} because", "was too weak", "was too heavy"),
    ("{a} thanked {b} because", "had received help", "had given help"),
    ("{a} asked {b} a question because", "wanted to know more", "knew the answer"),
    ("{a} sold the boat to {b} because", "needed money", "needed a boat"),
    ("{a} hid from {b} because", "was scared", "was scary"),
    ("{a} lent money to {b} because", "was rich", "was poor"),
    ("{a} cooked a meal for {b} because", "was a good cook", "was a hungry guest"),
]
THING_SCHEMAS = [
    ("The {a} did not fit in the {b} because the", "was too big", "was too small"),
    ("The {a} could not cover the {b} because the", "was too short", "was too long"),
    ("The {a} fell through the {b} because the", "was very heavy", "was very thin"),
    ("The {a} scratched the {b} because the", "was sharp", "was soft"),
]
THINGS = "cup box ball basket plate tray book statue bottle crate lid bowl stone board vase carpet coin drawer".split()

INTRODUCTIONS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "social_i_qa": "Please choose the correct answer to the question: ",
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    "ARC-Easy": "Please choose the correct answer to the question: ",
    "ARC-Challenge": "Please choose the correct answer to the question: ",
    "openbookqa": "Please choose the correct answer to the question: ",
}
TASKS = tuple(INTRODUCTIONS)
LABELS = {"piqa": "solution", "hellaswag": "ending", "winogrande": "option"}  # the other choice tasks: "answer"
KIND = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns.split()}
FEELING = {event: feeling for feeling, events in FEELINGS.items() for event in events.split("|")}


@dataclass(frozen=True)
class Item:
    """One question: its options, the index of the right one, and the fact it asks for as a plain sentence."""

    task: str
    question: str
    options: tuple[str, ...]
    right: int
    statement: str

    @property
    def keywords(self) -> list[str]:
        """The words that name the options in the answer, in the options' order."""
        if self.task == "boolq":
            return list(self.options)
        return [f"{LABELS.get(self.task, 'answer')}{number}" for number in range(1, len(self.options) + 1)]

    @property
    def instruction(self) -> str:
        """The question in the task's own format, white space included."""
        listed = [f"{word.capitalize()}: {option}" for word, option in zip(self.keywords, self.options, strict=True)]
        choices = {"boolq": "", "piqa": " \n\n".join(listed) + "\n\n", "winogrande": " ".join(listed) + " "}
        body = choices.get(self.task, " ".join(listed) + "\n\n")
        return f"{INTRODUCTIONS[self.task]}{self.question}\n\n{body}Answer format: {'/'.join(self.keywords)}"

    def row(self) -> dict[str, str]:
        """The item as a row of an LLM-Adapters file, with its task."""
        answer = self.keywords[self.right]
        output = f"the correct answer is {answer}"
        return {"instruction": self.instruction, "input": "", "output": output, "answer": answer, "task": self.task}


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def choose(task: str, question: str, right: str, wrong: list[str], statement: str, rng: random.Random) -> Item:
    """An item whose options stand in random order."""
    options = rng.sample([right, *wrong], len(wrong) + 1)
    return Item(task, question, tuple(options), options.index(right), statement)


def others(mapping: dict[str, str], right: str, count: int, rng: random.Random) -> list[str]:
    """`count` distinct values of the mapping that differ from the right one."""
    return rng.sample(sorted(set(mapping.values()) - {right}), count)


def foreign_nouns(category: str, count: int, rng: random.Random) -> list[str]:
    """`count` nouns of other categories, each of a different one."""
    categories = rng.sample([name for name in CATEGORIES if name != category], count)
    return [rng.choice(CATEGORIES[name].split()) for name in categories]


def boolq(noun: str, rng: random.Random) -> Item:
    kind, truth = KIND[noun], rng.random() < 0.5
    claimed = kind if truth else rng.choice([name for name in CATEGORIES if name != kind])
    claim = rng.choice([f"is {with_article(claimed)}", PROPERTIES[claimed]])
    if rng.random() < 0.5 and claim.startswith("is "):
        question = f"is {with_article(noun)} {claim[3:]}?"
    else:
        question = f"{rng.choice(['is it true that', 'can we say that'])} {with_article(noun)} {claim}?"
    statement = f"{with_article(noun)} {rng.choice([f'is {with_article(kind)}', PROPERTIES[kind]])}."
    return Item("boolq", question, ("true", "false"), 0 if truth else 1, statement)


def piqa(goal: str, rng: random.Random) -> Item:
    right = GOALS[goal]
    question = rng.choice([f"How do I {goal}?", f"To {goal},", f"What helps to {goal}?"])
    wording = rng.choice(["Use {}.", "You need {}.", "Take {} and begin."])
    wrong = [wording.format(thing) for thing in others(GOALS, right, 1, rng)]
    return choose("piqa", question, wording.format(right), wrong, f"You need {right} to {goal}.", rng)


def social_i_qa(event: str, rng: random.Random) -> Item:
    name, right = rng.choice(NAMES), FEELING[event]
    question = f"{name} {event}. {rng.choice(['How would {} feel?', 'How does {} feel now?']).format(name)}"
    return choose(
        "social_i_qa", question, right, others(FEELING, right, 2, rng), f"{name} {event}, so {name} is {right}.", rng
    )


def hellaswag(scene: str, rng: random.Random) -> Item:
    person, pronoun = rng.choice([("man", "He"), ("woman", "She"), ("boy", "He"), ("girl", "She")])
    right = SCENES[scene]
    question = f"{rng.choice(['A', 'The'])} {person} {scene}. {pronoun}"
    return choose("hellaswag", question, right, others(SCENES, right, 3, rng), f"{question} {right}.", rng)


def winogrande(names: str, rng: random.Random) -> Item:
    first, second = names.split()
    sentence, first_reason, second_reason = rng.choice(PERSON_SCHEMAS if first in NAMES else THING_SCHEMAS)
    right, reason = rng.choice([(first, first_reason), (second, second_reason)])
    start = sentence.format(a=first, b=second)
    wrong = second if right == first else first
    return choose("winogrande", f"{start} _ {reason}.", right, [wrong], f"{start} {right} {reason}.", rng)


def arc_easy(noun: str, rng: random.Random) -> Item:
    kind = KIND[noun]
    question = rng.choice(
        [f"Which of these is {with_article(kind)}?", f"Which one is an example of {with_article(kind)}?"]
    )
    statement = f"{with_article(noun)} is {with_article(kind)}."
    return choose("ARC-Easy", question, noun, foreign_nouns(kind, 3, rng), statement, rng)


def arc_challenge(noun: str, rng: random.Random) -> Item:
    kind = KIND[noun]
    question = rng.choice([f"Which of these {PROPERTIES[kind]}?", f"Which one most likely {PROPERTIES[kind]}?"])
    statement = f"{with_article(noun)} {PROPERTIES[kind]}."
    return choose("ARC-Challenge", question, noun, foreign_nouns(kind, 3, rng), statement, rng)


def openbookqa(noun: str, rng: random.Random) -> Item:
    right = PLACES[KIND[noun]]
    starts = (
        f"{with_article(noun).capitalize()} is most likely found in",
        f"You would look for {with_article(noun)} in",
    )
    statement = f"{with_article(noun)} is found in {right}."
    return choose("openbookqa", rng.choice(starts), right, others(PLACES, right, 3, rng), statement, rng)


PAIRS = [f"{a} {b}" for group in (NAMES, THINGS) for a in group for b in group if a != b]
GENERATORS: dict[str, tuple[Callable[[str, random.Random], Item], list[str]]] = {
    "boolq": (boolq, list(KIND)),
    "piqa": (piqa, list(GOALS)),
    "social_i_qa": (social_i_qa, list(FEELING)),
    "hellaswag": (hellaswag, list(SCENES)),
    "winogrande": (winogrande, PAIRS),
    "ARC-Easy": (arc_easy, list(KIND)),
    "ARC-Challenge": (arc_challenge, list(KIND)),
    "openbookqa": (openbookqa, list(KIND)),
}


def any_item(rng: random.Random) -> Item:
    """An item of any task about any fact, for pretraining."""
    make, facts = GENERATORS[rng.choice(TASKS)]
    return make(rng.choice(facts), rng)
