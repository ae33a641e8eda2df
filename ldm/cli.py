"""The `ldm` command. Each verb calls the Python function of its name; heavy imports happen inside the verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ldm.eval_cli import Embeddings, Loras, Overwrite, StageSet, eval_app, printable, tell

app = typer.Typer(
    name="ldm",
    help="Text-to-image latent diffusion with super-resolution stages: data, training, generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Build or check a data set.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
ckpt_app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)
app.add_typer(ckpt_app, name="ckpt")

Config = Annotated[Path, typer.Argument(help="A YAML file, such as configs/emoji/base.yaml.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a config value; may be repeated.")
]


@app.command()
def doctor() -> None:
    """Say what this machine can run: versions, devices, precisions, optional parts, the shipped model."""
    from pipelines.doctor import doctor

    for line in doctor():
        typer.echo(line)


@data_app.command("emoji")
def data_emoji(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the data set.")],
    packages: Annotated[
        Path | None, typer.Option(help="Folder of the npm tarballs; fetched with npm where missing.")
    ] = None,
    more: Annotated[bool, typer.Option("--more", help="Draw them in six more designs, for a judge.")] = False,
    only: Annotated[str | None, typer.Option(help="Keep one design alone, such as openmoji.")] = None,
) -> None:
    """Build the emoji data set (six designs, captions, splits) from its public npm packages."""
    from training.emoji import SPLITS, build

    built = build(folder, packages, more, only)
    typer.echo(f"{'':22}" + "".join(f"{split:>10}" for split in SPLITS))
    for style in dict.fromkeys(style for _, style in built.counts):
        typer.echo(f"{style:22}" + "".join(f"{built.counts[split, style]:>10}" for split in SPLITS))
    dropped = sum(map(len, built.dropped.values()))
    typer.echo(f"{built.clusters} clusters; {dropped} icons show no Unicode character: see dropped.json")
    typer.echo(str(built.folder))


@data_app.command("digits")
def data_digits(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the data set.")]) -> None:
    """Build the data set of the digits lab from the handwritten digits that scikit-learn carries."""
    from training.digits import build

    for split, count in build(folder).items():
        typer.echo(f"{split:8}{count:>6}")
    typer.echo(str(folder))


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of pictures with captions.")],
    size_px: Annotated[int | None, typer.Option(help="Report pictures smaller than this, too.")] = None,
    model: Annotated[Path | None, typer.Option(help="Whose text encoder captions are for; default: shipped.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="A page to write, with thumbnails.")] = None,
) -> None:
    """Read every sample of a folder and list what is wrong with it; nothing is changed."""
    from functools import cache

    from pipelines.cascade import load_text
    from pipelines.generate import SHIPPED
    from training.check import check

    encoder = cache(lambda: load_text(model or SHIPPED))  # of a set without captions it is not loaded
    report = check(folder, size_px, lambda caption: encoder().token_count(caption), html)
    typer.echo(printable(str(report)))
    if report.bad:
        raise typer.Exit(1)


@app.command()
def encode(
    config: Config,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure on a few, say what it takes, and write nothing.")
    ] = False,
    overrides: Set = None,
) -> None:
    """Write the cache that a training reads: latents or pixels, and text states. Started again, it goes on."""
    from training import run

    if plan:
        typer.echo(run.plan(config, overrides or []))
        return
    cache = run.encode(config, overrides or [])
    typer.echo(f"{len(cache)} items, {len(cache.manifest['refused'])} refused")
    typer.echo(str(cache.folder))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/emoji/base.yaml, or a data set.")],
    run: Annotated[Path | None, typer.Option(help="Run folder; default runs/<folder>-<name> of the config.")] = None,
    resume: Annotated[
        Literal["auto", "must", "never"], typer.Option(help="must: never start anew; never: only start anew.")
    ] = "auto",
    init: Annotated[
        Path | None, typer.Option(help="Start from these released weights (a folder as RUN/final).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check config, data and one step of everything; print the plan; stop.")
    ] = False,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="With --dry-run: shapes and work alone; no data, weights or memory.")
    ] = False,
    preset: Annotated[
        Literal["full", "lora", "control", "inversion", "sr", "decoder"] | None,
        typer.Option(help="Of a data set: train all of the base, a LoRA of it, a ControlNet for it, a word that stands "
                     "for the pictures, the SR stage, or the codec's decoder."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Of a data set: where to begin; default: the shipped one.")] = None,
    overrides: Set = None,
) -> None:
    """Train a stage as a config says, or go on training one on a data set of your own. The same command resumes a run
    that was interrupted."""
    from training import run as module

    given = [*(overrides or []), *([f"init={init}"] if init else [])]
    if shapes and not dry_run:
        raise typer.BadParameter("--shapes says how to do a --dry-run: give both")
    typer.echo(module.shapes(config, given) if shapes
               else str(module.train(config, run, given, resume, dry_run, preset, model)))  # fmt: skip


@ckpt_app.command("ls")
def ckpt_ls(run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]) -> None:
    """List the checkpoints of a run, oldest first, with their sizes."""
    from training.checkpoint import folders, size_bytes

    for folder in folders(run):
        typer.echo(f"{folder.name}  {size_bytes(folder) / 1e6:.1f} MB")


@ckpt_app.command("verify")
def ckpt_verify(run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]) -> None:
    """Read every checkpoint of a run against its manifest; exit code 1 where one is not whole, or has numbers that are
    not finite."""
    from training.checkpoint import fault, folders, poison

    faults = {folder.name: fault(folder) or poison(folder) for folder in folders(run)}
    for name, reason in faults.items():
        typer.echo(f"{name}  {reason or 'whole'}")
    if any(faults.values()):
        raise typer.Exit(1)


@ckpt_app.command("average")
def ckpt_average(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder with snapshots.")],
    length: Annotated[float, typer.Option(help="Length sigma_rel of the average, such as 0.07.")],
    out: Annotated[Path, typer.Option(help="A new folder for the weights.")],
    images: Annotated[int | None, typer.Option(help="Of a snapshot; default the last.")] = None,
) -> None:
    """Make the average of another length after training, from the snapshots of a run."""
    from training.run import average

    typer.echo(str(average(run, length, out, images)))


@ckpt_app.command("join")
def ckpt_join(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Cascade folders, base first.")],
    out: Annotated[Path, typer.Option(help="A new folder for the cascade.")],
    codec: Annotated[Path | None, typer.Option(help="A codec of the same encoder, in place of theirs.")] = None,
    palette: Annotated[Path | None, typer.Option(help="A palette for the base, such as RUN/final of one.")] = None,
) -> None:
    """Put the stages of several folders, such as RUN/final of a base and of an SR run, into one cascade."""
    from pipelines.join import join

    typer.echo(str(join(folders, out, codec, palette)))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    model: Annotated[Path | None, typer.Option(help="A cascade folder; default: the shipped emoji model.")] = None,
    n: Annotated[int, typer.Option("--n", help="Pictures per prompt, 1 to 10000.")] = 4,
    seed: Annotated[int, typer.Option(help="Picture i uses seed + i; -1 draws one at random.")] = 7,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of the first stage; default: its own.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of the first stage, 1 is none; default: its own.")
    ] = None,
    size: Annotated[str, typer.Option(metavar="WxH", help="Width and height; default: the model's squares.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for 0000.png, 0001.png, ... and grid.png.")] = Path("out"),
    overwrite: Overwrite = False,
    overrides: StageSet = None,
    stages: Annotated[str, typer.Option(help="Names of the stages to run, such as base; default: all.")] = "",
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="Write the picture of each stage too, as 0000-base.png.")
    ] = False,
    best_of: Annotated[
        int | None, typer.Option(help="Draw so many of each prompt and keep the --n that --clip finds most like it.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="The folder of the CLIP for --best-of and --clip-scale.")] = None,
    negative: Annotated[str, typer.Option(help="A prompt to guide away from.")] = "",
    weak: Annotated[
        Path | None, typer.Option(help="A weaker cascade, for --set base.guided=network (autoguidance).")
    ] = None,
    classifier: Annotated[Path | None, typer.Option(help="A noise-aware classifier, to guide by its gradient.")] = None,
    toward: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=CLASS", help="What it is to find; may be repeated.")
    ] = None,
    classifier_scale: Annotated[float, typer.Option(help="Of the classifier's gradient.")] = 1.0,
    clip_scale: Annotated[float, typer.Option(help="Of the gradient of CLIP's likeness to the prompt.")] = 0.0,
    loras: Loras = None,
    control: Annotated[Path | None, typer.Option(help="A ControlNet's folder, to be told of --control-from.")] = None,
    control_from: Annotated[Path | None, typer.Option(help="A picture whose edges, or colours, are kept to.")] = None,
    control_scale: Annotated[float, typer.Option(help="How much the ControlNet adds.")] = 1.0,
    embeddings: Embeddings = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Write metadata.jsonl too, which makes a data set of the pictures.")
    ] = False,
) -> None:
    """Draw pictures for prompts; the last line printed is the grid's path."""
    from ldm.config import UserError
    from pipelines.control import ControlRequest
    from pipelines.generate import ModelRequest, generate
    from pipelines.steering import SteeringRequest

    if (control is None) != (control_from is None):
        raise UserError("--control and --control-from go together: a ControlNet's folder, and a picture for it")
    told = ControlRequest(control, control_from, control_scale) if control and control_from else None

    steer = SteeringRequest(classifier, toward or (), classifier_scale, clip, clip_scale)
    chosen = [name.strip() for name in stages.split(",") if name.strip()]
    networks = ModelRequest(model, chosen, None, weak, loras or (), told, embeddings or ())
    done = generate(prompts, networks, n, seed, steps, guidance, out, overwrite, overrides or (), keep_stages, best_of,
                    clip, negative, steer, captions, size, tell)  # fmt: skip
    typer.echo(str(done))


