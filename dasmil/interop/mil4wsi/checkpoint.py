"""The kind ``mil4wsi-checkpoint`` of the verb ``import``: mil4wsi's weights → our checkpoint.

mil4wsi (https://github.com/aimagelab/mil4wsi) releases bare state dicts. Its names are on the left,
ours on the right, below ``network.``::

    gnn1.layers.0.*, glu1.mlp.mlp.*        pgnn.scale_gats.<coarse>.conv.*, .gate.mlp.*
    gnn2.layers.0.*, glu2.mlp.mlp.*        pgnn.scale_gats.<fine>.conv.*, .gate.mlp.*
    GNNlast.layers.0.*, glulast.mlp.mlp.*  pgnn.union_gat.conv.*, .gate.mlp.*
    mil2.*, mil3.*                         heads.<coarse>.*, heads.<fine>.*
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor

from dasmil.bags import bag_format
from dasmil.config_files import configs_folder
from dasmil.embedding.extractor import ExtractorSource, load_extractor
from dasmil.embedding.restricted import is_state_dict, load_restricted, refuse_no_numbers
from dasmil.embedding.weights import Misfit
from dasmil.errors import InputError
from dasmil.files import atomic_path
from dasmil.interop.mil4wsi.bags import extractor_card
from dasmil.methods import DASMIL
from dasmil.modules import ModelCard
from dasmil.modules.options import typed_options
from dasmil.nn.gat import Residual
from dasmil.nn.pgnn import module_key
from dasmil.units import Scale, TilePx, parse_scales

GATS = ("gnn1", "gnn2", "GNNlast")
GATES = ("glu1", "glu2", "glulast")
CONV_KEYS = ("att_src", "att_dst", "bias", "lin.weight")
GATE_KEYS = ("0.weight", "0.bias", "2.weight", "2.bias")
HEAD_KEYS = {
    "instance_classifier": "i_classifier.fc.0",
    "transform.0": "b_classifier.lin.0",
    "query.0": "b_classifier.q.0",
    "value": "b_classifier.v.1",
    "bag_classifier": "b_classifier.fcc",
}


def mil4wsi_checkpoint(
    file: Path,
    out: Path,
    classes: tuple[str, ...] = ("0", "1"),
    scales: tuple[str, ...] | None = None,
    residual: Residual | None = None,
    extractors: dict[str, str | ExtractorSource] | None = None,
    tile_px: int = 256,
) -> int:
    """Convert weights that mil4wsi trained for validate, test, predict and dasmil.load.

    Objective and optimiser are those of configs/preset/mil4wsi.yaml, or mil4wsi_lung.yaml for a
    model with residuals. The slides it was trained on are not known. Validation reads the test
    slides, as in the release.

    Parameters
    ----------
    file:
        state dict of mil4wsi, such as model_cam.pt or Lung.pt.
    out:
        checkpoint to write.
    classes:
        names of the labels 0, 1, ...; of two classes the second is the positive one.
    scales:
        the coarse and the fine one; by default x5 and x20 for a model with residuals, else x10 and
        x20.
    residual:
        none, plain or glu. By default glu for weights with gates, plain for equal widths, else
        none.
    extractors:
        per scale the extractor whose features the model reads: one of `import dino-checkpoint`, or
        any other that `embed` takes. By default the features of `import mil4wsi-bags`.
    tile_px:
        side of a tile as the extractors saw it.

    Raises
    ------
    InputError
        if the file cannot be loaded safely, or its weights are not those of mil4wsi.
    """
    if out.is_dir() or out.resolve() == file.resolve():
        raise InputError(f"{out}: a folder or the imported file itself; give another file to write")
    weights = _read_weights(file)
    has_gates = residual == "glu" if residual else any(key.startswith("glu") for key in weights)
    known = released_names("coarse", "fine", has_gates).values()
    if misfit := Misfit.of({key: weights.get(key, torch.empty(0)) for key in known}, weights):
        raise InputError(
            f"{file}: not a DAS-MIL model of mil4wsi with two scales ({misfit}); give such a model"
        )
    widths = _widths(file, weights)
    if residual is None:
        residual = "glu" if has_gates else _guess_residual(file, widths)
    if residual != "none" and not _are_equal(widths):
        raise InputError(
            f"{file}: a model with the widths {_describe(widths)} has no residuals; give "
            "--residual none"
        )
    if scales is None:
        scales = ("x10", "x20") if residual == "none" else ("x5", "x20")
        print(f"{file}: taken for a model of {' and '.join(scales)}; --scales changes that")
    name = "mil4wsi.yaml" if residual == "none" else "mil4wsi_lung.yaml"
    preset = yaml.safe_load((configs_folder() / "preset" / name).read_text())
    _refuse_other_classes(file, widths, classes)
    bag_format = _bag_format(file, widths, parse_scales(scales), extractors, tile_px)
    val_part = preset["data"]["init_args"]["split"]["val_part"]

    with torch.device("meta"):  # only shapes are needed
        model = DASMIL(**typed_options(DASMIL, _options(preset, widths, residual)))
        model.bind(ModelCard(tuple(classes), bag_format, val_part=val_part))
    coarse, fine = model.scales
    names = released_names(coarse, fine, has_gates)
    wanted = {names[k.removeprefix("network.")]: w for k, w in model.state_dict().items()}
    if misfit := Misfit.of(wanted, weights):
        raise InputError(f"{file}: its weights do not fit each other ({misfit}); is it damaged?")
    state = {f"network.{own}": weights[released] for own, released in names.items()}
    model.load_state_dict(state, assign=True)
    content = {
        "state_dict": state,
        **model.description(),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
    }
    with atomic_path(out) as temporary:
        torch.save(content, temporary)
    print(
        f"import: {out}: {sum(tensor.numel() for tensor in state.values()):,} parameters, scales "
        f"{' and '.join(model.scales)}, residual {residual}, widths {_describe(widths)}"
    )
    return 0


def released_names(coarse: str, fine: str, has_gates: bool) -> dict[str, str]:
    """Our name of each weight (:class:`dasmil.methods.dasmil.DASMILNetwork`) and mil4wsi's."""
    coarse, fine = module_key(coarse), module_key(fine)
    gats = (f"pgnn.scale_gats.{coarse}", f"pgnn.scale_gats.{fine}", "pgnn.union_gat")
    names: dict[str, str] = {}
    for own, gat, gate in zip(gats, GATS, GATES, strict=True):
        names |= {f"{own}.conv.{key}": f"{gat}.layers.0.{key}" for key in CONV_KEYS}
        if has_gates:
            names |= {f"{own}.gate.mlp.{key}": f"{gate}.mlp.mlp.{key}" for key in GATE_KEYS}
    for scale, head in ((coarse, "mil2"), (fine, "mil3")):
        for own, released in HEAD_KEYS.items():
            for kind in ("weight", "bias"):
                names[f"heads.{scale}.{own}.{kind}"] = f"{head}.{released}.{kind}"
    return names


