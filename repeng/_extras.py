"""How to install the packages of an extra. This module has no slow imports."""

from importlib.metadata import requires

from packaging.requirements import Requirement


def install_command(extra: str) -> str:
    """The pip command that installs the packages of an extra.

    It names the packages themselves: the distribution's own name belongs to another package in some indexes.
    """
    found = [Requirement(line) for line in requires("repeng") or ()]
    names = [
        f"'{one.name}{one.specifier}'"
        for one in found
        if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]
    return f"pip install {' '.join(names)} (the extra {extra!r})"
