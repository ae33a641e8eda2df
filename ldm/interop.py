"""The parts of diffusers' pipeline folders as ours, and back: configs only, no weights.

    unet/config.json      -> UNetConfig + UNetShape          vae/config.json -> AutoencoderConfig + Normalisation
    scheduler_config.json -> NoiseScheduleConfig + DenoiserConfig + how to sample

What a file says that we do not build is refused by name, never ignored: a network built without it would draw
something else. Classes are named here, and never by a file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ldm.config import UserError
from ldm.denoiser import SIZES, DenoiserConfig
from ldm.latents import Normalisation
from ldm.models.autoencoder import AutoencoderConfig, autoencoder_arguments
from ldm.models.unet import UNetConfig, UNetShape, each_level, unet_arguments
from ldm.noise import NoiseScheduleConfig

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = {"trailing": "uniform", "leading": "leading", "linspace": "linspace"}
# what changes no number in float32, or is read apart
_ASIDE = ("sample_size", "upcast_attention", "force_upcast", "scaling_factor", "shift_factor", "latents_mean",
          "latents_std")  # fmt: skip
_PER_LEVEL = ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention", "layers_per_block")
_SAMPLERS = {
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun", "DPMSolverMultistepScheduler": "dpmpp_2m", "UniPCMultistepScheduler": "unipc",
}  # fmt: skip
_CLASSES = {**{ours: name for name, ours in _SAMPLERS.items()}, "dpmpp_2m_sde": "DPMSolverMultistepScheduler"}
# of schedulers: what is read, or changes nothing
_SCHEDULER_READ = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample"),
    *("clip_sample_range", "variance_type", "set_alpha_to_one", "steps_offset", "timestep_spacing", "solver_order"),
    *("algorithm_type", "use_karras_sigmas", "lower_order_final", "euler_at_final"),
)
_STAND_IN = "dpmpp_2m"
_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler_config.json says: the process, what the network predicts, and fields of a SamplingConfig."""

    schedule: NoiseScheduleConfig
    denoiser: DenoiserConfig
    sampling: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_unet(data: Mapping[str, Any], place: str) -> tuple[UNetConfig, UNetShape]:
    """A U-Net's config.json. The shape counts all input channels beyond the output's as small pictures.

    Raises UserError, naming the field, for what `build_unet` does not build.
    """
    said = _said(UNet2DConditionModel, data, place)
    try:
        widths = tuple(said["block_out_channels"])
        down = list(said["down_block_types"])
        attends = said["only_cross_attention"]
        unet = UNetConfig(
            widths=widths,
            layers_per_block=said["layers_per_block"],
            attention=tuple("CrossAttn" in name for name in down),
            heads=_plain(said["attention_head_dim"]),
            norm_groups=said["norm_num_groups"],
            self_attention=tuple(not a for a in attends) if isinstance(attends, Sequence) else not attends,
            adaptive_norm=said["resnet_time_scale_shift"] == "scale_shift",
            transformer_layers=_plain(said["transformer_layers_per_block"]),
            linear_projection=bool(said["use_linear_projection"]),
            level_table=said["num_class_embeds"] or 0,
            sizes=_pooled(said)[0],
            pooled=_pooled(said)[1],
        )
        latents, inside = said["out_channels"], said["in_channels"]
        shape = UNetShape(latents, said["cross_attention_dim"], low_res=inside - latents)
        wanted = unet_arguments(unet, shape)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{place}: {error}") from None
    _refuse_others(UNet2DConditionModel, said, wanted, len(widths), place)
    return unet, shape


def _pooled(said: Mapping[str, Any]) -> tuple[int, int]:
    """`sizes` and `pooled` of a network of Stable Diffusion XL, 0 for any other."""
    if said["addition_embed_type"] != "text_time":
        return 0, 0
    names = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    sizes, whole = (said[name] for name in names)
    if not (isinstance(sizes, int) and isinstance(whole, int)):
        raise ValueError(f"addition_embed_type text_time needs {' and '.join(names)}")
    return sizes, whole - SIZES * sizes


