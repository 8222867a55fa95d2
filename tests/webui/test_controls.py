import pytest

from ldm.errors import FieldError, InputError
from ldm.fields import Setting, settings_of
from ldm.pipeline.request import ImageRequest
from ldm.webui.controls import (
    ABSENT,
    AUTOMATIC,
    controls,
    held_by,
    in_labels,
    label_of,
    request_of,
    shown,
)
from ldm.webui.tasks import ENLARGE, IMAGE, PAINT, TASKS, TEXT


def empty() -> dict:
    """What the controls hold when the page opens."""
    return {name: control.value for name, control in controls().items()}


def test_every_setting_has_a_control() -> None:
    assert list(controls()) == [name for name in settings_of(ImageRequest) if name not in ABSENT]


@pytest.mark.parametrize("name", [name for name in settings_of(ImageRequest) if name not in ABSENT])
def test_a_control_says_what_its_setting_does(name: str) -> None:
    control, each = controls()[name], settings_of(ImageRequest)[name]
    assert control.group == each.group
    assert control.help[0].isupper()
    assert control.label
    assert "--" not in control.help.replace("--like", "").replace("--lora_folder", "")
    for choice in each.choices:
        assert choice in control.choices


def test_labels_differ() -> None:
    labels = [control.label for control in controls().values()]
    assert len(set(labels)) == len(labels)


def test_untouched_controls_are_the_commands_defaults() -> None:
    assert request_of(TEXT, empty() | {"prompt": "a cube"}, {}) == ImageRequest("a cube", eta=0.0)


@pytest.mark.parametrize(
    ("name", "held", "value"),
    [
        ("width", "128", 128),
        ("steps", " 7 ", 7),
        ("scale", "3.5", 3.5),
        ("seed", str(2**63 - 1), 2**63 - 1),  # which a browser's number could not hold
        ("seed", "-1", None),  # by chance, which was refused here alone
        ("sampler", "euler_ancestral", "euler_ancestral"),
        ("schedule", "karras", "karras"),
        ("timesteps", "999, 700,400", (999.0, 700.0, 400.0)),
        ("zero_snr", "on", True),
        ("zero_snr", "off", False),
        ("cfg_rescale", 0.7, 0.7),
        ("tiling", "x", "x"),
        ("hires", "2", 2.0),
    ],
)
def test_what_a_control_holds_is_in_the_request(name: str, held: object, value: object) -> None:
    assert getattr(request_of(TEXT, empty() | {name: held}, {}), name) == value


def test_a_task_takes_nothing_from_controls_that_it_lacks() -> None:
    held = empty() | {"strength": "0.3", "mask_blur": 9, "noise_level": "40", "hires": "2", "panorama": True}
    assert (
        request_of(TEXT, held | {"hires": "", "panorama": False}, {}).settings()
        == request_of(TEXT, empty(), {}).settings()
    )
    enlarged = request_of(ENLARGE, held, {"init_img": "small.png"})
    assert (enlarged.hires, enlarged.strength, enlarged.panorama) == (None, None, False)
    assert (enlarged.noise_level, enlarged.prompt) == (40, ENLARGE.defaults["prompt"])


@pytest.mark.parametrize(
    ("task", "held", "words"),
    [
        (TEXT, {"width": "510"}, None),  # whether it fits is the model's to say
        (TEXT, {"steps": "0"}, "Steps: 0 is not a whole number in range: 1 … 1,000"),
        (TEXT, {"steps": "many"}, "Steps: many is not a whole number"),
        (TEXT, {"sampler": "/etc/passwd"}, "Sampler '/etc/passwd': choose from"),
        (TEXT, {"hires": "2", "hires_upscaler": "/etc/passwd"}, "choose from automatic, latent, lanczos"),
        (TEXT, {"s_churn": "1"}, "Sigma churn 1: ddim has no such option"),
        (IMAGE, {}, "Image to image starts from an image"),
        (PAINT, {}, "Inpaint starts from an image"),
    ],
)
def test_mistakes_are_named_by_the_labels(task: object, held: dict, words: str | None) -> None:
    if words is None:
        request_of(task, empty() | held, {})
        return
    with pytest.raises(InputError) as caught:
        request_of(task, empty() | held, {})
    assert words in in_labels(caught.value)


def test_inpainting_needs_a_mask() -> None:
    with pytest.raises(InputError, match="draw on the image"):
        request_of(PAINT, empty(), {"init_img": "a.png"})
    request_of(PAINT, empty() | {"outpaint": "0,8,0,0"}, {"init_img": "a.png"})


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_recorded_settings_come_back_from_the_controls(task: object) -> None:
    inputs = {} if task is TEXT else {"init_img": "a.png"}
    if task is PAINT:
        inputs["mask"] = "m.png"
    given = {"prompt": "a cone", "seed": "5", "sampler": "euler", "schedule": "karras", "steps": "9"}
    given |= {"scale": "3.25", "cfg_rescale": 0.5, "clip_skip": "2", "long_prompts": True}
    request = request_of(task, empty() | given, inputs)
    held, notes = held_by(task, request.settings())
    assert not notes
    assert request_of(task, held, inputs) == request
    assert {name for name in held if shown(controls()[name], task)} <= set(controls())


def test_what_no_control_can_hold_is_noted() -> None:
    held, notes = held_by(TEXT, {"sampler": "no such one", "steps": "x", "scale": 5, "tiling": ["x"]})
    assert (held["sampler"], held["steps"], held["scale"]) == ("ddim", "", "5")
    assert [note.partition(":")[0] for note in notes] == ["Steps", "Sampler", "Tiling"] or len(notes) == 3


def test_an_error_of_several_lines_is_shown_in_one() -> None:
    assert in_labels(FieldError("{prompt}: a\nb")) == f"{label_of('prompt')}: a b"
    assert AUTOMATIC in controls()["schedule"].choices


def test_ranges_are_in_one_form() -> None:
    """Those of floats ended in ".0", beside those of whole numbers."""
    assert Setting("", low=-10_000.0, high=100.5).bounds == "-10,000 … 100.5"
    assert Setting("", low=0.0).bounds == "at least 0"
    assert Setting("").bounds.startswith("at least -")
    for each in settings_of(ImageRequest).values():
        assert ".0 …" not in each.bounds
        assert not each.bounds.endswith(".0")
