"""Speed and memory of the pair analyses: each part is a file of its own and prints a table.

python benchmarks/analyses.py [--only shift|svd|clusters]
"""

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = ("shift", "svd", "clusters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part; default all, one after the other")
    asked = parser.parse_args().only
    for part in (asked,) if asked else PARTS:
        script = Path(__file__).with_name(f"analyses_{part}.py")
        subprocess.run([sys.executable, script], check=True)


if __name__ == "__main__":
    main()
