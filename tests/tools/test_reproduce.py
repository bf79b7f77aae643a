"""tools.reproduce against a local server, from nothing to the table."""

import re
from itertools import cycle

import pytest
from conftest import ROOT, Layout, latest
from PIL import ImageOps
from served import (
    CMP,
    FEATURES,
    MILLION_IMAGES,
    MILLION_LIST,
    NETWORKS,
    PARIS_IMAGES,
    PTAK,
    VGG,
    Answer,
    publish,
    serving,
    tgz,
)

import tools.causes as causes_module
from config import make_config
from model.backbone import Backbone
from modules import descriptor
from revisitop.layouts import load_dataset
from revisitop.published import published
from tools import transfer, verify
from tools.causes import MISTAKES, causes, signatures
from tools.check import Finding, check_dataset
from tools.reproduce import Outcome, Part, explanation
from tools.verify import check_descriptors, check_environment, check_protocol

RIGHT = {stage: {"E": 95.0, "M": m, "H": h} for stage, m, h in (("retrieval", 83.9, 67.7), ("reranking", 88.8, 77.1))}


@pytest.fixture
def site(monkeypatch, tmp_path, checkpoint_50):
    """A server with tiny images under the names and in the layouts of the originals, and random weights.

    Each of the 100 archives of distractors has one image.
    """
    monkeypatch.setattr(transfer, "CHUNK", 1 << 20)
    for site in serving(monkeypatch):
        for name in ("roxford5k", "rparis6k"):
            publish(site, layout := Layout(tmp_path / "origin", name))
        names = [f"{number}/{number}.jpg" for number in range(len(MILLION_IMAGES))]
        site[MILLION_LIST] = Answer("\n".join(names).encode())
        for path, name, number in zip(MILLION_IMAGES, names, cycle(range(24)), strict=False):
            site[path] = Answer(tgz({name: layout.image(f"db_{number}").read_bytes()}))
        site[NETWORKS[0]] = Answer(checkpoint_50.read_bytes())
        yield site


