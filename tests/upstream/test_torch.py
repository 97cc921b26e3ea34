"""What `pipelines/torch_compat.py` assumes of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
