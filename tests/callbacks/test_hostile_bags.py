"""`predict` and `test` on a folder in which strangers have put bags."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from bag_factory import CLASSES, make_bag, write_bags
from damage import HOSTILE
from models import save_untrained
from safetensors.torch import load_file, save_file

from dasmil.bags import bag_path, read_bag, write_bag
from dasmil.callbacks.predictions import PredictionWriter
from dasmil.cli import main
from dasmil.tables import append_csv, read_csv

SPLIT = {
    f"{letter}{number}": part
    for number, part in enumerate(("train", "train", "val", "test"))
    for letter in "nt"
}
QUIET = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]


def entries_of(content: bytes) -> tuple[dict[str, Any], dict[str, str], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    head = json.loads(content[8 : 8 + length])
    return head, json.loads(head["__metadata__"]["dasmil"]), content[8 + length :]


def with_entries(content: bytes, **changes: str) -> bytes:
    head, entries, body = entries_of(content)
    head["__metadata__"]["dasmil"] = json.dumps({**entries, **changes})
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_scale(content: bytes, name: str) -> bytes:
    """A sound bag, but that its finest scale has another name."""
    head, entries, body = entries_of(content)
    for key in ("scales", "extractors"):
        entries[key] = entries[key].replace('"x20"', json.dumps(name))
    head = {key.replace("/x20", f"/{name}"): value for key, value in head.items()}
    head["__metadata__"] = {"dasmil": json.dumps(entries)}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def hostile_bags(content: bytes) -> dict[str, bytes]:
    """Contents by slide, each wrong in another way."""
    found = {
        "nothing": b"",
        "cut": content[:-1],
        "text": b"slide_id,path\n" * 100,
        "long header": struct.pack("<Q", 2**40) + content[8:],
        "scale absolute": with_scale(content, "/x/y"),
        "scale up": with_scale(content, "/../../x"),
        "id up": with_entries(content, slide_id="../../id"),
        "id of another": with_entries(content, slide_id="n0"),
    }
    for number, text in enumerate(HOSTILE):
        found[f"header {number}"] = struct.pack("<Q", len(text)) + text.encode()
        for entry in ("slide_mpp", "tile_px", "size_px0", "extractors"):
            # what size 0 and an mpp of -1 mean is refused, and so is all that is no number
            if not (entry == "slide_mpp" and text.strip('"') in ("0.4",)):
                found[f"{entry} {number}"] = with_entries(content, **{entry: text.strip('"')})
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and bags that it accepts."""
    root = tmp_path_factory.mktemp("hostile")
    bags = write_bags(root / "bags", {s: CLASSES[s[0] == "t"] for s in SPLIT}, SPLIT)
    save_untrained(
        root / "model.ckpt", bag_format=read_bag(bag_path(bags, "n0")).header.bag_format()
    )
    return root / "model.ckpt", bags


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.timeout(200)
def test_each_hostile_bag_costs_one_row(
    model: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, sound = model
    content = bag_path(sound, "n1").read_bytes()
    hostile = hostile_bags(content)
    names = [*hostile, "nan", "fifo", "folder", "circle"]
    folder = write_bags(
        tmp_path / "in" / "bags", dict.fromkeys(["n0", *names, "t0"]), missing=names
    )
    odd = ["=1+1", "@x", "../up", "a/b", "x" * 300, "a\x1b[2J"]
    with open(folder / "cohort.csv", "a") as table:
        table.writelines(f"{name},a.svs,,,\n" for name in odd)
    for name, data in hostile.items():
        bag_path(folder, name).write_bytes(data)
    tensors = load_file(bag_path(sound, "n1"))
    tensors["features/x20"][3, 2] = float("nan")
    head, _, _ = entries_of(content)
    save_file(tensors, bag_path(folder, "nan"), head["__metadata__"])
    os.mkfifo(bag_path(folder, "fifo"))
    bag_path(folder, "folder").mkdir()
    bag_path(folder, "circle").symlink_to("circle.safetensors")
    (tmp_path / "x").mkdir()
    before = everything(tmp_path)
    out = tmp_path / "deep" / "out"
    command = ["--ckpt_path", str(checkpoint), "--bags", str(folder), *QUIET, "--output", str(out)]

    assert main(["predict", *command]) == 1
    text = capfd.readouterr()
    assert "Traceback" not in text.out + text.err and "\x1b" not in text.out + text.err
    rows = {row["slide_id"]: row for row in read_csv(out / "predictions.csv")[1]}
    assert set(rows) == {"n0", "t0", *names}
    done = [slide_id for slide_id, row in rows.items() if row["state"] == "done"]
    harmless = set(done) - {"n0", "t0"}
    assert not harmless, harmless
    for slide_id in names:
        row = rows[slide_id]
        assert row["message"] and not any(row[c] for c in row if c.startswith(("logit", "prob")))
        assert "Error" not in row["message"].split(":")[0]
    after = everything(tmp_path)
    assert {k: v for k, v in after.items() if not k.startswith("deep/out/")} == before
    inside = {Path(k).name for k in after if k.startswith("deep/out/")}
    assert {name.split(".")[0].split("_")[0] for name in inside} == {"n0", "t0", "predictions"}
    with capfd.disabled():
        print(f"\nbags in predict: {len(names) + len(odd)} tried, all refused, 0 wrong")

    assert main(["test", *command, "--output", str(tmp_path / "test")]) == 2
    assert "cannot be read as a bag" in capfd.readouterr().err


def test_a_table_of_an_earlier_run_stays_until_the_new_one_is_whole(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, bags = model
    command = ["predict", "--ckpt_path", str(checkpoint), "--bags", str(bags), *QUIET]
    command += ["--output", str(tmp_path / "out")]
    table = tmp_path / "out" / "predictions.csv"
    assert main(command) == 0
    whole = table.read_bytes()

    def fail(self: object, bag: Any, *_: object) -> None:
        if bag.slide_id == "n2":
            raise RuntimeError("the power fails")

    monkeypatch.setattr(PredictionWriter, "_write_overlays", fail)
    with pytest.raises(RuntimeError, match="the power fails"):
        main(command)
    assert table.with_name("predictions.before.csv").read_bytes() == whole
    columns, rows = read_csv(table)  # what was computed is there
    assert [row["slide_id"] for row in rows] == ["n0", "t0", "n1", "t1"]
    assert columns == read_csv(table.with_name("predictions.before.csv"))[0]
    assert all(row["state"] == "done" and row["prob/tumour"] for row in rows)

    monkeypatch.undo()
    assert main(command) == 0
    assert table.read_bytes() == whole
    assert not table.with_name("predictions.before.csv").exists()


def test_a_row_is_added_as_tables_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\r\n")
    append_csv(path, ["a", "b"], {"a": "=x, y"})
    assert path.read_bytes() == b'a,b\r\n"\'=x, y",\r\n'
    assert read_csv(path)[1] == [{"a": "=x, y", "b": ""}]


def test_one_odd_bag_does_not_decide_for_the_others(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is the first of the folder, and of another extractor."""
    checkpoint, _ = model
    folder = write_bags(tmp_path / "bags", {"a": None, "b": None, "c": None})
    write_bag(bag_path(folder, "a"), make_bag("a", num_tiles=8, fingerprint="0" * 64))
    command = ["predict", "--ckpt_path", str(checkpoint), "--bags", str(folder), *QUIET]
    assert main([*command, "--output", str(tmp_path / "out")]) == 1
    rows = read_csv(tmp_path / "out" / "predictions.csv")[1]
    assert [row["state"] for row in rows] == ["failed", "done", "done"]
    assert torch.tensor([float(row["prob/tumour"]) for row in rows[1:]]).isfinite().all()
