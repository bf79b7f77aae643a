"""Reproduce the paper's results, from the download to a table with a verdict, and name likely causes of a difference.

python -m tools.reproduce
python -m tools.reproduce --million --yes TEST.DATA_DIR DIR TEST.WEIGHTS DIR
python -m tools.reproduce --depth 50 TEST.DATASET_LIST roxford5k TEST.PRECISION bf16

Missing datasets and weights are downloaded after a question, the machine and the data are verified (tools.verify), and
ResNet-50 and ResNet-101 are evaluated on ROxford and RParis, with and without reranking, and with --million among a
million distractors, too. The command can be interrupted at any moment, and resumes when it is started again; a part
that fails does not stop the others. The table is printed as Markdown, and is in TEST.OUT_DIR/runs/latest/reproduce.md.
"""

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from assembly import DEFAULT_WEIGHTS, Session, find_dataset, prepare, rankings_of, start_session
from config import INDEX, LOADING, NETWORK, RERANKING, CommandLine, Parsed, as_typed, make_config, option_values, varied
from extraction.files import read_json, write_json
from model.checkpoint import PUBLISHED
from model.cvnet import STAGE_DEPTHS
from model.errors import InputError
from report.command import run_command
from report.results import markdown_table
from revisitop.published import find_figures, published
from tools.causes import MISTAKES, Pattern, causes, differs
from tools.check import Finding
from tools.download import Download, make_item
from tools.verify import verify

log = logging.getLogger(__name__)

NAMED_CAUSES = 3
PROTOCOLS = ("M", "H")  # for which the paper has results


class Part(NamedTuple):
    """What is evaluated together: a network on a dataset, alone or among the distractors."""

    depth: int
    dataset: str
    million: bool

    def __str__(self) -> str:
        return f"ResNet-{self.depth} on {self.dataset}{' +1M' if self.million else ''}"


@dataclass(frozen=True)
class Outcome:
    """The results of a part.

    Attributes:
        maps: mAP in percent by stage and protocol.
        hours: of extraction and search, in all runs together.
        problem: why it failed; empty if it did not.
    """

    part: Part
    maps: dict[str, dict[str, float]] = field(default_factory=dict)
    hours: float = 0.0
    problem: str = ""

    def differences(self, stage: str) -> dict[str, float]:
        """Returns the differences from the paper by protocol; empty if it has no such result."""
        depth, name, million = self.part
        figures = find_figures(published()["figures"], depth, stage, million, name)
        return {key: self.maps[stage][key] - value for key, value in figures.items()}

    @property
    def pattern(self) -> Pattern:
        """The differences from the paper by stage and protocol."""
        return {f"{stage} {key}": value for stage in self.maps for key, value in self.differences(stage).items()}


def main(argv: list[str]) -> None:
    args, cfg, given = parse(argv)
    session = start_session(cfg, sys.stderr)
    for name in {*cfg.TEST.DATASET_LIST} - published()["datasets"].keys():
        find_dataset(cfg, name)  # raises before the work; the published ones are downloaded
    depths = [cfg.MODEL.DEPTH] if "MODEL.DEPTH" in given else list(STAGE_DEPTHS)
    missing = download(args, cfg, depths)
    log.info("verifying the machine, the data and the weights")
    unused = [word for depth in STAGE_DEPTHS if depth not in depths for word in (f"ResNet-{depth}", PUBLISHED[depth])]
    unused += [] if args.million else ["revisitop1m"]
    findings = [each for each in verify(cfg) if not any(word in each.text for word in unused)]
    for finding in findings:
        log.info("%s", finding)
    outcomes = []
    for million in (False, True) if args.million else (False,):
        for depth in depths:
            failure = missing.get("revisitop1m", "") or extract_million(cfg, given, depth) if million else ""
            for name in cfg.TEST.DATASET_LIST:
                part, problem = Part(depth, name, million), missing.get(name, "") or failure
                outcomes.append(Outcome(part, problem=problem) if problem else run_part(part, cfg, session))
    parts = table(outcomes), failures(outcomes), conditions(session, findings), explanation(outcomes, cfg, findings)
    text, run = "\n\n".join("\n".join(part) for part in parts if part) + "\n", session.output.new_run("reproduce")
    (run / "reproduce.md").write_text(text, encoding="utf-8")
    session.output.publish(run)
    print(text)
    log.info("this text, ready to be posted, is in %s", run / "reproduce.md")
    if failed := [str(each.part) for each in outcomes if each.problem]:
        raise InputError(f"failed: {', '.join(failed)}; see above, and start the same command again to resume")
    if any(differs(each.pattern) for each in outcomes):
        sys.exit(1)


