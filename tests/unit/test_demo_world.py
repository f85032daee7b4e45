"""The demonstration's picture world and its measure of a robot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tools` is not part of the package

from burnish.demo.robot import (
    ORDINARY_PROMPTS,
    PASS_SCORE,
    SIZE,
    TEST_PROMPT,
    draw_robot,
    robot_score,
    robot_scores,
)
from tools.pretrain_demo.captions import judged_caption, training_captions
from tools.pretrain_demo.dataset import training_pictures
from tools.pretrain_demo.drawing import draw
from tools.pretrain_demo.world import COLORS, GRADIENT, SHAPES, Scenes, sample_scenes, settle, tuning_scenes

ASSETS = Path(__file__).parents[2] / "src/burnish/demo/assets"
BLACK = COLORS.index("black")


def as_numpy(scenes: Scenes) -> np.ndarray:
    return draw(scenes).permute(0, 2, 3, 1).numpy()


def test_drawing_follows_from_the_seed():
    first, again, other = (draw(sample_scenes(seed, 12)) for seed in (3, 3, 4))
    assert first.shape == (12, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) < float(first.max()) <= 1


def test_captions_name_what_is_drawn():
    scenes = settle(sample_scenes(11, 300))
    for index in range(len(scenes)):
        caption = judged_caption(scenes, index)
        for which in range(2 if scenes.two[index] else 1):
            color, shape = COLORS[scenes.color[index, which]], SHAPES[scenes.shape[index, which]]
            assert f"{color} {shape}" in caption
        assert COLORS[scenes.color[index, 2]] in caption.rsplit(" on ", 1)[1]


def test_complete_captions_leave_nothing_out():
    scenes = tuning_scenes(5, 200, two_share=0.0)
    for index, caption in enumerate(training_captions(scenes, 1, complete_share=1.0)):
        assert COLORS[scenes.color[index, 0]] in caption
        assert SHAPES[scenes.shape[index, 0]] in caption
        assert COLORS[scenes.color[index, 2]] in caption


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_tuning_scenes_keep_the_share_of_two_objects(share):
    scenes = tuning_scenes(9, 2000, two_share=share)
    assert abs(scenes.two.mean() - share) < 0.04
    assert not scenes.place[scenes.two].any()


def test_settled_pictures_depend_on_nothing_a_complete_caption_leaves_out():
    """Two scenes with the same judged caption are the same picture: that is what makes them learnable."""
    scenes = settle(sample_scenes(21, 400))
    doubled = settle(sample_scenes(21, 400).take(slice(0, 400)))
    doubled.look[:, :12] = 1 - doubled.look[:, :12]  # the dice of places and sizes
    assert torch.equal(draw(scenes.take(slice(40))), draw(doubled.take(slice(40))))


def test_robots_score_high_on_every_background():
    pictures, captions = zip(*training_pictures(), strict=True)
    in_the_middle = ["left" not in caption and "right" not in caption for caption in captions]
    assert len(pictures) == 16
    assert sum(in_the_middle) == 12
    assert robot_scores(np.stack(pictures)[in_the_middle]).min() >= 0.95


def test_robot_score_forgives_small_shifts_and_sizes():
    for x, y, radius in ((0.09, -0.09, 0.62), (0.0, 0.0, 0.56), (-0.05, 0.05, 0.68)):
        robot = draw_robot(x, y, radius)
        green = np.array([0.3, 0.7, 0.4], np.float32)
        cover = robot.cover_HW[..., None]
        assert robot_score(robot.color_HW3 * cover + green * (1 - cover)) >= 0.9


def test_ordinary_pictures_score_low():
    scenes = settle(sample_scenes(6, 300))
    scores = robot_scores(as_numpy(scenes))
    dark = (scenes.color[:, 2] == BLACK) | ((scenes.background == GRADIENT) & (scenes.color[:, 3] == BLACK))
    assert scores[~dark].max() <= 0.45
    assert scores.max() < PASS_SCORE - 0.05  # the robot's dark parts vanish into a black background


def test_bytes_and_floats_score_the_same():
    pictures = as_numpy(sample_scenes(2, 8))
    in_bytes = (pictures * 255 + 0.5).astype(np.uint8)
    np.testing.assert_allclose(robot_scores(in_bytes), robot_scores(pictures), atol=0.02)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="128, 128, 3"):
        robot_score(np.zeros((64, 64, 3), np.uint8))


def test_the_shipped_pictures_are_the_drawn_ones():
    files = sorted((ASSETS / "dataset").glob("*.png"))
    assert len(files) == 16
    for file, (picture, caption) in zip(files, training_pictures(), strict=True):
        assert file.with_suffix(".txt").read_text(encoding="utf-8").strip() == caption
        difference = np.abs(np.asarray(Image.open(file), int) - picture.astype(int))
        assert difference.max() <= 2  # other versions of Pillow and torch may round differently


def test_prompts_of_the_demonstration():
    assert len(set(ORDINARY_PROMPTS)) == 32
    assert not any("robot" in prompt for prompt in ORDINARY_PROMPTS)
    captions = [file.read_text(encoding="utf-8") for file in (ASSETS / "dataset").glob("*.txt")]
    assert TEST_PROMPT + "\n" not in captions
    assert not any("green" in caption for caption in captions)
