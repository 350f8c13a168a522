import warnings
from dataclasses import asdict, fields, replace

import pytest
import torch
from bag_factory import make_bag, make_graphs, trainer_of, write_bags
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from models import make_module

import dasmil
from dasmil.bags import bag_graph, bag_path, join_graphs, read_bag, write_bag
from dasmil.data import BagDataModule, SplitOptions
from dasmil.errors import InputError
from dasmil.lightning_arguments import evaluation_defaults
from dasmil.methods.dasmil import DASMIL, NetworkOptions, ObjectiveOptions
from dasmil.modules import ModelCard
from dasmil.modules.binding import refuse_other_data
from dasmil.modules.slide_results import SlideResult, mean_losses
from dasmil.slides.study import SlideRecord, plain_records

SMALL = {"hidden_dim": 8, "out_dim": 8, "query_dim": 4}


def bag_format(widths=(6, 6)):
    scales = {
        name: {"mpp": mpp, "extractor": {"feature_dim": width, "fingerprint": "f", "name": "n"}}
        for name, mpp, width in zip(("x10", "x20"), (1.0, 0.5), widths, strict=True)
    }
    return {"tile_px": 256, "scales": scales}


def small_module(classes=("normal", "tumour"), **options):
    torch.manual_seed(0)
    options = {**SMALL, "classes": list(classes), "bag_format": bag_format(), **options}
    return make_module(**options)


def quiet_trainer(folder, **options):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.mark.parametrize(
    ("classes", "one_logit", "num_logits", "logit_classes"),
    [
        (("a", "b"), True, 1, ("b",)),
        (("a", "b"), False, 2, ("a", "b")),
        (("a", "b", "c"), True, 3, ("a", "b", "c")),
    ],
)
def test_logits_follow_the_classes(classes, one_logit, num_logits, logit_classes):
    module = small_module(classes, one_logit=one_logit)
    assert module.num_logits == num_logits
    assert module.logit_classes == logit_classes
    graph = join_graphs(make_graphs([5, 7], [0, 1]))
    assert module(graph)["x20"].bag_logits.shape == (2, num_logits)
    total, _ = module.objective(module(graph), graph)
    assert torch.isfinite(total).all()


def test_each_slide_counts_once_however_often_it_comes(tmp_path):
    """What a padded sampler repeats must not weigh more."""
    module, trainer = small_module(), quiet_trainer(tmp_path)
    graphs = make_graphs([5, 7, 9, 6], [0, 1, 0, 1])

    def metrics(chosen):
        loader = torch.utils.data.DataLoader(chosen, batch_size=None)
        return trainer.validate(module, loader, verbose=False)

    assert metrics(graphs) == metrics([*graphs, graphs[1], graphs[1]])
    assert len(module.results) == 4


def separable_bags(folder):
    """The last tile of a tumour bag carries a mark in its features, at the fine scale only."""
    rows = ["slide_id,path,label,split"]
    for number in range(16):
        label, part = number % 2, "train" if number < 10 else "val" if number < 12 else "test"
        bag = make_bag(f"s{number}", seed=number, num_tiles=12)
        features = {name: values.clone() for name, values in bag.features.items()}
        if label:
            features["x20"][-1] = 5.0
        write_bag(bag_path(folder, bag.slide_id), replace(bag, features=features))
        rows.append(f"s{number},{bag.slide_id}.svs,{['normal', 'tumour'][label]},{part}")
    (folder / "cohort.csv").write_text("\n".join(rows))
    return folder


