"""`ldm eval pictures`: prompts, verdicts, baselines and the report, on a tiny cascade."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import UserError
from ldm.models.classifier import Classifier, ClassifierConfig
from ldm.models.clip import Clip, ClipConfig, build_clip
from ldm.weights import load_classifier, save_classifier, save_clip
from pipelines.cascade import load_cascade
from tests.tiny import EMOJI
from tests.tiny_text import tiny_bert
from training import judging, picture_report
from training.classifier import classify
from training.data import DataConfig, Reader
from training.features import Features
from training.judging import Asked, asked_of, check_judge, nearest_captions, resized, shares, verdicts
from training.picture_report import _memory, evaluate, read_prompts
from training.seen import Eyes, Seen, reference_of

CLASSES = {"cluster": ("a", "b", "c", "d", "e", "f", "g"), "style": ("noto", "twemoji")}
SHAPE = ClassifierConfig(side_px=32, widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), norm_groups=4)
MEASURES = {"concept_top5", "concept_top1", "style", "both"}


def lines(split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, with the classes of the tests' pictures."""
    own = lines("train")
    torch.manual_seed(0)
    names = {label: tuple(sorted({str(line[label]) for line in own})) for label in ("cluster", "style")}
    folder = tmp_path_factory.mktemp("judge")
    save_classifier(Classifier(SHAPE, names), folder)
    return folder


def asked(cluster: str, style: str, **fields: Any) -> Asked:
    return Asked("", "", {"cluster": cluster, "style": style, **fields})


def test_verdicts_are_what_the_logits_say(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Classifier(SHAPE, CLASSES)
    ranked = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(5, 1)
    styles = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0]])
    monkeypatch.setattr(judging, "classify", lambda _judge, part: {"cluster": ranked[: len(part)],
                                                                   "style": styles[: len(part)]})  # fmt: skip
    wanted = [asked("a", "noto"), asked("e", "twemoji"), asked("e", "twemoji"), asked("f", "twemoji"),
              asked("unheard of", "noto")]  # fmt: skip
    found = verdicts(judge, torch.zeros(5, 3, 32, 32), wanted)
    assert found["concept_top1"].tolist() == [1, 0, 0, 0, 0]
    assert found["concept_top5"].tolist() == [1, 1, 1, 0, 0]
    assert found["style"].tolist() == [1, 0, 1, 1, 1]
    assert found["both"].tolist() == [1, 0, 1, 0, 0]
    told = shares(found, wanted)
    assert told["concept_top5"].value == pytest.approx(0.6)
    assert told["concept_top5"].low <= 0.6 <= told["concept_top5"].high


def test_a_judge_of_more_designs_tells_apart_those_of_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Classifier(SHAPE, {"cluster": ("a", "b"), "style": ("else", "noto", "other", "twemoji")})
    with torch.no_grad():
        judge.heads["style"].bias.copy_(torch.tensor([9.0, 1, 9, 2]))
    save_classifier(judge, tmp_path)
    wanted = [asked("a", "noto"), asked("a", "twemoji")]
    pictures = torch.zeros(2, 3, 32, 32)
    assert verdicts(judge.eval(), pictures, wanted)["style"].tolist() == [0, 0]
    narrow = judging.load_judge(tmp_path, wanted, {"noto", "twemoji", "unknown to it"})
    assert narrow.classes == {"cluster": ("a", "b"), "style": ("noto", "twemoji")}
    logits, all_logits = (classify(j, pictures)["style"] for j in (narrow, load_classifier(tmp_path)))
    assert torch.equal(logits, all_logits[:, [1, 3]])
    assert verdicts(narrow, pictures, wanted)["style"].tolist() == [0, 1]
    one = judging.load_judge(tmp_path, wanted[:1], {"noto"})  # among one it could not be wrong
    assert len(one.classes["style"]) == 4
    assert verdicts(one, pictures, wanted)["style"].tolist() == [0, 0]


