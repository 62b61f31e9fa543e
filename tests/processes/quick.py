"""A training run as `python -m repeng.train` starts it, with a comparison that need not be measured."""

import sys
import time

from repeng._command import command

with command("continue with --resume true"):
    from comparisons import comparison

    from repeng.train import run, run_folder

    def compare(*_, **__):
        time.sleep(1)
        return comparison()

    run_folder.compare = compare
    run.main(sys.argv[1:])
