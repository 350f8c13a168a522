"""Fetch networks that a user has named on the Hugging Face hub; no other module fetches.

A repository is read at one commit, which is recorded, and only its JSON and safetensors are read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from dasmil.embedding.networks import RANDOM, refuse_unknown
from dasmil.errors import InputError, explaining
from dasmil.json_text import parse_json
from dasmil.plain import TEXT, Kind, by_name, number, one_of, refuse_other, several, whole

PREFIXES = ("hf-hub:", "hf_hub:")
REPOSITORY = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 2**20
KEPT = {  # values of a repository's configuration that describe its weights
    "mean": several(number(-10, 10), 3, 3),
    "std": several(number(1e-6, 10), 3, 3),
    "input_size": several(whole(1, 2**13), 3, 3),
    "interpolation": one_of("bilinear", "bicubic"),
    "num_classes": whole(0, 10**6),
}
ANY = Kind("any value", lambda value: True)


@dataclass(frozen=True)
class HubNetwork:
    """A network on the hub.

    Parameters
    ----------
    name: its timm name.
    options: arguments of the network, from the repository.
    overlay: values that replace those of timm's pretrained configuration, with the file of weights.
    repository: with the commit, such as ``timm/resnet18.a1_in1k@0123…``; None if the network is not
        on the hub.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    overlay: Mapping[str, Any] = field(default_factory=dict)
    repository: str | None = None


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a repository."""
    return name.startswith(PREFIXES)


def fetch_network(name: str, with_weights: bool = True) -> HubNetwork:
    """Fetch a network from the local cache or the hub.

    Parameters
    ----------
    name: ``hf-hub:ORG/NAME@REVISION``, without ``@REVISION`` the newest one; or a timm name, whose
        pretrained weights are on the hub.
    with_weights: if False, fetch only the configuration of a repository.

    Raises
    ------
    InputError
        if there is no such repository, it cannot be reached, or it holds no safetensors.
    """
    if is_on_hub(name):
        return _fetch_repository(name, with_weights)
    refuse_unknown(name)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # for an unknown tag
        raise InputError(f"extractor {name!r}: {error}") from error
    if known is None or not known.hf_hub_id:
        raise InputError(
            f"extractor {name!r}: its pretrained weights are not on the hub as safetensors; "
            f"download them and give the file as weights, or write {RANDOM}{name} for random ones"
        )
    repository, _, revision = known.hf_hub_id.partition("@")
    path = _fetch(name, repository, revision or None, WEIGHTS)
    return HubNetwork(name, {}, _overlay(path), f"{repository}@{path.parent.name}")


def _fetch_repository(name: str, with_weights: bool) -> HubNetwork:
    match = REPOSITORY.fullmatch(name.partition(":")[2])
    if match is None:
        raise InputError(f"extractor {name!r}: write hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION")
    repository, revision = match.groups()
    path = _fetch(name, repository, revision, CONFIG)
    commit = path.parent.name  # the folder of a snapshot in the cache; both files are of one commit
    config = _read_config(name, path)
    options = {
        key: value
        for key, value in config.get("model_args", {}).items()
        if key not in ("num_classes", "in_chans")  # dasmil sets both
    }
    about = config.get("pretrained_cfg", config)
    kept = {key: value for key, value in about.items() if key in KEPT}
    refuse_other(kept, KEPT, f"extractor {name!r}: {CONFIG}")
    kept = {key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()}
    if with_weights:
        kept |= _overlay(_fetch(name, repository, commit, WEIGHTS))
    return HubNetwork(config["architecture"], options, kept, f"{repository}@{commit}")


def _overlay(weights: Path) -> dict[str, Any]:
    return {"file": str(weights), "custom_load": False}


def _read_config(name: str, path: Path) -> dict[str, Any]:
    with explaining(f"extractor {name!r}: its {CONFIG} is not JSON", "give another", ValueError):
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
        config = parse_json(path.read_bytes())
    values = by_name(TEXT, ANY, 0, 1000)
    kinds = {"architecture": TEXT, "model_args": values, "pretrained_cfg": values}
    known = {key: config[key] for key in kinds if key in config} if values.holds(config) else config
    refuse_other(known, kinds, f"extractor {name!r}: {CONFIG}", required=["architecture"])
    return dict(config)


def _fetch(name: str, repository: str, revision: str | None, file: str) -> Path:
    """The path of a repository's file in the local cache, in a folder named by the commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the hub's client raises the errors of several libraries
        # LocalEntryNotFoundError: the file may exist, but cannot be reached
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"extractor {name!r}: the repository {repository} holds no {file}, and only JSON "
                "and safetensors are read from there; download its file of weights and give that "
                "as weights"
            ) from error
        random = f"write {RANDOM}{name} for random ones"
        raise InputError(
            f"extractor {name!r}: its pretrained weights are not in the local cache and cannot be "
            f"downloaded ({type(error).__name__}); download them once on a machine with a network, "
            f"or {'name a file of weights' if is_on_hub(name) else random}"
        ) from error