def _read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict with the names of today's torch_geometric, without unused weights."""
    content = load_restricted(file, kind="state dict of mil4wsi")
    if not is_state_dict(content) or not all(w.is_floating_point() for w in content.values()):
        raise InputError(f"{file}: no state dict of mil4wsi; give names of weights → tensors")
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    if len(weights) < len(content):
        raise InputError(
            f"{file}: holds some weights twice, with and without the prefix module.; remove one set"
        )
    weights = {k: w.float() for k, w in weights.items() if not k.startswith("millast.")}
    refuse_no_numbers(weights, file)
    for gat in GATS:  # PyG up to 2.4 stores one weight under two names
        source, target = (f"{gat}.layers.0.{kind}.weight" for kind in ("lin_src", "lin_dst"))
        if source in weights and target in weights:
            if not torch.equal(weights[source], weights[target]):
                raise InputError(
                    f"{file}: {source} and {target} differ, but are one weight in mil4wsi; give a "
                    "model that mil4wsi trained"
                )
            weights[f"{gat}.layers.0.lin.weight"] = weights.pop(source)
            del weights[target]
    return weights


def _widths(file: Path, weights: Mapping[str, Tensor]) -> dict[str, int]:
    def size(key: str, axis: int, num_axes: int) -> int:
        shape = weights[key].shape
        if len(shape) != num_axes or 0 in shape:
            raise InputError(f"{file}: {key} has the shape {tuple(shape)}; is it damaged?")
        return shape[axis]

    return {
        "coarse_dim": size("gnn1.layers.0.lin.weight", 1, 2),
        "fine_dim": size("gnn2.layers.0.lin.weight", 1, 2),
        "hidden_dim": size("gnn1.layers.0.bias", 0, 1),
        "out_dim": size("GNNlast.layers.0.bias", 0, 1),
        "heads": size("gnn1.layers.0.att_src", 1, 3),
        "query_dim": size("mil3.b_classifier.q.0.weight", 0, 2),
        "num_logits": size("mil3.i_classifier.fc.0.weight", 0, 2),
    }


