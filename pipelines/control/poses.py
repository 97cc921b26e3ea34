"""People in a photo -> OpenPose's coloured skeletons: RT-DETR finds the people, ViTPose finds their joints."""

from __future__ import annotations

import colorsys
import math
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, VitPoseForPoseEstimation

from config.catalog import AnnotatorSpec
from pipelines.weights.files import annotator_files

PERSON = 0
"""COCO's class of people, in RT-DETR's numbering."""
PERSON_SCORE, JOINT_SCORE = 0.5, 0.3
"""Scores below which a person or a joint is taken for none."""
# OpenPose's 18 joints in its order: where each lies among COCO's 17 (Lin et al. 2014); the neck is between shoulders.
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
COCO_JOINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
# Chains of limbs from the neck outwards; a limb has the colour of its place in this order (Cao et al. 2017).
CHAINS = ((1, 2), (1, 5), (2, 3, 4), (5, 6, 7), (1, 8, 9, 10), (1, 11, 12, 13), (1, 0), (0, 14, 16), (0, 15, 17))
LIMBS = tuple(limb for chain in CHAINS for limb in pairwise(chain))
COLOURS = tuple(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18))
LIMB_BRIGHTNESS = 0.6
HALF_WIDTH = 4 / 512
"""Half a limb's width and a joint's radius, of the picture's shorter side."""


class PoseAnnotator:
    """The two models of openpose on one device."""

    def __init__(self, spec: AnnotatorSpec, device: str) -> None:
        self._device = device
        poser, finder = (files.folder() for files in annotator_files(spec))  # the catalog checked that it has both
        self._find: Any = AutoModelForObjectDetection.from_pretrained(finder, use_safetensors=True).to(device).eval()
        self._find_inputs = AutoImageProcessor.from_pretrained(finder)
        self._pose: Any = VitPoseForPoseEstimation.from_pretrained(poser, use_safetensors=True).to(device).eval()
        self._pose_inputs = AutoImageProcessor.from_pretrained(poser)

    def draw(self, photo: Image.Image) -> Image.Image:
        """Every person's skeleton on black, RGB, of the photo's size."""
        canvas = np.zeros((photo.height, photo.width, 3), np.uint8)
        for joints in self.joints(photo):
            draw_skeleton(canvas, joints)
        return Image.fromarray(canvas)

    @torch.inference_mode()
    def joints(self, photo: Image.Image) -> list[np.ndarray]:
        """COCO's 17 joints of every person: float arrays [17, 3] of x and y in pixels and the score."""
        inputs = self._find_inputs(images=photo, return_tensors="pt").to(self._device)
        (found,) = self._find_inputs.post_process_object_detection(
            self._find(**inputs), threshold=PERSON_SCORE, target_sizes=[(photo.height, photo.width)]
        )
        boxes = found["boxes"][found["labels"] == PERSON].cpu().numpy()
        if not len(boxes):
            return []
        boxes[:, 2:] -= boxes[:, :2]  # corners to corner and size
        inputs = self._pose_inputs(images=photo, boxes=[boxes], return_tensors="pt").to(self._device)
        experts = {}
        if self._pose.config.backbone_config.num_experts > 1:  # ViTPose+: expert 0 was trained on COCO
            experts["dataset_index"] = torch.zeros(len(boxes), dtype=torch.long, device=self._device)
        (people,) = self._pose_inputs.post_process_pose_estimation(self._pose(**inputs, **experts), boxes=[boxes])
        return [
            np.concatenate([person["keypoints"].cpu().numpy(), person["scores"].cpu().numpy()[:, None]], 1)
            for person in people
        ]


def draw_skeleton(canvas: np.ndarray, joints: np.ndarray) -> None:
    """Draw one person's COCO joints [17, 3] the way OpenPose does: limbs dimmed, joints over them, both coloured."""
    neck = joints[[LEFT_SHOULDER, RIGHT_SHOULDER]]
    neck = np.append(neck[:, :2].mean(0), neck[:, 2].min())
    placed = [neck if index is None else joints[index] for index in COCO_JOINTS]
    sure = [score >= JOINT_SCORE for *_, score in placed]
    half = max(1, round(HALF_WIDTH * min(canvas.shape[:2])))
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):  # 17 limbs; the last colour is a joint's alone
        if sure[start] and sure[end]:
            (x0, y0), (x1, y1) = placed[start][:2], placed[end][:2]
            centre = (round((x0 + x1) / 2), round((y0 + y1) / 2))
            axes = (int(math.hypot(x1 - x0, y1 - y0) / 2), half)
            outline = np.array(
                cv2.ellipse2Poly(centre, axes, int(math.degrees(math.atan2(y1 - y0, x1 - x0))), 0, 360, 1)
            )
            cv2.fillConvexPoly(canvas, outline, [LIMB_BRIGHTNESS * c for c in colour])
    for (x, y, _), known, colour in zip(placed, sure, COLOURS, strict=True):
        if known:
            cv2.circle(canvas, (round(x), round(y)), half, colour, thickness=-1)
