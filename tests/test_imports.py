"""Names are imported when they are first asked for, old paths still work, and PEFT knows the method all the same."""

import ast
import importlib
import subprocess
import sys

import pytest
from support import ROOT

import repeng
from repeng._imports import MOVED

QUICK = ("torch", "transformers", "peft", "accelerate")
PEFT_KNOWS = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; assert 'SVD_STEERING' in known"
OLD_NAMES = {
    "repeng.calibrate": ("Calibration", "KLBudget", "calibrate"),
    "repeng.control": ("steer",),
    "repeng.data": ("ContrastPair", "PairCollator", "PairProblem", "check_pairs", "load_pairs", "make_pairs"),
    "repeng.directions": ("METHODS",),
    "repeng.eval": ("evaluate", "prompt_dial"),
    "repeng.eval_report": ("Budget", "EvalReport", "bootstrap"),
    "repeng.extract": ("extract",),
    "repeng.question_sets": ("daily_dilemmas", "moral_foundations", "truthful_qa"),
    "repeng.questions": ("Question", "load_questions"),
    "repeng.train.arguments": ("SteeringArguments",),
    "repeng.train.inner_contrastive_loss": ("inner_contrastive_loss",),
    "repeng.train.trainer": ("SteeringTrainer",),
    "repeng.tuner": ("SvdSteeringConfig", "SvdSteeringModel"),
    "repeng.vector": ("SteeringVector",),
}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def modules_after(code):
    done = python(f"import sys\n{code}\nprint(*(name for name in {QUICK!r} if name in sys.modules))")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1].split()


def test_importing_the_package_imports_nothing_slow():
    assert modules_after("import repeng; repeng.__version__; dir(repeng)") == []


def test_the_three_lists_of_public_names_are_one():
    tree = ast.parse((ROOT / "repeng" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {f"{n.module}.{alias.name}" for n in checked.body for alias in n.names}
    assert {name.rpartition(".")[2] for name in typed} == set(repeng.__all__) <= set(dir(repeng))
    for name in repeng.__all__:
        value = getattr(repeng, name)
        defined = f"{value.__module__}.{name}"
        assert defined in typed, f"{name} is defined in {defined}"
        assert vars(repeng)[name] is value  # the second time no import is asked


def test_a_name_that_there_is_not_is_an_attribute_error():
    for package in (repeng, importlib.import_module("repeng.data"), importlib.import_module("repeng.train")):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            package.nothing  # noqa: B018
        assert not hasattr(package, "nothing")


@pytest.mark.parametrize("module", OLD_NAMES)
def test_old_import_paths_work(module):
    """Modules that moved say where to; the wings of the same name hand their names on in silence."""
    sys.modules.pop(module, None) if module in MOVED else None
    if module in MOVED:
        with pytest.warns(DeprecationWarning, match=f"{module} is now {MOVED[module]}"):
            old = importlib.import_module(module)
    else:
        old = importlib.import_module(module)
    for name in OLD_NAMES[module]:
        value = getattr(old, name)
        assert not callable(value) or value.__name__ == name
    assert set(MOVED) <= set(OLD_NAMES)


def test_a_function_is_not_hidden_by_its_old_module():
    for name in ("extract", "calibrate"):
        function = getattr(repeng, name)
        sys.modules.pop(f"repeng.{name}", None)
        with pytest.warns(DeprecationWarning):
            module = importlib.import_module(f"repeng.{name}")
        assert getattr(repeng, name) is function is getattr(module, name)


@pytest.mark.processes
@pytest.mark.parametrize(
    "code",
    [
        "import repeng, peft",
        "import peft, repeng",
        # Many ask whether PEFT is there before anybody imports it.
        "import repeng; from importlib.util import find_spec; find_spec('peft'); find_spec('peft'); import peft",
    ],
)
def test_peft_knows_the_method_whoever_is_imported_first(code):
    done = python(f"{code}\n{PEFT_KNOWS}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.processes
def test_nothing_optional_is_imported_at_import_time():
    code = (
        "import sys, repeng; [getattr(repeng, name) for name in repeng.__all__]; import repeng.commands.base, "
        "repeng.train.run; print([m for m in ('matplotlib', 'wandb', 'bitsandbytes', 'pytest') if m in sys.modules])"
    )
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
