import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from assembly import STAGES, Subject, make_recipe, make_stages
from config import OPTIONS, RERANKER_NAMES, make_config, pair_options, parse_config
from model.errors import InputError
from model.recipe import Recipe
from modules.diffusion import DiffusionReranker
from modules.expansion import QueryExpansion
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from revisitop.stages import Augmented


def test_the_documented_commands_parse():
    line = "MODEL.DEPTH 50 TEST.WEIGHTS ./weights TEST.DATA_DIR ./revisitop SupG.gemp SupG.rgem SupG.sgem SupG.relup"
    cfg = parse_config([*line.split(), "SupG.rerank", "SupG.onemeval", "False"], "")
    assert (cfg.SupG.rerank, cfg.SupG.onemeval) == (True, False)
    cfg = parse_config([*line.split(), "SupG.rerank", "SupG.onemeval"], "")
    assert cfg.SupG.onemeval is True


def test_a_boolean_option_without_a_value_is_true():
    words = ["SupG.gemp", "false", "SupG.rgem", "SupG.sgem", "0", "SupG.rerank"]
    assert pair_options(words) == [
        ("SupG.gemp", "false"),
        ("SupG.rgem", True),
        ("SupG.sgem", "0"),
        ("SupG.rerank", True),
    ]


def test_values_get_the_type_of_their_default():
    cfg = make_config([("SupG.sgem_p", "10"), ("TEST.DATASET_LIST", "['toy']"), ("SupG.rerank_beta", 1)])
    assert (cfg.SupG.sgem_p, cfg.TEST.DATASET_LIST, cfg.SupG.rerank_beta) == (10.0, ["toy"], 1.0)
    assert (
        make_config([("SupG.sgem_p", "inf"), ("TEST.DATASET_LIST", "toy,rparis6k")]).TEST.DATASET_LIST[1] == "rparis6k"
    )


@pytest.mark.parametrize(
    ("given", "scales"),
    [
        ("5", (0.5, 0.7071, 1.0, 1.4142, 2.0)),
        ("(0.5, 1, 2.5)", (0.5, 1.0, 2.5)),
        ("[1.2]", (1.2,)),
        ([0.5, 1], (0.5, 1.0)),
    ],
)
def test_scales_are_a_number_or_factors(given, scales):
    assert make_recipe(make_config([("TEST.SCALE_LIST", given)]), Path("x")).scales == scales


def test_a_yaml_file_is_merged_before_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("MODEL: {DEPTH: 101}\nSupG: {gemp: false, rerank_k: 5}\n")
    cfg = parse_config(["--config-file", str(path), "SupG.rerank_k", "7"], "")
    assert (cfg.MODEL.DEPTH, cfg.SupG.gemp, cfg.SupG.rerank_k) == (101, False, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SupG.gem"], "unknown option SupG.gem; did you mean SupG.gemp?"),
        (["SupG.gemp", "SupG.gem"], "did you mean SupG.gemp?"),
        (["test.weights", "x"], "did you mean TEST.WEIGHTS?"),
        (["MODEL.DEPTH", "52"], "52 is not one of 50, 101"),
        (["MODEL.DEPTH", "deep"], "'deep' has an invalid type"),
        (["MODEL.DEPTH"], "MODEL.DEPTH needs a value"),
        (["TEST.SCALE_LIST", "4"], "4 is not one of 1, 3, 5"),
        (["TEST.SCALE_LIST", "(0.5, 0)"], "is not a list of 1 to 20 factors"),
        (["TEST.SCALE_LIST", "(1, 1)"], "has 1 twice"),
        (["TEST.SCALE_LIST", "large"], "'large' has an invalid type"),
        (["TEST.DEVICE", "cuda:01"], "is not one of auto, cpu, cuda, cuda:N"),
        (["TEST.DEVICE", "cuda:٣"], "is not one of auto, cpu, cuda, cuda:N"),
        (["SupG.rgem_window", "1" + 20 * "0" + "1"], "is not odd and between 1 and 999"),
        (["SupG.rerank_beta", "1e300"], "is not between 0 and 1e+06"),
        (["MODEL.HEADS.REDUCTION_DIM", "99999999999"], "is not between 1 and"),
        (["TEST.OUT_DIR", "a\0b"], "contains a zero byte"),
        (["SupG.gemp", "maybe"], "'maybe' has an invalid type"),
        (["SupG.gemp_p", "nan"], "is not above 0"),
        (["SupG.rerank_k", "30", "SupG.rerank_m", "20"], "SupG.rerank_k 30 is above SupG.rerank_m 20"),
        (["TEST.DATASET_LIST", "['../oxford']"], "'../oxford', which is not the name of a folder"),
        (["TEST.DATASET_LIST", "[]"], "is empty"),
        (["SupG.rerank_k", "TEST.SCALE_LIST", "1"], "SupG.rerank_k needs a value"),
        (["toy"], "unknown option toy; --help lists all"),
        (["TEST.OUT_DIR", ""], "is empty"),
        (["TEST.DEVICE", "gpu"], "is not one of auto, cpu"),
        (["--weights", "x"], "unrecognized arguments: --weights"),
    ],
)
def test_bad_options_are_rejected(words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_config(words, "")


@pytest.mark.parametrize("value", ["2024", "5", "[1]", "True", "'x'", "None", "1e3"])
def test_options_of_type_text_stay_text(value):
    assert value == make_config([("TEST.OUT_DIR", value)]).TEST.OUT_DIR


def test_a_config_file_is_never_run_and_never_grows(tmp_path):
    evil = tmp_path / "evil.py"
    evil.write_text("open('ran', 'w')\ncfg = {}\n")
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(
        "a: &a [x, x]\n"
        + "".join(f"b{i}: &b{i} [{', '.join(9 * ['*a' if i == 0 else f'*b{i - 1}'])}]\n" for i in range(30))
    )
    for path in (evil, bomb):
        with pytest.raises(InputError, match=rf"{path.name} contains no YAML options"):
            parse_config(["--config-file", str(path)], "")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["- a\n- b\n", "MODEL: [", "word"])
