"""The catalog: which models this server offers, of which components they are made, and where the weights lie.

A catalog is a folder of YAML files, one for each field of `Catalog` but the styles. Everything the ingress needs to
validate a request stands here, so that it never has to open weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from config.adapters import EmbeddingSpec as EmbeddingSpec
from config.adapters import LoraSpec as LoraSpec
from config.adapters import LoraWeights as LoraWeights
from config.annotators import WEIGHTLESS_ANNOTATORS as WEIGHTLESS_ANNOTATORS
from config.annotators import AnnotatorSpec as AnnotatorSpec
from config.choices import Choices, UnknownChoiceError
from config.components import ARCHITECTURES as ARCHITECTURES
from config.components import Architecture as Architecture
from config.components import ComponentSpec as ComponentSpec
from config.components import Family as Family
from config.components import Size as Size
from config.library import UnservedFile
from config.model_names import ModelNames
from config.sources import FolderSource, Spec
from config.styles import StylePreset as StylePreset
from config.upscalers import LATENT_METHODS, METHOD_ALIASES, PICTURE_METHODS
from config.upscalers import UpscalerSpec as UpscalerSpec

T = TypeVar("T")

HERE = Path(__file__).parent
ROOT = HERE.parent


class CatalogError(ValueError):
    """The catalog contradicts itself; the message names the entry."""


class ModelDefaults(Spec):
    """Values of absent request fields: the API's defaults, or a model's own where those do not work for it."""

    width: int = 1024
    height: int = 1024
    steps: int = 30
    cfg_scale: float = 5.0
    sampler: str = "DPM++ 2M SDE Heun Karras"
    strength: float = 0.8


class ModelSpec(Spec):
    """One name a request may ask for, and the components that answer it."""

    name: str
    aliases: tuple[str, ...] = ()
    family: Family
    text_encoder: str
    unet: str
    vae: str
    refiner: str | None = None
    defaults: ModelDefaults = ModelDefaults()
    size_multiple: int = Field(default=8, ge=8, multiple_of=8)
    """Width and height must be multiples of this, in pixels; the VAE's own downscale factor divides it."""
    sizes: tuple[Size, ...] = Field(min_length=1)
    """Sizes the model draws best."""
    tvm_sizes: tuple[Size, ...] = ()
    edm: bool = False
    """Trained in the EDM formulation (Karras et al. 2022): takes the EDM samplers and no other."""
    max_prompt_chunks: int = Field(default=16, ge=1)
    """A text longer than a text encoder's context is read in chunks of it; more than these are refused."""
    requires_controlnet: bool = False
    """True for the API's names that require exactly one control map; other models take any number of them, or none."""
    unavailable: str | None = None
    """Why this server does not serve the name, when it does not."""

    @property
    def default_size(self) -> Size:
        """Size of a picture whose request names none."""
        return Size(width=self.defaults.width, height=self.defaults.height)

    @property
    def components(self) -> tuple[str, ...]:
        """Ids of every component the model may need."""
        return tuple(i for i in (self.text_encoder, self.unet, self.refiner, self.vae) if i is not None)


class ControlNetSpec(Spec):
    """A ControlNet of one UNet: what `controlnet_name` and `controlnets` select, and the models that draw with it."""

    name: str
    models: tuple[str, ...]
    component: str
    mode: int | None = None
    """Control type of this control in a union ControlNet."""


def _aliases(entries: Iterable[ModelSpec | LoraSpec | StylePreset | UpscalerSpec]) -> dict[str, str]:
    """Alias -> name, of every entry."""
    return {alias: entry.name for entry in entries for alias in entry.aliases}


def in_a_line(error: ValidationError) -> str:
    """A validation error in one line: the location and the problem of each entry."""
    told = error.errors(include_url=False)
    parts = (".".join(str(part) for part in e["loc"]) + ": " * bool(e["loc"]) + e["msg"] for e in told)
    return "; ".join(part.replace("Value error, ", "") for part in parts)


