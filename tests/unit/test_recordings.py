"""Recorded passes: when they are made, when they leave, and that the capturer of the tests finds what it should."""

from __future__ import annotations

import pytest
import torch

from pipelines.recordings import ROWS, Recorder, StaticRows, padded_rows
from tests.support.fake_capturer import CaptureError, FakeCapturer


def test_rows_are_padded_to_the_next_recorded_number() -> None:
    assert [padded_rows(count) for count in range(1, 18)] == [1, 2, 4, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, None]
    assert {1, 2} <= set(ROWS), "a job alone is never padded, or strict mode would not be exact"


def test_rows_are_filled_up_with_the_last_one() -> None:
    rows = StaticRows([torch.zeros(1, 2)], 4)
    (tensor,), address = rows.tensors, rows.tensors[0].data_ptr()
    rows.fill([torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    assert tensor.tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    rows.fill([torch.arange(8.0).view(4, 2)])
    assert tensor.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert tensor.data_ptr() == address


def test_a_kind_is_recorded_after_some_passes() -> None:
    recorder: Recorder[str] = Recorder(eager_passes=3)
    assert [recorder.due("a") for _ in range(5)] == [False, False, False, True, True]
    assert not recorder.due("b")
    assert recorder.due("c", at_once=True)
    assert recorder.due("c")


def test_recordings_are_kept_until_others_need_their_place() -> None:
    recorder, made = Recorder[str](limit=2), []

    def find(key: str) -> None:
        recorder.find("kind", key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    for key in "abacab":
        find(key)
    assert made == ["a", "b", "c", "b"]
    assert len(recorder) == 2
    recorder.forget()
    assert len(recorder) == 0


def test_what_could_not_be_recorded_is_not_tried_again() -> None:
    recorder: Recorder[str] = Recorder(eager_passes=0)

    def fail() -> str:
        raise RuntimeError("an operation that cannot be captured")

    assert recorder.due("a")
    assert recorder.find("a", None, fail) is None
    assert not recorder.due("a")
    assert recorder.due("b")
    assert recorder.find("b", None, lambda: "b") == "b"
    assert recorder.failures == {"RuntimeError": 1}


def test_a_replay_repeats_the_operations_and_not_the_python() -> None:
    given, out, factor = torch.ones(2), torch.empty(2), [2.0]
    (replay,) = FakeCapturer().capture([lambda: void(out.copy_(given * factor[0]))], [given], [out])
    factor[0] = 100.0
    given.fill_(3)
    replay()
    assert out.tolist() == [6, 6]


def test_inputs_are_gone_after_a_replay_and_the_way_to_the_output_before_it() -> None:
    given, out = torch.ones(2), torch.empty(2)
    kept: list[torch.Tensor] = []

    def part() -> None:
        kept.append(given + 1)
        out.copy_(kept[-1] * 2)

    (replay,) = FakeCapturer().capture([part], [given], [out])
    kept[0].fill_(100)  # nothing that lies in the pool reaches a replay
    replay()
    assert out.tolist() == [4, 4]
    assert given.isnan().all()
    replay()
    assert out.isnan().all(), "inputs that were not set again"


def test_parts_leave_each_other_what_they_made() -> None:
    given, late, out = torch.ones(2), torch.zeros(2), torch.empty(2)
    made: list[torch.Tensor] = []
    first, second = FakeCapturer().capture(
        [lambda: made.append(given * 2), lambda: void(out.copy_(made[0] + late))], [given, late], [out]
    )
    made.clear()
    given.fill_(5)
    first()
    late.fill_(1)
    second()
    assert out.tolist() == [11, 11]


def test_memory_that_was_given_back_is_not_read() -> None:
    given, out, other = torch.ones(2), torch.empty(2), [torch.ones(2)]
    (replay,) = FakeCapturer().capture([lambda: void(out.copy_(given + other[0]))], [given], [out])
    replay()
    other.clear()
    given.fill_(1)
    with pytest.raises(CaptureError, match="given back"):
        replay()


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
def test_what_a_host_waits_for_is_refused(inference: bool) -> None:
    given = torch.ones(2)
    refused = {
        "a value": lambda: void(float(given[0])),
        "positions": lambda: void(given.nonzero()),
        "numbers of the host": lambda: void(torch.tensor([1.0, 2.0])),
    }
    for part in refused.values():
        with torch.inference_mode(inference), pytest.raises(CaptureError, match="cannot be captured"):
            FakeCapturer().capture([part], [given], [])


def void(_: object) -> None:
    """Nothing, as a part returns."""
