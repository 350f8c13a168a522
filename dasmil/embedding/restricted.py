"""Read files of ``torch.save`` from untrusted sources without running code in them.

The names that a pickle asks for are checked before torch loads it. The size of the file bounds the
memory it takes: its members must not be compressed, and each tensor must be stored in it.
"""

import _compat_pickle
import gzip
import io
import pickletools
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dasmil.bags.bag import all_finite
from dasmil.errors import InputError, join_few
from dasmil.files import must_be_file

ZIP_MAGIC = b"PK\x03\x04"
GZIP_MAGIC = b"\x1f\x8b"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file that is not a zip
LEGACY_PICKLES = 5  # magic, version, byte order, content, names of the storages
MAX_UNPACKED_BYTES = 16 * 2**30
MAX_RATIO = 20  # of gzip: weights hardly shrink, zeros shrink a thousandfold
ALWAYS_UNPACKED_BYTES = 64 * 2**20
MAX_PICKLE_BYTES = 256 * 2**20  # of a checkpoint, without its tensors
MAX_SHARED = 4  # tensors may share memory, as tied weights do
BLOCK_BYTES = 2**20
TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
PLAIN = frozenset(
    {
        *(f"torch.{name}Storage" for name in TYPES),
        *(f"torch.{name}" for name in ("Size", "device", "float16", "bfloat16", "float32")),
        *(f"torch.{name}" for name in ("float64", "int64", "int32", "int16", "int8", "uint8")),
        *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch.bool"),
        *("torch._utils._rebuild_parameter", "collections.OrderedDict", "collections.Counter"),
        "builtins.set",
    }
)
UNUSED = frozenset(  # opcodes that ask for a name and that torch.save never writes
    ["STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"]
)


def load_restricted(
    path: Path, allowed: Sequence[Any] = (), kind: str = "torch file", copy: bool = True
) -> Any:
    """Load a file that ``torch.save`` wrote onto the CPU; gzip-compressed or not.

    Parameters
    ----------
    allowed: classes it may hold besides tensors and plain values; ``(replacement, "module.name")``
        loads our own class instead of the named one.
    kind: what the file should be, for messages.
    copy: whether tensors are copied into memory and checked against the size of the file; without,
        they are mapped, for files of which only a few small values are read.

    Raises
    ------
    InputError
        if it is not such a file, asks for other names, or needs more memory than disk.
    """
    must_be_file(path, f"give the file of a {kind}")
    try:
        with (
            open(path, "rb") as file,
            tempfile.NamedTemporaryFile() as unpacked,
            warnings.catch_warnings(action="ignore"),
        ):
            plain = _unpacked(file, unpacked)
            names = PLAIN | {_name_of(entry) for entry in allowed}
            for name in _names_asked_for(plain):
                if name not in names:
                    raise InputError(
                        f"{path}: is not loaded: it asks for {name!r}, which no {kind} needs and "
                        "which could run foreign code; give a file of tensors and plain values"
                    )
            is_zip = _is_zip(plain)  # its tensors are mapped, so a false size is an error
            source: Any = str(plain.name) if is_zip else plain
            with torch.serialization.safe_globals(list(allowed)):
                content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
            if not copy:
                return content
            return _Copies(MAX_SHARED * plain.seek(0, io.SEEK_END)).own(content)
    except InputError:
        raise
    except Exception as error:  # torch and gzip raise errors of many classes for other files
        raise InputError(
            f"{path}: damaged or cut short, or no {kind} at all ({_reason(error)})"
        ) from error


def load_checkpoint(path: Path, kind: str = "checkpoint") -> dict[str, Any]:
    """Load a dictionary that ``torch.save`` wrote; see :func:`load_restricted`.

    Raises
    ------
    InputError
        also if the file holds anything but named values.
    """
    content = load_restricted(path, kind=kind)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: holds no named values; give a {kind}")
    return content