def _are_equal(widths: Mapping[str, int]) -> bool:
    return len({widths[name] for name in ("coarse_dim", "fine_dim", "hidden_dim", "out_dim")}) == 1


def _describe(widths: Mapping[str, int]) -> str:
    features = dict.fromkeys((widths["coarse_dim"], widths["fine_dim"]))
    return " → ".join(
        ["/".join(map(str, features)), str(widths["hidden_dim"]), str(widths["out_dim"])]
    )


def _guess_residual(file: Path, widths: Mapping[str, int]) -> Residual:
    if not _are_equal(widths):
        return "none"
    print(
        f"{file}: its widths are equal and it has no gates; taken for a model with plain "
        "residuals, since the weights do not tell: --residual none is the other possibility"
    )
    return "plain"


def _refuse_other_classes(file: Path, widths: Mapping[str, int], classes: Sequence[str]) -> None:
    num_classes = max(2, widths["num_logits"])
    if len(classes) != num_classes or len(set(classes)) != num_classes:
        raise InputError(
            f"--classes: names {', '.join(classes)}, but {file} has {num_classes} classes; name "
            "each of them once"
        )


def _options(
    preset: Mapping[str, Any], widths: Mapping[str, int], residual: Residual
) -> dict[str, Any]:
    """Options of the model: the preset's, with the widths of the weights."""
    options = preset["model"]["init_args"]
    of_weights = {name: widths[name] for name in ("hidden_dim", "out_dim", "heads", "query_dim")}
    network = {**options["network"], **of_weights, "residual": residual}
    return {**options, "network": network, "one_logit": widths["num_logits"] == 1}


def _bag_format(
    file: Path,
    widths: Mapping[str, int],
    scales: tuple[Scale, ...],
    sources: Mapping[str, str | ExtractorSource] | None,
    tile_px: int,
) -> dict[str, Any]:
    """The format of the bags that the model reads, see :func:`dasmil.bags.bag_format`."""
    if len(scales) != 2:
        raise InputError(f"--scales: names {len(scales)}, but {file} has two; name two scales")
    names = [scale.name for scale in scales]
    sources = sources or {}
    if sources and set(sources) != set(names):
        raise InputError(
            f"--extractors: given for {', '.join(sources)}, but the model reads "
            f"{', '.join(names)}; give one for each of them"
        )
    cards = {}
    for scale, dim in zip(scales, (widths["coarse_dim"], widths["fine_dim"]), strict=True):
        card = extractor_card(scale.name, dim)
        if sources:
            card = load_extractor(sources[scale.name], scale, tile_px).card
        if card.feature_dim != dim:
            raise InputError(
                f"{card.name}: its features are {card.feature_dim} wide, but {file} reads {dim} at "
                f"{scale.name}; give the extractor that the model was trained with"
            )
        cards[scale.name] = card
    return bag_format(TilePx(tile_px), scales, cards)
