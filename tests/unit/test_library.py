"""A folder beside a catalog: what becomes of each file, by which name, and why not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from config.catalog import Catalog, CatalogError
from config.library import MAX_NAME
from pipelines.library.files import LibraryFolders
from pipelines.library.library import Library, extend
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from tests.support import original_layout
from tests.support.library import LORA, UNET, extended, put, read, reasons, settled, write


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    folder.mkdir()
    return folder


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "digests.json"


def names(catalog: Catalog) -> set[str]:
    return {lora.name for lora in catalog.loras if lora.unavailable is None}


def test_a_unet_alone_is_a_model_with_the_rest_of_the_catalogs(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    put(tiny_models / "sd15" / UNET, library / "checkpoints" / "My Fine-Tune.safetensors")
    found = read(catalog, library, memory)
    model, kin = found.model("My Fine-Tune"), found.model("SD1.5")
    assert (model.text_encoder, model.vae) == (kin.text_encoder, kin.vae)
    assert (model.family, model.sizes, model.defaults, model.refiner) == ("sd", kin.sizes, kin.defaults, None)
    assert model.unet == "unet-my-fine-tune"
    assert found.model_choices().resolve("my fine-TUNE") == "My Fine-Tune"
    assert found.unserved == ()
    assert model.unet in next(lora for lora in found.loras if lora.name == "Add_Detail").bases


def test_a_folder_in_diffusers_layout_shares_what_equals_the_catalogs(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    shutil.copytree(tiny_models / "sdxl", library / "xl")
    changed = library / "xl" / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(changed)
    state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 1
    save_file(state, changed)
    model = read(catalog, library, memory).model("xl")
    assert (model.text_encoder, model.vae) == ("text-encoder-sdxl", "vae-xl")
    assert model.refiner is None, "it works on the catalog's latents"


def test_equal_weights_are_found_across_layouts_and_remembered(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(original_layout.of_folder(tiny_models / "sd15"), library / "whole.safetensors")
    settled(library / "whole.safetensors")
    model = extended(catalog, [library], memory).model("whole")
    assert (model.text_encoder, model.vae) == ("text-encoder-sd15", "vae-sd15")
    monkeypatch.setattr("pipelines.library.equality._digest", lambda *_: pytest.fail("it was read again"))
    assert extended(catalog, [library], memory).model("whole") == model


def test_two_files_share_what_neither_has_from_the_catalog(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny_models / "sd15", library / name)
        state = load_file(library / name / "vae" / "diffusion_pytorch_model.safetensors")
        save_file({k: v * 2 for k, v in state.items()}, library / name / "vae" / "diffusion_pytorch_model.safetensors")
    found = extended(catalog, [library], memory)
    assert found.model("a").vae == found.model("b").vae == "vae-a"
    assert found.model("a").unet != found.model("b").unet


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_a_lora_is_a_name_with_the_unets_it_fits(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path, base: str
) -> None:
    put(tiny_models / f"lora-detail-{base}" / LORA, library / "loras" / "Mine.safetensors")
    put(tiny_models / "sd15" / UNET, library / "other.safetensors")
    found = read(catalog, library, memory)
    (lora,) = (lora for lora in found.loras if lora.name == "Mine")
    fits = {"sd15": {"unet-sd15", "unet-other"}, "sdxl": {"unet-sdxl-base", "unet-sdxl-turbo"}}
    assert set(lora.bases) == fits[base], "SSD lacks layers that it changes"


def test_a_yaml_beside_a_file_overrides(catalog: Catalog, tiny_models: Path, library: Path, memory: Path) -> None:
    put(tiny_models / "sd15" / UNET, library / "v7_final.safetensors")
    put(tiny_models / "sd15" / "vae" / "diffusion_pytorch_model.safetensors", library / "vae" / "crisp.safetensors")
    put(tiny_models / "lora-detail-sd15" / LORA, library / "det.safetensors")
    write(
        library / "v7_final.yaml",
        "name: Seven\naliases: [7]\ndefaults: {steps: 5, sampler: Heun}\nsizes: [256x256]\nvae: crisp\n"
        "scheduler: {prediction_type: v_prediction, rescale_betas_zero_snr: true}\n".replace("[7]", "['7']"),
    )
    write(library / "det.yaml", "{name: Detail, aliases: [more, sci-fi], trigger: a detailed picture}")
    found = read(catalog, library, memory)
    model = found.model(found.model_choices().resolve("7"))
    assert (model.name, model.defaults.steps, model.defaults.sampler) == ("Seven", 5, "Heun")
    assert [str(size) for size in model.sizes] == ["256x256"]
    assert model.vae == "vae-sd15", "the same weights as the catalog's"
    assert found.component(model.unet).scheduler.prediction_type == "v_prediction"
    lora = next(entry for entry in found.loras if entry.name == found.lora_choices().resolve("MORE"))
    assert (lora.name, lora.trigger) == ("Detail", "a detailed picture")
    assert found.lora_choices().resolve("Sci-fi") == "Detail", "the catalog lists the name without weights"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a/b", "bad.yaml: name: 'a/b': a name has neither slashes"),
        (f"name: {'x' * 101}", "at most 100 characters"),
        ("nmae: x", "bad.yaml: nmae: Extra inputs are not permitted"),
        ("defaults: {steps: many}", "bad.yaml: defaults.steps: Input should be a valid integer"),
        ("[", "bad.yaml: it is no YAML"),
        ("- 1", "bad.yaml: Input should be"),
        ("x" * 2**17, "bad.yaml: it is longer than 65,536 bytes"),
        ("vae: nothing", "bad.yaml: vae 'nothing' is not in the library, whose VAEs are []"),
        ("sizes: [100x100]", "bad.yaml: size 100x100 is not a multiple of 8"),
        ("scheduler: {prediction_type: x0}", "bad.yaml: scheduler.prediction_type: Input should be 'epsilon' or"),
        ("defaults: {sampler: Eular}", "Did you mean 'Euler'"),
    ],
)
def test_a_wrong_yaml_is_told_with_its_file(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path, text: str, said: str
) -> None:
    put(tiny_models / "sd15" / UNET, library / "bad.safetensors")
    write(library / "bad.yaml", text)
    put(tiny_models / "sd15" / UNET, library / "good.safetensors")
    found = read(catalog, library, memory)
    assert said in reasons(found)["bad.safetensors"]
    assert "good" in {model.name for model in found.models}


def test_of_two_files_with_one_name_the_first_gets_it(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    """A served name of the catalog stays, an unserved one goes to the file; of two files the first has it."""
    lora = tiny_models / "lora-detail-sd15" / LORA
    for path in ("pixel_art", "LOGO", "loras/twin", "loras/z/TWIN", "x" * (MAX_NAME + 1)):
        put(lora, library / f"{path}.safetensors")
    put(tiny_models / "sd15" / UNET, library / "sd1.5.safetensors")
    found = read(catalog, library, memory)
    told = reasons(found)
    assert "the name 'pixel_art' is the catalog's" in told["pixel_art.safetensors"]
    assert "the name 'sd1.5' is the catalog's" in told["sd1.5.safetensors"]
    assert "the name 'TWIN' is loras/twin.safetensors's" in told["loras/z/TWIN.safetensors"]
    assert f"at most {MAX_NAME} characters" in told[f"{'x' * 101}.safetensors"]
    assert {"LOGO", "twin", "Pixel_Art"} <= names(found)
    assert found.lora_choices().resolve("logo") == "LOGO"


def test_files_that_cannot_be_served_say_why(catalog: Catalog, tiny_models: Path, library: Path, memory: Path) -> None:
    whole = (tiny_models / "lora-detail-sd15" / LORA).read_bytes()
    write(library / "half.safetensors", whole[: len(whole) // 2])
    write(library / "zero.safetensors", b"")
    write(library / "pickle.ckpt", b"PK\x03\x04")
    outside = write(library.parent / "outside.safetensors", whole)
    (library / "link.safetensors").symlink_to(outside)
    state = {f"lora_unet_x.{part}.weight": torch.zeros(4, 4) for part in ("lora_down", "lora_up")}
    save_file(state, library / "flux.safetensors")
    settled(library / "flux.safetensors")
    for name, channels in (("edits", 8), ("odd", 7)):
        unet = load_file(tiny_models / "sd15" / UNET)
        unet["conv_in.weight"] = torch.zeros(32, channels, 3, 3)
        save_file(unet, library / f"{name}.safetensors")
        settled(library / f"{name}.safetensors")
    told = reasons(read(catalog, library, memory))
    assert "bytes of its tensors are missing; copy it again" in told["half.safetensors"]
    assert told["zero.safetensors"] == "it is empty"
    assert "pickle" in told["pickle.ckpt"]
    assert "a link that leads out of its folder" in told["link.safetensors"]
    assert "another family" in told["flux.safetensors"]
    assert "edits pictures by instructions, whose UNet takes 8 channels" in told["edits.safetensors"]
    assert "takes 7 channels, and latents have 4" in told["odd.safetensors"]


def test_models_for_inpainting(catalog: Catalog, inpainting_models: Path, library: Path, memory: Path) -> None:
    """A whole folder, and a UNet alone that takes the rest, its configuration too, of the model it is built like."""
    folder, small = inpainting_models / "SD1.5-inpainting", inpainting_models / "SDXL-inpainting" / UNET
    shutil.copytree(folder, library / "paints")
    put(small, library / "paints-large.safetensors")
    found = read(catalog, library, memory)
    assert not found.unserved
    for name, like in (("paints", "SD1.5"), ("paints-large", "SDXL1.0-base")):
        model, kin = found.model(name), found.model(like)
        assert found.component(model.unet).inpainting
        assert (model.text_encoder, model.vae, model.defaults) == (kin.text_encoder, kin.vae, kin.defaults)
        assert read_config(found.component(model.unet))["in_channels"] == 9
        assert {lora.name for lora in found.loras if model.unet in lora.bases} == {
            lora.name for lora in found.loras if kin.unet in lora.bases
        }
    side = {"width": 256, "height": 256, "steps": 2, "seed": 1}
    drawn = Text2Image(found).generate(GenerationParams(model_name="paints-large", prompt="a fox", **side))
    assert np.asarray(drawn.image).std() > 10


def test_a_link_out_of_a_models_folder_is_refused(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    shutil.copytree(tiny_models / "sd15", library / "linked")
    weights = library / "linked" / UNET
    weights.unlink()
    weights.symlink_to(tiny_models / "sd15" / UNET)
    assert "leads out of the library" in reasons(read(catalog, library, memory))["linked"]


def test_a_file_that_is_being_copied_is_not_served_until_it_rests(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    """Whole already, as copying tools that set the length first make it, but written a moment ago."""
    running = Library(extended(catalog, [library], memory))
    file = put(tiny_models / "lora-detail-sd15" / LORA, library / "fresh.safetensors")
    os.utime(file)
    found = running.read()
    (entry,) = found.unserved
    assert entry.is_new
    assert "written a moment ago" in entry.reason
    settled(file)
    assert "fresh" in names(running.read())


def test_files_added_replaced_and_removed_while_the_graph_runs_are_noticed(
    catalog: Catalog, tiny_models: Path, library: Path, memory: Path
) -> None:
    running = Library(extended(catalog, [library], memory))
    lora = put(tiny_models / "lora-detail-sd15" / LORA, library / "one.safetensors")
    put(tiny_models / "sd15" / UNET, library / "late.safetensors")
    first = running.read()
    assert "one" in names(first)
    assert "after the graph was deployed" in reasons(first)["late.safetensors"]
    put(tiny_models / "lora-pixel-sd15" / LORA, lora)
    os.utime(lora, (1, 1))
    (before,) = (entry.weights[0].version for entry in first.loras if entry.name == "one")
    (after,) = (entry.weights[0].version for entry in running.read().loras if entry.name == "one")
    assert before != after
    lora.unlink()
    gone = running.read()
    assert "one" not in names(gone)
    assert reasons(gone)["one.safetensors"] == "it was removed while the graph ran"


def test_only_what_changed_is_read_again(tiny_models: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        put(tiny_models / "lora-detail-sd15" / LORA, library / f"{name}.safetensors")
    folders = LibraryFolders([library])
    assert len(folders.scan()) == 2
    read_again: list[str] = []
    from pipelines.library import files

    real = files.inspect_file
    monkeypatch.setattr(files, "inspect_file", lambda file, root: read_again.append(file.name) or real(file, root))
    os.utime(library / "b.safetensors", (5, 5))
    folders.scan()
    assert read_again == ["b.safetensors"]


def test_embeddings_fit_models_that_read_text_as_wide(catalog: Catalog, library: Path, memory: Path) -> None:
    save_file({"emb_params": torch.zeros(2, 32)}, library / "style-a.safetensors")
    save_file({"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 64)}, library / "pair.safetensors")
    save_file({"emb_params": torch.zeros(2, 768)}, library / "real.safetensors")
    save_file({"emb_params": torch.zeros(2, 32)}, library / "a<b.safetensors")
    for file in library.iterdir():
        settled(file)
    found = read(catalog, library, memory)
    bases = {entry.name: set(entry.bases) for entry in found.embeddings}
    assert bases["style-a"] == {"unet-sd15"}
    assert bases["pair"] == {"unet-sdxl-base", "unet-ssd", "unet-sdxl-turbo"}
    told = reasons(found)
    assert "no model served here reads text so wide" in told["real.safetensors"]
    assert "another use" in told["a<b.safetensors"]


def test_several_folders_are_one_library(catalog: Catalog, tiny_models: Path, library: Path, tmp_path: Path) -> None:
    put(tiny_models / "lora-detail-sd15" / LORA, library / "one.safetensors")
    put(tiny_models / "lora-pixel-sd15" / LORA, tmp_path / "second" / "two.safetensors")
    built = extended(catalog, [library, tmp_path / "second"], tmp_path / "digests.json")
    assert {"one", "two"} <= names(Library(built).read())


def test_a_library_that_is_not_there_is_named(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"library '.*nowhere' is not a folder"):
        extend(catalog, [tmp_path / "nowhere"])
