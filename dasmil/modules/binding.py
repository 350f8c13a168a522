"""How a model is bound to bags: its card from their DataModule, and bags that do not fit it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dasmil.bags import describe_difference
from dasmil.data.bags import BagDataModule
from dasmil.data.seeds import training_seed
from dasmil.errors import InputError, join_few
from dasmil.json_text import flatten
from dasmil.losses import balanced_weights
from dasmil.modules.card import ModelCard
from dasmil.slides.study import Study, join_records, place_slides, plain_records, read_records

FEW_SLIDES = 10  # per class: with fewer, an AUROC of 0.8 has a standard error above 0.1
NOT_OF_NETWORK = ("optimizer", "evaluation", "objective", "class_weights")


def fitted_card(
    card: ModelCard,
    before: ModelCard | None,
    data: BagDataModule,
    class_weights: Sequence[float] | str | None,
) -> ModelCard:
    """The card of a model whose fit begins.

    Parameters
    ----------
    card: of the model, with its bag format.
    before: the card if the model was trained before; None if it is new.
    class_weights: the option of that name.
    """
    return replace(
        card,
        split=data.study() if before is None else _join_study(before, data),
        val_part=data.val_part,
        class_weights=_resolve_class_weights(class_weights, data.class_counts()),
        seed=training_seed(),
    )


def _join_study(card: ModelCard, data: BagDataModule) -> Any:
    """The slides that the weights will have met: those of the data, and those met before."""
    if not card.split:
        warnings.warn(
            "it is not known which slides these weights were trained on before, so the new "
            "checkpoint does not know its test slides either",
            stacklevel=2,
        )
        return ()
    met = read_records(card.split)
    study = Study(met, data.cohort, data.digests, data.other_cohort)
    for evaluated in (data.val_part, "test"):
        place_slides(
            data.cohort, study, evaluated, data.splits, data.splits, str(data.folder)
        )  # which refuses slides that were trained on
    return plain_records(join_records(read_records(data.study()), met))


def _resolve_class_weights(
    weights: Sequence[float] | str | None, counts: Mapping[str, int]
) -> tuple[float, ...] | None:
    if weights is None:
        return None
    if isinstance(weights, str):  # balanced
        return tuple(balanced_weights(list(counts.values())))
    if len(weights) != len(counts) or min(weights) < 0:
        raise InputError(
            f"model.class_weights: {weights} must be {len(counts)} weights of 0 or more, one "
            f"for each of {', '.join(counts)}"
        )
    return tuple(weights)


def refuse_other_data(card: ModelCard, data: BagDataModule) -> None:
    """Refuse bags of another format, or classes in another order, than those of a card."""
    difference = describe_difference(card.bag_format, data.bag_format)
    if difference:
        raise InputError(f"{data.folder}: the bags hold {difference}, which this model knows")
    if list(card.classes) != data.classes:
        raise InputError(
            f"data.classes: {', '.join(data.classes)}, but this model was trained with "
            f"{', '.join(card.classes)} in that order"
        )


def refuse_other_network(
    trained: Mapping[str, Any], options: Mapping[str, Any], where: object
) -> None:
    """Refuse a network other than the trained one, which a config beside a checkpoint may name.

    Parameters
    ----------
    trained: plain options of the checkpoint.
    options: those of the module by names such as ``network.out_dim``.
    where: the checkpoint, for messages.
    """
    before = flatten(trained)
    other = [
        f"model.{name} {now} instead of {before[name]}"
        for name, now in options.items()
        if name in before and now != before[name] and name.split(".")[0] not in NOT_OF_NETWORK
    ]
    if other:
        raise InputError(
            f"{where}: its network was trained with other options, here are "
            f"{join_few(other)}; leave them out, also as part of a --config"
        )


def warn_few_slides(data: BagDataModule) -> None:
    """Warn if so few slides choose the epoch that many epochs tie, or one is best by chance."""
    few = {name: n for name, n in data.class_counts(data.val_part).items() if n < FEW_SLIDES}
    if few:
        counts = " and ".join(f"{n} {name}" for name, n in few.items())
        warnings.warn(
            f"{data.folder}: only {counts} slide(s) choose the epoch of best.ckpt, fewer than "
            f"{FEW_SLIDES} of a class, so its metrics on them are unreliable; raise "
            "data.split.val_fraction, or choose settings over all of data.split.num_folds",
            stacklevel=2,
        )
