"""Where the commands write."""

from collections.abc import Mapping

from rich.console import Console

#: Texts and tables: the standard output.
console = Console()
#: What is said about them, progress and errors: the standard error.
notes = Console(stderr=True)


def print_line(to: Console, line: str, style: str = "none") -> None:
    """Print it as it is: nothing in it is markup or an emoji, nothing is coloured or wrapped."""
    to.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Lines:
    """A table whose lines are printed as they come. Where a cell is wider than its column the line is longer, wherever
    it goes: nothing is left out or wrapped.

    Args:
        to: where it is printed.
        columns: the heads of the columns, and how they are aligned: ``"<7"`` or ``">7"``.
    """

    def __init__(self, to: Console, columns: Mapping[str, str]) -> None:
        self._to, self._columns, self._begun = to, columns, False

    def print(self, *cells: str, style: str = "none") -> None:
        """A line, under the heads if it is the first."""
        if not self._begun:
            self._begun = True
            self.print(*self._columns, style="dim")
        aligned = (f"{cell:{how}}" for cell, how in zip(cells, self._columns.values(), strict=False))
        print_line(self._to, "  ".join(aligned).rstrip(), style)
