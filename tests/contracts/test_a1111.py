"""AUTOMATIC1111's web API: pictures, as its clients ask for them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from deployments.api.a1111.requests import Img2ImgRequest, Txt2ImgRequest
from pipelines.pictures.images import check_image, read_plan
from pipelines.plan import GenerationPlan
from tests.support.http import blank, decoded, encoded, photo, picture, pixels, post

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
SMALL = {"prompt": "a cat", "width": 128, "height": 128, "steps": 3, "seed": 7, "cfg_scale": 5.0}
OURS = {"output_format": "png", "cfg_scale": 5.0, "prompt_syntax": "weighted"}
NOTHING = {name: None for schema in (Txt2ImgRequest, Img2ImgRequest) for name in schema.model_fields}


async def drawn(client: httpx.AsyncClient, path: str = TXT2IMG, **fields: Any) -> dict[str, Any]:
    reply = await client.post(path, json=SMALL | fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    assert set(body) == {"images", "parameters", "info"}
    return body | {"info": json.loads(body["info"])}


def plan_of(image: str) -> GenerationPlan:
    return GenerationPlan.model_validate_json(read_plan(base64.b64decode(image)) or "")


def refused(reply: httpx.Response, param: str | None, says: str, status: int = 400) -> None:
    """An error as A1111's clients read it."""
    body = reply.json()
    assert reply.status_code == status, body
    assert set(body) >= {"error", "detail", "body", "errors"}
    assert body["body"] == ""
    assert says in body["errors"], body["errors"]
    assert body["detail"] == body["errors"] or isinstance(body["detail"], list) == (status == 422)
    assert body["param"] == param


async def test_the_same_request_on_the_main_route_draws_the_same_pixels(client: httpx.AsyncClient) -> None:
    text = {"prompt": "a (red:1.3) cat <lora:Pixel_Art:0.5>", "negative_prompt": "[fog]"}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"sampler": None}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "karras", **text}, {"sampler": "DPM++ 2M Karras", **text}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Uniform"}, {"sampler": "DPM++ 2M"}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "N/A"}, {"sampler": "DPM++ 2M Karras"}),
        ({"sampler_index": "PLMS"}, {"sampler": "PNDM"}),
        ({"sampler_name": "DDIM", "eta": 1.0}, {"sampler": "DDIM", "eta": 1.0}),
        ({"sampler_name": "Euler a", "eta": 0}, {"sampler": "Euler a"}),
        ({"clip_skip": 2, "styles": ["Anime"]}, {"clip_skip": 2, "style_preset": "Anime"}),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2, "emphasis": "No norm"}, "prompt": "a (cat:1.4)"},
         {"clip_skip": 2, "emphasis": "No norm", "prompt": "a (cat:1.4)"}),
        ({"override_settings": {"sd_model_checkpoint": "sd2.safetensors"}}, {"model_name": "SD2"}),
        ({"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 2, "denoising_strength": 0.6},
         {"hires": {"scale": 1.5, "steps": 2, "strength": 0.6, "upscaler": "latent"}}),
        ({"enable_hr": True, "hr_resize_x": 192, "hr_upscaler": "None", "hr_sampler_name": "Use same sampler"},
         {"hires": {"scale": 1.5, "strength": 0.75, "upscaler": "lanczos"}}),
    ]  # fmt: skip
    for theirs, ours in cases:
        body = await drawn(client, **theirs)
        expected = pixels(picture(await post(client, **OURS | ours)))
        assert np.array_equal(pixels(decoded(body["images"][0])), expected), theirs


