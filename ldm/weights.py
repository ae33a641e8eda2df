"""Weights on disk: a folder = config.json + safetensors. Save, load strictly, digest. Never a pickle.

Networks are saved in diffusers' own layout and CLIPs in open_clip's, so that the stock classes load them too;
classifiers and palettes in one of ours.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.config import Config, UserError, parse, to_dict
from ldm.latents import ENCODER, CodecConfig, LatentCodec, Normalisation
from ldm.models.autoencoder import build_autoencoder
from ldm.models.classifier import Classifier, ClassifierConfig, check_by_palette
from ldm.models.clip import Clip, ClipConfig, build_clip, clip_config, clip_settings, tokenizer
from ldm.models.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.models.palette import Palette, PaletteConfig
from ldm.noise import NoiseScheduleConfig

N = TypeVar("N", bound=nn.Module)

NETWORK_FILE = "diffusion_pytorch_model.safetensors"
OWN_FILE = "model.safetensors"
CLIP_FILE = "open_clip_model.safetensors"
MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 8
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Codec(NamedTuple):
    """A codec with the digest of its files, which caches and stages are keyed by."""

    module: LatentCodec
    digest: str

    @property
    def latents_digest(self) -> str:
        """The digest of what latents depend on: its config, and of its network the encoder, as float16. Codecs that
        differ in their decoders alone share it."""
        digest = hashlib.sha256(json.dumps(to_dict(self.module.config)).encode())
        for name, value in sorted(self.module.state_dict().items()):
            if name.startswith(ENCODER):
                digest.update(name.encode() + value.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file, checked before anything is allocated.

    Raises UserError, naming the tensor, where the header lies: sizes, offsets with gaps or overlaps, duplicate
    names, types that are no weights.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path}: not a whole safetensors file (header of {length} bytes in {size})")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable header: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: unreadable header: not a table of tensors")
    entries.pop("__metadata__", None)
    shapes, spans = {}, []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if type(dtype) is not str or len(shape) > MAX_DIMENSIONS:
                raise ValueError
            if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: tensor {name!r}: malformed entry in the header") from None
        if dtype not in _DTYPES:
            raise UserError(f"{path}: tensor {name!r}: type {dtype}, expected one of {', '.join(_DTYPES)}")
        count = 1
        for n in shape:
            count *= n
        if end - begin != count * _DTYPES[dtype]:
            raise UserError(f"{path}: tensor {name!r}: {end - begin} bytes for shape {shape} of {dtype}")
        shapes[name] = shape
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise UserError(f"{path}: tensor {name!r}: offset {begin}, expected {reached} (gap or overlap)")
        reached = end
    if reached != size - 8 - length:
        raise UserError(f"{path}: {size - 8 - length} bytes of data, the header tells of {reached}: truncated?")
    return shapes


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name!r} stands twice")
    return table


def load_network(build: Callable[[], N], path: Path, renamed: Callable[[str], str] = str) -> N:
    """The network that `build` makes, with the weights of a safetensors file in float32, in eval mode. renamed: what a
    tensor of the file is called in the network.

    Raises UserError for a file that is missing, pickled or malformed, or whose tensors do not fit, by name.
    """
    check_weights_file(path)
    shapes = {renamed(name): shape for name, shape in read_header(path).items()}
    with torch.device("meta"):
        network = build()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    faults = [f"{n}: missing" for n in wanted.keys() - shapes.keys()]
    faults += [f"{n}: unexpected" for n in shapes.keys() - wanted.keys()]
    faults += [f"{n}: shape {shapes[n]}, expected {wanted[n]}" for n in wanted.keys() & shapes.keys()
               if shapes[n] != wanted[n]]  # fmt: skip
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path}: does not fit its config: {'; '.join(sorted(faults)[:5])}{more}")
    tensors = {renamed(name): value.float() for name, value in load_file(path).items()}
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def check_size(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the network that `build` makes is far larger than its weights, before it is allocated."""
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in build().parameters())
    there = sum(tensor.numel() for tensor in weights.values())
    if wanted > 2 * there + 10**6:
        raise ValueError(f"it asks for {wanted} parameters, and the weights have {there}")


