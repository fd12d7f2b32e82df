"""`python -m compiledllm.server --model MODEL`: the same as `compiledllm serve`."""

import sys

from compiledllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
