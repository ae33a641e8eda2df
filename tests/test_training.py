"""Training end to end on tests/data: resume, determinism, keyed draws, options, golden losses."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ldm.config import UserError, load
from ldm.draws import keyed_generator
from ldm.weights import load_codec
from pipelines.cascade import load_cascade
from training import checkpoint, loop, plan, tasks
from training.checkpoint import Snapshot
from training.loader import BatchOrder, order
from training.optim import OptimConfig, learning_rate
from training.run import average, train
from training.stop import Interrupted
from training.tasks import RunConfig, build_task

ROOT = Path(__file__).parent.parent
SHORT = ["loop.images=320", "loop.log_every_images=16", "loop.save_every_images=64", "loop.preview_every_images=160",
         "loop.trackers=[]"]  # fmt: skip


def shared(tmp: Path, *more: str) -> list[str]:
    data = f"data.path={ROOT / 'tests/data/emoji'}"
    return [*SHORT, data, f"cache={tmp / 'cache'}", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short tiny autoencoder run, ae/, and the cache beside it."""
    tmp = tmp_path_factory.mktemp("runs")
    train(ROOT / "configs/tiny/autoencoder.yaml", tmp / "ae", shared(tmp))
    return tmp


def base_overrides(runs: Path, name: str = "base") -> list[str]:
    text = {"base_clip": "clip", "base_t5": "t5"}.get(name)
    more = [f"text.path={ROOT / 'tests/data/text' / text}"] if text else []
    needs = {"clip": [], "judge": [], "palette": [], "noisy_classifier": [f"model={runs / 'base_t5/final'}"]}
    return shared(runs, *needs.get(name, [f"codec={runs / 'ae/final'}"]), *more)