def test_training_in_plain_python_learns_and_its_checkpoint_loads(tmp_path):
    """No command line: module and data built by hand; the checkpoint holds plain values only."""
    seed_everything(0)  # the command line leaves its seed in the environment
    data = BagDataModule(separable_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    keeper = ModelCheckpoint(tmp_path / "kept", "best", monitor="val/auroc", mode="max")
    trainer = quiet_trainer(tmp_path, max_epochs=15, callbacks=[keeper])
    module = make_module(**SMALL, learning_rate=1e-2, node_dropout=0.0)
    trainer.fit(module, datamodule=data)
    figures = trainer.test(module, datamodule=data, verbose=False)[0]
    assert figures["test/x20/auroc"] == 1.0

    path = keeper.best_model_path
    torch.load(path, weights_only=True)  # refuses anything that would have to be unpickled
    model = dasmil.load(path)
    record = model.card.split[15]
    assert (record["slide_id"], record["split"], record["label"]) == ("s15", "test", "tumour")
    graph = bag_graph(read_bag(bag_path(tmp_path, "s15")))
    with torch.no_grad():
        first, second = model(graph), dasmil.load(path)(graph)
    assert torch.equal(first["x20"].bag_logits, second["x20"].bag_logits)


def test_every_term_is_logged_by_name(tmp_path):
    data = BagDataModule(separable_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(make_module(**SMALL), datamodule=data)
    terms = ["bag/x10", "bag/x20", "instance/x10", "instance/x20"]
    terms += ["distillation/x10", "criticality/x10", "loss"]
    figures = [f"{scale}{name}" for scale in ("", "x10/", "x20/") for name in ("auroc", "accuracy")]
    expected = {f"train/{t}" for t in terms} | {f"val/{t}" for t in [*terms, *figures]}
    assert expected <= set(trainer.callback_metrics)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    total = sum(logged[f"train/{t}"] for t in terms[1:-1])  # λ = 1 leaves bag/x10 out
    assert logged["train/loss"] == pytest.approx(total, rel=1e-5)


def test_classes_in_another_order_are_refused(tmp_path):
    data = BagDataModule(separable_bags(tmp_path), ["tumour", "normal"], num_workers=0)
    data.setup("test")
    with pytest.raises(InputError, match="trained with normal, tumour in that order"):
        refuse_other_data(ModelCard(("normal", "tumour"), data.bag_format), data)


def test_the_schedule_asks_for_epochs(tmp_path):
    data = BagDataModule(separable_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_steps=2, enable_checkpointing=False)
    with pytest.raises(InputError, match="max_epochs"):
        trainer.fit(make_module(**SMALL), datamodule=data)


def test_a_checkpoint_without_a_model_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="holds no model of bags"):
        dasmil.load(tmp_path / "other.ckpt")


def test_a_resumed_run_must_have_the_same_parts(tmp_path):
    data = BagDataModule(separable_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[keeper])
    trainer.fit(make_module(**SMALL), datamodule=data)
    table = tmp_path / "cohort.csv"
    table.write_text(
        table.read_text().replace("s15,s15.svs,tumour,test", "s15,s15.svs,tumour,train")
    )
    again = BagDataModule(tmp_path, ["normal", "tumour"], num_workers=0)
    with pytest.raises(InputError, match="not the one that the checkpoint was trained with"):
        quiet_trainer(tmp_path, max_epochs=2).fit(
            make_module(**SMALL), datamodule=again, ckpt_path=keeper.last_model_path
        )


def test_weights_that_are_trained_further_remember_the_slides_of_before(tmp_path):
    folder = separable_bags(tmp_path)
    data = BagDataModule(folder, ["normal", "tumour"], num_workers=0)
    data.setup("fit")
    before = plain_records([SlideRecord("s12", split="train"), SlideRecord("old", "p", "val", "1")])
    fitted = make_module(**SMALL, split=before, bag_format=data.bag_format)
    options = {"max_epochs": 1, "enable_checkpointing": False}
    with pytest.raises(InputError, match=r"1 slide\(s\) of the part 'test' .*s12 \(trained on\)"):
        quiet_trainer(tmp_path, **options).fit(fitted, datamodule=data)
    further = make_module(**SMALL, split=before[1:], bag_format=data.bag_format)
    quiet_trainer(tmp_path, **options).fit(further, datamodule=data)
    assert further.card.split == [*data.study(), before[1]]
    unknown = make_module(**SMALL, bag_format=data.bag_format)
    with pytest.warns(UserWarning, match="not known which slides these weights"):
        quiet_trainer(tmp_path, **options).fit(unknown, datamodule=data)
    assert unknown.card.split == ()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_close(tmp_path, precision):
    """Also the precisions for which Lightning converts the batch itself."""
    graph = make_graphs([20], [1])[0]
    module = small_module().eval()
    expected = module(graph)["x20"].bag_logits.detach()
    trainer = quiet_trainer(tmp_path, precision=precision, max_epochs=1)
    loader = torch.utils.data.DataLoader([graph], batch_size=None)
    found = trainer.predict(module, loader)[0]["x20"].bag_logits.float()
    assert torch.allclose(found, expected, atol=0.02)


def test_the_split_of_a_checkpoint_wins_over_a_new_draw(tmp_path):
    """The table gives train and test, val was drawn with a seed that evaluation does not know."""
    folder = separable_bags(tmp_path)
    table = folder / "cohort.csv"
    table.write_text(table.read_text().replace(",val", ",train"))
    drawn = BagDataModule(folder, ["normal", "tumour"], split=SplitOptions(0.4, seed=7))
    drawn.setup("fit")
    later = BagDataModule(folder, ["normal", "tumour"])
    later.trainer = trainer_of(drawn.study())
    later.setup("validate")
    assert later.splits == drawn.splits
    new = BagDataModule(folder, ["normal", "tumour"])
    new.setup("fit")
    assert new.splits != drawn.splits


# Switches, and models of some scales

OTHER_OPTIONS = {
    "distillation": 0.3,
    "criticality": 0.4,
    "instance": 0.6,
    "temperature": 2.5,
    "discounted": "fine",
    "distillation_pairs": "finest",
    "kl_direction": "student_teacher",
    "squared_temperature": False,
    "class_distribution": "per_class",
    "epsilon": True,
    "criticality_scores": "attention",
    "children_pooling": "max",
    "criticality_reduction": "sum",
    "detach_teacher": False,
}
OTHER_NETWORK = {
    "hidden_dim": 6,
    "out_dim": 6,
    "heads": 2,
    "attention_dropout": 0.1,
    "node_dropout": 0.3,
    "residual": "glu",
    "query_dim": 5,
    "bag_classifier_init": "torch",
    "contextualize": False,
    "concatenate_parents": True,
    "coarse_instances": "parents",
    "pooling": "max",
}


def test_every_option_reaches_the_method():
    """Each alone, and none takes the place of another."""
    for group, options in (("network", OTHER_NETWORK), ("objective", OTHER_OPTIONS)):
        kind = {"network": NetworkOptions, "objective": ObjectiveOptions}[group]
        assert set(options) == {field.name for field in fields(kind)}
        for name, value in options.items():
            made = make_module(**{name: value}).options
            assert made[group] == {**asdict(kind()), name: value} != asdict(kind())


def pyramid_bags(folder, scales=("x5", "x10", "x20")):
    """Bags of three scales; each part holds both labels."""
    parts = ("train", "train", "train", "train", "val", "val", "test", "test")
    labels = {f"s{n}": ["normal", "tumour"][n % 2] for n in range(8)}
    split = {f"s{n}": part for n, part in enumerate(parts)}
    return write_bags(folder, labels, split, scales=scales)


def fit_once(folder, scales=None, val_part="val", **options):
    """A model after one epoch, its data, and the path of its checkpoint."""
    split = SplitOptions(val_part=val_part)
    data = BagDataModule(
        folder, ["normal", "tumour"], scales, num_workers=0, batch_size=2, split=split
    )
    keeper = ModelCheckpoint(folder / "kept", save_last=True)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[keeper])
    module = make_module(**{**SMALL, **options})
    trainer.fit(module, datamodule=data)
    return module, data, keeper.last_model_path


