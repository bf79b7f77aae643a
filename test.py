"""Evaluate SuperGlobal on ROxford5k and RParis6k (+1M distractors), or on the embedded benchmark toy.

python test.py TEST.DATASET_LIST "['toy']"
python test.py MODEL.DEPTH 50 TEST.WEIGHTS ./weights TEST.DATA_DIR ./revisitop SupG.rerank
"""

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from config import (
    describe_arguments,
    descriptor_source,
    make_reranker,
    option_values,
    parse_config,
)
from model.errors import InputError, run_command
from model.extract import choose_device, prepare_process
from model.images import ImageFile
from model.store import write_json
from modules.search import Database
from revisitop import toy
from revisitop.dataset import Dataset, load_distractor_list
from revisitop.evaluate import PROTOCOLS
from revisitop.features import (
    add_distractors,
    check_distractors,
    find_distractors,
    load_distractors,
    load_features,
)
from revisitop.report import Page, evaluated_section, write_report
from revisitop.run import (
    Ranking,
    dataset_lists,
    describe_lists,
    find_dataset,
    find_weights,
    make_folder,
    retrieve,
)
from revisitop.runlog import device_name, start_log

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    cfg = parse_config(argv, __doc__)
    out_dir = Path(cfg.TEST.OUT_DIR)
    make_folder(out_dir)
    report = {"date": datetime.now().isoformat(timespec="seconds"), **start_log(Path("log.txt"), cfg)}
    device = choose_device(cfg.TEST.DEVICE)
    prepare_process(device)
    report["device"] = device_name(device)
    log.info("device: %s", report["device"])

    # Everything that can be missing is looked for before the long work begins.
    datasets = [find_dataset(name, Path(cfg.TEST.DATA_DIR)) for name in cfg.TEST.DATASET_LIST]
    if not cfg.TEST.FEATURES:
        for dataset in datasets:
            dataset.check_files()
    checkpoints = {}
    if not cfg.TEST.FEATURES:
        checkpoints = {each.name: find_weights(each, Path(cfg.TEST.WEIGHTS), cfg.MODEL.DEPTH) for each in datasets}
    sources = {checkpoint: descriptor_source(cfg, checkpoint) for checkpoint in dict.fromkeys(checkpoints.values())}
    distractors, distractor_pictures = None, ()
    if cfg.SupG.onemeval:
        path = find_distractors(cfg.TEST.DISTRACTORS, cfg.MODEL.DEPTH)
        distractors = load_distractors(path)
        for source in sources.values():
            check_distractors(path, source)
        if cfg.TEST.FEATURES:
            log.warning("TEST.FEATURES: whether %s was made by the same network cannot be checked", path)
        distractor_pictures = find_distractor_pictures(Path(cfg.TEST.DATA_DIR), len(distractors))
    if cfg.TEST.RERANKER == "cvnet":
        check_cvnet(cfg, distractor_pictures)

    report["datasets"] = {}
    found = []
    for dataset in datasets:
        log.info("%r", dataset)
        entry = report["datasets"][dataset.name] = {"queries": len(dataset.queries), "database": len(dataset.database)}
        if cfg.TEST.FEATURES:
            queries, rows = load_features(Path(cfg.TEST.FEATURES), dataset)
            entry["features"] = cfg.TEST.FEATURES
        else:
            checkpoint = checkpoints[dataset.name]
            source = sources[checkpoint]
            entry["checkpoint"] = {"path": str(checkpoint), "sha256": source["checkpoint_sha256"]}
            log.info("checkpoint: %s, SHA-256 %s", *entry["checkpoint"].values())
            queries, rows = describe_lists(
                dataset_lists(dataset, out_dir), **describe_arguments(cfg, checkpoint, source, device)
            )
        database = Database(rows)
        if distractors is not None:
            database = add_distractors(rows, distractors)
            entry["distractors"] = len(distractors)

        for path in out_dir.glob(f"{dataset.name}_reranking*_ranks.npy"):  # an earlier run's
            path.unlink()
        checkpoint = checkpoints.get(dataset.name)
        reranker = make_reranker(
            cfg, dataset, distractor_pictures, checkpoint, sources.get(checkpoint), out_dir, device
        )
        stages = retrieve(queries, database, dataset.ground_truth, reranker, device)
        for name, ranking in stages.items():
            for line in ranking.in_words():
                log.info("%s results: %s", name.capitalize(), line)
            log.info("%s took %.2f s for %d queries", name, ranking.seconds, len(dataset.queries))
            entry[name] = ranking.as_dict()
            np.save(out_dir / f"{dataset.name}_{name.replace(' ', '_')}_ranks.npy", ranking.ids.numpy())
        if dataset.name == "toy":
            log.info("%s", toy.DISCLAIMER)
        write_json(out_dir / "results.json", report)
        found.append((dataset, stages))
    print_summary(report["datasets"])
    if cfg.TEST.REPORT:
        path = write_report(make_page(cfg, report, found, distractor_pictures), out_dir / "report")
        log.info("the report is %s (%.1f MB)", path, path.stat().st_size / 1e6)
    log.info("results, descriptors and rankings are in %s, the log in log.txt", out_dir)


