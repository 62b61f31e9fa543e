"""Reports in files: one safetensors file holds the reports of several methods."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repeng.data.files import written_whole
from repeng.eval.eval_report import Budget, EvalReport, Sample

KEY = "repeng-reports"  # key of the JSON text in the safetensors metadata of a file
FORMAT = 1


def save_reports(path: str | Path, reports: Mapping[str, Sequence[EvalReport]], **more: Any) -> None:
    """Write reports by method, and the JSON-serialisable values in `more`. The file is written whole or not at all."""
    tensors: dict[str, Tensor] = {}
    told: dict[str, list[dict[str, Any]]] = {}
    for method, group in reports.items():
        told[method] = []
        for index, report in enumerate(group):
            values = {field.name: getattr(report, field.name) for field in fields(report)}
            kept = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            tensors |= {
                f"{method}/{index}/{name}": value.detach().clone().contiguous() for name, value in kept.items()
            }
            rest = {name: value for name, value in values.items() if name not in kept}
            told[method].append(
                {**rest, "samples": [asdict(s) for s in report.samples], "budget": asdict(report.budget)}
            )
    text = json.dumps({"format": FORMAT, "reports": told, "more": more})
    with written_whole(path) as place:
        save_file(tensors, place, {KEY: text})


def load_reports(path: str | Path) -> tuple[dict[str, list[EvalReport]], dict[str, Any]]:
    """Read a file of `save_reports`: reports by method, and the values of `more`.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file holds no reports, or reports in the format of another version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if told["format"] != FORMAT:
            raise ValueError(f"it has format {told['format']}, and this version reads format {FORMAT}")
        reports = {
            method: [_report(rest, tensors, f"{method}/{index}/") for index, rest in enumerate(group)]
            for method, group in told["reports"].items()
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no reports that this version can read: {error}") from error
    return reports, told["more"]


def _report(rest: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> EvalReport:
    own: dict[str, Any] = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    samples = [Sample(**{**s, "sentences": s["sentences"] and tuple(s["sentences"])}) for s in rest["samples"]]
    operating = rest["operating"] and tuple(rest["operating"])
    return EvalReport(
        **{**rest, "samples": samples, "budget": Budget(**rest["budget"]), "operating": operating}, **own
    )
