"""Folders are checked before any work, and held by one command at a time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repeng.data import folders
from repeng.data.files import STAGING
from repeng.data.folders import LOCK, check_writable, claimed

HOLD = """
import sys
from repeng.data.folders import claimed
with claimed(sys.argv[1], "output_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    """Another process that holds the folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_command_at_a_time(tmp_path):
    with holder(tmp_path) as process:
        told = rf"^output_dir .{re.escape(str(tmp_path))}.*process {process.pid} .*another output_dir"
        with pytest.raises(OSError, match=told), claimed(tmp_path, "output_dir"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # that refusal has not freed it
    with claimed(tmp_path, "output_dir"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_command_holds_nobody_up_and_its_halves_go(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
    assert (tmp_path / LOCK).read_text()
    (tmp_path / f"{STAGING}abc").mkdir()
    (tmp_path / f"{STAGING}abc" / "half").touch()
    (tmp_path / "own").touch()
    with claimed(tmp_path, "output_dir"):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, "own"}
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_lock_that_is_removed_while_one_waits_for_it_is_none(tmp_path, monkeypatch):
    """Its holder ends between the moments at which another opens the file and locks it."""
    lock, removed = folders.fcntl.flock, []

    def late(descriptor, how):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        lock(descriptor, how)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with claimed(tmp_path, "output_dir"):
        assert (tmp_path / LOCK).is_file() and removed


def test_where_files_cannot_be_locked_nothing_is(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    with claimed(tmp_path, "output_dir"), claimed(tmp_path, "output_dir"):
        pass


BAD = {
    "below a file": "file/out",
    "a file": "file",
    "a name of 300 letters": "new/" + 300 * "x",
    "NUL": "new/a\0b",
    "no text": "new/a\ud800",
    "in a file system that takes none": "/proc/nowhere",
    "a device": "/dev/null",
    "no name": "",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("hold", [claimed, check_writable])
def test_what_cannot_be_written_is_refused_by_name_and_nothing_is_left(name, hold, tmp_path):
    (tmp_path / "file").write_text("")
    place = os.path.join(tmp_path, BAD[name]) if BAD[name] else ""
    with pytest.raises(OSError, match=r"^output_dir .*cannot be written \(.+\); give ") as told:
        with hold(place, "output_dir") or pytest.fail("not refused"):
            pass
    assert "\n" not in str(told.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    check_writable(tmp_path / "new" / "deep", "output_dir")
    with pytest.raises(ValueError), claimed(tmp_path / "new" / "deep", "output_dir"):
        raise ValueError
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "new" / "deep", "output_dir") as place:
        (place / "file").touch()
    assert [path.name for path in place.iterdir()] == ["file"]
    assert place == Path(tmp_path / "new" / "deep")
