"""Training end to end on tests/data: resume, determinism, keyed draws, caches, guards, golden losses."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.config import UserError, load
from ldm.draws import keyed_generator
from ldm.weights import load_codec
from pipelines.cascade import load_cascade
from training import checkpoint, loop
from training.cache import Cache
from training.data import Reader
from training.ema import Ema, decay
from training.encode import encode
from training.loader import batches, order
from training.optim import OptimConfig, learning_rate
from training.run import train
from training.tasks import RunConfig, build_task

ROOT = Path(__file__).parent.parent
SHORT = ["loop.images=128", "loop.log_every_images=16", "loop.save_every_images=64", "loop.preview_every_images=64"]


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
    return shared(runs, f"codec={runs / 'ae/final'}", *more)


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
    return {f"{n}.{k}": v for n in ("model", "ema") for k, v in load_file(found / f"{n}.safetensors").items()}


class TestRun:
    def test_run_folder_is_whole(self, runs: Path, base: Path) -> None:
        for run in (runs / "ae", base):
            names = {p.name for p in run.iterdir()}
            assert {"config.yaml", "environment.json", "metrics.jsonl", "samples", "checkpoints", "final"} <= names
            assert sorted(p.name for p in (run / "samples").iterdir())[0] == "000000000.png"
        assert load_codec(runs / "ae/final").module.config.latent_channels == 8
        assert load_cascade(base / "final").text.config.kind == "t5"

    @pytest.mark.parametrize(("stop_at", "channels_last"), [(1, False), (5, False), (5, True)])
    def test_interrupted_run_resumes_to_equal_weights(
        self, runs: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, channels_last: bool
    ) -> None:
        real, count = loop._step, 0

        def step(*args: object) -> dict[str, float]:
            nonlocal count
            count += 1
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "_step", step)
        config, overrides = ROOT / "configs/tiny/base_t5.yaml", base_overrides(runs, "base_t5")
        if channels_last:
            overrides.append("loop.channels_last=true")
            monkeypatch.setattr(loop, "_step", real)
            base = train(config, tmp_path / "straight", overrides).parent
            monkeypatch.setattr(loop, "_step", step)
        with pytest.raises(loop.Interrupted) as stopped:
            train(config, tmp_path / "run", overrides)
        assert stopped.value.exit_code == 3
        train(config, tmp_path / "run", overrides)
        assert count == 8
        resumed, straight = weights(tmp_path / "run"), weights(base)
        assert all(torch.equal(resumed[k], straight[k]) for k in straight)

    def test_accumulation_changes_no_draw(self, runs: Path, base: Path, tmp_path: Path) -> None:
        overrides = [*base_overrides(runs, "base_t5"), "loop.accumulation=2"]
        train(ROOT / "configs/tiny/base_t5.yaml", tmp_path / "run", overrides)
        assert losses(tmp_path / "run") == pytest.approx(losses(base), rel=1e-4)

    @pytest.mark.parametrize("name", ["autoencoder", "base", "base_clip", "base_t5"])
    def test_golden_losses(self, runs: Path, base: Path, name: str) -> None:
        """Losses of the first eight steps are those in git. UPDATE_GOLDEN=1 writes them anew."""
        run = runs / {"autoencoder": "ae"}.get(name, name)
        if not run.exists():
            train(ROOT / f"configs/tiny/{name}.yaml", run, base_overrides(runs, name))
        path = ROOT / "tests/golden.json"
        golden = json.loads(path.read_text()) if path.exists() else {}
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(json.dumps({**golden, name: losses(run)}, indent=1) + "\n")
        else:
            assert losses(run) == pytest.approx(golden[name], rel=1e-4)

    @pytest.mark.slow
    def test_tiny_configs_reach_the_numbers_in_their_first_lines(self, tmp_path: Path) -> None:
        data, cache = f"data.path={ROOT / 'tests/data/emoji'}", f"cache={tmp_path / 'cache'}"
        train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path / "ae", [data, cache])
        overrides = [data, cache, f"codec={tmp_path / 'ae/final'}"]
        train(ROOT / "configs/tiny/base.yaml", tmp_path / "base", overrides)
        measures = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in
                    (tmp_path / "ae", tmp_path / "base")]  # fmt: skip
        assert measures[0]["psnr_db"] >= 13
        assert measures[1]["loss_mean"] < 0.6

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

    def test_pruning_keeps_the_newest_and_what_was_just_written(self, runs: Path, tmp_path: Path) -> None:
        module = torch.nn.Linear(2, 2)
        for images in (10, 40, 20, 30):
            checkpoint.save(tmp_path, images, module, module, [], 2, 1, 0.0)
        kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert kept == ["step-000000000020", "step-000000000030", "step-000000000040"]

    def test_folder_in_the_way_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(UserError, match="nothing was changed"):
            train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path, shared(tmp_path.parent))
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_damaged_checkpoint_is_passed_over_aloud(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(base / "checkpoints", tmp_path / "checkpoints")
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        assert newest.name == "step-000000000128"
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (newest / "model.safetensors").write_bytes(data)
        older = checkpoint.newest(tmp_path)
        assert older is not None
        assert older.name == "step-000000000064"
        assert "model.safetensors is damaged" in capsys.readouterr().out

    def test_non_finite_gradient_changes_nothing_and_stops_the_run(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", shared(runs, "loop.images=320"))
        task = build_task(config)
        before = {k: v.clone() for k, v in task.module.state_dict().items()}
        task.module.register_forward_hook(lambda m, a, out: out._replace(losses=[out.losses[0] * float("nan")]))
        with pytest.raises(UserError, match="10 steps in a row"):
            loop.train(task, config.loop, config.optim, 0, tmp_path, {})
        assert all(torch.equal(v, before[k]) for k, v in task.module.state_dict().items())
        assert "step skipped" in capsys.readouterr().out


class TestCache:
    def test_holds_no_held_out_picture(self, runs: Path) -> None:
        task = build_task(load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", shared(runs)))
        rows = [json.loads(x) for x in (ROOT / "tests/data/emoji/metadata.jsonl").read_text().splitlines()]
        held_out = {r["file_name"] for r in rows if r["split"] != "train"}
        assert len(held_out) == 9
        assert {i["key"] for i in task.cache.items} == {r["file_name"] for r in rows} - held_out
        pictures = {task.cache.item(i).numpy().tobytes() for i in range(len(task.cache))}
        for i in range(len(task.held_out)):
            assert task.held_out.item(i).numpy().tobytes() not in pictures

    def test_data_without_splits_is_held_out_by_stride(self, runs: Path) -> None:
        more = ["data.split=null", "validation.split=null", "validation.stride=10"]
        task = build_task(load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", shared(runs, *more)))
        seen, held_out = ({i["key"] for i in c.items} for c in (task.cache, task.held_out))
        assert not seen & held_out
        assert (len(seen), len(held_out)) == (91, 11)

    def test_is_written_once_and_keyed_by_its_inputs(self, runs: Path) -> None:
        config = load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", shared(runs))
        first = encode(Reader(config.data), config.cache)
        stamp = (first.folder / "manifest.json").stat().st_mtime_ns
        assert encode(Reader(config.data), config.cache).folder == first.folder
        assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
        codec = load_codec(runs / "ae/final")
        assert encode(Reader(config.data), config.cache, codec).folder != first.folder

    def test_damage_is_refused(self, runs: Path, tmp_path: Path) -> None:
        config = load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", shared(runs))
        copy = tmp_path / "copy"
        shutil.copytree(encode(Reader(config.data), config.cache).folder, copy)
        shard = copy / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(UserError, match="damaged"):
            Cache(copy)

    def test_text_states_are_those_of_the_encoder(self, runs: Path, base: Path) -> None:
        task = build_task(load(RunConfig, ROOT / "configs/tiny/base_t5.yaml", base_overrides(runs, "base_t5")))
        from ldm.text import TextConfig, load_text_encoder

        encoder = load_text_encoder(TextConfig("t5", str(ROOT / "tests/data/text/t5")))
        row = json.loads((ROOT / "tests/data/emoji/metadata.jsonl").read_text().splitlines()[0])
        states, mask = encoder.encode(["", *row["captions"]])
        cached = task.cache.text([0, *task.cache.items[0]["captions"]])
        assert cached.text is not None
        assert cached.text_mask is not None
        assert mask is not None
        assert torch.equal(cached.text_mask, mask)
        assert torch.allclose(cached.text, states, atol=2e-3)


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
            loader = batches(task.cache, 3, 80, size, 16, world, rank)
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


def test_ema_halves_the_past_in_its_halflife() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = Ema(module)
    torch.nn.init.ones_(module.weight)
    for step in range(10):
        ema.update(module, decay(10_000 + 10 * step, 10, 100))
    assert float(ema.module.weight.detach()) == pytest.approx(0.5)  # type: ignore[operator, arg-type]
