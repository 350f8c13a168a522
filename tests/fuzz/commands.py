"""Run commands over folders of mutated files, among which some are sound.

``python tests/fuzz/commands.py`` prints a Markdown table: 30 runs of 100 mutated files each, in
about half an hour on two cores. What counts is that a command ends by itself, without a traceback,
writes only into its output, sends no request, and makes of the sound files what it makes of them
alone.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from bag_factory import make_bag, write_bags  # noqa: E402
from models import save_untrained  # noqa: E402

from fuzz.kinds import KINDS  # noqa: E402

HANG_S = 900.0
SOUND = 3
HOOK = """
import atexit, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fuzz.watch import Watch
watch = Watch([Path(p) for p in {inside!r}])
watch.is_on = True
def tell():
    watch.is_on = False
    kinds = ("request", "wrote outside")
    lines = [line for line in watch.told if line.startswith(kinds)]
    if lines:
        Path({told!r}, str(os.getpid())).write_text("\\n".join(lines))
atexit.register(tell)
"""


@dataclass(frozen=True)
class Command:
    """A verb over a folder of files.

    Parameters
    ----------
    kinds: of files that it reads.
    prepare: puts a file by its name into the folder of inputs; called for every file.
    arguments: of the verb, from inputs and output.
    results: what it makes of the slide of this name, below the output.
    """

    kinds: tuple[str, ...]
    prepare: Callable[[Path, str, str, bytes], None]
    arguments: Callable[[Path, Path], list[str]]
    results: Callable[[str], tuple[str, ...]]


def _put_slide(inputs: Path, name: str, suffix: str, data: bytes) -> None:
    path = inputs / f"{name}{suffix}"
    if suffix == ".dcm":  # of one folder, files of the same slide would be taken for one
        path = inputs / name / path.name
        path.parent.mkdir()
    path.write_bytes(data)


def _put_features(inputs: Path, name: str, suffix: str, data: bytes) -> None:
    folder = inputs / "features_uni_v1"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.h5").write_bytes(data)


def _put_bag(inputs: Path, name: str, suffix: str, data: bytes) -> None:
    (inputs / "bags").mkdir(exist_ok=True)
    (inputs / "bags" / f"{name}.safetensors").write_bytes(_renamed(data, name))


def _put_truth(inputs: Path, name: str, suffix: str, data: bytes) -> None:
    (inputs / "truth").mkdir(exist_ok=True)
    (inputs / "truth" / f"{name}{suffix}").write_bytes(data)


def _put_table(inputs: Path, name: str, suffix: str, data: bytes) -> None:
    (inputs / "tiles" / "tiles").mkdir(parents=True, exist_ok=True)
    (inputs / "tiles" / "tiles" / f"{name}.safetensors").write_bytes(_renamed(data, name))


def _renamed(data: bytes, name: str) -> bytes:
    """A safetensors file of another slide; one that has no header any more stays as it is."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        entries = json.loads(header["__metadata__"]["dasmil"])
        entries["slide_id"] = name
        header["__metadata__"]["dasmil"] = json.dumps(entries)
    except (ValueError, KeyError, TypeError, RecursionError):
        return data
    text = json.dumps(header).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _tile(inputs: Path, output: Path) -> list[str]:
    options = ["--scales", "[x10,x20]", "--tile_px", "32", "--slide_timeout", "60"]
    rows = "".join(f"{p.stem},{p.name},0.5\n" for p in sorted(inputs.iterdir()))
    table = inputs.parent / f"{inputs.name}.csv"
    table.write_text("slide_id,path,mpp\n" + rows.replace(",s", f",{inputs.name}/s"))
    return ["tile", "--cohort", str(table), "--output", str(output), *options]


def _embed(inputs: Path, output: Path) -> list[str]:
    tiles = inputs / "tiles"
    slide = KINDS["tiff"].make(inputs)[1]
    names = sorted(p.stem for p in (tiles / "tiles").iterdir())
    (tiles / "cohort.csv").write_text(
        "slide_id,path,mpp\n" + "".join(f"{name},{slide},0.5\n" for name in names)
    )
    extractors = [w for s in ("x10", "x20") for w in (f"--extractors.{s}", "random:test_vit")]
    return ["embed", "--tiles", str(tiles), "--output", str(output), *extractors]


def _trident(inputs: Path, output: Path) -> list[str]:
    return ["import", "trident", str(output), "--features.x20", str(inputs / "features_uni_v1")]


def _on_bags(verb: str) -> Callable[[Path, Path], list[str]]:
    def arguments(inputs: Path, output: Path) -> list[str]:
        bags = inputs / "bags"
        names = sorted(p.stem for p in bags.iterdir() if p.suffix == ".safetensors")
        rows = "".join(f"{name},{name}.svs,tumour,test\n" for name in names)  # all may be marked
        (bags / "cohort.csv").write_text("slide_id,path,label,split\n" + rows)
        checkpoint = inputs / "model.ckpt"
        save_untrained(checkpoint, bag_format=make_bag().header.bag_format())
        words = [verb, "--ckpt_path", str(checkpoint), "--bags", str(bags), "--output", str(output)]
        return [*words, "--truth", str(inputs / "truth")] if verb == "test" else words

    return arguments


