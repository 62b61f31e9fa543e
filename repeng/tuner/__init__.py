"""The PEFT method `SVD_STEERING`: a coefficient-controlled rotation of each weight's singular subspace."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from repeng.tuner.antipasto import load_antipasto
from repeng.tuner.coefficients import Coefficients
from repeng.tuner.config import PEFT_TYPE, PREFIX, SvdSteeringConfig
from repeng.tuner.layer import SvdSteeringLayer
from repeng.tuner.loading import make_loads_whole
from repeng.tuner.model import SvdSteeringModel

# `peft.utils.register_peft_method` accepts members of the PeftType enum only, so the three tables that it fills are
# filled here.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SvdSteeringConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SvdSteeringModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
make_loads_whole()

__all__ = ["Coefficients", "SvdSteeringConfig", "SvdSteeringLayer", "SvdSteeringModel", "load_antipasto"]
