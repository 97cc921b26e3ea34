"""ControlNets: photos -> control maps, rows -> residuals of a tick in one call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from pipelines.cache import LruCache
from pipelines.control.annotators import Annotators
from pipelines.control.passes import ControlInputs, ControlNetGraphs, ControlNetPass
from pipelines.control.residuals import PendingResiduals, ReadyResiduals, Residuals
from pipelines.control.rows import runs_of, take_rows
from pipelines.control.types import ControlBatch, ControlHint, HintUse, MissingHintsError
from pipelines.diffusers_compat import take_map_embedder
from pipelines.errors import WeightsError
from pipelines.pictures.images import read_image
from pipelines.plan import ControlUse
from pipelines.recordings import Capturer
from pipelines.torch_compat import add_each

REMEMBERED_EMBEDDINGS = 64
"""Embedded maps a ControlNet keeps: 10 MB each for SDXL at 1024x1024 in half precision."""


class ControlNets:
    """The ControlNets of one UNet on one device, and what prepares their maps."""

    def __init__(
        self,
        models: Mapping[str, ControlNetModel | ControlNetUnionModel],
        annotators: Annotators,
        capturer: Capturer | None = None,
    ) -> None:
        """Host `models`, by component id; `capturer` records passes that come often, None none.

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
        self._graphs = ControlNetGraphs(capturer) if capturer is not None else None

    @property
    def captured(self) -> int:
        """Recorded passes there are."""
        return 0 if self._graphs is None else len(self._graphs.recorder)

    @property
    def failed_captures(self) -> int:
        """Kinds of passes that could not be recorded."""
        return 0 if self._graphs is None else self._graphs.recorder.failures.total()

    def prepare(self, photo: bytes, control: ControlUse, width: int, height: int) -> ControlHint:
        """The control map of a photo, annotated here unless the request says it already is one; 0..1, not normalised.

        Raises:
            InvalidValueError: the bytes are not a picture, or there is no annotator for this control.
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
        if missing := batch.hint_ids - hints.keys():
            raise MissingHintsError(*sorted(missing))
        groups: dict[tuple[str, int | None], _Group] = {}
        for row, uses in enumerate(batch.uses):
            for use in uses:
                groups.setdefault((use.hint.component, use.hint.mode), _Group()).add(row, use)
        for group in groups.values():
            group.residuals = self._forward(group, batch, hints)
        return Residuals(tuple(_sum(list(groups.values()), len(batch.uses))))

    def _embed(self, hint: ControlHint) -> torch.Tensor:
        """Embedding `[1, channels, height, width]` of a map, in the latents' size."""
        embedding = self.cache.get(hint.id)
        if embedding is None:
            model = self._models[hint.component]
            made = self._embedders[hint.component](hint.image.to(model.device, model.dtype))
            embedding = self.cache.put(hint.id, made)
        return embedding

    def _forward(self, group: _Group, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Sequence[torch.Tensor]:
        """Residuals of a group's rows, which share a ControlNet and a mode."""
        component, mode = group.uses[0].hint.component, group.uses[0].hint.mode
        model = self._models[component]

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return take_rows(tensor, group.rows).to(model.device, model.dtype)

        inputs = ControlInputs(
            sample=pick(batch.sample),
            timesteps=take_rows(batch.timesteps, group.rows).to(model.device),
            prompt_embeds=pick(batch.prompt_embeds),
            maps=torch.cat([self._embed(hints[use.hint.id]) for use in group.uses]),
            added=tuple(pick(tensor) for tensor in (batch.text_embeds, batch.time_ids) if tensor is not None),
        )
        network = ControlNetPass(model, mode)
        if self._graphs is None:
            return network.evaluate(inputs)
        return self._graphs.evaluate(component, mode, network, inputs)


class _Group:
    """Rows of a tick that one ControlNet computes in one pass."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.uses: list[HintUse] = []
        self.residuals: Sequence[torch.Tensor] = ()

    def add(self, row: int, use: HintUse) -> None:
        """A map of a row; a row can have several of one ControlNet."""
        self.rows.append(row)
        self.uses.append(use)


def _sum(groups: Sequence[_Group], count: int) -> Sequence[torch.Tensor]:
    """The weighted sum of all that steers each of `count` rows; a single group of all rows as it is."""
    first = groups[0]
    if len(groups) == 1 and first.rows == list(range(count)) and all(use.weight == 1 for use in first.uses):
        return first.residuals
    totals = [part.new_zeros(count, *part.shape[1:]) for part in first.residuals]
    for group in groups:
        weights = [use.weight for use in group.uses]
        for run in runs_of(group.rows, weights):
            targets, parts = [t[run.rows] for t in totals], [part[run.picked] for part in group.residuals]
            add_each(targets, parts, weights[run.position])
    return totals


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
