"""Names and messages from outside, made harmless for where they go: a terminal or a spreadsheet."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A cell that begins with one of these, or with blanks and one of these, may be a formula to a spreadsheet."""


def printable(text: object) -> str:
    """Text for a terminal: control characters, bytes that are no text, and invisible characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def to_cell(text: str) -> str:
    """Text for a cell of a CSV file: behind an apostrophe where a spreadsheet might run it; numbers stay numbers."""
    return f"'{text}" if _is_formula(text.lstrip("'")) else text


def from_cell(cell: str) -> str:
    """The inverse of `to_cell`."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell.lstrip("'")) else cell


def _is_formula(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.startswith(FORMULA) or text.lstrip().startswith(FORMULA)
    return False
