"""Weights on disk: files that lie are refused before anything is allocated, pickles before anything is run."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm import weights
from ldm.config import UserError
from ldm.latents import CodecConfig, LatentCodec
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig, UNetShape, build_unet
from ldm.weights import NETWORK_FILE, codec_digest, load_codec, load_network, read_header, read_json, save_codec
from pipelines.cascade import load_cascade
from pipelines.generate import generate

CODEC = CodecConfig(2, AutoencoderConfig((8, 8), latent_channels=2, norm_groups=4))
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


class Pair(nn.Module):
    """The smallest network: a (2,) and b (3,)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))
        self.b = nn.Parameter(torch.zeros(3))


def crafted(path: Path, header: dict[str, Any] | str | bytes, data: int = 0, length: int | None = None) -> Path:
    """A file of that header, which may claim another `length`, and `data` zero bytes."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / NETWORK_FILE


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("the file was read")

    monkeypatch.setattr(weights, "load_file", refuse)


@pytest.fixture
def codec_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_codec(LatentCodec(CODEC), tmp_path / "codec")
    return tmp_path / "codec"


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F32, **changes}}


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (entry(), 7, "7 bytes of data, the header tells of 8: truncated?"),
        (entry(), 9, "9 bytes of data, the header tells of 8"),
        (entry(), 0, "0 bytes of data, the header tells of 8: truncated?"),
        (entry(shape=[10**9, 10**9]), 8, r"tensor 'a': 8 bytes for shape \(1000000000, 1000000000\) of F32"),
        (entry(shape=[10**9, 10**9], data_offsets=[0, 4 * 10**18]), 8, "8 bytes of data, the header tells of 4000000"),
        (entry(shape=[2**32, 2**32], data_offsets=[0, 2**66]), 8, "the header tells of 73786976294838206464"),
        (entry(shape=[1] * 9 + [2]), 8, "tensor 'a': malformed"),
        (entry(shape=[10**18] * 200_000), 8, "tensor 'a': malformed"),
        (entry(shape=[-2]), 8, "tensor 'a': malformed"),
        (entry(shape=[2.0]), 8, "tensor 'a': malformed"),
        (entry(shape=[True]), 8, "tensor 'a': malformed"),
        (entry(shape="2"), 8, "tensor 'a': malformed"),
        (entry(shape=None), 8, "tensor 'a': malformed"),
        (entry(data_offsets=[-8, 0]), 8, "tensor 'a': malformed"),
        (entry(data_offsets=[8, 0]), 8, "tensor 'a': -8 bytes for shape"),
        (entry(data_offsets=[0, 8, 16]), 8, "tensor 'a': malformed"),
        (entry(data_offsets=8), 8, "tensor 'a': malformed"),
        (entry(data_offsets=[0, "8"]), 8, "tensor 'a': malformed"),
        (entry(data_offsets=[0, 4]), 8, "tensor 'a': 4 bytes for shape"),
        (entry(dtype="I32"), 8, "tensor 'a': type I32, expected one of F64, F32, F16, BF16"),
        (entry(dtype="F8_E4M3", data_offsets=[0, 2]), 2, "tensor 'a': type F8_E4M3"),
        (entry(dtype=["F32"]), 8, "tensor 'a': malformed"),
        ({"a": 3}, 8, "tensor 'a': malformed"),
        ({"a": [1, 2]}, 8, "tensor 'a': malformed"),
        ({"a": {"dtype": "F32"}}, 8, "tensor 'a': malformed"),
        ({"a": F32, "b": F32}, 8, "tensor 'b': offset 0, expected 8"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, "tensor 'b': offset 4, expected 8"),
        ({"a": F32, "b": {**F32, "data_offsets": [16, 24]}}, 24, "tensor 'b': offset 16, expected 8"),
        ({"a": {**F32, "data_offsets": [8, 16]}}, 16, "tensor 'a': offset 8, expected 0"),
        (f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}', 8, "unreadable header: 'a' stands twice"),
        ("[1, 2]", 0, "not a table of tensors"),
        ("{", 0, "unreadable header"),
        ("[" * 100_000, 0, "unreadable header"),
        (b"\xff\xfe", 0, "unreadable header"),
        ("", 0, "unreadable header"),
    ],
)
def test_headers_that_lie_are_refused_unread(
    file: Path, header: dict[str, Any] | str | bytes, data: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        load_network(Pair, crafted(file, header, data))


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("length", [9, 10**8, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(file: Path, length: int) -> None:
    with pytest.raises(UserError, match=f"not a whole safetensors file .header of {length} bytes in 16"):
        load_network(Pair, crafted(file, "{      }", 0, length))


@pytest.mark.usefixtures("no_allocation")
def test_a_header_of_100_mb_is_refused_even_if_it_is_there(file: Path) -> None:
    crafted(file, "", 0, 10**8)
    os.truncate(file, 10**8 + 8)  # sparse: takes no room
    with pytest.raises(UserError, match="header of 100000000 bytes"):
        load_network(Pair, file)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7])
def test_a_file_too_short_for_a_header_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_network(Pair, file)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": 2}, "does not fit its config: b: missing"),
        ({"a": 2, "b": 3, "c": 1}, "does not fit its config: c: unexpected"),
        ({"a": 2, "b": 4}, r"does not fit its config: b: shape \(4,\), expected \(3,\)"),
        ({"a": 3, "c": 1}, r"a: shape \(3,\), expected \(2,\); b: missing; c: unexpected"),
        ({"a": 2, "b": 3, **{f"c{i}": 1 for i in range(9)}}, "c0: unexpected; .*c4: unexpected and 4 more$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(file: Path, tensors: dict[str, int], expected: str) -> None:
    save_file({name: torch.ones(size) for name, size in tensors.items()}, file)
    with pytest.raises(UserError, match=expected):
        load_network(Pair, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_good_files_load_in_float32(file: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.tensor([1, 2]).to(dtype), "b": torch.zeros(3, dtype=dtype)}, file, {"format": "pt"})
    assert read_header(file) == {"a": (2,), "b": (3,)}
    network = load_network(Pair, file)
    assert network.a.tolist() == [1.0, 2.0]
    assert network.a.dtype == torch.float32
    assert not network.training
    assert not network.a.requires_grad


class Evil:
    """Unpickling it runs a shell command that leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(params=["benign", "evil", "torch"])