async def test_pictures_from_pictures_are_those_of_the_main_route(client: httpx.AsyncClient) -> None:
    source = encoded(photo(128, 128))
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((30, 30, 90, 80), fill=255)
    white, strokes = io.BytesIO(), io.BytesIO()
    mask.save(white, "PNG")
    Image.merge("LA", (Image.new("L", mask.size), mask)).save(strokes, "PNG")
    given, inverted = encoded(white.getvalue()), encoded(_inverted(mask))
    start = {"image": source, "strength": 0.75}
    masked = start | {"mask_image": given, "mask_blur": 4}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"init_images": ["data:image/png;base64," + source]}, start),
        ({"denoising_strength": 0.4, "resize_mode": 1}, start | {"strength": 0.4}),
        ({"mask": given, "inpainting_fill": 1, "inpaint_full_res": 0}, masked),
        ({"mask": given, "inpainting_fill": 1}, masked | {"inpaint_area": "masked", "inpaint_padding": 0}),
        ({"mask": given, "inpainting_fill": 2, "inpaint_full_res": False, "mask_blur": 0},
         masked | {"inpaint_fill": "noise", "mask_blur": 0}),
        ({"mask": given, "inpainting_fill": 3, "inpaint_full_res": False}, masked | {"inpaint_fill": "nothing"}),
        ({"mask": given},
         masked | {"inpaint_area": "masked", "inpaint_padding": 0, "inpaint_fill": "surroundings"}),
        ({"mask": inverted, "inpainting_fill": 1, "inpaint_full_res": 0, "inpainting_mask_invert": 1}, masked),
        ({"mask": encoded(strokes.getvalue()), "inpainting_fill": 1, "inpaint_full_res": 0}, masked),
    ]  # fmt: skip
    for theirs, ours in cases:
        body = await drawn(client, IMG2IMG, **{"init_images": [source]} | theirs)
        expected = pixels(picture(await post(client, **OURS | ours)))
        assert np.array_equal(pixels(decoded(body["images"][0])), expected), theirs
        assert body["parameters"]["init_images"] is None


def _inverted(mask: Image.Image) -> bytes:
    buffer = io.BytesIO()
    mask.point([255 - value for value in range(256)]).save(buffer, "PNG")
    return buffer.getvalue()


async def test_the_reply_has_what_clients_read(client: httpx.AsyncClient) -> None:
    body = await drawn(client, n_iter=2, batch_size=2, sampler_name="Euler a", negative_prompt="fog")
    info = body["info"]
    assert len(body["images"]) == len(info["infotexts"]) == 4
    assert (info["seed"], info["all_seeds"]) == (7, [7, 8, 9, 10])
    assert (info["width"], info["height"], info["steps"], info["batch_size"]) == (128, 128, 3, 2)
    assert (info["sampler_name"], info["sd_model_name"], info["index_of_first_image"]) == ("Euler a", "SD1.5", 0)
    assert info["all_prompts"] == ["a cat"] * 4
    assert info["all_negative_prompts"] == ["fog"] * 4
    assert body["parameters"]["n_iter"] == 2
    for seed, (image, text) in enumerate(zip(body["images"], info["infotexts"], strict=True), 7):
        file = check_image(base64.b64decode(image), "image", 10**6)
        assert (file.format, file.infotext) == ("png", text)
        assert f"Seed: {seed}, Size: 128x128" in text
    assert len(set(body["images"])) == 4
    assert (await drawn(client, send_images=False))["images"] == []


async def test_null_absent_and_placeholder_fields_get_defaults(client: httpx.AsyncClient) -> None:
    """Every field null, no field at all, and the words that clients send for nothing."""
    small = {"width": 128, "height": 128, "steps": 1}
    words = {name: "" for name, value in NOTHING.items() if name not in ("prompt", "negative_prompt")}
    for fields in (small, NOTHING | small, words | small):
        reply = await client.post(TXT2IMG, json=fields)
        assert reply.status_code == 200, reply.text
    plan = plan_of(reply.json()["images"][0])
    assert (plan.model, plan.stages[0].text.prompts) == ("SD1.5", ("",))
    refused(await client.post(IMG2IMG, json=NOTHING), "init_images", "missing")


async def test_formats(client: httpx.AsyncClient) -> None:
    for named, kind in (("jpg", "JPEG"), ("jpeg", "JPEG"), ("WebP", "WEBP"), ("png", "PNG")):
        (image,) = (await drawn(client, override_settings={"samples_format": named, "jpeg_quality": 40}))["images"]
        assert decoded(image).format == kind


