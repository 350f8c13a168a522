"""Mutations of files: of their bytes, of their text, and of the values that they hold."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

URL = "http://127.0.0.1:{port}/weights.pth"  # the port of a server that counts requests
MARKERS = (0xD9, 0xC4, 0xDB, 0xDA, 0xD0, 0xDD, 0xEE, 0xC0, 0xC2, 0x00, 0xFE)  # of JPEG
NUMBERS = (-1, 0, 0.4, 1e300, float("nan"), float("inf"), 2**31, 2**63, 10**9, 10**30, -0.5)
TEXTS = (
    *("", " ", "x" * 300, "a\0b", "/x/y", "../../x", "..", "=cmd()", "@x", "\x1b[31mred", "é" * 9),
    *("nan", "inf", "1e999", "-5", "0.4", "null", "x5", "/dev/zero", "hf-hub:a/b", "local-dir:/"),
    *("torch.nn.Module", "os.system", "builtins.eval", URL, "\ud800", "[" * 1000),
)
OTHERS: tuple[Any, ...] = (None, True, [], {}, [[[]]], {"a": {"b": 1}}, [1] * 1000, [None])


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, cut or copy some bytes, preferably at the start and the end."""
    changed = bytearray(data or b"\0")
    length = len(changed)

    def place() -> int:
        where = rng.random()
        if where < 0.2:
            return rng.randrange(min(length, 700))
        if where < 0.3:
            return length - 1 - rng.randrange(min(length, 1500))
        return rng.randrange(length)

    start = place()
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice([1, 1, 2, 5, 20])):
                changed[place()] = rng.randrange(256)
        case 1:
            for _ in range(rng.choice([1, 1, 3])):
                changed[place()] ^= 1 << rng.randrange(8)
        case 2:
            span = len(changed[start : start + rng.choice([4, 64, 512, 4096])])
            changed[start : start + span] = bytes(span)
        case 3:
            del changed[rng.randrange(length // 4, length) :]
        case 4:
            piece = changed[(other := place()) : other + rng.choice([16, 256, 2048])]
            changed[start : start + len(piece)] = piece
        case 5:
            changed[start : start + 2] = bytes([0xFF, rng.choice(MARKERS)])
        case _:
            changed[start:start] = rng.randbytes(rng.choice([1, 3, 8]))
    return bytes(changed)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Replace, double or remove a piece between two separators; now and then the bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    text = data.decode("utf-8", errors="surrogateescape")
    ends = [0, *(n for n, c in enumerate(text) if c in ',;:{}[]()<>"= \n\t/'), len(text)]
    number = rng.randrange(len(ends) - 1)
    before, piece, after = (
        text[: ends[number]],
        text[ends[number] : ends[number + 1]],
        text[ends[number + 1] :],
    )
    match rng.randrange(5):
        case 0:
            piece = piece[:1] + str(rng.choice(TEXTS))
        case 1:
            piece = piece[:1] + json.dumps(rng.choice(NUMBERS))
        case 2:
            piece = piece * rng.choice([2, 50])
        case 3:
            piece = ""
        case _:
            piece = piece[:1] + rng.choice("[{<") * rng.choice([1, 100_000])
    return (before + piece + after).encode("utf-8", errors="surrogatepass")


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Replace, remove or add something in nested lists and dictionaries."""
    value = copy.copy(value)
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(10):
            case 0:
                del value[key]
            case 1:
                value[rng.choice([*TEXTS, 5, None])] = value[key]
            case 2:
                value[rng.choice(TEXTS)] = value.pop(key)
            case _:
                value[key] = mutate_value(value[key], rng)
        return value
    if isinstance(value, list | tuple) and value and rng.random() < 0.8:
        items = list(value)
        number = rng.randrange(len(items))
        match rng.randrange(6):
            case 0:
                del items[number]
            case 1:
                items += items
            case _:
                items[number] = mutate_value(items[number], rng)
        return type(value)(items)
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        return json.dumps(mutate_value(json.loads(value), rng))  # JSON inside of JSON
    return rng.choice([*NUMBERS, *TEXTS, *OTHERS])


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON text, or the text."""
    if rng.random() < 0.4:
        return mutate_text(data, rng)
    return json.dumps(mutate_value(json.loads(data), rng)).encode(errors="surrogatepass")


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A value in the header of a safetensors file, what dasmil wrote into it, or the bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.8:
        header["__metadata__"]["dasmil"] = json.dumps(
            mutate_value(json.loads(header["__metadata__"]["dasmil"]), rng)
        )
    else:
        header = mutate_value(header, rng)
    text = json.dumps(header).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
