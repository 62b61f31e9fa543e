"""Steering a model inside a context."""

from repeng.control.acting import check_sites, idle_sites
from repeng.control.steer import steer

__all__ = ["check_sites", "idle_sites", "steer"]
