"""`accelerate launch -m repeng.train`: one process of a training run."""

import sys

from repeng.train.run import main

main(sys.argv[1:])
