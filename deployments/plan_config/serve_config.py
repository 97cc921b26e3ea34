"""The text of a Serve config: what was planned, as YAML with its reasons beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from config.catalog import ROOT, Catalog
from deployments.app import AppArgs
from deployments.plan_config.cards import parse_cards
from deployments.plan_config.shares import CPUS, DENOISING, MAX_ROWS, ROW_PRICE, Deployment, plan_cluster, plan_one_card
from pipelines.library.library import extend

DRAIN_S = 620
"""Seconds in which a removed replica finishes its pictures: the longest may take the deadline, 600 s."""

_CLUSTER_HEAD = """\
# Printed by `{command}`. Change the command, not this file.
#
# Shares of cards are memory arithmetic (pipelines/footprint.py): weights in the catalog's number format from the
# published configurations, {rows} rows of a tick at the largest size that a component's models list or default to
# (they may take 0.6 of the free memory), LoRAs, annotators and a CUDA context. Measure on your own cards. A share
# limits a replica's memory, not its compute: the UNet that always runs has a card to itself, and at most four
# denoisers share one. `sdgraph/role` is a label of nodes: {roles}.
#
# Queues: max_ongoing_requests of a denoiser is a little above the jobs that one tick can hold (max_rows / 2 guided
# jobs). max_queued_requests, of each ingress replica, is a few times that, because a longer queue would miss the
# deadline. A full queue is a 503 with Retry-After; a denoiser that cannot finish in time refuses with the same.
#
# Autoscaling: denoisers scale by outstanding work (deployments/autoscaling.py; benchmarks/autoscaling.py compares it
# with Serve's own policy; target_ongoing_requests applies until a replica has timed its first ticks), the others by
# requests. upscale_delay_s 15 ignores a burst of seconds, because a new card takes minutes to start.
# downscale_delay_s 300 keeps a card through a pause that is shorter than a new start would be worth.
# The components of the catalog's first model always run. All others scale to zero after downscale_to_zero_delay_s
# without a request: 900, because the next user waits for the start (weights from the volume, and minutes more if no
# node is up), so a model that is requested every quarter of an hour stays. Serve reports a waiting request to the
# autoscaler at once, whatever the upscale delay (it is pushed every second, see the environment in
# k8s/base/rayservice.yaml).
# max_replicas: the cards hold all of them at once.
# ControlNets run in the UNet's process: their residuals, 54 MB a row and tick for SDXL at 1024x1024, stay on the card
# there. From a deployment of their own they would pass through the memory of both hosts.
# graceful_shutdown_timeout_s: a removed replica finishes its pictures first, which may take the deadline, 600 s.
"""

_ONE_CARD_HEAD = """\
# Printed by `{command}`. Change the command, not this file.
#
# One NVIDIA card of {gigabytes:g} GB on this machine: loopback only, no keys. The shares of the card add up to 1, and
# torch's allocator is limited to them (deployments/replicas/base.py). They are memory arithmetic
# (pipelines/footprint.py), not measured: weights in the catalog's number format, LoRAs, annotators, a CUDA context
# for each process, and one guided picture. The remaining memory is for more rows in a tick.
# ControlNets run in the UNet's process: their residuals are 54 MB a row and tick for SDXL, and on one card a second
# process would only take turns with the first.
"""


def serve_config(catalog: str, gpus: str, models: tuple[str, ...] = (), library: tuple[Path, ...] = ()) -> str:
    """The config of a graph that serves a catalog on these cards.

    Args:
        catalog: a folder under config/catalogs, or an absolute path.
        gpus: number x GB of each kind of card. A single card is one machine's: loopback, no keys, grouped by role.
        models: public names; every available model if empty.
        library: folders whose models are served too.

    Raises:
        PlanError: the cards do not hold the graph.
        CatalogError: there is no such catalog, or no such folder.
    """
    chosen = Catalog.load(catalog)
    if library:
        chosen = extend(chosen, [ROOT / folder for folder in library])
    if models:
        chosen = chosen.only(models)
    large, small = parse_cards(gpus)
    one = large == small and large.count == 1
    args = AppArgs(
        auth="none" if one else "keys",
        catalog=catalog,
        library=library,
        grouping="role" if one else "component",
        models=tuple(chosen.model_choices().resolve(name) for name in models),
        max_rows=MAX_ROWS,
        row_price=ROW_PRICE,
        controlnet_placement="colocated",
    )
    words = ["python", "-m", "deployments.plan_config", "--catalog", catalog]
    words += ["--library", *map(str, library)] if library else []
    words += ["--gpus", gpus] + (["--models", *args.models] if models else [])
    command = shlex.join(words)
    if one:
        head = _ONE_CARD_HEAD.format(command=command, gigabytes=large.gigabytes)
        return head + "".join(f"{line}\n" for line in _one_card(args, plan_one_card(args, chosen, large)))
    cards = [large] if large == small else [large, small]
    roles = ", ".join(["cpu", *(f"{c.role} ({c.count} cards of {c.gigabytes:g} GB)" for c in cards)])
    head = _CLUSTER_HEAD.format(command=command, rows=MAX_ROWS, roles=roles)
    return head + "".join(f"{line}\n" for line in _cluster(args, plan_cluster(args, chosen, large, small)))


def _cluster(args: AppArgs, planned: Iterable[Deployment]) -> Iterator[str]:
    yield from _top("EveryNode", "0.0.0.0", 660, "  encoding: JSON")
    yield from _application(args)
    scaling = {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 64}
    both = "both CPUs of a pod, for itself and the proxy beside it: two replicas never share a pod"
    yield from _deployment("ingress", 256, 512, {"num_cpus": 2, **_label("cpu")}, scaling, both)
    for entry in planned:
        options = {"num_cpus": CPUS[entry.kind], "num_gpus": entry.share, **_label(entry.cards.role)}
        ongoing, queued = _queue(entry, args)
        yield from _deployment(entry.name, ongoing, queued, options, _autoscaling(entry), entry.arithmetic)


def _one_card(args: AppArgs, planned: Iterable[Deployment]) -> Iterator[str]:
    yield from _top("HeadOnly", "127.0.0.1", 900)
    yield from _application(args)
    for entry in planned:
        yield f"      - name: {entry.name}  # {entry.arithmetic}"
        yield f"        ray_actor_options: {_inline({'num_cpus': 0, 'num_gpus': entry.share})}"


def _top(proxies: str, host: str, timeout_s: int, *logging: str) -> Iterator[str]:
    yield f"proxy_location: {proxies}"
    yield "http_options:"
    yield f"  host: {host}"
    yield "  port: 8000"
    yield f"  request_timeout_s: {timeout_s}"
    yield "logging_config:"
    yield from logging
    yield "  log_level: INFO"
    yield "  enable_access_log: false"


def _application(args: AppArgs) -> Iterator[str]:
    yield "applications:"
    yield "  - name: sdgraph"
    yield "    route_prefix: /"
    yield "    import_path: deployments.app:build_app"
    yield "    args:"
    said = {"auth", "catalog", "grouping"} | args.model_fields_set
    for name, value in args.model_dump(mode="json").items():
        if name in said and value != []:
            yield f"      {name}: {_inline(value)}"
    yield "    deployments:"


def _deployment(
    name: str, ongoing: int, queued: int, options: dict[str, Any], scaling: dict[str, Any], arithmetic: str = ""
) -> Iterator[str]:
    yield f"      - name: {name}" + f"  # {arithmetic}" * bool(arithmetic)
    yield f"        max_ongoing_requests: {ongoing}"
    yield f"        max_queued_requests: {queued}"
    yield f"        graceful_shutdown_timeout_s: {DRAIN_S}"
    yield f"        ray_actor_options: {_inline(options)}"
    yield "        autoscaling_config:"
    for key, value in scaling.items():
        yield f"          {key}: {_inline(value)}"


def _queue(entry: Deployment, args: AppArgs) -> tuple[int, int]:
    """Requests that a replica takes at once, and those that wait for one."""
    if entry.kind in DENOISING:
        ongoing = args.max_rows * 3 // 4
        return ongoing, 4 * ongoing
    return (8, 64) if entry.kind in ("vae", "upscaler") else (32, 128)


def _autoscaling(entry: Deployment) -> dict[str, Any]:
    targets = {("text_encoder", "always"): 16, ("text_encoder", "rare"): 8, ("vae", "always"): 3, ("vae", "rare"): 8}
    scaling: dict[str, Any] = {
        "min_replicas": int(entry.use == "always"),
        "max_replicas": entry.replicas,
        "target_ongoing_requests": targets.get((entry.kind, entry.use), 6),
    }
    if entry.kind in DENOISING:
        scaling["upscale_delay_s"] = 15
    scaling["downscale_delay_s"] = 300
    if entry.use == "rare":
        scaling["downscale_to_zero_delay_s"] = 900
    if entry.kind == "unet":
        scaling["policy"] = {
            "policy_function": "deployments.autoscaling:OutstandingWork",
            "policy_kwargs": {"target_s": 3},
        }
    return scaling


def _label(role: str) -> dict[str, Any]:
    return {"label_selector": {"sdgraph/role": role}}


def _inline(value: Any) -> str:
    """A value in one line of YAML, without quotes where none are needed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    plain = (
        text.replace(".", "").replace("-", "").replace("_", "").replace("/", "").isalnum() and not text[:1].isdigit()
    )
    return text if isinstance(value, int) or plain else json.dumps(text)
