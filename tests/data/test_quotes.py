"""Quotation marks of CSV against a reading character by character, however the file's bytes come."""

import io
import random

import pytest

from user_llm.data.quotes import Misquoted, Quoted


class Pieces(io.RawIOBase):
    """Bytes that come at most `most` at a time."""

    def __init__(self, data, most):
        self.data, self.most = data, most

    def readinto(self, buffer):
        part, self.data = self.data[: self.most], self.data[self.most :]
        buffer[: len(part)] = part
        return len(part)


def accepted(text, most):
    stream, buffer = Quoted(Pieces(text.encode(), most), ","), bytearray(64)
    try:
        while stream.readinto(buffer):
            pass
    except Misquoted:
        return False
    return True


def right(text):
    """Say whether no value goes on after its closing quotation mark, spaces aside."""
    state, characters = "start", iter(text + "\n")
    for character in characters:
        if state == "quoted":
            state = "closed" if character == '"' else state
        elif state == "closed" and character == '"':
            state = "quoted"  # two marks are one
        elif character in ",\n":
            state = "start"
        elif state == "start":
            state = "quoted" if character == '"' else "plain"
        elif state in ("closed", "spaces"):
            if character != " ":
                return False
            state = "spaces"
    return True


@pytest.mark.parametrize("most", [1, 2, 3, 64])
def test_a_value_ends_at_its_closing_mark_however_the_bytes_come(most):
    draw = random.Random(0)
    texts = ["".join(draw.choices('",\n b', [5, 2, 2, 1, 2], k=draw.randint(0, 14))) for _ in range(5000)]
    wanted = [right(text) for text in texts]
    assert 500 < sum(wanted) < 4500
    assert [accepted(text, most) for text in texts] == wanted


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_the_line_is_counted_over_pieces(end):
    lines = ["u,i", '1,"a', 'b"', "2,b", '3,"x"y', ""]
    stream = Quoted(Pieces(end.join(lines).encode(), 4), ",")
    with pytest.raises(Misquoted, match='line 5: .*"x'):
        while stream.readinto(bytearray(4)):
            pass
