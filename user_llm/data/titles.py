"""Titles that prompts and tries can hold: one line, composed, of bounded length, and different as any tokenizer sees them."""

import re
import unicodedata

LONGEST_TITLE = 256  # characters, beyond which a title is cut
NO_LINE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def one_line(text: str) -> str:
    """Return text in Unicode's composed form (NFC), its spaces, line ends and control characters turned into single spaces."""
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    return NO_LINE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def readable(title: str | None, key: str, number: int) -> str:
    """Return an item's title as one line of at most LONGEST_TITLE characters; its key, or else its number, where there is none."""
    return one_line(title or "")[:LONGEST_TITLE].strip() or one_line(key)[:LONGEST_TITLE].strip() or f"item {number}"


def as_tokenized(title: str) -> str:
    """Return what a tokenizer may see of a title.

    Tokenizers normalise by NFKC, drop invisible characters, or write spaces as U+2581: titles that differ in these alone may have
    the same tokens. None that is supported here drops letters' case.
    """
    if title.isascii():
        return title
    seen = (
        c for c in unicodedata.normalize("NFKC", title) if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f"
    )
    return " ".join("".join(seen).replace("\u2581", " ").split())


def unique_titles(titles: list[str]) -> list[str]:
    """Number repeated titles " [2]", " [3]", ... so that a title names one item; repeated are those of the same `as_tokenized`."""
    taken: set[str] = set()
    latest: dict[str, int] = {}
    out = []
    for title in titles:
        base = as_tokenized(title)
        name, seen, n = title, base, latest.get(base, 1)
        while seen in taken:
            n += 1
            name = f"{title} [{n}]"
            seen = as_tokenized(name)
        latest[base] = n
        taken.add(seen)
        out.append(name)
    return out
