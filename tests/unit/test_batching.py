"""The batching policy: budget, order, and nobody starves."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.batching import BatchKey, select_rows


@dataclass(frozen=True)
class Job:
    name: int
    rows: int
    key: int

    @property
    def batch_key(self) -> BatchKey:
        return BatchKey((self.key,), (0,))


jobs_of_any_kind = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 3)), max_size=30).map(
    lambda kinds: [Job(i, rows, key) for i, (rows, key) in enumerate(kinds)]
)


@given(jobs_of_any_kind, st.integers(1, 16))
def test_a_tick_is_one_key_within_the_budget_with_the_oldest_in_it(jobs: list[Job], max_rows: int) -> None:
    chosen = select_rows(jobs, max_rows)
    assert bool(chosen) == bool(jobs)
    if chosen:
        assert chosen[0] is jobs[0]
        assert len({job.batch_key for job in chosen}) == 1
        assert sum(job.rows for job in chosen) <= max(max_rows, jobs[0].rows)
        assert [job.name for job in chosen] == sorted(job.name for job in chosen)


@given(jobs_of_any_kind, st.integers(2, 16))
def test_no_row_that_fits_is_left_out(jobs: list[Job], max_rows: int) -> None:
    chosen = select_rows(jobs, max_rows)
    free = max_rows - sum(job.rows for job in chosen)
    left = [job for job in jobs if job not in chosen and job.batch_key == chosen[0].batch_key] if chosen else []
    assert all(job.rows > free for job in left)


@given(jobs_of_any_kind, st.integers(2, 8))
def test_everybody_finishes_in_a_bounded_number_of_ticks(jobs: list[Job], max_rows: int) -> None:
    ticks_left = {job.name: 3 for job in jobs}
    waiting = list(jobs)
    for _ in range(3 * len(jobs)):
        for job in select_rows(waiting, max_rows):
            ticks_left[job.name] -= 1
        waiting = [job for job in waiting if ticks_left[job.name]]
    assert not waiting
