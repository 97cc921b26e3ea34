"""What `pipelines/torch_compat.py` and `pipelines/adapters/modules.py` assume of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.torch_compat import add_each, allow_compilations, copy_each, lost_device, ran_out_of_memory, zero_each


class Seen(TorchDispatchMode):
    """Keeps what every operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.results.append(func(*args, **(kwargs or {})))
        return self.results[-1]


def test_a_dispatch_mode_sees_every_operation_under_it_and_none_after() -> None:
    with Seen() as seen:
        two = torch.ones(3) + 1
        torch.nn.functional.layer_norm(two, (3,))
    count = len(seen.results)
    torch.zeros(2)
    assert any(result is two for result in seen.results)
    assert count >= 3
    assert len(seen.results) == count


def test_a_dispatch_mode_sees_the_meta_device_in_inference_mode() -> None:
    with torch.inference_mode(), torch.device("meta"), Seen() as seen:
        torch.nn.Conv2d(1, 1, 1)(torch.empty(1, 1, 4, 4))
    assert seen.results[-1].is_meta


def test_views_share_a_storage_key_and_copies_do_not() -> None:
    whole = torch.zeros(8)
    assert whole[2:].untyped_storage()._cdata == whole.untyped_storage()._cdata
    assert whole.clone().untyped_storage()._cdata != whole.untyped_storage()._cdata


def test_a_weak_reference_expires_when_the_last_view_goes() -> None:
    whole = torch.zeros(8)
    view = whole[2:]
    reference = StorageWeakRef(whole.untyped_storage())
    del whole
    assert not reference.expired()
    del view
    assert reference.expired()


def test_a_meta_storage_has_a_size_without_memory() -> None:
    assert torch.empty(10, 10, device="meta").untyped_storage().nbytes() == 400


def test_leaves_of_nested_results_are_found() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert tree_leaves((one, [two, None], {"n": 3})) == [one, two, None, 3]


def test_the_cpus_allocator_says_that_memory_ran_out_in_a_runtime_error() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(raised.value)


def test_an_accelerators_error_and_a_lack_of_memory_are_runtime_errors_of_different_kinds() -> None:
    assert issubclass(torch.AcceleratorError, RuntimeError)
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert not issubclass(torch.OutOfMemoryError, torch.AcceleratorError)


@pytest.mark.parametrize(
    ("error", "memory", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True, False),
        (MemoryError(), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("expected scalar type Half but found Float"), False, False),
        (ValueError("CUDA error: a caller's text"), False, False),
        (None, False, False),
    ],
)
def test_a_lack_of_memory_and_a_lost_device_are_told_apart(
    error: BaseException | None, memory: bool, lost: bool
) -> None:
    assert (ran_out_of_memory(error), lost_device(error)) == (memory, lost)


def test_a_compiled_module_ignores_hooks_that_come_after_it() -> None:
    """When this fails, adapters may go by hooks again (ADP-1 in docs/decisions.md)."""
    inner = torch.nn.Linear(2, 2)
    compiled = torch.compile(torch.nn.Sequential(inner, torch.nn.Identity()), backend="eager")
    rows = torch.ones(1, 2)
    with torch.inference_mode():
        before = compiled(rows)
        inner.register_forward_hook(lambda module, inputs, output: output + 100)
        assert torch.equal(compiled(rows), before)
        assert torch.equal(inner(rows), before + 100)


def test_many_tensors_are_copied_added_and_cleared_in_one_call() -> None:
    targets, sources = [torch.zeros(2, 3), torch.zeros(4)], [torch.ones(2, 3), torch.full((4,), 2.0)]
    copy_each([target[:1] for target in targets], [source[:1] for source in sources])
    assert [target.tolist() for target in targets] == [[[1, 1, 1], [0, 0, 0]], [2, 0, 0, 0]]
    add_each(targets, sources, 0.5)
    assert targets[1].tolist() == [3, 1, 1, 1]
    zero_each(targets)
    assert not any(target.any() for target in targets)


def test_the_limits_of_compilations_have_the_names_that_are_set() -> None:
    from torch._dynamo import config

    with config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        allow_compilations()
        assert config.recompile_limit > 256
        assert config.accumulated_recompile_limit > 256
