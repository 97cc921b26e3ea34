"""Text encoders: prompts -> hidden states, with a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.adapters.layers import Adapter
from pipelines.adapters.rows import RowAdapters
from pipelines.adapters.store import LoraStore
from pipelines.cache import LruCache
from pipelines.plan import LoraUse, StagePlan
from pipelines.text.conditioning import Conditioning, EncodedText

Embed = Callable[[list[EncodedText]], tuple[torch.Tensor, torch.Tensor | None]]
"""Joins what the encoders of a stage made of one prompt, as `Family.embed` does."""

CACHED_TEXTS = 512
"""Entries of each encoder's cache; an SDXL entry of both encoders is about 0.6 MB in half precision."""


class TextEncoder:
    """One CLIP text tower and its tokenizer."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        read: Callable[[str, str], Adapter],
    ) -> None:
        """Wrap a loaded model; `read(name, base)` reads the layers a LoRA has for it."""
        self._tokenizer = tokenizer
        self._model = model.eval()
        self._adapters = RowAdapters(model, buckets=())
        self.loras = LoraStore(lambda name, base: self._adapters.fit(read(name, base), model.device, model.dtype))
        self.cache: LruCache[tuple[str, str, tuple[LoraUse, ...]], EncodedText] = LruCache(CACHED_TEXTS)

    def encode(self, text: str, stage: StagePlan) -> EncodedText:
        """Encode one text under the LoRAs of its stage; a longer one is cut to the model's context, as CLIP does.

        One text a forward pass: batched with others its last bits would depend on them, and on what the cache held.
        """
        key = (text, stage.component if stage.loras else "", stage.loras)
        if cached := self.cache.get(key):
            return cached
        with self._adapters.active([self.loras.mixture(stage)]):
            return self.cache.put(key, self._forward(text))

    @torch.inference_mode()
    def _forward(self, text: str) -> EncodedText:
        tokens = self._tokenizer(
            [text],
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        masked = getattr(self._model.config, "use_attention_mask", False)
        output = self._model(
            tokens.input_ids, attention_mask=tokens.attention_mask if masked else None, output_hidden_states=True
        )
        return EncodedText(output.last_hidden_state, output.hidden_states[-2], getattr(output, "text_embeds", None))


class TextEncoderStack:
    """The encoders of a model family, in order: one for SD, CLIP-L and OpenCLIP-G for SDXL."""

    def __init__(self, encoders: list[TextEncoder], embed: Embed) -> None:
        self.encoders = encoders
        self._join = embed

    def encode(self, stage: StagePlan) -> Conditioning:
        """Conditioning of one stage: one row, or uncond and cond where the stage is guided."""
        text = stage.text
        rows = [text.prompts]
        zero = text.negative_prompts is None
        if stage.guided and text.negative_prompts is not None:
            rows.insert(0, text.negative_prompts)
        embeds, pooled = zip(*self._embed(stage, rows), strict=True)
        prompt_embeds = torch.cat(embeds)
        pooled_embeds = None if pooled[0] is None else torch.cat([p for p in pooled if p is not None])
        if stage.guided and zero:
            prompt_embeds = torch.cat([torch.zeros_like(prompt_embeds), prompt_embeds])
            if pooled_embeds is not None:
                pooled_embeds = torch.cat([torch.zeros_like(pooled_embeds), pooled_embeds])
        return Conditioning(prompt_embeds, pooled_embeds)

    def _embed(self, stage: StagePlan, rows: list[tuple[str, ...]]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        encoders = [self.encoders[index] for index in stage.text.encoders]
        return [
            self._join([encoder.encode(text, stage) for encoder, text in zip(encoders, row, strict=True)])
            for row in rows
        ]
