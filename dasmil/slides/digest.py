"""Digests that recognise a slide file whatever its name and folder."""

import hashlib
import json
import re
from pathlib import Path

from dasmil.errors import InputError, explaining

SAMPLES = 24  # blocks that tell one slide from another: the first, the last and those between
SAMPLE_BYTES = 4096
ADVICE = "allow reading it, or copy it again"
SLIDE_PART = re.compile(r"[^.].*\.(dcm|dat)|slidedat\.ini", re.IGNORECASE)  # of DICOM, of MIRAX


def sample_digest(path: Path) -> str:
    """Digest of a slide's content, independent of its name and folder.

    It covers the sizes of the slide's files and :data:`SAMPLES` evenly spaced blocks of their
    concatenation in the order of their names. So every slide costs the same few reads.

    Parameters
    ----------
    path: a file, or a folder for the DICOM files in it. A MIRAX file (.mrxs) includes MIRAX's files
        in the folder of the same name.

    Returns
    -------
    64 hexadecimal digits.

    Raises
    ------
    InputError
        if the file does not exist, or cannot be read.
    """
    with explaining(f"{path}: cannot be read", ADVICE, OSError):
        parts = [(part, part.stat().st_size) for part in _parts_of(path)]
        total = sum(size for _, size in parts)
        digest = hashlib.sha256(json.dumps([size for _, size in parts]).encode())
        last = max(0, total - SAMPLE_BYTES)
        starts = sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)})
        begin = 0  # of a part among all
        for part, size in parts:
            inside = [s - begin for s in starts if begin <= s < begin + size]
            if inside:
                with open(part, "rb", buffering=0) as file:
                    for start in inside:
                        file.seek(start)
                        digest.update(file.read(SAMPLE_BYTES))
            begin += size
    return digest.hexdigest()


def file_state(path: Path) -> str:
    """Size and latest time of a slide's files; if unchanged, so is :func:`sample_digest`.

    Raises
    ------
    InputError
        if the file does not exist.
    """
    with explaining(f"{path}: cannot be read", ADVICE, OSError):
        stats = [part.stat() for part in _parts_of(path)]
    size, time_ns = (sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))
    return f"{size} bytes of {time_ns} ns"


def _parts_of(path: Path) -> list[Path]:
    """The files of a slide, sorted, without other files in its folder, such as notes."""
    if path.is_dir():
        return [p for p in sorted(path.iterdir()) if SLIDE_PART.fullmatch(p.name) and p.is_file()]
    if not path.exists():
        raise InputError(f"{path}: no such file")
    beside = path.with_suffix("")
    is_mirax = path.suffix.lower() == ".mrxs" and beside.is_dir()
    return [path, *(_parts_of(beside) if is_mirax else ())]
