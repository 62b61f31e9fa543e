"""`accelerate launch -m repeng.train`: one process of a training run."""

import sys

from repeng._command import command, end_with_the_launcher


def main() -> None:
    """Run the training that the command line describes."""
    end_with_the_launcher()
    with command("continue with --resume true"):
        from repeng.train.run import main as train  # slow to import

        train(sys.argv[1:])


if __name__ == "__main__":
    main()
