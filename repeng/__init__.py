"""Steer language models from the inside. Importing the package registers the PEFT method `SVD_STEERING`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from repeng._imports import OldPaths, Package, lazily, when_imported

if TYPE_CHECKING:
    from repeng.control.steer import steer
    from repeng.data.pairs import ContrastPair, check_pairs, load_pairs, make_pairs
    from repeng.data.questions import Question, load_questions
    from repeng.eval.calibrate import Calibration, KLBudget, calibrate
    from repeng.eval.eval_report import Budget, EvalReport, bootstrap
    from repeng.eval.evaluate import evaluate
    from repeng.model.loading import load_model
    from repeng.train.arguments import SteeringArguments
    from repeng.train.collator import PairCollator
    from repeng.train.inner_contrastive_loss import inner_contrastive_loss
    from repeng.train.trainer import SteeringTrainer
    from repeng.tuner.config import SvdSteeringConfig
    from repeng.tuner.model import SvdSteeringModel
    from repeng.vectors.extract import extract
    from repeng.vectors.gate import Gate, fit_gate
    from repeng.vectors.vector import SteeringVector
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Budget": "repeng.eval.eval_report",
            "Calibration": "repeng.eval.calibrate",
            "ContrastPair": "repeng.data.pairs",
            "EvalReport": "repeng.eval.eval_report",
            "Gate": "repeng.vectors.gate",
            "KLBudget": "repeng.eval.calibrate",
            "PairCollator": "repeng.train.collator",
            "Question": "repeng.data.questions",
            "SteeringArguments": "repeng.train.arguments",
            "SteeringTrainer": "repeng.train.trainer",
            "SteeringVector": "repeng.vectors.vector",
            "SvdSteeringConfig": "repeng.tuner.config",
            "SvdSteeringModel": "repeng.tuner.model",
            "bootstrap": "repeng.eval.eval_report",
            "calibrate": "repeng.eval.calibrate",
            "check_pairs": "repeng.data.pairs",
            "evaluate": "repeng.eval.evaluate",
            "extract": "repeng.vectors.extract",
            "fit_gate": "repeng.vectors.gate",
            "inner_contrastive_loss": "repeng.train.inner_contrastive_loss",
            "load_model": "repeng.model.loading",
            "load_pairs": "repeng.data.pairs",
            "load_questions": "repeng.data.questions",
            "make_pairs": "repeng.data.pairs",
            "steer": "repeng.control.steer",
        },
        packages=("control", "data", "eval", "export", "hub", "model", "serve", "tiny", "train", "tuner", "vectors"),
    )

__version__ = "0.2.0"

__all__ = [
    "Budget",
    "Calibration",
    "ContrastPair",
    "EvalReport",
    "Gate",
    "KLBudget",
    "PairCollator",
    "Question",
    "SteeringArguments",
    "SteeringTrainer",
    "SteeringVector",
    "SvdSteeringConfig",
    "SvdSteeringModel",
    "bootstrap",
    "calibrate",
    "check_pairs",
    "evaluate",
    "extract",
    "fit_gate",
    "inner_contrastive_loss",
    "load_model",
    "load_pairs",
    "load_questions",
    "make_pairs",
    "steer",
]

# PEFT takes seconds to import, so `import repeng` does not import it. The method is registered as soon as PEFT is
# imported by any code.
when_imported("peft", lambda: import_module("repeng.tuner"))
sys.meta_path.append(OldPaths())
sys.modules[__name__].__class__ = Package
