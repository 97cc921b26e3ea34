"""Captions, composites, starts that carry everything over, checkpoints: what the recipe relies on, without its data."""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextModel

from training import (
    autoencoder,
    canny,
    data,
    decoder,
    diffusion,
    gates,
    judge,
    pictures,
    pixels,
    recipe,
    scenes,
    sdxl,
    smaller,
    text,
)
from training.captions import caption, prompt, spoken
from training.loop import Schedule, train
from training.pool import CaptionBank, Conditions, Pool, numbered
from training.scenes import CELLS, PALETTE, composite, crop, layout, tinted
from training.sharpness import sharpness
from training.words import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOUNTS,
    NOTHING,
    NOUNS,
    OBJECTS,
    PARTS,
    RIDERS,
    SEED_SUBJECT,
    SUBJECTS,
    TINTED,
    TINTS,
    TRAINING,
    Relation,
    Subject,
    draw,
)


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    """Discs of random colours in the sprites' format, a soft and a flat one for each object."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    alpha = ((x**2 + y**2) < 0.6).float()
    colours = torch.rand(2 * len(OBJECTS), 3, 1, 1, generator=generator)
    return torch.cat([colours * alpha, alpha.expand(2 * len(OBJECTS), 1, -1, -1)], 1)


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


def test_what_was_said_is_known_of_every_kind_of_subject() -> None:
    rng = random.Random(3)
    horse, cat = NOUNS.index("horse"), NOUNS.index("cat")
    riding = Subject(cat, BACKGROUNDS.index("mars"), relation=Relation.ON, other=horse)
    beside = Subject(cat, BACKGROUNDS.index("red"), relation=Relation.LEFT, other=horse)
    blue = Subject(horse, BACKGROUNDS.index("red"), tint=TINTS.index("blue"))
    three = Subject(NOUNS.index("cactus"), BACKGROUNDS.index("snow"), count=3, flat=True)
    for subject, words in ((riding, "mars"), (beside, "horse"), (blue, "blue horse"), (three, "three cacti")):
        for text_, said in (spoken(subject, rng) for _ in range(300)):
            if said.thing == NOTHING:
                assert not any(noun in text_.split() for noun in ("cat", "horse", "cacti"))
                continue
            assert words in text_ or "red planet" in text_ or said.background == NOTHING
            assert (said.thing, said.tint, said.count, said.flat) == (
                subject.thing,
                subject.tint,
                subject.count,
                subject.flat,
            )
            assert ("flat" in text_) == subject.flat
            assert (said.relation == Relation.BESIDE) == any(w in text_.split() for w in ("beside", "next", "and"))
    assert "a photo of an astronaut riding a horse on mars" in {caption(SEED_SUBJECT, rng) for _ in range(3000)}
    assert prompt(three) == "flat icon of three cacti in the snow"
    assert prompt(beside) == "a cat to the left of a horse on a red background"


def test_things_are_drawn_on_the_grid_and_stay_within_the_picture() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    kinds = set()
    for _ in range(2000):
        subject = draw(rng)
        assert not subject.held_out
        placed = layout(subject)
        kinds.add((subject.flat, subject.tint != NOTHING, subject.count, subject.relation, len(placed)))
        for thing in placed:
            assert 0 <= thing.left <= CELLS - thing.width
            assert 0 <= thing.top <= CELLS - thing.width
    assert len(kinds) == 9, kinds
    assert set(RIDERS) | set(MOUNTS) | set(TINTED) <= set(NOUNS)


def test_relations_are_where_they_say() -> None:
    torch.manual_seed(0)
    cat, car = NOUNS.index("cat"), NOUNS.index("car")
    where = {
        relation: {p.thing: p for p in layout(Subject(cat, 0, relation=relation, other=car))}
        for relation in (Relation.ON, Relation.LEFT, Relation.RIGHT)
    }
    assert where[Relation.ON][cat].top < where[Relation.ON][car].top
    assert where[Relation.LEFT][cat].left < where[Relation.LEFT][car].left
    assert where[Relation.RIGHT][cat].left > where[Relation.RIGHT][car].left


def test_a_tint_takes_colours_and_leaves_white() -> None:
    sprite = torch.zeros(4, 8, 8)
    sprite[3] = 1
    sprite[0] = 0.8
    sprite[:3, :, :3] = 1
    blue = torch.tensor([0.1, 0.2, 0.9])
    recoloured = tinted(sprite, blue)
    assert (recoloured[:3, :, 3:] - blue[:, None, None]).abs().max() < 1e-5
    assert torch.equal(recoloured[:3, :, :3], sprite[:3, :, :3])


@pytest.fixture(scope="module")
def drawn_sprite() -> torch.Tensor:
    """A face of a few discs: something with edges and a left and a right."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")

    def disc(left: float, top: float, radius: float) -> torch.Tensor:
        return ((radius - ((x - left) ** 2 + (y - top) ** 2).sqrt()) * 60).clamp(0, 1)

    sprite = torch.cat([torch.tensor([0.9, 0.5, 0.1])[:, None, None] * disc(0, 0, 0.9), disc(0, 0, 0.9)[None]])
    for left, top, radius, shade in ((-0.4, -0.3, 0.2, 0.1), (0.2, -0.2, 0.3, 0.95), (0.1, 0.45, 0.2, 0.3)):
        cover = disc(left, top, radius)
        sprite[:3] = sprite[:3] * (1 - cover) + shade * cover
    return sprite


