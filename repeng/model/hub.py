"""The Hugging Face hub: ids of its repositories, download of named files, and commits. No slow import at the top."""

import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from repeng._file_names import CARD, VECTOR
from repeng.model.sources import EMBEDDED, HUB_ID, PACKAGED, name_of_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

MARKS = {"adapter_config.json": "an adapter", VECTOR: "a vector"}  # by file: what a repository holds
REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)


class Repository(NamedTuple):
    """A repository of the hub, `owner/name`, at a revision; None is its default branch."""

    id: str
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.id.partition("/")[2]


def repository(word: str) -> Repository | None:
    """The repository that a word of the form `owner/name` or `owner/name@revision` names; None for other words.

    A word is no repository if it is a path that exists, or if its first part is a folder that exists.
    """
    name, mark, revision = word.partition("@")
    if "/" not in name or ".." in word or not HUB_ID.fullmatch(name) or (mark and not REVISION.fullmatch(revision)):
        return None
    if Path(word).exists() or Path(name.partition("/")[0]).exists():
        return None
    return Repository(name, revision or None)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless this is a name of the form `owner/name`."""
    if "/" not in repo_id or not HUB_ID.fullmatch(repo_id) or ".." in repo_id:
        raise ValueError(f"REPO_ID should have the form owner/name; got {repo_id!r}")


def hub_id_of(base: str) -> str | None:
    """The hub id of a base model that is named as `model_name_or_path` names it; None if it is not on the hub."""
    base = name_of_folder(base) or base
    if base in PACKAGED:
        return PACKAGED[base].hub_id
    known = base in EMBEDDED or Path(base).exists() or not HUB_ID.fullmatch(base) or ".." in base
    return None if known else base


def unreachable() -> str | None:
    """Why the hub cannot be reached; None if it can, or if a proxy stands between.

    The hub's own client would find out only after half a minute of retries.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if getproxies():
        return None
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname, port), timeout=5).close()
    except OSError as error:
        return f"{place.hostname} cannot be reached ({error})"
    return None


def check_reachable(repo_id: str) -> None:
    """Raise ValueError if nothing can be published in this repository, because the hub cannot be reached."""
    why = unreachable()
    if why is not None:
        raise ValueError(f"{repo_id} cannot be published: {why}")


def download(place: Repository, files: Sequence[str], token: str | bool | None = None) -> Path:
    """Download those of the files that the repository has, into the hub's cache. No other file is downloaded.

    Without the network, files in the cache are used.

    Returns:
        The folder with the files.

    Raises:
        ValueError: the repository or the revision does not exist, or cannot be read or reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    why = unreachable()
    try:
        return Path(
            snapshot_download(
                place.id,
                revision=place.revision,
                allow_patterns=list(files),
                token=token,
                local_files_only=why is not None,
            )
        )
    except LocalEntryNotFoundError as error:
        why = why or _first_line(error)
        raise ValueError(f"{_told(place)} is not in the cache of the hub, and {why}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{_told(place)} cannot be downloaded from the hub: {_first_line(error)}") from None


def commit(
    folder: Path,
    repo_id: str,
    *,
    owned: Iterable[str],
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload with repeng",
    token: str | bool | None = None,
) -> "CommitInfo":
    """Publish all files of a folder as one commit. The repository and the branch are made if they are missing.

    Keys of the metadata of an older model card, such as a license, are kept if the new card does not set them.

    Args:
        folder: the files.
        repo_id: `owner/name`.
        owned: paths of files that this package writes. They are deleted from the repository if `folder` lacks them.
        private: whether the repository is private; None is the owner's setting.
        revision: the branch; by default the main one.
        message: the message of the commit.
        token: the token; by default the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: the name is not one of a repository, the hub cannot be reached or refuses, the repository is public
            and should be private, or it holds an adapter where `folder` holds a vector, or the reverse.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repo_id(repo_id)
    check_reachable(repo_id)
    api, names = HfApi(token=token), sorted(_files_in(folder))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError("it is public; make it private in its settings on the hub, or give another REPO_ID")
        # A new branch begins with the files of the main one.
        branch = revision if revision is None or api.revision_exists(repo_id, revision) else None
        there = set(api.list_repo_files(repo_id, revision=branch))
        for mark, kind in MARKS.items():
            if mark in there and mark not in names and not MARKS.keys().isdisjoint(names):
                raise ValueError(f"it holds {kind}; give another REPO_ID")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if CARD in there and CARD in names:
            older = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
            _keep_metadata(folder / CARD, older)
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name) for name in sorted((there & set(owned)) - set(names))),
            ],
            commit_message=message,
            revision=revision,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} cannot be published: {_first_line(error)}") from None


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _keep_metadata(card: Path, older: str) -> None:
    """Add the metadata of an older card to a card that lacks them."""
    from huggingface_hub import ModelCard

    new, before = (ModelCard(text, ignore_metadata_errors=True) for text in (card.read_text(encoding="utf-8"), older))
    own = new.data.to_dict()
    more = {key: value for key, value in before.data.to_dict().items() if key not in own}
    if more:
        for key, value in more.items():
            setattr(new.data, key, value)
        card.write_text(str(new), encoding="utf-8")


def _told(place: Repository) -> str:
    return place.id + (f" at revision {place.revision}" if place.revision else "")


def _first_line(error: Exception) -> str:
    """What the hub's client says, in one line: its messages begin with the status and an address."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] or type(error).__name__
