"""Names a client may choose from: matched without case, with aliases, answered with "did you mean"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches


class UnknownChoiceError(ValueError):
    """A name that is not on the list.

    The message starts with `Unexpected <field> '<value>'` and ends with the allowed names as a Python list, because
    PyPI `llm-hyperbolic` parses exactly that to ask its user again.
    """

    def __init__(self, field: str, value: str, allowed: Iterable[str], suggestion: str | None = None) -> None:
        self.field = field
        self.value = value
        self.allowed = list(allowed)
        self.suggestion = suggestion
        super().__init__(field, value, self.allowed, suggestion)

    def __str__(self) -> str:
        hint = f" Did you mean '{self.suggestion}'?" if self.suggestion else ""
        # A client reads the first square brackets as the list, so the echoed value must not bring its own.
        shown = self.value[:80].replace("[", "(").replace("]", ")")
        return f"Unexpected {self.field} '{shown}'.{hint} Only {self.allowed} allowed now"


class Choices:
    """An ordered set of canonical names of one request field."""

    def __init__(self, field: str, names: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        self.field = field
        self.names = tuple(names)
        self._canonical: dict[str, str] = {}
        for spelling, name in [*((n, n) for n in self.names), *(aliases or {}).items()]:
            if name not in self.names:
                raise ValueError(f"{field}: alias '{spelling}' points at '{name}', which is not a name")
            if self._canonical.setdefault(spelling.casefold(), name) != name:
                raise ValueError(f"{field}: '{spelling}' would mean two names")

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every spelling, as it is compared."""
        return tuple(self._canonical)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def resolve(self, value: str) -> str:
        """Return the canonical name of `value`; raises UnknownChoiceError."""
        try:
            return self._canonical[value.strip().casefold()]
        except KeyError:
            close = get_close_matches(value.strip().casefold(), self._canonical, n=1, cutoff=0.6)
            suggestion = self._canonical[close[0]] if close else None
            raise UnknownChoiceError(self.field, value, self.names, suggestion) from None
