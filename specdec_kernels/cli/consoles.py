"""Where the commands write."""

import os
import sys

from rich.console import Console

_WIDE = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
#: Texts and tables: the standard output. Where that is no terminal, tables are not squeezed into 80 columns.
console = Console(width=_WIDE)
#: What is said about them, progress and errors: the standard error.
notes = Console(stderr=True)
