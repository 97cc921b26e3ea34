"""A CUDA device that is not there, for tests of where tensors live and what a tick asks of a device.

Its tensors say `cuda:0` and are computed on the CPU. It refuses what CUDA refuses: operations across devices (but for
0-dimensional CPU tensors in pointwise operations), an index on the GPU into a tensor on the CPU, `.numpy()`. Two more
things are refused, which CUDA would do and this project must not: random numbers of the device's own generator, since a
seed would mean another picture there, and pickling a device tensor as it is.

There are no gradients: modules are run in inference mode, or torch ends the process.

It counts kernels, copies in both directions, and waits of the host, each with file and line. An operation of several
kernels counts as one where torch shows it as one (`linear`, `scaled_dot_product_attention`); copies of pageable memory
stop the host too, and are counted as copies alone. A copy from pinned memory that is not waited for is `sent`, one into
pinned memory is `fetched`: what it brings is not a number until an event behind it was waited for.

    with PretendedCuda() as cuda:
        text2image = Text2Image(catalog, device="cuda")
        with cuda.counting() as traffic:
            ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.traffic import Kind, Traffic, counting, note

WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}
WAITS |= {"linalg_solve", "_linalg_solve_ex"}  # their result says whether the matrix was singular
"""Operations whose result the host must see."""
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}
"""Operations that launch nothing."""
_pinned: dict[int, StorageWeakRef] = {}
"""Storages of the CPU that are said to be pinned, by address."""
_fetched: list[Callable[[], object] | None] = []
"""Copies into pinned memory in their order; None for those that were waited for."""
POINTWISE = {"where", "true_divide", "divide", "subtract", "multiply", "rsub", "__rsub__", "pow", "fill_"}
"""Pointwise operations that torch does not tag as such where it shows them whole."""
RANDOM = {"randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial", "uniform_", "normal_"}
RANDOM |= {"randn_like", "rand_like", "randint_like", "bernoulli_", "exponential_", "random_"}


class CudaTensor(torch.Tensor):
    """A tensor that says `cuda:0`; `held` is the CPU tensor it stands for."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda:0",
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # What torch's Python bindings do under a guard of the device, which a torch without CUDA does not have.

    def contiguous(self, **options: Any) -> torch.Tensor:
        made = self.held.contiguous(**options)
        if made is self.held:
            return self
        note("kernel", "contiguous")
        return _wrap(made)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return _get(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not on_cuda(value) and value.dim() > 0:
            note("to device", "setitem")
        self.held[tree_map(_held, index)] = _held(value)
        note("kernel", "setitem")

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        note("kernel" if on_cuda(source) else _sent(source, non_blocking), "copy_")
        self.held.copy_(_held(source))
        return self

    def nonzero(self, **options: Any) -> torch.Tensor:
        return _wrap(_seen("nonzero", self.held).nonzero(**options))

    def item(self) -> Any:
        return _seen("item", self.held).item()

    def tolist(self) -> Any:
        return _seen("tolist", self.held).tolist()

    def __bool__(self) -> bool:
        return bool(_seen("bool", self.held))

    def __int__(self) -> int:
        return int(_seen("int", self.held))

    def __index__(self) -> int:
        return int(_seen("index", self.held))

    def __float__(self) -> float:
        return float(_seen("float", self.held))

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy; use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor{tuple(self.shape)}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a CUDA tensor was pickled as it is")


def on_cuda(value: Any) -> bool:
    """Whether a tensor, or a device by whatever name, is the pretended one."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, CudaTensor)
    return value is not None and torch.device(value).type == "cuda"


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    """Say of a tensor on the CPU that its memory is pinned."""
    storage = tensor.untyped_storage()
    _pinned[storage._cdata] = StorageWeakRef(storage)
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    ref = _pinned.get(tensor.untyped_storage()._cdata)
    return ref is not None and not ref.expired()


def _sent(source: torch.Tensor, non_blocking: bool) -> Kind:
    """What copying a tensor of the CPU to the device is."""
    return "sent" if non_blocking and _is_pinned(source) else "to device"


def _fetch(held: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A copy into pinned memory, which comes true when it is waited for."""
    note("fetched", "copy_")
    content = held.clone()
    target.fill_(float("nan") if target.is_floating_point() else 0)
    _fetched.append(lambda: target.copy_(content))
    return target


class PretendedEvent:
    """`torch.cuda.Event`: a place in the queue of copies to the host."""

    def __init__(self, **_: Any) -> None:
        self._behind = 0

    def record(self, *_: Any) -> None:
        self._behind = len(_fetched)

    def query(self) -> bool:
        return all(copy is None for copy in _fetched[: self._behind])

    def synchronize(self) -> None:
        note("wait", "synchronize")
        for place, copy in enumerate(_fetched[: self._behind]):
            if copy is not None:
                with torch.inference_mode():  # on whatever thread: the target may have been made in it
                    copy()
                _fetched[place] = None


def _seen(operation: str, held: torch.Tensor) -> torch.Tensor:
    """A tensor whose content the host must see now."""
    note("wait", operation)
    return held


def _held(value: Any) -> Any:
    """What the CPU computes with instead."""
    if isinstance(value, CudaTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and on_cuda(value) else value


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation with at least one tensor on the device."""
    name = func._schema.name.removeprefix("aten::")
    if name in RANDOM:
        raise RuntimeError(f"{name} on the device: a seed must mean the same on every device")
    if name == "_has_compatible_shallow_copy_type":
        return False  # `module.to` asks whether a parameter can become its own copy on the device
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
    target = all(on_cuda(leaf) for leaf in leaves if isinstance(leaf, torch.device))
    if name == "copy_":
        source, target = on_cuda(args[1]), on_cuda(args[0])
        if source and not target and any(args[2:]) and _is_pinned(args[0]):
            return _fetch(args[1].held, args[0])
    elif name in ("_to_copy", "to"):
        source = on_cuda(args[0])
    else:
        source = target
        _refuse_mixed_devices(func, name, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name == "copy_":
        note("kernel" if source == target else "to device" if target else "to host", name)
        return args[0]
    if source != target:
        note("to device" if target else "to host", name)
        return _wrap(result.clone()) if target else result.clone()  # another memory
    if name in WAITS:
        note("wait", name)
    elif name not in FREE and not _is_view(func, ours, result):
        note("kernel", name)
    known = {id(tensor.held): tensor for tensor in ours}
    return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else _wrap(leaf) if target else leaf, result)


def _wrap(value: Any) -> Any:
    """On the device; a view of an ordinary tensor stays an ordinary one in inference mode too, as torch has it."""
    if not isinstance(value, torch.Tensor):
        return value
    if torch.is_inference_mode_enabled() and not value.is_inference():
        with torch.inference_mode(False):
            return CudaTensor(value)
    return CudaTensor(value)


def _is_view(func: Any, ours: list[CudaTensor], result: Any) -> bool:
    if func._schema.is_mutable:
        return False
    known = {tensor.held.untyped_storage().data_ptr() for tensor in ours}
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return bool(made) and all(leaf.untyped_storage().data_ptr() in known for leaf in made)


def _refuse_mixed_devices(func: Any, name: str, tensors: list[torch.Tensor]) -> None:
    strangers = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    pointwise = torch.Tag.pointwise in func.tags or name in POINTWISE
    if any(tensor.dim() > 0 or not pointwise for tensor in strangers):
        shapes = [f"{'cuda' if on_cuda(tensor) else 'cpu'} {tuple(tensor.shape)}" for tensor in tensors]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {shapes}")


class PretendedCuda(TorchFunctionMode):
    """While active, `cuda` is a device that computes on the CPU.

    Most of it happens where torch dispatches operations (`CudaTensor`). What a torch without CUDA refuses before that
    is met here: making tensors on the device, moving them there, and Python's indexing.
    """

    def __enter__(self) -> Self:
        self._patches = ExitStack()
        # `module.to` makes new parameters, for the old ones cannot become tensors of another class.
        self._patches.callback(
            torch.__future__.set_overwrite_module_params_on_conversion,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        answers = {"memory_reserved": 2**30, "memory_allocated": 2**30, "get_per_process_memory_fraction": 1.0}
        for name, answer in answers.items():
            self._patches.enter_context(patch.object(torch.cuda, name, lambda device=None, answer=answer: answer))
        self._patches.enter_context(patch.object(torch.cuda, "Event", PretendedEvent))
        for name, answer in {"mem_get_info": (40 * 2**30, 80 * 2**30), "empty_cache": None}.items():
            self._patches.enter_context(patch.object(torch.cuda, name, _driver_call(name, answer)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        _fetched.clear()

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        """Count what is asked of the device within the block."""
        traffic = Traffic()
        counting.append(traffic)
        try:
            yield traffic
        finally:
            counting.remove(traffic)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return _move(func, args, kwargs)
        if func is torch.Tensor.cuda:
            return _move(torch.Tensor.to, (args[0], "cuda"), {})
        if func is torch.Tensor.__getitem__ and any(on_cuda(leaf) for leaf in _tensors(args)):
            return _get(*args)  # a tensor of the CPU by an index of the device
        if func is torch.Tensor.pin_memory:
            return _pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return _pin(func(*args, **kwargs | {"pin_memory": False}))
        if func is torch.nonzero and on_cuda(args[0]):
            return args[0].nonzero(**kwargs)
        if "device" in kwargs and on_cuda(kwargs["device"]) and not any(on_cuda(leaf) for leaf in _tensors(args)):
            return _make(func, args, kwargs)
        return func(*args, **kwargs)


def _driver_call(name: str, answer: Any) -> Any:
    def call(device: Any = None) -> Any:
        note("driver call", name)
        return answer

    return call


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    """`Tensor.to` in all its forms; a tensor that is there already is left to torch."""
    tensor, *rest = args
    other = next((value for value in rest if isinstance(value, torch.Tensor)), None)
    if other is not None:
        device, dtype = other.device, other.dtype
    else:
        known = {key: value for key, value in kwargs.items() if key != "copy"}
        device, dtype, *_ = torch._C._nn._parse_to(*rest, **known)
    if device is None or on_cuda(device) == on_cuda(tensor):
        return func(tensor, dtype or tensor.dtype) if on_cuda(tensor) else func(*args, **kwargs)
    held = _held(tensor).detach()
    moved = held.to(dtype or held.dtype)
    if moved.data_ptr() == held.data_ptr() and not isinstance(tensor, torch.nn.Parameter):
        moved = moved.clone()  # another memory; weights stay where they are, for sums depend on their alignment
    note(_sent(tensor, bool(kwargs.get("non_blocking"))) if on_cuda(device) else "to host", "to")
    return _wrap(moved) if on_cuda(device) else moved


def _make(func: Any, args: Any, kwargs: Any) -> CudaTensor:
    """`torch.zeros(..., device="cuda")` and its like."""
    if func.__name__ in RANDOM:
        raise RuntimeError(f"{func.__name__} on the device: a seed must mean the same on every device")
    if func.__name__ not in FREE:
        note("to device" if func in (torch.tensor, torch.as_tensor, torch.asarray) else "kernel", func.__name__)
    made: CudaTensor = _wrap(func(*args, **kwargs | {"device": "cpu"}))
    return made


def _get(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]`, where one of the two is on the device."""
    parts = list(index) if isinstance(index, tuple) else [index]
    gathers = False
    for position, part in enumerate(parts):
        if isinstance(part, torch.Tensor) and on_cuda(part) and part.dim() == 0:
            note("wait", "index by a scalar of the device")
            parts[position] = part.held.item()
        elif isinstance(part, (list, torch.Tensor)):
            gathers = True
            if not on_cuda(tensor) and isinstance(part, torch.Tensor) and on_cuda(part):
                raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
            if isinstance(part, list) or not on_cuda(part):
                note("to device", "index")
            elif part.dtype == torch.bool:
                note("wait", "index by a mask")
    result: torch.Tensor = _held(tensor)[tuple(_held(part) for part in parts)]
    if not on_cuda(tensor):
        return result
    if gathers:
        note("kernel", "index")
    wrapped: torch.Tensor = _wrap(result)
    return wrapped
