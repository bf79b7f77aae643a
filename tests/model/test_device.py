import multiprocessing

import pytest
import torch

from model.device import choose_device, forbid_tf32, prepare_process
from modules.search import search

BACKENDS = torch.backends
NEW = hasattr(BACKENDS.cuda.matmul, "fp32_precision")  # PyTorch 2.9 and later


EARLIER = [
    "pass",
    "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
]
if NEW:
    EARLIER += [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ]


def forbidden_and_searched(earlier: str) -> None:
    torch.set_num_threads(1)  # a fork has only one thread
    exec(earlier)
    assert search(torch.eye(3)[:1], torch.eye(3), m=2).ids.tolist() == [[0, 1]]
    forbid_tf32()
    assert torch.get_float32_matmul_precision() == "highest"
    if NEW:
        assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.cudnn.conv.fp32_precision == "ieee"
    else:
        assert not BACKENDS.cuda.matmul.allow_tf32
        assert not BACKENDS.cudnn.allow_tf32
    forbid_tf32()


@pytest.mark.parametrize("earlier", EARLIER)
def test_search_works_with_any_choice_of_precision_and_tf32_can_be_disabled(earlier):
    """Runs in a process of its own, because not all of these settings can be undone."""
    process = multiprocessing.get_context("fork").Process(target=forbidden_and_searched, args=(earlier,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_each_process_of_a_launcher_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_device("cuda", 3) == choose_device("auto", 3) == torch.device("cuda:3")
    assert choose_device("cuda:5", 3) == torch.device("cuda:5")
    assert choose_device("cpu", 3) == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda:0")


def test_the_gpu_is_the_processs_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("model.device.forbid_tf32", lambda: None)
    prepare_process(torch.device("cuda:3"))
    assert current == [torch.device("cuda:3")]
