"""Evaluate SuperGlobal on ROxford and RParis (+1M distractors), or on the embedded benchmark toy.

python test.py TEST.DATASET_LIST "['toy']"
python test.py MODEL.DEPTH 50 TEST.WEIGHTS ./weights TEST.DATA_DIR ./revisitop SupG.rerank
torchrun --nproc-per-node=8 test.py TEST.DATASET_LIST "['gldv2']"
"""

from report.command import run_command  # isort: skip  # first, see there

import logging

from config import CommandLine, used_options

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    cfg = CommandLine(__doc__).parse(argv).cfg

    # Imported here, so that --help and errors about options appear at once.
    from assembly import prepare_all, small_set_advice, start_session
    from report.page import evaluated_page, explain_largest, write_report
    from report.results import Evaluated, save_results, summary

    session = start_session(cfg)
    experiments = prepare_all(session)  # everything is checked before the long computations begin

    results: list[Evaluated] = []
    run = None
    for experiment in experiments:
        dataset, stages = experiment.dataset, experiment.stages
        log.info("%r", dataset)

        # Extract, search, rerank, evaluate. The processes of a torchrun share the first two; the first does the rest.
        searched = experiment.search(session.processes)
        if not session.first:
            continue
        if stages and (advice := small_set_advice(cfg, dataset)):
            log.warning("%s", advice)
        rankings = {"retrieval": searched.ranking, **{title: stage(searched) for title, stage in stages.items()}}
        metrics = {stage: experiment.evaluate(ranking) for stage, ranking in rankings.items()}

        explanations = explain_largest(rankings, metrics, stages, searched) if cfg.TEST.REPORT else {}
        distractors = experiment.distractors.images if experiment.distractors else ()
        matches = experiment.matches(searched.ranking, explanations)
        results.append(Evaluated(dataset, rankings, metrics, experiment.facts(), explanations, matches, distractors))
        for line in results[-1].lines():
            log.info("%s", line)
        if results[-1].facts.get("whitening", {}).get("learnt_on_the_test_set"):
            log.warning(
                "the whitening was learnt on the database of %s itself: state this with its metrics", dataset.name
            )
        if "note" in results[-1].facts:
            log.info("%s", results[-1].facts["note"])
        run = run or session.output.new_run(session.run_title)
        save_results(run, session.head, results)
        session.output.publish(run)
        experiment.export(run, rankings, searched)

    session.processes.end()
    if not session.first:
        return
    for line in summary(results):
        log.info("%s", line)
    if cfg.TEST.REPORT:
        path = write_report(evaluated_page(session.head, results, used_options(cfg)), run / "report")
        log.info("the report is %s (%.1f MB)", path, path.stat().st_size / 1e6)
    log.info("results and rankings are in %s, the log in log.txt", run)


if __name__ == "__main__":
    run_command(main)