@app.command()
def edit(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file of any size; its centre square.")],
    prompt: Annotated[str, typer.Argument(help="What is to be seen.")],
    mask: Annotated[Path | None, typer.Option(help="A picture of the same size, white where to make it new.")] = None,
    model: Annotated[Path | None, typer.Option(help="A cascade folder; default: the shipped emoji model.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="The time to begin at, to 1; default: 0.6, with a mask 1.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="How often each step is repeated, with a mask (RePaint).")] = 10,
    composite: Annotated[
        bool, typer.Option("--composite/--no-composite", help="Put back what the mask does not mark.")
    ] = True,
    n: Annotated[int, typer.Option("--n", help="Pictures.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; -1 draws one at random.")] = 7,
    steps: Annotated[int | None, typer.Option(help="Of the first stage's sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the first stage; 1 is none.")] = None,
    negative: Annotated[str, typer.Option(help="A prompt to guide away from.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and grid.png.")] = Path("out"),
    overwrite: Overwrite = False,
    overrides: StageSet = None,
    loras: Loras = None,
    embeddings: Embeddings = None,
) -> None:
    """Draw from a picture on, all of it or what a mask marks; the last line printed is the grid's path."""
    from pipelines.edit import edit
    from pipelines.generate import ModelRequest

    networks = ModelRequest(model, loras=loras or (), embeddings=embeddings or ())
    typer.echo(str(edit(picture, prompt, mask, networks, strength, resamples, composite, n, seed, steps, guidance,
                        negative, out, overwrite, overrides or (), tell=tell)))  # fmt: skip


