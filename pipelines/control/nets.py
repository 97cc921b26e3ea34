"""ControlNets: photos -> control maps, rows -> residuals of a tick in one call."""

from __future__ import annotations

import io
import itertools
import math
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from pipelines.cache import LruCache
from pipelines.control.annotators import Annotators
from pipelines.control.passes import ControlInputs, ControlNetGraphs, ControlNetPass
from pipelines.control.residuals import PendingResiduals, ReadyResiduals, Residuals
from pipelines.control.rows import runs_of, take_rows
from pipelines.control.types import ControlBatch, ControlHint, HintUse, MissingHintsError
from pipelines.control_plan import ControlUse
from pipelines.diffusers_compat import take_map_embedder
from pipelines.errors import WeightsError
from pipelines.pictures.images import read_image, read_whole_image
from pipelines.pictures.masks import Canvas
from pipelines.plan import StagePlan
from pipelines.recordings import Capturer, padded_rows
from pipelines.torch_compat import add_each, multiplied
from pipelines.transfers import pinned, send

REMEMBERED_EMBEDDING_BYTES = 512 * 2**20
"""Embedded maps a replica keeps: 10 MB each for SDXL at 1024x1024 in half precision."""

REMEMBERED_MASKS = 16
"""Of rows of one picture in passes of union ControlNets: jobs ride together for many ticks."""


