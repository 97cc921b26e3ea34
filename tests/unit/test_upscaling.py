"""Upscalers: tiles equal spandrel's own call over the whole picture; which files are read, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.assembly import load_upscaler
from pipelines.errors import InvalidValueError, NonFiniteError, WeightsError
from pipelines.footprint import footprint
from pipelines.pictures import upscaling
from pipelines.pictures.upscaling import Pixels, Upscaler
from pipelines.spandrel_compat import load_spandrel, read_upscaler
from tests.support.upscalers import FILE, X2, X4, by_spandrel, with_upscalers


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def component(catalog: Catalog, tiny: Path, name: str) -> tuple[Upscaler, Path]:
    found = with_upscalers(catalog, tiny)
    component_id = str(found.upscaler_component(name))
    return load_upscaler(found, component_id, "cpu"), tiny / component_id / FILE


@pytest.mark.parametrize(("width", "height"), [(150, 101), (64, 64), (30, 200), (3, 1)])
@pytest.mark.parametrize("name", [X4, X2])
def test_tiles_are_the_picture_made_in_one_piece(
    catalog: Catalog, tiny_models: Path, name: str, width: int, height: int
) -> None:
    upscaler, file = component(catalog, tiny_models, name)
    upscaler._tile = 64
    image = noise(width, height)
    ours, whole = (np.asarray(made).astype(int) for made in (upscaler.once(image), by_spandrel(file, image)))
    assert ours.shape == whole.shape == (height * upscaler.scale, width * upscaler.scale, 3)
    assert whole.std() > 5
    assert np.abs(ours - whole).max() <= 1


def test_a_margin_that_is_too_small_shows(catalog: Catalog, tiny_models: Path) -> None:
    """So that the test above could fail."""
    upscaler, file = component(catalog, tiny_models, X4)
    upscaler._tile, upscaler._margin = 64, 0
    image = noise(150, 64)
    assert np.abs(np.asarray(upscaler.once(image)).astype(int) - np.asarray(by_spandrel(file, image))).max() > 1


def test_no_tile_is_larger_than_it_may_be(catalog: Catalog, tiny_models: Path) -> None:
    upscaler, _ = component(catalog, tiny_models, X2)
    seen: list[tuple[int, ...]] = []
    model = upscaler._model
    upscaler._model = lambda pixels: (seen.append(tuple(pixels.shape[-2:])), model(pixels))[1]
    upscaler.once(noise(700, 300))
    assert len(seen) == 6
    assert max(side for shape in seen for side in shape) < upscaling.TILE + 4


@pytest.mark.parametrize(("size", "passes"), [((16, 16), 1), ((60, 70), 2), ((10, 12), 1), ((300, 400), 3)])
def test_passes_until_the_size_is_reached_then_lanczos(
    catalog: Catalog, tiny_models: Path, size: tuple[int, int], passes: int
) -> None:
    upscaler, file = component(catalog, tiny_models, X4)
    expected = image = noise(4, 5)
    for _ in range(passes):
        expected = by_spandrel(file, expected)
    resized = expected.resize(size, Image.Resampling.LANCZOS) if expected.size != size else expected
    ours = upscaler.enlarge(image, *size)
    assert ours.size == size
    assert (
        np.abs(np.asarray(ours).astype(int) - np.asarray(resized)).max() <= 2
    )  # of 1/255 a pass, and Lanczos sharpens


def test_tiles_are_halved_where_memory_ends(catalog: Catalog, tiny_models: Path) -> None:
    upscaler, file = component(catalog, tiny_models, X2)
    model = upscaler._model

    def short_of_memory(pixels: torch.Tensor) -> torch.Tensor:
        if max(pixels.shape[-2:]) > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(pixels)

    upscaler._model = short_of_memory
    image = noise(300, 80)
    ours = np.asarray(upscaler.once(image)).astype(int)
    assert np.abs(ours - np.asarray(by_spandrel(file, image))).max() <= 1
    assert upscaler._tile == 128
    upscaler._model = lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        upscaler.once(image)


def test_pictures_that_would_be_too_large_or_not_finite_are_refused() -> None:
    blank = Upscaler(lambda pixels: pixels.repeat(1, 1, 8, 8) * torch.nan, 8, "cpu", torch.float32)
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        blank.once(noise(4, 4))
    assert caught.value.param == "upscaler"
    with pytest.raises(InvalidValueError, match="makes 12000x12000 of 1500x1500, and at most 100,000,000 pixels"):
        blank.enlarge(Image.new("RGB", (1500, 1500)), 1600, 1600)


def tiny_swin_ir() -> dict[str, torch.Tensor]:
    load_spandrel()
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2]}
    return dict(SwinIR(upscale=2, mlp_ratio=2, upsampler="pixelshuffledirect", **sizes).state_dict())


def tiny_compact() -> dict[str, torch.Tensor]:
    load_spandrel()
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(0)
    return dict(Compact(num_feat=8, num_conv=2, upscale=3).state_dict())


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(("state_of", "scale"), [(tiny_swin_ir, 2), (tiny_compact, 3)])
def test_other_architectures(catalog: Catalog, tmp_path: Path, state_of: Any, scale: int) -> None:
    """Swin's windows are eight pixels: tiles begin between two of them."""
    save_file(state_of(), tmp_path / FILE)
    found = of_file(catalog, tmp_path)
    upscaler = load_upscaler(found, "upscaler-own", "cpu")
    assert upscaler.scale == scale
    image = noise(40, 24)
    ours = np.asarray(upscaler.once(image)).astype(int)
    assert np.abs(ours - np.asarray(by_spandrel(tmp_path / FILE, image))).max() <= 1
    assert footprint(found, found.component("upscaler-own")).work > 0