def test_a_config_file_without_options_is_rejected(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"run.yaml"):
        parse_config(["--config-file", str(path)], "")


def test_modules_that_are_off_are_left_out_of_the_model():
    recipe = make_recipe(make_config([("SupG.gemp", False), ("SupG.relup", False)]), Path("x.pyth"))
    assert (recipe.gemp, recipe.relup, recipe.rgem) == (None, None, 2.5)


def test_the_default_options_are_the_defaults_of_the_library():
    assert make_recipe(make_config([]), Path("x.pyth")) == Recipe(Path("x.pyth"))
    assert tuple(STAGES) == RERANKER_NAMES
    defaults = {
        "superglobal": SuperGlobalReranker(), "alpha-qe": QueryExpansion(), "aqe": QueryExpansion(alpha=0),
        "k-reciprocal": KReciprocalReranker(), "diffusion": DiffusionReranker(),
    }  # fmt: skip
    subject = Subject(None, (), (), 0, None, None)
    for name, module in defaults.items():
        (stage,) = make_stages(make_config([("TEST.RERANKER", name)]), subject, torch.device("cpu")).values()
        assert repr(getattr(stage, "reranker", None) or stage.expansion) == repr(module)
    (stage,) = make_stages(make_config([("TEST.RERANKER", "dba")]), subject, torch.device("cpu")).values()
    assert stage == Augmented()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("colbert", "which is not one of superglobal"),
        ("superglobal,none", "has none together with others"),
        ("[]", "for no reranker use none"),
        ("aqe,aqe", "has one twice"),
    ],
)
def test_rerankers_are_a_list_of_known_names(value, problem):
    with pytest.raises(InputError, match=problem):
        make_config([("TEST.RERANKER", value)])


def test_an_option_of_a_reranker_needs_it():
    assert parse_config(["TEST.RERANKER", "aqe,diffusion", "RERANK.DIFFUSION_K", "30"], "").RERANK.DIFFUSION_K == 30
    with pytest.raises(InputError, match=r"RERANK\.QE_N 5 has no effect without TEST.RERANKER aqe or alpha-qe"):
        parse_config(["TEST.RERANKER", "diffusion", "RERANK.QE_N", "5"], "")


def test_the_documentation_has_every_option():
    table = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["options_table"]()
    assert [option.key for option in OPTIONS if f"| `{option.key}` |" not in table] == []
    assert "OPTIONS_TABLE" in (ROOT / "docs" / "options.md").read_text()
