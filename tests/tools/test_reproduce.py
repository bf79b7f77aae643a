"""tools.reproduce against a local server, from nothing to the table."""

import re

import pytest
from conftest import Layout, latest
from served import CMP, FEATURES, NETWORKS, PARIS_IMAGES, PTAK, VGG, Answer, publish, serving

from config import make_config
from revisitop.published import published
from tools import transfer
from tools.causes import MISTAKES, causes, signatures
from tools.check import Finding
from tools.reproduce import Outcome, Part, explanation

RIGHT = {stage: {"E": 95.0, "M": m, "H": h} for stage, m, h in (("retrieval", 83.9, 67.7), ("reranking", 88.8, 77.1))}


@pytest.fixture
def site(monkeypatch, tmp_path, checkpoint_50, checkpoint_101):
    """A server with tiny images under the names and in the layouts of the originals, and random weights."""
    monkeypatch.setattr(transfer, "CHUNK", 1 << 20)
    for site in serving(monkeypatch):
        for name in ("roxford5k", "rparis6k"):
            publish(site, Layout(tmp_path / "origin", name))
        for path, checkpoint in zip(NETWORKS, (checkpoint_50, checkpoint_101), strict=True):
            site[path] = Answer(checkpoint.read_bytes())
        yield site


def rows(text: str) -> dict[tuple[str, ...], list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {tuple(line[:3]): line[3:] for line in lines[2:]}


@pytest.mark.slow  # two runs of the whole way, with verify
def test_one_command_goes_from_nothing_to_the_table_and_resumes_after_a_failure(site, command, tmp_path):
    cut = site[PARIS_IMAGES[1]]
    cut.cuts = [1000] + [0] * 50
    words = ("--yes", "DATA_LOADER.NUM_WORKERS", 0, "TEST.SCALE_LIST", 1)
    outcome = command("tools/reproduce.py", "--depth", 50, *words)
    assert outcome.code == 2
    first = rows(outcome.out)
    assert "failed" in first.pop(("ResNet-50", "rparis6k", ""))[-2]
    assert first.keys() == {("ResNet-50", "roxford5k", stage) for stage in ("retrieval", "reranking")}

    cut.cuts = []
    site.requests.clear()
    outcome = command("tools/reproduce.py", *words)
    assert outcome.code == 0, outcome.err
    features = {f"{host}{path}" for host in (CMP, PTAK) for path in FEATURES}  # which the server does not have
    assert {*site.asked()} == {f"{VGG}{PARIS_IMAGES[1]}", *features}
    assert outcome.err.count("reused, extracted from the same images") == 2
    final = rows(outcome.out)
    assert len(final) == 8
    assert {key: final[key][:7] for key in first} == {key: cells[:7] for key, cells in first.items()}
    assert all(cells[-2] == "differs" for cells in final.values())
    assert "TEST.SCALE_LIST is 1.0, in the paper 0.7071,1.0,1.4142" in outcome.out
    assert (latest(tmp_path / "work" / "output") / "reproduce.md").read_text().strip() in outcome.out


# ---- the causes ----


@pytest.mark.parametrize("known", ["EMH", "MH"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_named_first_or_second(mistake, known):
    """For the metrics that the paper has, too; figures are rounded to one decimal."""
    for name, patterns in signatures().items():
        if mistake in patterns:
            pattern = {key: round(value, 1) for key, value in patterns[mistake].items() if key[-1] in known}
            assert mistake in causes([(name, pattern)])[:2], name


def outcome(part: Part, *changes: tuple[str, str, float]) -> Outcome:
    maps = {stage: dict(values) for stage, values in figures(part).items()}
    for stage, protocol, change in changes:
        maps[stage][protocol] += change
    return Outcome(part, maps)


def figures(part: Part) -> dict[str, dict[str, float]]:
    return {
        each["stage"]: each[part.dataset]
        for each in published()["figures"]
        if each["depth"] == part.depth and not each["distractors"]
    }


PARTS = [Part(depth, name, False) for depth in (50, 101) for name in ("roxford5k", "rparis6k")]
LOWER = (("retrieval", "M", -1.0), ("retrieval", "H", -2.0), ("reranking", "M", -1.0), ("reranking", "H", -2.0))


def words(outcomes, findings=(), **options) -> list[str]:
    cfg = make_config([(key.replace("_", ".", 1), value) for key, value in options.items()])
    return list(explanation(outcomes, cfg, findings))


def test_equal_results_are_reproduced():
    assert words([outcome(part, ("retrieval", "M", 0.1)) for part in PARTS]) == [
        "All 4 parts with published results are reproduced."
    ]


def test_a_setting_that_differs_from_the_papers_is_the_first_cause():
    lines = words([outcome(part, *LOWER) for part in PARTS], SupG_relup=False)
    assert "SupG.relup" in lines[1]


@pytest.mark.parametrize(("which", "value"), [("depth", 101), ("dataset", "rparis6k")])
def test_a_difference_in_one_network_or_dataset_points_there(which, value):
    lines = words([outcome(part, *(LOWER if getattr(part, which) == value else ())) for part in PARTS])
    assert re.search(rf"only {value} differs", lines[1])


def test_what_verify_rules_out_is_not_named_as_possible():
    wrong = [outcome(part, *LOWER) for part in PARTS]
    findings = [Finding(True, "", tuple(MISTAKES)), Finding(False, "ground truth of somebody", ("junk",))]
    lines = words(wrong, findings)
    assert "ground truth of somebody" in lines[1]
    fitting = [line for line in lines if "fits" in line]
    assert len(fitting) == 1
    assert MISTAKES["junk"].words in fitting[0]