def parse(argv: list[str]) -> Parsed:
    instead = dict.fromkeys(("SupG.onemeval", "TEST.DISTRACTORS"), "it has --million")
    instead |= dict.fromkeys(("MODEL.NAME", "TEST.FEATURES", "TEST.REPORT", "TEST.RERANKER"), "use test.py")
    line = CommandLine(__doc__, instead=instead)
    line.add(
        "--million", action="store_true", help="also with a million distractors, which are downloaded and extracted"
    )
    line.add_flag("--depth", "MODEL.DEPTH", type=int, choices=STAGE_DEPTHS, help="only this network [both]")
    line.add("--yes", action="store_true", help="download what is missing without a question")
    line.add("--mirror", metavar="URL", help="a mirror to try first, see tools.download")
    return line.parse(argv)


def download(args: argparse.Namespace, cfg: CfgNode, depths: Sequence[int]) -> dict[str, str]:
    """Downloads what is missing after a question, and returns what to say of each item that is not complete."""
    data, weights = Path(cfg.TEST.DATA_DIR), weights_folder(cfg)
    names = [name for name in cfg.TEST.DATASET_LIST if name in published()["datasets"]]
    names += ["features"] if names else []
    names += ["weights"] * (not weights.is_file()) + ["revisitop1m"] * args.million
    plan = Download([make_item(name, data, weights, depths=depths) for name in names], args.mirror)
    if not plan.needed:
        return {}
    agreed = plan.offline or args.yes or confirmed(f"download {plan.size / 1e9:,.1f} GB to {data} and {weights}?")
    incomplete = plan.get() if agreed else []
    command = f"--data-dir {data} --weights-dir {weights} says why"
    return {name: f"{name} is not complete; python -m tools.download {name} {command}" for name in incomplete}


def confirmed(question: str) -> bool:
    """Returns whether the user agrees; False if there is nobody to ask."""
    if not sys.stdin or not sys.stdin.isatty():
        log.info("nothing is downloaded without --yes")
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def weights_folder(cfg: CfgNode) -> Path:
    return DEFAULT_WEIGHTS if cfg.TEST.WEIGHTS == "auto" else Path(cfg.TEST.WEIGHTS)


def extract_million(cfg: CfgNode, given: set[str], depth: int) -> str:
    """Extracts the distractors, or finds that they exist, and returns why this failed; "" if it did not."""
    keys = given & {*NETWORK, *LOADING, "TEST.DEVICE"} - {"TEST.WEIGHTS", "MODEL.DEPTH"}
    options = [word for key in sorted(keys) for word in (key, as_typed(option_values(cfg)[key]))]
    command = [sys.executable, Path(__file__).parents[1] / "extract_rop1m.py", "--depth", str(depth)]
    command += ["--weight", weights_folder(cfg), "--data-dir", Path(cfg.TEST.DATA_DIR) / "revisitop1m", *options]
    code = subprocess.run(command, stdout=2, check=False).returncode  # in a process: it has a log of its own
    return f"extract_rop1m.py --depth {depth} ended with exit code {code}, see above" if code else ""


def run_part(part: Part, cfg: CfgNode, session: Session) -> Outcome:
    """Extracts, searches, reranks and evaluates; the outcome says what is missing or invalid."""
    log.info("%s", part)
    cfg = varied(cfg, {"MODEL.DEPTH": part.depth, "SupG.onemeval": part.million})
    clock = session.output.folder / "hours.json"
    try:
        experiment = prepare(cfg, part.dataset, session.output, session.device)
        with accumulated_hours(clock, experiment.folder.name):
            variants = list(rankings_of(experiment, [experiment], *experiment.descriptors()))
        hours = read_json(clock)[experiment.folder.name]
    except (InputError, OSError) as error:
        log.info("%s failed: %s", part, error)
        return Outcome(part, problem=str(error))
    metrics = {each.title: experiment.evaluate(each.ranking) for each in variants}
    maps = {stage: {name: 100 * each.map for name, each in found.items()} for stage, found in metrics.items()}
    return Outcome(part, maps, hours)