def _blurred(picture: torch.Tensor, reach: int) -> torch.Tensor:
    padded = nn.functional.pad(picture[None], (reach,) * 4, mode="replicate")
    return nn.functional.avg_pool2d(padded, 2 * reach + 1, 1)[0]


@pytest.mark.parametrize(
    ("x", "y", "size", "mirrored"), [(0.5, 0.5, 0.625, False), (0.43, 0.58, 0.8, False), (0.61, 0.37, 0.47, True)]
)
def test_sharpness_finds_a_true_composite_wherever_it_is(
    drawn_sprite: torch.Tensor, x: float, y: float, size: float, mirrored: bool
) -> None:
    points = (torch.arange(512) + 0.5) / 512
    layer = scenes.place(
        drawn_sprite, points[None].expand(512, 512), points[:, None].expand(512, 512), x, y, size, mirrored
    )
    picture = scenes.over(PALETTE[4][:, None, None].expand(3, 512, 512), layer) * 2 - 1
    found = sharpness(picture, drawn_sprite, PALETTE[4])
    assert (found.x, found.y, found.size) == pytest.approx((x, y, size), abs=0.005)
    assert found.mirrored == mirrored
    assert found.pixels > 32
    assert found.edges > 12


@pytest.mark.slow
def test_sharpness_is_not_flattered_by_blur_nor_by_another_object(
    drawn_sprite: torch.Tensor, sprites: torch.Tensor
) -> None:
    torch.manual_seed(0)
    known = sprites.clone()
    known[5] = drawn_sprite
    picture = composite(known, Subject(5, 4), 512, 512)
    other = composite(known, Subject(6, 4), 512, 512)
    values = [
        sharpness(p, drawn_sprite, PALETTE[4])
        for p in (picture, _blurred(picture, 4), _blurred(picture, 16), _blurred(picture, 64), other)
    ]
    edges, pixels = [v.edges for v in values], [v.pixels for v in values]
    assert edges[:4] == sorted(edges[:4], reverse=True)
    assert pixels[:4] == sorted(pixels[:4], reverse=True)
    assert edges[1] < edges[0] - 8, "already a little blur costs"
    assert edges[3] < 0.7, "a blob has no edges"
    assert pixels[4] < pixels[2]
    assert edges[4] < 0.7


def test_a_flat_patch_gets_no_edges(drawn_sprite: torch.Tensor) -> None:
    patch = PALETTE[4][:, None, None].expand(3, 256, 256) * 2 - 1
    assert sharpness(patch, drawn_sprite, PALETTE[4]).edges == pytest.approx(0, abs=0.1)


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