def of_file(catalog: Catalog, folder: Path) -> Catalog:
    spec = {"id": "upscaler-own", "kind": "upscaler", "source": {"checkpoint": folder / FILE}}
    data = catalog.model_dump()
    data["components"] += (spec,)
    data["upscalers"] = ({"name": "Own", "component": "upscaler-own"},)
    return Catalog.model_validate(data)


def test_weights_that_do_not_load(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    state, file = load_file(tiny_models / "upscaler-x4" / FILE), tmp_path / FILE
    found = of_file(catalog, tmp_path)

    def refused(changed: dict[str, torch.Tensor] | bytes) -> str:
        if isinstance(changed, bytes):
            file.write_bytes(changed)
        else:
            save_file(changed, file)
        with pytest.raises(WeightsError) as caught:
            load_upscaler(found, "upscaler-own", "cpu")
        assert "component upscaler-own, file model.safetensors" in str(caught.value)
        return str(caught.value)

    assert "truncated or damaged" in refused((tiny_models / "upscaler-x4" / FILE).read_bytes()[:-9])
    assert "cannot be loaded" in refused({"something.weight": torch.zeros(1)})
    assert "cannot be loaded" in refused(
        {name: t for name, t in state.items() if name != "model.1.sub.0.RDB2.conv1.0.bias"}
    )
    assert "not finite" in refused(state | {"model.0.bias": state["model.0.bias"] * torch.inf})
    grey = state | {"model.0.weight": torch.zeros(8, 1, 3, 3)}
    assert "does not enlarge pictures of 3 channels" in refused(grey)
    file.unlink()
    with pytest.raises(WeightsError, match="no such file"):
        load_upscaler(found, "upscaler-own", "cpu")


def test_published_esrgan_is_counted_without_its_file(catalog: Catalog) -> None:
    data = catalog.model_dump()
    source = {"repo": "somebody/esrgan", "revision": "0" * 40}
    data["components"] += ({"id": "upscaler-hub", "kind": "upscaler", "source": source, "file": "x.safetensors"},)
    data["upscalers"] = ({"name": "Hub", "component": "upscaler-hub"},)
    found = Catalog.model_validate(data)
    counted = footprint(found, found.component("upscaler-hub"))
    assert counted.weights == 4 * 16_697_987
    assert 0.4e9 < counted.work < 0.8e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "sd"}, "upscalers have no family"),
        ({"file": None}, "`file` names an upscaler"),
        ({"kind": "vae"}, "upscalers have no family"),
    ],
)
def test_entries_that_contradict_themselves(
    catalog: Catalog, tiny_models: Path, changes: dict[str, Any], message: str
) -> None:
    data = with_upscalers(catalog, tiny_models).model_dump()
    data["components"] = (*data["components"][:-1], data["components"][-1] | changes)
    with pytest.raises(ValueError, match=message):
        Catalog.model_validate(data)


def test_an_upscaler_cannot_have_the_name_of_a_method(catalog: Catalog, tiny_models: Path) -> None:
    data = with_upscalers(catalog, tiny_models).model_dump()
    data["upscalers"][0]["name"] = "Lanczos"
    with pytest.raises(ValueError, match="upscaler"):
        Catalog.model_validate(data)


def test_nothing_of_torchvision_stays() -> None:
    read_upscaler(tiny_compact())
    assert "torchvision" not in sys.modules


def test_pixels_travel_as_they_are() -> None:
    image = noise(5, 7)
    assert np.array_equal(np.asarray(Pixels.of(image).image()), np.asarray(image))
