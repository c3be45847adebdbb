"""Running text cut into passages, where a paragraph or a sentence ends."""

from __future__ import annotations

import re

PASSAGE = 2000  # characters: about 512 tokens of English
# Where a passage may end, the best place first: a paragraph, a line, a sentence, a word.
ENDS = (r"\n[ \t]*\n\s*", r"\n\s*", r"(?<=[.!?\u3002\uff01\uff1f])[\"'\u201d\u2019)\]]*\s+", r"\s+")
NOT_BLANK = re.compile(r"\S")
MARKED = re.compile(r"#{1,6}\s.*|=.*=")  # a heading in Markdown, or as wikis write it
LONGEST_HEADING = 80  # characters


def passages(text: str, size: int = PASSAGE) -> list[str]:
    """A text in passages of at most `size` characters, in its order.

    A passage ends with a paragraph if one ends in its second half, else with a line, a sentence, a
    word, or in the middle of one. It does not end with a heading, which opens the next one.

    Returns:
        All of the text but the white space between passages; none of them is blank. A last one of
        less than a tenth of `size` is left out unless it is the only one.
    """
    found: list[str] = []
    end = 0
    while next_word := NOT_BLANK.search(text, end):
        begin = next_word.start()
        end = begin + _length(text[begin : begin + size + 1], size)
        found.append(text[begin:end].strip())
    if len(found) > 1 and len(found[-1]) < size / 10:
        found.pop()
    return found


def _length(text: str, size: int) -> int:
    """How many characters of `text` make one passage."""
    if len(text) <= size:
        return len(text)
    for pattern in ENDS:
        ends = [m.start() for m in re.finditer(pattern, text) if size // 2 <= m.start() <= size]
        for end in reversed(ends):
            last = re.split(ENDS[0], text[:end].rstrip())[-1]
            if not is_heading(last) or pattern != ENDS[0]:
                return end
    return size


def is_heading(paragraph: str) -> bool:
    """Whether a paragraph is a single line that only names what follows."""
    line = paragraph.strip()
    if "\n" in line or len(line) > LONGEST_HEADING:
        return False
    return MARKED.fullmatch(line) is not None or line[-1:].isalnum()
