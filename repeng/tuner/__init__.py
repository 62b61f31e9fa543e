"""The PEFT method `SVD_STEERING`: a coefficient-controlled rotation of each weight's singular subspace."""

from typing import cast

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from repeng.tuner.antipasto import load_antipasto
from repeng.tuner.coefficients import Coefficients
from repeng.tuner.config import PEFT_TYPE, PREFIX, SvdSteeringConfig
from repeng.tuner.layer import SvdSteeringLayer
from repeng.tuner.model import SvdSteeringModel

# `peft.utils.register_peft_method` accepts members of the PeftType enum only; the three tables are what it fills.
_KEY = cast(PeftType, PEFT_TYPE)
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = SvdSteeringConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = SvdSteeringModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = PREFIX

__all__ = ["Coefficients", "SvdSteeringConfig", "SvdSteeringLayer", "SvdSteeringModel", "load_antipasto"]