def read_autoencoder(data: Mapping[str, Any], place: str) -> tuple[AutoencoderConfig, Normalisation]:
    """An AutoencoderKL's config.json, and its scale as statistics of a stage: model units are (raw - shift) scale.

    Raises UserError, naming the field, for what `build_autoencoder` does not build.
    """
    said = _said(AutoencoderKL, data, place)
    try:
        autoencoder = AutoencoderConfig(
            widths=tuple(said["block_out_channels"]), layers_per_block=said["layers_per_block"],
            latent_channels=said["latent_channels"], mid_attention=said["mid_block_add_attention"],
            norm_groups=said["norm_num_groups"], quant_conv=said["use_quant_conv"],
        )  # fmt: skip
        channels = autoencoder.latent_channels
        mean, std = said["shift_factor"] or 0.0, 1 / said["scaling_factor"]
        normalisation = Normalisation((float(mean),) * channels, (float(std),) * channels)
        wanted = autoencoder_arguments(autoencoder, said["in_channels"])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{place}: {error}") from None
    if said["latents_mean"] is not None or said["latents_std"] is not None:
        raise UserError(f"{place}: latents_mean and latents_std are of other pipelines than are read here")
    _refuse_others(AutoencoderKL, said, wanted, len(autoencoder.widths), place)
    return autoencoder, normalisation


