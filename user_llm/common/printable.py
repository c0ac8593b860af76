"""Text of others made fit to be shown: on a terminal, in a log line, in a report.

Names, titles and answers come from data, and a terminal obeys some characters instead of showing them. `printable` leaves
what people read, in every script, and takes the rest out.
"""

import re
import unicodedata

# Whole escape sequences, so that no rest of them is left to read: CSI, then the strings of OSC, DCS, SOS, PM and APC up to
# their end, then the short ones (ECMA-48).
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]?|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]?")
_JOINERS = "\u200c\u200d"  # Persian and emoji are written with them
LIMIT = 1000  # characters


def printable(value: object, limit: int = LIMIT) -> str:
    """Return `str(value)` on one line, without characters that command rather than show.

    Terminal escapes, control characters and invisible format characters, overrides of the writing direction among them, are
    left out. Half a surrogate pair becomes U+FFFD. Text beyond `limit` characters is cut, and ends in `…`.
    """
    text = _ESCAPES.sub("", str(value)[: 4 * limit])
    text = " ".join("".join(map(_shown, text)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if character.isspace():
        return " "
    return "" if category in ("Cc", "Cf") and character not in _JOINERS else character
