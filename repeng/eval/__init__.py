"""Measure the effect and the cost of a dial."""

from repeng.eval.calibrate import Calibration, KLBudget, calibrate
from repeng.eval.eval_report import Budget, EvalReport, bootstrap
from repeng.eval.evaluate import evaluate
from repeng.eval.measure import prompt_dial

__all__ = ["Budget", "Calibration", "EvalReport", "KLBudget", "bootstrap", "calibrate", "evaluate", "prompt_dial"]