@pytest.fixture(scope="module")
def base(runs: Path) -> Path:
    train(ROOT / "configs/tiny/base_t5.yaml", runs / "base_t5", base_overrides(runs, "base_t5"))
    return runs / "base_t5"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(run)
    assert found is not None
    return {f"{p.stem}.{k}": v for p in found.glob("*.safetensors") for k, v in load_file(p).items()}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """How many there are decides in which order sums are taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestRun:
    def test_run_folder_is_whole(self, runs: Path, base: Path) -> None:
        for run in (runs / "ae", base):
            names = {p.name for p in run.iterdir()}
            assert {"config.yaml", "environment.json", "metrics.jsonl", "samples", "checkpoints", "final"} <= names
            assert sorted(p.name for p in (run / "samples").iterdir())[0] == "000000000.png"
        assert load_codec(runs / "ae/final").module.config.latent_channels == 8
        assert load_cascade(base / "final").text.config.kind == "t5"

    @pytest.mark.parametrize(("name", "stops", "more"), [
        pytest.param("base_t5", [1], [], marks=pytest.mark.slow),
        # the data holds 93 pictures: every third step ends an epoch
        ("base_t5", [3, 6, 8], ["loop.batch=31", "loop.images=310"]),
        ("base_t5", [5], ["loop.memory_format=channels_last", "ema.every_steps=4", "ema.powers=[0.1]",
                          "loop.images=128"]),
        ("base_t5", [4], ["encode=online", "denoiser.weighting=learned", "loop.images=128"]),
        ("autoencoder", [3, 7], ["loop.images=160"]),
        ("autoencoder", [3], ["loop.images=96", "loop.workers=2"]),
        ("sr", [4], ["loop.images=128"]),
        ("palette", [4], ["loop.images=128"]),
    ])  # fmt: skip
    def test_interrupted_run_resumes_to_equal_weights(
        self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stops: list[int], more: list[str]
    ) -> None:
        real, count = loop._step, 0

        def step(*args: object) -> object:
            nonlocal count
            count += 1
            if count in stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)  # type: ignore[arg-type]

        config, overrides = ROOT / f"configs/tiny/{name}.yaml", [*base_overrides(runs, name), *more]
        if name == "autoencoder":
            overrides.remove(f"codec={runs / 'ae/final'}")
        straight = train(config, tmp_path / "straight", overrides).parent
        monkeypatch.setattr(loop, "_step", step)
        for _ in stops:
            with pytest.raises(Interrupted) as stopped:
                train(config, tmp_path / "run", overrides)
            assert stopped.value.exit_code == 3
        train(config, tmp_path / "run", overrides)
        whole = load(RunConfig, config, overrides).loop
        assert count == whole.images // whole.batch
        resumed, expected = weights(tmp_path / "run"), weights(straight)
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[k], expected[k]) for k in expected)

    def test_neither_accumulation_nor_workers_nor_online_encoding_change_a_loss(
        self, runs: Path, base: Path, tmp_path: Path
    ) -> None:
        online = "encode=online"
        for number, more in enumerate((["loop.accumulation=4"], ["loop.workers=2"], [online, "data.workers=2"])):
            run = tmp_path / str(number)
            train(ROOT / "configs/tiny/base_t5.yaml", run, [*base_overrides(runs, "base_t5"), *more])
            assert losses(run) == pytest.approx(losses(base), rel=1e-4)

    def test_what_encodes_in_training_is_not_prepared_ahead(self, runs: Path, base: Path, tmp_path: Path) -> None:
        for name, more in (("inpainting", []), ("base_t5", ["encode=online"])):
            overrides = [*base_overrides(runs, name), "loop.workers=1", *more]
            with pytest.raises(UserError, match=r"Set loop\.workers=0"):
                train(ROOT / f"configs/tiny/{name}.yaml", tmp_path / name, overrides)

    def test_activation_checkpointing_changes_no_loss(self, runs: Path, base: Path, tmp_path: Path) -> None:
        overrides = [*base_overrides(runs, "base_t5"), "loop.activation_checkpointing=true"]
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides)
        assert losses(tmp_path / "run") == pytest.approx(losses(base), rel=1e-5)

    @pytest.mark.slow
    def test_compiled_blocks_give_the_same_losses(self, runs: Path, base: Path, tmp_path: Path) -> None:
        overrides = [*base_overrides(runs, "base_t5"), "loop.compile=true"]
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides)
        assert losses(tmp_path / "run") == pytest.approx(losses(base), rel=1e-4)

    def test_the_layout_is_measured_once(self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        overrides = [*base_overrides(runs, "base_t5"), "loop.memory_format=auto", "loop.images=64"]
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides)
        chosen = json.loads((tmp_path / "run/chosen.json").read_text())
        assert set(chosen["seconds"]) == {"contiguous", "channels_last"}
        monkeypatch.setattr(plan, "_trial", lambda *args: pytest.fail("measured again"))
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", [*overrides, "loop.images=128"])
        assert json.loads((tmp_path / "run/chosen.json").read_text()) == chosen

    def test_init_starts_from_released_weights(self, runs: Path, base: Path, tmp_path: Path) -> None:
        for name, run in (("autoencoder", runs / "ae"), ("base_t5", base)):
            overrides = [*base_overrides(runs, name), f"init={run / 'final'}", "optim.lr=1e-12", "optim.weight_decay=0"]
            if name == "autoencoder":
                overrides.remove(f"codec={runs / 'ae/final'}")
            final = train(ROOT / f"configs/tiny/{name}.yaml", tmp_path / name, overrides)
            mine, theirs = (
                load_codec(f).module.state_dict() if name == "autoencoder"
                else load_cascade(f).stages[0].denoiser.state_dict() for f in (final, run / "final")
            )  # fmt: skip
            assert all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in theirs)
        other = [*base_overrides(runs, "base_t5"), f"init={base / 'final'}", "unet.widths=[32, 96]"]
        with pytest.raises(UserError, match="does not fit its config"):
            train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "other", other)

    def test_dry_run_tries_everything_and_leaves_nothing(
        self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        overrides = [*base_overrides(runs, "base_t5"), f"cache={tmp_path / 'cache'}"]
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides, dry_run=True)
        assert not list(tmp_path.iterdir())
        out = capsys.readouterr().out
        assert "resuming from" in out
        assert "nothing was written to" in out
        assert "0.98 million parameters" in out.partition("dry run:")[2]
        monkeypatch.setattr(tasks.DiffusionTask, "export", lambda *args: (_ for _ in ()).throw(UserError("no export")))
        with pytest.raises(UserError, match="no export"):
            train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides, dry_run=True)

    def test_a_run_that_memory_cannot_hold_is_refused_with_what_to_change(
        self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        overrides = [*base_overrides(runs, "base_t5"), f"cache={tmp_path / 'cache'}"]
        free = SimpleNamespace(available=15_000_000)  # gradients, two moments, an average of 0.98 M: 15.7 MB
        monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: free)
        with pytest.raises(UserError, match=r"before any picture, and 0\.0 GB are free"):
            train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides, dry_run=True)
        free.available = 16_000_000
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides, dry_run=True)

    def test_averages_of_other_lengths_are_made_after_training(self, runs: Path, tmp_path: Path) -> None:
        more = ["ema.powers=[0.05, 0.15]", "ema.snapshot_every_images=32"]
        overrides = [*base_overrides(runs, "base_t5"), *more]
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides)
        out = average(tmp_path / "run", 0.1, tmp_path / "averaged")
        net = load_cascade(out).stages[0].denoiser
        final = weights(tmp_path / "run")
        lengths = [final[f"ema-{p}.denoiser.net.conv_in.weight"] for p in ("0.05", "0.15")]
        mine, plain = net.state_dict()["net.conv_in.weight"], final["model.denoiser.net.conv_in.weight"]
        between = [float((mine - other).norm()) for other in (*lengths, plain)]
        assert max(between[:2]) < float((lengths[1] - plain).norm())
        with pytest.raises(UserError, match="exists"):
            average(tmp_path / "run", 0.1, out)

    def test_an_out_of_memory_preview_does_not_end_a_run(
        self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def preview(*args: object) -> None:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(tasks.DiffusionTask, "preview", preview)
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", base_overrides(runs, "base_t5"))
        assert "no preview: out of memory (no room); training goes on" in capsys.readouterr().out

    @pytest.mark.parametrize("name", [
        "autoencoder", "base", "base_clip", "base_t5", "clip", "inpainting", "judge", "noisy_classifier", "sr",
    ])  # fmt: skip
    def test_golden_losses(self, runs: Path, base: Path, name: str) -> None:
        """Losses of twenty steps at one thread are those in git, of one of the CPUs that wrote some: rounding differs
        between them, and grows to a hundredth of CLIP's loss. UPDATE_GOLDEN=1 writes them anew, =add another CPU's."""
        run = runs / {"autoencoder": "ae"}.get(name, name)
        if not run.exists():
            train(ROOT / f"configs/tiny/{name}.yaml", run, base_overrides(runs, name))
        assert len(losses(run)) == 20
        path = ROOT / "tests/golden.json"
        golden = json.loads(path.read_text()) if path.exists() else {}
        update = os.environ.get("UPDATE_GOLDEN")
        if update:
            before = golden[name] if update == "add" else []
            path.write_text(json.dumps({**golden, name: [*before, losses(run)]}, indent=1) + "\n")
        else:
            known = [pytest.approx(each, rel=1e-4) for each in golden[name]]
            assert losses(run) in known, losses(run)

    @pytest.mark.slow
    def test_tiny_configs_reach_the_numbers_in_their_first_lines(self, tmp_path: Path) -> None:
        data, cache = f"data.path={ROOT / 'tests/data/emoji'}", f"cache={tmp_path / 'cache'}"
        train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path / "ae", [data, cache])
        overrides = [data, cache, f"codec={tmp_path / 'ae/final'}"]
        for name in ("base", "sr"):
            train(ROOT / f"configs/tiny/{name}.yaml", tmp_path / name, overrides)
        measures = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
                    for name in ("ae", "base", "sr")]  # fmt: skip
        assert measures[0]["psnr_db"] >= 13
        assert measures[1]["loss_mean"] < 0.6
        assert measures[2]["loss_mean"] < 0.6

    def test_run_of_another_config_is_refused(self, runs: Path) -> None:
        with pytest.raises(UserError, match=r"optim\.lr: 0\.004 there, 0\.001 now"):
            train(ROOT / "configs/tiny/autoencoder.yaml", runs / "ae", shared(runs, "optim.lr=1e-3"))

    def test_run_on_changed_data_is_refused(self, tmp_path: Path) -> None:
        data = shutil.copytree(ROOT / "tests/data/emoji", tmp_path / "data")
        overrides = [*SHORT, f"data.path={data}", f"cache={tmp_path / 'cache'}"]
        train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path / "run", overrides)
        lines = (data / "metadata.jsonl").read_text().splitlines()
        (data / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
        with pytest.raises(UserError, match="trained on other data"):
            train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path / "run", overrides)

    def test_pruning_keeps_the_newest_and_what_was_just_written(self, tmp_path: Path) -> None:
        for images in (10, 40, 20, 30):
            checkpoint.save(tmp_path, Snapshot({"model": {"w": torch.zeros(2)}}, {"images": images}), 2, {})
        kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert kept == ["step-000000000020", "step-000000000030", "step-000000000040"]

    def test_folder_in_the_way_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(UserError, match="nothing was changed"):
            train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path, shared(tmp_path.parent))
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


class TestLoader:
    def test_every_item_once_per_epoch_in_an_order_of_seed_and_epoch(self) -> None:
        assert sorted(order(0, 0, 50).tolist()) == list(range(50))
        assert order(0, 0, 50).tolist() != order(0, 1, 50).tolist()
        assert order(0, 0, 50).tolist() != order(1, 0, 50).tolist()

    @pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
    def test_draws_belong_to_positions(self, runs: Path, world: int, accumulation: int) -> None:
        """World size and accumulation change which process draws an image, never what is drawn."""
        task = build_task(load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", shared(runs)))
        size = 16 // (world * accumulation)
        seen: dict[int, tuple[int, float]] = {}
        for rank in range(world):
            loader = iter(BatchOrder(task.cache, 3, 80, size, 16, world, rank))
            for _ in range(2 * accumulation):
                batch = next(loader)
                draws = batch.uniform().tolist()
                for index, draw, place in zip(batch.indices, draws, batch.places, strict=True):
                    seen[len([s for s in seen if s % 16 == place]) * 16 + place] = (index, draw)
        count = len(task.cache)
        for position, (index, draw) in seen.items():
            p = 80 + position
            assert index == int(order(3, p // count, count)[p % count])
            assert draw == float(torch.rand((), generator=keyed_generator(3, "image", p), dtype=torch.float64))
        assert len(seen) == 32


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimConfig(lr=1e-3, warmup_images=100, final=0.1)
    rates = [learning_rate(config, n, 1000) for n in range(0, 1001, 10)]
    assert rates[0] == pytest.approx(1e-5, rel=1e-3)
    assert max(rates) <= 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[12:]))
