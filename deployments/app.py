"""The whole graph on one page: which deployments there are, what they host, how they are bound."""

# No `from __future__ import annotations` here: Serve parses `args` by build_app's annotation, which must be a type.

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from config.catalog import ROOT, Catalog, ComponentSpec
from config.settings import Settings
from deployments.access.keys import read_key_hashes
from deployments.access.limits import KeyLimits
from deployments.api.app import HttpIngress
from deployments.api.body_limit import BodyLimit
from deployments.api.browsers import cors
from deployments.graph import Graph
from deployments.ingress.limits import IngressLimits, LinkStore, SigningFiles
from deployments.ingress.links import PictureLinks
from deployments.proxy.answers import ProxyAnswers
from deployments.proxy.slow_readers import SlowReaders
from deployments.ray_compat import DeploymentStates, as_ingress
from deployments.replicas.base import Runtime
from deployments.replicas.controlnet import ControlNetDeployment
from deployments.replicas.denoiser import DenoiserDeployment
from deployments.replicas.text_encoder import TextEncoderDeployment
from deployments.replicas.upscaler import UpscalerDeployment
from deployments.replicas.vae import VAEDeployment
from pipelines.acceleration import Acceleration
from pipelines.compiling import CompileMode, Compiling
from pipelines.library.library import extend
from pipelines.planning import PlanLimits

INGRESS = "ingress"
# Laptop defaults. GPUs, autoscaling and queue lengths are set per deployment, by name, in serve_config.yaml.
# num_cpus is 0: Ray's default of one CPU a replica would keep two cores from ever starting the graph.
DEFAULTS: Mapping[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    "max_ongoing_requests": 64,
    "max_queued_requests": 256,
    "health_check_period_s": 5,  # a dead replica may go unnoticed for so long
    "health_check_timeout_s": 20,  # one that hangs is replaced after three such in a row
    # Missing weights may come: a replica is started again for ever (with RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT).
    "max_constructor_retry_count": 10**6,
}


class AppArgs(BaseModel):
    """Arguments of the graph: `args` in a Serve config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("library", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    auth: Literal["keys", "none"] = "keys"
    """`keys`: API key required. `none`: no keys; loopback connections only."""
    catalog: str = "embedded"
    """A folder under config/catalogs, or an absolute path."""
    library: tuple[Path, ...] = ()
    """One folder, or a list of folders, of checkpoints, LoRAs and other files that are served beside the catalog's;
    relative paths start at the repository's root."""
    grouping: Literal["component", "role"] = "component"
    """`component`: one deployment for each component. `role`: one for each kind, so that a laptop runs the graph in six
    replicas, seven with upscalers."""
    models: tuple[str, ...] = ()
    """Serve only these models; if empty, every available model of the catalog."""
    max_rows: int = Field(default=16, ge=2)
    """Most rows in a tick of each denoiser; fewer if memory does not suffice."""
    row_price: float | None = Field(default=None, gt=0, le=10)
    """On GPUs, denoisers measure at start how a tick's time grows with its rows, and add a row only while it costs less
    than this share of what each of the first two costs. Without a value, ticks take up to `max_rows`."""
    controlnet_placement: Literal["deployment", "colocated"] = "deployment"
    """`deployment`: ControlNets have deployments of their own. `colocated`: they run in the replicas of the UNets they
    steer, for hosts with one GPU."""
    tvm: bool = False
    """Deploy compiled UNets (made by `make compile`) beside torch's. On GPUs, `backend: auto` still means torch."""
    tvm_models: tuple[str, ...] = ()
    """Models whose compiled UNets are deployed; if empty, every model with a table of sizes."""
    compile: CompileMode = "ahead"
    """`ahead`: only UNets that `make compile` made. `on_demand`: a size is also compiled, while serving, when a request
    asks for it; torch answers meanwhile. `tables`: the models' tables of sizes are compiled too, from the start on."""
    compile_sizes: int = Field(default=12, ge=1)
    """Most sizes that are compiled for a UNet while serving; torch draws the others."""
    reproducible: Literal["rounding", "strict"] = "rounding"
    """`rounding`: a picture may differ by 1/255, depending on what shares its ticks. `strict`: equal bytes."""
    acceleration: Acceleration = Acceleration()
    """How networks are accelerated on GPUs."""


