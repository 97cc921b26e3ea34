"""What files tell of themselves: the marking, the plan, A1111's infotext; ours, other programs', hostile ones."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from config.catalog import Catalog
from pipelines.errors import RequestError
from pipelines.pictures.images import check_image, read_plan, write_image
from pipelines.pictures.infotext import infotext, parse_infotext, request_fields
from pipelines.pictures.provenance import COMPOSITE, MACHINE_MADE, VOCABULARY, read_xmp
from pipelines.plan import GenerationParams, GenerationPlan, OutputFormat, SourcePicture
from pipelines.planning import make_plan
from pipelines.sampling.a1111 import our_sampler
from pipelines.sampling.samplers import SAMPLERS
from pipelines.text.syntax import read_sections

FORMATS: list[OutputFormat] = ["jpeg", "png", "webp"]
NOISE = Image.effect_noise((48, 32), 80).convert("RGB")


def plan_of(catalog: Catalog, **fields: object) -> GenerationPlan:
    return make_plan(GenerationParams(**{"model_name": "SD1.5", "prompt": "a cat", "seed": 5, **fields}), catalog)  # type: ignore[arg-type]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "prompt", ["a cat", "naïve 猫 \N{GRINNING FACE}", "</sdgraph:plan>&amp; ]]>", "\x00\ufffe\x85"]
)
def test_every_format_carries_marking_plan_and_infotext(
    catalog: Catalog, file_format: OutputFormat, prompt: str
) -> None:
    plan = plan_of(catalog, prompt=prompt, output_format=file_format)
    file = check_image(write_image(NOISE, file_format, plan).data, "image", 10**6)
    assert (file.format, file.width, file.height) == (file_format, 48, 32)
    assert file.digital_source_type == MACHINE_MADE
    assert GenerationPlan.model_validate_json(file.plan or "") == plan
    assert "Seed: 5" in str(file.infotext)


@pytest.mark.parametrize("file_format", FORMATS)
def test_previews_are_marked_too(file_format: OutputFormat) -> None:
    file = check_image(write_image(NOISE, file_format).data, "image", 10**6)
    assert (file.digital_source_type, file.plan, file.infotext) == (MACHINE_MADE, None, None)


@pytest.mark.parametrize("text", ["x" * 30_000, "\N{GRINNING FACE}" * 15_000, "\N{GRINNING FACE}" * 20_000])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_jpeg_that_cannot_hold_its_plan_says_so_and_stays_marked(
    catalog: Catalog, text: str, file_format: OutputFormat
) -> None:
    plan = plan_of(catalog, prompt=text)
    file = check_image(write_image(NOISE, file_format, plan).data, "image", 10**6)
    assert file.digital_source_type == MACHINE_MADE
    if file_format == "jpeg" and len(text) * len("\N{GRINNING FACE}".encode()) > 65_000 and text[0] != "x":
        assert "characters" in json.loads(file.plan or "")["omitted"]
    else:
        assert GenerationPlan.model_validate_json(file.plan or "") == plan


@pytest.mark.parametrize(
    ("source_type", "expected"), [(None, COMPOSITE), ("digitalCapture", COMPOSITE), (MACHINE_MADE, MACHINE_MADE)]
)
def test_what_starts_from_a_picture_says_so(catalog: Catalog, source_type: str | None, expected: str) -> None:
    source = SourcePicture(sha256="ab" * 32, digital_source_type=source_type)
    written = write_image(NOISE, "png", plan_of(catalog).model_copy(update={"source": source})).data
    assert check_image(written, "image", 10**6).digital_source_type == expected
    assert b"urn:sha256:" + b"ab" * 32 in written


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool (Debian: libimage-exiftool-perl) is not here")
@pytest.mark.parametrize("file_format", FORMATS)
def test_exiftool_reads_all_of_it(catalog: Catalog, file_format: OutputFormat, tmp_path: Path) -> None:
    source = SourcePicture(sha256="ab" * 32)
    plan = plan_of(catalog, prompt="naïve 猫").model_copy(update={"source": source})
    path = tmp_path / f"picture.{file_format}"
    path.write_bytes(write_image(NOISE, file_format, plan).data)
    done = subprocess.run(["exiftool", "-json", "-n", path], check=True, capture_output=True, text=True)
    (told,) = json.loads(done.stdout)
    assert told["DigitalSourceType"] == VOCABULARY + COMPOSITE
    assert told["AISystemUsed"] == "SD1.5"
    assert told["DerivedFromDocumentID"] == "urn:sha256:" + "ab" * 32
    assert told["UserComment" if file_format != "png" else "Parameters"] == infotext(plan)
    assert GenerationPlan.model_validate_json(json.dumps(json.loads(told["Plan"]))) == plan
    checked = subprocess.run(["exiftool", "-validate", "-n", "-s3", path], check=True, capture_output=True, text=True)
    assert checked.stdout.startswith("0 "), "errors, warnings (a JPEG lacks the tags of a camera), minor ones"
    if file_format == "webp":
        return  # Debian's exiftool does not write WebP
    changed = tmp_path / f"changed.{file_format}"
    mark = f"-XMP-iptcExt:DigitalSourceType={VOCABULARY}digitalCapture"
    subprocess.run(["exiftool", "-o", changed, mark, path], check=True, capture_output=True)
    rewritten = check_image(changed.read_bytes(), "image", 10**6)
    assert rewritten.digital_source_type == "digitalCapture"
    assert GenerationPlan.model_validate_json(rewritten.plan or "") == plan


def test_plans_of_earlier_files_are_read() -> None:
    """PNG had a chunk of its own, the others had it where A1111 has its infotext."""
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_itxt("sdgraph", "{}")
    NOISE.save(buffer, "PNG", pnginfo=chunks)
    assert read_plan(buffer.getvalue()) == "{}"
    for kind in ("JPEG", "WEBP"):
        file = check_image(commented(b"UNICODE\0" + "{}".encode("utf-16-be"), kind), "image", 10**6)
        assert (file.plan, file.infotext) == ("{}", None)


def commented(comment: bytes, kind: str = "JPEG") -> bytes:
    """A picture with this EXIF user comment."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    NOISE.save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "packet",
    [
        '<x xmlns:i="{n}" xmlns:r="{r}"><i:DigitalSourceType r:resource="{v}digitalCapture"/></x>',
        '<x xmlns:i="{n}" i:DigitalSourceType="{v}digitalCapture"/>',
        '<x xmlns:i="{n}"><i:DigitalSourceType> {v}digitalCapture\n</i:DigitalSourceType></x>',
        '<x xmlns:i="{n}" i:DigitalSourceType="digitalCapture"/>',
    ],
)
def test_other_writers_spellings_are_read(packet: str) -> None:
    names = {"n": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/", "v": VOCABULARY}
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    assert read_xmp(packet.format(**names, r=rdf).encode()).digital_source_type == "digitalCapture"


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>'


@given(st.binary(max_size=300))
@example(BOMB)
@example(b"<x" * 10_000)
def test_hostile_xmp_tells_nothing(packet: bytes) -> None:
    assert read_xmp(packet).plan is None


A1111 = """masterpiece, (red:1.3) apple
on a table <lora:detail:0.5>
Negative prompt: blurry,
bad hands
Steps: 22, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234, Size: 512x768, Model hash: 6ce016, \
Model: v1-5-pruned, Denoising strength: 0.4, Clip skip: 2, Lora hashes: "detail: 5d4a, other: 77", Version: v1.10.1"""


def test_an_infotext_of_a1111_is_read() -> None:
    prompt, negative, pairs = parse_infotext(A1111) or ("", None, {})
    assert prompt == "masterpiece, (red:1.3) apple\non a table <lora:detail:0.5>"
    assert negative == "blurry,\nbad hands"
    assert pairs["Lora hashes"] == "detail: 5d4a, other: 77"
    assert pairs["Version"] == "v1.10.1"
    fields = request_fields(prompt, negative, pairs)
    numbers = {
        "steps": 22,
        "seed": 1234,
        "cfg_scale": 6.5,
        "strength": 0.4,
        "width": 512,
        "height": 768,
        "clip_skip": 2,
    }
    texts = {"prompt": prompt, "negative_prompt": negative, "sampler": "DPM++ 2M Karras", "prompt_syntax": "weighted"}
    assert fields == numbers | texts


@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_our_infotext_says_what_the_text_encoders_read(catalog: Catalog, syntax: str) -> None:
    how: dict[str, Any] = {"prompt_syntax": syntax, "emphasis": "No norm", "clip_skip": 3}
    plan = plan_of(catalog, prompt="a (red:1.3) [cat] \\(", negative_prompt="(fog)", **how)
    parsed = parse_infotext(infotext(plan))
    assert parsed is not None
    again = plan_of(catalog, **request_fields(*parsed))
    for side in ("prompts", "negative_prompts"):
        ((text, *_), (told, *_)) = getattr(plan.stages[0].text, side), getattr(again.stages[0].text, side)
        assert read_sections(text, plan.stages[0].text.reading.syntax) == read_sections(told, "weighted")
    assert again.stages[0].text.reading == plan.stages[0].text.reading.model_copy(update={"syntax": "weighted"})


@pytest.mark.parametrize("sampler", [name for name, spec in SAMPLERS.items() if not spec.edm])
def test_our_infotext_repeats_our_plan(catalog: Catalog, sampler: str) -> None:
    plan = plan_of(catalog, prompt="a [plain] (cat)", negative_prompt="fog", sampler=sampler, steps=9, cfg_scale=3.5)
    parsed = parse_infotext(infotext(plan))
    assert parsed is not None
    assert parsed[0] == r"a \[plain\] \(cat\)", "A1111 would read bare brackets as weights"
    fields = request_fields(*parsed)
    assert (fields["sampler"], fields["steps"], fields["cfg_scale"], fields["seed"]) == (sampler, 9, 3.5, 5)
    assert fields["negative_prompt"] == "fog"


MASKED = {"image": b"-", "mask_image": b"-", "strength": 0.6}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (MASKED, "Mask blur: 0"),
        (MASKED | {"mask_blur": 4.5, "inpaint_fill": "noise"}, "Mask blur: 4.5, Masked content: latent noise"),
        (MASKED | {"inpaint_fill": "surroundings"}, "Mask blur: 0, Masked content: fill"),
        (MASKED | {"inpaint_fill": "nothing"}, "Mask blur: 0, Masked content: latent nothing"),
        (
            MASKED | {"inpaint_area": "masked", "inpaint_padding": 16},
            "Mask blur: 0, Inpaint area: Only masked, Masked area padding: 16",
        ),
        ({"sampler": "DDIM", "eta": 0.25}, "Eta DDIM: 0.25"),
        ({"guidance_rescale": 0.7}, "CFG Rescale phi: 0.7"),
        ({"guidance_start": 0.1, "guidance_end": 0.75}, "Guidance start: 0.1, Guidance end: 0.75"),
        ({"long_prompt": "cut"}, "Long prompt: cut"),
    ],
)
def test_settings_by_the_names_that_a1111_has(catalog: Catalog, asked: dict[str, Any], told: str) -> None:
    plan = plan_of(catalog, **asked)
    text = infotext(plan)
    assert f", {told}, " in text
    parsed = parse_infotext(text)
    assert parsed is not None
    pictures = {name: value for name, value in asked.items() if isinstance(value, bytes)}
    again = plan_of(catalog, **request_fields(*parsed), **pictures)
    assert again.model_dump() | {"stages": ()} == plan.model_dump() | {"stages": ()}
    (ours,), (theirs,) = plan.stages, again.stages
    assert theirs.model_copy(update={"text": ours.text}) == ours
    assert theirs.text.reading.long_prompt == ours.text.reading.long_prompt


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours"),
    [
        ("DPM++ 2M", "Automatic", "DPM++ 2M Karras"),
        ("DPM++ 2M", "Uniform", "DPM++ 2M"),
        ("DPM++ 2M Karras", "Automatic", "DPM++ 2M Karras"),
        ("DPM++ SDE Karras", "Automatic", "DPM SDE Karras"),
        ("Euler", "Karras", None),
        ("DPM++ 2M SDE", "Automatic", "DPM++ 2M SDE"),
        ("Euler a", "Automatic", "Euler a"),
        ("PLMS", "Automatic", "PNDM"),
        ("Restart", "Automatic", None),
        ("", "", None),
    ],
)
def test_samplers_of_a1111(sampler: str, schedule: str, ours: str | None) -> None:
    assert our_sampler(sampler, schedule) == ours


