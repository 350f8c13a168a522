"""``--help`` of every verb reads as help."""

import re

import pytest
from road import REPOSITORY

from dasmil.cli import VERBS, main
from dasmil.help import PAPER_PAGE

CLASSES = {
    "model": ("ABMIL", "CLAM", "DASMIL", "DTFD", "DINOModule"),
    "data": ("BagDataModule", "TileDataModule"),
}
QUESTIONS = [
    *(f"{name} --help" for name in VERBS),
    *(f"fit --{option}.help {name}" for option, names in CLASSES.items() for name in names),
]
CODE = r"----|<class|:\w+:`|``|type:|__main__|Parameters|known subclasses|(?<!\S)dasmil\.\w+\.\w"


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_help_text_reads_as_help(question, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        main(question.split())
    text = capsys.readouterr().out
    assert re.findall(CODE, text) == []
    assert ("D numbers: " + PAPER_PAGE in text) == bool(re.search(r"\bD\d", text))
    usage, *about = text.split("\n\n")
    assert len(about[0].split()) > 2
    sections = re.split(r"^(\w[^\n]*):\n(?=  \S|more options)", text, flags=re.M)[1:]
    required = {word.strip("[]") for word in usage.split()}
    titles = sections[::2]
    assert "required" not in titles[1:]
    for title, options in zip(titles, sections[1::2], strict=True):
        for option in re.split(r"^  (?=\S)", options, flags=re.M)[1:]:
            call, explanation = re.split(r"\n? {2,}", option, maxsplit=1)
            words = re.sub(r"\(default: .*\)", "", " ".join(explanation.split()))
            assert len(words.split()) > 1, option
            name = call.split(", ")[-1].split()[0]
            assert (title == "required") == (name in required), option


def test_the_page_of_the_d_numbers_is_there():
    assert (REPOSITORY / PAPER_PAGE).is_file()


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in VERBS)
    assert main(["import", "--help"]) == main(["import"]) == 0
    imports = capsys.readouterr().out
    assert all((f"  {name} " in imports) == name.startswith("import") for name in VERBS)