def check_weights_file(path: Path) -> None:
    """Raise UserError unless `path` is a file that may hold safetensors; say so where only pickles lie."""
    pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in _PICKLES) if path.parent.is_dir() else []
    if path.suffix in _PICKLES or (not path.is_file() and pickles):
        found = path.name if path.suffix in _PICKLES else pickles[0]
        raise UserError(
            f"{path.parent / found}: pickled weights can run code when opened, so they are refused. "
            "Convert the file to safetensors where you trust it, then name the folder again; `ldm import --pickles` "
            "does that for a pipeline folder of diffusers"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a diffusers network as config.json + safetensors of `dtype`. The network itself is left as it is."""
    if not isinstance(network, ModelMixin):
        raise TypeError(f"{type(network).__name__} is not a diffusers network")
    # diffusers' own `to` warns at every cast
    copied = nn.Module.to(copy.deepcopy(network), device="cpu", dtype=dtype)
    copied = nn.Module.to(copied, memory_format=torch.contiguous_format)
    copied.save_pretrained(str(folder), safe_serialization=True)


def read_json(path: Path, infinite: bool = False) -> Any:
    """The JSON content of a small text file, and with `infinite` what Python's own writer makes of infinities. Raises
    UserError where it is missing or malformed."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise UserError(f"{path}: too large for a config")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=float if infinite else _refuse_constant)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON; NaN and infinities are refused."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def folder_digest(folder: Path, *parts: str) -> str:
    """SHA-256 over the names and contents of the named files, and of the files below the named folders.

    Cards and previews that lie beside them do not count.
    """
    digest = hashlib.sha256()
    found = (p for part in parts for p in (folder / part, *(folder / part).rglob("*")))
    for path in sorted(p for p in found if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def save_codec(codec: LatentCodec, folder: Path) -> None:
    """Write a codec folder: config.json and, where there is an autoencoder, the diffusers folder vae/, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    if codec.autoencoder is not None:
        save_network(codec.autoencoder, folder / "vae")
    write_json(folder / "config.json", to_dict(codec.config))


def codec_digest(folder: Path) -> str:
    """The digest of a codec folder: its config and its network."""
    return folder_digest(folder, "config.json", "vae")


def load_codec(folder: str | Path) -> Codec:
    """Read a codec folder. Raises UserError where it is not one or is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        check_weights_file(folder if folder.is_file() else folder / "config.json")
    config = parse(CodecConfig, read_json(folder / "config.json"), str(folder / "config.json"))

    with torch.device("meta"):
        codec = LatentCodec(config)
    if config.autoencoder is not None:
        shape, channels = config.autoencoder, config.squares
        codec.autoencoder = load_network(lambda: build_autoencoder(shape, channels), folder / "vae" / NETWORK_FILE)
    return Codec(codec.eval().requires_grad_(False), codec_digest(folder))


def _save_own(network: nn.Module, folder: Path) -> None:
    """Write the weights of a network that is ours, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, folder / OWN_FILE)


@dataclass(frozen=True)
class ClassifierFile(Config):
    """config.json of a classifier's folder."""

    classifier: ClassifierConfig
    classes: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        check_by_palette(self.classifier, self.classes)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a classifier folder: config.json and model.safetensors, in float16."""
    _save_own(classifier, folder)
    write_json(folder / "config.json", to_dict(ClassifierFile(classifier.config, classifier.classes)))


def load_classifier(folder: str | Path) -> Classifier:
    """Read a classifier folder. Raises UserError where it is not one or is damaged."""
    folder = Path(folder)
    found = parse(ClassifierFile, read_json(folder / "config.json"), str(folder / "config.json"))
    return load_network(lambda: Classifier(found.classifier, found.classes), folder / OWN_FILE)


@dataclass(frozen=True)
class NoisyClassifierFile(Config):
    """config.json of a noise-aware classifier's folder. The rest is of the stage whose latents it has learned."""

    noisy_classifier: NoisyClassifierConfig
    classes: dict[str, tuple[str, ...]]
    latent_channels: int
    schedule: NoiseScheduleConfig
    normalisation: Normalisation
    latents_digest: str


def save_noisy_classifier(classifier: NoisyClassifier, file: NoisyClassifierFile, folder: Path) -> None:
    """Write a noise-aware classifier's folder: config.json and model.safetensors, in float16."""
    _save_own(classifier, folder)
    write_json(folder / "config.json", to_dict(file))


def load_noisy_classifier(folder: str | Path) -> tuple[NoisyClassifier, NoisyClassifierFile]:
    """Read a noise-aware classifier's folder. Raises UserError where it is not one or is damaged."""
    folder = Path(folder)
    found = parse(NoisyClassifierFile, read_json(folder / "config.json"), str(folder / "config.json"))
    network = load_network(
        lambda: NoisyClassifier(found.noisy_classifier, found.latent_channels, found.classes), folder / OWN_FILE
    )
    return network, found


@dataclass(frozen=True)
class PaletteFile(Config):
    """config.json of a palette's folder. colours: how many there are; text_digest: of the text encoder whose states it
    is told, of text_width."""

    palette: PaletteConfig
    colours: int
    text_width: int
    text_digest: str

    def __post_init__(self) -> None:
        if not 1 <= self.colours <= self.palette.colours or self.text_width < 1:
            raise ValueError(f"colours must be from 1 to {self.palette.colours}, and text_width at least 1")


def save_palette(palette: Palette, text_digest: str, folder: Path) -> None:
    """Write a palette's folder: config.json and model.safetensors, in float16."""
    _save_own(palette, folder)
    file = PaletteFile(palette.config, len(palette.colours), palette.text_width, text_digest)
    write_json(folder / "config.json", to_dict(file))


def load_palette(folder: str | Path) -> tuple[Palette, PaletteFile]:
    """Read a palette's folder. Raises UserError where it is not one or is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no palette is there; of a run, name RUN/final")
    found = parse(PaletteFile, read_json(folder / "config.json"), str(folder / "config.json"))
    network = load_network(
        lambda: Palette(found.palette, torch.zeros(found.colours, 3), found.text_width), folder / OWN_FILE
    )
    return network, found


def save_clip(clip: Clip, text: Path, folder: Path, final: Path) -> None:
    """Write a folder that open_clip reads, in float16; text: a folder with config and tokenizer of the text tower.

    open_clip finds the text tower's config only by a path that does not depend on the folder: `final`, where the
    folder will be, is written for that. `load_clip` needs no such path.
    """
    from transformers import BertTokenizer  # takes seconds

    folder.mkdir(parents=True, exist_ok=True)
    # written anew, because Hugging Face's automatic classes do not find every tokenizer that its own class reads
    BertTokenizer.from_pretrained(text, local_files_only=True).save_pretrained(folder)
    shutil.copyfile(text / "config.json", folder / "config.json")
    tensors = {name: value.detach().cpu() for name, value in clip.model.state_dict().items()}
    # of whole numbers there are only counts of batches, which nothing depends on and half precision cannot hold
    tensors = {name: (x if x.is_floating_point() else torch.zeros_like(x)).half().contiguous()
               for name, x in tensors.items()}  # fmt: skip
    save_file(tensors, folder / CLIP_FILE)
    settings = clip_settings(clip.config, clip.model.text.output_dim, str(final.absolute()))
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write_json(folder / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": half})


def load_clip(folder: str | Path) -> Clip:
    """Read a folder of `save_clip`, in eval mode. Raises UserError where it is not one or is damaged."""
    folder = Path(folder)
    path, file = folder / "open_clip_config.json", folder / CLIP_FILE
    try:
        plain = clip_config(read_json(path)["model_cfg"])
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a CLIP of a timm picture tower and a Hugging Face text tower") from None
    config = parse(ClipConfig, plain, str(path))
    check_weights_file(file)
    shapes = read_header(file)
    model = build_clip(config, folder)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shapes != wanted:
        name = min(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise UserError(f"{file}: {name}: shape {shapes.get(name)}, expected {wanted.get(name)}")
    model.load_state_dict(load_file(file))
    return Clip(model.eval().requires_grad_(False), config, tokenizer(folder, config.max_tokens))