def test_a_checkpoint_remembers_every_switch(tmp_path):
    network = {**OTHER_NETWORK, "contextualize": True}
    module, data, path = fit_once(pyramid_bags(tmp_path), **network, **OTHER_OPTIONS)
    again = dasmil.load(path)
    options = again.options["network"] | again.options["objective"]
    for name, value in (network | OTHER_OPTIONS).items():
        assert options[name] == value
    assert again.options == module.options
    batch = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        ours, theirs = module.eval()(batch), again(batch)
    for scale in ours:
        assert torch.equal(ours[scale].bag_logits, theirs[scale].bag_logits)
        assert torch.equal(ours[scale].shown, theirs[scale].shown)


@pytest.mark.parametrize(
    ("scales", "options"),
    [
        (["x20"], {"contextualize": False, "concatenate_parents": True}),
        (["x10", "x20"], {}),
        (["x5", "x20"], {"contextualize": False, "concatenate_parents": True}),
        (None, {}),
    ],
)
def test_a_model_of_any_scales_is_trained_and_tested(tmp_path, scales, options):
    module, data, path = fit_once(
        pyramid_bags(tmp_path), scales, standardize=True, coarse_instances="parents", **options
    )
    expected = tuple(scales or ("x5", "x10", "x20"))
    assert module.scales == expected == tuple(dasmil.load(path).scales)
    figures = quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    assert {f"test/{scale}/auroc" for scale in expected} <= set(figures)
    taught = {name.split("/")[2] for name in figures if name.startswith("test/distillation/")}
    assert taught == set(expected[:-1])
    assert torch.isfinite(torch.tensor(figures["test/loss"]))


