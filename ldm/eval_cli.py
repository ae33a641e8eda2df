"""`ldm eval`: what was trained, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

eval_app = typer.Typer(help="Measure what was trained.", no_args_is_help=True)

StageSet = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.A=B", help="Override a stage's sampling, as sr.steps=4.")
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="[STAGE=]PATH[:WEIGHT]", help="A LoRA to add to a stage; may be repeated."),
]
Embeddings = Annotated[
    list[str] | None,
    typer.Option("--embedding", metavar="[WORD=]PATH", help="A word learned by textual inversion; may be repeated."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")]


def tell(line: str) -> None:
    """Print a line to stderr."""
    typer.echo(printable(line), err=True)


def printable(text: str) -> str:
    """The text with whatever could steer a terminal escaped: messages quote names and files of others."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


@eval_app.command("codec")
def eval_codec(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A codec's folder, or a cascade's.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("out/codec"),
    split: Annotated[str, typer.Option(help="The held-out split.")] = "combos",
    size_px: Annotated[list[int] | None, typer.Option(min=8, help="Size of pictures; may be repeated.")] = None,
    pictures: Annotated[int | None, typer.Option(min=2, help="At most so many, evenly spread.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure what a codec loses of held-out pictures."""
    from training.codec_report import evaluate

    typer.echo(str(evaluate(model, data, out, split, size_px or [64], pictures, overwrite, tell=tell)))


@eval_app.command("loss")
def eval_loss(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the report and its curves.")] = Path("out/loss"),
    split: Annotated[str, typer.Option(help="The held-out split.")] = "combos",
    rows: Annotated[int | None, typer.Option(min=2, help="At most so many pictures, evenly spread.")] = None,
    cache: Annotated[Path, typer.Option(help="Where the encoded pictures are kept.")] = Path("cache"),
    overwrite: Overwrite = False,
) -> None:
    """Measure the error of each stage's network by noise level, with and without the caption."""
    from training.loss_report import evaluate

    typer.echo(str(evaluate(model, data, out, split, rows, cache, overwrite, tell=tell)))


@eval_app.command("likelihood")
def eval_likelihood(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder that begins with a base.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the report and its curves.")] = Path("out/likelihood"),
    split: Annotated[str, typer.Option(help="The held-out split.")] = "combos",
    rows: Annotated[int, typer.Option(min=2, help="At most so many pictures, evenly spread.")] = 32,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the bound's process; default: all of them.")] = None,
    ode_steps: Annotated[int, typer.Option(min=0, help="Of the ODE's solver; 0 leaves it out.")] = 100,
    cache: Annotated[Path, typer.Option(help="Where the encoded pictures are kept.")] = Path("cache"),
    overwrite: Overwrite = False,
) -> None:
    """Measure the bits per dimension of held-out pictures: the bound term by term, and the ODE's density."""
    from training.likelihood_report import evaluate

    typer.echo(str(evaluate(model, data, out, split, rows, steps, ode_steps, cache, overwrite, tell=tell)))


@eval_app.command("steering")
def eval_steering(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder that begins with a base.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    judge: Annotated[Path, typer.Option(help="The folder of a classifier that has no part in it.")],
    label: Annotated[str, typer.Option(help="What it looks for: a field of the data's rows.")],
    classifier: Annotated[Path | None, typer.Option(help="The noise-aware classifier that guides.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Or the CLIP that does.")] = None,
    scales: Annotated[str, typer.Option(help="Scales of the gradient, with commas.")] = "0,1,2,4",
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of each scale.")] = 256,
    split: Annotated[str, typer.Option(help="The held-out split.")] = "combos",
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("out/steering"),
    overrides: StageSet = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw with classifier or CLIP guidance at several scales: does an independent judge find more of what is asked?"""
    from training.steering_report import evaluate

    typer.echo(str(evaluate(model, data, out, judge, label, classifier, clip, _numbers(scales), pictures, split,
                            overrides or [], overwrite, tell=tell)))  # fmt: skip


@eval_app.command("control")
def eval_control(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder that begins with a base.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    control: Annotated[Path, typer.Option(help="The ControlNet's folder.")],
    scales: Annotated[str, typer.Option(help="Of what it adds, with commas; 0 is the base alone.")] = "0,0.5,1",
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of each scale.")] = 64,
    split: Annotated[str, typer.Option(help="The held-out split; empty for data without.")] = "combos",
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("out/control"),
    overrides: StageSet = None,
    overwrite: Overwrite = False,
) -> None:
    """Tell a ControlNet of held-out pictures: are the edges, or colours, of what is drawn those that were told?"""
    from training.control_report import evaluate

    typer.echo(str(evaluate(model, data, control, out, _numbers(scales), pictures, split or None, overrides or [],
                            overwrite, tell=tell)))  # fmt: skip


def _numbers(text: str) -> list[float]:
    from ldm.config import UserError

    try:
        return [float(scale) for scale in text.split(",")]
    except ValueError:
        raise UserError(f"--scales {text!a}: numbers with commas, such as 0,1,2,4") from None


@eval_app.command("process")
def eval_process(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder that begins with a base.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/process"),
    split: Annotated[str, typer.Option(help="The split whose pictures and captions are shown.")] = "combos",
    pictures: Annotated[int, typer.Option(min=1, help="So many.")] = 6,
    overwrite: Overwrite = False,
) -> None:
    """Draw the forward process of real pictures, and the reverse one of their captions, step by step."""
    from training.process_report import evaluate

    typer.echo(str(evaluate(model, data, out, split, pictures, overwrite)))


@eval_app.command("pictures")
def eval_pictures(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder that begins with a base.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set, with a split `train` and held-out ones.")],
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("out/pictures"),
    judge: Annotated[Path | None, typer.Option(help="A classifier's folder, for its verdicts.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A CLIP's folder, for likeness to the prompt.")] = None,
    split: Annotated[str, typer.Option(help="The held-out split whose captions are drawn.")] = "combos",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each caption.")] = 4,
    rows: Annotated[int | None, typer.Option(min=2, help="At most so many captions, evenly spread.")] = None,
    stages: Annotated[list[str] | None, typer.Option(help="A stage to run; may be repeated. Default: all.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Other prompts: JSON lines with the fields to find.")] = None,
    cache: Annotated[Path, typer.Option(help="Where features of the training pictures are kept.")] = Path("cache"),
    overrides: StageSet = None,
    loras: Loras = None,
    embeddings: Embeddings = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw pictures for captions never trained on and measure them: do they show it, and how well?"""
    from pipelines.generate import ModelRequest
    from training.picture_report import evaluate

    networks = ModelRequest(model, loras=loras or (), embeddings=embeddings or ())
    typer.echo(str(evaluate(networks, data, out, judge, clip, split, seeds, rows, stages or [], prompts, cache,
                            overrides or [], overwrite, tell=tell)))  # fmt: skip


@eval_app.command("sweep")
def eval_sweep(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder that begins with a base.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set, with a split `train` and held-out ones.")],
    sweep: Annotated[list[str], typer.Option(metavar="FIELD=V,V", help="Sampling fields; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("out/sweep"),
    judge: Annotated[Path | None, typer.Option(help="A classifier's folder, for its verdicts.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Another model beside it; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="The held-out split whose captions are drawn.")] = "combos",
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of each combination.")] = 256,
    cache: Annotated[Path, typer.Option(help="Where features of the training pictures are kept.")] = Path("cache"),
    overwrite: Overwrite = False,
) -> None:
    """Draw by the base alone with every combination of settings: what does quality cost?"""
    from training.picture_sweep import evaluate

    typer.echo(str(evaluate(model, data, out, sweep, judge, against or [], split, pictures, cache, overwrite,
                            tell=tell)))  # fmt: skip


@eval_app.command("cascade")
def eval_cascade(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A cascade folder with an SR stage.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The data set.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, curves.png and pictures.png.")] = Path("out/eval"),
    stage: Annotated[str | None, typer.Option(help="Name of the SR stage; default: the first.")] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Held-out pictures to measure on.")] = 96,
    split: Annotated[str, typer.Option(help="Of the data; empty for all of it.")] = "combos",
    stride: Annotated[int | None, typer.Option(min=2, help="Of data without splits: validation.stride.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Another SR cascade beside it; may be repeated.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=V,V", help="Sampling fields to sweep; default: level=0,0.1,0.2 and steps=1,2,4,8."),
    ] = None,
    sweep_pictures: Annotated[int, typer.Option(min=2, help="Pictures of each cell of the sweep.")] = 32,
    tiled: Annotated[int, typer.Option(min=0, help="Large pictures to enlarge in tiles and at once.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Keep the best setting as the stage's default.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure an SR stage on real small pictures and on the base's, and sweep its sampling."""
    from training.boundary_report import evaluate

    done = evaluate(model, data, out, stage, pictures, split or None, stride, against or (),
                    sweep or ("level=0,0.1,0.2", "steps=1,2,4,8"), sweep_pictures, tiled, save, overwrite,
                    tell=tell)  # fmt: skip
    typer.echo(str(done))
