"""Find linear modules whose owner reads their weight without calling them: an adapter there would have no effect."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache

from torch import nn

# Attributes of a weight whose access does not use its values in a computation.
TELLING = ("dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_meta", "is_cuda", "data")


def bypassed(model: nn.Module, name: str) -> str | None:
    """The class that reads the weight of the module `name` without calling the module, or None.

    State-space mixers do this, always or in their fused kernels. The source code of the enclosing modules is searched
    for it. Nothing runs, so the result does not depend on the model's device.
    """
    parts = name.split(".")
    for n in range(len(parts)):
        owner = type(model.get_submodule(".".join(parts[:n])))
        if ".".join(parts[n:]) in _weights_read(owner):
            return owner.__name__
    return None


@lru_cache(maxsize=1024)
def _weights_read(owner: type) -> frozenset[str]:
    """Names, relative to a module of this class, of the modules whose weights its methods read."""
    found: set[str] = set()
    for name, function in inspect.getmembers_static(owner, inspect.isfunction):
        function = inspect.unwrap(function)
        if "init" in name or "weight" not in function.__code__.co_names:
            continue
        try:
            found.update(_read_in(ast.parse(textwrap.dedent(inspect.getsource(function)))))
        except (OSError, TypeError, SyntaxError):  # no source, for example of a class created at run time
            continue
    return frozenset(found)


def _read_in(function: ast.AST) -> Iterator[str]:
    """X for every `self.X.weight` in the function whose values the function uses."""
    for parent in ast.walk(function):
        for node in ast.iter_child_nodes(parent):
            if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
                continue
            chain = ast.unparse(node.value)
            told = isinstance(parent, ast.Attribute) and parent.attr in TELLING
            asked = isinstance(parent, ast.Call) and ast.unparse(parent.func) in ("isinstance", "hasattr", "id")
            # A slice of a weight is read only for split matrix products, which Bloom computes only on request.
            if chain.startswith("self.") and not (told or asked or isinstance(parent, ast.Subscript)):
                yield chain.removeprefix("self.")
