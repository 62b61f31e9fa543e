"""Train a steering adapter, save it, and print what it does.

accelerate launch train.py                                            # the embedded model, offline
accelerate launch train.py --config tiny --learning_rate 1e-3         # any key overrides the configuration
accelerate launch train.py --help

`repeng train` does the same from an installed package.
"""

from repeng.train.__main__ import main

if __name__ == "__main__":
    main()
