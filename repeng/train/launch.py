"""`repeng train`: start a training run through `accelerate launch`."""

import argparse
import logging
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import psutil
import yaml

from repeng._command import Stopped, handle, restore
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import CONFIGS, names_of
from repeng.data.files import nearest
from repeng.data.schema import refuse_unknown
from repeng.data.words import LINE, name_of

LINKED = "deepspeed_config_file"  # a path in accelerate configurations, relative to the parent of configs/


def launch(argv: Sequence[str]) -> None:
    """Start `python -m repeng.train` in the number of processes that accelerate's configuration sets.

    Flags that only `accelerate launch` knows go to the launcher, and all others to the training. `--config_file` also
    takes the name of an accelerate configuration of this package, such as `fsdp2`.

    Raises:
        ValueError: neither the launcher nor the training knows a flag.
        SystemExit: the training failed, or a signal stopped it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from repeng.train.arguments import SteeringArguments, check_arguments

    # Without a configuration, the launcher lists the defaults of flags that most runs do not need.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    parser = launch_command_parser()
    parser.error = _refuse  # one sentence, without the usage text
    flags, rest = split_flags(argv, parser, {"config", *names_of((TaskArguments, SteeringArguments))})
    check_arguments(rest)
    arguments = parser.parse_args([*flags, "--quiet", "--module", "repeng.train", *rest])
    with TemporaryDirectory(prefix="repeng-launch-") as folder:
        if arguments.config_file is not None:
            _check_config_file(arguments.config_file)
            arguments.config_file = accelerate_config(arguments.config_file, Path(folder))
        with _passed_on() as came:
            try:
                launch_command(arguments)
            except SignalException as error:  # several processes run, and all of them got the signal
                came.append(error.sigval)
            except (CalledProcessError, ChildFailedError, SystemExit) as error:
                sys.exit(128 + came[0] if came else _status_of(error))
        if came:
            sys.exit(128 + came[0])


def _status_of(error: Exception | SystemExit) -> int:
    """The exit status of the process that failed first. Its message is printed already, unless a signal killed it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, ChildFailedError):
        status = min(error.failures.values(), key=lambda failure: failure.timestamp).exitcode
    else:
        status = getattr(error, "returncode", None) or getattr(error, "code", None)
    if not isinstance(status, int):
        return 1
    if status == -signal.SIGKILL:
        print(
            "error: the training was killed. If nobody did so, the system had too little memory: give a smaller "
            "per_device_train_batch_size, and continue with --resume true",
            file=sys.stderr,
        )
    return 128 - status if status < 0 else status


@contextmanager
def _passed_on() -> Iterator[list[int]]:
    """Catch signals that would end this process, send SIGTERM to its children instead, and yield the signals caught.

    Ctrl-C in a terminal reaches the children directly too. A second Ctrl-C ends them at once.
    """
    came: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        children = psutil.Process().children()
        if not children:
            raise Stopped(number)
        came.append(number)
        for child in children:
            child.terminate()

    before = handle(pass_on)
    try:
        yield came
    finally:
        restore(before)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{LINE}: {message}")


def _check_config_file(word: str) -> None:
    shipped = [path.stem for path in CONFIGS.glob("accelerate/*.yaml")]
    if word not in shipped and not Path(word).is_file():
        raise FileNotFoundError(
            f"--config_file: there is no file {word!r}{nearest(word, shipped)}; give a file of accelerate, or one of "
            f"{', '.join(sorted(shipped))}"
        )


def accelerate_config(word: str, folder: Path) -> str:
    """The path of an accelerate configuration of this package, given its name; any other word is returned unchanged.

    If the configuration names another file of the package, a copy in `folder` names that file by its absolute path.
    """
    shipped = {path.stem: path for path in CONFIGS.glob("accelerate/*.yaml")}
    if word not in shipped:
        return word
    settings = yaml.safe_load(shipped[word].read_text(encoding="utf-8"))
    deepspeed = settings.get("deepspeed_config", {})
    if LINKED not in deepspeed:
        return str(shipped[word])
    deepspeed[LINKED] = str(CONFIGS.parent / deepspeed[LINKED])
    copy = folder / shipped[word].name
    copy.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(copy)


def split_flags(
    argv: Sequence[str], parser: argparse.ArgumentParser, own: Collection[str]
) -> tuple[list[str], list[str]]:
    """Split a command line into words for the launcher and words for the training, which gets flags that both know.

    Args:
        argv: the command line.
        parser: the parser of the launcher.
        own: names of the keys of the training.

    Raises:
        ValueError: neither the launcher nor the training knows a flag.
    """
    known = {option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    launchers: list[str] = []
    ours: list[str] = []
    into = ours
    for word in argv:
        if word.startswith("--"):
            name = name_of(word)
            if name.removeprefix("no_") in own:  # HfArgumentParser's way to set a key to false
                name = name.removeprefix("no_")
            refuse_unknown([name], {*own, *known}, LINE)
            into = ours if name in own else launchers
        into.append(word)
    return launchers, ours
