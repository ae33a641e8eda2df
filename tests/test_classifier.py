"""The classifier: its augmentation, its classes, and a training end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.config import UserError, load
from ldm.models.classifier import Classifier, ClassifierConfig, colour_histogram, start_from
from ldm.weights import load_classifier, save_classifier
from tests.tiny import EMOJI, ROOT
from training.cache import Cache
from training.classifier import (
    AugmentationConfig,
    ClassifierModule,
    ClassifierTask,
    among_first,
    augment,
    classify,
    labels_of,
)
from training.loader import Batch
from training.run import train
from training.steps import planes
from training.tasks import RunConfig, build_task

TINY = ClassifierConfig(side_px=32, widths=(8, 8, 16, 16), blocks=(1, 1, 1, 1), norm_groups=4)
STILL = AugmentationConfig(zoom=0, degrees=0, shift=0, colour=0)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ClassifierTask:
    cache = f"cache={tmp_path_factory.mktemp('cache')}"
    made = build_task(load(RunConfig, ROOT / "configs/tiny/judge.yaml", [f"data.path={EMOJI}", cache]))
    assert isinstance(made, ClassifierTask)
    return made


def batch_of(cache: Cache, indices: list[int]) -> Batch:
    generators = [torch.Generator().manual_seed(100 + i) for i in indices]
    return Batch(cache, indices, generators, list(range(len(indices))), len(indices))


def small(task: ClassifierTask, indices: list[int]) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(planes(task.cache.stored(indices)), 2)


def test_no_variation_is_the_picture_shrunk_by_area(task: ClassifierTask) -> None:
    found = augment(batch_of(task.cache, [0, 1, 2]), 32, STILL)
    assert found.shape == (3, 3, 32, 32)
    assert (found - small(task, [0, 1, 2])).abs().max() <= 1.01 / 127.5  # rounded to a byte twice


@pytest.mark.parametrize("field", ["zoom", "degrees", "shift", "colour"])
def test_each_variation_changes_the_picture_within_its_bounds(task: ClassifierTask, field: str) -> None:
    much = {"zoom": 0.5, "degrees": 45.0, "shift": 0.25, "colour": 0.5}[field]
    indices = list(range(8))
    found = augment(batch_of(task.cache, indices), 32, replace(STILL, **{field: much}))
    assert (found - small(task, indices)).abs().mean() > 0.02
    assert found.abs().max() <= 1


def test_beyond_the_border_it_is_white(task: ClassifierTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "stored", lambda self: torch.zeros(len(self), 64, 64, 3, dtype=torch.uint8))
    found = augment(batch_of(task.cache, list(range(8))), 32, replace(STILL, shift=0.4))
    assert set(found.unique().tolist()) >= {-1.0, 1.0}
    corners = found[:, 0][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.amax(1) > 0.9).all(), "a moved square leaves a corner free"


def test_a_shift_moves_the_picture_by_no_more_than_it_says(task: ClassifierTask) -> None:
    indices = list(range(12))
    ink = [1 - x.mean(1) for x in (small(task, indices), augment(batch_of(task.cache, indices), 32,
                                                                  replace(STILL, shift=0.1)))]  # fmt: skip
    at = torch.arange(32).float()
    where = [(x.sum(1) * at).sum(1) / x.sum((1, 2)) for x in ink]  # centre of mass along the width
    moved = (where[1] - where[0]).abs()
    assert moved.max() <= 0.1 * 32 + 0.2
    assert moved.max() > 0.5


def test_mirrored_pictures_are_the_share_that_was_asked_for(task: ClassifierTask) -> None:
    indices = list(range(64))
    found = augment(batch_of(task.cache, indices), 32, replace(STILL, mirror=0.5))
    still = augment(batch_of(task.cache, indices), 32, STILL)
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(found, still, strict=True)]
    kept = [bool(torch.equal(a, b)) for a, b in zip(found, still, strict=True)]
    assert all(m or k for m, k in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48
    assert 16 < sum(kept) < 48


def test_a_picture_is_varied_alike_in_any_company(task: ClassifierTask) -> None:
    mix = load(RunConfig, ROOT / "configs/emoji/judge.yaml").augmentation
    together = augment(batch_of(task.cache, [3, 4, 5]), 32, mix)
    alone = augment(batch_of(task.cache, [4]), 32, mix)
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_classes_are_the_values_of_the_fields(task: ClassifierTask) -> None:
    classes = task.module.classifier.classes
    lines = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["split"] == "train"]
    assert classes["style"] == tuple(sorted({line["style"] for line in own}))
    assert classes["cluster"] == tuple(sorted({line["cluster"] for line in own}))
    records = [{"fields": {"style": s}} for s in ("noto", "unheard of")]
    assert labels_of(records, "style", classes["style"]).tolist() == [classes["style"].index("noto"), -1]


def test_among_first_counts_ranks() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert among_first(logits, torch.tensor([2, 3, -1]), 1).tolist() == [False, False, False]
    assert among_first(logits, torch.tensor([2, 3, -1]), 2).tolist() == [True, False, False]
    assert among_first(logits, torch.tensor([2, 3, -1]), 5).tolist() == [True, True, False]


def test_a_classifier_on_disk_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Classifier(TINY, {"style": ("a", "b"), "cluster": ("x", "y", "z")}).eval()
    for p in made.parameters():
        p.data.copy_(p.data.half())
    save_classifier(made, tmp_path / "judge")
    assert {v.dtype for v in load_file(tmp_path / "judge/model.safetensors").values()} == {torch.float16}
    found = load_classifier(tmp_path / "judge")
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    assert found.classes == made.classes
    for name, logits in classify(found, pictures).items():
        assert torch.equal(logits, made(pictures)[name])
    small_first = torch.nn.functional.avg_pool2d(pictures, 2)
    torch.testing.assert_close(classify(found, small_first)["style"], classify(found, pictures)["style"])


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    save_classifier(Classifier(TINY, {"style": ("a", "b")}), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["classes"]["style"] = ["a", "b", "c"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"heads\.style\.bias: shape \(2,\), expected \(3,\)"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["labels=[]"], "labels must name at least one field"),
        (["labels=[style, style]"], "each once"),
        (["smoothing=1"], "smoothing is a share"),
        (["augmentation.zoom=1"], "zoom, shift and colour are shares"),
        (["classifier.side_px=48"], "side_px must be a multiple of 32"),
        (["data.size_px=80"], "must be a multiple of classifier.side_px"),
        (["classifier.widths=[8, 8, 8]"], "four entries"),
        (["labels=[cluster]"], "by_palette names style, which is no label"),
        (["classifier.norm_groups=5"], "multiples of norm_groups 5"),
    ],
)
def test_configs_that_cannot_be_are_refused(wrong: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(RunConfig, ROOT / "configs/tiny/judge.yaml", wrong)


def test_a_label_that_the_data_lacks_is_named(tmp_path: Path) -> None:
    wrong = [f"data.path={EMOJI}", f"cache={tmp_path}", "labels=[species]", "classifier.by_palette=[]"]
    with pytest.raises(UserError, match=r"labels: .* has no field 'species'; it has cluster, concept"):
        build_task(load(RunConfig, ROOT / "configs/tiny/judge.yaml", wrong))


def test_it_learns_and_starts_from_what_it_learnt(tmp_path: Path) -> None:
    shared = [f"data.path={EMOJI}", f"cache={tmp_path / 'cache'}", "loop.trackers=[]"]
    final = train(ROOT / "configs/tiny/judge.yaml", tmp_path / "run", [*shared, "loop.images=2400"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    right = [line["cluster_right"] for line in lines if "cluster_right" in line]
    assert right[-1] > 0.8 > right[0]
    assert lines[-1]["cluster_top5"] >= lines[-1]["cluster_top1"] > 0
    more = load(RunConfig, ROOT / "configs/tiny/judge.yaml", [*shared, f"init={final}"])
    module = build_task(more).module
    assert isinstance(module, ClassifierModule)
    for name, value in load_classifier(final).state_dict().items():
        assert torch.equal(value, module.classifier.state_dict()[name])
    deeper = [*shared, f"init={final}", "classifier.blocks=[1, 1, 1, 2]"]
    other = load(RunConfig, ROOT / "configs/tiny/judge.yaml", deeper)
    with pytest.raises(UserError, match="of another shape"):
        build_task(other)


def test_it_starts_from_one_that_knows_other_classes_and_sizes() -> None:
    """The trunk, and the rows of common classes, wherever they stand; new classes keep their own draws."""
    torch.manual_seed(0)
    released = Classifier(TINY, {"style": ("a", "b", "c")})
    larger = Classifier(replace(TINY, side_px=64), {"style": ("b", "new", "a"), "cluster": ("x", "y")})
    heads = {name: head.weight.clone() for name, head in larger.heads.items()}
    start_from(larger, released)
    for name, value in released.trunk.state_dict().items():
        assert torch.equal(value, larger.trunk.state_dict()[name])
    old, new = released.heads["style"], larger.heads["style"]
    assert torch.equal(new.weight[[0, 2]], old.weight[[1, 0]])
    assert torch.equal(new.bias[[0, 2]], old.bias[[1, 0]])
    assert torch.equal(new.weight[1], heads["style"][1])
    assert torch.equal(larger.heads["cluster"].weight, heads["cluster"])


def test_colours_are_counted_where_they_lie() -> None:
    """Colours of the histogram's own are whole, against numpy's; one between two is shared; nothing is lost."""
    levels = 4
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(0, levels, (2, 3, 5, 7), generator=generator)
    found = colour_histogram(at / (levels - 1) * 2 - 1, levels)
    for counts, places in zip(found, at, strict=True):
        wanted, _ = np.histogramdd(places.flatten(1).T.numpy(), bins=levels, range=[(-0.5, levels - 0.5)] * 3)
        np.testing.assert_allclose(counts.numpy(), wanted.ravel(), atol=1e-4)
    quarter_on = torch.tensor([0.25 * 2 / 3 - 1, -1, -1]).view(1, 3, 1, 1)
    between = colour_histogram(quarter_on, levels)
    assert between[0, 0] == pytest.approx(0.75, abs=1e-5)
    assert between[0, levels**2] == pytest.approx(0.25, abs=1e-5)
    anything = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    torch.testing.assert_close(colour_histogram(anything, 7).sum(1), torch.full((3,), 64.0))


def test_recoloured_convolutions_leave_the_colours_to_the_palette(task: ClassifierTask) -> None:
    torch.manual_seed(0)
    config = replace(TINY, palette=(4,))
    module = ClassifierModule(Classifier(config, task.module.classifier.classes), task.module.config)
    module.config = replace(task.module.config, classifier=config, recolour=0.5)
    pictures, recoloured, _ = module.prepare(batch_of(task.cache, [0, 1]))
    plain = task.module.prepare(batch_of(task.cache, [0, 1]))[0]
    assert recoloured is not None
    assert torch.equal(pictures, plain)
    assert (recoloured - pictures).abs().max() > 0.05
    trunk, palette = [], []
    module.classifier.trunk.register_forward_pre_hook(lambda _, inputs: trunk.append(inputs[0]))
    module.classifier.palette.register_forward_pre_hook(lambda _, inputs: palette.append(inputs[0]))
    module.classifier(pictures, recoloured)
    module.classifier(pictures)
    assert torch.equal(trunk[0], recoloured)
    assert torch.equal(trunk[1], pictures)
    assert torch.equal(palette[0], palette[1])


def test_what_the_palette_alone_tells_owes_the_convolutions_nothing() -> None:
    torch.manual_seed(0)
    config = replace(TINY, palette=(3, 5), by_palette=("style",))
    classifier = Classifier(config, {"style": ("a", "b", "c"), "cluster": ("x", "y")})
    pictures, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    classifier.train()(pictures)["style"].sum().backward()
    learned = {name.split(".")[0] for name, p in classifier.named_parameters() if p.grad is not None}
    assert learned == {"by_palette", "heads"}
    classifier.eval()
    plain, recoloured = classifier(pictures), classifier(pictures, others)
    assert torch.equal(plain["style"], recoloured["style"])
    assert not torch.allclose(plain["cluster"], recoloured["cluster"])


def test_classes_that_are_kept_keep_their_logits() -> None:
    torch.manual_seed(0)
    config = replace(TINY, palette=(3,), by_palette=("style",))
    judge = Classifier(config, {"style": ("a", "b", "c"), "cluster": ("x", "y")}).eval()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    before = judge(pictures)
    larger = Classifier(config, {"style": ("c", "new", "a"), "cluster": ("x", "y")}).eval()
    start_from(larger, judge)
    torch.testing.assert_close(larger(pictures)["style"][:, [2, 0]], before["style"][:, [0, 2]])
    judge.keep("style", [0, 2])
    torch.testing.assert_close(judge(pictures)["style"], before["style"][:, [0, 2]])
    assert judge.classes == {"style": ("a", "c"), "cluster": ("x", "y")}
    with pytest.raises(ValueError, match="needs a histogram"):
        replace(TINY, by_palette=("style",))


def test_a_palette_sees_colours_wherever_they_are() -> None:
    """With the trunk silent, moving pixels about changes nothing, and another colour does."""
    torch.manual_seed(0)
    judge = Classifier(replace(TINY, palette=(6,)), {"style": ("a", "b")})
    for parameter in judge.trunk.parameters():
        torch.nn.init.zeros_(parameter)
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = judge(pictures)["style"]
        moved = judge(pictures.flatten(2)[..., torch.randperm(1024)].view_as(pictures))["style"]
        darker = judge(pictures * 0.5 - 0.5)["style"]
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(darker, plain, atol=1e-2)
    with pytest.raises(ValueError, match="palette must be from 2 to 32"):
        replace(TINY, palette=(64,))
