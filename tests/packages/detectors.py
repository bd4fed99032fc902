"""ultralytics' models, from their own configurations."""

from __future__ import annotations

from torch import nn
from ultralytics.nn import tasks

from packages.subject import images, subject

pictures = subject((3, 64, 64), images(3, 64, 64)[:3], package="ultralytics")


@pictures
def yolov8_detect() -> nn.Module:
    return tasks.DetectionModel("yolov8n.yaml", verbose=False)


@pictures
def yolo11_detect() -> nn.Module:
    return tasks.DetectionModel("yolo11n.yaml", verbose=False)


@pictures
def yolov8_segment() -> nn.Module:
    return tasks.SegmentationModel("yolov8n-seg.yaml", verbose=False)


@pictures
def yolov8_pose() -> nn.Module:
    return tasks.PoseModel("yolov8n-pose.yaml", verbose=False)


@pictures
def yolov8_classify() -> nn.Module:
    return tasks.ClassificationModel("yolov8n-cls.yaml", verbose=False)


@pictures
def yolov10_detect() -> nn.Module:
    return tasks.DetectionModel("yolov10n.yaml", verbose=False)
