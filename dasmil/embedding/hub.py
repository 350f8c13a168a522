"""Networks that a user has named on the Hugging Face hub: the one place that fetches.

A repository is read at one commit, which is recorded, and of it JSON and safetensors alone.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from dasmil.embedding.networks import RANDOM, refuse_unknown
from dasmil.errors import InputError
from dasmil.plain import TEXT, Kind, by_name, number, one_of, refuse_other, several, whole

PREFIXES = ("hf-hub:", "hf_hub:")
REPOSITORY = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 2**20
KEPT = {  # of a repository's configuration of the weights
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
    options: arguments of the network, as the repository says them.
    overlay: what timm is to know of the weights, with their file.
    repository: with the commit, such as ``timm/resnet18.a1_in1k@0123…``; None if it is not on the
        hub.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    overlay: Mapping[str, Any] = field(default_factory=dict)
    repository: str | None = None


def is_on_hub(name: str) -> bool:
    """Whether a user names a repository."""
    return name.startswith(PREFIXES)


def fetch_network(name: str, with_weights: bool = True) -> HubNetwork:
    """The network that a user has named, from the local cache or the hub.

    Parameters
    ----------
    name: ``hf-hub:ORG/NAME``, with ``@REVISION`` or the newest one; or a timm name, whose
        pretrained weights timm keeps on the hub.
    with_weights: of a repository; else its configuration alone.

    Raises
    ------
    InputError
        if there is no such repository, it cannot be reached, or it holds no safetensors.
    """
    if is_on_hub(name):
        return _of_repository(name, with_weights)
    refuse_unknown(name)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # of a tag that it does not know
        raise InputError(f"extractor {name!r}: {error}") from error
    if known is None or not known.hf_hub_id:
        raise InputError(
            f"extractor {name!r}: its pretrained weights are not on the hub as safetensors; "
            f"download them and give the file as weights, or write {RANDOM}{name} for random ones"
        )
    repository, _, revision = known.hf_hub_id.partition("@")
    path = _fetch(name, repository, revision or None, WEIGHTS)
    return HubNetwork(name, {}, _overlay(path), f"{repository}@{path.parent.name}")


def _of_repository(name: str, with_weights: bool) -> HubNetwork:
    found = REPOSITORY.fullmatch(name.partition(":")[2])
    if found is None:
        raise InputError(f"extractor {name!r}: write hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION")
    repository, revision = found.groups()
    path = _fetch(name, repository, revision, CONFIG)
    commit = path.parent.name  # of a snapshot in the cache; both files are of one
    config = _read_config(name, path)
    options = {
        key: value
        for key, value in config.get("model_args", {}).items()
        if key not in ("num_classes", "in_chans")  # always 0 and 3 here
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
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"extractor {name!r}: its {CONFIG} is not JSON ({error})") from error
    values = by_name(TEXT, ANY, 0, 1000)
    kinds = {"architecture": TEXT, "model_args": values, "pretrained_cfg": values}
    known = {key: config[key] for key in kinds if key in config} if values.holds(config) else config
    refuse_other(known, kinds, f"extractor {name!r}: {CONFIG}", required=["architecture"])
    return dict(config)


def _fetch(name: str, repository: str, revision: str | None, file: str) -> Path:
    """A file of a repository: its path in the local cache, in a folder named by the commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # it may be there, but cannot be reached
            raise _unreachable(name, error) from error
        raise InputError(
            f"extractor {name!r}: the repository {repository} holds no {file}, and nothing but "
            "JSON and safetensors is taken from there; download its file of weights and give that "
            "as weights"
        ) from error
    except Exception as error:  # the hub's client raises the errors of several libraries
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> InputError:
    advice = "or name a file of weights"
    if not is_on_hub(name):
        advice = f"or write {RANDOM}{name} for random ones"
    return InputError(
        f"extractor {name!r}: its pretrained weights are not in the local cache and cannot be "
        f"downloaded ({type(error).__name__}); download them once on a machine with a network, "
        + advice
    )
