"""An endless invented world drawn from numbers alone: pictures, captions, questions, statements.

One to four coloured shapes of three sizes lie beside, above or inside one another on textured
grounds. Scenes are made for the question asked about them, so that answers are balanced: who does
not look at the picture guesses a quarter of them, and half of the statements.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.scene_images import render
from bivl.data.scene_things import (
    HELD_OUT,
    SEEN,
    SHAPES,
    SIDES,
    Draws,
    Pair,
    Thing,
    draw_pairs,
    draw_things,
    relation,
)
from bivl.data.scene_words import (
    ANSWERS,
    GROUNDS,
    NUMBERS,
    OPPOSITE,
    Asked,
    a_pair,
    caption,
    draw_asked,
    question,
    towards,
)
from bivl.data.table import Column, Table, refuse_name, setting, split_ranges

NAMES = ("scenes", "statements")
MIN_SIZE, MAX_SIZE = 16, 4096  # pixels
_SEEDS = {"train": 0, "test": 2**40, "compose": 2**41}  # each where no other split reaches
_STATEMENTS = 2**42  # added to these, so that statements are not about the scenes of `scenes`
_COUNTS = (1, 2, 2, 2, 3, 3, 3, 4, 4, 4)  # of things, as often as a scene has them
# Statements, and whether the first and the second picture show the pair where they are true.
_WHICH = {
    "both pictures show {}": ((True, True),),
    "there is {} in both pictures": ((True, True),),
    "only one of the pictures shows {}": ((True, False), (False, True)),
    "neither picture shows {}": ((False, False),),
    "the first picture shows {}": ((True, False), (True, True)),
    "the second picture shows {}": ((False, True), (True, True)),
}


def scenes_table(config: Mapping[str, Any]) -> Table:
    """Scenes made from the index: `num_examples` in the split, `image_size` pixels (default 64).

    `name` scenes (default): image (uint8 [S, S, 3]), text (a caption that names each thing with
    its size and place), question, answer (one of 30) and label (the shape of the largest thing).
    `name` statements: image, image2, text (a statement about both) and label (false, true).
    fields.label=answer makes the answers the classes.

    Splits: train and test (other scenes), and compose, about colours with shapes that never go
    together in the two others, neither in a picture nor in words. Each scene of compose has one
    such thing, and what is asked of a thing is asked of it (or of such a thing that is absent).
    A statement of compose names such a thing, or the pictures show one each.

    Raises:
      UserError: another name, numbers out of range, another split.
    """
    name, count = setting(config, "name", "scenes"), setting(config, "num_examples", 0)
    size = setting(config, "image_size", 64)
    if name not in NAMES:
        refuse_name("data.name: of kind=scenes", name, NAMES)
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(
            f"data.image_size={size} is out of range; scenes have {MIN_SIZE} to {MAX_SIZE} pixels"
        )
    sizes = {"train": count or 4096, "test": count or 512, "compose": count or 512}
    if not 0 < min(sizes.values()) <= max(sizes.values()) <= 2**40:
        raise UserError(f"data.num_examples={count} is out of range; take a positive number")
    ranges = split_ranges(setting(config, "split", "train"), sizes, f"scenes ({name})")
    seeds = np.concatenate([np.arange(r.start, r.stop) + _SEEDS[split] for split, r in ranges])
    if name == "statements":
        columns = {key: Column("image") for key in ("image", "image2")}
        columns |= {"text": Column("text"), "label": Column("label", ("false", "true"))}
        return Table("scenes (statements)", columns, lambda _: StatementRows(seeds, int(size)))
    columns = {key: Column("text") for key in ("text", "question")}
    columns |= {"image": Column("image"), "answer": Column("label", ANSWERS)}
    columns["label"] = Column("label", SHAPES)
    return Table("scenes", columns, lambda _: SceneRows(seeds, int(size)))


@dataclasses.dataclass(frozen=True)
class SceneRows:
    """A scene for each seed, drawn when asked for."""

    seeds: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = Draws(int(self.seeds[index]))
        compose = self.seeds[index] >= _SEEDS["compose"]
        things, asked, absent = draw_scene(draws, compose)
        ground = draws.below(len(GROUNDS))
        # The picture before the words: it stays the same when there are other ways to say it.
        image = render(things, ground, self.size, draws)
        text = caption(things, ground, draws)
        asks, answer = question(asked, things, absent, draws)
        largest = max(things, key=lambda thing: thing.size)
        return {
            "image": image,
            "text": text,
            "question": asks,
            "answer": ANSWERS.index(answer),
            "label": largest.shape,
        }


@dataclasses.dataclass(frozen=True)
class StatementRows:
    """Two scenes and a statement for each seed."""

    seeds: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = Draws(int(self.seeds[index]) + _STATEMENTS)
        truth = draws.below(2)
        text, scenes = draw_statement(draws, self.seeds[index] >= _SEEDS["compose"], bool(truth))
        images = [render(s, draws.below(len(GROUNDS)), self.size, draws) for s in scenes]
        return {"image": images[0], "image2": images[1], "text": text, "label": truth}


def draw_scene(draws: Draws, compose: bool) -> tuple[list[Thing], Asked, Pair]:
    """-> (things, what is to be asked, a pair that is absent); the first thing is asked about."""
    asked = draw_asked(draws)
    pool = HELD_OUT if compose else SEEN
    first = draws.one(pool)
    absent = draws.one([p for p in pool if p[0] != first[0] and p[1] != first[1]])
    count, kind, answer = draws.one(_COUNTS), asked.kind, asked.answer
    rule: dict[str, Any] = {}
    if kind == "things":
        count = answer
    elif kind in ("colours", "shapes"):
        count = max(1, answer) + draws.below(5 - max(1, answer))
        rule = {"attribute": int(kind == "shapes"), "alike": answer}
    elif kind in ("colour", "shape"):
        rule = {"attribute": int(kind == "colour"), "alike": 1}
    elif kind == "exists":
        rule = {"lured": first if answer else absent}
    elif kind in ("relation", "side", "neighbour"):
        # Among four, hardly any thing is alone on one side of another.
        count = max(2, min(count, 3 if kind == "neighbour" else 4))
    elif compose and not answer:
        count = 1  # the only thing may be small and the largest
    pairs = draw_pairs(draws, count, first, absent, **rule)
    size = answer if kind == "size" else None
    apart = count == 2 and kind in ("relation", "side", "neighbour")
    return draw_things(draws, pairs, size, compose, apart), asked, absent


def draw_statement(draws: Draws, compose: bool, truth: bool) -> tuple[str, list[list[Thing]]]:
    """A statement and the two scenes that make it true or false; its words tell nothing of that."""
    pair, kind = draws.one(HELD_OUT if compose else SEEN), draws.below(6)
    if kind < 3:
        text = draws.one(tuple(_WHICH))
        either = [(a, b) for a in (True, False) for b in (True, False)]
        shown = draws.one([each for each in either if (each in _WHICH[text]) == truth])
        return text.format(a_pair(pair)), [_some(draws, pair, compose, show) for show in shown]
    if kind < 5:
        text, counts = _counted(draws, truth)
        return text, [_some(draws, pair, compose, True, count) for count in counts]
    which = draws.below(2)
    scenes = [_some(draws, pair, compose, True, draws.one((2, 3, 4))) for _ in range(2)]
    first, others = scenes[which][0], draws.shuffled(scenes[which][1:])
    other = next(thing for thing in others if relation(first, thing) in SIDES)
    where = str(relation(first, other))
    where = towards(where if truth else OPPOSITE[where], draws)
    picture = ("first", "second")[which]
    return f"in the {picture} picture the {first.name} is {where} the {other.name}", scenes


def _counted(draws: Draws, truth: bool) -> tuple[str, tuple[int, int]]:
    """A statement about numbers of things, and these."""
    either = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    form = draws.below(4)
    if form == 0:
        text = "both pictures show equally many things"
        fit = [(a, b) for a, b in either if (a == b) == truth]
    elif form == 1:
        total = 3 + draws.below(5)
        text = f"there are {NUMBERS[total]} things in all"
        fit = [(a, b) for a, b in either if abs(a + b - total) == (not truth)]
    else:
        more, less = draws.shuffled(("first", "second"))
        text = f"the {more} picture shows more things than the {less}"
        fit = [(a, b) for a, b in either if a != b and ((a > b) == (more == "first")) == truth]
    return text, draws.one(fit)


def _some(draws: Draws, pair: Pair, compose: bool, shown: bool, count: int = 0) -> list[Thing]:
    """A scene with or without a pair, and perhaps with things that share its colour or shape."""
    first = pair if shown else draws.one([other for other in SEEN if other != pair])
    absent = None if shown else pair
    pairs = draw_pairs(draws, count or draws.one(_COUNTS), first, absent, lured=pair)
    return draw_things(draws, pairs, None, compose and shown, len(pairs) == 2)
