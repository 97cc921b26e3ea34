"""Captions, composites, starts that carry everything over, checkpoints: what the recipe relies on, without its data."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTextModel

from training import autoencoder, data, diffusion, judge, sdxl, text
from training.loop import Schedule, train
from training.scenes import composite, crop
from training.words import BACKGROUNDS, COLOURS, HELD_OUT, OBJECTS, SUBJECTS, TRAINING, Subject, caption, prompt


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    """Discs of random colours in the sprites' format, one for each object."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    alpha = ((x**2 + y**2) < 0.6).float()
    colours = torch.rand(len(OBJECTS), 3, 1, 1, generator=generator)
    return torch.cat([colours * alpha, alpha.expand(len(OBJECTS), 1, -1, -1)], 1)


@pytest.fixture(scope="module")
def tokenizer() -> text.CLIPTokenizer:
    return text.build_tokenizer(("red apple", "tiger face"))


@pytest.fixture(scope="module")
def tower(tokenizer: text.CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(text.config(tokenizer)).eval()


def test_held_out_pairs_are_never_trained_on() -> None:
    assert set(HELD_OUT).isdisjoint(TRAINING)
    assert len(HELD_OUT) + len(TRAINING) == len(SUBJECTS)
    assert 0.04 < len(HELD_OUT) / (len(OBJECTS) * len(COLOURS)) < 0.07
    assert len({s.thing for s in HELD_OUT}) > len(OBJECTS) / 2


def test_captions_say_what_is_shown() -> None:
    rng = random.Random(0)
    subject = Subject(list(OBJECTS).index("apple"), BACKGROUNDS.index("sky blue"))
    texts = [caption(subject, rng) for _ in range(2000)]
    assert 0.07 < sum(not t for t in texts) / len(texts) < 0.13
    assert 0.7 < sum("apple" in t and "sky blue" in t for t in texts) / len(texts) < 0.9
    assert prompt(subject) == "an apple on a sky blue background"
    assert text.said(subject, "an apple") == (subject.thing + 1, 0)
    assert text.said(subject, "a sky blue background") == (0, subject.background + 1)


def test_the_judge_sees_every_background_colour(sprites: torch.Tensor) -> None:
    torch.manual_seed(0)
    pictures = torch.stack([composite(sprites, Subject(0, colour), 128, 128) for colour in range(len(COLOURS))])
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert judge.background_colour(pictures).tolist() == list(range(len(COLOURS)))


def test_a_composite_can_be_wide(sprites: torch.Tensor) -> None:
    assert composite(sprites, SUBJECTS[-1], 64, 96).shape == (3, 64, 96)
    assert crop(sprites, 48).shape == (3, 48, 48)


def test_the_autoencoders_start_passes_colours() -> None:
    vae = autoencoder.build(32, 512).eval()
    flat = torch.tensor([0.5, -0.3, 0.8])[None, :, None, None].expand(1, 3, 128, 128)
    with torch.no_grad():
        latents = vae.encode(flat).latent_dist.mean
        assert latents.shape == (1, 32, 4, 4)
        again = vae.decode(latents).sample
    assert (again - flat)[:, :, 40:88, 40:88].abs().max() < 0.35


def test_scaling_latents_changes_no_picture(sprites: torch.Tensor) -> None:
    torch.manual_seed(0)
    vae = autoencoder.build(32, 512).eval()
    pictures = torch.stack([crop(sprites, 128) for _ in range(6)])
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        diffusion.scale_latents(vae, vae.encode(pictures).latent_dist.mean)
        latents = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latents).sample
    assert latents.mean().abs() < 1e-4
    assert latents.square().mean() == pytest.approx(1, rel=0.05)
    assert (before - after).abs().max() < 1e-3


