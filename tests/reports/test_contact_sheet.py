"""The contact sheet as a browser reads it; its script runs under node where that is installed."""

import base64
import csv
import errno
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from dasmil.cli import main
from dasmil.demo.slides import write_pyramid
from dasmil.errors import InputError
from dasmil.reports import contact_sheet as module
from dasmil.reports.contact_sheet import MAX_PICTURE_BYTES, contact_sheet
from dasmil.slides.qc import caption
from dasmil.work.status import Status

COLUMNS = ["slide_id", "state", "tiles/x10", "tiles/x20", "tissue_mm2", "mpp", "mpp_source"]
COLUMNS += ["seconds", "message"]
RED, GREEN, BLUE = (0, 0, 255), (0, 255, 0), (255, 0, 0)  # as OpenCV has them

DONE = {"state": "done", "mpp": "0.2527", "mpp_source": "slide", "seconds": "1.5"}
ROWS = [
    {"slide_id": "s10", **DONE, "tiles/x10": "120", "tiles/x20": "1400", "tissue_mm2": "31.25"},
    {"slide_id": "s9", **DONE, "tiles/x10": "7", "tiles/x20": "20", "tissue_mm2": "0.4"},
    {"slide_id": "bare", "state": "empty", "tiles/x10": "0", "tiles/x20": "0", "tissue_mm2": "0.0"},
    {"slide_id": "bad", "state": "failed", "message": "slides/bad.svs: is it a slide?"},
]


class Page(HTMLParser):
    """Cards of a page: attributes, texts and picture; and every tag with its attributes."""

    def __init__(self, path):
        super().__init__()
        self.cards, self.tags = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "article":
            self.cards.append({"slide_id": found["data-slide"], "text": [], **found})
        elif tag == "img" and "src" in found:
            self.cards[-1]["src"] = found["src"]
        elif tag == "button" and found.get("class") == "picture":
            self.cards[-1]["file"] = found["data-file"]

    def handle_endtag(self, tag):
        if tag == "main":
            self.handle_data = lambda data: None

    def handle_data(self, data):
        if self.cards and data.strip():
            self.cards[-1]["text"].append(data)

    @property
    def by_slide(self):
        return {card["slide_id"]: card for card in self.cards}


def write_status(folder, rows, columns=COLUMNS):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "status.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def write_qc(folder, slide_id, panels=(RED, GREEN, BLUE), size=(300, 400)):
    """A QC picture of panels of one colour each."""
    drawn = [caption(np.full((*size, 3), colour, np.uint8), "a caption") for colour in panels]
    (folder / "qc").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "qc" / f"{slide_id}.png"), np.concatenate(drawn, axis=1))


def decoded(card):
    kind, data = card["src"].split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture
def tiles(tmp_path):
    """Two done slides and an empty one with pictures, a failed one without."""
    folder = tmp_path / "TILES"
    write_status(folder, ROWS)
    for row in ROWS[:3]:
        write_qc(folder, row["slide_id"])
    return folder


def test_every_slide_occurs_once_with_its_sort_keys(tiles, capsys):
    assert contact_sheet(tiles) == 0
    page = Page(tiles / "contact_sheet.html")
    assert [card["slide_id"] for card in page.cards] == ["s10", "s9", "bare", "bad"]
    assert [card["data-state"] for card in page.cards] == ["done", "done", "empty", "failed"]
    assert [json.loads(card["data-numbers"]) for card in page.cards] == [
        {"tissue_mm2": 31.25, "tiles/x10": 120, "tiles/x20": 1400},
        {"tissue_mm2": 0.4, "tiles/x10": 7, "tiles/x20": 20},
        {"tissue_mm2": 0, "tiles/x10": 0, "tiles/x20": 0},
        {},
    ]
    keys = [found["value"] for tag, found in page.tags if tag == "option"]
    assert keys == ["table", "slide_id", "state", "tissue_mm2", "tiles/x10", "tiles/x20"]
    text = " ".join(page.by_slide["s10"]["text"])
    assert "31.2 mm²" in text and "1,400" in text and "0.2527 µm/px (slide)" in text
    failed = page.by_slide["bad"]
    assert failed["text"] == ["bad", "failed", "no picture", "slides/bad.svs: is it a slide?"]
    assert "src" not in failed
    printed = capsys.readouterr().out
    assert "4 slides (2 done, 1 empty, 1 failed), 1 of them without a picture" in printed


