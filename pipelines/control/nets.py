"""ControlNet: hints, residuals of a tick's rows in one call, and their late binding into the UNet.

A UNet needs the residuals only on its way up. So the call starts first, the UNet's down and mid blocks run meanwhile,
and pre-hooks of the up blocks add what came back: bit-equal to passing them as arguments.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel

from pipelines.cache import LruCache
from pipelines.control.annotators import Annotators
from pipelines.errors import WeightsError
from pipelines.pictures.images import read_image
from pipelines.plan import ControlUse
from pipelines.tensors import TensorBundle

REMEMBERED_EMBEDDINGS = 64
"""Embedded maps a ControlNet keeps: 10 MB each for SDXL at 1024x1024 in half precision."""


@dataclass(frozen=True)
class ControlHint(TensorBundle):
    """A control map, ready for its ControlNet.

    Attributes:
        id: names the map in the ticks that use it, so that it is not sent again.
        component: the ControlNet.
        mode: control type of a union ControlNet, None for a plain one.
        image: `[1, 3, height, width]` in pixels of the picture, 0..1.
    """

    id: str
    component: str
    mode: int | None
    image: torch.Tensor


@dataclass(frozen=True)
class ControlBatch(TensorBundle):
    """The rows of one tick that need residuals, whichever ControlNet of the family they need.

    Attributes:
        hints: `(hint id, component, mode)` of each row.
        sample: `[rows, channels, height, width]`, as the UNet sees them.
        timesteps: `[rows]`.
        prompt_embeds: `[rows, tokens, width]`.
        text_embeds: `[rows, projection]`, SDXL only.
        time_ids: `[rows, ids]`, SDXL only.
    """

    hints: tuple[tuple[str, str, int | None], ...]
    sample: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Residuals:
    """Residuals of all rows as one flat array: 27 MB took 12 ms across an edge so, 72 ms as torch tensors.

    Attributes:
        flat: the down residuals in order and the mid residual, each `[rows, channels, height, width]`, end to end.
        shapes: of each.
    """

    flat: np.ndarray
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def pack(cls, tensors: Sequence[torch.Tensor]) -> Residuals:
        """Flatten the tensors of a forward pass."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors]).cpu()
        flat = flat.float() if flat.dtype is torch.bfloat16 else flat
        return cls(flat.numpy(), tuple(tuple(t.shape) for t in tensors))

    def unpack(self, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        """The tensors again."""
        array = self.flat if self.flat.flags.writeable else self.flat.copy()
        flat = torch.from_numpy(array).to(device, dtype)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class PendingResiduals(Protocol):
    """Residuals under way."""

    def result(self) -> Residuals:
        """Wait for them; raises what the computation raised."""
        ...


class ControlSource(Protocol):
    """Where a denoiser gets residuals from: a ControlNet in this process, or another deployment."""

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingResiduals:
        """Begin; `hints` holds the maps of every row, for a source that has not seen them yet."""
        ...


class MissingHintsError(LookupError):
    """A ControlNet was asked about maps it has not got: it was started, or it forgot them. Send them along."""


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
        self._embedders = {component: model.controlnet_cond_embedding for component, model in models.items()}
        self.cache: LruCache[str, torch.Tensor] = LruCache(REMEMBERED_EMBEDDINGS)
        for component, model in models.items():
            if model.config.controlnet_conditioning_channel_order != "rgb":
                raise WeightsError(f"component {component}: its maps are not RGB, which is not supported")
            model.controlnet_cond_embedding = torch.nn.Identity()
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
        if missing := {hint for hint, _, _ in batch.hints} - hints.keys():
            raise MissingHintsError(*sorted(missing))
        groups: dict[tuple[str, int | None], list[int]] = {}
        for row, (_, component, mode) in enumerate(batch.hints):
            groups.setdefault((component, mode), []).append(row)
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

        condition = torch.cat([self._embed(hints[batch.hints[row][0]]) for row in rows])
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
        return _Done(self.nets.residuals(batch, hints))


@dataclass(frozen=True)
class _Done:
    residuals: Residuals

    def result(self) -> Residuals:
        return self.residuals


@dataclass(frozen=True)
class ControlledRows:
    """The rows of a StepBatch that get residuals: row `rows[i]` of the batch is row i of `pending`."""

    rows: tuple[int, ...]
    pending: PendingResiduals


class LateBinding:
    """Pre-hooks on a UNet's up blocks, which add residuals when the UNet gets there."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet
        self._controlled: ControlledRows | None = None
        self._residuals: list[torch.Tensor] | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        for block in unet.up_blocks:
            block.register_forward_pre_hook(self._before_up_block, with_kwargs=True)

    @contextmanager
    def bound(self, controlled: ControlledRows | None) -> Iterator[None]:
        """Within the block, the UNet's next pass adds these residuals."""
        self._controlled, self._residuals = controlled, None
        try:
            yield
        finally:
            self._controlled, self._residuals = None, None

    def _before_up_block(
        self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._controlled is None:
            return None
        if self._residuals is None:  # the first up block: wait here, and add the mid residual
            self._residuals = self._controlled.pending.result().unpack(self._unet.device, self._unet.dtype)
            self._rows = torch.tensor(self._controlled.rows, device=self._unet.device)
            kwargs["hidden_states"] = self._add(kwargs["hidden_states"], self._residuals.pop())
        skips = kwargs["res_hidden_states_tuple"]
        own = self._residuals[-len(skips) :]
        del self._residuals[-len(skips) :]
        kwargs["res_hidden_states_tuple"] = tuple(self._add(skip, r) for skip, r in zip(skips, own, strict=True))
        return args, kwargs

    def _add(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return hidden.index_add(0, self._rows, residual)