def test_prompts_are_captions_that_name_the_style() -> None:
    rows = Reader(DataConfig(path=str(EMOJI), split="combos", size_px=64)).rows
    found = asked_of(rows)
    assert len(found) == len(lines("combos"))
    assert all(a.fields["style"] in a.prompt for a in found)
    assert {a.group for a in found} == {line["cluster"] for line in lines("combos")}


def test_the_nearest_caption_of_a_caption_is_itself(tiny_folder: Path) -> None:
    text = load_cascade(tiny_folder).text
    captions = [line["captions"][0] for line in lines("train")[:12]]
    assert nearest_captions(text, captions[::-1], captions) == list(range(12))[::-1]


def test_resized() -> None:
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(resized(x, 16), torch.nn.functional.avg_pool2d(x, 4))
    assert resized(x, 128).shape == (1, 3, 128, 128)
    assert resized(x, 64) is not None
    assert torch.equal(resized(x, 64), x)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained."""
    text = tiny_bert(tmp_path_factory.mktemp("text"))
    config = ClipConfig(image_px=32, max_tokens=12)
    torch.manual_seed(0)
    clip = Clip(build_clip(config, text), config, lambda texts: torch.zeros(1))
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save_clip(clip, text, folder, folder)
    return folder


def test_the_report(tiny_folder: Path, judge_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    options: dict[str, Any] = {"judge": judge_folder, "clip": clip_folder, "seeds": 2, "cache": tmp_path / "cache"}
    path = evaluate(tiny_folder, EMOJI, tmp_path / "out", **options, tell=told.append)
    report = json.loads(path.read_text())
    held = lines("combos")
    assert (report["prompts"], report["pictures"]) == (len(held), 2 * len(held))
    assert report["reference"]["pictures"] == len(lines("train"))
    assert set(report["judge"]) == {"drawn", "real", "nearest caption's training picture"}
    for line in report["judge"].values():
        assert set(line) == MEASURES
        assert all(0 <= low <= value <= high <= 1 for value, low, high in line.values())
    for line in report["clip"].values():
        assert set(line) == {"CLIP score", "R@1", "R@5", "CMMD"}
        assert 0 <= line["R@1"][0] <= line["R@5"][0] <= 1
    assert report["clip"]["drawn"]["CMMD"] > 0
    assert report["sets"] == {}
    assert any("no distance of sets" in note for note in report["notes"])
    near = report["nearest_training_picture"]
    assert set(near) == {"efflite0", "pixels at 32 px"}
    for line in near.values():
        assert line["ratio"] > 0
        for name in ("share nearer than 99% of the real ones", "that share, each real picture counted once"):
            value, low, high = line[name]
            assert 0 <= low <= value <= high <= 1
    page = (tmp_path / "out/report.html").read_text()
    assert "nearest.png" in page
    assert "http" not in page
    assert any("judge" in line for line in told)
    with pytest.raises(UserError, match="already"):
        evaluate(tiny_folder, EMOJI, tmp_path / "out", **options)


def test_features_of_the_training_pictures_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(DataConfig(path=str(EMOJI), split="train", size_px=64))
    eyes = Eyes(Features())
    first = reference_of(reader, eyes, tmp_path)
    monkeypatch.setattr(Eyes, "see", None)
    again = reference_of(reader, eyes, tmp_path)
    assert torch.equal(first.features, again.features)
    assert first.features.shape == (len(reader.rows), 1280)
    assert first.pixels.abs().max() <= 1


def test_sets_of_enough_pictures_have_distances(tmp_path: Path) -> None:
    reader = Reader(DataConfig(path=str(EMOJI), split="train", size_px=64))
    seen = reference_of(reader, Eyes(Features()), tmp_path)
    groups = asked_of(reader.rows)
    report: dict[str, Any] = {}
    table = picture_report._sets(seen, None, seen, groups, groups, report)
    drawn = report["sets"]["drawn"]
    assert drawn["FD-efflite0"][0] == pytest.approx(0, abs=1e-6)
    assert drawn["precision"][0] == drawn["recall"][0] == drawn["coverage"][0] == 1
    assert drawn["IS-efflite0"][0] > 1
    assert "few for FD" in table.note


def test_other_prompts(tiny_folder: Path, judge_folder: Path, tmp_path: Path) -> None:
    own = lines("train")[0]
    file = tmp_path / "prompts.jsonl"
    told = {"prompt": "puppy", "cluster": own["cluster"], "style": own["style"]}
    file.write_text(f"{json.dumps(told)}\n\n")
    path = evaluate(tiny_folder, EMOJI, tmp_path / "out", judge_folder, seeds=2, prompts=file, cache=tmp_path / "cache")
    report = json.loads(path.read_text())
    assert "real" not in report["judge"]
    assert report["pictures"] == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "holds no prompt"), ("puppy", r":1: not a JSON object with \"prompt\""),
     ('{"prompt": "a"}\n{"x": 1}', ":2: not a JSON"), ("[1]", ":1: not a JSON")],
)  # fmt: skip
def test_prompts_that_are_none(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_prompts(tmp_path / "p.jsonl")


def test_a_judge_that_cannot_judge_is_refused() -> None:
    with pytest.raises(UserError, match="the judge knows style and not cluster"):
        check_judge(Classifier(SHAPE, {"style": ("noto",)}), [asked("a", "noto")])
    with pytest.raises(UserError, match="has no field 'style'"):
        check_judge(Classifier(SHAPE, CLASSES), [Asked("x", "row 1", {"cluster": "a"})])


def test_an_sr_stage_alone_is_refused(tmp_path: Path) -> None:
    from tests.tiny import save_tiny_sr

    with pytest.raises(UserError, match="stage middle enlarges pictures and draws none"):
        evaluate(save_tiny_sr(tmp_path), EMOJI, tmp_path / "out", cache=tmp_path / "cache")


def test_prompts_of_one_real_picture_are_one_witness() -> None:
    """Of four prompts two share a real picture, and it is theirs that come out as a training picture, at 0."""
    none = torch.zeros(4, 0)

    def seen(*places: float) -> Seen:
        return Seen(torch.tensor(places)[:, None], none, torch.tensor(places)[:, None], none)

    asked = [Asked(f"p{k}", f"k{k}", {"cluster": cluster}) for k, cluster in enumerate("aabc")]
    every = [a for a in asked for _ in range(2)]
    report: dict[str, Any] = {}
    drawn = seen(0.0, 0.0, 0.0, 5.0, 3.0, 3.0, 4.0, 4.0)
    _memory(drawn, seen(2.0, 2.0, 3.0, 2.5), seen(0.0, 9.0), every, asked, report)
    line = report["nearest_training_picture"]["efflite0"]
    assert line["share nearer than 99% of the real ones"][0] == 3 / 8
    assert line["that share, each real picture counted once"][0] == pytest.approx(1.5 / 6)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_folder: Path, judge_folder: Path, tmp_path: Path) -> None:
    reports = []
    for count in (1, 2):
        out, cache = tmp_path / f"out{count}", tmp_path / f"cache{count}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
                   "-m", "ldm", "eval", "pictures", str(tiny_folder), str(EMOJI), "--judge", str(judge_folder),
                   "--seeds", "2", "--cache", str(cache), "--out", str(out)]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        report = json.loads((out / "report.json").read_text())
        reports.append({k: report[k] for k in ("judge", "nearest_training_picture", "pictures")})
        shutil.rmtree(cache)
    assert reports[0]["judge"] == reports[1]["judge"]
    for name, line in reports[0]["nearest_training_picture"].items():
        for measure, value in line.items():
            assert reports[1]["nearest_training_picture"][name][measure] == pytest.approx(value, rel=1e-5)
