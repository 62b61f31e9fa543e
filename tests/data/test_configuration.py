"""Arguments from files and the command line: whose keys win, which names stand for files, what is refused."""

import argparse

import pytest
from support import ROOT

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import (
    add_keys,
    config_file,
    data_file,
    parse_into,
    read_configs,
    shipped_configs,
)
from repeng.train.arguments import SteeringArguments, parse_arguments

KINDS = (TaskArguments, SteeringArguments)


def test_every_shipped_configuration_has_a_name_of_its_own():
    files = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/traits/*.yaml")]
    assert len(shipped_configs()) == len(files) and {"tiny", "qwen3-0.6b", "mood"} <= shipped_configs().keys()


def test_a_name_stands_for_a_shipped_file_and_a_path_for_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mood.yaml").write_text("positive: a\nnegative: b\n")
    assert config_file("mood") == ROOT / "configs" / "traits" / "mood.yaml"
    assert config_file("mood.yaml").resolve() == tmp_path / "mood.yaml"
    with pytest.raises(FileNotFoundError, match=r"'moood'.*did you mean 'mood'.*tiny"):
        config_file("moood")
    assert data_file("suffixes") == ROOT / "configs" / "data" / "suffixes.txt"


@pytest.mark.parametrize("find, name", [(config_file, "mood"), (data_file, "suffixes")])
def test_a_word_with_two_meanings_is_refused(tmp_path, monkeypatch, find, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"write \./{name} for the file"):
        find(name)
    assert find(f"./{name}").resolve() == tmp_path / name


def test_later_configurations_and_the_command_line_win(tmp_path):
    (tmp_path / "a.yaml").write_text("positive: warm\nmax_steps: 7\nr: 4\n")
    task, args = parse_arguments(["--config", "tiny", "mood", str(tmp_path / "a.yaml"), "--r", "6"])
    assert (task.positive, task.negative, args.max_steps, args.r) == ("warm", "gloomy", 7, 6)
    assert args.output_dir == "outputs/tiny"


@pytest.mark.parametrize(
    "argv, mixed_in",
    [
        ([], True),
        (["--max_steps", "3"], True),
        (["--num_pairs", "8"], True),
        (["--pairs_file", "{pairs}"], False),
        (["--model_name_or_path={folder}", "--pairs_file", "{pairs}"], False),
        (["--positive", "warm", "--negative", "cold"], False),
        (["--pairs-file", "{pairs}"], False),
        (["--config", "{own}"], False),
    ],
)
def test_the_default_stands_for_the_case_without_a_task(tmp_path, argv, mixed_in):
    """A command line that names a model or a behaviour gets neither from the default configuration."""
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    (tmp_path / "own.yaml").write_text(f"pairs_file: {tmp_path}/pairs.jsonl\n")
    places = {"pairs": tmp_path / "pairs.jsonl", "folder": tmp_path, "own": tmp_path / "own.yaml"}
    task, args = parse_arguments([word.format(**places) for word in argv], "tiny")
    assert ((task.positive, args.output_dir) == ("honest", "outputs/tiny")) == mixed_in
    assert task.pairs_file is None or task.positive is None


def test_unknown_keys_are_refused_in_files_and_on_the_line(tmp_path):
    (tmp_path / "a.yaml").write_text("positive: a\nnegative: b\n")
    (tmp_path / "b.yaml").write_text("positive: a\nnegative: b\nmax_steps: 3\n")
    (task,) = parse_into([TaskArguments], ["--config", str(tmp_path / "a.yaml")])
    assert task.positive == "a"
    with pytest.raises(ValueError, match=r"b\.yaml, line 3: .*'max_steps'"):
        parse_into([TaskArguments], ["--config", str(tmp_path / "b.yaml")])
    (tmp_path / "c.yaml").write_text("positive: a\nnegative: b\nno_load_in_4bit: true\n")
    with pytest.raises(ValueError, match=r"c\.yaml, line 3: .*'no_load_in_4bit'"):
        parse_into([TaskArguments], ["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(ValueError, match="unknown key 'max_steps'"):
        parse_into([TaskArguments], ["--config", str(tmp_path / "a.yaml"), "--max_steps", "3"])


def test_a_file_must_hold_keys_and_values(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"list\.yaml, line 1: .*keys and values"):
        read_configs([str(tmp_path / "list.yaml")], {})


def test_data_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="neutral_file: there is no file 'nowhere'"):
        TaskArguments(positive="a", negative="b", neutral_file="nowhere")


def test_only_suffixes_have_a_name():
    with pytest.raises(FileNotFoundError, match="neutral_file: there is no file 'suffixes'"):
        TaskArguments(positive="a", negative="b", neutral_file="suffixes")


@pytest.mark.parametrize("text, message", [("positive: no\nnegative: b\n", "line 1: positive .*got False")])
def test_yaml_that_reads_a_word_as_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(tmp_path / "a.yaml")])


def test_one_template_needs_no_brackets(tmp_path):
    (tmp_path / "a.yaml").write_text("positive: a\nnegative: b\ntemplates: Be {persona}.\n")
    assert parse_arguments(["--config", str(tmp_path / "a.yaml")])[0].templates == ["Be {persona}."]


@pytest.mark.parametrize("kind", KINDS)
def test_every_help_text_can_be_shown(kind):
    """A bare percent sign would end `--help` in a traceback."""
    parser = argparse.ArgumentParser()
    add_keys(parser, [kind], "keys")
    assert "--" in parser.format_help()