def _named(kind: str, entries: Mapping[str, T], name: str) -> T:
    """The entry of this name; otherwise a KeyError that lists the names there are."""
    try:
        return entries[name]
    except KeyError:
        raise KeyError(f"{kind} '{name}' is not in the catalog, which has {list(entries)}") from None


class Catalog(Spec):
    """Everything on offer, cross-checked."""

    components: tuple[ComponentSpec, ...]
    models: tuple[ModelSpec, ...]
    controlnets: tuple[ControlNetSpec, ...] = ()
    annotators: tuple[AnnotatorSpec, ...] = ()
    loras: tuple[LoraSpec, ...] = ()
    embeddings: tuple[EmbeddingSpec, ...] = ()
    upscalers: tuple[UpscalerSpec, ...] = ()
    styles: tuple[StylePreset, ...] = ()
    model_names: ModelNames = ModelNames()
    library: tuple[Path, ...] = ()
    """Folders of the library that this catalog was extended by."""
    unserved: tuple[UnservedFile, ...] = ()
    """Files of the library that are not served, each with the reason."""

    @classmethod
    def load(cls, name: str | Path) -> Catalog:
        """Read `config/catalogs/<name>` (or the folder `name` itself) and `styles.yaml`.

        Raises:
            CatalogError: the folder is missing, a file is not valid, or entries contradict each other.
        """
        folder = HERE / "catalogs" / name if not Path(name).is_absolute() else Path(name)
        if not folder.is_dir():
            known = sorted(p.name for p in (HERE / "catalogs").iterdir() if p.is_dir())
            raise CatalogError(f"catalog '{name}' not found; the built-in ones are {known}, or give an absolute folder")
        parts = {p.stem: yaml.safe_load(p.read_text()) or [] for p in sorted(folder.glob("*.yaml"))}
        parts["styles"] = yaml.safe_load((HERE / "styles.yaml").read_text())
        try:
            return cls.model_validate(parts)
        except ValidationError as error:
            raise CatalogError(f"catalog '{name}': {in_a_line(error)}") from error

    @model_validator(mode="after")
    def _cross_check(self) -> Catalog:
        components = {c.id: c for c in self.components}
        if len(components) != len(self.components):
            raise ValueError("two components share an id")
        self.model_choices()  # two names that differ by case alone fail here, and aliases of nothing
        if self.model_names.default not in (None, *(m.name for m in self.models)):
            raise ValueError(f"model_names: the default '{self.model_names.default}' is not a model")
        self.style_choices()
        self.lora_choices()
        self.embedding_choices()
        for model in self.models:
            self._check_model(model, components)
        for component in self.components:
            if len({m.vae for m in self.models if component.id in (m.unet, m.refiner)}) > 1:
                raise ValueError(f"component {component.id}: its models decode with different VAEs")
        names = {m.name for m in self.models}
        for control in self.controlnets:
            if unknown := set(control.models) - names:
                raise ValueError(f"controlnet {control.name}: unknown models {sorted(unknown)}")
            steering = components.get(control.component)
            if steering is None or steering.kind != "controlnet" or steering.union != (control.mode is not None):
                raise ValueError(
                    f"controlnet {control.name}: '{control.component}' is not a ControlNet, or mode and union disagree"
                )
            if bases := {self.model(m).unet for m in control.models} - {steering.base}:
                raise ValueError(f"controlnet {control.name}: {control.component} does not steer {sorted(bases)}")
        self.upscaler_choices()
        for upscaler in self.upscalers:
            found = components.get(upscaler.component)
            if found is None or found.kind != "upscaler":
                raise ValueError(f"upscaler {upscaler.name}: '{upscaler.component}' is not an upscaler component")
        for kind, entries in (("lora", self.loras), ("embedding", self.embeddings)):
            for entry in entries:
                if unknown := set(entry.bases) - set(components):
                    raise ValueError(f"{kind} {entry.name}: unknown bases {sorted(unknown)}")
                if not entry.weights and entry.unavailable is None:
                    raise ValueError(
                        f"{kind} {entry.name}: give its weights, or say in 'unavailable' why there are none"
                    )
        return self

    def _check_model(self, model: ModelSpec, components: dict[str, ComponentSpec]) -> None:
        wanted = {"text_encoder": model.text_encoder, "unet": model.unet, "vae": model.vae, "refiner": model.refiner}
        for role, component_id in wanted.items():
            if component_id is None:
                continue
            component = components.get(component_id)
            kind = "unet" if role == "refiner" else role
            if component is None or component.kind != kind or component.family != model.family:
                raise ValueError(
                    f"model {model.name}: {role} '{component_id}' is not an {model.family} {kind} component"
                )
            if kind == "unet" and not component.text_encoders:
                raise ValueError(f"component {component_id}: say which text_encoders feed this UNet")
            if role == "refiner" and component.inpainting:
                raise ValueError(f"model {model.name}: refiner '{component_id}' is a UNet for inpainting")
        if model.refiner and model.family != "sdxl":
            raise ValueError(f"model {model.name}: a refiner belongs to the SDXL family")
        for size in (*model.sizes, *model.tvm_sizes, model.default_size):
            if size.width % model.size_multiple or size.height % model.size_multiple:
                raise ValueError(f"model {model.name}: size {size} is not a multiple of {model.size_multiple}")
        if model.requires_controlnet and not self.controls_of(model.name) and model.unavailable is None:
            raise ValueError(f"model {model.name}: requires_controlnet, and no ControlNet is listed for it")

    def model_choices(self) -> Choices:
        """Every model name, available or not."""
        aliases = _aliases(self.models) | dict(self.model_names.aliases)
        return Choices("model_name", [m.name for m in self.models], aliases)

    def default_model(self) -> str:
        """What draws where a request names no model."""
        served = self.available_models()
        if self.model_names.default in {m.name for m in served}:
            return str(self.model_names.default)
        return next((m.name for m in served if not m.requires_controlnet), served[0].name)

    def sizes_of(self, model: str) -> tuple[Size, ...]:
        """The sizes that a model draws best, by any of its names; none of one that is not there."""
        try:
            return self.model(self.model_choices().resolve(model)).sizes
        except UnknownChoiceError:
            return ()

    def lora_choices(self) -> Choices:
        """Every LoRA, available or not."""
        return Choices("loras", [lora.name for lora in self.loras], _aliases(self.loras))

    def embedding_choices(self) -> Choices:
        """Every textual inversion, available or not."""
        return Choices("embeddings", [embedding.name for embedding in self.embeddings])

    def upscaler_choices(self, field: str = "upscaler", latents: bool = True) -> Choices:
        """What a request's `field` may name; `latents` where there are some to interpolate."""
        methods = [*(LATENT_METHODS if latents else ()), *PICTURE_METHODS]
        aliases = {alias: name for alias, name in METHOD_ALIASES.items() if name in methods}
        names = [*methods, *(entry.name for entry in self.upscalers)]
        return Choices(field, names, aliases | _aliases(self.upscalers))

    def style_choices(self) -> Choices:
        """Every style preset with its aliases."""
        return Choices("style_preset", [s.name for s in self.styles], _aliases(self.styles))

    def available_models(self) -> tuple[ModelSpec, ...]:
        """Models a request may name now."""
        return tuple(m for m in self.models if m.unavailable is None)

    def model(self, name: str) -> ModelSpec:
        """The model of this canonical name; KeyError if there is none."""
        return _named("model", {m.name: m for m in self.models}, name)

    def upscaler_component(self, name: str) -> str | None:
        """The component of the model of this canonical name; None for what needs no weights."""
        return next((entry.component for entry in self.upscalers if entry.name == name), None)

    def style(self, name: str) -> StylePreset:
        """The style of this canonical name; KeyError if there is none."""
        return _named("style", {s.name: s for s in self.styles}, name)

    def component(self, component_id: str) -> ComponentSpec:
        """The component of this id; KeyError if there is none."""
        return _named("component", {c.id: c for c in self.components}, component_id)

    def controls_of(self, model: str) -> dict[str, ControlNetSpec]:
        """The controls that a model takes by name, in catalog order."""
        return {control.name: control for control in self.controlnets if model in control.models}

    def annotator_names(self) -> tuple[str, ...]:
        """Controls that a photo can be turned into here."""
        return (*WEIGHTLESS_ANNOTATORS, *(spec.name for spec in self.annotators))

    def controlnets_of(self, unet_id: str) -> tuple[str, ...]:
        """Ids of the served ControlNets that steer a UNet."""
        return tuple(c.id for c in self.served_components() if c.base == unet_id)

    def lora_weights(self, name: str, base: str) -> LoraWeights:
        """The file of a LoRA for a UNet; KeyError if there is no such LoRA, or if it does not fit the UNet."""
        spec = _named("lora", {entry.name: entry for entry in self.loras}, name)
        return _named(f"base of lora '{name}'", {b: weights for weights in spec.weights for b in weights.bases}, base)

    def library_path(self, weights: LoraWeights) -> str | None:
        """Path of a LoRA's file in the library; None for a LoRA of the catalog itself."""
        if weights.version is None or not isinstance(weights.source, FolderSource):
            return None
        file = weights.source.folder / weights.file
        return next((file.relative_to(root).as_posix() for root in self.library if file.is_relative_to(root)), None)

    def why_unserved(self, name: str) -> str | None:
        """Which file of the library has a name and why nothing is served of it, None if there is none."""
        wanted = name.strip().casefold()
        told = (f"{entry.file}: {entry.reason}" for entry in self.unserved if entry.name.casefold() == wanted)
        return next(told, None)

    def embedding_weights(self, name: str, base: str) -> LoraWeights:
        """The file of a textual inversion for a UNet; KeyError if there is none."""
        spec = _named("embedding", {entry.name: entry for entry in self.embeddings}, name)
        found = {b: weights for weights in spec.weights for b in weights.bases}
        return _named(f"base of embedding '{name}'", found, base)

    def vae_of(self, unet_id: str) -> str:
        """Id of the VAE whose latents a UNet works on; KeyError if no model uses the UNet."""
        return self._user_of(unet_id).vae

    def text_encoder_of(self, unet_id: str) -> str:
        """Id of the text encoders that feed a UNet; KeyError if no model uses the UNet."""
        return self._user_of(unet_id).text_encoder

    def _user_of(self, unet_id: str) -> ModelSpec:
        """The first model that uses a UNet; all of them share its VAE and text encoders."""
        users = {unet: m for m in reversed(self.models) for unet in (m.unet, m.refiner) if unet is not None}
        return _named("UNet of a model", users, unet_id)

    def served_components(self) -> tuple[ComponentSpec, ...]:
        """Components that some available model needs, and upscalers, each once, in catalog order."""
        needed = {i for m in self.available_models() for i in m.components}
        needed |= {c.component for m in self.available_models() for c in self.controls_of(m.name).values()}
        needed |= {entry.component for entry in self.upscalers}
        return tuple(c for c in self.components if c.id in needed)

    def only(self, names: tuple[str, ...]) -> Catalog:
        """The same catalog serving just these models; the others answer that they are not served here.

        ControlNets take much memory, so those that a model requires are left out with it, for all models.
        """
        keep = {self.model_choices().resolve(n) for n in names}
        models = tuple(
            m if m.name in keep or m.unavailable else m.model_copy(update={"unavailable": "not served by this graph"})
            for m in self.models
        )
        requiring = {m.name for m in self.models if m.requires_controlnet}
        controlnets = tuple(c for c in self.controlnets if not (own := requiring.intersection(c.models)) or own & keep)
        return self.model_copy(update={"models": models, "controlnets": controlnets})
