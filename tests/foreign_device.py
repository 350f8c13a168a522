"""A device that only claims to be a GPU: what a training step asks of one, without one.

A :class:`ForeignTensor` says that it is on ``cuda:0`` and computes on the CPU. Inside
``with Watch() as watch`` every operation on such tensors is logged with the line of ``dasmil`` that
asked for it: those that make the host wait, copies from pageable memory, sums whose order a GPU
does not fix, and reductions that leave a whole bag to one thread. An operation that mixes devices
raises, as on a GPU.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
ONE_THREAD = 512  # more rows than this for one thread are too many

# the host waits for their result, whose size or value it must know
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# floating-point sums in the order in which threads happen to arrive
UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_"}

Module = TypeVar("Module", bound=nn.Module)


class ForeignTensor(torch.Tensor):
    """A tensor that says it is on :data:`DEVICE`; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "ForeignTensor":
        result: ForeignTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # autograd runs its nodes in this thread, as for the CPU
        )
        result.inner = inner
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ForeignTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Watch.active:
            Watch.active[-1].log(func, args, kwargs)
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        if inner_kwargs.get("device") is not None:  # of its own device, which is meta inside
            inner_kwargs["device"] = CPU
        result = tree_map(_foreign, func(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, ForeignTensor) else value


def _foreign(value: Any) -> Any:
    is_plain = isinstance(value, Tensor) and not isinstance(value, ForeignTensor)
    return ForeignTensor(value) if is_plain else value


class _Everything(TorchDispatchMode):
    """Also takes what torch makes like a foreign tensor, such as the scalar of a ``where``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        is_foreign = any(isinstance(value, ForeignTensor) for value in tree_iter((args, kwargs)))
        if is_foreign or (device is not None and torch.device(device).type == "meta"):
            return ForeignTensor.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@dataclass
class Watch(TorchFunctionMode):
    """Logs the operations on foreign tensors.

    Attributes
    ----------
    waits: operations for which the host waits, and the lines that ask for them.
    pageable: copies to the device from memory that is not pinned.
    unordered: sums in no fixed order.
    one_thread: reductions of many rows by one thread each.
    launches: number of each operation that starts a kernel.
    """

    waits: list[str] = field(default_factory=list)
    pageable: list[str] = field(default_factory=list)
    unordered: list[str] = field(default_factory=list)
    one_thread: list[str] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)

    active: ClassVar[list["Watch"]] = []  # the innermost last

    def __post_init__(self) -> None:
        super().__init__()
        self._everything = _Everything()

    def __enter__(self) -> "Watch":
        super().__enter__()
        self._everything.__enter__()
        Watch.active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        Watch.active.pop()
        self._everything.__exit__(*error)
        super().__exit__(*error)

    # Functions that name a device, or that read values

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:  # the package's own backward passes name devices
            with self:
                return _engine_run_backward(
                    *((args[0],), (torch.ones_like(args[0]),), False, False, ()),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[0], ForeignTensor):
            args[0].inner = args[1].inner  # torch knows the outer tensor alone
        if func in (Tensor.cpu, Tensor.cuda):
            return self._to(args[0], CPU if func is Tensor.cpu else DEVICE)
        if func is Tensor.pin_memory:
            pinned: Any = args[0].clone()
            pinned.was_pinned = True  # without a GPU nothing is
            return pinned
        if args and isinstance(args[0], ForeignTensor):
            if func in (Tensor.tolist, Tensor.numpy):
                self.waits.append(_place(name))
                return func(args[0].detach().inner)
            if func is Tensor.new_tensor:
                self.pageable.append(_place(name))
                return ForeignTensor(args[0].inner.new_tensor(*args[1:], **kwargs))
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == DEVICE.type:
            kwargs["device"] = CPU
            if func in (torch.tensor, torch.as_tensor):
                self.pageable.append(_place(name))
            else:
                self.launches[name] += 1
            return _foreign(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            tensor = tensor.type(dtype) if dtype != tensor.dtype else tensor
        if device is not None and device.type == "meta":  # what torch's C++ parts see
            device = DEVICE
        if device is None or device.type == tensor.device.type:
            return tensor
        if device.type == DEVICE.type:
            if not getattr(tensor, "was_pinned", False):
                self.pageable.append(_place("to"))
            return ToForeign.apply(tensor)
        self.waits.append(_place("to"))
        return FromForeign.apply(tensor)

    # Operations

    def log(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if any(of.alias_info and not of.alias_info.is_write for of in func._schema.returns):
            return  # a view
        if name == "detach" or name in ("alias", "lift_fresh"):
            return
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        strangers = [t for t in tensors if not isinstance(t, ForeignTensor) and t.ndim > 0]
        if strangers:
            raise RuntimeError(f"{_place(name)} mixes devices")
        if name in WAITING or self._waits_for_sizes(name, args, kwargs):
            self.waits.append(_place(name))
        if name in UNORDERED and tensors[0].is_floating_point():
            self.unordered.append(_place(name))
        if name == "segment_reduce":
            offsets = kwargs.get("offsets")
            segments = 1 if offsets is None else max(1, offsets.shape[-1] - 1)
            if args[0].shape[0] / segments > ONE_THREAD:
                self.one_thread.append(_place(name))
            if kwargs.get("lengths") is not None and not kwargs.get("unsafe", False):
                self.waits.append(_place(name))  # it checks their sum
        self.launches[name] += 1

    @staticmethod
    def _waits_for_sizes(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return name == "repeat_interleave" and kwargs.get("output_size") is None


class ToForeign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return ForeignTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.inner  # type: ignore[attr-defined, no-any-return]


class FromForeign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.inner.clone()  # type: ignore[attr-defined, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ForeignTensor(grad)


def _place(name: str) -> str:
    """The operation, and the innermost line of the package that asks for it."""
    for frame in reversed(traceback.extract_stack()):
        if "/dasmil/" in frame.filename and "/tests/" not in frame.filename:
            file = frame.filename.rpartition("/dasmil/")[2]
            return f"{name} at {file}:{frame.lineno}: {frame.line}"
    return f"{name} of torch"


def abroad(module: Module) -> Module:
    """Move the weights and buffers of a module to :data:`DEVICE`, in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                inner = ForeignTensor(weight.detach().clone())
                part._parameters[name] = nn.Parameter(inner, weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = ForeignTensor(buffer.detach().clone())
    return module


def gradients(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Name and gradient of each weight, on the CPU."""
    for name, weight in module.named_parameters():
        yield name, None if weight.grad is None else _inner(weight.grad)
