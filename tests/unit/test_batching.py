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
        return BatchKey((self.key // 3,), ((77, 154, 231)[self.key % 3], 8))


jobs_of_any_kind = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 5)), max_size=30).map(
    lambda kinds: [Job(i, rows, key) for i, (rows, key) in enumerate(kinds)]
)


@given(jobs_of_any_kind, st.integers(1, 16))
def test_a_tick_is_what_the_oldest_carries_within_the_budget(jobs: list[Job], max_rows: int) -> None:
    chosen = select_rows(jobs, max_rows)
    assert bool(chosen) == bool(jobs)
    if chosen:
        assert chosen[0] is jobs[0]
        (latents, (tokens, _)) = jobs[0].batch_key
        assert all(job.batch_key.latent_shape == latents for job in chosen)
        assert all(tokens % job.batch_key.context_shape[0] == 0 for job in chosen)
        assert sum(job.rows for job in chosen) <= max(max_rows, jobs[0].rows)
        assert [job.name for job in chosen] == sorted(job.name for job in chosen)


@given(jobs_of_any_kind, st.integers(2, 16))
def test_no_row_that_fits_is_left_out(jobs: list[Job], max_rows: int) -> None:
    chosen = select_rows(jobs, max_rows)
    free = max_rows - sum(job.rows for job in chosen)
    left = [job for job in jobs if job not in chosen and chosen[0].batch_key.carries(job.batch_key)] if chosen else []
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
