"""Text encoders: prompts -> hidden states, with a cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.adapters.reading import AdapterFile
from pipelines.adapters.rows import RowAdapters
from pipelines.adapters.store import LoraStore
from pipelines.cache import LruCache
from pipelines.errors import InvalidValueError
from pipelines.loads import Needed
from pipelines.plan import EmbeddingUse, LoraUse, StagePlan, TextReading
from pipelines.text.chunks import Chunk, Token, into_chunks
from pipelines.text.conditioning import Conditioning, EncodedText, HiddenLayer, PromptSize
from pipelines.text.emphasis import emphasise
from pipelines.text.inversions import Inversion, Inversions
from pipelines.text.syntax import read_sections

logger = logging.getLogger(__name__)

Embed = Callable[[list[EncodedText]], tuple[torch.Tensor, torch.Tensor | None]]
"""Joins the outputs of a stage's encoders for one prompt, as `Family.embed` does."""

CACHED_CHUNKS = 512
"""Entries of each encoder's cache; an SDXL entry of both encoders is about 0.3 MB in half precision."""


class TextEncoder:
    """One CLIP text tower and its tokenizer."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        read: Callable[[LoraUse, str], AdapterFile],
        read_inversion: Callable[[EmbeddingUse, str], torch.Tensor],
        layer: HiddenLayer,
        part: str = "text_encoder",
    ) -> None:
        """Wrap a loaded model.

        Args:
            tokenizer: the model's own.
            model: one of a pipeline's text encoders.
            read: reads the layers that a LoRA has for it, by its use and base UNet.
            read_inversion: reads the vectors that a textual inversion has for it, likewise.
            layer: what UNets read.
            part: `text_encoder` or `text_encoder_2`.
        """
        self._tokenizer = tokenizer
        self._model = model.eval()
        self._layer = layer
        self._comma = tokenizer.get_vocab().get(",</w>")
        self.inversions = Inversions(model.get_input_embeddings(), read_inversion)
        self._adapters = RowAdapters(model, buckets=())
        self.loras = LoraStore(lambda use, base: self._adapters.fit(read(use, base), model.device, model.dtype), part)
        self.cache: LruCache[tuple[tuple[int, ...], int, str, tuple[LoraUse, ...]], EncodedText]
        self.cache = LruCache(CACHED_CHUNKS)

    @property
    def context(self) -> int:
        """Tokens it reads at once, start and end included."""
        return min(int(self._tokenizer.model_max_length), int(self._model.config.max_position_embeddings))

    @property
    def layers(self) -> int:
        """Layers of the tower."""
        return int(self._model.config.num_hidden_layers)

    def needed(self, stage: StagePlan) -> Sequence[Needed]:
        """The adapters and inversions of a stage."""
        return [*self.loras.needed(stage), *self.inversions.needed(stage.text.embeddings, stage.component)]

    def tokenize(self, text: str, stage: StagePlan) -> list[list[Token]]:
        """The tokens of each section of a text, with their weights, without start and end."""
        known = self.inversions.load(stage.text.embeddings, stage.component)
        return [
            [
                Token(id, fragment.weight)
                for fragment in section
                for piece in self.inversions.split(fragment.text, known)
                for id in (self._ids(piece) if isinstance(piece, str) else piece.ids)
            ]
            for section in read_sections(text, stage.text.reading.syntax)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def into_chunks(self, sections: list[list[Token]], reading: TextReading) -> tuple[Chunk, ...]:
        """The tokens as the encoder reads them; `long_prompt` "cut" keeps what fits into one pass."""
        room = self.context - 2
        if reading.long_prompt == "cut":
            return (tuple(token for section in sections for token in section)[:room],)
        return into_chunks(sections, room, self._comma)

    def encode(self, chunks: tuple[Chunk, ...], stage: StagePlan) -> EncodedText:
        """Encode the chunks of one text under the LoRAs of its stage, and weigh their tokens.

        One chunk a forward pass (ENG-2): in a batch its last bits would depend on the others and on the cache.
        """
        encoded = [self._encode(tuple(token.id for token in chunk), stage) for chunk in chunks]
        states = [
            emphasise(text.hidden_state, self._framed_weights(chunk), stage.text.reading.emphasis)
            for text, chunk in zip(encoded, chunks, strict=True)
        ]
        return EncodedText(torch.cat(states, dim=1), encoded[0].pooled)

    def _framed_weights(self, chunk: Chunk) -> list[float]:
        """The weight of every token of a pass: start, end and padding have 1."""
        return [1.0, *(token.weight for token in chunk), *[1.0] * (self.context - 1 - len(chunk))]

    def _encode(self, ids: tuple[int, ...], stage: StagePlan) -> EncodedText:
        from_end = max(stage.text.reading.clip_skip, self._layer.from_end)
        key = (ids, from_end, stage.component if stage.loras else "", stage.loras)
        if cached := self.cache.get(key):
            return cached
        with self._adapters.active([self.loras.mixture(stage)]):
            known = self.inversions.load(stage.text.embeddings, stage.component)
            return self.cache.put(key, self._forward(ids, from_end, known))

    @torch.inference_mode()
    def _forward(self, ids: tuple[int, ...], from_end: int, known: Mapping[str, Inversion]) -> EncodedText:
        """One pass over start, tokens, end and padding, as the tokenizer itself would frame them."""
        tokenizer, device = self._tokenizer, self._model.device
        padding = self.context - 2 - len(ids)
        framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
        masked = getattr(self._model.config, "use_attention_mask", False)
        mask = torch.tensor([[1] * (len(ids) + 2) + [0] * padding], device=device) if masked else None
        tokens = torch.tensor([self.inversions.place(framed, known)], device=device)
        output = self._model(tokens, attention_mask=mask, output_hidden_states=True)
        if from_end == 1 and self._layer.normed:
            state = output.last_hidden_state
        else:
            state = output.hidden_states[-from_end]
            state = self._final_norm(state) if self._layer.normed else state
        return EncodedText(state, getattr(output, "text_embeds", None))

    @property
    def _final_norm(self) -> nn.Module:
        # CLIPTextModel lost its `text_model.` level in transformers 5, CLIPTextModelWithProjection kept it.
        norm: nn.Module = getattr(self._model, "text_model", self._model).final_layer_norm
        return norm


class TextEncoderStack:
    """The encoders of a model family, in order: one for SD, CLIP-L and OpenCLIP-G for SDXL."""

    def __init__(self, encoders: list[TextEncoder], embed: Embed) -> None:
        self.encoders = encoders
        self._join = embed

    def needed(self, stage: StagePlan) -> Sequence[Needed]:
        """The files of a stage, which `encode` reads unless they are loaded."""
        return [needed for index in stage.text.encoders for needed in self.encoders[index].needed(stage)]

    def encode(self, stage: StagePlan) -> Conditioning:
        """Conditioning of one stage: one row, or uncond and cond where the stage is guided.

        Every text of the stage is filled up with empty chunks to as many as the longest has, as A1111 does.

        Raises:
            InvalidValueError: a text of more chunks than the model allows, a `clip_skip` below its first layer, or
                weights that leave no numbers.
        """
        text = stage.text
        sides = {"prompt": text.prompts}
        if stage.guided and text.negative_prompts is not None:
            sides = {"negative_prompt": text.negative_prompts} | sides
        encoders = [self.encoders[index] for index in text.encoders]
        self._check_clip_skip(encoders, text.reading.clip_skip)
        size, chunked = self._chunked(sides, encoders, stage)
        rows = [
            self._join([encoder.encode(chunks, stage) for encoder, chunks in zip(encoders, row, strict=True)])
            for row in chunked
        ]
        embeds, pooled = zip(*rows, strict=True)
        prompt_embeds = torch.cat(embeds)
        pooled_embeds = None if pooled[0] is None else torch.cat([p for p in pooled if p is not None])
        if stage.guided and text.negative_prompts is None:
            prompt_embeds = torch.cat([torch.zeros_like(prompt_embeds), prompt_embeds])
            if pooled_embeds is not None:
                pooled_embeds = torch.cat([torch.zeros_like(pooled_embeds), pooled_embeds])
        return Conditioning(prompt_embeds, pooled_embeds, size)

    def _chunked(
        self, sides: dict[str, tuple[str, ...]], encoders: list[TextEncoder], stage: StagePlan
    ) -> tuple[PromptSize, list[list[tuple[Chunk, ...]]]]:
        """For each side the chunks of each encoder, all of one number, and the size of the longest text."""
        reading = stage.text.reading
        rows: list[list[tuple[Chunk, ...]]] = []
        tokens, context = 0, encoders[0].context
        for param, texts in sides.items():
            row = []
            for encoder, text in zip(encoders, texts, strict=True):
                sections = encoder.tokenize(text, stage)
                count = sum(len(section) for section in sections) + 2
                chunks = encoder.into_chunks(sections, reading)
                if len(chunks) > reading.max_chunks:
                    raise InvalidValueError(
                        f"{param}: {count} tokens in {len(chunks)} chunks of {encoder.context}, more than this model's "
                        f"{reading.max_chunks} chunks. Shorten it, or send long_prompt 'cut'",
                        param,
                    )
                if reading.long_prompt == "cut" and count > encoder.context:
                    logger.warning("%s cut from %d to %d tokens", param, count, encoder.context)
                if count > tokens:
                    tokens, context = count, encoder.context
                row.append(chunks)
            rows.append(row)
        most = max(len(chunks) for row in rows for chunks in row)
        filled = [[chunks + ((),) * (most - len(chunks)) for chunks in row] for row in rows]
        return PromptSize(tokens, context, most), filled

    @staticmethod
    def _check_clip_skip(encoders: list[TextEncoder], clip_skip: int) -> None:
        layers = min(encoder.layers for encoder in encoders)
        if clip_skip > layers:
            raise InvalidValueError(
                f"clip_skip {clip_skip} is out of range: the text encoders of this model have {layers} layers, "
                f"so 1 to {layers}",
                "clip_skip",
            )