def pickled(request: pytest.FixtureRequest, canary: Path, tmp_path: Path) -> bytes:
    if request.param == "torch":
        torch.save({"a": torch.zeros(2), "evil": Evil(canary)}, tmp_path / "made")
        return (tmp_path / "made").read_bytes()
    return pickle.dumps({"a": [0.0]} if request.param == "benign" else Evil(canary))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files opened from here on."""
    names: list[str] = []
    original, original_path = builtins.open, Path.open

    def noted(file: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(file))
        return original(file, *args, **kwargs)

    def noted_path(self: Path, *args: Any, **kwargs: Any) -> Any:
        names.append(str(self))
        return original_path(self, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr(Path, "open", noted_path)
    return names


def test_the_canary_sings_when_the_pickle_is_read(canary: Path) -> None:
    pickle.loads(pickle.dumps(Evil(canary)))
    assert canary.exists()


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt", "model.pth", "x.pkl"])
def test_pickles_are_refused_unopened(
    tmp_path: Path, pickled: bytes, canary: Path, opened: list[str], name: str
) -> None:
    path = tmp_path / "weights" / name
    path.parent.mkdir()
    path.write_bytes(pickled)
    opened.clear()
    attempts: list[Callable[[], Any]] = [
        lambda: load_network(Pair, path),
        lambda: load_network(Pair, path.parent / NETWORK_FILE),
        lambda: load_codec(path),
        lambda: load_codec(path.parent),
        lambda: load_cascade(path),
        lambda: load_cascade(path.parent),
        lambda: generate(["a cat"], model=path, out=tmp_path / "out"),
        lambda: generate(["a cat"], model=path.parent, out=tmp_path / "out"),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=rf"{name}: pickled weights can run code .* safetensors") as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert not [n for n in opened if name in n]
    assert not canary.exists()


@pytest.mark.parametrize("part", ["codec/vae", "base/unet"])
def test_pickles_inside_a_cascade_are_refused(
    tiny_folder: Path, tmp_path: Path, pickled: bytes, canary: Path, part: str
) -> None:
    cascade = Path(shutil.copytree(tiny_folder, tmp_path / "cascade"))
    (cascade / part / NETWORK_FILE).unlink()
    (cascade / part / "diffusion_pytorch_model.bin").write_bytes(pickled)
    if part == "base/unet":
        unet = UNetConfig((8, 16), 1, (False, True), 2, 4)
        attempt: Callable[[], Any] = lambda: load_network(  # noqa: E731 -- two short ways into one check
            lambda: build_unet(unet, UNetShape(2, 16)), cascade / part / NETWORK_FILE
        )
    else:
        attempt = lambda: load_codec(cascade / "codec")  # noqa: E731 -- as above
    for way in (attempt, lambda: load_cascade(cascade)):
        with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin: pickled weights can run code"):
            way()
    assert not canary.exists()


def test_a_pickle_named_safetensors_is_refused(file: Path, pickled: bytes, canary: Path) -> None:
    file.write_bytes(pickled)
    with pytest.raises(UserError, match=r"not a whole safetensors file|unreadable header"):
        load_network(Pair, file)
    assert not canary.exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/config\.json: no such file"):
        load_codec(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such file"):
        load_network(Pair, tmp_path / NETWORK_FILE)


def test_a_codec_comes_back_as_its_float16_rounding(codec_folder: Path) -> None:
    torch.manual_seed(0)
    original = LatentCodec(CODEC)
    codec, digest = load_codec(codec_folder)
    assert codec.config == CODEC
    assert digest == codec_digest(codec_folder)
    loaded = codec.state_dict()
    assert loaded.keys() == original.state_dict().keys()
    for name, value in original.state_dict().items():
        assert torch.equal(loaded[name], value.half().float()), name
    assert next(original.parameters()).dtype == torch.float32
    assert {v.dtype for v in load_file(codec_folder / "vae" / NETWORK_FILE).values()} == {torch.float16}
    save_codec(codec, codec_folder.with_name("again"))
    assert codec_digest(codec_folder.with_name("again")) == digest


def test_codecs_that_encode_alike_share_the_digest_of_their_latents(codec_folder: Path) -> None:
    digest = load_codec(codec_folder).latents_digest
    for part, same in (("decoder.conv_in.bias", True), ("encoder.conv_in.bias", False)):
        codec = load_codec(codec_folder)
        assert codec.module.autoencoder is not None
        codec.module.autoencoder.get_parameter(part).add_(1)
        assert (codec.latents_digest == digest) is same, part
        save_codec(codec.module, codec_folder.with_name("other"))
        assert (load_codec(codec_folder.with_name("other")).latents_digest == digest) is same, part
    assert codec_digest(codec_folder.with_name("other")) != codec_digest(codec_folder)


@pytest.mark.parametrize("part", ["config.json", "vae/config.json", f"vae/{NETWORK_FILE}"])
def test_the_digest_tells_of_every_byte(codec_folder: Path, part: str) -> None:
    before = codec_digest(codec_folder)
    content = bytearray((codec_folder / part).read_bytes())
    content[-1] ^= 1
    (codec_folder / part).write_bytes(content)
    changed = codec_digest(codec_folder)
    assert changed != before
    content[-1] ^= 1
    (codec_folder / part).write_bytes(content)
    assert codec_digest(codec_folder) == before
    (codec_folder / part).rename(codec_folder / "moved")
    assert codec_digest(codec_folder) not in (before, changed)


def test_a_truncated_codec_is_refused(codec_folder: Path) -> None:
    path = codec_folder / "vae" / NETWORK_FILE
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="truncated"):
        load_codec(codec_folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"unshuffle": NaN}', "NaN is not JSON"),
        ('{"unshuffle": -Infinity}', "-Infinity is not JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 100_000, "not readable as JSON"),
        ('{"unshuffle": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("{", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        ("[]", "expected sections"),
        ('{"unshuffle": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
        ('{"unshuffle": "4"}', "unshuffle: must be a whole number"),
        ('{"auto_map": {}}', "auto_map: unknown key"),
        ('{"autoencoder": {"widths": [1000000000]}}', "autoencoder.widths: .*at most 4096"),
        ('{"autoencoder": {"norm_groups": 0}}', "autoencoder.norm_groups: norm_groups must be at least 1"),
        ('{"autoencoder": {"latent_channels": -1}}', "latent_channels must be 1 to 256"),
    ],
)
def test_codec_configs_that_lie_are_refused(codec_folder: Path, content: str | bytes, expected: str) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (codec_folder / "config.json").write_bytes(raw)
    with pytest.raises(UserError, match=expected):
        load_codec(codec_folder)


def test_json_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    huge = tmp_path / "huge.json"
    huge.touch()
    os.truncate(huge, 10**9)
    with pytest.raises(UserError, match="too large"):
        read_json(huge)
