"""Every error this library raises on purpose; each message is one sentence: operand, value, rule, way out."""


class SlideSparseError(Exception):
    """Base of all errors of this library."""


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
