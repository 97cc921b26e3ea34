"""What is used of torch beyond its documented interface; `tests/upstream/test_torch.py` has a test for each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_MEMORY = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # an allocation past torch's own allocator, such as a stream's
    "DefaultCPUAllocator: can't allocate memory",
)
"""What stands in the RuntimeErrors of libraries that allocate for themselves, and of the CPU's allocator."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an operation failed for want of memory alone, so that less of it may succeed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def lost_device(error: BaseException | None) -> bool:
    """Whether this process can use its GPU no more.

    After an illegal access, a failed device assertion or an ECC error the driver answers every later call of the
    process with the same error (CUDA Runtime API, `cudaErrorIllegalAddress`): only a new process helps.
    """
    if ran_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith("CUDA error:")
    )


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """`target.copy_(source)` for each pair, in one kernel where all are of one format on one GPU."""
    torch._foreach_copy_(list(targets), list(sources))


def zero_each(tensors: Sequence[torch.Tensor]) -> None:
    """`tensor.zero_()` for each, likewise."""
    torch._foreach_zero_(list(tensors))


def add_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], weight: float) -> None:
    """`target.add_(source, alpha=weight)` for each pair, likewise."""
    torch._foreach_add_(list(targets), list(sources), alpha=weight)


def multiplied(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> Sequence[torch.Tensor]:
    """`tensor * factor` for each pair, likewise."""
    return list(torch._foreach_mul(list(tensors), list(factors)))


def allow_compilations() -> None:
    """Let torch.compile compile a function for as many shapes as come.

    It counts them for a line of code, not for a module: a UNet has blocks of one class in four widths, and each comes
    with several numbers of rows and sizes of pictures. By default the ninth is never compiled.
    """
    from torch._dynamo import config

    config.recompile_limit, config.accumulated_recompile_limit = 1024, 8192


class PeakBytes(TorchDispatchMode):
    """While active, counts the bytes of all tensors made under it that are alive together; `peak` is the most.

    A dispatch mode sees the result of every operation; a storage is known by its address and counted until it is freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
