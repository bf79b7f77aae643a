import io
import os
import zipfile

import pytest
import torch

from model import pickles
from model.checkpoint import encoder_state, find_checkpoint, load_encoder, load_tensors, sha256
from model.cvnet import ResNet
from model.errors import InputError

SMALL = {"encoder_q.stem.conv.weight": torch.zeros(64, 3, 7, 7)}


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch ran",)


def encoder(depth: int = 50, reduction_dim: int = 2048) -> ResNet:
    with torch.device("meta"):
        return ResNet(depth, reduction_dim)


@pytest.mark.parametrize("prefix", ["globalmodel.", "module.encoder_q.", "module.globalmodel.", "module.", ""])
def test_the_encoder_is_found_under_any_prefix(tmp_path, prefix):
    state = {key: torch.rand(2) for key in ("stem.conv.weight", "s1.b1.f.a.weight", "head.fc.bias")}
    others = {f"{key}.weight": torch.zeros(3) for key in ("localmodel.conv", "desc_cls", "conv2ds.0", "encoder_k.stem")}
    torch.save({f"{prefix}{key}": value for key, value in state.items()} | others, tmp_path / "other.pth")
    loaded = encoder_state(tmp_path / "other.pth")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    path, found = tmp_path / "again.pyth", []
    for value in (1.0, 2.0):
        torch.save({"model_state": {"stem.conv.weight": torch.full((2,), value)}}, path)
        found.append((encoder_state(path)["stem.conv.weight"].tolist(), sha256(path)))
    assert [values for values, _ in found] == [[1.0, 1.0], [2.0, 2.0]]
    assert found[0][1] != found[1][1]


def test_files_from_before_pytorch_1_6_are_read(tmp_path):
    torch.save({"model_state": SMALL}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert list(encoder_state(tmp_path / "old.pth")) == ["stem.conv.weight"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("s2.b1.f.b.weight", lambda value: None),
        ("s2.b9.f.b.weight", lambda value: torch.zeros(1)),
        ("stem.bn.bias", lambda value: torch.zeros(32)),
        ("stem.bn.bias", lambda value: value * float("nan")),
        ("s1.b1.f.a_bn.running_var", lambda value: -value - 1),
    ],
)
def test_a_state_that_does_not_fit_is_never_loaded_in_part(checkpoint_50, tmp_path, key, change):
    state = encoder_state(checkpoint_50)
    changed = {**state, key: change(state.get(key))}
    torch.save({name: value for name, value in changed.items() if value is not None}, tmp_path / "changed.pth")
    network = encoder()
    with pytest.raises(InputError, match=key):
        load_encoder(network, tmp_path / "changed.pth")
    assert all(parameter.is_meta for parameter in network.parameters())


def test_the_likely_reason_for_a_file_that_does_not_fit_is_named(checkpoint_50, checkpoint_101):
    for network, path, reason in (
        (encoder(50), checkpoint_101, "ResNet-101"),
        (encoder(101), checkpoint_50, "ResNet-50"),
        (encoder(reduction_dim=512), checkpoint_50, "2048"),
    ):
        with pytest.raises(InputError, match=reason):
            load_encoder(network, path)


def test_loaded_weights_do_not_depend_on_the_file(checkpoint_50, tmp_path):
    path = tmp_path / "copy.pyth"
    path.write_bytes(checkpoint_50.read_bytes())
    network = load_encoder(encoder(), path)
    before = network.stem.conv.weight.clone()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(network.stem.conv.weight, before)


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html>", {"a": torch.zeros(3)}, [1, 2], {"model_state": RunsCode()}, 0.02, 0.5, 0.99],
    ids=["empty", "a page", "no encoder", "a list", "code", "cut", "half", "almost whole"],
)
def test_a_file_that_is_not_a_checkpoint_is_rejected(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    if isinstance(content, float):  # this share of a checkpoint
        torch.save(SMALL, path)
        os.truncate(path, int(path.stat().st_size * content))
    with pytest.raises(InputError, match=r"file\.pth"):
        encoder_state(path)
    assert not (tmp_path / "ran").exists()


NESTED = b"K\x01\x85" + b"2\x86" * 60  # a tuple that contains itself twice, 60 times over


@pytest.mark.parametrize(
    ("stream", "zipped"),
    [
        (b"}" + NESTED + b"K\x01s.", False),
        (NESTED + b"\x85Q.", True),  # the name of a storage, which PyTorch would show
        (b"ctorch._utils\n_rebuild_sparse_tensor\n(" + NESTED + b"K\x01tR.", True),
    ],
    ids=["key", "storage", "layout"],
)
def test_a_checkpoint_that_would_take_for_ever_is_refused(tmp_path, monkeypatch, stream, zipped):
    monkeypatch.setattr(pickles, "SECONDS", 1)
    path, bomb = tmp_path / "bomb.pth", io.BytesIO()
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(bomb, "w") as archive:
            for name in whole.namelist():
                content = b"\x80\x02" + stream if name.endswith("data.pkl") else whole.read(name)
                archive.writestr(name, content)
        path.write_bytes(bomb.getvalue())
    else:
        content = path.read_bytes()
        place = content.index(b"\x80\x02}", 40)  # after the magic number
        path.write_bytes(content[:place] + b"\x80\x02" + stream + content[place:])
    with pytest.raises(InputError, match="more than 1 s"):
        load_tensors(path)


def test_a_folder_gives_the_file_that_fits_the_depth(checkpoint_50, checkpoint_101, tmp_path):
    for path in (checkpoint_50, checkpoint_101):
        (tmp_path / path.name).symlink_to(path)
    torch.save(torch.zeros(3), tmp_path / "features.pth")
    assert find_checkpoint(tmp_path, 50).name == "CVPR2022_CVNet_R50.pyth"
    assert find_checkpoint(tmp_path, 101).name == "CVPR2022_CVNet_R101.pyth"
    (tmp_path / "copy.pyth").symlink_to(checkpoint_50)
    with pytest.raises(InputError, match=r"copy\.pyth"):
        find_checkpoint(tmp_path, 50)


def test_the_hash_is_sha_256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
