from pathlib import Path

import pytest

from assembly import make_recipe, make_stages
from config import SCALE_SETS, CommandLine, make_config
from model.errors import InputError
from model.recipe import Recipe
from modules import descriptor
from modules.diffusion import DiffusionReranker
from modules.expansion import QueryExpansion
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from revisitop.stages import Augmented


def parse(*words):
    return CommandLine("").parse([str(word) for word in words]).cfg


@pytest.fixture
def yaml_file(tmp_path):
    def write(content: str) -> tuple[str, Path]:
        (tmp_path / "run.yaml").write_text(content)
        return "--config-file", tmp_path / "run.yaml"

    return write


def test_the_documented_commands_parse():
    line = "MODEL.DEPTH 50 TEST.WEIGHTS ./weights TEST.DATA_DIR ./revisitop SupG.gemp SupG.rgem SupG.sgem SupG.relup"
    cfg = parse(*line.split(), "SupG.rerank", "SupG.onemeval", "False")
    assert (cfg.SupG.rerank, cfg.SupG.onemeval) == (True, False)
    assert parse(*line.split(), "SupG.rerank", "SupG.onemeval").SupG.onemeval is True


def test_a_boolean_option_without_a_value_is_true():
    method = parse("SupG.gemp", "false", "SupG.rgem", "SupG.sgem", "0", "SupG.onemeval").SupG
    assert (method.gemp, method.rgem, method.sgem, method.onemeval) == (False, True, False, True)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SupG.sgem_p", "10", 10.0),
        ("SupG.sgem_p", "inf", float("inf")),
        ("SupG.rerank_beta", 1, 1.0),
        ("TEST.DATASET_LIST", "['toy']", ["toy"]),
        ("TEST.DATASET_LIST", "toy,rparis6k", ["toy", "rparis6k"]),
        ("TEST.TOPK_LIST", "[5, 400]", [5, 400]),
        ("TEST.TOPK_LIST", "7", [7]),
        ("SupG.relup_ends", "[]", []),
        ("TEST.RERANKER", "aqe,cvnet", ["aqe", "cvnet"]),
        ("TEST.SCALE_LIST", 1, [1.0]),
        ("TEST.SCALE_LIST", "5", [0.5, 0.7071, 1.0, 1.4142, 2.0]),
        ("TEST.SCALE_LIST", "(0.5, 1, 2.5)", [0.5, 1.0, 2.5]),
        ("TEST.SCALE_LIST", "[1.2]", [1.2]),
        ("TEST.SCALE_LIST", [0.5, 1], [0.5, 1.0]),
        *(("TEST.OUT_DIR", text, text) for text in ("2024", "5", "[1]", "True", "'x'", "None", "1e3")),
    ],
)
def test_every_value_has_the_form_that_the_parser_gives_it(key, text, value):
    section, leaf = key.split(".")
    parsed = make_config([(key, text)])[section][leaf]
    assert parsed == value
    assert type(parsed) is type(value)
    assert make_config([(key, parsed)])[section][leaf] == value


@pytest.mark.parametrize(
    ("words", "noun"),
    [
        (["SupG.gem"], "SupG.gemp"),
        (["TEST.DATASET_LIST=toy"], "space"),
        (["MODEL.DEPTH", "52"], "MODEL.DEPTH"),
        (["SupG.rerank_k", "TEST.SCALE_LIST", "1"], "SupG.rerank_k"),
        (["TEST.SCALE_LIST", "4"], "TEST.SCALE_LIST"),
        (["TEST.SCALE_LIST", "(1, 1)"], "different"),
        (["TEST.DEVICE", "cuda:٣"], "cuda:N"),
        (["MODEL.HEADS.REDUCTION_DIM", "9" * 6000], "MODEL.HEADS.REDUCTION_DIM"),
        (["TEST.OUT_DIR", "a\0b"], "TEST.OUT_DIR"),
        (["SupG.gemp", "maybe"], "True or False"),
        (["SupG.gemp_p", "nan"], "SupG.gemp_p"),
        (["SupG.rerank_k", "30", "SupG.rerank_m", "20"], "SupG.rerank_m"),
        (["TEST.DATASET_LIST", "['../oxford']"], "folders"),
        (["TEST.RERANKER", "superglobal,none"], "none"),
        (["TEST.RERANKER", "aqe,aqe"], "twice"),
        (["--weights", "x"], "--weights"),
    ],
)
def test_bad_options_are_refused_in_one_short_line(words, noun):
    with pytest.raises(InputError, match=noun) as error:
        parse(*words)
    assert len(str(error.value)) < 250
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("words", "condition"),
    [
        (["SupG.gemp", "False", "SupG.gemp_p", "3"], "SupG.gemp"),
        (["SupG.relup_ends", "layer2"], "MODEL.NAME cvnet"),
        (["MODEL.NAME", "timm:resnet50", "MODEL.DEPTH", "101"], "MODEL.NAME cvnet"),
        (["TEST.FEATURES", "x.mat", "MODEL.DEPTH", "101"], "TEST.FEATURES"),
        (["TEST.DISTRACTORS", "x.npy"], "SupG.onemeval"),
        (["TEST.INDEX_ROWS", "decoded"], "TEST.INDEX"),
        (["TEST.RERANKER", "diffusion", "RERANK.QE_N", "5"], "aqe or alpha-qe"),
        (["TEST.RERANKER", "none", "SupG.rerank_m", "30"], "reranker"),
        (["SupG.rerank", "False", "SupG.rerank_k", "5"], "SupG.rerank"),
    ],
)
def test_an_option_that_has_no_effect_is_refused(words, condition, yaml_file):
    with pytest.raises(InputError, match=f"no effect with(out)? .*{condition}"):
        parse(*words)
    key, value = words[-2:]
    with pytest.raises(InputError, match="no effect"):
        parse(*yaml_file(f"{key}: {value}"), *words[:-2])