COMMANDS: Mapping[str, tuple[int, Command]] = {
    "tile": (
        8,
        Command(
            ("svs", "tiff", "png", "jpeg", "dicom"),
            _put_slide,
            _tile,
            lambda name: (f"tiles/{name}.safetensors", f"qc/{name}.png"),
        ),
    ),
    "embed": (
        5,
        Command(("tile table",), _put_table, _embed, lambda name: (f"{name}.safetensors",)),
    ),
    "import trident": (
        5,
        Command(("h5",), _put_features, _trident, lambda name: (f"{name}.safetensors",)),
    ),
    "predict": (6, Command(("bag",), _put_bag, _on_bags("predict"), lambda name: ())),
    "test --truth": (
        6,
        Command(
            ("geojson", "xml", "mask"),
            _put_truth,
            _on_bags("test"),
            lambda name: (f"instance_truth/{name}.csv",),
        ),
    ),
}


def run_command(
    name: str, command: Command, number: int, count: int, folder: Path, port: int
) -> list[str]:
    """What went wrong in one run over ``count`` mutated files and some sound ones."""
    rng = random.Random(f"{name} {number}")
    mixed, alone, seeds = folder / "mixed", folder / "alone", folder / "seeds"
    for place in (mixed, alone, seeds):
        place.mkdir(parents=True)
    sources = []
    for kind in command.kinds:
        made = seeds / kind.replace(" ", "_")
        made.mkdir()
        sources += [(kind, path) for path in KINDS[kind].make(made)]
    sound = [f"sound{n}" for n in range(SOUND)]
    for n, slide_id in enumerate(sound):
        _, path = sources[n % len(sources)]
        for place in (mixed, alone):
            command.prepare(place, slide_id, _suffix(path), path.read_bytes())
    slides = list(sound)
    for n in range(count):
        kind, path = rng.choice(sources)
        data = KINDS[kind].mutate(path.read_bytes(), rng)
        data = data.replace(b"{port}", str(port).encode())
        slides.append(f"s{n:03}")
        command.prepare(mixed, slides[-1], _suffix(path), data)
    if name == "test --truth":
        for place, ids in ((mixed, slides), (alone, sound)):
            write_bags(place / "bags", dict.fromkeys(ids, "tumour"))
    wrong = []
    inputs = folder / "inputs"  # both at the same place, since a bag remembers its files
    for place in (alone, mixed):
        place.rename(inputs)
        output, told = folder / f"out_{place.name}", folder / f"told_{place.name}"
        told.mkdir()
        hooks = folder / f"hook_{place.name}"
        hooks.mkdir()
        for path in inputs.rglob("*"):
            os.utime(path, (0, 0))
        arguments = command.arguments(inputs, output)
        inside = [str(output), str(folder / "tmp"), str(told), str(inputs)]
        (folder / "tmp").mkdir(exist_ok=True)
        hook = HOOK.format(tests=str(TESTS), inside=inside, told=str(told))
        (hooks / "sitecustomize.py").write_text(hook)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(hooks), str(TESTS.parent)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MPLCONFIGDIR": str(folder / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "tmp"),
            "TMPDIR": str(folder / "tmp"),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "dasmil", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=HANG_S,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            return [f"hang: {' '.join(arguments)}"]
        said = done.stdout + done.stderr
        if done.returncode not in (0, 1, 2):
            wrong.append(f"exit code {done.returncode}")
        if place is alone and done.returncode != 0:
            wrong.append(f"the sound files alone: {said[-2000:]}")
        if "Traceback (most recent call last)" in said:
            wrong.append(said[said.index("Traceback") :][:3000])
        wrong += [path.read_text() for path in told.iterdir()]
        if place is mixed and not _came_through(name, output, sound):
            wrong.append(f"the sound files did not come through: {said[-2000:]}")
        inputs.rename(place)
    for slide_id in sound:
        for result in command.results(slide_id):
            one, other = (folder / f"out_{place}" / result for place in ("alone", "mixed"))
            if not other.is_file() or one.read_bytes() != other.read_bytes():
                wrong.append(f"{result} is not what it is without the mutated files")
    return wrong


def _came_through(name: str, output: Path, sound: Sequence[str]) -> bool:
    """Whether the sound slides have their rows in the tables of the output."""
    names = ("predictions.csv", "status.csv", "test_slides.csv")
    tables = [path for table in names for path in output.rglob(table)]
    rows = [line for table in tables for line in table.read_text().splitlines()]
    return all(any(line.startswith(f"{slide_id},") for line in rows) for slide_id in sound)


def _suffix(path: Path) -> str:
    return path.name[path.name.index(".") :]


class _Counting(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="mutated files of each run")
    parser.add_argument("--runs", type=int, help="of each command at most")
    parser.add_argument("--command", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    server = HTTPServer(("127.0.0.1", 0), _Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("| command | runs | mutated files | wrong | requests | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    total = 0
    for name in arguments.command:
        runs, command = COMMANDS[name]
        runs = min(runs, arguments.runs or runs)
        start, num_wrong, before = time.monotonic(), 0, _Counting.requests
        for number in range(runs):
            folder = Path(tempfile.mkdtemp())
            wrong = run_command(name, command, number, arguments.count, folder, server.server_port)
            for text in wrong:
                print(f"{name} run {number}: {text}", file=sys.stderr, flush=True)
            num_wrong += bool(wrong)
            shutil.rmtree(folder)
        total += num_wrong + _Counting.requests - before
        seconds = f"{time.monotonic() - start:.0f}"
        cells = [name, runs, runs * arguments.count, num_wrong, _Counting.requests - before]
        print(f"| {' | '.join(map(str, [*cells, seconds]))} |", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
