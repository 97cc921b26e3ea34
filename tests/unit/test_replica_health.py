"""A replica whose GPU failed for good tells Serve so, of whatever kind it is; other errors leave it healthy."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from ray.exceptions import RayTaskError

from config.catalog import Catalog
from deployments.replicas.base import Replica, Runtime
from deployments.replicas.controlnet import ControlNetDeployment
from deployments.replicas.denoiser import DenoiserDeployment
from deployments.replicas.text_encoder import TextEncoderDeployment
from deployments.replicas.vae import VAEDeployment
from deployments.telemetry.stages import Timed
from pipelines.assembly import load_text_encoders
from pipelines.control.types import ControlBatch, ControlHint, HintUse
from pipelines.errors import DenoiseError, LostDeviceError
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.sampling.latents import Latents
from tests.support.http import photo

LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
RUNTIME = Runtime(device="cpu", torch_threads=1)
PARAMS = GenerationParams(model_name="SD1.5", prompt="x", width=128, height=128, steps=2, seed=1, sampler="Euler")


class Kind(NamedTuple):
    """A replica, where its model work can be made to fail, and a request that does that work."""

    replica: Replica
    owner: Any
    attribute: str
    call: Callable[[], Awaitable[Any]]


def text_encoder(catalog: Catalog) -> Kind:
    replica = TextEncoderDeployment(components=["text-encoder-sd15"], catalog=catalog, runtime=RUNTIME)
    (stage,) = make_plan(PARAMS, catalog).stages
    (stack,) = replica._stacks.values()
    return Kind(replica, stack, "encode", lambda: replica.encode(component="text-encoder-sd15", stage=stage))


def vae(catalog: Catalog) -> Kind:
    replica = VAEDeployment(components=["vae-sd15"], catalog=catalog, runtime=RUNTIME)
    plan = make_plan(PARAMS, catalog)
    latents = Timed(Latents(torch.zeros(1, 4, 16, 16)))
    decode = partial(replica.decode, image=None, mask=None)
    return Kind(replica, replica._vaes["vae-sd15"], "begin_decoding", lambda: decode(plan=plan, latents=latents))


def controlnet(catalog: Catalog) -> Kind:
    replica = ControlNetDeployment(components=["controlnet-sd15-canny"], catalog=catalog, runtime=RUNTIME)
    hint = ControlHint("map", "controlnet-sd15-canny", None, torch.rand(1, 3, 128, 128))
    batch = ControlBatch(((HintUse(hint.ref),),), torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 77, 32))
    return Kind(replica, replica._nets, "_forward", lambda: replica.residuals(batch=batch, hints={"map": hint}))


def denoiser(catalog: Catalog) -> Kind:
    replica = DenoiserDeployment(components=["unet-sd15"], catalog=catalog, runtime=RUNTIME, max_rows=4, controlnets={})
    (stage,) = make_plan(PARAMS, catalog).stages
    text = Timed(load_text_encoders(catalog, "text-encoder-sd15", "cpu").encode(stage))
    owner = replica._engines["unet-sd15"].denoiser
    return Kind(replica, owner, "predict", lambda: replica.denoise(stage=stage, conditioning=text, latents=None))


def colocated_controlnet(catalog: Catalog) -> Kind:
    replica = DenoiserDeployment(components=["unet-sd15"], catalog=catalog, runtime=RUNTIME, max_rows=4)
    steered = replace(PARAMS, model_name="SD1.5-ControlNet", controlnet_name="canny", controlnet_image=photo())
    (stage,) = make_plan(steered, catalog).stages
    owner = replica._colocated["unet-sd15"]
    call = functools.partial(replica.prepare, stage=stage, photos=(photo(),), image=None, mask=None)
    return Kind(replica, owner, "prepare", call)


KINDS = [text_encoder, vae, controlnet, denoiser, colocated_controlnet]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_a_lost_gpu_makes_a_replica_unhealthy(
    catalog: Catalog, make: Callable[[Catalog], Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = make(catalog)
    await kind.call()
    await kind.replica.check_health()
    monkeypatch.setattr(kind.owner, kind.attribute, failing(ValueError("a caller's fault")))
    with pytest.raises((ValueError, DenoiseError), match="a caller's fault"):
        await kind.call()
    await kind.replica.check_health()
    monkeypatch.setattr(kind.owner, kind.attribute, failing(LOST))
    with pytest.raises((torch.AcceleratorError, DenoiseError), match="illegal memory access"):
        await kind.call()
    with pytest.raises(LostDeviceError, match="illegal memory access"):
        await kind.replica.check_health()


async def test_a_gpu_that_another_replica_lost_leaves_this_one_healthy(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ControlNet's error reaches the denoiser's tick in Ray's wrapper, which is of the error's own class too."""
    kind = denoiser(catalog)
    remote = RayTaskError("residuals", str(LOST), LOST).as_instanceof_cause()
    assert isinstance(remote, torch.AcceleratorError)
    monkeypatch.setattr(kind.owner, "predict", failing(remote))
    with pytest.raises(DenoiseError, match="illegal memory access"):
        await kind.call()
    await kind.replica.check_health()
