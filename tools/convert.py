"""The same as ``megarl convert``: checkpoints between Hugging Face and Megatron, compared and described.

python tools/convert.py hf2mcore|mcore2hf|verify|inspect --help
"""

import sys

from megarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
