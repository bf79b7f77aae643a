"""Evaluate predictions from any source: a CSV file in the format of the Google Landmarks challenge; needs no images.

python -m tools.evaluate --predictions FILE gldv2 TEST.DATA_DIR DIR

FILE has the header id,images and a line per query: its id, and the ids of index images, best first, separated by
spaces. A query without a line counts 0. An image that repeats an earlier one, or is not in the index, keeps its rank
but never scores. Queries that the solution ignores are skipped.
"""

import sys
from pathlib import Path

from assembly import find_dataset
from config import ADVICE, CommandLine
from model.errors import InputError, run_command
from report.results import metric_lines
from revisitop.evaluate import evaluate_predictions
from revisitop.layout_csv import read_predictions
from revisitop.measures import CHALLENGE


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, ("TEST.DATA_DIR",), "python -m tools.evaluate")
    line.add("name", metavar="NAME", help="name of the dataset, in GLDv2's layout")
    line.add("--predictions", type=Path, required=True, metavar="FILE", help="the predictions, id,images")
    args, cfg, _ = line.parse(argv)
    dataset = find_dataset(cfg, args.name)
    if dataset.protocols[0].measure is not CHALLENGE:
        raise InputError(f"{args.name} has no solution.csv; predictions are evaluated for datasets in GLDv2's layout")
    predictions = read_predictions(args.predictions, dataset)
    empty = sum(not len(each) for each in predictions)
    unknown = sum(int((each < 0).sum()) for each in predictions)
    metrics = evaluate_predictions(predictions, dataset.ground_truth, dataset.protocols)
    for text in metric_lines(metrics):
        print(text)
    if empty:
        print(f"{empty} of {len(predictions)} queries have no predictions and count 0")
    if unknown:
        print(f"{unknown} predictions repeat an earlier one or are not in the index; they never score")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run_command(main, ADVICE)
