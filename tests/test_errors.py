"""What is said of an error of another library."""

from __future__ import annotations

from kdcli.errors import first_line


def test_an_error_without_words_is_named() -> None:
    assert first_line(Exception()) == "Exception"
    assert first_line(ValueError(" \n")) == "ValueError"


def test_one_printable_line_of_bounded_length() -> None:
    assert first_line(ValueError("\n a \x1b[31mred\nmore")) == "a \N{REPLACEMENT CHARACTER}[31mred"
    assert len(first_line(ValueError("x" * 999))) == 200
