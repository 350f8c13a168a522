"""Shipped YAMLs hold options that exist, and only what differs from the defaults."""

import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from road import COLON, CONFIGS

from dasmil import methods
from dasmil.data import BagDataModule, TileDataModule
from dasmil.embedding.embed import embed
from dasmil.json_text import flatten
from dasmil.modules import DINOModule, MILModule
from dasmil.modules.options import plain_options
from dasmil.slides.tile import tile

FITS = [
    path
    for path in [*sorted(CONFIGS.rglob("*.yaml")), *sorted(COLON.glob("*.yaml"))]
    if yaml.safe_load(path.read_text()).keys() <= {"seed_everything", "model", "data", "trainer"}
]
PRESETS = [path for path in FITS if path.parent.name == "preset"]


def defaults(path: Path, part: str) -> dict[str, Any]:
    """The options of the class that a config is for, and their defaults."""
    is_dino = "dino" in path.stem
    if part == "data":
        kind: type = TileDataModule if is_dino else BagDataModule
    else:
        model = yaml.safe_load(path.read_text()).get("model", {})
        name = model.get("class_path", "DASMIL")
        kind = DINOModule if is_dino else getattr(methods, name)
    if issubclass(kind, MILModule):
        return flatten(kind().options)
    parameters = signature(kind.__init__).parameters
    return plain_options({name: p.default for name, p in parameters.items()})


@pytest.mark.parametrize("path", FITS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_config_holds_what_differs_from_the_defaults(path: Path) -> None:
    """A preset pins every switch, also where it is the default."""
    content = yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        given = flatten(content.get(part, {}).get("init_args", {}))
        known = defaults(path, part)
        for name, value in given.items():
            dictionary = any(name.startswith(f"{option}.") for option in known)  # of free keys
            assert name in known or dictionary, f"{part}.{name}"
            assert path in PRESETS or name not in known or known[name] != value, f"{part}.{name}"


@pytest.mark.parametrize(("name", "verb"), [("tile.yaml", tile), ("embed.yaml", embed)])
def test_the_config_of_a_verb_holds_what_differs_from_the_defaults(name: str, verb: Any) -> None:
    parameters = signature(verb).parameters
    for option, value in yaml.safe_load((CONFIGS / name).read_text()).items():
        assert parameters[option].default != value


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_a_config_begins_with_its_command_and_its_output(path: Path) -> None:
    header = path.read_text().split("\n\n")[0]
    header = "\n".join(line for line in header.splitlines() if line.startswith("#"))
    assert "#   python -m dasmil " in header
    assert re.search("[Ww]rites|output is that of", header)


def test_all_methods_have_a_config() -> None:
    names = {path.stem for path in (CONFIGS / "method").glob("*.yaml")} | {"dasmil"}
    classes = {name.lower() for name in methods.__all__ if isinstance(getattr(methods, name), type)}
    assert names == classes
