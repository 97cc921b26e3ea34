"""Which deployments a graph has, their shares of cards, and how far they grow: arithmetic, no configuration text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from config.catalog import Catalog, ComponentSpec
from deployments.app import AppArgs, hosted_components
from deployments.plan_config.cards import Cards, PlanError
from pipelines.footprint import Footprint, footprint, together

MAX_ROWS = 16
ROW_PRICE = 0.9
"""`row_price` of the printed config: above it, a further row saves too little to be worth the longer tick."""
LEAST_ROWS = 2
"""Rows of one guided picture: what a denoiser must have room for."""
STEP = 0.05
"""Shares are multiples of this."""
LEAST_DENOISER = 0.25
"""A denoiser's least share of a card: more than four on one card would only take turns."""
DENOISING = ("unet", "controlnet")
CPUS = {"text_encoder": 1, "unet": 2, "controlnet": 2, "vae": 1, "upscaler": 1}

Use = Literal["always", "rare"]


@dataclass
class Deployment:
    """One deployment of the plan.

    Attributes:
        name: in the graph.
        kind: of its components.
        use: whether a replica always runs, or the deployment scales to zero.
        cards: where it lies.
        parts: what it hosts.
        share: of a card, for each replica.
        replicas: at most.
    """

    name: str
    kind: str
    use: Use
    cards: Cards
    parts: list[Footprint]
    share: float
    replicas: int

    @property
    def rows(self) -> int:
        """Rows of a tick that the share has room for, as far as they are counted."""
        row = max(part.row for part in self.parts)
        free = self.share * self.cards.gigabytes * 1e9 - together(self.parts, 0)
        return min(MAX_ROWS, int(free / row + 1e-6)) if row else 0

    @property
    def arithmetic(self) -> str:
        """What the share follows from, for people to read."""
        weights = sum(part.weights for part in self.parts)
        said = f"{weights / 1e9:.1f} GB of weights"
        if sizes := [part.largest for part in self.parts if part.largest]:
            size = max(sizes, key=lambda size: size.width * size.height)
            work = max(part.row or part.work for part in self.parts)
            said += f", {work / 1e9:.2f} GB {'a row' if self.rows else 'of work'} at {size}"
        rows = f" with {self.rows} rows" if self.rows else ""
        return f"{said}: {together(self.parts, self.rows) / 1e9:.1f} GB{rows}"


def plan_cluster(args: AppArgs, catalog: Catalog, large: Cards, small: Cards) -> list[Deployment]:
    """The deployments of a graph over several cards.

    What the catalog's first model needs always runs, and its UNet has a card to itself; the rest scales to zero.

    Raises:
        PlanError: a deployment fits no card, or the cards are too few.
    """
    first = catalog.available_models()[0]
    awake = {first.text_encoder, first.unet, first.vae}
    planned = []
    for name, components in hosted_components(args, catalog).items():
        kind = components[0].kind
        use: Use = "always" if awake.intersection(c.id for c in components) else "rare"
        cards = large if kind in DENOISING else small
        parts = _parts(components, args, catalog)
        share = _share(name, parts, cards)
        if cards.count > 1 and kind == "unet" and use == "always":
            share = 1.0
        elif kind in DENOISING:
            share = max(share, LEAST_DENOISER)
        planned.append(Deployment(name, kind, use, cards, parts, share, _most_replicas(kind, use)))
    for cards in dict.fromkeys((large, small)):
        _fit([d for d in planned if d.cards == cards], cards)
    return _in_order(planned)


def plan_one_card(args: AppArgs, catalog: Catalog, card: Cards) -> list[Deployment]:
    """The deployments of a graph on one card: all always run, and their shares add up to 1; the rest is for rows.

    Raises:
        PlanError: the card is too small for the models.
    """
    hosted = hosted_components(args, catalog)
    parts = {name: _parts(components, args, catalog) for name, components in hosted.items()}
    needs = {name: together(parts[name], LEAST_ROWS) / (card.gigabytes * 1e9) for name in hosted}
    if sum(needs.values()) > 1:
        listed = ", ".join(f"{name} {need * card.gigabytes:.1f}" for name, need in needs.items())
        total = sum(needs.values()) * card.gigabytes
        models = [model.name for model in catalog.available_models()]
        fewer = f"serve fewer models (--models with some of {models}) or " if len(models) > 1 else ""
        raise PlanError(
            f"a card of {card.gigabytes:g} GB does not hold {total:.1f} GB ({listed}); {fewer}use a larger card"
        )
    shares = {name: math.ceil(need * 100) / 100 for name, need in needs.items()}
    hungry = max(hosted, key=lambda name: (max(part.row for part in parts[name]) > 0, needs[name]))
    shares[hungry] = round(1 - sum(share for name, share in shares.items() if name != hungry), 2)
    return _in_order(
        [Deployment(name, hosted[name][0].kind, "always", card, parts[name], shares[name], 1) for name in hosted]
    )


def _in_order(planned: Iterable[Deployment]) -> list[Deployment]:
    """In the order in which a request uses them; what always runs comes before what scales to zero."""
    order = ("text_encoder", "unet", "controlnet", "vae", "upscaler")
    return sorted(planned, key=lambda d: (order.index(d.kind), d.use, d.name.startswith("refiner")))


def _parts(components: Iterable[ComponentSpec], args: AppArgs, catalog: Catalog) -> list[Footprint]:
    """What a deployment hosts; ControlNets with the UNets they steer, where they live there."""
    hosted = list(components)
    if args.controlnet_placement == "colocated":
        hosted += [catalog.component(net) for unet in components for net in catalog.controlnets_of(unet.id)]
    return [footprint(catalog, component) for component in hosted]


def _share(name: str, parts: list[Footprint], cards: Cards) -> float:
    """Share of a card that has room for `MAX_ROWS`, the whole card if it has room for fewer."""
    least = together(parts, LEAST_ROWS) / 1e9
    if least > cards.gigabytes:
        raise PlanError(f"{name} needs {least:.1f} GB, and its cards have {cards.gigabytes:g}; give it larger ones")
    share = together(parts, MAX_ROWS) / (cards.gigabytes * 1e9)
    return min(1.0, round(math.ceil(share / STEP - 1e-9) * STEP, 2))


def _most_replicas(kind: str, use: Use) -> int:
    """How far a deployment may grow where cards are plenty."""
    wanted: Mapping[tuple[str, Use], int] = {
        ("unet", "always"): 8,
        ("unet", "rare"): 4,
        ("controlnet", "always"): 4,
        ("controlnet", "rare"): 4,
        ("text_encoder", "always"): 4,
        ("vae", "always"): 4,
    }
    return wanted.get((kind, use), 2)


def _fit(planned: list[Deployment], cards: Cards) -> None:
    """Bound the replicas so that all of them fit the cards at once, as far as one of each does.

    Raises:
        PlanError: what always runs does not fit, or leaves no room for a deployment that scales to zero.
    """
    while sum(d.share * d.replicas for d in planned) > cards.count:
        most = max(planned, key=lambda d: (d.replicas > 1) * d.share * d.replicas)
        if most.replicas == 1:
            break
        most.replicas -= 1
    awake = sum(d.share for d in planned if d.use == "always")
    asleep = max((d.share for d in planned if d.use == "rare"), default=0)
    if awake + asleep > cards.count:
        raise PlanError(
            f"{cards.count}x{cards.gigabytes:g} is too small: {awake:g} cards for what always runs, and "
            f"{asleep:g} more for what scales to zero. Serve fewer models (--models), or add cards"
        )
