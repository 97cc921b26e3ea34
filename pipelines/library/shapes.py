"""Which models of a catalog a file belongs to: by its architecture, or where that is no published one, by its shapes.

Headers alone are read. Weights that are not on this machine are known by the architecture that the catalog says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from config.catalog import ROOT, Architecture, Catalog, ComponentSpec
from config.sources import CheckpointSource, FolderSource
from pipelines.library.files import LibraryFile
from pipelines.weights.headers import Tensor, read_header
from pipelines.weights.kinds.models import LATENT_CHANNELS, UNET_PREFIXES
from pipelines.weights.kinds.unets import read_unet

Shape = tuple[int, ...]
_SUBFOLDERS = {"unet": "unet", "vae": "vae", "controlnet": ""}
_DOWN = re.compile(r"[._](lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.[^.]+)?\.weight$")
_UP = {"lora_down": "lora_up", "lora_A": "lora_B", "lora.down": "lora.up"}
_UP |= {"lora_linear_layer.down": "lora_linear_layer.up"}
_OF_TEXT = re.compile(r"^(base_model\.model\.)?(lora_te|lycoris_te|te\d?[._]|text_encoder|text_model)")


CONTEXTS: Mapping[Architecture, int] = {"sd15": 768, "sd2": 1024, "sdxl": 2048, "ssd": 2048, "sdxl-refiner": 1280}
"""Width of the text states that published UNets read."""


@dataclass(frozen=True)
class UNetFacts:
    """What is known of a UNet without its tensors.

    Attributes:
        architecture: the published one it is built like, None for any other.
        context: width of the text states it reads.
        shapes: of all its tensors, None where they are not on this machine.
        first: of its first layer's weights among them, which tells how many channels it takes.
    """

    architecture: Architecture | None
    context: int | None
    shapes: Counter[Shape] | None
    first: Shape | None = None

    @property
    def channels(self) -> int:
        """Channels it takes; of one whose weights are not here, as many as published latents have."""
        return LATENT_CHANNELS if self.first is None else self.first[1]

    @property
    def text_width(self) -> int | None:
        """How wide the text states are that it reads, None where nothing tells."""
        return self.context or (None if self.architecture is None else CONTEXTS[self.architecture])

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> UNetFacts | None:
        """Of a header that holds a UNet."""
        unet = read_unet(tensors, UNET_PREFIXES)
        if unet is None:
            return None
        own = (tensor.shape for name, tensor in tensors.items() if name.startswith(unet.prefix))
        return cls(unet.base, unet.context, Counter(own), unet.first)

    @classmethod
    def of_component(cls, spec: ComponentSpec) -> UNetFacts:
        """Of a component of a catalog, as far as its weights are on this machine."""
        tensors: dict[str, Tensor] = {}
        for path in weights_of(spec):
            tensors |= read_header(path).tensors
        return cls.of_tensors(tensors) or cls(spec.architecture, None, None)

    def same(self, other: UNetFacts) -> bool:
        """Whether one configuration fits both, but for the channels that they take."""
        if self.architecture is not None or other.architecture is not None:
            return self.architecture == other.architecture
        return self.shapes is not None and other.shapes is not None and self._behind_first == other._behind_first

    @property
    def _behind_first(self) -> Counter[Shape]:
        assert self.shapes is not None
        assert self.first is not None
        return self.shapes - Counter([self.first]) + Counter([(self.first[0], 0, *self.first[2:])])


def weights_of(spec: ComponentSpec) -> Iterator[Path]:
    """The files of a component's weights, where they lie on this machine; none for the hub's."""
    if isinstance(spec.source, CheckpointSource):
        yield absolute(spec.source.checkpoint)
        return
    if not isinstance(spec.source, FolderSource):
        return
    folder = absolute(spec.source.folder)
    for part in ("text_encoder", "text_encoder_2") if spec.kind == "text_encoder" else (spec.kind,):
        usual = part if spec.kind == "text_encoder" else _SUBFOLDERS[part]
        here = folder / (usual if spec.subfolder is None else spec.subfolder)
        # A whole file before a variant, as the loaders choose.
        whole = sorted(here.glob("*.safetensors"), key=lambda path: len(path.name))
        stems = [path for path in whole if not re.search(r"-\d{5}-of-", path.name)]
        yield from stems[:1] or whole


def absolute(path: Path) -> Path:
    """A source's path, which may be relative to the repository."""
    return path if path.is_absolute() else ROOT / path


def plain_unets(catalog: Catalog) -> dict[str, UNetFacts]:
    """UNet id -> what is known of it, of every model that is served."""
    ids = dict.fromkeys(model.unet for model in catalog.available_models())
    return {unet: UNetFacts.of_component(catalog.component(unet)) for unet in ids}


def bases_of(file: LibraryFile, unets: Mapping[str, UNetFacts]) -> tuple[str, ...]:
    """Ids of the UNets that an adapter was made for: of its architecture; of no published one, where it fits."""
    report = file.report
    try:
        layers = _layers(read_header(file.file).tensors)
    except (OSError, ValueError):
        return ()
    alike = {unet for unet, facts in unets.items() if facts.architecture and facts.architecture == report.base}
    odd = {unet for unet, facts in unets.items() if not facts.architecture and _fits(report.context, layers, facts)}
    return tuple(unet for unet in unets if unet in alike | odd)


def _fits(context: int | None, layers: Counter[tuple[int, int]], facts: UNetFacts) -> bool:
    """Whether a UNet has every layer that an adapter changes, and reads text as wide."""
    if context is not None and facts.context is not None and context != facts.context:
        return False
    if facts.shapes is None:
        return False
    modules: Counter[tuple[int, int]] = Counter()
    for shape, count in facts.shapes.items():
        if len(shape) in (2, 4):
            modules[shape[0], shape[1]] += count
    return layers <= modules if layers else context is not None


def _layers(tensors: Mapping[str, Tensor]) -> Counter[tuple[int, int]]:
    """How wide the UNet's layers are that a LoRA changes: outputs and inputs of each; none of other adapters."""
    found: Counter[tuple[int, int]] = Counter()
    for key, tensor in tensors.items():
        match = _DOWN.search(key)
        if match is None or _OF_TEXT.search(key) or len(tensor.shape) not in (2, 4):
            continue
        up = tensors.get(key[: match.start(1)] + _UP[match[1]] + key[match.end(1) :])
        if up is not None and len(up.shape) in (2, 4):
            found[up.shape[0], tensor.shape[1]] += 1
    return found