def is_state_dict(value: Any) -> bool:
    """Whether the value is a mapping from names to tensors."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def refuse_no_numbers(weights: Mapping[str, Tensor], where: object) -> None:
    """Raise :class:`InputError` if weights are complex, NaN or infinite."""
    complex_ones = [key for key, weight in weights.items() if weight.is_complex()]
    if complex_ones:
        raise InputError(f"{where}: weights {join_few(complex_ones)} are complex; give real ones")
    broken = [k for k, w in weights.items() if w.is_floating_point() and not all_finite(w)]
    if broken:
        raise InputError(
            f"{where}: values are NaN or infinite in {join_few(broken)}; give weights that are "
            "numbers, such as those of an earlier epoch"
        )


def _unpacked(file: IO[bytes], unpacked: IO[bytes]) -> IO[bytes]:
    """``file`` itself, or ``unpacked`` with its content if it is gzip-compressed."""
    is_compressed = file.read(2) == GZIP_MAGIC
    packed_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not is_compressed:
        return file
    max_bytes = min(MAX_UNPACKED_BYTES, max(ALWAYS_UNPACKED_BYTES, MAX_RATIO * packed_bytes))
    with gzip.open(file) as content:
        while block := content.read(BLOCK_BYTES):
            unpacked.write(block)
            if unpacked.tell() > max_bytes:
                raise InputError(
                    f"{file.name}: {packed_bytes:,} bytes unpack to more than {max_bytes:,}, which "
                    "weights never do; unpack it by hand if you trust it"
                )
    unpacked.flush()
    unpacked.seek(0)
    return unpacked


def _names_asked_for(file: IO[bytes]) -> Iterator[str]:
    """Names of all classes and functions that a file asks for; none of them is imported."""
    if _is_zip(file):
        yield from _names_in(io.BytesIO(_pickle_in(file)))
        return
    magic = next((value for op, value, _ in pickletools.genops(file) if op.name == "LONG1"), None)
    if magic != LEGACY_MAGIC:
        raise ValueError("it does not begin like a file of torch.save")
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        yield from _names_in(file)


def _names_in(pickle: IO[bytes]) -> Iterator[str]:
    for op, value, _ in pickletools.genops(pickle):
        if op.name in UNUSED:
            yield op.name
        elif op.name == "GLOBAL":
            module, _, name = str(value).partition(" ")
            module, name = _compat_pickle.NAME_MAPPING.get(
                (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            )
            yield f"{module}.{name}"


def _pickle_in(file: IO[bytes]) -> bytes:
    """The one pickle of a zip file whose members are not compressed."""
    num_bytes = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) < len(names):
            raise ValueError("it is a zip file, but not of torch.save")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed, which torch.save never does")
        if sum(member.file_size for member in members) > num_bytes:
            raise ValueError("its members are larger than the file")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"it holds {pickles[0].file_size:,} bytes besides its tensors")
        return archive.read(pickles[0])


def _is_zip(file: IO[bytes]) -> bool:
    file.seek(0)
    magic = file.read(len(ZIP_MAGIC))
    file.seek(0)
    return magic == ZIP_MAGIC


class _Copies:
    """Copies the tensors of a file into memory, so that the file may change.

    Parameters
    ----------
    max_bytes: limit of the copies; a tensor may repeat a few bytes of a file without end.
    """

    def __init__(self, max_bytes: int):
        self._bytes_left = max_bytes
        self._done: dict[int, Any] = {}  # id of an object in the content → its replacement

    def own(self, value: Any) -> Any:
        """The content with copied tensors; dictionaries and lists are changed in place."""
        if id(value) in self._done:
            return self._done[id(value)]
        self._done[id(value)] = value
        if isinstance(value, Tensor):
            self._done[id(value)] = self._copy(value)
        elif isinstance(value, dict):
            for key in value:
                value[key] = self.own(value[key])
        elif isinstance(value, list):
            value[:] = map(self.own, value)
        elif type(value) is tuple:
            self._done[id(value)] = tuple(map(self.own, value))
        elif not isinstance(value, type) and hasattr(value, "__dict__"):
            self.own(vars(value))
        return self._done[id(value)]

    def _copy(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise ValueError("a tensor is not dense")
        self._bytes_left -= tensor.nbytes
        if self._bytes_left < 0:
            raise ValueError("its tensors are larger than the file")
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _name_of(entry: Any) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _reason(error: Exception) -> str:
    """The first sentence of another library's message, without its advice."""
    message = str(error).rsplit("WeightsUnpickler error: ", 1)[-1].strip()
    sentence = message.split("\n")[0].split(". ")[0][:200]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
