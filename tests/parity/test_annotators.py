"""Annotators against the libraries that define them, and the maps they give a ControlNet."""

from __future__ import annotations

import io

import cv2
import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from config.catalog import Catalog
from pipelines.control.annotators import DEXINED_MEAN, Annotators
from pipelines.control.poses import PoseAnnotator, draw_skeleton
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.parity.test_pictures import request

SD = "SD1.5-ControlNet"


@pytest.fixture(scope="module")
def annotators(catalog: Catalog) -> Annotators:
    return Annotators(catalog, "cpu")


def opened(photo: bytes, width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(photo)).convert("RGB").resize((width, height))


def grey(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image).astype(int)
    assert (levels == levels[..., :1]).all()
    return levels[..., 0]


def test_canny_is_opencvs(annotators: Annotators, photo: bytes) -> None:
    image = opened(photo, 160, 120)
    assert (grey(annotators.annotate("canny", image)) == cv2.Canny(np.asarray(image), 100, 200)).all()


def test_depth_is_transformers(annotators: Annotators, photo: bytes) -> None:
    image = opened(photo, 160, 120)
    ours = grey(annotators.annotate("depth", image))
    estimator = transformers.pipeline("depth-estimation", model=str(oracle.TINY / "annotator-depth"))
    expected = np.asarray(estimator(image)["depth"]).astype(int)
    assert ours.shape == (120, 160)
    assert expected.std() > 10
    assert np.abs(ours - expected).max() <= 1


def test_lineart_is_what_is_darker_than_its_surroundings(annotators: Annotators) -> None:
    image = Image.new("RGB", (160, 120), (240, 230, 220))
    ImageDraw.Draw(image).line((20, 20, 140, 100), fill=(30, 20, 60), width=2)
    levels = np.asarray(image).astype(float)
    blurred = np.stack([gaussian_filter(levels[..., c], 6, mode="mirror") for c in range(3)], -1)
    darker = (blurred - levels).min(-1)
    expected = (darker.clip(0) / max(16, np.median(darker[darker > 8])) * 127).clip(0, 255)
    ours = grey(annotators.annotate("lineart", image))
    assert ours.max() > 100
    assert np.abs(ours - expected).max() <= 2
    assert grey(annotators.annotate("lineart", Image.new("RGB", (64, 64), "white"))).max() == 0


