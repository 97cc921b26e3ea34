"""Tokens of a prompt, cut into pieces that a text encoder can read.

A CLIP tower reads a fixed number of tokens, its start and end tokens included. A longer prompt is read in chunks, and
what the tower makes of each is joined along the tokens, as AUTOMATIC1111 does (`modules/sd_hijack_clip.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LOOK_BACK = 20
"""A chunk that is full ends at its last comma instead, if no more tokens than these stand from there to its end."""


@dataclass(frozen=True)
class Token:
    """A token and its weight."""

    id: int
    weight: float


Chunk = tuple[Token, ...]
"""What one pass of a text encoder reads, without start, end and padding."""


def into_chunks(sections: Iterable[Sequence[Token]], room: int, comma: int | None) -> tuple[Chunk, ...]:
    """Cut tokens into chunks of `room` at most.

    Args:
        sections: what lies between BREAKs; each begins a chunk of its own.
        room: tokens that fit between start and end, 75 of CLIP's 77.
        comma: id of the token of a comma; None where the vocabulary has none.

    Returns:
        At least one chunk; an empty section is an empty one.
    """
    return tuple(chunk for section in sections for chunk in _cut(section, room, comma))


def _cut(section: Sequence[Token], room: int, comma: int | None) -> Iterator[Chunk]:
    begin = 0
    while len(section) - begin > room:
        end = begin + room
        if section[end].id != comma:  # a comma that comes next would not be moved
            near = (i + 1 for i in range(end - 1, max(begin, end - LOOK_BACK) - 1, -1) if section[i].id == comma)
            end = next(near, end)
        yield tuple(section[begin:end])
        begin = end
    yield tuple(section[begin:])
