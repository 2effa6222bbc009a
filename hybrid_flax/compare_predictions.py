"""Whether one model is better than another, from what both said of the same images.

python -m hybrid_flax.compare_predictions A.csv B.csv

The files are those of `python -m hybrid_flax.evaluate --predictions=FILE`. Prints both accuracies,
how many images only one has right, and the two-sided p-value of McNemar's exact test.
"""

import argparse
import csv
import io
import sys

from hybrid_flax import cli
from hybrid_flax.errors import InputError
from hybrid_flax.evaluation.scoring import compare
from hybrid_flax.settings.arguments import with_home
from hybrid_flax.text_files import read_lines


def read_right(file: str) -> list[tuple[str, bool]]:
    """(image, whether its first class was right) of every row; InputError for another file."""
    text = "\n".join(line for _, line in read_lines(file))
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"image", "right1"} <= rows[0].keys():
        raise InputError(
            f"{file} has no columns image and right1: expected what evaluate --predictions writes"
        )
    return [(row["image"], row["right1"] == "1") for row in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first")
    parser.add_argument("second")
    options = parser.parse_args(with_home(sys.argv[1:] if arguments is None else arguments))
    return cli.ending(lambda: _compare(options.first, options.second), limited=False) or 0


def _compare(first: str, second: str) -> int:
    found = compare(read_right(first), read_right(second))
    print(
        f"{first}: top-1 {found.first:.2f} %\n{second}: top-1 {found.second:.2f} %\n"
        f"of {found.images} images {found.only_first} only the first has right, "
        f"{found.only_second} only the second; p = {found.p_value:.2g} (McNemar, exact)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
