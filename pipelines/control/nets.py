"""ControlNets: photos -> control maps, rows -> residuals of a tick in one call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from pipelines.cache import LruCache
from pipelines.control.annotators import Annotators
from pipelines.control.types import (
    ControlBatch,
    ControlHint,
    MissingHintsError,
    PendingResiduals,
    ReadyResiduals,
    Residuals,
)
from pipelines.diffusers_compat import take_map_embedder
from pipelines.errors import WeightsError
from pipelines.pictures.images import read_image
from pipelines.plan import ControlUse

REMEMBERED_EMBEDDINGS = 64
"""Embedded maps a ControlNet keeps: 10 MB each for SDXL at 1024x1024 in half precision."""


class ControlNets:
    """The ControlNets of one UNet on one device, and what prepares their maps."""

    def __init__(self, models: Mapping[str, ControlNetModel | ControlNetUnionModel], annotators: Annotators) -> None:
        """Host `models`, by component id.

        A map's embedding depends on nothing else, so it is made once a map and the model's own layer stands aside: at
        1024 px it would be most of a tick.

        Raises:
            WeightsError: a ControlNet that wants its maps in another channel order than RGB.
        """
        self._models = {component: model.eval() for component, model in models.items()}
        self.cache: LruCache[str, torch.Tensor] = LruCache(REMEMBERED_EMBEDDINGS)
        for component, model in models.items():
            if model.config.controlnet_conditioning_channel_order != "rgb":
                raise WeightsError(f"component {component}: its maps are not RGB, which is not supported")
        self._embedders = {component: take_map_embedder(model) for component, model in models.items()}
        self._annotators = annotators

    def prepare(self, photo: bytes, control: ControlUse, width: int, height: int) -> ControlHint:
        """The control map of a photo, annotated here unless the request says it already is one; 0..1, not normalised.

        Raises:
            InvalidValueError: the bytes are no picture, or there is no annotator for this control.
        """
        image = read_image(photo, "controlnet_image", width, height)
        if control.preprocess:
            image = self._annotators.annotate(control.name, image)
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
        return ControlHint(uuid.uuid4().hex, control.component, control.mode, pixels)

    @torch.inference_mode()
    def residuals(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Residuals:
        """Residuals of every row of `batch`: one forward pass for each (ControlNet, mode) among them.

        Raises:
            MissingHintsError: a map is not in `hints`.
        """
        if missing := {hint.id for hint in batch.hints} - hints.keys():
            raise MissingHintsError(*sorted(missing))
        groups: dict[tuple[str, int | None], list[int]] = {}
        for row, hint in enumerate(batch.hints):
            groups.setdefault((hint.component, hint.mode), []).append(row)
        parts = [self._forward(component, mode, rows, batch, hints) for (component, mode), rows in groups.items()]
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        return Residuals.pack([torch.cat(tensors)[order] for tensors in zip(*parts, strict=True)])

    def _embed(self, hint: ControlHint) -> torch.Tensor:
        """Embedding `[1, channels, height, width]` of a map, in the latents' size."""
        embedding = self.cache.get(hint.id)
        if embedding is None:
            model = self._models[hint.component]
            made = self._embedders[hint.component](hint.image.to(model.device, model.dtype))
            embedding = self.cache.put(hint.id, made)
        return embedding

    def _forward(
        self, component: str, mode: int | None, rows: list[int], batch: ControlBatch, hints: Mapping[str, ControlHint]
    ) -> list[torch.Tensor]:
        model = self._models[component]
        like = {"device": model.device, "dtype": model.dtype}

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[rows].to(**like)

        condition = torch.cat([self._embed(hints[batch.hints[row].id]) for row in rows])
        added = {"text_embeds": batch.text_embeds, "time_ids": batch.time_ids}
        arguments: dict[str, Any] = {
            "encoder_hidden_states": pick(batch.prompt_embeds),
            "added_cond_kwargs": {name: pick(t) for name, t in added.items() if t is not None} or None,
            "return_dict": False,
        }
        if mode is None:
            arguments["controlnet_cond"] = condition
        else:
            control_type = torch.zeros(len(rows), model.config.num_control_type, **like)
            control_type[:, mode] = 1
            arguments |= {"controlnet_cond": [condition], "control_type": control_type, "control_type_idx": [mode]}
        timesteps = batch.timesteps[rows].to(model.device)
        down, mid = model(pick(batch.sample), timesteps, **arguments)
        return [*down, mid]


class ColocatedControl:
    """ControlNets in the denoiser's own process, for hosts with one GPU: nothing travels, nothing overlaps."""

    def __init__(self, nets: ControlNets) -> None:
        self.nets = nets

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingResiduals:
        """Compute now."""
        return ReadyResiduals(self.nets.residuals(batch, hints))


class LazyControl:
    """Colocated ControlNets that are loaded when a job first brings a hint."""

    def __init__(self, load: Callable[[], ControlNets]) -> None:
        self._load = load

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingResiduals:
        """Compute now, after loading where it was not done yet; `load` remembers what it loaded."""
        return ReadyResiduals(self._load().residuals(batch, hints))
