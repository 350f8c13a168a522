"""Files of ours with damage: bytes, places of the JSON header, and values of tensors."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dasmil.errors import InputError

# what a stranger may put where a header has a value; 100,000 brackets end a parser's recursion
HOSTILE = [
    *("null", "true", "-1", "0", "0.4", "1e999", "NaN", "-Infinity", "1" * 5000, "[1]", "{}", "[]"),
    *('""', '"/x/y"', '"/../../x"', '"\\u0000"', '"\\u001b[2J"', '"\\ud800"', '"=1+1"', '"x0"'),
    *('"NaN"', '"[1]"', '"-5"', '"1e308"', "[1e300, 2]", "[NaN, 1]", "[9999999999999, 1]"),
    '"' + "x" * 300 + '"',
    "[" * 100_000,
    '"' + "[" * 100_000 + '"',
    '"{\\"a\\": ' + "[" * 500 + "]" * 500 + '}"',
]


def refused_or_sound(path: Path, use: Callable[[Path], None], seed: int, number: int) -> int:
    """How many damaged copies of a file are refused; each other one must be of use.

    Parameters
    ----------
    path: the file, which is damaged in its place.
    use: does with it all that is done with such a file.
    number: of copies.
    """
    refused, wrong = 0, []
    for place, content in enumerate(mutations(path.read_bytes(), seed, number)):
        path.write_bytes(content)
        try:
            use(path)
        except InputError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                wrong.append(f"{place}: {str(error)[:300]}")
        except Exception as error:
            wrong.append(f"{place}: {type(error).__name__}: {str(error)[:300]}")
    print(f"{path.name}: {number} tried, {refused} refused, {len(wrong)} wrong")
    assert wrong == []
    return refused


def mutations(content: bytes, seed: int, number: int) -> Iterator[bytes]:
    """So many damaged copies of a safetensors file, the same for a seed."""
    rng = random.Random(seed)
    length = struct.unpack("<Q", content[:8])[0]
    head, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    kinds = (_bytes, _cut, _entry, _outer_entry, _values)
    for _ in range(number):
        yield rng.choice(kinds)(rng, content, head, body)


def _file(text: str, body: bytes) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def _bytes(rng: random.Random, content: bytes, head: Any, body: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def _cut(rng: random.Random, content: bytes, head: Any, body: bytes) -> bytes:
    place = rng.randrange(len(content))
    more = rng.randbytes(rng.randrange(1, 100))
    return rng.choice((content[:place], content + more, content[:place] + more + content[place:]))


def _entry(rng: random.Random, content: bytes, head: Any, body: bytes) -> bytes:
    """Another value, or none, in place of an entry of ours, as text or inside its own JSON."""
    entries = json.loads(head["__metadata__"]["dasmil"])
    name = rng.choice(sorted(entries))
    hostile = rng.choice(HOSTILE)
    how = rng.randrange(4)
    if how == 0:
        del entries[name]
    elif how == 1:
        entries[name] = hostile
    elif how == 2:
        entries[name] = hostile.strip('"')
    else:
        try:
            inner = json.loads(entries[name])
        except ValueError:
            inner = entries[name]
        entries[name] = _with(rng, inner, hostile)
    told = {**head, "__metadata__": {"dasmil": json.dumps(entries)}}
    return _file(json.dumps(told), body)


def _outer_entry(rng: random.Random, content: bytes, head: Any, body: bytes) -> bytes:
    """A hostile value somewhere in the header that safetensors reads, or in place of it."""
    hostile = rng.choice(HOSTILE)
    return _file(hostile if rng.randrange(5) == 0 else _with(rng, head, hostile), body)


def _with(rng: random.Random, value: Any, hostile: str) -> str:
    """The JSON of a value, with a hostile one, or another key, somewhere in it."""
    mark = "a place for it"
    copy = json.loads(json.dumps(value))
    parts = [copy]
    while (
        isinstance(parts[-1], dict | list) and parts[-1] and (len(parts) < 2 or rng.random() < 0.6)
    ):
        keys = list(parts[-1]) if isinstance(parts[-1], dict) else range(len(parts[-1]))
        last, key = parts[-1], rng.choice(list(keys))
        parts.append(last[key])
    if len(parts) == 1:
        return hostile
    if isinstance(last, dict) and rng.random() < 0.3:
        last[rng.choice(("/x/y", "../../x", "x5", "\x1b[2J", "", "x" * 300))] = last.pop(key)
    else:
        last[key] = mark
    return json.dumps(copy).replace(json.dumps(mark), hostile)


def _values(rng: random.Random, content: bytes, head: Any, body: bytes) -> bytes:
    """Other numbers in the tensors."""
    damaged = bytearray(body)
    for _ in range(rng.choice((1, 2, 8))):
        place = 4 * rng.randrange(len(damaged) // 4)
        value = rng.choice((-1, 0, 1, 2, 5, 2**31 - 1, -(2**31), rng.randrange(2**31)))
        damaged[place : place + 4] = struct.pack("<i", value)
    return _file(json.dumps(head), bytes(damaged))
