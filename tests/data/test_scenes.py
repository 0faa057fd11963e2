"""Scenes: captions, questions and statements are read again here and checked against the things."""

import collections
import functools
import hashlib
import pickle
import re

import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.data.scene_images import RADII, render
from bivl.data.scene_things import COLOURS, HELD_OUT, SEEN, SHAPES, SIZES, Draws, Thing
from bivl.data.scene_words import ANSWERS, NUMBERS
from bivl.data.scenes import draw_scene, draw_statement, scenes_table
from bivl.data.sources import open_source

SEEDS = {"train": 0, "test": 2**40, "compose": 2**41}
NAME = re.compile(rf"\ban? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
# The same bytes are expected on every machine.
RECORDS_SHA256 = "b44dc259cfa6bc556ac46dc3bf0fe3b91eb21b8f6b42afb048136309dec1c0f9"


def rows(name="", **config):
    return scenes_table({"name": name, **config}).rows(())


@functools.lru_cache
def scenes(split, count):
    """(things, record) of the first scenes of a split."""
    records = rows(num_examples=count, split=split, image_size=16)
    drawn = (draw_scene(Draws(SEEDS[split] + k), split == "compose") for k in range(count))
    return [(things, records[k]) for k, (things, _, _) in enumerate(drawn)]


def statements(split, count):
    """(things of both pictures, text, label) of the first statements of a split."""
    records = rows("statements", num_examples=count, split=split, image_size=16)
    for index in range(count):
        draws = Draws(2**42 + SEEDS[split] + index)
        truth = draws.below(2)
        text, both = draw_statement(draws, split == "compose", bool(truth))
        assert (records[index]["text"], records[index]["label"]) == (text, truth)
        yield both, text, truth


def pairs_in(text):
    return [(COLOURS.index(c), SHAPES.index(s)) for c, s in PAIR.findall(text)]


def by_pair(things, pair):
    return next(thing for thing in things if (thing.colour, thing.shape) == pair)


def holds(one, word, other):
    """Whether one is so as seen from the other, as anybody would say."""
    x, y = one.x - other.x, one.y - other.y
    if word in ("inside", "around"):
        inner = one if word == "inside" else other
        return x == y == 0 and inner.inside
    far, aside = {"left": (-x, y), "right": (x, y), "above": (-y, x), "below": (y, x)}[word]
    return far >= 0.2 and far >= 2 * abs(aside)


def message(**config):
    with pytest.raises(UserError) as error:
        scenes_table(config)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


# Numbers and pictures


def test_numbers_are_those_of_splitmix64():
    def plain(number):
        state, full = (number + 1) * 0x9E3779B97F4A7C15, 2**64
        z = state % full
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % full
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % full
        return ((z ^ z >> 31) >> 11) / 2**53

    for seed in (0, 5, 2**42 + 2**41 + 7):
        draws = Draws(seed)
        found = [draws.uniform() for _ in range(70)]
        blocks = [[plain(seed * 2**20 + 32 * b + k) for k in range(32)] for b in range(3)]
        assert found == [u for block in blocks for u in block[::-1]][:70]
    assert sorted(Draws(1).shuffled("abcd")) == list("abcd")
    assert collections.Counter(Draws(k).below(3) for k in range(300)).keys() == {0, 1, 2}


def test_a_number_is_a_scene():
    first, again = rows(num_examples=9), pickle.loads(pickle.dumps(rows(num_examples=5)))
    assert first[3]["text"] == again[3]["text"]
    np.testing.assert_array_equal(first[3]["image"], again[3]["image"])
    part = rows(num_examples=9, split="train[3:5]")
    assert len(part) == 2 and part[0]["question"] == first[3]["question"]
    assert len({first[i]["text"] for i in range(9)}) == 9
    digest = hashlib.sha256()
    for name in ("scenes", "statements"):
        for split in ("train", "test", "compose"):
            records = rows(name, split=split, num_examples=20)
            for index in range(20):
                for key, value in sorted(records[index].items()):
                    digest.update(value.tobytes() if "image" in key else repr(value).encode())
    assert digest.hexdigest() == RECORDS_SHA256


@pytest.mark.parametrize("size", [16, 64, 101])
def test_pictures_show_the_things(size):
    colours = {}
    for seed in range(60):
        things, _, _ = draw_scene(draws := Draws(seed), False)
        image = render(things, seed % 5, size, draws)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        covered = {(thing.x, thing.y) for thing in things if thing.inside}
        for thing in things:
            radius = RADII[SIZES[thing.size]]
            if (thing.x, thing.y) in covered and not thing.inside:
                continue
            # A ring is looked at where it is filled, the others in their middle.
            x = thing.x + 0.79 * radius * (SHAPES[thing.shape] == "ring")
            if radius * size >= 5:
                pixel = image[int(thing.y * size), int(x * size)]
                colours.setdefault(COLOURS[thing.colour], []).append(pixel.astype(float))
    if size < 64:
        return
    middles = {name: np.mean(pixels, 0) for name, pixels in colours.items()}
    assert len(middles) == 8
    for name, pixels in colours.items():
        assert np.abs(np.array(pixels) - middles[name]).max() < 20
        assert min(np.abs(middles[name] - middles[o]).max() for o in middles if o != name) > 60


def test_shapes_and_sizes_look_different():
    def mask(shape, size):
        white = Thing(COLOURS.index("white"), shape, size, 0.5, 0.5)
        return render([white], 0, 64, Draws(0)).min(-1) > 200

    for size in range(3):
        masks = [mask(shape, size) for shape in range(len(SHAPES))]
        for a in range(8):
            for b in range(a):
                assert (masks[a] & masks[b]).sum() < 0.9 * (masks[a] | masks[b]).sum()
    for shape in range(8):
        areas = [mask(shape, size).sum() for size in range(3)]
        assert areas[0] * 1.7 < areas[1] and areas[1] * 1.5 < areas[2]


def test_nothing_covers_another_or_leaves_the_picture():
    for things, record in [pair for split in SEEDS for pair in scenes(split, 150)]:
        reach = [1.05 * RADII[SIZES[thing.size]] for thing in things]
        for k, one in enumerate(things):
            assert all(reach[k] <= place <= 1 - reach[k] for place in (one.x, one.y))
            for n, other in enumerate(things[:k]):
                far = max(abs(one.x - other.x), abs(one.y - other.y))
                assert far > reach[k] + reach[n] or (far == 0 and one.inside != other.inside)
        largest = sorted(things, key=lambda thing: -thing.size)[:2]
        assert len(largest) == 1 or largest[0].size > largest[1].size
        assert record["label"] == largest[0].shape


# What is held out


def test_each_colour_and_shape_lacks_one_partner():
    assert sorted(c for c, _ in HELD_OUT) == sorted(s for _, s in HELD_OUT) == list(range(8))
    assert len(set(HELD_OUT) | set(SEEN)) == 64 and len(SEEN) == 56


def test_held_out_pairs_are_only_in_compose():
    asked = 0
    for split in SEEDS:
        for things, record in scenes(split, 250):
            shown = {(thing.colour, thing.shape) for thing in things} & set(HELD_OUT)
            told = set(pairs_in(f"{record['text']}. {record['question']}")) & set(HELD_OUT)
            assert len(shown) == (split == "compose") and bool(told) == (split == "compose")
            asked += bool(set(pairs_in(record["question"])) & set(HELD_OUT))
        for both, text, _ in statements(split, 100):
            shown = {(thing.colour, thing.shape) for things in both for thing in things}
            told = shown | set(pairs_in(text))
            assert bool(told & set(HELD_OUT)) == (split == "compose")
    assert asked > 60


# Words


def test_captions_tell_the_truth_and_everything():
    words = collections.Counter()
    for things, record in [pair for split in SEEDS for pair in scenes(split, 250)]:
        text = re.sub(", on a (plain|striped|checked|dotted|speckled) ground$", "", record["text"])
        named = [
            (SIZES.index(z), COLOURS.index(c), SHAPES.index(s)) for z, c, s in NAME.findall(text)
        ]
        assert sorted(named) == sorted((t.size, t.colour, t.shape) for t in things)
        clauses = text.split(", ")
        if len(things) == 1:
            x, y = things[0].x * 3, things[0].y * 3
            for word, there in (("left", x < 1), ("right", x > 2), ("top", y < 1)):
                assert (word in text) == there
            assert ("bottom" in text) == (y > 2) and len(clauses) == 1
            continue
        assert len(clauses) == len(things) - 1
        for clause in clauses:
            (first, second), (before, behind) = PAIR.finditer(clause), pairs_in(clause)
            between, after = clause[first.end() : second.start()], clause[second.end() :]
            one, other, where = before, behind, between
            if " with " in between:  # "a red star with a blue ring on its left"
                one, other, where = behind, before, after
            (word,) = re.findall("left|right|above|below|inside|around", where)
            assert holds(by_pair(things, one), word, by_pair(things, other)), record["text"]
            words[word] += 1
    assert len(words) == 6 and min(words.values()) > 20


def answer_of(question, things):
    """The answer, by somebody who sees the things and does not know how the question was made."""
    pairs = pairs_in(question)
    colour = [t for t in things if re.search(rf"\b{COLOURS[t.colour]} thing", question)]
    shape = [t for t in things if re.search(rf"\b{SHAPES[t.shape]}(s|es)?\b", question)]
    sides = re.findall("left|right|above|below|inside", question)
    if question.startswith("how many"):
        every = re.search("how many things", question)
        return "things", NUMBERS[len(things if every else colour or shape)]
    if len(pairs) == 2:
        one, other = (by_pair(things, pair) for pair in pairs)
        true = [side for side in sides if holds(one, side, other)]
        if len(sides) == 2:
            return "side", "".join(true)
        return "relation", "yes" if true else "no"
    if sides:
        other = by_pair(things, pairs[0])
        found = [t for t in things if t is not other and holds(t, sides[0], other)]
        (only,) = found
        return "neighbour", COLOURS[only.colour] if "colour" in question else SHAPES[only.shape]
    if pairs and re.match("what size|how big", question):
        return "size", SIZES[by_pair(things, pairs[0]).size]
    if pairs:
        there = pairs[0] in [(t.colour, t.shape) for t in things]
        return "exists", "yes" if there else "no"
    (only,) = colour or shape
    return ("shape", SHAPES[only.shape]) if colour else ("colour", COLOURS[only.colour])


def test_answers_are_right():
    kinds = collections.Counter()
    for things, record in [pair for split in SEEDS for pair in scenes(split, 400)]:
        kind, answer = answer_of(record["question"], things)
        assert answer == ANSWERS[record["answer"]], record["question"]
        kinds[kind] += 1
    assert len(kinds) == 8 and min(kinds.values()) > 30


def form(text):
    return re.sub("|".join(SHAPES), "S", re.sub("|".join(COLOURS), "C", text))


@pytest.mark.parametrize("split", ["test", "compose"])
def test_guessing_without_the_picture_does_poorly(split):
    seen, right, answers = collections.defaultdict(collections.Counter), [], collections.Counter()
    for _, record in scenes("train", 2500):
        seen[form(record["question"])][record["answer"]] += 1
        answers[ANSWERS[record["answer"]]] += 1
    for _, record in scenes(split, 500):
        guess = seen[form(record["question"])].most_common(1)
        right.append(bool(guess) and guess[0][0] == record["answer"])
    assert np.mean(right) < 0.34
    assert set(answers) == set(ANSWERS) and 0.8 < answers["yes"] / answers["no"] < 1.25
    assert max(answers[name] for name in (*COLOURS, *SHAPES)) < 0.05 * 2500


def truth_of(text, both):
    """Whether a statement is true of the things of two pictures."""
    counts = [len(things) for things in both]
    first = "first" in text.split(" than ")[0]
    if "more things" in text:
        return counts[0] > counts[1] if first else counts[1] > counts[0]
    if "equally many" in text:
        return counts[0] == counts[1]
    if "in all" in text:
        return NUMBERS[sum(counts)] in text.split()
    pairs = pairs_in(text)
    if len(pairs) == 2:
        things = both[0 if first else 1]
        (word,) = re.findall("left|right|above|below", text)
        return holds(by_pair(things, pairs[0]), word, by_pair(things, pairs[1]))
    shown = [pairs[0] in [(t.colour, t.shape) for t in things] for things in both]
    if "both" in text:
        return all(shown)
    if "only one" in text:
        return sum(shown) == 1
    return not any(shown) if "neither" in text else shown[0 if first else 1]


def test_statements():
    labels = collections.defaultdict(list)
    for split in SEEDS:
        for both, text, truth in statements(split, 500):
            assert truth_of(text, both) == bool(truth), text
            labels[re.sub("left|right|above|below|" + "|".join(NUMBERS), "*", form(text))] += [
                truth
            ]
    common = [found for found in labels.values() if len(found) > 40]
    assert len(common) >= 8
    for found in common:  # within four standard deviations of one half
        assert abs(np.mean(found) - 0.5) < 2 / len(found) ** 0.5
    record = rows("statements", num_examples=1)[0]
    assert record["image"].shape == record["image2"].shape == (64, 64, 3)
    assert not np.array_equal(record["image"], record["image2"])


# As a source


def test_source():
    source = open_source({"kind": "scenes", "split": "train+compose", "num_examples": 4})
    assert len(source) == 8 and source.classes == SHAPES
    assert set(source[0]) == {"image", "text", "label", "question", "answer", "id"}
    assert source[0]["answer"] in ANSWERS
    asked = open_source({"kind": "scenes", "fields": {"label": "answer"}})
    assert asked.classes == ANSWERS and ANSWERS[asked[0]["label"]] == asked[0]["answer"]
    pairs = open_source({"kind": "scenes", "name": "statements"})
    assert set(pairs[0]) == {"image", "image2", "text", "label", "id"}
    assert pairs.classes == ("false", "true")
    assert len(open_source({"kind": "scenes", "split": "compose"})) == 512


def test_errors():
    assert "did you mean 'statements'" in message(name="statement")
    assert "num_examples=-1" in message(num_examples=-1)
    assert "image_size=8" in message(image_size=8)
    assert "data.split" in message(split="dev")
