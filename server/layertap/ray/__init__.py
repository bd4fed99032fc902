"""Layers of Ray data sets: actors hold the model, Ray moves the rows. Needs ``layertap[ray]``."""

from layertap.ray.data import extract
from layertap.ray.parquet import Written, extract_to_parquet

__all__ = ["Written", "extract", "extract_to_parquet"]
