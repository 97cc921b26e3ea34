"""Textual inversions: vectors that stand in a prompt where a token would (Gal et al. 2022, arXiv:2208.01618).

A prompt says `<name>`. The vectors get ids behind the vocabulary's own, a new one for each that is loaded, so that
what was encoded with one is never taken for another.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipelines.cache import LruCache
from pipelines.errors import InvalidValueError
from pipelines.loads import Loads, Needed
from pipelines.plan import EmbeddingUse
from pipelines.weights.tensor_file import TensorFile

PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""How trainers call the vectors for SDXL's two text encoders."""
CACHED = 256
"""Textual inversions that a text encoder keeps; each is some kilobytes."""


def read_inversion(path: Path, name: str, part: str, pair: bool) -> torch.Tensor:
    """The vectors that a `.safetensors` file has for one text encoder, `[vectors, width]`.

    Args:
        path: the file.
        name: public name, for messages.
        part: `text_encoder` or `text_encoder_2`.
        pair: whether the model has two text encoders.

    Raises:
        InvalidValueError: it holds something else, or nothing for this model.
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """

    def refuse(reason: str) -> InvalidValueError:
        return InvalidValueError(f"embedding '<{name}>' ({path.name}) {reason}", "prompt")

    with TensorFile(path) as file:
        keys = list(file.tensors)
        if pair:
            own = next((pair for pair in PAIRS if set(pair) <= set(keys)), None)
            if own is None:
                raise refuse(
                    "has vectors for one text encoder; this model has two, whose vectors are clip_l and clip_g"
                )
            key = own[0 if part == "text_encoder" else 1]
        elif len(keys) == 1 or "emb_params" in keys:  # A1111 calls them so, diffusers by the token
            key = "emb_params" if "emb_params" in keys else keys[0]
        else:
            raise refuse(f"has {len(keys)} tensors; this model's text encoder takes one, of vectors")
        vectors: torch.Tensor = file.read(key)
    if vectors.ndim not in (1, 2) or not vectors.numel():
        raise refuse(f"has {key} of shape {list(vectors.shape)}; vectors are [vectors, width]")
    vectors = vectors.float().reshape(-1, vectors.shape[-1])
    if not bool(vectors.isfinite().all()):
        raise refuse(f"has values that are not finite numbers: {key}")
    return vectors


@dataclass(frozen=True)
class Inversion:
    """A loaded textual inversion."""

    first_id: int
    vectors: torch.Tensor
    """`[vectors, width]`, on the text encoder's device."""

    @property
    def ids(self) -> range:
        """The ids that stand for its vectors among a prompt's tokens."""
        return range(self.first_id, self.first_id + len(self.vectors))


class Inversions:
    """The textual inversions of one text encoder. What is placed belongs to the encoder's own thread."""

    def __init__(self, embedding: nn.Embedding, read: Callable[[EmbeddingUse, str], torch.Tensor]) -> None:
        """Stand in for `embedding` where a prompt has vectors of its own; `read(use, base)` reads them."""
        self._embedding = embedding
        self._read = read
        self._ids = itertools.count(embedding.num_embeddings)
        self._ids_lock = threading.Lock()
        self._loads: Loads[tuple[EmbeddingUse, str], Inversion] = Loads(self._load, LruCache(CACHED))
        self._placed: tuple[list[int], torch.Tensor] | None = None
        embedding.register_forward_hook(self._replace)

    def load(self, uses: Sequence[EmbeddingUse], base: str) -> dict[str, Inversion]:
        """By name, loaded now where they have to be.

        Raises:
            InvalidValueError: one is of another width than the encoder's vectors.
        """
        return {use.name: self._loads.get((use, base)) for use in uses}

    def needed(self, uses: Sequence[EmbeddingUse], base: str) -> Sequence[Needed]:
        """The inversions that `load` needs."""
        return [Needed(self._loads, (use, base)) for use in uses]

    def _load(self, key: tuple[EmbeddingUse, str]) -> Inversion:
        use, base = key
        vectors = self._read(use, base)
        width = self._embedding.embedding_dim
        if vectors.shape[1] != width:
            reason = f"has vectors of {vectors.shape[1]} numbers, this model's text encoder takes {width}"
            raise InvalidValueError(f"embedding '<{use.name}>' {reason}", "prompt")
        with self._ids_lock:  # those of one inversion follow one another
            first, *_ = [next(self._ids) for _ in vectors]
        return Inversion(first, vectors.to(self._embedding.weight))

    def split(self, text: str, known: Mapping[str, Inversion]) -> list[str | Inversion]:
        """A text's pieces: what the tokenizer reads, and vectors."""
        if not known:
            return [text]
        pieces = re.split(f"<({'|'.join(map(re.escape, known))})>", text)
        return [known[piece] if index % 2 else piece for index, piece in enumerate(pieces)]

    def place(self, ids: Sequence[int], known: Mapping[str, Inversion]) -> list[int]:
        """The ids that the model is given: token 0 in the places of vectors, which the next pass puts there.

        It is the start or any other token but the end, by which old configurations find the place of the pooled state.
        """
        vectors = {id: vector for own in known.values() for id, vector in zip(own.ids, own.vectors, strict=True)}
        places = [place for place, id in enumerate(ids) if id in vectors]
        self._placed = (places, torch.stack([vectors[ids[place]] for place in places])) if places else None
        return [0 if id in vectors else id for id in ids]

    def _replace(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if self._placed is None:
            return output
        places, vectors = self._placed
        changed = output.clone()
        changed[:, places] = vectors
        return changed
