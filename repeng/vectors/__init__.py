"""Steering vectors: extraction, arithmetic, gates and files."""

from repeng.vectors.extract import extract
from repeng.vectors.gate import Gate, fit_gate
from repeng.vectors.vector import SteeringVector

__all__ = ["Gate", "SteeringVector", "extract", "fit_gate"]
