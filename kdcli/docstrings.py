"""What a file says of itself, read without importing it."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def text_of(path: Path) -> str:
    """A file's docstring; empty where it has none."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def first_line_of(path: Path) -> str:
    """First line of a file's docstring, without its markup."""
    return re.sub(r":\w+:|`", "", text_of(path).partition("\n")[0]).strip()
