"""The cache that forgets what was not used for longest."""

from __future__ import annotations

from pipelines.cache import LruCache


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache: LruCache[str, int] = LruCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    assert cache.put("c", 3) == 3
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    assert (cache.hits, cache.misses, len(cache)) == (3, 1, 2)


def test_a_budget_of_bytes_keeps_the_newest_even_if_it_is_larger() -> None:
    cache: LruCache[str, bytes] = LruCache(10, len)
    cache.put("small", b"1234")
    cache.put("other", b"1234")
    cache.put("large", b"x" * 20)
    assert cache.get("small") is None
    assert cache.get("other") is None
    assert cache.get("large") == b"x" * 20
