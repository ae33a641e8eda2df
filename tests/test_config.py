"""Configs: YAML that lies or errs is refused with its place, values with their dotted path and what would do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.config import ConfigError, UserError, load, parse, to_yaml
from ldm.latents import CodecConfig, Normalisation
from training import engine
from training.autoencoder import AutoencoderRun
from training.diffusion import DiffusionRun
from training.engine import LoopConfig, check_precision
from training.tasks import RunConfig

# configs/accelerate holds files of the launcher, for tests/test_launch_configs.py
CONFIGS = sorted(p for p in Path("configs").rglob("*.yaml") if p.parent.name != "accelerate")
KINDS = "autoencoder, classifier, clip, diffusion, noisy_classifier, palette, sequences"
AUTOENCODER = """\
kind: autoencoder
data:
  path: somewhere
loop:
  images: 64000
optim:
  lr: 1e-3
"""
DIFFUSION = """\
kind: diffusion
codec: runs/codec
data: {path: somewhere}
loop: {images: 64000}
"""
JARGON = re.compile(r"pydantic|https?:|dataclass|_type|Input should|discriminator|constructor|Traceback|Expecting")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def read(file: Path, text: str, overrides: Sequence[str] = ()) -> Any:
    file.write_text(text, encoding="utf-8")
    return load(RunConfig, file, overrides)


def refusal(file: Path, text: str, overrides: Sequence[str] = ()) -> list[str]:
    """The lines of the refusal, the folder of the file left out."""
    with pytest.raises(ConfigError) as caught:
        read(file, text, overrides)
    message = str(caught.value).replace(f"{file.parent}/", "")
    assert not JARGON.search(message), message
    assert caught.value.exit_code == 2
    return message.splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AUTOENCODER + "kind: diffusion\n", "run.yaml:8: duplicate key 'kind'"),
        ("data:\n  path: a\n  path: b\n", "run.yaml:3: duplicate key 'path'"),
        ("data:\n  path: !!python/object:os.system a\n", "run.yaml:2: tag tag:yaml.org,2002:python/object:os.system"),
        ("a: !!python/object/apply:os.system [l]\n", "run.yaml:1: tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!binary aGk=\n", "run.yaml:1: tag tag:yaml.org,2002:binary is not supported"),
        ("a: !Mine x\n", "run.yaml:1: tag !Mine is not supported"),
        ("data:\n\tpath: a\n", r"run.yaml:2: found character '\t' that cannot start any token"),
        ("a: &x [1]\nb: *x\n", "run.yaml:2: aliases (*name) are not supported"),
        ("a: &x\n  b: *x\n", "run.yaml:2: aliases (*name) are not supported"),
        ("1: a\n", "run.yaml:1: key 1 is not text (quote it)"),
        ("? [a, b]\n: c\n", "run.yaml:1: key ['a', 'b'] is not text (quote it)"),
        ("a: b: c\n", "run.yaml:1: mapping values are not allowed here"),
        ("a: [1\n", "run.yaml:2: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: but found another document"),
        ("", "run.yaml:1: expected sections (key: value) at the top, found nothing"),
        ("# only a remark\n", "run.yaml:1: expected sections (key: value) at the top, found nothing"),
        ("- a\n- b\n", "run.yaml:1: expected sections (key: value) at the top, found list"),
        ("just text\n", "run.yaml:1: expected sections (key: value) at the top, found str"),
        ("a: " + "[" * 5000, "run.yaml: nested too deeply"),
        ("a: !!bool maybe\n", "run.yaml: not readable as YAML"),
        ("a: " + "9" * 5000, "run.yaml: not readable as YAML"),
    ],
)
def test_yaml_that_cannot_be_read_is_refused_with_its_line(file: Path, text: str, expected: str) -> None:
    (line,) = refusal(file, text)
    assert line.startswith(expected)


def test_an_alias_bomb_is_refused_before_it_grows(file: Path) -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 8))
    (line,) = refusal(file, "a0: &a0 [lol]\n" + levels)
    assert line == "run.yaml:2: aliases (*name) are not supported"


def test_files_that_are_no_text_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read"):
        load(RunConfig, file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(RunConfig, file.parent)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(RunConfig, file)
    assert "special characters are not allowed" in refusal(file, "a: \x00\n")[0]
    assert "broken characters" in refusal(file, AUTOENCODER + 'cache: "\\ud800"\n')[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: yes", "run.yaml:8: seed: must be a whole number (got 'yes')"),
        ("seed: true", "run.yaml:8: seed: must be a whole number (got True)"),
        ('seed: "5"', "run.yaml:8: seed: must be a whole number (got '5')"),
        ("seed: 5.0", "run.yaml:8: seed: must be a whole number (got 5.0)"),
        ("seed: 1e3", "run.yaml:8: seed: must be a whole number (got 1000.0)"),
        ("seed: 0x10", "run.yaml:8: seed: must be a whole number (got '0x10')"),
        ("seed:", "run.yaml:8: seed: must be a whole number (got None)"),
        ("cache: 5", "run.yaml:8: cache: must be text; put it in quotes (got 5)"),
        ("reconstruction: {mirror: on}", "run.yaml:8: reconstruction.mirror: must be true or false (got 'on')"),
        ("reconstruction: {mirror: 1}", "run.yaml:8: reconstruction.mirror: must be true or false (got 1)"),
        ("reconstruction: {kl: off}", "run.yaml:8: reconstruction.kl: must be a number (got 'off')"),
        ("reconstruction: {kl: true}", "run.yaml:8: reconstruction.kl: must be a number (got True)"),
        ("reconstruction: {kl: .nan}", "run.yaml:8: reconstruction.kl: must be a number (got '.nan')"),
        ("reconstruction: {kl: 1e999}", "run.yaml:8: reconstruction.kl: must be a finite number (got inf)"),
        ("reconstruction: 3", "run.yaml:8: reconstruction: must be a section of keys and values (got 3)"),
        ("codec: {autoencoder: {widths: 32}}", "run.yaml:8: codec.autoencoder.widths: must be a list (got 32)"),
        ("codec: {autoencoder: {widths: [32, x]}}",
         "run.yaml:8: codec.autoencoder.widths.1: must be a whole number (got 'x')"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(file: Path, line: str, expected: str) -> None:
    assert refusal(file, AUTOENCODER + line) == [expected]


def test_plain_scalars_mean_what_they_look_like(file: Path) -> None:
    text = AUTOENCODER.replace("images: 64000", "images: 64_000\n  mixed_precision: no\n  compile: true")
    run = read(file, text.replace("somewhere", "2020-01-01") + "cache: off\nvalidation: {split: ~}\n")
    assert run.optim.lr == 1e-3
    assert run.loop.images == 64_000
    assert run.loop.mixed_precision == "no"
    assert run.loop.compile is True
    assert (run.data.path, run.cache, run.validation.split) == ("2020-01-01", "off", None)
    assert read(file, AUTOENCODER.replace("1e-3", "1")).optim.lr == 1.0
    assert read(file, AUTOENCODER.replace("1e-3", ".5E-2")).optim.lr == 0.005


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=0", "optim.lr: lr must be above 0 and at most 1, not 0; 1e-4 to 1e-3 is usual"),
        ("optim.lr=1e6", "optim.lr: lr must be above 0 and at most 1, not 1e+06; 1e-4 to 1e-3 is usual"),
        ("optim.lr=-1", "optim.lr: lr must be above 0 and at most 1, not -1; 1e-4 to 1e-3 is usual"),
        ('optim.lr="1e-4 "', "optim.lr: must be a number (got '1e-4 ')"),
        ("loop.batch=0", "loop.batch: batch 0 must be from 1 to 1000000 and a multiple of accumulation 1"),
        ("loop.batch=-8", "loop.batch: batch -8 must be from 1 to 1000000 and a multiple of accumulation 1"),
        ("loop.accumulation=5", "loop.batch: batch 32 must be from 1 to 1000000 and a multiple of accumulation 5"),
        ("loop.images=31", "loop.images: images 31 is less than one batch of 32"),
        ("loop.save_every_images=64001",
         "loop.save_every_images: save_every_images 64001 is beyond the end of the run at 64000 images; the run would "
         "save only at its end: say save_every_images: 64000 for that"),
        ("loop.save_every_images=0", "loop.save_every_images: save_every_images must be at least 1"),
        ("loop.keep_checkpoints=0",
         "loop.keep_checkpoints: keep_checkpoints must be at least 1: a run without a checkpoint cannot resume"),
        ("loop.mixed_precision=fp8", "loop.mixed_precision: must be 'no', 'fp16' or 'bf16' (got 'fp8')"),
        ("data.size_px=1", "data.size_px: size_px must be at least 8, not 1"),
        ("reconstruction.crop_px=1", "reconstruction.crop_px: crop_px must be at least 8"),
        ("reconstruction.crop_px=24",
         "reconstruction.crop_px: reconstruction.crop_px 24 must be a multiple of the codec's factor 8 and divide "
         "data.size_px 256"),
        ("data.background=[0, 0]", "data.background.2: missing"),
        ("data.background=[0, 0, 0, 0]", "data.background: has too many entries (got [0, 0, 0, 0])"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_range(file: Path, override: str, expected: str) -> None:
    (line,) = refusal(file, AUTOENCODER, [override])
    assert line.partition(": ")[2] == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dropout=1", "dropout: dropout is a share, from 0 to below 1, not 1"),
        ("sampling.steps=0", "sampling.steps: steps must be from 1 to 1000, not 0"),
        ("sampling.guidance=-5", "sampling.guidance: guidance must be from 0 to 100 (1 is none), not -5"),
        ("unet.heads=0", "unet.norm_groups: norm_groups and heads must be at least 1, not 32 and 0"),
        ("unet.attention=[true]", "unet.attention: attention needs one entry per width: 1 for 2"),
        ("unet.widths=[100, 200]", "unet.widths: widths (100, 200) must be multiples of norm_groups 32 and heads 8"),
        ("schedule.beta_end=2", "schedule: betas must rise within (0, 1), not from 0.0001 to 2"),
        ("text.kind=clip", "text.kind: kind clip needs a path"),
        ("denoiser.target=eps2", "denoiser.target: must be 'eps', 'x0', 'v', 'flow' or 'mean' (got 'eps2')"),
        ("data.size_px=1", "data.size_px: size_px must be at least 8, not 1"),
    ],
)
def test_a_diffusion_run_is_checked_all_through(file: Path, override: str, expected: str) -> None:
    (line,) = refusal(file, DIFFUSION, [override])
    assert re.sub(r"(?<=\d)\.0\b(?!\d)", "", line.partition(": ")[2]) == expected


def test_all_faults_are_listed_at_once_each_with_its_line(file: Path) -> None:
    text = """\