def read_schedule(data: Mapping[str, Any], place: str) -> NoiseScheduleConfig:
    """The process of a scheduler_config.json. Raises UserError for betas that are none of ours."""
    betas = data.get("beta_schedule", "linear")
    if not isinstance(betas, str) or betas not in BETAS or data.get("trained_betas") is not None:
        raise UserError(f"{place}: beta_schedule {betas!a} (trained_betas {data.get('trained_betas')!a}) is not one of "
                        f"{', '.join(BETAS)}")  # fmt: skip
    try:
        return NoiseScheduleConfig(
            kind=BETAS[betas], steps=data.get("num_train_timesteps", 1000),  # type: ignore[arg-type]
            beta_start=data.get("beta_start", 1e-4), beta_end=data.get("beta_end", 0.02),
            zero_terminal=bool(data.get("rescale_betas_zero_snr", False)),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from None


def read_scheduler(data: Mapping[str, Any], place: str) -> Scheduler:
    """A scheduler_config.json. One that we lack is taken for DPM-Solver++ 2M on its own times, and a note says so.

    Raises UserError for betas and predictions that are none of ours.
    """
    name, notes = str(data.get("_class_name")), []
    prediction = data.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise UserError(f"{place}: prediction_type {prediction!a} is not one of {', '.join(PREDICTIONS)}")
    if data.get("thresholding"):
        raise UserError(f"{place}: thresholding is not drawn here; set it to false")
    sampler = _sampler(name, data)
    if sampler is None:
        notes.append(f"scheduler {name}: drawn by {_STAND_IN} (DPM-Solver++ 2M), on diffusers' leading steps")
    default = "leading" if sampler is None else _defaults(getattr(diffusers, name)).get("timestep_spacing", "leading")
    called = data.get("timestep_spacing", default)
    spacing = SPACINGS.get(str(called))
    if sampler is None:
        spacing = "leading"
    elif spacing is None or (spacing == "linspace" and name not in _MULTISTEP):
        notes.append(f"scheduler {name}: timestep_spacing {called!a} is drawn as trailing")
        spacing = "uniform"
    if data.get("use_karras_sigmas") and sampler is not None:
        notes.append(f"scheduler {name}: use_karras_sigmas is drawn on our own grid karras, whose ends differ a little")
        spacing = "karras"
    sampling: dict[str, Any] = {"sampler": sampler or _STAND_IN, "grid": spacing}
    if spacing == "leading":
        sampling["offset"] = data.get("steps_offset", 0)
    if sampler == "ddim":
        sampling["clean"] = bool(data.get("set_alpha_to_one", True))
    if sampler == "ddpm":
        sampling["variance"] = float(str(data.get("variance_type", "fixed_small")).startswith("fixed_large"))
    others = {} if sampler is None else _unread(name, data)
    if others:
        notes.append(f"scheduler {name}: {', '.join(f'{k} {v!a}' for k, v in others.items())}: not drawn so")
    clip = name in ("DDIMScheduler", "DDPMScheduler") and data.get("clip_sample", True)  # others have no such thing
    try:
        denoiser = DenoiserConfig(target=PREDICTIONS[prediction],  # type: ignore[arg-type]
                                  clip_x0=float(data.get("clip_sample_range", 1.0)) if clip else None)  # fmt: skip
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: clip_sample_range: {error}") from None
    return Scheduler(read_schedule(data, place), denoiser, sampling, notes)


def _unread(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one of our schedulers that are neither read nor its defaults."""
    defaults = _defaults(getattr(diffusers, name))
    return {key: value for key, value in data.items() if not key.startswith("_") and key not in _SCHEDULER_READ
            and _plain(value) != _plain(defaults.get(key, value))}  # fmt: skip


def _sampler(name: str, data: Mapping[str, Any]) -> str | None:
    """Ours that makes the same steps, None where there is none."""
    sampler = _SAMPLERS.get(name)
    if sampler == "dpmpp_2m":
        kinds = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}
        sampler = kinds.get(str(data.get("algorithm_type", "dpmsolver++")))
    if name in _MULTISTEP and data.get("solver_order", 2) != 2:
        return None
    learned = str(data.get("variance_type", "fixed_small")).startswith("learned")
    return None if sampler == "ddpm" and learned else sampler


def write_scheduler(schedule: NoiseScheduleConfig, denoiser: DenoiserConfig,
                    sampling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """The class and the config of the scheduler that makes these steps; sampling: fields of a SamplingConfig.

    Raises UserError for what no stock scheduler says.
    """
    betas = {ours: theirs for theirs, ours in BETAS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    spacings = {ours: theirs for theirs, ours in SPACINGS.items()} | {"karras": "leading"}
    for what, value, known in (("schedule.kind", schedule.kind, betas), ("target", denoiser.target, predictions),
                               ("sampling.grid", sampling["grid"], spacings)):  # fmt: skip
        if value not in known:
            raise UserError(f"{what} {value}: stock schedulers know {', '.join(known)} alone")
    name, grid = _CLASSES[sampling["sampler"]], sampling["grid"]
    ancestral = name in ("DDIMScheduler", "DDPMScheduler")
    lost = {
        "grid linspace": grid == "linspace" and name not in _MULTISTEP,
        "grid karras": grid == "karras" and ancestral,
        "clean: false": not sampling["clean"] and name != "DDIMScheduler",
        "eta and churn": bool(sampling["eta"] or sampling["churn"]),
        "clip_x0": denoiser.clip_x0 is not None and not ancestral,
        "zero_terminal": schedule.zero_terminal and name == "HeunDiscreteScheduler",
        "a learned variance": denoiser.variance == "learned",
    }
    for what, applies in lost.items():
        if applies:
            raise UserError(f"{what}: not something that a {name} remembers; set another sampler or grid in stage.json")
    config: dict[str, Any] = {
        "beta_schedule": betas[schedule.kind], "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start, "beta_end": schedule.beta_end,
        "prediction_type": predictions[denoiser.target], "timestep_spacing": spacings[grid],
        "steps_offset": sampling["offset"],
    }  # fmt: skip
    if name != "HeunDiscreteScheduler":
        config["rescale_betas_zero_snr"] = schedule.zero_terminal
    if grid == "karras":
        config["use_karras_sigmas"] = True
    if ancestral:
        config |= {"clip_sample": denoiser.clip_x0 is not None, "clip_sample_range": denoiser.clip_x0 or 1.0}
    if name == "DDIMScheduler":
        config["set_alpha_to_one"] = sampling["clean"]
    if name == "DDPMScheduler":
        config["variance_type"] = "fixed_large" if sampling["variance"] else "fixed_small"
    if name == "DPMSolverMultistepScheduler":
        config["algorithm_type"] = "sde-dpmsolver++" if sampling["sampler"] == "dpmpp_2m_sde" else "dpmsolver++"
    return name, config


def _said(network: type, data: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The arguments of a network by a config.json: what it says, the class's defaults for the rest."""
    found = _defaults(network)
    own = {name: value for name, value in data.items() if not name.startswith("_")}
    unknown = sorted(own.keys() - found.keys())
    if unknown:
        raise UserError(f"{place}: {', '.join(unknown[:5])}: not of an {network.__name__} as this version knows it")
    return found | own


def _refuse_others(network: type, said: Mapping[str, Any], built: Mapping[str, Any], levels: int, place: str) -> None:
    """Raise UserError for the first argument that is not what would be built."""
    would = {**_defaults(network), **built}
    for name, value in said.items():
        values = [value, would[name]]
        if name in _PER_LEVEL:
            values = [each_level(each, levels) for each in values]
        if name not in _ASIDE and _plain(values[0]) != _plain(values[1]):
            raise UserError(f"{place}: {name} is {value!a}, which is not built here (only {would[name]!a})")


def _defaults(network: type) -> dict[str, Any]:
    parameters = inspect.signature(network.__init__).parameters  # type: ignore[misc]
    return {name: each.default for name, each in parameters.items() if name != "self"}


def _plain(value: Any) -> Any:
    """Lists of a JSON file as the tuples they stand for."""
    return tuple(_plain(each) for each in value) if isinstance(value, (list, tuple)) else value