def test_an_option_that_has_an_effect_or_its_default_is_accepted():
    assert parse("TEST.RERANKER", "aqe,diffusion", "RERANK.DIFFUSION_K", "30").RERANK.DIFFUSION_K == 30
    assert parse("SupG.gemp", "False", "SupG.gemp_p", "4.6").SupG.gemp is False
    assert parse("TEST.FEATURES", "x.mat", "SupG.onemeval", "MODEL.DEPTH", "101").MODEL.DEPTH == 101  # of distractors


# ---- YAML files ----


def test_a_yaml_file_is_merged_before_the_command_line(yaml_file):
    words = yaml_file("MODEL: {DEPTH: 101}\nSupG: {gemp: no, rerank_k: 5}\nTEST: {DATASET_LIST: [no, on], OUT_DIR: 7}")
    cfg = parse(*words, "SupG.rerank_k", "7")
    assert (cfg.MODEL.DEPTH, cfg.SupG.gemp, cfg.SupG.rerank_k) == (101, False, 7)
    assert (cfg.TEST.DATASET_LIST, cfg.TEST.OUT_DIR) == (["no", "on"], "7")


@pytest.mark.parametrize(
    "content",
    [
        "MODEL: [",
        "",
        "TEST: {BATCH_SIZE: 3}\nTEST: {MAX_SIDE: 5}\n",
        "TEST: {DATASET_LIST: [toy, null]}",
        f"TEST: {{BATCH_SIZE: {'9' * 6000}}}",
        "[" * 1500,
        "a: &a [x, x]\n"
        + "".join(f"b{i}: &b{i} [{'*a, ' * 9 if i == 0 else f'*b{i - 1}, ' * 9}]\n" for i in range(30)),
        "open('ran', 'w')\ncfg = {}\n",
    ],
    ids=range(8),
)
def test_a_file_that_is_not_a_list_of_options_is_refused_in_one_line(yaml_file, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        parse(*yaml_file(content))
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()
    assert not (tmp_path / "ran").exists()


def test_two_config_files_are_refused(yaml_file):
    with pytest.raises(InputError, match="--config-file"):
        parse(*yaml_file("TEST: {BATCH_SIZE: 3}"), *yaml_file("TEST: {BATCH_SIZE: 3}"))


# ---- the same defaults, and the same sets, everywhere ----


def test_modules_that_are_off_are_left_out_of_the_model():
    recipe = make_recipe(make_config([("SupG.gemp", False), ("SupG.relup", False)]), Path("x.pyth"))
    assert (recipe.gemp_p, recipe.relup_threshold, recipe.rgem_p) == (None, None, 2.5)


@pytest.mark.parametrize(("name", "noun"), [("superglobl", "did you mean superglobal"), ("colbert", "diffusion")])
def test_an_unknown_reranker_is_named_with_the_nearest_or_all(name, noun):
    with pytest.raises(InputError, match=noun):
        make_stages(make_config([("TEST.RERANKER", name)]))


def test_the_default_options_are_the_defaults_of_the_library():
    assert {number: tuple(scales) for number, scales in SCALE_SETS.items()} == descriptor.SCALE_SETS
    assert make_recipe(make_config(), Path("x.pyth")) == Recipe(weights=Path("x.pyth"))
    defaults = {
        "superglobal": SuperGlobalReranker(), "alpha-qe": QueryExpansion(), "aqe": QueryExpansion(alpha=0),
        "k-reciprocal": KReciprocalReranker(), "diffusion": DiffusionReranker(),
    }  # fmt: skip
    for name, module in defaults.items():
        (stage,) = make_stages(make_config([("TEST.RERANKER", name)])).values()
        assert repr(stage.reranker) == repr(module)
    (stage,) = make_stages(make_config([("TEST.RERANKER", "dba")])).values()
    assert stage == Augmented()
