"""Every error raised on purpose; each message is one sentence: operand, value, rule, way out. And how it shows values."""

import re
import reprlib

LONGEST_MESSAGE = 1200
"""Characters; a message above it is cut, long words (names) first, then its middle."""

_LONG_WORD = re.compile(r"\S{301,}")


def printable(message: str) -> str:
    """`message` in one line that a terminal and a log can bear: an untrusted file chooses the names and values in it.

    Control characters and lone surrogates are escaped; of a message above LONGEST_MESSAGE the longest words, then the middle
    are cut out.
    """
    if not message.isprintable():
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[: 1 << 20])
    if len(message) > LONGEST_MESSAGE:
        message = _LONG_WORD.sub(lambda word: f"{word[0][:180]}...{word[0][-60:]}", message)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 + 5 :]}"
    return message


class SlideSparseError(Exception):
    """Base of all errors of this library; its message is made `printable`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))


class OperandError(SlideSparseError, ValueError):
    """An argument has the wrong type, shape, dtype or value."""


class PatternError(SlideSparseError, ValueError):
    """Weights break their (2N-2):2N pattern.

    Attributes:
        row, group: where the first violation stands (row of w, group index along k).
        count: how many groups violate the pattern.
    """

    def __init__(self, message: str, *, row: int = -1, group: int = -1, count: int = 0) -> None:
        super().__init__(message)
        self.row, self.group, self.count = row, group, count


class FormatError(SlideSparseError, ValueError):
    """A file is not what it says it is: truncated, inconsistent, or of an unknown version."""


class VerificationError(SlideSparseError):
    """A packed weight does not equal its source, or is not in canonical form."""


class UnsupportedError(SlideSparseError):
    """A valid input of a kind that this library does not handle (yet)."""


class _Shortened(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to print thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() <= 1024 else f"<an integer of {x.bit_length()} bits>"


_shortened = _Shortened()
_shortened.maxstring = _shortened.maxother = 120
_shortened.maxlist = _shortened.maxdict = 8
shown = _shortened.repr
"""repr, cut to a length that an error message can bear: an untrusted file chooses names and values."""
