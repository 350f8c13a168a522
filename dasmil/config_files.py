"""Where dasmil's own configs are."""

from pathlib import Path

from dasmil.errors import InputError


def configs_folder() -> Path:
    """The folder ``configs/``: in the installed package, or next to it in a clone.

    Raises
    ------
    InputError
        if there is none.
    """
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise InputError(f"{package}: the configs folder is missing; install dasmil again")


def find_config(name: str) -> Path:
    """A config by its path, else by its name in dasmil's own folder ``configs/``.

    Raises
    ------
    InputError
        if there is no such config.
    """
    short = name.removeprefix("configs/")
    for path in (Path(name), configs_folder() / short):
        if path.is_file():
            return path.resolve()
    if short == "dasmil.yaml":
        raise InputError(f"{name}: it is configs/mil.yaml now, see .github/docs/changes.md")
    if short.startswith("ablation/"):
        raise InputError(
            f"{name}: an ablation is an option of a row now, such as "
            "set: {model.objective.temperature: 2.0}; see configs/sweep/ and "
            ".github/docs/changes.md"
        )
    raise InputError(f"{name}: no such config, neither here nor in {configs_folder()}")
