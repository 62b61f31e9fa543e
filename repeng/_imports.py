"""Import hooks of this package: lazy names, modules under their old paths, and registration when PEFT is imported."""

import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old paths of modules, from version 0.1, and the modules that replace them.
MOVED = {
    "repeng.calibrate": "repeng.eval.calibrate",
    "repeng.directions": "repeng.vectors.directions",
    "repeng.eval_report": "repeng.eval.eval_report",
    "repeng.extract": "repeng.vectors.extract",
    "repeng.question_sets": "repeng.data.question_sets",
    "repeng.questions": "repeng.data.questions",
    "repeng.vector": "repeng.vectors.vector",
}


def lazily(
    package: str, places: Mapping[str, str], packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` (PEP 562) for a package whose names are imported on first access.

    Args:
        package: full name of the package.
        places: for each name, the module that defines it.
        packages: names of the subpackages.
    """

    def load(name: str) -> Any:
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *places, *packages})


def when_imported(module: str, then: Callable[[], object]) -> None:
    """Call `then` as soon as `module` has been imported: at once if it already is."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watcher(module, then))


class _Watcher(MetaPathFinder):
    """Finds a module with the other finders, and adds a call at the end of its import.

    Code may look up the spec without importing the module, so the finder stays until the import has happened.
    """

    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self.module, self.then = module, then
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module or getattr(self._asking, "others", False):
            return None
        self._asking.others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                self.then()

            spec.loader.exec_module = exec_module
        return spec


class _MovedModule(ModuleType):
    """The module that is imported under an old path."""


class Package(ModuleType):
    """A package whose functions are not hidden by old modules of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # Otherwise `import repeng.extract` would replace the function with the module.
        if not (isinstance(value, _MovedModule) and name in self.__all__):
            super().__setattr__(name, value)


class OldPaths(MetaPathFinder, Loader):
    """Imports the modules in `MOVED` under their old paths, with a DeprecationWarning that names the new path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        place = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {place}; import from repeng or from there", DeprecationWarning, 2)
        names = {name: value for name, value in vars(importlib.import_module(place)).items() if name[:2] != "__"}
        vars(module).update(names)
