"""The README and the pages of .github name files, anchors, code and options that exist."""

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from inspect import signature
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
from bag_factory import CLASSES, write_bags, write_cohort_csv
from lightning.pytorch import Trainer
from road import CONF, CONFIGS

import dasmil
from dasmil.cli import VERBS, Verb, main

REPOSITORY = Path(__file__).parents[1]
PAPER = REPOSITORY / ".github" / "docs" / "paper.md"
CONTRIBUTING = REPOSITORY / ".github" / "CONTRIBUTING.md"
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / ".github").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("dasmil", "tests", "configs")
    for path in sorted((REPOSITORY / folder).rglob("*"))
    if path.suffix in (".py", ".yaml")
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
QUOTED = re.compile(r"\[`[^`]+`\]\(([^)#]+)\) `([^`]+)`")  # a linked file, and code of it
NAMED = re.compile(r"(?<![\w./-])((?:dasmil|tests|configs|\.github)/[\w./-]*\w\.?[a-z0-9]+)\b")
CREATED = re.compile(r"^# ([\w/]+\.(?:py|yaml))$", re.MULTILINE)  # by the reader, in a recipe
OPTION = re.compile(r"--[a-z][\w.]*")
PER_SCALE = re.compile(r"(--(?:extractors|features|patches))\.[^ =]+")
LIGHTNING_VERBS = ("fit", "validate", "test", "predict")
CHOICES = {"model": ("DASMIL", "ABMIL", "CLAM", "DTFD", "DINOModule")}
CHOICES["data"] = ("BagDataModule", "TileDataModule")
FOREIGN = {"--target_patch_size", "--gpus", "--only", "--variants"}  # of CLAM, SLURM, benchmarks
WORDS_OF_VERB = {"import": 2}  # the kind belongs to the verb


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its code blocks, and without the old names in a table of old and new ones."""
    text = BLOCK.sub("", text_of(page))
    return (
        re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE) if page.name == "changes.md" else text
    )


def ids_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


QUOTES = [(page, *quote) for page in PAGES for quote in QUOTED.findall(text_of(page))]
by_page = pytest.mark.parametrize("page", PAGES, ids=ids_of)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


@by_page
def test_every_link_and_image_exists(page: Path) -> None:
    for link in LINK.findall(prose_of(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@by_page
def test_every_named_file_exists(page: Path) -> None:
    """Except those that a recipe creates."""
    text = prose_of(page) + "".join(block for _, block in BLOCK.findall(text_of(page)))
    names = set(NAMED.findall(LINK.sub("", text))) - set(CREATED.findall(text))
    assert not [name for name in names if not (REPOSITORY / name).exists()]


def test_every_page_that_the_code_names_exists() -> None:
    for path in SOURCES:
        for name in re.findall(r"\.github/[\w/]+\.md", path.read_text(encoding="utf-8")):
            assert (REPOSITORY / name).is_file(), (path, name)


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 200


@pytest.mark.parametrize(("page", "path", "code"), QUOTES, ids=[quote[2][:40] for quote in QUOTES])
def test_quoted_code_occurs_once_in_its_file(page: Path, path: str, code: str) -> None:
    assert text_of(page.parent / path).count(code) == 1, (path, code)


@by_page
def test_no_link_goes_to_a_line(page: Path) -> None:
    assert not re.findall(r"\.\w+#L\d+", text_of(page))


def test_every_symbol_of_the_paper_has_its_code() -> None:
    symbols = ("X_1, X_2", "A_1, A_2", "| A |", "θ_3", "y_1^BAG", "z_1, z_2", "τ²", "KL(· ‖ ·)")
    symbols += ("GraphPooling", "L_CE", "λ L_KD + β L_CRIT", "critical instance")
    assert all(symbol in text_of(PAPER) for symbol in symbols)
    assert sum(page == PAPER for page, *_ in QUOTES) > 30


def test_every_difference_has_a_row_and_a_test() -> None:
    tests = (REPOSITORY / "tests" / "test_differences.py").read_text(encoding="utf-8")
    for number in range(1, 22):
        assert f"| D{number} |" in text_of(PAPER)
        assert f"def test_d{number}_" in tests


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words after ``python -m dasmil`` of each command in the page's code blocks."""
    for language, block in BLOCK.findall(text_of(page)):
        if language != "bash":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [n + 2 for n in range(len(words)) if words[n : n + 2] == ["-m", "dasmil"]]
            for start in starts:
                ends = [n for n in range(start, len(words)) if words[n] in ("&&", ";", "|")]
                command = words[start : min(ends, default=len(words))]
                if command[0] != "VERB" and not command[0].startswith("-"):
                    yield command


@cache
def help_of(*words: str) -> str:
    output = StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        main(words)
    return output.getvalue()