def test_the_larger_autoencoder_begins_as_the_smaller_on_a_halved_picture() -> None:
    torch.manual_seed(0)
    small = autoencoder.build(32, 512).eval()
    large = sdxl.larger_autoencoder(small).eval()
    latents = torch.randn(1, 32, 2, 2)
    with torch.no_grad():
        twice = large.decode(latents).sample
        once = small.decode(latents).sample
    assert twice.shape[-1] == 2 * once.shape[-1]
    assert (nn.functional.avg_pool2d(twice, 2) - once).abs().mean() < 0.1 * once.std()
    trained = {id(p) for part in sdxl.outer_levels(large) for p in part.parameters()}
    assert 0 < len(trained) < len(list(large.parameters())) / 3


def test_the_sdxl_shape_begins_as_the_sd_shape(tower: CLIPTextModel, tokenizer: text.CLIPTokenizer) -> None:
    torch.manual_seed(0)
    sd = diffusion.sd_unet().eval()
    texts = text.captions(64)
    tokens = text.ids(tokenizer, texts)
    xl = sdxl.unet(sd, tower, tokens).eval()
    encode_sd = diffusion.conditions_of_sd(tower, tokenizer)
    first, second = sdxl.text_encoders(tower, tokenizer)
    encode_xl = sdxl.conditions_of_sdxl(first, second, tokenizer)
    sample, time = torch.randn(4, 32, 16, 16), torch.tensor([10, 300, 700, 990])
    with torch.no_grad():
        conditions = encode_xl(texts[:4])
        context = conditions.pop("encoder_hidden_states")
        ours = xl(sample, time, context, added_cond_kwargs=conditions).sample
        same = sd(sample, time, encode_sd(texts[:4])["encoder_hidden_states"]).sample
        other = sd(sample, time, encode_sd(texts[4:8])["encoder_hidden_states"]).sample
    assert (ours - same).abs().mean() < 0.5 * (other - same).abs().mean()
    assert conditions["text_embeds"].shape == (4, text.WIDTH)


def test_a_tower_learns_to_name(tokenizer: text.CLIPTokenizer) -> None:
    torch.manual_seed(0)
    namer = text.Namer(CLIPTextModel(text.config(tokenizer, layers=1)))
    templates = text.style_templates()
    optimizer = torch.optim.AdamW(namer.parameters(), 1e-3)
    losses = []
    for _ in range(25):
        loss = text.loss_of(namer, tokenizer, templates, 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_of(model: nn.Module) -> torch.Tensor:
        return (model(torch.randn(8, 4)) - 1).square().mean()

    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(4, 2)

    class InterruptedRunError(Exception):
        pass

    schedule = Schedule(steps=30, learning_rate=1e-2, warmup=5)
    whole = train("whole", model(), loss_of, schedule, tmp_path / "whole")
    calls = 0

    def broken(part: nn.Module) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise InterruptedRunError
        return loss_of(part)

    monkeypatch.setattr("training.loop.CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(InterruptedRunError):
        train("first half", model(), broken, schedule, tmp_path / "halves")
    resumed = train("second half", model(), loss_of, schedule, tmp_path / "halves")
    assert torch.equal(whole.weight, resumed.weight)


def test_the_average_has_the_models_running_statistics(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    average = train(
        "norm", model, lambda m: m(torch.randn(16, 3) + 5).square().mean(), Schedule(20, 1e-3), tmp_path / "x"
    )
    assert torch.equal(average[0].running_mean, model[0].running_mean)
    assert average[0].running_mean.min() > 3


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BUILD", tmp_path)
    package = data.Package("@a/b", "1.0.0", "0" * 64)
    folder = tmp_path / "packages"
    folder.mkdir()
    manifest = json.dumps({"license": "GPL-3.0"}).encode()
    with tarfile.open(folder / "a-b-1.0.0.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/package.json")
        entry.size = len(manifest)
        archive.addfile(entry, io.BytesIO(manifest))
    with pytest.raises(data.DataError, match="SHA-256"):
        data.fetch(package)
    digest = data.hashlib.sha256((folder / "a-b-1.0.0.tgz").read_bytes()).hexdigest()
    with pytest.raises(data.DataError, match=r"licence 'GPL-3\.0'"):
        data.fetch(data.Package("@a/b", "1.0.0", digest))
