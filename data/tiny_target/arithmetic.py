"""Arithmetic word problems with worked answers, generated.

A problem is a story of one to three steps over small whole numbers. The answer spells the steps
out in one of several styles and ends in the result, so it can be checked by reading its last
number.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from corpus import Turn

NAMES = (
    "Ada Alan Alice Amir Anna Bao Ben Carla Chen Dana David Ella Emma Farid Grace Hana Hugo Ines "
    "Ivan Jan Jin Kofi Lara Leo Lina Luis Maya Mia Nina Noor Omar Paul Priya Rosa Sam Sara Tom "
    "Uma Vera Yusuf Zoe"
).split()
THINGS = (
    "apples pears stamps coins marbles books pencils cards shells stickers cookies eggs tickets "
    "beads buttons candles flowers oranges peaches stones toys"
).split()
HOLDERS = "boxes bags baskets jars shelves packs crates drawers rows trays".split()
PLACES = (
    "at the market",
    "at school",
    "in the garden",
    "in the kitchen",
    "at the fair",
    "on the way home",
    "in the library",
    "at the station",
)
GAINS = ("finds", "buys", "gets", "wins", "collects", "is given")
LOSSES = ("gives away", "loses", "sells", "uses", "drops", "hands out")
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclass(frozen=True)
class Step:
    """One operation: what the story says, and what the answer says."""

    story: str
    reason: str
    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """Value of the step."""
        if self.sign == "+":
            return self.left + self.right
        return self.left - self.right if self.sign == "-" else self.left * self.right


def _start(rng: random.Random, name: str, thing: str) -> tuple[str, list[Step], int]:
    place = rng.choice(PLACES)
    if rng.random() < 0.35:
        groups, each = rng.randint(2, 9), rng.randint(2, 9)
        holder = rng.choice(HOLDERS)
        story = rng.choice(
            (
                f"{name} has {groups} {holder} with {each} {thing} in each.",
                f"{name} fills {groups} {holder} with {each} {thing} each.",
                f"There are {groups} {holder} {place}, and each of them holds {each} {thing}.",
            )
        )
        reason = f"{groups} {holder} of {each} {thing}"
        return story, [Step("", reason, groups, "*", each)], groups * each
    count = rng.randint(3, 40)
    story = rng.choice(
        (
            f"{name} has {count} {thing}.",
            f"{name} starts with {count} {thing}.",
            f"On {rng.choice(WEEKDAYS)} {name} counts {count} {thing} {place}.",
            f"There are {count} {thing} {place}, and they belong to {name}.",
        )
    )
    return story, [], count


def _next(rng: random.Random, name: str, thing: str, have: int) -> Step:
    place = rng.choice(PLACES)
    kind = rng.random()
    if kind < 0.45 or have < 4:
        more = rng.randint(2, 20)
        verb = rng.choice(GAINS)
        return Step(f"{name} {verb} {more} more {place}.", f"{verb} {more} more", have, "+", more)
    if kind < 0.92 or have > 40:
        less = rng.randint(1, min(20, have - 1))
        verb = rng.choice(LOSSES)
        return Step(
            f"Then {name} {verb} {less} of them {place}.", f"{verb} {less}", have, "-", less
        )
    times = rng.randint(2, 3)
    word = "twice" if times == 2 else "three times"
    return Step(f"A friend has {word} as many.", f"the friend has {word} as many", have, "*", times)


QUESTIONS = (
    "How many {thing} are there now?",
    "How many {thing} does that make?",
    "What is the number of {thing} in the end?",
    "How many {thing} is that?",
)
OPENINGS = (
    "Let us go step by step.",
    "We take it one step at a time.",
    "First look at what is given.",
    "Here is how to count them.",
    "",
    "",
)
ENDINGS = (
    "The answer is {result}.",
    "So the answer is {result}.",
    "That makes {result} {thing}.\n#### {result}",
    "In the end there are {result} {thing}.",
    "#### {result}",
)
ORDINALS = ("First", "Then", "After that", "Finally")


def problem(rng: random.Random) -> tuple[str, list[Step], str, str, int]:
    """A story with its steps: (text, steps, name, thing, result)."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    story, steps, have = _start(rng, name, thing)
    sentences = [story]
    for _ in range(rng.choice((1, 1, 1, 2, 2)) if len(steps) < 1 else rng.choice((0, 1, 1, 2))):
        step = _next(rng, name, thing, have)
        sentences.append(step.story)
        steps.append(step)
        have = step.result
    sentences.append(rng.choice(QUESTIONS).format(thing=thing))
    return " ".join(sentences), steps, name, thing, have


def explain(rng: random.Random, steps: list[Step], name: str, thing: str, result: int) -> str:
    """The worked answer, in one of several styles."""
    style = rng.randrange(4)
    lines = []
    for index, step in enumerate(steps):
        sum_ = f"{step.left} {step.sign} {step.right} = {step.result}"
        if style == 0:
            lines.append(f"{index + 1}. {step.reason}: {sum_}")
        elif style == 1:
            lines.append(f"{ORDINALS[min(index, 3)]}, {step.reason}, so we have {sum_}.")
        elif style == 2:
            lines.append(f"{sum_}, because of this: {step.reason}.")
        else:
            lines.append(f"{name}: {step.reason}. That is {sum_} {thing}.")
    separator = "\n" if style in (0, 3) else " "
    parts = (
        rng.choice(OPENINGS),
        separator.join(lines),
        rng.choice(ENDINGS).format(result=result, thing=thing),
    )
    return ("\n" if rng.random() < 0.6 else "\n\n").join(part for part in parts if part)


def math_turns(rng: random.Random, count: int) -> Iterator[Turn]:
    """`count` problems; `key` is the story itself."""
    for _ in range(count):
        text, steps, name, thing, result = problem(rng)
        yield Turn("math", text, text, explain(rng, steps, name, thing, result), str(result))


def last_number(text: str) -> str:
    """The last whole number of an answer, or nothing."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else ""
