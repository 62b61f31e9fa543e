"""Steer language models from the inside. Importing registers the PEFT method `SVD_STEERING`."""

from repeng.calibrate import Calibration, KLBudget, calibrate
from repeng.control import steer
from repeng.data import ContrastPair, PairCollator, check_pairs, load_pairs, make_pairs
from repeng.eval import evaluate
from repeng.eval_report import Budget, EvalReport, bootstrap
from repeng.extract import extract
from repeng.questions import Question, load_questions
from repeng.tuner import SvdSteeringConfig, SvdSteeringModel
from repeng.vector import SteeringVector

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Calibration",
    "ContrastPair",
    "EvalReport",
    "KLBudget",
    "PairCollator",
    "Question",
    "SteeringVector",
    "SvdSteeringConfig",
    "SvdSteeringModel",
    "bootstrap",
    "calibrate",
    "check_pairs",
    "evaluate",
    "extract",
    "load_pairs",
    "load_questions",
    "make_pairs",
    "steer",
]
