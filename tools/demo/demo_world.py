"""The demo's small world: facts, and items (questions with options) about them in the eight commonsense formats.

A task asks for one fact at depth 1 and for more at depths 2 and 3: several facts together, which of several people
it is about, a negation. The base model knows the facts and was asked for them at depth 1 only.

Used by `make_demo_data.py` (the data sets) and `pretrain_demo.py` (the base model's corpus).
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from zlib import crc32

from demo_facts import DEMO, NAMES, PEOPLE, PLACES, PROPERTIES, World

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


def is_held_out(instruction: str) -> bool:
    """Whether a question is kept for validation and test: a quarter of all; training never asks them."""
    return crc32(instruction.encode()) % 4 == 0


@dataclass(frozen=True)
class Item:
    """One question: its options, the index of the right one, and the fact it asks for as a plain sentence."""

    task: str
    question: str
    statement: str
    options: tuple[str, ...] = ()
    right: int = 0

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

    @property
    def held_out(self) -> bool:
        """Whether the item is kept for validation and test."""
        return is_held_out(self.instruction)

    def row(self) -> dict[str, str]:
        """The item as a row of an LLM-Adapters file, with its task."""
        answer = self.keywords[self.right]
        output = f"the correct answer is {answer}"
        return {"instruction": self.instruction, "input": "", "output": output, "answer": answer, "task": self.task}


DEPTHS = (1, 2, 3)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def upper(text: str) -> str:
    return text[0].upper() + text[1:]


def others(group: Iterable[str], taken: Iterable[str], count: int, rng: random.Random) -> list[str]:
    """`count` distinct members of the group that are not taken."""
    return rng.sample(sorted(set(group) - set(taken)), count)


def siblings(world: World, noun: str, count: int, rng: random.Random) -> list[str]:
    """`count` other nouns of its kind."""
    return others(world.categories[world.kind[noun]].split(), [noun], count, rng)


def foreign_nouns(world: World, kind: str, count: int, rng: random.Random) -> list[str]:
    """`count` nouns of other kinds, each of a different one."""
    return [rng.choice(world.categories[other].split()) for other in others(world.categories, [kind], count, rng)]


def choose(item: Item, right: str, wrong: list[str], rng: random.Random) -> Item:
    """The item with its options in random order."""
    options = rng.sample([right, *wrong], len(wrong) + 1)
    return replace(item, options=tuple(options), right=options.index(right))


def boolq(world: World, noun: str, depth: int, rng: random.Random) -> Item:
    """Is it so? Deeper: two or three claims joined by `and` or by `or`."""
    answer, joint = rng.random() < 0.5, rng.choice(["and", "or"])
    holds = all if joint == "and" else any
    truths = rng.choice([t for t in itertools.product([True, False], repeat=depth) if holds(t) == answer])
    nouns, claims = rng.sample([noun, *others(world.kind, [noun], depth - 1, rng)], depth), []
    for subject, true in zip(nouns, truths, strict=True):
        kind = world.kind[subject] if true else others(world.categories, [world.kind[subject]], 1, rng)[0]
        claims.append(f"{with_article(subject)} {rng.choice([f'is {with_article(kind)}', PROPERTIES[kind]])}")
    question = f"{rng.choice(['is it true that', 'can we say that'])} {f' {joint} '.join(claims)}?"
    kind = world.kind[noun]
    statement = f"{with_article(noun)} {rng.choice([f'is {with_article(kind)}', PROPERTIES[kind]])}."
    return Item("boolq", question, statement, ("true", "false"), 0 if answer else 1)


def piqa(world: World, goal: str, depth: int, rng: random.Random) -> Item:
    """What helps? Deeper: two or three goals in a row; the wrong solution swaps two things or has another one."""
    goals = rng.sample([goal, *others(world.goals, [goal], depth - 1, rng)], depth)
    right = [world.goals[one] for one in goals]
    first, second = rng.sample(range(depth), 2) if depth > 1 and rng.random() < 0.5 else [goals.index(goal)] * 2
    wrong = list(right)
    if first == second:
        wrong[first] = others(world.goals.values(), right, 1, rng)[0]
    else:
        wrong[first], wrong[second] = right[second], right[first]
    wording = rng.choice(["Use {}.", "You need {}.", "Take {} and begin."])
    wanted = ", then ".join(goals)
    question = rng.choice([f"How do I {wanted}?", f"To {wanted},", f"What helps to {wanted}?"])
    item = Item("piqa", question, f"You need {world.goals[goal]} to {goal}.")
    return choose(item, wording.format(", then ".join(right)), [wording.format(", then ".join(wrong))], rng)


def social_i_qa(world: World, event: str, depth: int, rng: random.Random) -> Item:
    """How does one feel? Deeper: two or three people to whom different things happened."""
    right, feelings = world.feeling[event], others(world.feelings, [world.feeling[event]], depth - 1, rng)
    events = [event, *(rng.choice(world.feelings[feeling].split("|")) for feeling in feelings)]
    story = list(zip(rng.sample(NAMES, depth), events, strict=True))
    name = story[0][0]
    told = " ".join(f"{who} {what}." for who, what in rng.sample(story, depth))
    question = f"{told} {rng.choice(['How would {} feel?', 'How does {} feel now?']).format(name)}"
    wrong = feelings + others(world.feelings, [right, *feelings], 3 - depth, rng)
    return choose(Item("social_i_qa", question, f"{name} {event}, so {name} is {right}."), right, wrong, rng)


def hellaswag(world: World, scene: str, depth: int, rng: random.Random) -> Item:
    """How does it go on? Deeper: two or three people in different scenes."""
    scenes = [scene, *others(world.scenes, [scene], depth - 1, rng)]
    story = list(zip(rng.sample(PEOPLE, depth), scenes, strict=True))
    person = story[0][0]
    told = " ".join(f"{rng.choice(['A', 'The'])} {who} {what}." for who, what in rng.sample(story, depth))
    right, wrong = world.scenes[scene], [world.scenes[other] for other in scenes[1:]]
    wrong += others(world.scenes.values(), [right, *wrong], 4 - depth, rng)
    item = Item("hellaswag", f"{told} The {person}", f"The {person} {scene}. The {person} {right}.")
    return choose(item, right, wrong, rng)


def winogrande(world: World, noun: str, depth: int, rng: random.Random) -> Item:
    """Which of two has a property? Deeper: the two lie side by side; which of them is found somewhere."""
    kind, other = world.kind[noun], foreign_nouns(world, world.kind[noun], 1, rng)[0]
    told = "The {} lay beside the {}, but only the _".format(*rng.sample([noun, other], 2))
    question = (
        f"{'The _' if depth == 1 else told} {f'is found in {PLACES[kind]}' if depth == 3 else PROPERTIES[kind]}."
    )
    return choose(Item("winogrande", question, f"The {noun} {PROPERTIES[kind]}."), noun, [other], rng)


def arc_easy(world: World, noun: str, depth: int, rng: random.Random) -> Item:
    """Which is one? Deeper: which is not; which is the same kind of thing as another."""
    kind = world.kind[noun]
    item = Item("ARC-Easy", "", f"{with_article(noun)} is {with_article(kind)}.")
    if depth == 2:
        other = others(world.categories, [kind], 1, rng)[0]
        wrong = others(world.categories[other].split(), [], 3, rng)
        return choose(replace(item, question=f"Which of these is not {with_article(other)}?"), noun, wrong, rng)
    like = f"the same kind of thing as {with_article(siblings(world, noun, 1, rng)[0])}"
    starts = ["Which of these is {}?", "Which one is an example of {}?"]
    question = starts[0].format(like) if depth == 3 else rng.choice(starts).format(with_article(kind))
    return choose(replace(item, question=question), noun, foreign_nouns(world, kind, 3, rng), rng)


def arc_challenge(world: World, noun: str, depth: int, rng: random.Random) -> Item:
    """Which has a property? Deeper: which besides one that is among the options; which has it not."""
    kind = world.kind[noun]
    item = Item("ARC-Challenge", "", f"{with_article(noun)} {PROPERTIES[kind]}.")
    start = rng.choice(["Which of these", "Which one most likely"])
    if depth == 3:
        other = others(world.categories, [kind], 1, rng)[0]
        wrong = others(world.categories[other].split(), [], 3, rng)
        question = f"{start} is not one that {PROPERTIES[other]}?"
        return choose(replace(item, question=question), noun, wrong, rng)
    if depth == 2:
        known = siblings(world, noun, 1, rng)[0]
        question = f"{start}, besides {with_article(known)}, {PROPERTIES[kind]}?"
        return choose(replace(item, question=question), noun, [known, *foreign_nouns(world, kind, 2, rng)], rng)
    return choose(
        replace(item, question=f"{start} {PROPERTIES[kind]}?"), noun, foreign_nouns(world, kind, 3, rng), rng
    )


def openbookqa(world: World, noun: str, depth: int, rng: random.Random) -> Item:
    """Where is it found? Deeper: the thing one of two people has; the same after they swapped."""
    right = PLACES[world.kind[noun]]
    item = Item("openbookqa", "", f"{with_article(noun)} is found in {right}.")
    if depth == 1:
        thing = with_article(noun)
        starts = f"{upper(thing)} is most likely found in", f"You would look for {thing} in"
        wrong = others(PLACES.values(), [right], 3, rng)
        return choose(replace(item, question=rng.choice(starts)), right, wrong, rng)
    other = foreign_nouns(world, world.kind[noun], 1, rng)[0]
    owner, second = rng.sample(NAMES, 2)
    story = rng.sample([(owner, noun), (second, other)], 2)
    told = " and ".join(f"{who} has {with_article(what)}" for who, what in story)
    asked = f"{told}. Then they swap. What {second} has now" if depth == 3 else f"{told}. What {owner} has"
    wrong = [PLACES[world.kind[other]], *others(PLACES.values(), [right, PLACES[world.kind[other]]], 2, rng)]
    return choose(replace(item, question=f"{asked} is most likely found in"), right, wrong, rng)


Generator = Callable[[str, int, random.Random], Item]


def generators(world: World = DEMO) -> dict[str, tuple[Generator, list[str]]]:
    """Per task: (fact, depth, random numbers) -> item, and the facts."""
    nouns = list(world.kind)
    makers: dict[str, tuple[Callable[..., Item], list[str]]] = {
        "boolq": (boolq, nouns),
        "piqa": (piqa, list(world.goals)),
        "social_i_qa": (social_i_qa, list(world.feeling)),
        "hellaswag": (hellaswag, list(world.scenes)),
        "winogrande": (winogrande, nouns),
        "ARC-Easy": (arc_easy, nouns),
        "ARC-Challenge": (arc_challenge, nouns),
        "openbookqa": (openbookqa, nouns),
    }
    return {task: (partial(make, world), facts) for task, (make, facts) in makers.items()}


GENERATORS = generators()


def any_item(rng: random.Random, depth_weights: Sequence[float]) -> Item:
    """An item of any task about any fact of the demo's world; the weights say how often a depth comes."""
    make, facts = GENERATORS[rng.choice(TASKS)]
    return make(rng.choice(facts), rng.choices(DEPTHS, depth_weights)[0], rng)
