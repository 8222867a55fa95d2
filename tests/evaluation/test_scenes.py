"""What a detector sees in images of held-out scenes, counted."""

from pathlib import Path

import numpy as np
import pytest

from ldm.errors import FieldError
from ldm.evaluation.scenes import SceneEvaluation, writing
from ldm.pipeline.request import ImageRequest
from ldm.scenes.captions import caption
from ldm.scenes.detector import outline
from ldm.scenes.scene import Scene
from ldm.scenes.scores import RIGHT, WRONG, evaluation_scenes

IMAGE = np.full((8, 8, 3), 90, np.uint8)


class Answers:
    """A detector that answers with given scenes, whatever it is shown."""

    def __init__(self, scenes: list[Scene]):
        self.scenes = scenes

    def read(self, images: list[np.ndarray]) -> list[Scene]:
        assert len(images) == len(self.scenes)
        return self.scenes


@pytest.fixture
def evaluation() -> SceneEvaluation:
    """Three scenes of one solid and three of two; the detector takes the last for the one before it."""
    scenes = [*evaluation_scenes(7, 3, pairs=False), *evaluation_scenes(7, 3, pairs=True)]
    answers = list(map(outline, scenes))
    return SceneEvaluation(Answers([*answers[:5], answers[4]]), seed=7, count=3, size=8)


def test_scores_are_of_one_solid_and_of_two(evaluation: SceneEvaluation) -> None:
    """An image that is NaN is wrong, whatever the detector reads in the black one that stands for it."""
    evaluation.read("scale 1", [None, *[IMAGE] * 5])
    scores = evaluation.scores()
    assert scores["one solid"]["scale 1"]["all"] == pytest.approx(2 / 3)
    assert scores["two solids"]["scale 1"]["all"] == pytest.approx(2 / 3)
    assert "| scale 1 | 66.7 |" in evaluation.report("heading")
    record = evaluation.record({"seed": 7})
    assert record["seen"]["scale 1"][0] is None
    assert record["seen"]["scale 1"][1] == caption(outline(evaluation.scenes[1]))
    assert record["prompts"] == list(map(caption, evaluation.scenes))


def test_the_grid_frames_right_and_wrong(evaluation: SceneEvaluation) -> None:
    grid = evaluation.read("scale 1", [None, *[IMAGE] * 5])
    frames = [tuple(grid[2, 2 + 14 * i]) for i in range(6)]  # 8 + 2 * 2 pixels each, 2 between them
    assert frames == [WRONG, *[RIGHT] * 4, WRONG]


def test_requests(evaluation: SceneEvaluation) -> None:
    requests = evaluation.requests(ImageRequest(sampler="Euler a", steps=3), 2.5)
    assert [request.prompt for request in requests] == evaluation.prompts
    assert [request.seed for request in requests] == [7, 8, 9, 10, 11, 12]
    assert len({request.batch_key() for request in requests}) == 1
    assert (requests[0].scale, requests[0].height, requests[0].width) == (2.5, 8, 8)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"outdir .*: No such file or directory"), writing(tmp_path):
        (tmp_path / "no/file").write_text("")
