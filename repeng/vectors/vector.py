"""Steering vectors: arithmetic, files, and metadata about their origin."""

import json
import math
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repeng._file_names import CARD, VECTOR
from repeng.data.files import staged, written_whole
from repeng.model.hub import Repository, commit, download, hub_id_of
from repeng.model.sites import RESIDUAL, Place, site_widths
from repeng.model.sources import HUB_ID, name_of_folder
from repeng.model.tensor_files import read_tensors
from repeng.vectors.stored import check_directions, checked_metadata, idle, parse_header, place_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

FORMAT_VERSION = 1
KEY = "repeng"  # key of the JSON text in the safetensors metadata of a file
# moudrkat/hidden-directions (extract/pref.py) and hotwire-vllm (_state.py) store rows `(layers d)` in pickle files.
PICKLED = (
    "it is a pickle, and reading a pickle can run code. If it holds one row per layer, for the layer's output, load "
    "rows yourself with torch.load and weights_only=True, and call "
    "SteeringVector({('residual', i): row.float() for i, row in enumerate(rows)}).save('vector.safetensors')"
)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction `(d)`, finite float32, for each (site, layer); + is toward chosen. `metadata` tells its origin.

    Vectors can be added, subtracted and multiplied by numbers: `(a + b) / 2`, `-a`. A place that only one summand has
    counts as zero in the other. The result of arithmetic with a calibrated vector is not calibrated.
    """

    directions: dict[Place, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        broken = next((place for place, d in self.directions.items() if not torch.isfinite(d).all()), None)
        if broken is not None:
            raise ValueError(
                f"the direction at {broken[0]!r} of layer {broken[1]} holds NaN or infinite values: the data that it "
                "was computed from are broken, or a factor is too large"
            )

    @property
    def sites(self) -> list[str]:
        return sorted({site for site, _ in self.directions})

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self.directions})

    @property
    def model_name(self) -> str | None:
        """The model that the vector was made for: a name or hub id, or the last part of a folder; None if unknown."""
        path = self.metadata.get("model")
        return None if not path else name_of_folder(path) or (Path(path).name if Path(path).is_absolute() else path)

    def __getitem__(self, place: Place | int) -> Tensor:
        """The direction at (site, layer). If the vector has only one site, the layer is enough.

        Raises:
            KeyError: there is no such direction; the message lists the sites and layers of the vector.
        """
        if isinstance(place, int | Integral) and len(self.sites) == 1:
            place = (self.sites[0], int(place))
        if not isinstance(place, tuple) or place not in self.directions:
            raise KeyError(f"no direction at {place!r}; this vector has sites {self.sites} and layers {self.layers}")
        return self.directions[place]

    def select(self, *, sites: Iterable[str] | None = None, layers: Iterable[int] | None = None) -> "SteeringVector":
        """The part of the vector at these sites and layers; by default, all sites and all layers.

        Raises:
            ValueError: nothing is left.
        """
        keep_sites = set(self.sites if sites is None else sites)
        keep_layers = set(self.layers if layers is None else layers)
        selected = {p: d for p, d in self.directions.items() if p[0] in keep_sites and p[1] in keep_layers}
        if not selected:
            raise ValueError(
                f"nothing is left at sites {sorted(keep_sites)} and layers {sorted(keep_layers)}; this vector has "
                f"sites {self.sites} and layers {self.layers}"
            )
        accuracy = self.metadata.get("accuracy", {})
        names = {f"{layer}.{site}" for site, layer in selected}
        accuracy = {key: value for key, value in accuracy.items() if key in names}
        metadata = self._told(accuracy=accuracy)
        if len(selected) < len(self.directions):
            metadata.pop("calibration", None)  # it was measured with all places together
        return SteeringVector(selected, metadata)

    def _told(self, **changes: Any) -> dict[str, Any]:
        """A copy of the metadata with changes; entries that are None or {} are left out."""
        return {key: value for key, value in {**self.metadata, **changes}.items() if value not in (None, {})}

    def norm(self) -> dict[Place, float]:
        """The length of each direction."""
        return {place: direction.norm().item() for place, direction in self.directions.items()}

    def normalize(self) -> "SteeringVector":
        """The vector with every direction scaled to length 1; a zero direction stays zero."""
        units = {place: d / d.norm().clamp_min(1e-30) for place, d in self.directions.items()}
        return SteeringVector(units, self._told(calibration=None))

    def random_like(self, seed: int) -> "SteeringVector":
        """A vector with random directions of the same norms: the control for every claim about a vector."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, direction in self.directions.items():
            noise = torch.randn(direction.shape, generator=generator).to(direction)
            drawn[key] = noise * direction.norm() / noise.norm()
        return SteeringVector(
            drawn, self._told(method="random", options=None, accuracy=None, read=None, calibration=None)
        )

    # Vectors compare by value and have no hash: Python sets __hash__ to None if a class defines only __eq__.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self.directions.keys() == other.directions.keys() and all(
            torch.equal(direction, other.directions[place]) for place, direction in self.directions.items()
        )

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        if not isinstance(other, SteeringVector):
            return NotImplemented
        models = [v.metadata.get("model_type") for v in (self, other)]
        if None not in models and models[0] != models[1]:
            raise ValueError(
                f"the vectors are for different models, {models[0]} and {models[1]}; they cannot be added"
            )
        total = dict(self.directions)
        for place, direction in other.directions.items():
            if place in total and total[place].shape != direction.shape:
                raise ValueError(
                    f"the vectors have widths {total[place].numel()} and {direction.numel()} at {place}; they are for "
                    "different models"
                )
            total[place] = total[place] + direction if place in total else direction
        shared = {key: value for key, value in self.metadata.items() if other.metadata.get(key) == value}
        shared.pop("calibration", None)  # it holds for one summand only
        return SteeringVector(total, shared)

    def __mul__(self, factor: float) -> "SteeringVector":
        if not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"a vector can only be multiplied by a finite number; got {factor}")
        scaled = {place: float(factor) * d for place, d in self.directions.items()}
        metadata = self._told(calibration=None, accuracy=self.metadata.get("accuracy") if factor > 0 else None)
        return SteeringVector(scaled, metadata)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0 or not math.isfinite(1 / divisor):
            raise ValueError(f"a vector cannot be divided by {divisor}; give a number whose inverse is finite")
        return self * (1 / divisor)

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def calibrated(self, calibration: dict[str, Any]) -> "SteeringVector":
        """The same directions with a calibration: c = ±1 of `steer` then is `plus` or `−minus` times the directions.

        Args:
            calibration: `repeng.calibrate(...).to_dict()`. If the vector is already calibrated, `plus` and `minus`
                are in units of the earlier calibration.

        Raises:
            ValueError: `plus` or `minus` is missing or not positive.
        """
        units = {name: calibration.get(name) for name in ("plus", "minus")}
        if not all(isinstance(unit, Real) and 0 < float(unit) < math.inf for unit in units.values()):
            raise ValueError(f"a calibration needs positive numbers 'plus' and 'minus'; got {units}")
        before = self.metadata.get("calibration", {"plus": 1.0, "minus": 1.0})
        units = {name: unit * before[name] for name, unit in units.items()}
        return SteeringVector(self.directions, self._told(calibration={**calibration, **units}))

    def in_own_units(self, coefficient: Tensor) -> Tensor:
        """Convert a coefficient to a factor of the directions, by the calibration if there is one."""
        units = self.metadata.get("calibration")
        return coefficient if not units else coefficient * torch.where(coefficient < 0, units["minus"], units["plus"])

    def describe(self) -> str:
        """A table of the places with lengths and accuracies, and the tokens that were read in the first pairs."""
        known = self.metadata
        made = ", ".join(
            f"{name} {known[name]}" for name in ("method", "model_type", "pairs", "tokens") if name in known
        )
        units = known.get("calibration")
        if units:
            made += f", calibrated: c = 1 is {units['plus']:.3g} and c = −1 is {units['minus']:.3g} times a direction"
        lines = [f"steering vector: {made or 'no metadata'}", "site         layer    norm  held-out accuracy"]
        for (site, layer), norm in sorted(self.norm().items()):
            accuracy = known.get("accuracy", {}).get(f"{layer}.{site}")
            shown = "–" if accuracy is None else f"{accuracy:.0%}"
            lines.append(f"{site:<12} {layer:>5} {norm:>7.3g}  {shown:>17}")
        for pair in known.get("read", []):
            lines.append(f"read: chosen {pair['chosen']!r}, rejected {pair['rejected']!r}")
        return "\n".join(lines)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if the vector is empty or for another model (with another type, depth or width)."""
        if not self.directions:
            raise ValueError("this vector holds no directions")
        own_type, made_for = model_type(model), self.metadata.get("model_type")
        if made_for is not None and own_type is not None and made_for != own_type:
            raise ValueError(
                f"this vector was made for a {made_for} model ({self.metadata.get('model', 'unnamed')}); "
                f"{type(model).__name__} is a {own_type} model"
            )
        widths = site_widths(model, list(self.directions))
        for ((site, layer), direction), width in zip(self.directions.items(), widths, strict=True):
            if direction.shape != (width,):
                raise ValueError(
                    f"this vector has shape {tuple(direction.shape)} at {site!r} of layer {layer}, but "
                    f"{type(model).__name__} is {width} wide there; it was made for another model"
                )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that includes the metadata; on an error, no file is written.

        Raises:
            OSError: the file cannot be written.
            ValueError: the metadata cannot be written as JSON, or the directions are not finite or are all zero.
        """
        check_directions(self.directions, f"{path} is not written")
        for site, layer in self.directions:
            place_of(f"{layer}.{site}", f"{path} is not written: it")
        tensors = {f"{layer}.{site}": d.contiguous().clone() for (site, layer), d in self.directions.items()}
        try:
            told = {"format_version": FORMAT_VERSION, "metadata": self.metadata}
            text = json.dumps(told, default=_as_json, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the metadata cannot be written as JSON: {error}") from error
        parse_header(text, FORMAT_VERSION, f"{path} is not written")  # refuse metadata that could not be read again
        with written_whole(path) as place:
            save_file(tensors, place, metadata={KEY: text})

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no steering vector, or it has a newer format.
        """
        tensors, texts = read_tensors(path, PICKLED)
        if KEY not in texts:
            raise ValueError(f"{path} holds no steering vector: its metadata lack the key {KEY!r}")
        metadata = parse_header(texts[KEY], FORMAT_VERSION, str(path))
        if not tensors:
            raise ValueError(f"{path} holds no directions; make the vector again")
        directions = {place_of(key, str(path)): tensor for key, tensor in tensors.items()}
        check_directions(directions, str(path), dict(zip(directions, tensors, strict=True)))
        return cls(directions, metadata)._warned(path)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | Path,
        filename: str = VECTOR,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "SteeringVector":
        """Read a vector from a folder, or from a repository on the hub, of which only this file is downloaded.

        Args:
            folder_or_repo_id: a folder, or `owner/name`.
            filename: name of the vector's file, .safetensors or .gguf.
            revision: branch, tag or commit of the repository; by default the main branch.
            token: token of the hub; by default the one of `hf auth login` or `HF_TOKEN`.

        Raises:
            FileNotFoundError: the folder or repository has no such file.
            ValueError: the repository cannot be read, or the file holds no steering vector.
        """
        folder = Path(folder_or_repo_id)
        if not folder.is_dir():
            if "/" not in str(folder_or_repo_id) or not HUB_ID.fullmatch(str(folder_or_repo_id)):
                raise ValueError(
                    f"{str(folder_or_repo_id)!r} is neither a folder nor a repository owner/name; the file of a "
                    "vector is read by SteeringVector.load"
                )
            folder = download(Repository(str(folder_or_repo_id), revision), [filename], token)
        if not (folder / filename).is_file():
            raise FileNotFoundError(f"{folder_or_repo_id} holds no file {filename!r}; give filename=…")
        return read_vector(folder / filename)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload steering vector",
        token: str | bool | None = None,
    ) -> "CommitInfo":
        """Publish the vector with a model card as `vector.safetensors`; `from_pretrained` reads it.

        Args:
            repo_id: `owner/name`; the repository is made if it is missing.
            base_model: hub id of the model that the vector was made for, if its metadata do not hold it.
            private: whether the repository is private; None is the owner's setting. A public one is refused.
            revision: the branch; by default the main one.
            commit_message: the message of the commit.
            token: token of the hub; by default the one of `hf auth login` or `HF_TOKEN`.

        Returns:
            What the hub says about the commit, such as its `commit_url`.

        Raises:
            ValueError: the model is not on the hub, or the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_for_hub(folder, repo_id, base_model=base_model)
            return commit(
                Path(folder),
                repo_id,
                owned=(VECTOR,),
                private=private,
                revision=revision,
                message=commit_message,
                token=token,
            )

    def save_for_hub(self, folder: str | Path, repo_id: str, *, base_model: str | None = None) -> None:
        """Write the files that `push_to_hub` publishes into a folder: the vector and its model card.

        Raises:
            ValueError: the model is not on the hub.
        """
        from repeng.vectors.card import vector_card

        base = hub_id_of(base_model or self.metadata.get("model") or "")
        if base is None:
            raise ValueError(
                f"the vector was made for {base_model or self.model_name or 'a model without a name'}, which is not "
                "on the hub; name the hub id of that model as base_model"
            )
        named = SteeringVector(self.directions, {**self.metadata, "model": base})
        with staged(folder, (VECTOR, CARD)) as place:
            named.save(place / VECTOR)
            (place / CARD).write_text(vector_card(named, repo_id), encoding="utf-8")

    def _warned(self, path: str | Path) -> "SteeringVector":
        """The vector itself; warns about directions that do nothing."""
        nothing = idle(self.directions)
        if nothing:
            listed = ", ".join(f"{site} of layer {layer}" for site, layer in nothing[:3])
            warnings.warn(f"{path}: {len(nothing)} directions are zero and do nothing: {listed}", stacklevel=3)
        return self

    def save_gguf(self, path: str | Path) -> None:
        """Write a llama.cpp control vector: tensors `direction.LAYER` of the residual stream, to be added.

        Further keys hold the operation, the model and the units of the calibration. llama.cpp does not read them: in
        llama.cpp, the scale for c = 1 is `plus`, and the scale for c = −1 is −`minus`.

        Raises:
            ImportError: the package gguf is not installed.
            ValueError: the vector has directions at other sites or at layer 0, which llama.cpp cannot apply; the model
                type is unknown; or the directions are not finite or are all zero.
        """
        check_directions(self.directions, f"{path} is not written")
        from repeng.vectors.gguf import write_control_vector

        others = [site for site in self.sites if site != RESIDUAL]
        if others:
            raise ValueError(
                f"a control vector acts on the residual stream only, but this vector has {', '.join(others)}; "
                f"save vector.select(sites=[{RESIDUAL!r}])"
            )
        if 0 in self.layers:
            raise ValueError("llama.cpp applies no control vector at layer 0; save vector.select(layers=[1, 2, …])")
        hint = self.metadata.get("model_type") or self.metadata.get("model_hint")
        if not hint:
            raise ValueError("the model type is unknown; set vector.metadata['model_type'], for example to 'llama'")
        directions = {layer: self[RESIDUAL, layer] for layer in self.layers}
        write_control_vector(path, directions, hint, {**self.metadata, "model": self.model_name})

    @classmethod
    def load_gguf(cls, path: str | Path) -> "SteeringVector":
        """Read a llama.cpp control vector, for example one that vgel/repeng or EasySteer wrote.

        Raises:
            ImportError: the package gguf is not installed.
            FileNotFoundError: there is no such file.
            ValueError: the file is not a control vector, or it is not for the residual stream.
        """
        from repeng.vectors.gguf import read_control_vector

        directions, metadata = read_control_vector(path)
        # Writers name models differently, so the hint is only information. Only repeng's own model_type is checked.
        found = {(RESIDUAL, layer): d for layer, d in directions.items()}
        check_directions(found, str(path), {(RESIDUAL, layer): f"direction.{layer}" for layer in directions})
        return cls(found, checked_metadata(metadata, str(path)))._warned(path)


def read_vector(path: Path) -> SteeringVector:
    """Read a vector from a file of either format; see `SteeringVector.load` and `load_gguf`."""
    return SteeringVector.load_gguf(path) if path.suffix == ".gguf" else SteeringVector.load(path)


def model_type(model: nn.Module) -> str | None:
    """The `model_type` in the configuration of the text model; None if the model has no configuration."""
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config(decoder=True).model_type


def _as_json(value: Any) -> int | float:
    """Convert numbers of numpy and other libraries for JSON; raises TypeError for anything else."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} {value!r}")