def rows(text: str) -> dict[tuple[str, ...], list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {tuple(line[:3]): line[3:] for line in lines[2:]}


@pytest.mark.slow  # two runs of the whole way, with verify; the second one among distractors, too
def test_one_command_goes_from_nothing_to_the_table_and_resumes_after_a_failure(site, command, tmp_path):
    cut = site[PARIS_IMAGES[1]]
    cut.cuts = [1000] + [0] * 50
    words = ("--yes", "--depth", 50, "DATA_LOADER.NUM_WORKERS", 0, "TEST.SCALE_LIST", 1)
    outcome = command("tools/reproduce.py", *words)
    assert outcome.code == 2
    first = rows(outcome.out)
    assert "failed" in first.pop(("ResNet-50", "rparis6k", ""))[-2]
    assert "ResNet-50 on rparis6k: " in outcome.out
    assert first.keys() == {("ResNet-50", "roxford5k", stage) for stage in ("retrieval", "reranking")}

    cut.cuts = []
    site.requests.clear()
    outcome = command("tools/reproduce.py", "--million", *words)
    assert outcome.code == 1, outcome.err  # random weights differ from the paper's
    features = {f"{host}{path}" for host in (CMP, PTAK) for path in FEATURES}  # which the server does not have
    distractors = {f"{PTAK}{path}" for path in (MILLION_LIST, *MILLION_IMAGES)}
    assert {*site.asked()} == {f"{VGG}{PARIS_IMAGES[1]}", *features, *distractors}
    final = rows(outcome.out)
    assert len(final) == 8
    assert "100 images are listed, 1,001,001 are published" in outcome.out
    for (network, name, setting), cells in final.items():
        if setting.endswith("+1M"):
            assert float(cells[1]) < float(final[network, name, setting.removesuffix(", +1M")][1])
    assert {key: final[key][:7] for key in first} == {key: cells[:7] for key, cells in first.items()}
    assert all(cells[-2] == "differs" for cells in final.values())
    assert "TEST.SCALE_LIST is 1.0, in the paper 0.7071,1.0,1.4142" in outcome.out
    assert (latest(tmp_path / "work" / "output") / "reproduce.md").read_text().strip() in outcome.out


# ---- the causes ----


@pytest.mark.parametrize("known", ["EMH", "MH"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_measured_pattern_of_a_mistake_leads_to_it(mistake, known):
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


# ---- mistakes that are made on purpose ----


TOY_FACTS = {"queries": 12, "images": 144, "longer_side": 200, "features": None}


@pytest.fixture(scope="module")
def machine() -> list[Finding]:
    """What tools.verify finds about this machine, but for half precision."""
    cfg = make_config([("TEST.DEVICE", "cpu")])
    return [next(check_descriptors(cfg)), *check_protocol(cfg), *check_environment(cfg)]


@pytest.fixture
def benchmark(monkeypatch):
    """The module that makes the mistakes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import signatures as benchmark

    return benchmark


def verdict(monkeypatch, mistake: str, findings, **options) -> list[str]:
    """Returns the causes of the changes that the mistake was measured to make on toy.

    They are named without the patterns of toy, by those of the photographs alone.
    """
    measured = signatures()
    changes = next((measured[name][mistake] for name in measured if mistake in measured[name]), {"retrieval M": -1.0})
    right = {"depth": 50, "distractors": False}
    figures = [{**right, "stage": stage, "toy": dict.fromkeys("MH", 50.0)} for stage in RIGHT]
    monkeypatch.setitem(published(), "figures", figures)
    monkeypatch.setattr(causes_module, "signatures", lambda: {"photographs_0": measured["photographs_0"]})
    maps = {stage: {key: 50.0 + changes.get(f"{stage} {key}", 0.0) for key in "EMH"} for stage in RIGHT}
    cfg = make_config([(key.replace("_", ".", 1), value) for key, value in options.items()])
    return list(explanation([Outcome(Part(50, "toy", False), maps)], cfg, findings))[1:3]


@pytest.mark.slow  # verifies the machine
@pytest.mark.parametrize(
    ("mistake", "options"),
    [
        ("one scale", {"TEST_SCALE_LIST": 1}),
        ("plain ReLU", {"SupG_relup": False}),
        ("S2", {"SupG_rerank_s2": "original"}),
        ("half", {"TEST_PRECISION": "bf16"}),
    ],
)
def test_a_mistake_in_the_settings_is_named_first(monkeypatch, machine, mistake, options):
    first, _ = verdict(monkeypatch, mistake, machine, **options)
    assert MISTAKES[mistake].option in first


@pytest.mark.slow  # toy, and verifies the machine
@pytest.mark.parametrize(
    ("mistake", "words"),
    [("no crop", "no query is cropped"), ("EXIF", MISTAKES["EXIF"].words), ("resized", "longer side"),
     ("junk", "no query lists junk")],
)  # fmt: skip
def test_a_mistake_in_the_data_is_named_first_or_second(
    monkeypatch, machine, benchmark, toy_data, tmp_path, mistake, words
):
    monkeypatch.setitem(published()["datasets"], "toy", TOY_FACTS)
    toy = load_dataset("toy", toy_data)
    toy = benchmark.with_images(toy, tmp_path / "toy", lambda image: ImageOps.pad(image, (200, 200)))  # of equal sizes
    assert all(finding.ok for finding in check_dataset(toy))
    findings = [*machine, *check_dataset(benchmark.MISTAKES[mistake].data(toy, tmp_path / mistake))]
    assert any(words in line for line in verdict(monkeypatch, mistake, findings))


@pytest.mark.slow  # verifies the machine
@pytest.mark.parametrize(("mistake", "words"), [("antialias", "resized"), ("RGB", MISTAKES["RGB"].words)])
def test_a_mistake_in_the_code_is_named_first_or_second(monkeypatch, benchmark, mistake, words):
    cfg, normalise = make_config([("TEST.DEVICE", "cpu")]), Backbone.normalise
    with monkeypatch.context() as patch:
        if mistake == "antialias":
            patch.setattr(descriptor, "rescale", benchmark.antialiased)
            patch.setattr(verify, "rescale", benchmark.antialiased)
        else:
            patch.setattr(Backbone, "normalise", lambda backbone, pixels: normalise(backbone, pixels.flip(-1)))
        findings = [next(check_descriptors(cfg)), *check_protocol(cfg), *check_environment(cfg)]
    data = [Finding(True, "", ("no crop", "resized", "junk"))]
    assert any(words in line for line in verdict(monkeypatch, mistake, [*findings, *data]))


def test_a_misspelt_dataset_is_reported_before_anything_is_downloaded(site, command, tmp_path):
    (tmp_path / "work" / "revisitop").mkdir(parents=True)
    outcome = command("tools/reproduce.py", "--yes", "TEST.DATASET_LIST", "roxford")
    assert outcome.code == 2
    assert "roxford5k" in outcome.err
    assert site.requests == []