def verb_of(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(words[: WORDS_OF_VERB.get(words[0], 1)])


def options_of(verb: Sequence[str]) -> set[str]:
    """All options that the help of a verb shows."""
    pages = [help_of(*verb, "--help")]
    if verb[0] in LIGHTNING_VERBS:
        pages += [
            f"--{part}.class_path " + help_of("fit", f"--{part}.help", name)
            for part, names in CHOICES.items()
            for name in names
        ]
    options = {text.rstrip(".") for page in pages for text in OPTION.findall(page)}
    if "--trainer.devices" in options:  # the help leaves out what few need
        options |= {f"--trainer.{name}" for name in signature(Trainer.__init__).parameters}
    return options | {"--preview"}


@by_page
def test_commands_have_verbs_and_options_that_exist(page: Path) -> None:
    for words in commands_of(page):
        verb = verb_of(words)
        given = {PER_SCALE.sub(r"\1", word.split("=")[0]) for word in words if OPTION.match(word)}
        if "topk.TopK" in words:  # the recipe's method has options of its own
            given = {option for option in given if not option.startswith("--model.")}
        known = options_of(verb)
        assert "--help" in known, verb
        assert not sorted(given - known), verb


def test_options_in_sentences_exist() -> None:
    verbs = {verb_of(words) for page in PAGES for words in commands_of(page)}
    known = FOREIGN.union(*map(options_of, verbs))
    for page in PAGES:
        options = re.findall(r"`(--[a-z][\w.]*+)(?!…)[^`]*`", prose_of(page))
        options = [PER_SCALE.sub(r"\1", option).rstrip(".") for option in options]
        assert not [option for option in options if option not in known], page


def test_the_guide_shows_the_layers_of_the_import_contract() -> None:
    contracts = tomllib.loads(text_of(REPOSITORY / "pyproject.toml"))["tool"]["importlinter"]
    layers = "\n".join(contracts["contracts"][0]["layers"]).replace("dasmil.", "")
    assert f"```\n{layers}\n```" in text_of(CONTRIBUTING)


def recipes() -> dict[str, str]:
    """The code blocks of CONTRIBUTING.md that create a file, by the file's name."""
    blocks = [block for _, block in BLOCK.findall(text_of(CONTRIBUTING))]
    return {found[1]: block for block in blocks if (found := CREATED.match(block))}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_short(name: str) -> None:
    assert len(recipes()[name].splitlines()[1:]) < 40


@pytest.fixture
def recipe_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the verbs of the recipes to the table, and their modules to the package."""
    for path, block in recipes().items():
        if path.startswith(("dasmil/interop/", "dasmil/reports/")):
            name = path.removesuffix(".py").replace("/", ".")
            module = ModuleType(name)
            exec(block, vars(module))
            monkeypatch.setitem(sys.modules, name, module)
    for _, block in BLOCK.findall(text_of(CONTRIBUTING)):
        if block.startswith("{"):
            for verb, row in eval(block, {"Verb": Verb}).items():
                monkeypatch.setitem(VERBS, verb, row)


@pytest.mark.usefixtures("recipe_verbs")
def test_the_importer_of_the_recipe_is_a_verb() -> None:
    """What it imports is tested beside the importers."""
    assert "Import features of MyTool" in help_of("import", "mytool", "--help")


@pytest.mark.usefixtures("recipe_verbs")
def test_the_verb_of_the_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_cohort_csv(tmp_path / "c.csv", {"a": "tumour", "b": "tumour", "c": "normal"})
    assert main(["labels", str(tmp_path / "c.csv")]) == 0
    assert capsys.readouterr().out == "tumour: 2 slides\nnormal: 1 slides\n"
    assert "count only the slides of this split" in help_of("labels", "--help")


def test_the_method_and_the_config_of_the_recipes_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of one's own, which needs no change of the package."""
    (tmp_path / "topk.py").write_text(recipes()["dasmil/methods/topk.py"])
    config = tmp_path / "topk.yaml"
    config.write_text(recipes()["configs/method/topk.yaml"].replace(": TopK", ": topk.TopK"))
    monkeypatch.syspath_prepend(tmp_path)
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    labels = {f"s{n}": CLASSES[n % 2] for n in range(len(split))}
    empty = ["s0"]
    bags = write_bags(tmp_path / "bags", labels, dict(zip(labels, split)), empty=empty)
    run, model = tmp_path / "run", ["--model.class_path", "topk.TopK"]
    configs = [CONFIGS / "mil.yaml", CONF / "bags.yaml", config]
    fit = ["fit", *(word for path in configs for word in ("--config", str(path)))]
    fit += ["--model.k", "4", "--data.bags", str(bags), "--output", str(run)]
    assert main(fit) == 0
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert main(["test", "--ckpt_path", str(checkpoint), "--bags", str(bags), *model]) == 0
    assert (run / "test" / "test_metrics.json").is_file()
    loaded = dasmil.load(checkpoint, method=import_module("topk").TopK)
    assert loaded.scales == ("x20",) and loaded.options["k"] == 4
