"""Publish an adapter or a vector on the Hugging Face hub."""

import tempfile
from pathlib import Path
from typing import Any

from repeng.commands.base import base_of_adapter, read_steering
from repeng.control.adapter_folder import AdapterFolder
from repeng.data.files import staged
from repeng.data.folders import check_new, check_writable
from repeng.data.paths import VECTOR
from repeng.hub.stage import OWNED, check_told, stage_adapter
from repeng.model.hub import check_reachable, commit, hub_id_of
from repeng.model.loading import load_base, load_tokenizer
from repeng.vectors.vector import SteeringVector


def push(
    path: Path,
    repo_id: str,
    *,
    base_model: str | None,
    private: bool | None,
    revision: str | None,
    dry_run: Path | None,
) -> dict[str, Any]:
    """Publish an adapter or a vector, or write the files of its repository to the folder `dry_run`.

    Raises:
        ValueError: the base model is not on the hub, the hub cannot be reached or refuses, or a file beside the
            adapter is damaged.
        FileExistsError: the folder `dry_run` is not empty.
        OSError: the folder `dry_run` cannot be written.
    """
    steering = read_steering(path)
    if dry_run is not None:
        check_new(dry_run)
        check_writable(dry_run, "--dry_run")
    else:
        check_reachable(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(steering, SteeringVector):
            steering.save_for_hub(folder, repo_id, base_model=base_model)
            owned = (VECTOR,)
        else:
            owned = OWNED
            _stage(steering, folder, repo_id, base_model)
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        for name in names:
            print(f"{(folder / name).stat().st_size:>12,} bytes  {name}")
        if dry_run is not None:
            _move(folder, dry_run, names)
            print(f"written: {dry_run}; nothing is published")
            return {"repo_id": repo_id, "files": names, "folder": str(dry_run)}
        told = commit(folder, repo_id, owned=owned, private=private, revision=revision)
    print(f"published: {told.commit_url}")
    return {"repo_id": repo_id, "files": names, "commit": told.oid, "url": told.commit_url}


def _stage(adapter: AdapterFolder, folder: Path, repo_id: str, base_model: str | None) -> None:
    base, gguf_file = base_of_adapter(adapter.path)
    on_hub = hub_id_of(base_model or base)
    if on_hub is None:
        raise ValueError(
            f"the base model {base_model or base!r} is not on the hub, so nobody else could load the adapter; give "
            "--base_model the hub id of that model, such as Qwen/Qwen3-0.6B"
        )
    check_told(adapter)
    tokenizer = load_tokenizer(base, gguf_file)
    model = adapter.load(load_base(base, gguf_file=gguf_file))
    stage_adapter(
        adapter,
        model,
        folder,
        repo_id,
        base=base,
        gguf_file=gguf_file,
        on_hub=on_hub,
        has_template=bool(tokenizer.chat_template),
    )


def _move(folder: Path, to: Path, names: list[str]) -> None:
    for below in sorted({str(Path(name).parent) for name in names}):
        inside = [Path(name).name for name in names if str(Path(name).parent) == below]
        with staged(to / below, inside) as place:
            for name in inside:
                (place / name).write_bytes((folder / below / name).read_bytes())
