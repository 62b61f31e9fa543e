"""Kill a run at many moments, in forks of one process that has imported everything: for test_killed_runs.py."""

import os
import random
import signal
import sys
import time
from pathlib import Path

from comparisons import comparison
from safetensors.torch import load_file

from repeng.train import run, run_folder


def compare(*_, **__):
    time.sleep(0.3)
    return comparison()


def start(folder, words):
    """A process that trains into the folder, from where the last one was killed."""
    child = os.fork()
    if child == 0:
        try:
            run.main([*words, "--output_dir", str(folder), "--resume", "true"])
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def check(folder, whole):
    """The folder of a run that has ended is that of the undisturbed one."""
    assert adapter(folder) == adapter(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def main(place, times, *words):
    place, moments = Path(place), random.Random(0)
    run_folder.compare = compare
    began = time.time()
    assert os.waitpid(start(place / "whole", words), 0)[1] == 0
    length, done = time.time() - began, 0
    for _ in range(int(times)):
        child = start(place / str(done), words)
        time.sleep(moments.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        left = (place / str(done)).glob("**/*.safetensors") if (place / str(done)).exists() else ()
        for path in left:
            if ".saving-" not in str(path):
                load_file(path)  # nothing is half-written
        if not os.WIFSIGNALED(status):
            assert status == 0
            check(place / str(done), place / "whole")
            done += 1  # the next one starts anew
    assert os.waitpid(start(place / str(done), words), 0)[1] == 0
    check(place / str(done), place / "whole")


if __name__ == "__main__":
    main(*sys.argv[1:])
