"""Runs a script as where packages that it does not need are not installed: importing them takes seconds."""

import runpy
import sys

sys.modules.update(dict.fromkeys(("datasets", "deepspeed", "matplotlib", "pandas", "peft", "scipy", "sklearn")))

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
