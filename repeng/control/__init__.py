"""Steering a model inside a context."""

from repeng.control.steer import steer

__all__ = ["steer"]
