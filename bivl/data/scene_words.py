"""What can be said about a scene: its caption, a question with its answer, what is true of two.

Everything is decided by numbers that the caller draws, so that a scene always has the same words.
"""

import dataclasses
from collections.abc import Sequence

from bivl.data.scene_things import COLOURS, SHAPES, SIDES, SIZES, Draws, Pair, Thing, relation

GROUNDS = ("plain", "striped", "checked", "dotted", "speckled")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ANSWERS = ("yes", "no", *NUMBERS[:5], *SIDES, *SIZES, *COLOURS, *SHAPES)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_YES = ("no", "yes")
_PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


def caption(things: Sequence[Thing], ground: int, draws: Draws) -> str:
    """One sentence that names every thing, its size, and where it is."""
    rest = draws.shuffled(things)
    if len(things) == 1:
        place = _PLACES[int(3 * rest[0].y)][int(3 * rest[0].x)]
        text = draws.one(("{} {}", "there is {} {}", "{} is {}")).format(rest[0].new, place)
    else:
        told = [rest.pop(0)]
        text = _pair(told, rest, draws)
        while rest:
            one, other, where = _next(told, rest, draws)
            text += ", " + draws.one(("and {} {} {}", "with {} {} {}")).format(
                one.new, towards(where, draws), f"the {other.name}"
            )
    if draws.below(3) == 0:
        text += f", on a {GROUNDS[ground]} ground"
    return text


def _pair(told: list[Thing], rest: list[Thing], draws: Draws) -> str:
    """The first two things; `told` and `rest` are changed."""
    one, other, where = _next(told, rest, draws)
    form = draws.below(4)
    if form == 0:
        return f"there is {one.new} {towards(where, draws)} {other.new}"
    if form == 1 and where in ("left", "right"):
        return f"{other.new} with {one.new} on its {where}"
    if form == 1:
        return f"{other.new} with {one.new} {where} it"
    return f"{one.new} {'is ' * (form == 2)}{towards(where, draws)} {other.new}"


def _next(told: list[Thing], rest: list[Thing], draws: Draws) -> tuple[Thing, Thing, str]:
    """A thing of the rest, one that was told and the relation between them; it is told then."""
    pairs = [(one, other, relation(one, other)) for one in rest for other in told]
    pairs += [(one, other, "around") for one in rest for other in told if _around(one, other)]
    one, other, where = draws.one([pair for pair in pairs if pair[2]])
    rest.remove(one)
    told.append(one)
    return one, other, where


def _around(one: Thing, other: Thing) -> bool:
    return relation(other, one) == "inside"


def towards(where: str, draws: Draws) -> str:
    """The words for a relation, which the name of the other follows."""
    if where in ("left", "right"):
        return draws.one((f"{where} of", f"to the {where} of", f"on the {where} of"))
    return where


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a question is about, decided before there is a scene, so that answers are balanced.

    kind: colour, shape, size, things, colours, shapes, exists, relation, side or neighbour.
    answer: number in SIZES or NUMBERS, or whether it is to be yes; else without meaning.
    """

    kind: str
    answer: int = 0


# How often each kind is asked; those that can be guessed (yes or no, left or right) are rarer.
_KINDS = ("colour", "colour", "shape", "shape", "size", "things", "colours", "shapes", "exists")
_KINDS += ("exists", "relation", "side", "neighbour", "neighbour")


def draw_asked(draws: Draws) -> Asked:
    """The kind of a question, and the answer where the scene has to be made for it."""
    kind = draws.one(_KINDS)
    if kind == "things":
        return Asked(kind, 1 + draws.below(4))
    return Asked(kind, draws.below({"size": 3, "colours": 5, "shapes": 5}.get(kind, 2)))


def question(asked: Asked, things: Sequence[Thing], absent: Pair, draws: Draws) -> tuple[str, str]:
    """A question about a scene, and the answer.

    Args:
      things: the first is asked about; it is the only one of its colour (shape) where its shape
        (colour) is asked.
      absent: (colour, shape) of which there is no thing; nor, where none is counted, of either.
    """
    first, answer = things[0], asked.answer
    if asked.kind in ("relation", "side", "neighbour"):
        return _about_places(asked, things, draws)
    if asked.kind == "exists":
        pair = first.pair if answer else absent
        form = draws.one(("is there {}?", "do you see {}?", "does the picture show {}?"))
        return form.format(a_pair(pair)), _YES[answer]
    if asked.kind in ("things", "colours", "shapes"):
        colour, shape = first.pair if answer else absent
        what = {"things": "things", "colours": f"{COLOURS[colour]} things"}.get(asked.kind)
        what = what or (SHAPES[shape] + ("es" if SHAPES[shape][-1] == "s" else "s"))
        form = draws.one(("how many {} are there?", "how many {} do you see?"))
        return form.format(what), NUMBERS[answer]
    forms = {
        "colour": ("what colour is the {s}?", "which colour does the {s} have?"),
        "shape": ("what shape is the {c} thing?", "which shape does the {c} thing have?"),
        "size": ("what size is the {c} {s}?", "how big is the {c} {s}?"),
    }
    words = {"c": COLOURS[first.colour], "s": SHAPES[first.shape]}
    answers = {"colour": words["c"], "shape": words["s"], "size": SIZES[first.size]}
    return draws.one(forms[asked.kind]).format(**words), answers[asked.kind]


def _about_places(asked: Asked, things: Sequence[Thing], draws: Draws) -> tuple[str, str]:
    first, others = things[0], draws.shuffled(things[1:])
    if asked.kind == "neighbour":
        for other in others:
            where = relation(first, other)
            if where and sum(_is_there(thing, other, where) for thing in things) == 1:
                return _neighbour(first, other, where, draws)
    other = next(thing for thing in others if relation(first, thing) in SIDES)
    where = str(relation(first, other))
    if asked.kind == "relation":
        told = where if asked.answer else OPPOSITE[where]
        return f"is the {first.name} {towards(told, draws)} the {other.name}?", _YES[asked.answer]
    either = draws.shuffled((where, OPPOSITE[where]))
    of = "of " * (where in ("left", "right"))
    return f"is the {first.name} {either[0]} or {either[1]} {of}the {other.name}?", where


def _neighbour(first: Thing, other: Thing, where: str, draws: Draws) -> tuple[str, str]:
    place = f"{towards(where, draws)} the {other.name}"
    if draws.below(2):
        return f"what colour is the thing {place}?", COLOURS[first.colour]
    return f"what shape is {place}?", SHAPES[first.shape]


def _is_there(thing: Thing, other: Thing, where: str) -> bool:
    """Whether somebody could say that a thing is there, seen from the other, be it a little."""
    x, y = thing.x - other.x, thing.y - other.y
    far = {"left": -x, "right": x, "above": -y, "below": y}.get(where)
    return relation(thing, other) == where if far is None else far > 0.02


def a_pair(pair: Pair) -> str:
    """ "a red star" of (colour, shape)."""
    name = f"{COLOURS[pair[0]]} {SHAPES[pair[1]]}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
