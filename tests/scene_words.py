"""Captions back into scenes, to hold words against what they describe."""

import re

from ldm.scenes.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Solid

PHRASES = {
    **{relation: relation for relation in RELATIONS},
    "above": "on top of",
    "on": "on top of",
    "beneath": "below",
    "under": "below",
    "to the left of": "left of",
    "to the right of": "right of",
    "next to": "next to",
}
LONGEST_FIRST = sorted(PHRASES, key=len, reverse=True)


def parse_solid(text: str) -> Solid:
    words = text.replace("ring", "torus").replace("ball", "sphere").split()
    (shape,), (colour,) = ([w for w in words if w in known] for known in (SHAPES, COLOURS))
    return Solid(shape, colour, next((w for w in words if w in SIZES), None))


def parse(text: str) -> Scene:
    """The scene that a caption describes; "next to" stays as the relation."""
    text, background = re.fullmatch(r"(.*?)(?:(?: on a | against a |, )(\w+) background)?", text).groups()
    for phrase in LONGEST_FIRST:
        first, found, second = text.partition(f" {phrase} ")
        if found:
            relation, other = PHRASES[phrase], parse_solid(second)
            break
    else:
        first, relation, other = text, None, None
    return Scene(parse_solid(first), relation, other, background)