@app.command()
def upscale(
    pictures: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files of any size.")],
    model: Annotated[
        Path | None, typer.Option(help="A cascade folder with SR stages; default: the shipped emoji model.")
    ] = None,
    scale: Annotated[int, typer.Option(help="How many times as large.")] = 4,
    prompt: Annotated[str, typer.Option(help="What the picture shows; none by default.")] = "",
    seed: Annotated[int, typer.Option(help="-1 draws one at random.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for <name>.png.")] = Path("out"),
    overwrite: Overwrite = False,
    overrides: StageSet = None,
    tile: Annotated[int | None, typer.Option(help="Side of a tile, px; default: the size trained on.")] = None,
) -> None:
    """Enlarge pictures by super-resolution stages; prints the plan first, and each file's path."""
    from pipelines.upscale import upscale

    for path in upscale(pictures, model, scale, prompt, seed, out, overwrite, overrides or (), tile, tell=tell):
        typer.echo(str(path))


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A pipeline folder of diffusers, hf:owner/name, or a single file.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder for the cascade.")],
    config: Annotated[
        Path | None, typer.Option(help="Of a single file: a folder, or hf:owner/name, of its architecture.")
    ] = None,
    pickles: Annotated[
        bool, typer.Option("--pickles", help="Open pickled weights too, as tensors alone (weights_only).")
    ] = False,
) -> None:
    """Write a pipeline of diffusers (Stable Diffusion 1.x, 2.x, XL, x4 upscaler) as a cascade folder, in float16."""
    from pipelines.fetch import readable as made_readable
    from pipelines.foreign import check_target, load_pipeline

    with made_readable(source, config, pickles) as readable:
        cascade = load_pipeline(readable)
        for line in (*cascade.notes, check_target(cascade)):
            if line:
                tell(line)
        cascade.save(out)
    typer.echo(str(out))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A cascade folder, or a pipeline of diffusers.")],
    out: Annotated[Path, typer.Argument(help="A new folder, or file.")],
    to: Annotated[
        Literal["diffusers", "single"], typer.Option(help="A pipeline folder, or one file as Stable Diffusion's own.")
    ] = "diffusers",
    stage: Annotated[str | None, typer.Option(help="Which stage, of several.")] = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Of the weights.")] = "float16",
    loras: Loras = None,
) -> None:
    """Write a stage as a folder that the stock pipeline of diffusers loads, or as a single file."""
    import torch

    from pipelines import single_file
    from pipelines.cascade import load_cascade
    from pipelines.foreign import export_pipeline, stock_pipeline

    cascade = load_cascade(model).merged(loras or ())
    cascade = cascade if stage is None else cascade.only(stage)
    for note in cascade.notes:
        tell(note)
    if any(stage.palette is not None for stage in cascade.stages):
        tell("the palette is left out: pipelines of diffusers have none")
    kind = torch.float16 if dtype == "float16" else torch.float32
    typer.echo(str(export_pipeline(cascade, out, kind) if to == "diffusers"
                   else single_file.write(stock_pipeline(cascade, kind), out, kind)))  # fmt: skip


def main() -> Any:
    """Run the command. Exit codes: 0 done, 1 failure, 2 wrong use, 3 interrupted and resumable."""
    try:
        app()
    except Exception as error:
        # imported here, because the help needs neither pydantic nor yaml
        from ldm.config import UserError

        if not isinstance(error, (UserError, OSError)):
            raise
        print(f"ldm: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