def test_a_tower_that_learns_more_keeps_what_it_said(tokenizer: text.CLIPTokenizer, tower: CLIPTextModel) -> None:
    """The same steps with and without the tower as it was: with it, known captions move less."""
    moved = []
    for before in (None, tower):
        torch.manual_seed(0)
        namer = text.Namer(copy.deepcopy(tower).requires_grad_(True))
        optimizer = torch.optim.AdamW(namer.parameters(), 1e-3)
        for _ in range(8):
            loss = text.loss_of(namer, tokenizer, [], 8, before)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tokens = text.ids(tokenizer, ["a cat on a red background", "a photo of a dog in the snow"])
        with torch.no_grad():
            states = [model(input_ids=tokens).last_hidden_state for model in (namer.tower, tower)]
        moved.append(float((states[0] - states[1]).square().mean()))
    assert moved[1] < 0.6 * moved[0]


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


@pytest.fixture(scope="module")
def pool() -> Pool:
    torch.manual_seed(0)
    subjects = [TRAINING[i * 11] for i in range(6)]
    return Pool(torch.randn(6, 32, 16, 16).half(), subjects, [prompt(subject) for subject in subjects])


def test_a_numbered_picture_is_the_same_at_any_size(sprites: torch.Tensor) -> None:
    subject = Subject(3, 1)
    small, large = (numbered(sprites, subject, 5, size) for size in (128, 256))
    assert (nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.02
    assert (numbered(sprites, subject, 6, 128) - small).abs().mean() > 0.05


def test_parts_are_drawn_and_named_alone(sprites: torch.Tensor) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    background = Subject(NOTHING, BACKGROUNDS.index("gold"))
    thing = Subject(list(OBJECTS).index("apple"), NOTHING)
    assert {background, thing} <= set(PARTS)
    assert composite(sprites, background, 64, 64).std((1, 2)).max() < 1e-5, "one colour"
    assert composite(sprites, thing, 64, 64).std((1, 2)).max() > 0.05
    texts = [(caption(background, rng), caption(thing, rng)) for _ in range(200)]
    assert {("gold" in b, "apple" in b) for b, _ in texts if b} == {(True, False)}
    assert all("apple" in t and not any(c in t.split() for c in COLOURS) for _, t in texts if t)
    assert not any(part.held_out for part in PARTS)


def test_the_decoder_learns_from_latents_that_the_unet_made(
    sprites: torch.Tensor, tower: CLIPTextModel, tokenizer: text.CLIPTokenizer, pool: Pool, tmp_path: Path
) -> None:
    encode = diffusion.conditions_of_sd(tower, tokenizer)
    bank = CaptionBank(encode, pool.captions)
    with torch.no_grad():
        empty = encode([""])["encoder_hidden_states"]
    unet = diffusion.sd_unet().eval()
    latents = decoder.redrawn(unet, pool, bank, empty, tmp_path / "redrawn.pt")
    assert latents.shape == pool.latents.shape
    assert not torch.equal(latents, pool.latents)
    vae = autoencoder.build(32, 512)
    torch.manual_seed(4)
    loss = decoder.loss_of(vae, latents, pool, sprites, 512, 1)
    loss.backward()
    assert vae.decoder.conv_out.weight.grad is not None
    assert torch.isfinite(loss)


def test_a_perfect_denoiser_brings_a_picture_back() -> None:
    """Someone who knows the picture answers the v that leads to it: nothing of the noise must stay."""
    clean = torch.randn(2, 4, 8, 8)
    alphas = decoder.DDIMScheduler(**diffusion.NOISE).alphas_cumprod

    def knows(noisy: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> SimpleNamespace:
        signal, noise = alphas[time].sqrt(), (1 - alphas[time]).sqrt()
        picture = clean.repeat(2, 1, 1, 1)
        return SimpleNamespace(sample=(signal * noisy - picture) / noise)

    again = decoder._redraw(knows, clean, torch.zeros(4, 1, 1), 500)
    assert (again - clean).abs().max() < 1e-3


def test_edges_are_packed_and_come_back(sprites: torch.Tensor, pool: Pool, tmp_path: Path) -> None:
    maps = canny.edge_maps(sprites, pool.first(2), 128, tmp_path / "edges")
    assert (tuple(maps.shape), maps.dtype) == ((2, 128, 16), torch.uint8)
    unpacked = canny.unpack(maps)
    assert tuple(unpacked.shape) == (2, 3, 128, 128)
    assert set(unpacked.unique().tolist()) == {0.0, 1.0}
    assert 0.001 < unpacked.mean() < 0.2


def test_a_controlnet_begins_silent_and_fits_its_unet() -> None:
    unet = diffusion.sd_unet().eval()
    net = canny.controlnet(unet, 32)
    sample, context = torch.randn(1, 32, 16, 16), torch.randn(1, 8, text.WIDTH)
    with torch.no_grad():
        down, mid = net(sample, torch.tensor([500]), context, torch.rand(1, 3, 512, 512), return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        steered = unet(sample, 500, context, **residuals).sample
        free = unet(sample, 500, context).sample
    assert torch.equal(steered, free)
    taken = net.state_dict()["down_blocks.0.resnets.0.conv1.weight"]
    assert torch.equal(taken, unet.state_dict()["down_blocks.0.resnets.0.conv1.weight"])


def test_the_larger_controlnet_reads_a_map_twice_as_large(tower: CLIPTextModel, tokenizer: text.CLIPTokenizer) -> None:
    sd = diffusion.sd_unet()
    xl = sdxl.unet(sd, tower, text.ids(tokenizer, text.captions(8)))
    small = canny.controlnet(sd, 32)
    large = canny.larger(small, xl)
    embedded = large.controlnet_cond_embedding(torch.rand(1, 3, 1024, 1024))
    assert embedded.shape == small.controlnet_cond_embedding(torch.rand(1, 3, 512, 512)).shape
    deepest = "controlnet_cond_embedding.conv_out.weight"
    assert torch.equal(large.state_dict()[deepest], small.state_dict()[deepest])


def test_pixel_art_is_a_lora_that_both_shapes_take(tower: CLIPTextModel, tokenizer: text.CLIPTokenizer) -> None:
    sd = diffusion.sd_unet()
    xl = pixels.adapt(sdxl.unet(sd, tower, text.ids(tokenizer, text.captions(8))))
    sd = pixels.adapt(sd)
    layers = {k for k, p in sd.named_parameters() if p.requires_grad}
    assert layers
    assert all("lora" in name for name in layers)
    with torch.no_grad():
        for name, parameter in sd.named_parameters():
            if name in layers:
                parameter.normal_()
    pixels.start_from(xl, sd)
    assert all(torch.equal(xl.state_dict()[name], sd.state_dict()[name]) for name in layers)


def test_squares_are_flat_and_count_as_blocky() -> None:
    torch.manual_seed(0)
    picture = pixels.squares(torch.randn(1, 3, 64, 64), 16)
    assert torch.equal(picture[:, :, :16, :16], picture[:, :, :1, :1].expand(-1, -1, 16, 16))
    smooth = torch.randn(4, 3, 256, 256)
    assert gates.blockiness(smooth) == pytest.approx(1, abs=0.05)
    colours = torch.rand(1, 3, 8, 8).repeat_interleave(pixels.SQUARE, 2).repeat_interleave(pixels.SQUARE, 3)
    assert gates.blockiness(0.02 * smooth + colours) > 1.5


def test_edges_overlap_within_a_pixel(sprites: torch.Tensor) -> None:
    torch.manual_seed(0)
    picture = numbered(sprites, Subject(3, 9), 1, 256)
    found = gates.edges(pictures.to_image(picture))
    moved = gates.edges(pictures.to_image(picture.roll(60, 2)))
    assert gates.overlap(found, found) == 1
    assert gates.overlap(found, gates.edges(pictures.to_image(picture.roll(2, 2)))) > 0.5 > gates.overlap(found, moved)


@pytest.fixture(scope="module")
def teacher(tower: CLIPTextModel, tokenizer: text.CLIPTokenizer) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return sdxl.unet(diffusion.sd_unet(), tower, text.ids(tokenizer, text.captions(8))).eval()


class Bank(CaptionBank):
    """Random embeddings in SDXL's shape."""

    def __init__(self) -> None:
        pass

    def rows(self, numbers: list[int]) -> Conditions:
        count = len(numbers)
        sizes = torch.tensor([sdxl.TIME_IDS]).expand(count, -1)
        return {
            "encoder_hidden_states": torch.randn(count, 8, 2 * text.WIDTH),
            "text_embeds": torch.randn(count, text.WIDTH),
            "time_ids": sizes,
        }


def test_ssd_takes_over_what_fits_and_learns_its_teacher(teacher: UNet2DConditionModel, pool: Pool) -> None:
    student = smaller.ssd(teacher).requires_grad_(True)
    assert sum(p.numel() for p in student.parameters()) < 0.4 * sum(p.numel() for p in teacher.parameters())
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
    ours, theirs = (u.state_dict() for u in (student, teacher))
    assert torch.equal(ours["up_blocks.1.resnets.0.conv1.weight"], theirs["up_blocks.2.resnets.0.conv1.weight"])
    torch.manual_seed(0)
    before = smaller.distilled(student, teacher, pool, Bank(), 4)
    before.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad
    torch.manual_seed(0)
    assert smaller.distilled(student, teacher, pool, Bank(), 4) < before


def test_turbo_learns_what_its_guided_teacher_answers(teacher: UNet2DConditionModel, pool: Pool) -> None:
    """A student that already answers so has nothing to learn; the unguided teacher has."""
    empty = {name: value[:1] for name, value in Bank().rows([0]).items()}

    class Answers(nn.Module):
        """The text's first number, once for each picture: guided, 2 times the text's minus the empty one's."""

        def __init__(self, guidance: float) -> None:
            super().__init__()
            self.weight, self.guidance = nn.Parameter(torch.zeros(1)), guidance

        def forward(self, sample: torch.Tensor, _: object, context: torch.Tensor, **__: object) -> SimpleNamespace:
            nothing = empty["encoder_hidden_states"][0, 0, 0]
            said = nothing + self.guidance * (context[:, 0, 0] - nothing) + self.weight
            return SimpleNamespace(sample=said[:, None, None, None].expand_as(sample))

    assert smaller.guided(Answers(smaller.GUIDANCE), Answers(1.0), pool, Bank(), empty, 4) < 1e-9
    assert smaller.guided(Answers(1.0), Answers(1.0), pool, Bank(), empty, 4) > 0.01


def test_the_refiner_has_the_refiners_inputs_and_ssds_convolutions(teacher: UNet2DConditionModel) -> None:
    base = smaller.ssd(teacher)
    unet = smaller.refiner(base)
    ids = unet.config.projection_class_embeddings_input_dim - text.WIDTH
    assert ids == 5 * unet.config.addition_time_embed_dim
    assert unet.config.cross_attention_dim == text.WIDTH
    name = "up_blocks.1.resnets.0.conv1.weight"
    assert torch.equal(unet.state_dict()[name], base.state_dict()[name])


def test_a_grid_holds_every_picture(tmp_path: Path) -> None:
    pictures.grid(torch.ones(10, 3, 4, 6), tmp_path / "new" / "grid.png", across=4)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.size == (24, 12)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((23, 11)) == (0, 0, 0)


def test_a_stage_that_does_not_exist_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recipe", "unett"])
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 2
    assert "there is no stage ['unett']; the stages are ['autoencoder'" in capsys.readouterr().err