def test_a_card_shows_the_tissue_and_the_finest_tiles(tiles):
    """The first and the last panel side by side, without the text over them."""
    contact_sheet(tiles)
    picture = decoded(Page(tiles / "contact_sheet.html").by_slide["s10"]).astype(int)
    height, width, _ = picture.shape
    assert (width, height) == (640, round(640 * (300 + 4) / (2 * 408)))
    left, right = picture[10:-10, 10 : width // 2 - 10], picture[10:-10, width // 2 + 10 : -10]
    assert np.abs(left - RED).max() < 20 and np.abs(right - BLUE).max() < 20
    assert np.abs(picture[2, 100] - RED).max() < 60  # no caption


def test_a_small_picture_is_not_enlarged_and_a_tall_one_fits(tiles):
    write_qc(tiles, "s9", size=(50, 60))
    write_qc(tiles, "bare", size=(640, 100))
    contact_sheet(tiles)
    cards = Page(tiles / "contact_sheet.html").by_slide
    assert decoded(cards["s9"]).shape == (54, 2 * 68, 3)
    assert decoded(cards["bare"]).shape[:2] == (320, round(320 * 216 / 644))


def test_no_picture_takes_more_than_the_page_promises(tiles):
    """Noise is what JPEG compresses worst: of a lower quality first, then smaller."""
    noise = np.random.default_rng(0).integers(0, 256, (640, 1944, 3)).astype(np.uint8)
    cv2.imwrite(str(tiles / "qc" / "s9.png"), noise)
    contact_sheet(tiles)
    cards = Page(tiles / "contact_sheet.html").by_slide
    sizes = {s: len(base64.b64decode(cards[s]["src"].split(",")[1])) for s in ("s9", "s10")}
    assert MAX_PICTURE_BYTES / 4 < sizes["s9"] <= MAX_PICTURE_BYTES
    assert decoded(cards["s9"]).shape[0] < 320 and decoded(cards["s10"]).shape[1] == 640


@pytest.mark.parametrize("name", ["<b>&\"quoted'", "Kröte/µ 1%#?"])
def test_names_and_messages_are_text_and_nothing_else(tiles, name):
    message = "</p></article><script>alert(1)</script> \" onload='x' {{counts}} <!--cards-->"
    slide_id = name.replace("/", "_")
    rows = [{"slide_id": slide_id, **DONE, "message": message}, *ROWS]
    write_status(tiles, rows)
    write_qc(tiles, slide_id)
    contact_sheet(tiles)
    page = Page(tiles / "contact_sheet.html")
    card = page.cards[0]
    assert card["slide_id"] == card["text"][0] == slide_id and message in card["text"]
    assert len(page.cards) == 5 and [tag for tag, _ in page.tags].count("script") == 2
    assert not [found for _, found in page.tags if "onload" in found]


def test_a_page_is_self_contained(tiles):
    """No other file, and no address; the browser is told to forbid it, too."""
    contact_sheet(tiles)
    page = Page(tiles / "contact_sheet.html")
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base")]
    sources = [found["src"] for _, found in page.tags if "src" in found]
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg") for source in sources)
    assert not [found for _, found in page.tags if "href" in found]
    text = re.sub(r"base64,[^\"]*", "", (tiles / "contact_sheet.html").read_text())
    assert "://" not in text and "url(" not in text and "@import" not in text
    policies = [f["content"] for _, f in page.tags if f.get("http-equiv")]
    assert policies and policies[0].startswith("default-src 'none'")


def test_the_picture_files_are_found_from_the_page(tiles, tmp_path):
    write_status(tiles, [{"slide_id": "a #1", **DONE}])
    write_qc(tiles, "a #1")
    contact_sheet(tiles)
    assert Page(tiles / "contact_sheet.html").cards[0]["file"] == "qc/a%20%231.png"
    contact_sheet(tiles, tmp_path / "pages" / "sheet.html")
    found = Page(tmp_path / "pages" / "sheet.html").cards[0]["file"]
    assert found == "../TILES/qc/a%20%231.png"


def test_a_damaged_picture_is_no_picture(tiles, capsys):
    path = tiles / "qc" / "s9.png"
    path.write_bytes(path.read_bytes()[:40])
    contact_sheet(tiles)
    card = Page(tiles / "contact_sheet.html").by_slide["s9"]
    assert "src" not in card and "no picture" in card["text"]
    assert "2 of them without a picture" in capsys.readouterr().out


def test_the_state_of_the_bags(tiles, tmp_path):
    rows = [
        {"slide_id": "s10", "state": "done", "message": ""},
        {"slide_id": "s9", "state": "failed", "message": "the slide's disk is gone"},
        {"slide_id": "bad", "state": "not tiled", "message": ""},
    ]
    write_status(tmp_path / "BAGS", rows, ["slide_id", "state", "tiles/x10", "message"])
    contact_sheet(tiles, bags=tmp_path / "BAGS")
    page = Page(tiles / "contact_sheet.html")
    assert [card["data-embedded"] for card in page.cards] == ["done", "failed", "", "not tiled"]
    states = ["done", "failed: the slide's disk is gone", "not in the bags", "not tiled"]
    assert [card["text"][-1] for card in page.cards] == [f"embedded: {each}" for each in states]
    assert {"value": "embedded"} in [found for tag, found in page.tags if tag == "option"]


def test_folders_that_no_sheet_can_be_made_of(tiles, tmp_path):
    with pytest.raises(InputError, match="none: does not exist; give the folder that"):
        contact_sheet(tmp_path / "none")
    write_status(tmp_path / "old", ROWS, [c for c in COLUMNS if c != "tissue_mm2"])
    with pytest.raises(InputError, match=r"no column tissue_mm2, because an older version wrote"):
        contact_sheet(tmp_path / "old")
    write_status(tmp_path / "no_rows", [])
    with pytest.raises(InputError, match=r"it lists no slide; run `tile` on that folder"):
        contact_sheet(tmp_path / "no_rows")
    columns = ["slide_id", "state", "message"]
    write_status(tmp_path / "BAGS", [{"slide_id": s, "state": "done"} for s in "xyzw"], columns)
    with pytest.raises(InputError, match=r"the tiles have no slide w, x, y, z; give the bags of"):
        contact_sheet(tiles, bags=tmp_path / "BAGS")
    assert not (tiles / "contact_sheet.html").exists()


def test_a_page_that_fails_leaves_the_one_before(tiles, monkeypatch):
    contact_sheet(tiles)
    before, files = (tiles / "contact_sheet.html").read_bytes(), sorted(tiles.iterdir())
    cards = iter(["<article>"])
    monkeypatch.setattr(module, "_card", lambda *_: next(cards))
    with pytest.raises(StopIteration):
        contact_sheet(tiles)
    assert (tiles / "contact_sheet.html").read_bytes() == before
    assert sorted(tiles.iterdir()) == files


def test_slide_by_slide(tiles, monkeypatch):
    """A slide's picture is written before the next one is read."""
    written = []

    def picture(path, panels):
        (page,) = tiles.glob(".contact_sheet.*.tmp.html")
        written.append(page.stat().st_size)
        return np.random.default_rng(0).integers(0, 256, (320, 640, 3)).astype(np.uint8)

    monkeypatch.setattr(module, "_picture", picture)
    contact_sheet(tiles)
    assert len(written) == 4 and np.diff(written).min() > MAX_PICTURE_BYTES / 4


def test_the_more_slides_the_smaller_their_pictures(tiles, monkeypatch):
    """20,000 slides would make a page of 500 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (320, 640, 3)).astype(np.uint8)
    monkeypatch.setattr(module, "_picture", lambda *_: noise)
    monkeypatch.setattr(module, "MAX_PICTURES_BYTES", 4 * 3000)
    contact_sheet(tiles)
    page = (tiles / "contact_sheet.html").read_text(encoding="utf-8")
    pictures = [each.split('"')[0] for each in page.split("data:image/jpeg;base64,")[1:]]
    assert len(pictures) == 4 and all(1500 < len(each) <= 4000 for each in pictures)


def test_by_command_and_without_torch(tiles, tmp_path):
    program = (
        "import sys\nfrom dasmil.cli import main\n"
        "code = main(sys.argv[1:])\nprint('torch' in sys.modules)\nsys.exit(code)"
    )
    command = ["contact-sheet", str(tiles), "--output", str(tmp_path / "a.html")]
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
    assert len(Page(tmp_path / "a.html").cards) == 4
    assert main(["contact-sheet", str(tmp_path / "none")]) == 2


def test_the_table_is_renewed_if_possible(tmp_path, monkeypatch):
    """A worker that was killed has left a slide that is running."""
    write_pyramid(tmp_path / "s1.tiff", np.full((600, 600, 3), (205, 140, 175), np.uint8), 1.0)
    (tmp_path / "cohort.csv").write_text("slide_id,path\ns1,s1.tiff\n")
    folder = tmp_path / "TILES"
    tile = ["tile", "--cohort", str(tmp_path / "cohort.csv"), "--output", str(folder)]
    assert main([*tile, "--scales", "[x10]", "--workers", "1"]) == 0
    stale = (folder / "status.csv").read_text().replace("done", "running")

    def refuse(_):
        raise OSError(errno.EROFS, "Read-only file system")

    for write, state in ((Status.write, "done"), (refuse, "running")):
        (folder / "status.csv").write_text(stale)
        monkeypatch.setattr(Status, "write", write)
        assert contact_sheet(folder) == 0
        assert [c["data-state"] for c in Page(folder / "contact_sheet.html").cards] == [state]


def test_real_slides(shared_data, tmp_path):
    """By command from slide files: more tissue has more tiles, a bad file has its sentence."""
    slides = shared_data / "slides"
    names = ["PDAC-tru-cut_HE3", "erosion_HE", "insidious-lymph-node-metastasis_HE"]
    paths = [slides / "atlas_x5" / f"{name}.tif" for name in names]
    with open(tmp_path / "cohort.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "path", "mpp"])
        table.writerows([path.stem, path, 2.0] for path in [*paths, slides / "bad" / "broken.svs"])
    tile = ["tile", "--cohort", str(tmp_path / "cohort.csv"), "--output", str(tmp_path / "TILES")]
    assert main([*tile, "--scales", "[x2.5,x5]", "--workers", "1"]) == 1
    assert main(["contact-sheet", str(tmp_path / "TILES")]) == 0
    cards = Page(tmp_path / "TILES" / "contact_sheet.html").by_slide
    numbers = [json.loads(cards[name]["data-numbers"]) for name in names]
    for key in ("tissue_mm2", "tiles/x5"):  # thin cores lie in many of the coarse tiles
        values = [found[key] for found in numbers]
        assert values == sorted(values) and values[0] > 0
    for name in names:  # the right half is bluer where tiles lie
        picture = decoded(cards[name]).astype(int)
        left, right = np.array_split(picture, 2, axis=1)
        assert (right[..., 0] - right[..., 2]).mean() > (left[..., 0] - left[..., 2]).mean() + 5
    assert "OpenSlide does not know this format" in cards["broken"]["text"][-1]


def run_script(expression: str) -> object:
    """What an expression is with the page's functions for order and filter."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, which runs the page's script here")
    script = re.search(r'<script id="order">(.*?)</script>', module.TEMPLATE.read_text(), re.DOTALL)
    program = f"{script.group(1)}\nconsole.log(JSON.stringify({expression}))"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


SLIDES = [
    {"slide_id": "s10", "state": "done", "embedded": "failed", "numbers": {"tissue_mm2": 31.25}},
    {"slide_id": "s9", "state": "done", "embedded": "done", "numbers": {"tissue_mm2": 0.4}},
    {"slide_id": "S2", "state": "empty", "embedded": "empty", "numbers": {"tissue_mm2": 0}},
    {"slide_id": "bad", "state": "failed", "embedded": "not tiled", "numbers": {}},
    {"slide_id": "s1", "state": "running", "embedded": "", "numbers": {"tissue_mm2": 31.25}},
    {"slide_id": "bad2", "state": "failed", "embedded": "not tiled", "numbers": {}},
]


def test_order():
    """No value comes last either way; equals by name, with numbers as numbers."""
    wanted = {
        ("tissue_mm2", False): "S2 s9 s1 s10 bad bad2",
        ("tissue_mm2", True): "s1 s10 s9 S2 bad bad2",
        ("slide_id", False): "bad bad2 s1 S2 s9 s10",
        ("slide_id", True): "s10 s9 S2 s1 bad2 bad",
        ("state", False): "bad bad2 s1 S2 s9 s10",
        ("state", True): "s9 s10 S2 s1 bad bad2",
        ("embedded", False): "s10 bad bad2 S2 s9 s1",
        ("table", False): "s10 s9 S2 bad s1 bad2",
        ("table", True): "bad2 s1 bad S2 s9 s10",
    }
    slides = json.dumps([{**slide, "table": number} for number, slide in enumerate(SLIDES)])
    orders = f"{json.dumps(list(wanted))}.map(([key, down]) => inOrder({slides}, key, down))"
    found = run_script(f"{orders}.map(each => each.map(s => s.slide_id).join(' '))")
    assert dict(zip(wanted, found)) == wanted


def test_filter():
    """All words must be there, in any order and case."""
    slide = {"state": "failed", "text": "tumor_001 tumor_001.tif: bogus marker length"}
    wanted = {
        ("", ""): True,
        ("failed", ""): False,
        ("done", ""): True,
        ("", "Marker  tumor_001"): True,
        ("", "marker tumor_002"): False,
        ("failed", "marker"): False,
    }
    shown = f"isShown({json.dumps(slide)}, new Set([hidden]), text)"
    found = run_script(f"{json.dumps(list(wanted))}.map(([hidden, text]) => {shown})")
    assert dict(zip(wanted, found)) == wanted


def test_names_and_messages_are_searched_and_nothing_else(tiles, tmp_path):
    """As the page's script makes slides of the page's cards."""
    wanted = {"s1": ["s10"], "IS IT a slide?": ["bad"], "full": ["s9"]}  # full: of its bag
    others = ("tissue", "mm²", "(slide)", "x20", "1,400", "picture", "done", "embedded")
    wanted |= {text: [] for text in others}
    rows = [{"slide_id": "s9", "state": "failed", "message": "the disk is full"}]
    write_status(tmp_path / "BAGS", rows, ["slide_id", "state", "message"])
    contact_sheet(tiles, bags=tmp_path / "BAGS")
    cards = Page(tiles / "contact_sheet.html").cards
    data = [{k.removeprefix("data-"): v for k, v in card.items() if "data-" in k} for card in cards]
    chosen = f"{json.dumps(data)}.map(asSlide).filter((s) => isShown(s, new Set(), text))"
    found = run_script(f"{json.dumps(list(wanted))}.map(text => {chosen}.map(s => s.slide_id))")
    assert dict(zip(wanted, found)) == wanted
    assert (
        run_script(f"asSlide({json.dumps(data[0])}, 3)").items()
        >= {
            **{"slide_id": "s10", "state": "done", "embedded": "", "table": 3},
            "numbers": {"tissue_mm2": 31.25, "tiles/x10": 120, "tiles/x20": 1400},
        }.items()
    )
