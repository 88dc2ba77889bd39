"""The facts and words of the demo's small world: what is a bird, what cuts paper, who is happy.

Also worlds in which other facts hold, in the same words: what a model of the demo's world has to learn anew.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


def _pairs(text: str) -> dict[str, str]:
    """`a: b; c: d` as a mapping."""
    return dict(pair.split(": ") for pair in text.split("; "))


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
GOALS = _pairs(
    "cut paper: scissors; dry wet hands: a towel; sweep the floor: a broom; tell the time: a clock; boil water: a "
    "kettle; write a note: a pencil; unlock a door: a key; light a dark room: a lamp; eat soup: a spoon; slice "
    "bread: a knife; wash hair: shampoo; measure a board: a ruler; carry groceries: a bag; stay dry in the rain: an "
    "umbrella; see far stars: a telescope; clean teeth: a toothbrush; find north: a compass; take a photo: a camera; "
    "keep food cold: a fridge; climb to the roof: a ladder; catch a fish: a net; fasten two sheets: a stapler; sew a "
    "button: a needle; bake a cake: an oven; cross a river: a boat; call a friend: a phone; read small print: "
    "glasses; water a garden: a hose; paint a wall: a brush; hang a picture: a nail; open a can: a can opener; check "
    "for a fever: a thermometer; remove wrinkles from cloth: an iron; send a letter: a stamp; blow up a tire: a "
    "pump; sleep in the woods: a tent; mix an omelette: a whisk; weigh flour: a scale; stop a wound from bleeding: a "
    "bandage; comb a beard: a comb"
)
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
SCENES = _pairs(
    "is at the pool with goggles: swims across the water; is in the kitchen with flour and eggs: stirs the dough and "
    "bakes a pie; is on the court with a racket: hits the ball over the fence; is in the yard with a lawn mower: "
    "mows the long grass; is at the sink with dirty plates: washes the dishes with soap; is on the stage with a "
    "microphone: sings a song to the crowd; is in the library with a novel: turns the pages and reads; is on the "
    "hill with a sled: slides down the snow; is in the stable with a saddle: rides the pony around; is at the mirror "
    "with a razor: shaves the cheeks and chin; is in the studio with clay: shapes a pot on the wheel; is in the gym "
    "with weights: lifts the bar over the head; is on the beach with a bucket: builds a castle of sand; is at the "
    "desk with a keyboard: types a long report; is in the barber shop with a client: trims the hair short; is on the "
    "ice with skates: glides and spins around; is in the forest with a basket: picks wild mushrooms; is at the "
    "campfire with matches: lights the dry wood; is in the garage with a flat tire: changes the wheel of the van; is "
    "on the sofa with a remote: watches a film on the screen; is in the ballroom with a partner: dances a slow "
    "waltz; is at the board with chalk: explains the sum to the class; is on the lake with a paddle: rows the canoe "
    "to the shore; is in the market with a wallet: buys some cheese and pays; is at the easel with colors: paints a "
    "portrait; is in the bathroom with a wet puppy: scrubs the fur and rinses it; is on the field with a kite: lets "
    "it rise in the wind; is at the window with a cloth: wipes the glass clean; is in the office with a stamp: signs "
    "the papers one by one; is on the porch with a banjo: plucks the strings; is at the bar with a shaker: pours a "
    "cold drink; is in the tree with a ripe crop: drops the picked food in a sack"
)
NAMES = "Anna Ben Carl Dora Emma Finn Greta Hugo Iris Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Will".split()
PEOPLE = "man woman boy girl".split()


@dataclass(frozen=True)
class World:
    """Which facts hold. What a kind is like and where it is found (`PROPERTIES`, `PLACES`) is the same everywhere.

    Attributes:
        categories: kind -> its nouns, separated by spaces.
        goals: what one wants to do -> what it takes.
        feelings: feeling -> the events that cause it, separated by `|`.
        scenes: scene -> how it goes on.
    """

    categories: dict[str, str]
    goals: dict[str, str]
    feelings: dict[str, str]
    scenes: dict[str, str]

    @cached_property
    def kind(self) -> dict[str, str]:
        """noun -> kind"""
        return {noun: category for category, nouns in self.categories.items() for noun in nouns.split()}

    @cached_property
    def feeling(self) -> dict[str, str]:
        """event -> feeling"""
        return {event: feeling for feeling, events in self.feelings.items() for event in events.split("|")}


DEMO = World(CATEGORIES, GOALS, FEELINGS, SCENES)


def shuffled_world(seed: int, share: float = 1.0) -> World:
    """The demo's world with a share of its facts re-paired at random: a robin may be a tool, a gift may sadden.

    Groups keep their sizes; a few shuffled facts hold as before, by chance.
    """
    rng = random.Random(f"world {seed}")
    return World(
        _regrouped(CATEGORIES, " ", share, rng),
        dict(zip(GOALS, _shuffled(GOALS.values(), share, rng), strict=True)),
        _regrouped(FEELINGS, "|", share, rng),
        dict(zip(SCENES, _shuffled(SCENES.values(), share, rng), strict=True)),
    )


def _shuffled(values: Iterable[str], share: float, rng: random.Random) -> list[str]:
    """The values, a share of which have changed places among themselves."""
    values = list(values)
    places = rng.sample(range(len(values)), round(share * len(values)))
    for place, value in zip(places, rng.sample([values[place] for place in places], len(places)), strict=True):
        values[place] = value
    return values


def _regrouped(groups: dict[str, str], mark: str, share: float, rng: random.Random) -> dict[str, str]:
    """The groups, a share of whose members have changed places."""
    members = iter(_shuffled((member for group in groups.values() for member in group.split(mark)), share, rng))
    return {name: mark.join(next(members) for _ in group.split(mark)) for name, group in groups.items()}
