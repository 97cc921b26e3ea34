"""Style presets: templates around a prompt."""

from __future__ import annotations

from pydantic import model_validator

from config.sources import Spec


class StylePreset(Spec):
    """A prompt template with `{prompt}` in it and a negative prompt to add."""

    name: str
    prompt: str
    negative_prompt: str = ""
    aliases: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_one_slot(self) -> StylePreset:
        if self.prompt.count("{prompt}") != 1:
            raise ValueError(f"style {self.name!r}: the template needs {{prompt}} exactly once")
        return self

    def applied(self, prompt: str, negative_prompt: str | None) -> tuple[str, str | None]:
        """Both texts in this style: the template around the prompt, the negative text behind the caller's."""
        negative = ", ".join(t for t in (negative_prompt, self.negative_prompt) if t) or negative_prompt
        return self.prompt.replace("{prompt}", prompt), negative