def test_other_scales_than_the_models_are_refused(tmp_path):
    module, _, _ = fit_once(pyramid_bags(tmp_path), ["x10", "x20"])
    for scales, words in ((["x5", "x20"], "x5, x20"), (None, "x5, x10, x20"), (["x20"], "x20")):
        data = BagDataModule(tmp_path, ["normal", "tumour"], scales, num_workers=0)
        data.setup("test")
        with pytest.raises(InputError, match=rf"the bags hold scales {words} instead of x10, x20"):
            refuse_other_data(module.card, data)


@pytest.mark.filterwarnings("ignore:.*validation slides are the test")
@pytest.mark.parametrize("val_part", ["val", "test"])
def test_a_checkpoint_knows_on_which_part_it_was_chosen_and_which_scales_it_reads(
    tmp_path, val_part
):
    _, _, path = fit_once(pyramid_bags(tmp_path), ["x5", "x20"], val_part)
    arguments = evaluation_defaults(["--ckpt_path", path])[0]["data"]["init_args"]
    assert arguments["split"] == {"val_part": val_part}
    assert arguments["scales"] == ["x5", "x20"]
    arguments["split"] = SplitOptions(**arguments["split"])
    data = BagDataModule(tmp_path, num_workers=0, **arguments)
    data.setup("validate")
    seen = [slide_id for graph in data.val_dataloader() for slide_id in graph.slide_ids]
    assert seen == (["s4", "s5"] if val_part == "val" else ["s6", "s7"])


def test_predictions_of_a_checkpoint_of_before_the_switches_have_their_defaults(tmp_path):
    """Versions before 0.2 kept options and card side by side, and the first of them knew few."""
    module, _, path = fit_once(pyramid_bags(tmp_path))
    content = torch.load(path, weights_only=True)
    card = {k: v for k, v in content.pop("card").items() if k in ("classes", "bag_format")}
    del content["method"]
    content["hyper_parameters"] = {**SMALL, **card, "gat_backend": "gather", "temperature": 1.5}
    torch.save(content, tmp_path / "old.ckpt")
    again = dasmil.load(tmp_path / "old.ckpt")
    assert again.objective_options == ObjectiveOptions()
    assert again.network_options == module.network_options and again.card.split == []
    arguments, _ = evaluation_defaults(["--ckpt_path", str(tmp_path / "old.ckpt")])
    assert arguments["data"]["init_args"]["split"]["val_part"] == "val"


def test_a_training_of_a_version_with_other_options_does_not_resume(tmp_path):
    """Its settings would be compared with none, and the training go on with others."""
    _, data, path = fit_once(pyramid_bags(tmp_path))
    content = torch.load(path, weights_only=True)
    content["settings"]["model.temperature"] = 2.0
    torch.save(content, path)
    with pytest.raises(InputError, match=r"another version began .* \(model.temperature\)"):
        quiet_trainer(tmp_path, max_epochs=1).fit(
            make_module(**SMALL), datamodule=data, ckpt_path=path
        )