def deployment_name(component: ComponentSpec, refiners: set[str], grouping: str) -> str:
    """Which deployment hosts a component."""
    if component.kind == "controlnet":
        steered = str(component.base).removeprefix("unet-").removesuffix("-base")
        return f"controlnet-{steered}" if grouping == "component" else "controlnet"
    if component.kind == "unet" and component.id not in refiners:
        return f"{component.id}-torch" if grouping == "component" else "unet-torch"
    if grouping == "component":
        return component.id
    return {"text_encoder": "text-encoder", "vae": "vae", "unet": "refiner", "upscaler": "upscaler"}[component.kind]


def build_app(args: AppArgs) -> Application:
    """Build the graph; `import_path` of every Serve config."""
    _check_checkout()
    settings = Settings()
    catalog = _catalog(args)
    runtime = Runtime(settings.device, settings.torch_threads, settings.log_format, settings.tvm_precision)
    limits = IngressLimits(
        plan=PlanLimits(max_pixel_steps=settings.max_pixel_steps),
        max_body_bytes=settings.max_body_bytes,
        max_image_pixels=settings.max_image_pixels,
        deadline_s=settings.deadline_s,
        cors_origins=settings.sites(),
    )
    keys_file = _keys_file(args, settings)
    key_limits = KeyLimits(settings.rate_limit, settings.pixel_steps_per_day, settings.limits_store)
    components = bind_components(args, catalog, runtime)
    compiled = bind_compiled(args, catalog, runtime, components, settings.tvm_cache)
    return _deploy(as_ingress(HttpIngress), INGRESS).bind(
        graph=Graph(components, compiled),
        catalog=catalog,
        limits=limits,
        keys_file=keys_file,
        key_limits=key_limits,
        readiness=DeploymentStates(),
        log_format=settings.log_format,
        signing=_signing_files(settings),
        links=_link_store(settings),
        compiles_on_demand=args.compile != "ahead",
    )


def _catalog(args: AppArgs) -> Catalog:
    catalog = Catalog.load(args.catalog)
    if args.library:
        catalog = extend(catalog, [ROOT / folder for folder in args.library])
    return catalog.only(args.models) if args.models else catalog


def hosted_components(args: AppArgs, catalog: Catalog) -> dict[str, list[ComponentSpec]]:
    """Deployment -> what it hosts, of every component some available model needs; ControlNets first."""
    refiners = {model.refiner for model in catalog.models if model.refiner}
    hosted: dict[str, list[ComponentSpec]] = {}
    for component in sorted(catalog.served_components(), key=lambda c: c.kind != "controlnet"):
        if component.kind == "controlnet" and args.controlnet_placement == "colocated":
            continue
        hosted.setdefault(deployment_name(component, refiners, args.grouping), []).append(component)
    return hosted


def bind_components(args: AppArgs, catalog: Catalog, runtime: Runtime) -> dict[str, Application]:
    """Component id -> the deployment that hosts it, for every component some available model needs."""
    colocated = args.controlnet_placement == "colocated"
    bound: dict[str, Application] = {}
    for name, components in hosted_components(args, catalog).items():
        ids = [component.id for component in components]
        hosts: dict[str, Any] = {"components": ids, "catalog": catalog, "runtime": runtime}
        match components[0].kind:
            case "text_encoder":
                app = _deploy(TextEncoderDeployment, name).bind(**hosts)
            case "vae":
                app = _deploy(VAEDeployment, name).bind(**hosts)
            case "upscaler":
                app = _deploy(UpscalerDeployment, name).bind(**hosts)
            case "controlnet":
                app = _deploy(ControlNetDeployment, name).bind(**hosts, acceleration=args.acceleration)
            case "unet":
                app = _deploy(DenoiserDeployment, name).bind(
                    **hosts,
                    max_rows=args.max_rows,
                    controlnets=None if colocated else _control_of(ids, catalog, bound),
                    strict=args.reproducible == "strict",
                    row_price=args.row_price,
                    acceleration=args.acceleration,
                )
                if colocated:
                    bound |= {net: app for unet in ids for net in catalog.controlnets_of(unet)}
        bound |= dict.fromkeys(ids, app)
    return bound


def compiled_components(args: AppArgs, catalog: Catalog) -> dict[str, list[str]]:
    """Deployment -> the compiled UNets in it, where the graph has them."""
    if not args.tvm:
        return {}
    named = {catalog.model_choices().resolve(name) for name in args.tvm_models}
    models = [m for m in catalog.available_models() if m.tvm_sizes and (m.name in named or not named)]
    wanted = {unet for m in models for unet in (m.unet, m.refiner)}
    hosted: dict[str, list[str]] = {}
    for component in catalog.served_components():
        if component.id in wanted:
            hosted.setdefault("unet-tvm" if args.grouping == "role" else f"{component.id}-tvm", []).append(component.id)
    return hosted