def test_softedge_is_the_onnx_file_in_torch(annotators: Annotators, photo: bytes) -> None:
    image = opened(photo, 512, 512)  # the network's own size: resizing is OpenCV's affair
    kernels = onnx.load(oracle.TINY / "annotator-edges" / "edges.onnx").graph.initializer
    blob = torch.from_numpy(np.asarray(image)[..., ::-1].astype(np.float32) - np.float32(DEXINED_MEAN))
    scales = []
    for kernel in kernels:
        weight = torch.from_numpy(onnx.numpy_helper.to_array(kernel).copy())
        edges = torch.conv2d(blob.permute(2, 0, 1)[None], weight, padding=weight.shape[-1] // 2)[0, 0].sigmoid()
        scales.append((edges - edges.min()) / (edges.max() - edges.min()) * 255)
    expected = torch.stack(scales).mean(0).numpy()
    assert expected.std() > 10
    assert np.abs(grey(annotators.annotate("softedge", image)) - expected).max() <= 1.01
    assert annotators.annotate("softedge", opened(photo, 96, 64)).size == (96, 64)


def test_openpose_finds_the_joints_transformers_finds(catalog: Catalog, photo: bytes) -> None:
    image = opened(photo, 160, 120)
    (spec,) = (s for s in catalog.annotators if s.name == "openpose")
    ours = PoseAnnotator(spec, "cpu").joints(image)
    finder = str(oracle.TINY / "annotator-people")
    people = transformers.pipeline("object-detection", model=finder)(image)
    assert len(ours) == len(people) > 0
    inputs = transformers.AutoImageProcessor.from_pretrained(finder)
    with torch.no_grad():
        seen = transformers.AutoModelForObjectDetection.from_pretrained(finder)(**inputs(image, return_tensors="pt"))
    (found,) = inputs.post_process_object_detection(seen, threshold=0.5, target_sizes=[(120, 160)])
    boxes = [(x, y, right - x, bottom - y) for x, y, right, bottom in found["boxes"].tolist()]
    folder = str(oracle.TINY / "annotator-pose")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.VitPoseForPoseEstimation.from_pretrained(folder).eval()
    # All people in one batch, as ours: refining a random net's peaks would blow up the rounding of another batch size.
    with torch.no_grad():
        output = model(**processor(images=image, boxes=[boxes], return_tensors="pt"))
    (expected,) = processor.post_process_pose_estimation(output, boxes=[boxes])
    for joints, box, person, joint in zip(ours, boxes, people, expected, strict=True):
        assert np.allclose(box[:2], [person["box"]["xmin"], person["box"]["ymin"]], atol=1)  # the pipeline rounds
        assert joints.shape == (17, 3)
        np.testing.assert_allclose(joints[:, :2], joint["keypoints"].numpy(), atol=0.5)
        np.testing.assert_allclose(joints[:, 2], joint["scores"].numpy(), atol=0.01)


def test_a_skeleton_has_openposes_colours() -> None:
    canvas = np.zeros((512, 512, 3), np.uint8)
    joints = np.zeros((17, 3))
    joints[[0, 5, 6, 8]] = [(256, 100, 1), (356, 200, 1), (156, 200, 1), (100, 300, 1)]  # nose, shoulders, right elbow
    draw_skeleton(canvas, joints)
    at = {"nose": (100, 256), "neck": (200, 256), "right shoulder": (200, 156), "left shoulder": (200, 356)}
    assert {name: tuple(canvas[point].tolist()) for name, point in at.items()} == {
        "nose": (255, 0, 0),
        "neck": (255, 85, 0),
        "right shoulder": (255, 170, 0),
        "left shoulder": (85, 255, 0),
    }
    assert tuple(canvas[200, 206]) == (153, 0, 0)  # neck to right shoulder, the first limb
    assert tuple(canvas[200, 306]) == (153, 51, 0)  # neck to left shoulder, the second
    assert canvas[400:].max() == 0  # no hips, no legs


def test_a_photo_without_people_gives_an_empty_map(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.control.poses.PERSON_SCORE", 1.1)
    empty = Annotators(catalog, "cpu").annotate("openpose", Image.new("RGB", (64, 48), "white"))
    assert empty.size == (64, 48)
    assert grey(empty).max() == 0


@pytest.mark.parametrize("name", ["canny", "depth", "openpose", "softedge", "lineart"])
def test_a_photo_steers_like_its_map(name: str, text2image: Text2Image, annotators: Annotators, photo: bytes) -> None:
    image = opened(photo, 128, 128)
    buffers = {"photo": io.BytesIO(), "map": io.BytesIO()}
    image.save(buffers["photo"], "PNG")
    annotators.annotate(name, image).save(buffers["map"], "PNG")
    fields = request("SD1.5", steps=2, width=128, height=128) | {"model_name": SD, "controlnet_name": name}

    def draw(sent: str, preprocess: bool) -> np.ndarray:
        given = {"controlnet_image": buffers[sent].getvalue(), "controlnet_preprocess": preprocess}
        return np.asarray(text2image.generate(GenerationParams(**fields, **given)).image)

    assert np.array_equal(draw("photo", True), draw("map", False))
    assert not np.array_equal(draw("photo", True), draw("photo", False))


def test_an_annotator_without_weights_is_named(catalog: Catalog, photo: bytes) -> None:
    bare = Text2Image(catalog.model_copy(update={"annotators": ()}))
    fields = request("SD1.5") | {"model_name": SD, "controlnet_name": "openpose", "controlnet_image": photo}
    message = r"'openpose': no annotator weights .* controlnet_preprocess false, .*\['canny', 'lineart'\]"
    with pytest.raises(InvalidValueError, match=message):
        bare.generate(GenerationParams(**fields))
