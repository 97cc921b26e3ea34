"""Text encoders: prompts -> hidden states, with a cache."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.conditioning import Conditioning
from pipelines.families import Family
from pipelines.plan import StagePlan, TextPlan

CACHED_TEXTS = 512
"""Entries of each encoder's cache; an SDXL entry of both encoders is about 0.6 MB in half precision."""


@dataclass(frozen=True)
class EncodedText:
    """What one encoder made of one text.

    Attributes:
        last_hidden_state: `[1, tokens, width]`, after the final layer norm.
        penultimate_hidden_state: `[1, tokens, width]`, before the last layer.
        pooled: `[1, projection]`, None for an encoder without projection.
    """

    last_hidden_state: torch.Tensor
    penultimate_hidden_state: torch.Tensor
    pooled: torch.Tensor | None


class TextEncoder:
    """One CLIP text tower and its tokenizer."""

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel | CLIPTextModelWithProjection) -> None:
        self._tokenizer = tokenizer
        self._model = model.eval()
        self._cache: OrderedDict[str, EncodedText] = OrderedDict()
        self.cache_hits = 0
        self.cache_misses = 0

    def encode(self, texts: list[str]) -> list[EncodedText]:
        """Encode `texts`, those not in the cache in one forward pass. Longer ones are cut to the model's context, as CLIP does."""
        found = {t: self._cache[t] for t in texts if t in self._cache}
        missing = [t for t in dict.fromkeys(texts) if t not in found]
        self.cache_hits += len(texts) - len(missing)
        self.cache_misses += len(missing)
        if missing:
            found |= zip(missing, self._forward(missing), strict=True)
        for text in texts:
            self._cache[text] = found[text]
            self._cache.move_to_end(text)
        while len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        return [found[t] for t in texts]

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> list[EncodedText]:
        tokens = self._tokenizer(
            texts,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        masked = getattr(self._model.config, "use_attention_mask", False)
        output = self._model(
            tokens.input_ids, attention_mask=tokens.attention_mask if masked else None, output_hidden_states=True
        )
        pooled = getattr(output, "text_embeds", None)
        return [
            EncodedText(
                last_hidden_state=output.last_hidden_state[i : i + 1],
                penultimate_hidden_state=output.hidden_states[-2][i : i + 1],
                pooled=None if pooled is None else pooled[i : i + 1],
            )
            for i in range(len(texts))
        ]


class TextEncoderStack:
    """The encoders of a model family, in order: one for SD, CLIP-L and OpenCLIP-G for SDXL."""

    def __init__(self, encoders: list[TextEncoder], family: Family) -> None:
        self.encoders = encoders
        self._family = family

    def encode(self, stage: StagePlan) -> Conditioning:
        """Conditioning of one stage: one row, or uncond and cond where the stage is guided."""
        text = stage.text
        rows = [text.prompts]
        zero = text.negative_prompts is None
        if stage.guided and text.negative_prompts is not None:
            rows.insert(0, text.negative_prompts)
        embeds, pooled = zip(*self._embed(text, rows), strict=True)
        prompt_embeds = torch.cat(embeds)
        pooled_embeds = None if pooled[0] is None else torch.cat([p for p in pooled if p is not None])
        if stage.guided and zero:
            prompt_embeds = torch.cat([torch.zeros_like(prompt_embeds), prompt_embeds])
            if pooled_embeds is not None:
                pooled_embeds = torch.cat([torch.zeros_like(pooled_embeds), pooled_embeds])
        return Conditioning(prompt_embeds, pooled_embeds)

    def _embed(
        self, text: TextPlan, rows: list[tuple[str, ...]]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        by_encoder = [
            self.encoders[encoder].encode([row[position] for row in rows])
            for position, encoder in enumerate(text.encoders)
        ]
        return [self._family.embed([encoded[i] for encoded in by_encoder]) for i in range(len(rows))]
