import multiprocessing

import pytest
import torch

from model.device import choose_device, forbid_tf32, prepare_process
from modules.search import search


def nothing() -> None:
    pass


def legacy_flags() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def legacy_precision() -> None:
    torch.set_float32_matmul_precision("high")


def everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def products() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def convolutions() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def products_on_cpus() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def both() -> None:
    legacy_precision()
    products()


CHOICES = [nothing, legacy_flags, legacy_precision]
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # PyTorch 2.9 and later
    CHOICES += [everywhere, products, convolutions, products_on_cpus, both]


def in_a_process(work, *arguments) -> None:
    """Runs in a process of its own, because not all of these settings can be undone."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(work, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0


def _alone(work, *arguments) -> None:
    torch.set_num_threads(1)  # a fork has only one thread
    work(*arguments)


def _forbidden(choice) -> None:
    choice()
    forbid_tf32()
    assert torch.get_float32_matmul_precision() == "highest"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
    else:
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    forbid_tf32()


def _searched(choice) -> None:
    choice()
    assert search(torch.eye(3)[:1], torch.eye(3), m=2).ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("choice", CHOICES)
def test_tf32_is_disabled_regardless_of_earlier_settings(choice):
    in_a_process(_forbidden, choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_search_works_with_any_choice_of_precision(choice):
    in_a_process(_searched, choice)


def test_each_process_of_a_launcher_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_device("cuda", 3) == choose_device("auto", 3) == torch.device("cuda:3")
    assert choose_device("cuda:5", 3) == torch.device("cuda:5")
    assert choose_device("cpu", 3) == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda:0")


def test_the_gpu_is_the_processs_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("model.device.forbid_tf32", lambda: None)
    prepare_process(torch.device("cuda:3"))
    assert chosen == [torch.device("cuda:3")]