def uneven_bags(folder):
    """Three normal and one tumour slide to train on."""
    parts = dict.fromkeys(("n0", "n1", "n2", "t0"), "train") | {"n3": "val", "t3": "val"}
    labels = {name: "tumour" if name[0] == "t" else "normal" for name in parts}
    return write_bags(folder, labels, parts)


def test_balanced_weights_are_those_of_the_training_slides_and_weigh_the_label_losses(tmp_path):
    """4 / (2 · 3) for each normal slide, 4 / (2 · 1) for the tumour slide; the checkpoint knows."""
    data = BagDataModule(uneven_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    keeper = ModelCheckpoint(tmp_path / "kept")
    module = make_module(**SMALL, class_weights="balanced")
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[keeper]).fit(module, datamodule=data)
    assert module.card.class_weights == pytest.approx([2 / 3, 2])
    assert dasmil.load(keeper.best_model_path).card.class_weights == pytest.approx([2 / 3, 2])

    module.eval()
    for graph in data.val_dataloader():
        output = module(graph)
        total, terms = module.objective(output, graph)
        labels = terms["bag/x20"] + terms["instance/x10"] + terms["instance/x20"]  # λ is 1
        taught = terms["distillation/x10"] + terms["criticality/x10"]
        weight = [2 / 3, 2][int(graph.labels)]
        torch.testing.assert_close(total, weight * labels + taught)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "model: class_weights"),
        ([1.0, -1.0], "model: class_weights"),
        ([1.0, 2.0, 3.0], "model.class_weights: .* must be 2 weights of 0 or more"),
    ],
)
def test_class_weights_must_be_one_per_class_and_not_negative(tmp_path, weights, message):
    data = BagDataModule(uneven_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    module = make_module(**SMALL, class_weights=weights)
    with pytest.raises(InputError, match=message):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)


def test_an_evaluation_knows_the_patients_of_its_slides(tmp_path):
    labels = {f"s{n}": ["normal", "tumour"][n % 2] for n in range(4)}
    folder = write_bags(tmp_path, labels, dict.fromkeys(labels, "test"), {"s0": "p", "s2": "p"})
    data = BagDataModule(folder, ["normal", "tumour"], num_workers=0)
    data.setup("test")
    module = small_module(bag_format=data.bag_format)
    quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert module.evaluation.slide_ids == ("s0", "s1", "s2", "s3")
    assert module.evaluation.patients == ("p", "s1", "p", "s3")
    assert module.evaluation.labels.tolist() == [0, 1, 0, 1]


def test_a_scale_whose_bag_logits_are_constant_is_named(tmp_path):
    """As a large weight decay leaves it: the weights of the bag classifier have died."""

    class Dead(DASMIL):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.network.heads["x10"].bag_classifier.weight.data.mul_(1e-6)

    torch.manual_seed(0)
    data = BagDataModule(separable_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    trainer, module = quiet_trainer(tmp_path, max_epochs=1), make_module(Dead, **SMALL)
    with pytest.warns(UserWarning, match="^x10: the model of the last epoch gives bag logits"):
        trainer.fit(module, datamodule=data)
    with pytest.warns(UserWarning, match="^x10: this model gives .* over the 2 validation slides"):
        trainer.validate(module, datamodule=data, verbose=False)
    for head in module.network.heads.values():
        torch.nn.init.normal_(head.bag_classifier.weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(module, datamodule=data, verbose=False)
    assert not [w for w in caught if "bag logits" in str(w.message)]


def test_few_validation_slides_give_a_warning(tmp_path):
    data = BagDataModule(separable_bags(tmp_path), ["normal", "tumour"], num_workers=0)
    with pytest.warns(UserWarning, match="only 1 normal and 1 tumour slide.* choose the epoch"):
        quiet_trainer(tmp_path, max_epochs=1).fit(make_module(**SMALL), datamodule=data)


def test_a_loss_is_the_mean_over_the_slides():
    losses = [{"loss": 1.0, "bag/x20": 0.0}, {"loss": 2.0, "bag/x20": 5.0}]
    results = [SlideResult(f"s{n}", f"s{n}", n, {}, each) for n, each in enumerate(losses)]
    assert mean_losses(results) == {"loss": 1.5, "bag/x20": 2.5}
