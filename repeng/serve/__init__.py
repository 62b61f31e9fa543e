"""An OpenAI-compatible server with coefficients per request; needs the extra `serve`."""

from typing import TYPE_CHECKING

from repeng._imports import lazily

if TYPE_CHECKING:
    from repeng.control.dials import Dials, load_dials
    from repeng.serve.app import make_app
    from repeng.serve.batching import Batching
    from repeng.serve.limits import Limits
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Batching": "repeng.serve.batching",
            "Dials": "repeng.control.dials",
            "Limits": "repeng.serve.limits",
            "load_dials": "repeng.control.dials",
            "make_app": "repeng.serve.app",
        },
    )

__all__ = ["Batching", "Dials", "Limits", "load_dials", "make_app"]
