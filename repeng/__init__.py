"""Steer language models from the inside. Importing registers the PEFT method `SVD_STEERING`."""

from repeng.control import steer
from repeng.data import ContrastPair, PairCollator, check_pairs, load_pairs, make_pairs
from repeng.eval import Budget, EvalReport, Question, evaluate
from repeng.extract import extract
from repeng.tuner import SvdSteeringConfig, SvdSteeringModel
from repeng.vector import SteeringVector

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ContrastPair",
    "EvalReport",
    "PairCollator",
    "Question",
    "SteeringVector",
    "SvdSteeringConfig",
    "SvdSteeringModel",
    "check_pairs",
    "evaluate",
    "extract",
    "load_pairs",
    "make_pairs",
    "steer",
]