class ControlNets:
    """The ControlNets of one UNet on one device, and what prepares their maps."""

    def __init__(
        self,
        models: Mapping[str, ControlNetModel | ControlNetUnionModel],
        annotators: Annotators,
        capturer: Capturer | None = None,
    ) -> None:
        """Host `models`, by component id; `capturer` records passes that come often, None none.

        The embedding of a map depends on nothing else, so it is computed once for each map, outside of the model: at
        1024 px it would be most of a tick (ENG-4).

        Raises:
            WeightsError: a ControlNet that wants its maps in another channel order than RGB.
        """
        self._models = {component: model.eval() for component, model in models.items()}
        self.cache: LruCache[str, torch.Tensor] = LruCache(
            REMEMBERED_EMBEDDING_BYTES, lambda embedding: embedding.nbytes
        )
        for component, model in models.items():
            if model.config.controlnet_conditioning_channel_order != "rgb":
                raise WeightsError(f"component {component}: its maps are not RGB, which is not supported")
        self._embedders = {component: take_map_embedder(model) for component, model in models.items()}
        self._annotators = annotators
        self._masks: LruCache[Hashable, torch.Tensor] = LruCache(REMEMBERED_MASKS)
        self._graphs = ControlNetGraphs(capturer) if capturer is not None else None

    @property
    def captured(self) -> int:
        """Recorded passes there are."""
        return 0 if self._graphs is None else len(self._graphs.recorder)

    @property
    def failed_captures(self) -> int:
        """Kinds of passes that could not be recorded."""
        return 0 if self._graphs is None else self._graphs.recorder.failures.total()

    def prepare(
        self, photos: Sequence[bytes], stage: StagePlan, image: bytes | None = None, mask: bytes | None = None
    ) -> tuple[ControlHint, ...]:
        """The control maps of a stage, annotated here unless the request says they already are such; 0..1.

        Args:
            photos: one for each of the stage's controls, in their order.
            stage: says which they are, and their size.
            image: the picture it starts from, of which the maps show a part where a masked part alone is drawn.
            mask: of that part.

        Raises:
            InvalidValueError: the bytes are not a picture, or there is no annotator for a control.
        """
        canvas, inpaint = None, stage.inpaint
        if inpaint is not None and inpaint.area == "masked" and image is not None and mask is not None:
            canvas = Canvas.create(image, mask, inpaint, stage.width, stage.height)
        return tuple(self._prepare(*given, stage, canvas) for given in zip(photos, stage.controls, strict=True))

    def _prepare(self, photo: bytes, control: ControlUse, stage: StagePlan, canvas: Canvas | None) -> ControlHint:
        size = canvas.whole.size if canvas is not None else (stage.width, stage.height)
        image = read_image(photo, "controlnets", *size)
        image = canvas.cut(image) if canvas is not None else image
        if control.preprocess:
            image = self._annotators.annotate(control.name, image)
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
        return ControlHint(uuid.uuid4().hex, control.component, control.mode, pixels)

    def annotated(self, name: str, photo: bytes) -> bytes:
        """The control map that annotator `name` makes of a photo, as a PNG of its size.

        Raises:
            InvalidValueError: the bytes are not a picture, or there is no such annotator.
        """
        buffer = io.BytesIO()
        self._annotators.annotate(name, read_whole_image(photo, "image")).save(buffer, "PNG")
        return buffer.getvalue()

    @torch.inference_mode()
    def residuals(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Residuals:
        """Residuals of every row of `batch`: one forward pass for each ControlNet, or set of its modes, among them.

        Raises:
            MissingHintsError: a map is not in `hints`.
        """
        if missing := batch.hint_ids - hints.keys():
            raise MissingHintsError(*sorted(missing))
        groups: dict[_Pass, _Group] = {}
        for row, uses in enumerate(batch.uses):
            for together in _in_passes(uses):
                groups.setdefault(_Pass.of(together), _Group()).add(row, together)
        for network, group in groups.items():
            group.residuals = self._forward(network, group, batch, hints)
        return Residuals(tuple(_sum(list(groups.values()), len(batch.uses))))

    def _embed(self, hint: ControlHint) -> torch.Tensor:
        """Embedding `[1, channels, height, width]` of a map, in the latents' size."""
        embedding = self.cache.get(hint.id)
        if embedding is None:
            model = self._models[hint.component]
            made = self._embedders[hint.component](hint.image.to(model.device, model.dtype))
            embedding = self.cache.put(hint.id, made)
        return embedding

    def _mask(self, owners: Sequence[str], model: ControlNetModel | ControlNetUnionModel) -> torch.Tensor:
        """Which rows are of one picture: 0, or minus infinity, `[rows, rows]`, or as many columns as are recorded."""
        key = (tuple(owners), model.device, model.dtype)
        mask = self._masks.get(key)
        if mask is None:
            rows = len(owners)
            columns = rows if self._graphs is None else padded_rows(rows) or rows
            made = torch.full((rows, columns), -math.inf, dtype=model.dtype)
            for i, j in itertools.product(range(rows), repeat=2):
                if owners[i] == owners[j]:
                    made[i, j] = 0
            mask = self._masks.put(key, send(pinned(made, model.device), model.device))
        return mask

    def _forward(
        self, network: _Pass, group: _Group, batch: ControlBatch, hints: Mapping[str, ControlHint]
    ) -> Sequence[torch.Tensor]:
        """Residuals of a group's rows."""
        model = self._models[network.component]

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return take_rows(tensor, group.rows).to(model.device, model.dtype)

        columns = list(zip(*group.uses, strict=True))  # of the rows' first map, of their second, ...
        maps = tuple(torch.cat([self._embed(hints[use.hint.id]) for use in column]) for column in columns)
        scales: tuple[torch.Tensor, ...] = ()
        if len(columns) > 1:
            weights = torch.tensor([[use.weight for use in column] for column in columns], dtype=model.dtype)
            scales = send(pinned(weights, model.device), model.device).unbind()
        inputs = ControlInputs(
            sample=pick(batch.sample),
            timesteps=take_rows(batch.timesteps, group.rows).to(model.device),
            prompt_embeds=pick(batch.prompt_embeds),
            maps=maps,
            scales=scales,
            mask=(self._mask(group.owners, model),) if network.modes else (),
            added=tuple(pick(tensor) for tensor in (batch.text_embeds, batch.time_ids) if tensor is not None),
        )
        evaluated = ControlNetPass(model, network.modes)
        if self._graphs is None:
            return evaluated.evaluate(inputs)
        return self._graphs.evaluate(network.component, network.modes, evaluated, inputs)


class _Pass(NamedTuple):
    """What rows of one forward pass share."""

    component: str
    modes: tuple[int, ...]
    """Control types of the maps of each row; none for a plain ControlNet, which has one map."""

    @classmethod
    def of(cls, uses: Sequence[HintUse]) -> _Pass:
        return cls(uses[0].hint.component, tuple(use.hint.mode for use in uses if use.hint.mode is not None))


def _in_passes(uses: Sequence[HintUse]) -> Iterable[Sequence[HintUse]]:
    """The maps of a row, grouped by the pass that reads them."""
    passes: dict[Any, list[HintUse]] = {}
    for position, use in enumerate(uses):
        passes.setdefault(position if use.joint is None else use.joint, []).append(use)
    return passes.values()


class _Factor(NamedTuple):
    """What the residuals of a row are multiplied by."""

    weight: float
    guess: bool

    def applied(self, residuals: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """In guess mode from a tenth of it for the shallowest to all of it for the mid block's."""
        if not self.guess:
            return residuals
        levels = torch.logspace(-1, 0, len(residuals)).tolist()
        return multiplied(residuals, levels)


class _Group:
    """Rows of a tick that one ControlNet computes in one pass."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.uses: list[Sequence[HintUse]] = []
        self.residuals: Sequence[torch.Tensor] = ()

    def add(self, row: int, uses: Sequence[HintUse]) -> None:
        """A row with the maps of one pass; a row can have several maps of a plain ControlNet, each with a pass."""
        self.rows.append(row)
        self.uses.append(uses)

    @property
    def owners(self) -> list[str]:
        """The picture to which each row belongs, identified by its map."""
        return [uses[0].hint.id for uses in self.uses]

    @property
    def factors(self) -> list[_Factor]:
        """The factor of each row. Where one pass reads several maps, their weights have been applied before it."""
        return [_Factor(uses[0].weight if len(uses) == 1 else 1.0, uses[0].guess) for uses in self.uses]


def _sum(groups: Sequence[_Group], count: int) -> Sequence[torch.Tensor]:
    """The weighted sum of all that steers each of `count` rows; a single group of all rows as it is."""
    first = groups[0]
    if len(groups) == 1 and first.rows == list(range(count)) and set(first.factors) == {_Factor(1.0, False)}:
        return first.residuals
    totals = [part.new_zeros(count, *part.shape[1:]) for part in first.residuals]
    for group in groups:
        factors = group.factors
        for run in runs_of(group.rows, factors):
            factor = factors[run.position]
            targets, parts = [t[run.rows] for t in totals], [part[run.picked] for part in group.residuals]
            add_each(targets, factor.applied(parts), factor.weight)
    return totals


class ColocatedControl:
    """ControlNets in the denoiser's own process: residuals are not copied, and the two networks do not overlap."""

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
