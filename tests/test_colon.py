"""The colon benchmark: its converter reads tables and the official download alike."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmarks.colon.crchisto import TYPES, convert
from PIL import Image
from road import COLON
from scipy.io import savemat

from dasmil.cli import main
from dasmil.errors import InputError
from dasmil.slides.cohort import read_cohort
from dasmil.slides.reader import Slide

NUCLEI = {  # of pictures 1, 2 and 10
    1: {"fibroblast": [(3.5, 4.5)], "others": [(1, 1), (2, 2)]},
    2: {"epithelial": [(148.8, 181.5), (20.0, 499.75)], "inflammatory": [(7, 8)]},
    10: {"epithelial": [(0.25, 0.5)]},
}


def write_tables(folder: Path) -> Path:
    folder.mkdir()
    lines = ["image,type,x,y"]
    bags = ["image,label_epithelial_present,epithelial"]
    for number, nuclei in NUCLEI.items():
        Image.new("RGB", (500, 500)).save(folder / f"img{number:03d}.png")
        count = len(nuclei.get("epithelial", ()))
        bags.append(f"img{number:03d},{int(count > 0)},{count}")
        lines += [f"img{number:03d},{t},{x},{y}" for t, places in nuclei.items() for x, y in places]
    (folder / "bags.csv").write_text("\n".join(bags) + "\n")
    (folder / "nuclei.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_download(folder: Path) -> Path:
    for number, nuclei in NUCLEI.items():
        stem = folder / "Classification" / f"img{number}" / f"img{number}"
        stem.parent.mkdir(parents=True)
        Image.new("RGB", (500, 500), (200, 100, 150)).save(f"{stem}.bmp")
        for name in TYPES:
            savemat(f"{stem}_{name}.mat", {"detection": np.array(nuclei.get(name, []))})
        detection = folder / "Detection" / f"img{number}" / f"img{number}"
        detection.parent.mkdir(parents=True)
        Image.new("RGB", (500, 500)).save(f"{detection}.bmp")
        savemat(f"{detection}_detection.mat", {"detection": np.zeros((3, 2))})
    return folder


@pytest.mark.parametrize(
    ("write", "suffix"), [(write_tables, ".png"), (write_download, ".bmp")], ids=["tables", "mat"]
)
def test_labels_and_nuclei_are_those_of_the_pictures(tmp_path, write, suffix, capsys):
    folder, output = write(tmp_path / "in"), tmp_path / "out"
    convert(folder, output)
    assert "3 pictures, 2 of them with epithelial nuclei (3)" in capsys.readouterr().out
    rows = read_cohort(output / "cohort.csv")
    assert [(r.slide_id, r.label) for r in rows] == [
        ("img001", "none"),
        ("img002", "epithelial"),
        ("img010", "epithelial"),
    ]
    assert all(row.path.is_absolute() and row.path.suffix == suffix for row in rows)
    for row, number in zip(rows, NUCLEI, strict=True):
        with Slide(row) as slide:
            assert (slide.mpp, slide.size_px0) == (0.55, (500, 500))
        with open(output / "truth" / f"{row.slide_id}.csv", newline="") as file:
            points = [(float(p["x"]), float(p["y"])) for p in csv.DictReader(file)]
        assert points == NUCLEI[number].get("epithelial", [])


def test_a_picture_of_the_download_has_its_own_pixels(tmp_path):
    convert(write_download(tmp_path / "in"), tmp_path / "out")
    with Slide(read_cohort(tmp_path / "out" / "cohort.csv")[1]) as slide:
        pixels = slide.read((0, 0, 500, 500), (10, 10))
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[200, 100, 150]]


def replace(name: str, old: str, new: str):
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace("bags.csv", "img002,1", "img002,0"), "of img002 is '0', but nuclei.csv lists 2"),
        (replace("bags.csv", "img001,0", "img001,1"), "of img001 is '1', but nuclei.csv lists 0"),
        (replace("bags.csv", "img010,1,1\n", ""), "image 'img010' is not in bags.csv"),
        (replace("nuclei.csv", "img001,fibroblast", "img001,Fibro"), "line 2: type 'Fibro' is no"),
        (replace("nuclei.csv", "148.8", "left"), "x and y must be numbers"),
        (replace("nuclei.csv", "image,type", "name,type"), "nuclei.csv: column image is missing"),
        (lambda folder: (folder / "img010.png").unlink(), "img010.png: no such file"),
        (lambda folder: (folder / "nuclei.csv").unlink(), "nuclei.csv: no such table"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(tmp_path, damage, message):
    folder = write_tables(tmp_path / "in")
    damage(folder)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil_mat(content: bytes):
    def edit(folder: Path) -> None:
        (folder / "Classification" / "img2" / "img2_epithelial.mat").write_bytes(content)

    return edit


def rename_variable(folder: Path) -> None:
    savemat(folder / "Classification" / "img2" / "img2_epithelial.mat", {"points": np.ones((1, 2))})


def add_column(folder: Path) -> None:
    path = folder / "Classification" / "img2" / "img2_epithelial.mat"
    savemat(path, {"detection": np.ones((2, 3))})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_mat(b""), "img2_epithelial.mat: not the nuclei of a picture"),
        (spoil_mat(b"no MATLAB file" * 100), "img2_epithelial.mat: not the nuclei of a picture"),
        (rename_variable, "KeyError: 'detection'"),
        (add_column, "img2_epithelial.mat: not the nuclei of a picture"),
        (
            lambda folder: (folder / "Classification" / "img1" / "img1_others.mat").unlink(),
            "img1_others.mat: no such file",
        ),
        (
            lambda folder: (folder / "Classification").rename(folder / "Other"),
            "neither bags.csv nor",
        ),
    ],
)
def test_a_download_that_is_not_whole_is_refused(tmp_path, damage, message):
    folder = write_download(tmp_path / "in")
    damage(folder)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_real_pictures(shared_data, tmp_path):
    convert(shared_data / "crchisto", tmp_path)
    rows = read_cohort(tmp_path / "cohort.csv")
    assert (len(rows), sum(row.label == "epithelial" for row in rows)) == (50, 28)
    num_points = sum(
        len(path.read_text().splitlines()) - 1 for path in (tmp_path / "truth").iterdir()
    )
    assert num_points == 3533


def test_the_script_converts_or_names_the_missing_file(tmp_path):
    script = [sys.executable, str(COLON / "crchisto.py")]
    output = tmp_path / "out"
    folder = write_tables(tmp_path / "in")
    subprocess.run([*script, str(folder), str(output)], check=True, capture_output=True)
    assert (output / "cohort.csv").is_file()
    command = [*script, str(tmp_path / "none"), str(output)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and "give the unpacked download" in failed.stderr


def test_the_former_verb_names_the_script(capsys):
    assert main(["import", "crchisto", "FOLDER", "OUTPUT"]) == 2
    assert "tests/benchmarks/colon/crchisto.py" in capsys.readouterr().err


def test_dino_and_dasmil_hold_out_the_same_slides():
    """Both draw the splits; what they draw them by must be the same."""

    def drawn_by(name):
        settings = yaml.safe_load((COLON / f"{name}.yaml").read_text())
        return settings["data"]["init_args"]["split"]

    assert drawn_by("dino") == drawn_by("dasmil")