async def test_a_refiner(client: httpx.AsyncClient) -> None:
    fields = {"width": 256, "height": 256, "steps": 5, "override_settings": {"sd_model_checkpoint": "SDXL1.0-base"}}
    refiner = {"refiner_checkpoint": "refiner-sdxl", "refiner_switch_at": 0.8}
    (image,) = (await drawn(client, **fields, **refiner))["images"]
    assert len(plan_of(image).stages) == 2
    (image,) = (await drawn(client, **fields, **refiner | {"refiner_switch_at": 1}))["images"]
    assert len(plan_of(image).stages) == 1
    for change, says in (({"refiner_checkpoint": "other"}, "['refiner-sdxl']"), ({"refiner_switch_at": 0.5}, "[0.8]")):
        reply = await client.post(TXT2IMG, json=SMALL | fields | refiner | change)
        refused(reply, next(iter(change)), says)


async def test_clip_skip_changes_nothing_with_sdxl(client: httpx.AsyncClient) -> None:
    (image,) = (await drawn(client, clip_skip=4, width=256, height=256, model="SDXL1.0-base"))["images"]
    assert plan_of(image).stages[0].text.reading.clip_skip == 1


HIRES: dict[str, Any] = {"enable_hr": True}
BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"sampler_name": "Restart"}, "sampler_name", "'Euler a'"),
    ({"sampler_name": "Eulr a"}, "sampler_name", "Did you mean 'Euler a'?"),
    ({"scheduler": "polyexponential"}, "scheduler", "['automatic', 'uniform', 'karras']"),
    ({"sampler_name": "Euler a", "scheduler": "karras"}, "scheduler", "'DPM++ 2M'"),
    ({"override_settings": {"sd_model_checkpoint": "SD9"}}, "sd_model_checkpoint", "'SD1.5'"),
    ({"override_settings": {"sd_vae": "other"}}, "sd_vae", "['Automatic', 'None', 'vae-sd15']"),
    ({"override_settings": {"samples_format": "gif"}}, "samples_format", "'webp'"),
    ({"override_settings": {"CLIP_stop_at_last_layers": 13}}, "CLIP_stop_at_last_layers", "12"),
    ({"override_settings": {"randn_source": "NV"}}, "randn_source", "CPU"),
    ({"styles": ["Anmie"]}, "styles", "Did you mean 'Anime'?"),
    ({"restore_faces": True}, "restore_faces", "Leave it out"),
    ({"tiling": True}, "tiling", "Leave it out"),
    ({"subseed_strength": 0.5}, "subseed_strength", "variation seeds"),
    ({"seed_resize_from_w": 512}, "seed_resize_from_w", "own size"),
    ({"s_churn": 1}, "s_churn", "churn"),
    ({"script_name": "x/y/z plot"}, "script_name", "no scripts"),
    ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "alwayson_scripts", "['ControlNet']"),
    ({"batch_size": 8, "n_iter": 5}, "batch_size", "40 pictures"),
    ({"width": 130}, "width", "[128, 136]"),
    ({"steps": 0}, "steps", "greater than"),
    ({"sampler_name": "Euler a", "eta": 0.5}, "eta", "DDIM"),
    ({"refiner_checkpoint": "refiner-sdxl"}, "refiner_checkpoint", "SD1.5 has no refiner"),
    ({"prompt": "<lora:Nope:1>"}, "loras", "Nope"),
    (HIRES | {"hr_upscaler": "LDSR"}, "enable_hr", "Unexpected hr_upscaler 'LDSR'"),
    (HIRES | {"hr_prompt": "a dog"}, "hr_prompt", "first one"),
    (HIRES | {"hr_sampler_name": "DDIM"}, "hr_sampler_name", "first one"),
    (HIRES | {"hr_sampler_name": "Restart"}, "sampler_name", "'DDIM'"),
    (HIRES | {"hr_checkpoint_name": "SD2"}, "hr_checkpoint_name", "first one"),
    (HIRES | {"hr_resize_x": 256, "hr_resize_y": 512}, "hr_resize_y", "another shape"),
    (HIRES | {"hr_resize_y": 64}, "hr_resize_y", "1 to 8"),
    (HIRES | {"hr_scale": 9}, "hr_scale", "8"),
    (HIRES | {"hr_scale": 8, "width": 512}, "enable_hr", "hr_scale 8 makes 4096x1024"),
    (HIRES | {"denoising_strength": 0}, "denoising_strength", "use more"),
    ({"init_images": []}, "init_images", "missing"),
    ({"init_images": [encoded(photo())] * 2}, "init_images", "2 pictures"),
    ({"init_images": ["https://example.org/a.png"]}, "init_images", "send the picture itself"),
    ({"init_images": [encoded(b"no picture")]}, "init_images", "PNG"),
    ({"init_images": [encoded(photo(100, 60))], "resize_mode": 1}, "resize_mode", "resize_mode 0"),
    ({"init_images": [encoded(photo(64, 64))], "resize_mode": 3}, "resize_mode", "resize_mode 0"),
    ({"init_images": [encoded(photo())], "denoising_strength": 0.01}, "denoising_strength", "at least"),
    ({"init_images": [encoded(photo())], "mask": encoded(photo(20, 20))}, "mask", "20x20"),
    ({"init_images": [encoded(photo())], "initial_noise_multiplier": 1.1}, "initial_noise_multiplier", "Leave it out"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD)
