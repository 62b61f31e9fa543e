"""How long the properties are tried: a few seconds in the suite, always the same; longer and at random by a marker."""

import os

from hypothesis import HealthCheck, settings

calm = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("suite", max_examples=40, derandomize=True, **calm)
settings.register_profile("long", max_examples=int(os.environ.get("REPENG_FUZZ", "2000")), **calm)
settings.load_profile("long" if "REPENG_FUZZ" in os.environ else "suite")