def deployment_names(args: AppArgs) -> set[str]:
    """Names of every deployment of a graph."""
    catalog = _catalog(args)
    return {INGRESS, *hosted_components(args, catalog), *compiled_components(args, catalog)}


def bind_compiled(
    args: AppArgs, catalog: Catalog, runtime: Runtime, bound: Mapping[str, Application], cache: Path
) -> dict[str, Application]:
    """Component id -> the deployment of its compiled UNet, where the graph has them; `bound` are the others."""
    # Set before tvm or torch is imported: unbound, TVM's pool would pin torch's threads to one core; spinning, the
    # two pools would starve each other.
    threads = {
        "TVM_BIND_THREADS": "0",
        "TVM_NUM_THREADS": str(runtime.torch_threads or os.cpu_count() or 1),
        "TVM_THREAD_POOL_SPIN_COUNT": "0",
        "GOMP_SPINCOUNT": "0",
    }
    options = {"num_cpus": 0, "runtime_env": {"env_vars": threads}}
    colocated = args.controlnet_placement == "colocated"
    compiled: dict[str, Application] = {}
    for name, ids in compiled_components(args, catalog).items():
        app = _deploy(DenoiserDeployment, name, ray_actor_options=options).bind(
            components=ids,
            catalog=catalog,
            runtime=runtime,
            max_rows=args.max_rows,
            controlnets=None if colocated else _control_of(ids, catalog, bound),
            strict=args.reproducible == "strict",
            compiled=Compiling(cache, args.compile, args.compile_sizes, runtime.precision),
        )
        compiled |= dict.fromkeys(ids, app)
    return compiled


def _control_of(unets: list[str], catalog: Catalog, bound: Mapping[str, Application]) -> dict[str, Application]:
    """UNet id -> the deployment of its ControlNets, for those that have some."""
    return {unet: bound[nets[0]] for unet in unets if (nets := catalog.controlnets_of(unet))}


def proxy_middlewares() -> list[Middleware]:
    """The middlewares of Serve's HTTP proxies; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    settings = Settings()
    layers = [Middleware(ProxyAnswers), Middleware(BodyLimit, max_bytes=settings.max_body_bytes)]  # innermost first
    if settings.sites():  # here too: what a proxy answers by itself must be readable
        layers.append(Middleware(CORSMiddleware, **cors(settings.sites())))
    return [*layers, Middleware(SlowReaders)]


def _keys_file(args: AppArgs, settings: Settings) -> Path | None:
    if args.auth == "none":
        return None
    if settings.api_keys_file is None:
        raise ValueError(
            "SDGRAPH_API_KEYS_FILE is not set. Set it to a key file, or `auth: none` in args for a server on loopback"
        )
    read_key_hashes(settings.api_keys_file)  # refused here, before anything is deployed
    return settings.api_keys_file.resolve()


def _link_store(settings: Settings) -> LinkStore | None:
    if settings.picture_store is None:
        return None
    store = LinkStore(settings.picture_store, settings.picture_link_s)
    PictureLinks(store)  # refused here, before anything is deployed
    return store


def _signing_files(settings: Settings) -> SigningFiles | None:
    certificates, key = settings.c2pa_certificates, settings.c2pa_private_key
    if certificates is None and key is None:
        return None
    if certificates is None or key is None:
        raise ValueError("SDGRAPH_C2PA_CERTIFICATES and SDGRAPH_C2PA_PRIVATE_KEY belong together; set both or neither")
    return SigningFiles(certificates.resolve(), key.resolve(), settings.c2pa_timestamp_url)


def _deploy(replica_class: type, name: str, **options: Any) -> Any:
    return serve.deployment(replica_class, name=name, **{**DEFAULTS, **options})


def _check_checkout() -> None:
    """Fail early where another package hides ours: PyPI has one named `config`."""
    root = Path(__file__).resolve().parents[1]
    for name in ("config", "pipelines", "deployments"):
        found = Path(str(importlib.import_module(name).__file__)).resolve()
        if not found.is_relative_to(root):
            raise RuntimeError(f"package '{name}' comes from {found}; run from {root} with PYTHONPATH set to it")