kind: autoencoder
sed: 3
loop:
  images: many
  bach: 8
optim:
  lr: 5
codec:
  autoencoder:
    latent_chanels: 8
    zzz: 1
"""
    assert sorted(refusal(file, text)) == sorted([
        "run.yaml: data: missing",
        "run.yaml:2: sed: unknown key; did you mean seed?",
        "run.yaml:4: loop.images: must be a whole number (got 'many')",
        "run.yaml:5: loop.bach: unknown key; did you mean batch?",
        "run.yaml:7: optim.lr: lr must be above 0 and at most 1, not 5; 1e-4 to 1e-3 is usual",
        "run.yaml:10: codec.autoencoder.latent_chanels: unknown key; did you mean latent_channels?",
        "run.yaml:11: codec.autoencoder.zzz: unknown key; allowed here: latent_channels, layers_per_block, "
        "mid_attention, norm_groups, quant_conv, widths",
    ])  # fmt: skip


def test_the_kind_decides_which_keys_are_known(file: Path) -> None:
    assert isinstance(read(file, AUTOENCODER), AutoencoderRun)
    assert isinstance(read(file, DIFFUSION), DiffusionRun)
    (line,) = refusal(file, AUTOENCODER + "unet: {heads: 4}\n")
    assert line.startswith("run.yaml:8: unet: unknown key; allowed here: cache, codec, data,")
    assert refusal(file, DIFFUSION.replace("codec: runs/codec\n", "")) == ["run.yaml: codec: missing"]
    assert refusal(file, "kind: autoencoder\n") == ["run.yaml: data: missing", "run.yaml: loop: missing"]
    wrong = f"run.yaml:1: kind: must be one of {KINDS} (got 'autoencodr')"
    assert refusal(file, "kind: autoencodr\nloop: 3\n") == [wrong]
    assert refusal(file, "loop: {}\n") == [f"run.yaml: kind: missing; one of {KINDS}"]
    assert refusal(file, "kind: [autoencoder]\n")[0].startswith("run.yaml:1: kind: must be one of")


def test_overrides_set_values_and_make_sections(file: Path) -> None:
    overrides = ["optim.lr=2e-3", "codec.autoencoder.widths=[32, 64]", "reconstruction.mirror=false",
                 "validation.split=null", "loop.mixed_precision=no", "cache=a=b", "optim.lr=3e-3"]  # fmt: skip
    run = read(file, AUTOENCODER, overrides)
    assert run.optim.lr == 3e-3
    assert run.codec.autoencoder.widths == (32, 64)
    assert run.reconstruction.mirror is False
    assert run.validation.split is None
    assert run.loop.mixed_precision == "no"
    assert run.cache == "a=b"
    assert read(file, AUTOENCODER + "reconstruction:\n", ["reconstruction.kl=0"]).reconstruction.kl == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "--set optim.lr: expected a.b=value"),
        ("=3", "--set =3: expected a.b=value"),
        ("optim..lr=3", "--set optim..lr=3: expected a.b=value"),
        ("optim.lr.x=3", "--set optim.lr.x=3: lr is a value, not a section"),
        ("optim.lr=[", "--set optim.lr:1: expected the node content, but found '<stream end>'"),
        ("optim.lr=*x", "--set optim.lr:1: aliases (*name) are not supported"),
        ("optim.lrr=3", "--set optim.lrr: optim.lrr: unknown key; did you mean lr?"),
        ("optim={lr: 1e-3, lr: 2e-3}", "--set optim:1: duplicate key 'lr'"),
        ("loop=", "--set loop: loop: must be a section of keys and values (got None)"),
        ("kind=foo", f"--set kind: kind: must be one of {KINDS} (got 'foo')"),
        ("loop.batch=0", "--set loop.batch: loop.batch: batch 0 must be from 1 to"),
    ],
)
def test_overrides_that_cannot_be_used_name_themselves(file: Path, override: str, expected: str) -> None:
    (line,) = refusal(file, AUTOENCODER, [override])
    assert line.startswith(expected)


@pytest.mark.parametrize("text", [AUTOENCODER, DIFFUSION])
def test_a_config_survives_the_round_trip(file: Path, text: str) -> None:
    odd = ["1e-4", "no", "010", "null", "1_0", "", " x: y #", "a\nb", "sunflower 🌻", "2020-01-01", "0x10", "~"]
    for name in odd[:5]:
        config = replace(read(file, text), cache=name)
        assert read(file, to_yaml(config)) == config
    if isinstance(config, DiffusionRun):
        config = replace(config, preview=replace(config.preview, prompts=tuple(odd)))
    assert read(file, to_yaml(config)) == config
    assert hash(config) == hash(read(file, to_yaml(config)))
    assert yaml.safe_load(to_yaml(config))["loop"]["mixed_precision"] == "no"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_config_parses(path: Path, file: Path) -> None:
    config = load(RunConfig, path)
    assert read(file, to_yaml(config)) == config
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(rf"# .*\bldm train {re.escape(str(path))}( |$)", first)


def test_there_are_configs() -> None:
    assert {p.parent.name for p in CONFIGS} >= {"emoji", "tiny"}


def test_data_from_json_is_as_strict() -> None:
    good = {"mean": [0, 1.5], "std": [1.0, 2]}
    assert parse(Normalisation, good, "stage.json") == Normalisation((0.0, 1.5), (1.0, 2.0))
    with pytest.raises(ConfigError, match=r"^stage\.json: mean\.0: must be a finite number \(got nan\)$"):
        parse(Normalisation, {**good, "mean": [float("nan")]}, "stage.json")
    with pytest.raises(ConfigError, match="unshuffle: must be a whole number"):
        parse(CodecConfig, {"unshuffle": True}, "config.json")
    with pytest.raises(ConfigError, match=r"^config\.json: expected sections"):
        parse(CodecConfig, [], "config.json")
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse(CodecConfig, {"unshuffle": deep}, "config.json")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_cpu_without_it_is_refused_with_the_reason(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: False)
    config = LoopConfig(images=64_000, mixed_precision=precision)
    with pytest.raises(UserError, match=rf"loop\.mixed_precision: {precision} .* CPU: .*slower.*mixed_precision=no"):
        check_precision(config, torch.device("cpu"))
    check_precision(replace(config, mixed_precision="no"), torch.device("cpu"))
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: True)
    check_precision(replace(config, mixed_precision="bf16"), torch.device("cpu"))
    with pytest.raises(UserError):
        check_precision(replace(config, mixed_precision="fp16"), torch.device("cpu"))


@pytest.mark.parametrize("ending", ["schedule.kind=flow", "schedule.zero_terminal=true"])
def test_eps_is_refused_where_it_says_nothing_of_x0(file: Path, ending: str) -> None:
    (line,) = refusal(file, DIFFUSION, [ending, "denoiser.target=eps"])
    assert "eps does not determine x0 at t = 1" in line
    file.write_text(DIFFUSION)
    load(RunConfig, file, [ending, "denoiser.target=v"])
