"""Layers of Ray data sets: actors hold the model, Ray moves the rows. Needs ``layertap[ray]``."""

from layertap.ray.data import extract

__all__ = ["extract"]
