import os
import re

import pytest
import torch

from model.checkpoint import encoder_state, find_checkpoint, load_encoder, load_strictly, sha256
from model.errors import InputError
from model.resnet import ResNet


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch ran",)


def encoder(depth: int = 50, reduction_dim: int = 2048) -> ResNet:
    with torch.device("meta"):
        return ResNet(depth, reduction_dim)


def small_state() -> dict[str, torch.Tensor]:
    return {"encoder_q.stem.conv.weight": torch.zeros(64, 3, 7, 7)}


def test_keys_of_other_parts_are_left_alone(tmp_path):
    path = tmp_path / "full.pyth"
    others = {"conv2ds.0.weight": torch.zeros(2), "encoder_k.stem.conv.weight": torch.zeros(2)}
    torch.save({"model_state": {**small_state(), **others}, "optimizer_state": {"state": {}}, "epoch": 3}, path)
    assert list(encoder_state(path)) == ["stem.conv.weight"]


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    path = tmp_path / "again.pyth"
    found = []
    for value in (1.0, 2.0):
        torch.save({"model_state": {"stem.conv.weight": torch.full((2,), value)}}, path)
        found.append((encoder_state(path)["stem.conv.weight"].tolist(), sha256(path)))
    assert [values for values, _ in found] == [[1.0, 1.0], [2.0, 2.0]]
    assert found[0][1] != found[1][1]


def test_files_from_before_pytorch_1_6_are_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"model_state": small_state()}, path, _use_new_zipfile_serialization=False)
    assert list(encoder_state(path)) == ["stem.conv.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("s2.b1.f.b.weight"), r"1 missing \(s2.b1.f.b.weight\)"),
        (lambda s: s.update({"s2.b9.f.b.weight": torch.zeros(1)}), r"1 unknown \(s2.b9.f.b.weight\)"),
        (
            lambda s: s.update({"stem.bn.bias": torch.zeros(32)}),
            r"wrong shape \(stem.bn.bias \(32,\) instead of \(64,\)",
        ),
        (lambda s: s["stem.bn.bias"].fill_(float("nan")), "stem.bn.bias contains values that are not finite"),
    ],
)
def test_a_state_that_does_not_fit_is_never_loaded_in_part(checkpoint_50, tmp_path, change, message):
    state = {key: value.clone() for key, value in encoder_state(checkpoint_50).items()}
    change(state)
    path = tmp_path / "changed.pth"
    torch.save(state, path)
    network = encoder()
    with pytest.raises(InputError, match=message):
        load_encoder(network, path)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_a_file_of_the_other_depth_is_named(checkpoint_50, checkpoint_101):
    with pytest.raises(InputError, match=r"ResNet-101"):
        load_encoder(encoder(50), checkpoint_101)
    with pytest.raises(InputError, match=r"it is a ResNet-50"):
        load_encoder(encoder(101), checkpoint_50)


def test_another_descriptor_size_is_named(checkpoint_50):
    with pytest.raises(InputError, match=r"2048 dimensions"):
        load_encoder(encoder(reduction_dim=512), checkpoint_50)


@pytest.mark.parametrize(("key", "value"), [("head.pool.p", 0.0), ("s1.b1.f.a_bn.running_var", -1.0)])
def test_invalid_numbers_are_rejected(checkpoint_50, key, value):
    state = encoder_state(checkpoint_50)
    state[key] = torch.full_like(state[key], value)
    with pytest.raises(InputError, match=re.escape(key)):
        load_strictly(encoder(), state, checkpoint_50, "a ResNet-50")


def test_loaded_weights_do_not_depend_on_the_file(checkpoint_50, tmp_path):
    path = tmp_path / "copy.pyth"
    path.write_bytes(checkpoint_50.read_bytes())
    network = load_encoder(encoder(), path)
    before = network.stem.conv.weight.clone()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(network.stem.conv.weight, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is not a PyTorch file"),
        ({"a": torch.zeros(3)}, "holds no CVNet encoder: .* its first keys are a$"),
        ([1, 2], "it contains a list, not a dict"),
        ({"model_state": RunsCode()}, "is refused: it contains more than tensors and might run code"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_rejected(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=message):
        encoder_state(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_checkpoint_is_rejected(tmp_path, zipped, kept):
    path = tmp_path / "cut.pth"
    torch.save(small_state(), path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(InputError, match="truncated or damaged"):
        encoder_state(path)


def test_a_folder_gives_the_file_that_fits_the_depth(checkpoint_50, checkpoint_101, tmp_path):
    for path in (checkpoint_50, checkpoint_101):
        (tmp_path / path.name).symlink_to(path)
    torch.save(torch.zeros(3), tmp_path / "features.pth")
    assert find_checkpoint(tmp_path, 50).name == "CVPR2022_CVNet_R50.pyth"
    assert find_checkpoint(tmp_path, 101).name == "CVPR2022_CVNet_R101.pyth"


def test_the_hash_is_sha_256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