@contextmanager
def accumulated_hours(path: Path, key: str) -> Iterator[None]:
    """Adds the hours of a block to an entry of a JSON file, even if the block is interrupted."""
    start = time.perf_counter()
    try:
        yield
    finally:
        hours = read_json(path) if path.exists() else {}
        write_json(path, {**hours, key: hours.get(key, 0) + (time.perf_counter() - start) / 3600})


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns the lines of a table in Markdown: published and reproduced mAP, differences, verdicts and hours."""
    columns = [title for name in PROTOCOLS for title in (name, "published", "difference")]
    rows = [["network", "dataset", "setting", "E", *columns, "verdict", "hours"]]
    for outcome in outcomes:
        depth, name, million = outcome.part
        for stage, maps in (outcome.maps or {"": {}}).items():
            differences = outcome.differences(stage) if stage else {}
            values = [f"{maps['E']:.2f}" if "E" in maps else ""]
            for key in PROTOCOLS:
                values.append(f"{maps[key]:.2f}" if key in maps else "")
                known = key in differences
                values += [f"{maps[key] - differences[key]:.1f}", f"{differences[key]:+.2f}"] if known else ["", ""]
            verdict = "differs" if differs(differences) else "reproduced" if differences else "nothing is published"
            end = ["failed, see below", ""] if outcome.problem else [verdict, f"{outcome.hours:.2f}"]
            setting = ", ".join(filter(None, [stage, "+1M" * million]))
            rows.append([f"ResNet-{depth}", name, setting, *values, *end])
    return markdown_table(rows)


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns why parts failed, a line for each reason."""
    parts: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.problem:
            parts.setdefault(outcome.problem, []).append(str(outcome.part))
    return [f"- {', '.join(names)}: {problem}" for problem, names in parts.items()]


def conditions(session: Session, findings: Sequence[Finding]) -> list[str]:
    """Returns date, device, versions, options and checkpoints of the results."""
    head = session.head
    versions = ", ".join(f"{key} {value}" for key, value in head["versions"].items())
    return [
        f"{head['date']}, {head['device']}; {versions}",
        f"`{head['command']}`",
        f"Hours are those of the computation, of all runs together; published: {published()['source']}.",
        *(f"- {finding.text}" for finding in findings if "SHA-256" in finding.text),
    ]


def explanation(outcomes: Sequence[Outcome], cfg: CfgNode, findings: Sequence[Finding]) -> list[str]:
    """Returns the likely causes of differences: facts first, then the mistakes whose patterns fit best."""
    results = [outcome for outcome in outcomes if outcome.pattern]
    different = [outcome for outcome in results if differs(outcome.pattern)]
    if not different:
        return [f"All {len(results)} parts with published results are reproduced."] if results else []
    lines = [f"{len(different)} of {len(results)} parts differ from the paper. Likely causes, the most likely first:"]
    usual, used = option_values(make_config()), option_values(cfg)
    options = {*NETWORK, *RERANKING, *INDEX} - {"TEST.WEIGHTS", "MODEL.DEPTH"}
    changed = [key for key in usual if key in options and used[key] != usual[key]]
    lines += [f"- {key} is {as_typed(used[key])}, in the paper {as_typed(usual[key])}" for key in changed]
    lines += [f"- {finding.text}" for finding in findings if finding.ok is False]
    for what in ("depth", "dataset"):
        affected, every = ({getattr(each.part, what) for each in group} for group in (different, results))
        if len(affected) == 1 < len(every):
            (value,) = affected
            lines.append(
                f"- only {value} differs: {'its checkpoint' if what == 'depth' else 'its images or ground truth'}"
            )
    wrong = {mistake for finding in findings if finding.ok is False for mistake in finding.mistakes}
    ticks = {mistake for finding in findings if finding.ok for mistake in finding.mistakes} - wrong
    ticks |= {name for name, mistake in MISTAKES.items() if mistake.option and mistake.option not in changed}
    named = {name for name, mistake in MISTAKES.items() if mistake.option in changed}
    fitting = [name for name in causes([(each.part.dataset, each.pattern) for each in results]) if name not in named]
    possible = sorted((name for name in fitting if name not in ticks), key=lambda name: name not in wrong)
    for name in possible[:NAMED_CAUSES]:
        lines.append(f"- {MISTAKES[name].words} (fits {'a check and ' * (name in wrong)}the signs of the differences)")
    if excluded := "; ".join(MISTAKES[name].words for name in fitting[:NAMED_CAUSES] if name in ticks):
        lines.append(f"- the signs would also fit, but options and tools.verify rule it out here: {excluded}")
    return lines


if __name__ == "__main__":
    run_command(main)