async def test_what_cannot_be_honoured_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None, says: str
) -> None:
    path = IMG2IMG if "init_images" in fields else TXT2IMG
    refused(await client.post(path, json=SMALL | fields), param, says)


async def test_defaults_that_clients_send_with_every_request_are_ignored(client: httpx.AsyncClient) -> None:
    """What webuiapi, SillyTavern and KoboldAI Lite send whether their users want it or not."""
    await drawn(
        client,
        **{"subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0, "seed_resize_from_w": -1},
        **{"restore_faces": False, "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False},
        **{"eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {}},
        **{"override_settings_restore_afterwards": True, "script_name": None, "script_args": [], "save_images": True},
        **{"alwayson_scripts": {"ControlNet": {"args": []}, "ADetailer": {"args": [False]}}, "enable_hr": False},
        **{"hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_prompt": "", "image_cfg_scale": 1.5},
        **{"sampler_index": "Euler a", "sampler_name": "Euler a", "scheduler": "automatic", "unheard_of": {"a": 1}},
    )


async def test_pictures_of_too_many_pixels_are_not_decoded(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, decoded_sizes = blank(1001, 1001), []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded_sizes.append(self.size) or load(self))
    units = {"ControlNet": {"args": [{"model": "canny", "image": large}]}}
    for path, fields, param in (
        (IMG2IMG, {"init_images": [encoded(photo())], "mask": large, "inpainting_mask_invert": 1}, "mask"),
        (IMG2IMG, {"init_images": [large]}, "init_images"),
        (TXT2IMG, {"alwayson_scripts": units}, "alwayson_scripts"),
    ):
        refused(await client.post(path, json=SMALL | fields), param, "1000000", 413)
    assert (1001, 1001) not in decoded_sizes


async def test_wrong_types_and_broken_json_are_refused(client: httpx.AsyncClient) -> None:
    refused(await client.post(TXT2IMG, json=SMALL | {"steps": "many"}), "steps", "integer", 422)
    refused(await client.post(TXT2IMG, json=SMALL | {"styles": "Anime"}), "styles", "list", 422)
    refused(await client.post(TXT2IMG, json=SMALL | {"override_settings": {"sd_vae": 3}}), "sd_vae", "string", 422)
    refused(await client.post(TXT2IMG, content=b"{"), None, "not JSON", 422)
    refused(await client.post(TXT2IMG, json=[]), None, "dictionary", 422)


async def test_png_info(client: httpx.AsyncClient) -> None:
    body = await drawn(client, prompt="a (red:1.2) cat", negative_prompt="fog")
    told = (await client.post("/sdapi/v1/png-info", json={"image": body["images"][0]})).json()
    assert told["info"] == told["items"]["parameters"] == body["info"]["infotexts"][0]
    assert told["parameters"]["Prompt"] == "a (red:1.2) cat"
    assert (told["parameters"]["Negative prompt"], told["parameters"]["Seed"]) == ("fog", "7")
    bare = (await client.post("/sdapi/v1/png-info", json={"image": encoded(photo())})).json()
    assert bare == {"info": "", "items": {}, "parameters": {}}
    for image, says in ((None, "missing"), ("", "missing"), (encoded(b"x"), "PNG"), ("http://x/a.png", "itself")):
        refused(await client.post("/sdapi/v1/png-info", json={"image": image}), "image", says)