def check_cvnet(cfg: CfgNode, distractor_pictures: Sequence[ImageFile]) -> None:
    """Raises InputError where local features cannot be had."""
    if cfg.TEST.FEATURES:
        raise InputError("TEST.RERANKER cvnet needs pictures and weights, which TEST.FEATURES has not")
    if cfg.SupG.onemeval and not len(distractor_pictures):
        raise InputError(
            "TEST.RERANKER cvnet needs the distractors' pictures in the order of their descriptors, as listed in "
            f"{cfg.TEST.DATA_DIR}/revisitop1m/revisitop1m.txt"
        )


def print_summary(datasets: dict[str, dict]) -> None:
    lines = [f"{'mAP in percent':<36}{'Easy':>8}{'Medium':>8}{'Hard':>8}"]
    for dataset, entry in datasets.items():
        for stage in (name for name in entry if name.startswith(("retrieval", "reranking"))):
            title = f"{dataset}{' + distractors' if 'distractors' in entry else ''}, {stage}"
            lines.append(f"{title:<36}" + "".join(f"{entry[stage][protocol]['mAP']:8.2f}" for protocol in PROTOCOLS))
    for line in lines:
        log.info("%s", line)


def make_page(
    cfg: CfgNode, report: dict, found: list[tuple[Dataset, dict[str, Ranking]]], distractors: Sequence[ImageFile]
) -> Page:
    """The run as a page: when and how it was made, every option, and a section per dataset."""
    settings = {name: report[name] for name in ("date", "command", "device")}
    settings["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sections = []
    for dataset, stages in found:
        entry = report["datasets"][dataset.name]
        note = f"{entry['queries']} queries, {entry['database']:,} database pictures"
        if "distractors" in entry:
            note += f", {entry['distractors']:,} distractors"
        if "checkpoint" in entry:
            settings[f"checkpoint of {dataset.name}"] = "{path}, SHA-256 {sha256}".format(**entry["checkpoint"])
        if dataset.name == "toy":
            note += f". {toy.DISCLAIMER.capitalize()}"
        sections.append(evaluated_section(dataset, stages, distractors, f"{note}."))
    settings |= {key: str(value) for key, value in option_values(cfg).items()}
    return Page(f"SuperGlobal on {', '.join(cfg.TEST.DATASET_LIST)}", settings, sections)


def find_distractor_pictures(data_dir: Path, count: int) -> Sequence[ImageFile]:
    """The pictures behind the distractors' rows; none where their list is not here, or is of another length."""
    try:
        pictures = load_distractor_list(data_dir / "revisitop1m")[1]
    except InputError:
        return ()
    return pictures if len(pictures) == count else ()


if __name__ == "__main__":
    run_command(main)
