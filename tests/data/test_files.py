"""Files are written whole or not at all, whoever writes them."""

import signal

import pytest
import torch
from comparisons import comparison
from safetensors import SafetensorError
from safetensors.torch import load_file

from repeng import SteeringVector
from repeng.data import files
from repeng.data.files import WriteError, staged, write_json, write_text, written_whole
from repeng.eval.report.folder import write_report
from repeng.eval.report.page import write_page
from repeng.eval.report.tables import write_csv
from repeng.train.adapter_files import save_adapter
from repeng.train.collator import STACKED
from repeng.train.reference_cache import _write_part
from repeng.vectors.gguf import write_control_vector

VECTOR = SteeringVector({("residual", 1): torch.ones(4)}, {"model_type": "llama"})


EXAMPLE = {**{name: torch.zeros(2) for name in STACKED}, "ref_logp": [torch.zeros(1)] * 3}
WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "JSON": lambda path: write_json(path, {"new": 1}),
    "table": lambda path: write_csv(comparison(), path),
    "page": lambda path: write_page(comparison(), path, title="t"),
    "vector": lambda path: VECTOR.save(path),
    "control vector": lambda path: write_control_vector(path, {1: torch.ones(4)}, "llama"),
    "reference": lambda path: _write_part([EXAMPLE], path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_at_its_end_leaves_the_old_file(name, tmp_path, monkeypatch):
    path = tmp_path / "file.ext"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    WRITERS[name](path)
    assert path.read_bytes() != b"old" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), written_whole(path) as place:
        place.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_the_whole_report_and_the_adapter_are_written_through_the_same_door(tmp_path, monkeypatch, steered):
    moved = []
    replace = files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    write_report(comparison(), tmp_path, title="t")
    save_adapter(steered, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(moved)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) > 4


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    VECTOR.save(tmp_path / "vector.safetensors")
    assert (tmp_path / "vector.safetensors").stat().st_mode == plain.stat().st_mode


def test_only_named_files_leave_the_staging_folder(tmp_path):
    with staged(tmp_path, ["a"]) as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


FULL = OSError(28, "No space left on device")


def test_a_full_disk_is_told_with_the_file_and_the_folder(tmp_path):
    """Not with the name of the temporary folder; also where one of several files fails."""
    for raised in (FULL, SafetensorError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(WriteError, match="No space left") as told, written_whole(tmp_path / "file.txt"):
            raise raised
        assert str(tmp_path) in str(told.value) and "file.txt" in str(told.value)
    with (
        pytest.raises(WriteError, match=f"^{tmp_path}: b could not be written: No space left on device$"),
        staged(tmp_path, ["a", "b"]) as folder,
        written_whole(folder / "b"),
    ):
        raise FULL
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["report.json", "report.csv", "report.html", "report.png"])
def test_a_report_is_written_whole_or_not_at_all(failing, tmp_path, monkeypatch):
    for name in ("report.json", "report.csv", "report.html", "report.png"):
        (tmp_path / name).write_text("old")
    replace = files.os.replace

    def full(source, place):
        if place.name == failing:
            raise FULL
        replace(source, place)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(WriteError, match=f"^{tmp_path}: {failing} .*No space left"):
        write_report(comparison(), tmp_path, title="t")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"} and len(list(tmp_path.iterdir())) == 4


def test_a_signal_waits_until_all_files_have_moved(tmp_path, monkeypatch, request):
    replace = files.os.replace

    def interrupted(source, place):
        signal.raise_signal(signal.SIGINT)
        replace(source, place)

    monkeypatch.setattr(files.os, "replace", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    with pytest.raises(KeyboardInterrupt), staged(tmp_path, ["a", "b"]) as folder:
        (folder / "a").touch()
        (folder / "b").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_speaks_of_an_older_adapter_goes_with_it(tmp_path, steered):
    """And stays where the same adapter is written again."""
    card = tmp_path / "card"
    save_adapter(steered, tmp_path)
    for number, there in ((0, True), (1, False)):
        card.touch()
        with torch.no_grad():
            for parameter in (p for p in steered.parameters() if p.requires_grad):
                parameter += number
        save_adapter(steered, tmp_path, stale=[card], more={"about": str(number)})
        assert card.exists() == there and (tmp_path / "about").read_text() == str(number)