@given(st.text(max_size=400) | st.text(alphabet='Steps: ,"\\\n1x', max_size=400))
@example("Steps: 1, " + 'a: "' * 20_000)
@example("a" * 90_000 + "\nSteps: 1")
@example('Steps: 1, x: "\\ud800"')
@settings(deadline=None)
def test_any_text_is_an_infotext_or_none(text: str) -> None:
    parsed = parse_infotext(text)
    if parsed is not None:
        assert json.dumps(request_fields(*parsed), ensure_ascii=False).encode()
        assert json.dumps(parsed[2], ensure_ascii=False).encode()


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_user_comments_of_either_byte_order_are_read(order: str) -> None:
    assert check_image(commented(b"UNICODE\0" + A1111.encode(order)), "image", 10**6).infotext == A1111


@given(kind=st.sampled_from(FORMATS), at=st.integers(0, 5_000), junk=st.binary(min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_tells_something_or_is_refused(kind: OutputFormat, at: int, junk: bytes) -> None:
    data = bytearray(_WRITTEN[kind])
    at %= len(data)
    data[at : at + len(junk)] = junk
    with suppress(RequestError):
        assert check_image(bytes(data), "image", 10**6).format == kind


_WRITTEN = {kind: write_image(NOISE, kind).data for kind in FORMATS}
