import csv
import io

import pytest

from jaxad.progress import say
from jaxad.text import from_cell, printable, to_cell

FORMULAS = [
    "=1+1",
    "+SUM(A1)",
    "-2+3",
    "@x",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "-x.png",
    "'=1",
    "''@x",
    "=cmd|' /C calc'!A0",
]
PLAIN = ["a=1.png", "part-1/x.png", "/images/+1.png", "'tis.png", "", "-0.5", "+1e-3", "-inf", "12", "é", "a\x1bb"]


@pytest.mark.parametrize("text", FORMULAS + PLAIN)
def test_a_spreadsheet_runs_no_cell(text):
    cell = to_cell(text)
    assert cell == (f"'{text}" if text in FORMULAS else text)
    file = io.StringIO(newline="")
    csv.writer(file).writerow([cell])
    assert from_cell(*next(csv.reader(io.StringIO(file.getvalue(), newline="")))) == text


def test_a_terminal_gets_no_control_characters(capsys):
    name = "a\x1b[31m\r\n\x07\x9b\u202egpj\udcff\u200b é 日本.png"
    assert printable(name) == "a\\x1b[31m\\r\\n\\x07\\x9b\\u202egpj\\udcff\\u200b é 日本.png"
    say(name)
    assert capsys.readouterr().err == printable(name) + "\n"
