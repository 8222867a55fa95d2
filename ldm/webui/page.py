"""The page: gradio's components made from the controls, and what its buttons do."""

from __future__ import annotations

import asyncio
import base64
import html
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import gradio as gr
import numpy as np

from ldm.errors import FieldError, InputError
from ldm.fields import Setting
from ldm.images.metadata import encode_image
from ldm.images.source_type import source_type
from ldm.images.watermark import Watermarker
from ldm.log import LOG, one_line
from ldm.pipeline.infotext import image_texts
from ldm.pipeline.request import ImageRequest, image_seed
from ldm.pipeline.settings.control import CONTROL
from ldm.runs.settings import grid_settings
from ldm.service.engine import Engine
from ldm.service.errors import ServiceError
from ldm.service.jobs import CANCELLED, QUEUED, Job
from ldm.service.outputs import Signer, encoded
from ldm.service.schema import check_texts
from ldm.webui.command import command_line, input_images
from ldm.webui.controls import (
    IN_SIGHT,
    TITLES,
    Control,
    controls,
    has_group,
    in_labels,
    label_of,
    request_of,
    shown,
)
from ldm.webui.files import Files
from ldm.webui.inputs import read_editor, read_upload
from ldm.webui.recorded import Recorded, read_dropped
from ldm.webui.results import Results
from ldm.webui.sheets import SCRIPT, Axis, Sheet, compared, sheet_of
from ldm.webui.tasks import EXTRA_GROUPS, TASKS, Task
from ldm.weights.hashes import same_model
from ldm.weights.loading import ABLE, bundled_family

FOLDER = Path(__file__).parent
KEPT_RESULTS = 60  # of a session, in its gallery
# In seconds: how often gradio looks for temporary files, and the age at which it removes them. It takes the
# results for its own, too, which `Results` removes when their tab is closed; so this is for uploads.
SWEEP = 3600, 7 * 86_400
REDRAWN = 0.2  # seconds between two updates of what a job shows, at least
BRUSH = "#d6006c"
UPLOADS = ["upload", "clipboard"]
IMAGES = Setting("images of one prompt at a time", low=1, high=16, kind=int)
NO_CHOICE = "none"
# What the page says for errors of the engine, of which that of a service sends its users to a log.
IN_TERMINAL = {
    "sampling_failed": "Sampling failed; the terminal in which the page runs says why.",
    "device_failed": "No image can be made any more; the terminal in which the page runs says why.",
}
# the tasks that have each image of the page
IMAGES_OF = {"image": ("image", "depth", "upscale"), "editor": ("inpaint",), "depth_map": ("depth",)}
EXAMPLE = "a red cube to the left of a blue sphere"


class Result(NamedTuple):
    """A finished image: its file, what stands below it, its command and what that starts from."""

    file: str
    caption: str
    command: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """What one press of the button asks for."""

    task: Task
    model: str
    requests: tuple[ImageRequest, ...]
    request: ImageRequest  # of the first image, as the page's controls say it
    sheet: Sheet | None = None


class Page:
    """The page of an engine. `folder`, which is there, is where finished images lie while their session is
    open; `signer` signs them. With `debug` the terminal shows where an error comes from.
    """

    def __init__(
        self,
        engine: Engine,
        files: Files,
        folder: Path,
        *,
        signer: Signer | None = None,
        debug: bool = False,
    ):
        self.engine, self.files, self.signer, self.debug = engine, files, signer, debug
        self.folders = Results(folder)
        self.running: dict[str, Job] = {}  # by session
        names = engine.models.names
        does = {name: engine.models.task(name) for name in names}
        self.models = {  # by what a task's model has to be able to do
            kind: sorted(
                (name for name in names if does[name] in able),
                key=lambda name, able=able: able.index(does[name]),
            )
            for kind, able in ABLE.items()
        }
        self.tasks = [task for task in TASKS.values() if self.models[task.does]]

    # What it looks like

    def blocks(self) -> gr.Blocks:
        self.parts: dict[str, Any] = {}  # by name, all but the controls
        self.held: dict[str, Any] = {}  # components of the controls, by name
        self.groups: dict[str, Any] = {}  # accordions that some tasks lack
        with gr.Blocks(title="Stable Diffusion", analytics_enabled=False, delete_cache=SWEEP) as blocks:
            self.results = gr.State([])
            self.chosen = gr.State(0)
            gr.HTML("<h1>Stable Diffusion</h1>", elem_id="title")
            with gr.Row(elem_id="layout"):
                with gr.Column(elem_id="ask", min_width=280):
                    self._ask()
                with gr.Column(elem_id="results", min_width=280):
                    self._results()
                with gr.Column(elem_id="settings", min_width=280):
                    self._settings()
            self._connect(blocks)
        return blocks

    def _ask(self) -> None:
        first = self.tasks[0]
        add = self.parts
        add["task"] = gr.Radio(
            [(task.title, task.name) for task in self.tasks],
            value=first.name,
            label="What to make",
            elem_id="task",
        )
        self.held["prompt"] = gr.Textbox(
            label="Prompt",
            lines=3,
            placeholder=EXAMPLE,
            elem_id="prompt",
            max_length=self.engine.options.max_prompt,
        )
        self.held["negative_prompt"] = gr.Textbox(
            label="Negative prompt", lines=1, placeholder="what to steer away from", elem_id="negative_prompt"
        )
        uploads = {"type": "filepath", "image_mode": None, "sources": UPLOADS, "height": 260, "buttons": []}
        add["image"] = gr.Image(label="Image to start from", visible=False, elem_id="image", **uploads)
        add["editor"] = gr.ImageEditor(
            label="Image and mask",
            type="pil",
            image_mode="RGBA",
            format="png",
            sources=UPLOADS,
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=8, colors=[BRUSH], color_mode="fixed"),
            eraser=gr.Eraser(default_size=8),
            buttons=[],
            visible=False,
            elem_id="editor",
            placeholder="Drop an image, then paint over what is to be drawn anew",
        )
        add["depth_map"] = gr.Image(
            label="Depth map, instead of an estimated one", visible=False, elem_id="depth_map", **uploads
        )
        with gr.Row(elem_id="buttons"):
            add["generate"] = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
            add["cancel"] = gr.Button("Cancel", interactive=False, elem_id="cancel", scale=1, min_width=90)
        gr.HTML("<p class='hint'><kbd>Ctrl</kbd> + <kbd>Enter</kbd> generates, too</p>")

    def _results(self) -> None:
        add = self.parts
        add["status"] = gr.HTML(status_html("Nothing has been made yet."), elem_id="status")
        add["gallery"] = gr.Gallery(
            label="Results of this session, the newest first",
            preview=True,
            columns=6,
            height=440,
            object_fit="contain",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="gallery",
        )
        with gr.Row(elem_id="send"):
            for task in self.tasks:
                if task.groups:
                    add[f"send_{task.name}"] = gr.Button(
                        f"→ {task.title}", size="sm", elem_id=f"send_{task.name}", min_width=110
                    )
        add["command"] = gr.Textbox(
            label="Command that makes this image",
            lines=4,
            max_lines=8,
            placeholder="Once there is an image, its command stands here",
            interactive=False,
            buttons=["copy"],
            elem_id="command",
        )
        add["inputs"] = gr.File(
            label="Images that the command starts from",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="inputs",
        )
        add["dropped"] = gr.File(
            label="Drop an image here to take its settings",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            height=150,
            elem_id="dropped",
        )

    def _settings(self) -> None:
        add = self.parts
        # What differs by task has a component for each. If one were changed instead, a button pressed before
        # the browser has the change would send the former task's value: gradio refuses a choice that is gone.
        for does in dict.fromkeys(task.does for task in self.tasks):
            names = self.models[does]
            add[f"model_{does}"] = gr.Dropdown(
                names,
                value=names[0],
                label="Model",
                visible=does == self.tasks[0].does,
                elem_id=f"model_{does}",
                filterable=False,
            )
        with gr.Row():
            for name in ("width", "height"):
                self._add_control(name, min_width=110)
            add["images"] = gr.Number(1, label="Images", elem_id="images", min_width=90)
        with gr.Row():
            for name in ("steps", "scale"):
                self._add_control(name, min_width=110)
            self._add_control("seed", min_width=130)
        with gr.Row():
            self._add_control("sampler", min_width=150)
            for task in self._tasks_with_strength():
                control = replace(controls()["strength"], value=f"{task.defaults['strength']:g}")
                name = f"strength_{task.name}"
                add[name] = self._component(control, min_width=150, visible=False, elem_id=f"set_{name}")
        groups: dict[str, list[Control]] = {}
        for control in controls().values():
            if control.name not in (*self.held, "strength"):
                groups.setdefault(control.group, []).append(control)
        for group in sorted(groups, key=lambda group: group not in EXTRA_GROUPS):
            self._add_group(group, groups[group])
        self._add_adapters()
        with gr.Accordion("Comparison sheet", open=False, elem_id="sheet"):
            gr.HTML(
                "<p class='about'>Draws an image for each pair of values of two settings. "
                "Separate values by commas, or write one a line.</p>"
            )
            choices = [(label_of(name), name) for name in compared()]
            for axis, what, name, values in (
                ("x", "Columns", "steps", "5, 10, 20"),
                ("y", "Rows", "sampler", "ddim, plms"),
            ):
                with gr.Row():
                    add[axis] = gr.Dropdown(choices, value=name, label=f"{what} vary", min_width=130)
                    add[f"{axis}_values"] = gr.Textbox(
                        values,
                        label=f"{what}: values",
                        min_width=150,
                        elem_id=f"{axis}_values",
                    )
            add["draw_sheet"] = gr.Button("Draw the sheet", elem_id="draw_sheet")

    def _add_group(self, group: str, members: Sequence[Control]) -> None:
        title = TITLES.get(group, group[0].upper() + group[1:])
        visible = group not in EXTRA_GROUPS
        if group == CONTROL and not self.files.controls:
            return
        with gr.Accordion(title, open=False, visible=visible, elem_id=_id(group)) as accordion:
            if group == CONTROL:
                self._add_controlnet()
            for control in members:
                self._add_control(control.name)
        if any(not has_group(task, group) for task in TASKS.values()):
            self.groups[group] = accordion

    def _add_control(self, name: str, **layout: Any) -> None:
        self.held[name] = self._component(controls()[name], **layout)

    def _component(self, control: Control, **layout: Any) -> Any:
        """gradio's component of a control."""
        facts = {"label": control.label, "info": control.help, "elem_id": f"set_{control.name}", **layout}
        if control.name in IN_SIGHT:
            facts["info"] = None  # the placeholders say what is needed, and the help is in the documentation
        if control.form == "checkbox":
            return gr.Checkbox(control.value, **facts)
        if control.form == "choice":
            return gr.Dropdown(list(control.choices), value=control.value, **facts)
        if control.form == "slider":
            return gr.Slider(control.low, control.high, control.value, step=0.01, buttons=[], **facts)
        if control.form == "number":
            return gr.Number(control.value, step=0.05, **facts)
        placeholder, keyboard = _short(control), [f"keyboard-{control.keyboard}"]
        return gr.Textbox(control.value, placeholder=placeholder, max_lines=4, elem_classes=keyboard, **facts)

    def _add_adapters(self) -> None:
        add, files = self.parts, self.files
        visible = bool(files.loras or files.embeddings)
        with gr.Accordion("LoRA and textual inversions", open=False, visible=visible, elem_id="adapters"):
            add["loras"] = gr.Dropdown(
                list(files.loras), multiselect=True, label="LoRAs", visible=bool(files.loras), elem_id="loras"
            )
            add["lora_weights"] = gr.Textbox(
                "1",
                label="LoRA weights",
                info="Between commas, one for all or for each; 0.8:0.5 is for UNet and text encoder",
                visible=bool(files.loras),
                elem_id="lora_weights",
            )
            add["embeddings"] = gr.Dropdown(
                list(files.embeddings),
                multiselect=True,
                label="Textual inversions",
                info="A prompt calls one by its file's name",
                visible=bool(files.embeddings),
                elem_id="embeddings",
            )

    def _add_controlnet(self) -> None:
        add = self.parts
        add["control"] = gr.Dropdown(
            [NO_CHOICE, *self.files.controls], value=NO_CHOICE, label="ControlNet", elem_id="control"
        )
        add["control_image"] = gr.Image(
            label="Image that it follows",
            type="filepath",
            image_mode=None,
            sources=UPLOADS,
            height=220,
            buttons=[],
            elem_id="control_image",
        )
        with gr.Row(elem_id="control_span"):
            add["control_weight"] = gr.Slider(0, 2, 1, step=0.05, label="Weight", buttons=[], min_width=130)
            add["control_start"] = gr.Slider(0, 1, 0, step=0.05, label="From", buttons=[], min_width=130)
            add["control_end"] = gr.Slider(0, 1, 1, step=0.05, label="Up to", buttons=[], min_width=130)

    # What happens

    def _connect(self, blocks: gr.Blocks) -> None:
        add = self.parts
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        asked = {*self.held.values(), *(add[name] for name in add if name not in ("status", "gallery"))}
        asked = {one for one in asked if not isinstance(one, gr.Button)} - {add["inputs"], add["dropped"]}
        asked |= {self.results}
        outputs = [self.results, self.chosen]
        outputs += [add[name] for name in ("status", "gallery", "command", "inputs", "generate", "cancel")]
        outputs.append(add["draw_sheet"])
        for button, work in (("generate", self.generate), ("draw_sheet", self.draw_sheet)):
            add[button].click(work, asked, outputs, **quiet)
        add["cancel"].click(self.cancel, None, None, **quiet)
        shaped = [*self._parts_by_task(), *self.groups.values()]
        shaped += [self.held[name] for name in self._task_controls()]
        # who chooses twice before the first answer has come gets what was chosen last
        add["task"].input(self.choose_task, [add["task"]], shaped, trigger_mode="always_last", **quiet)
        shaped.append(add["task"])
        filled = [*dict.fromkeys([*shaped, *self.held.values(), add["status"]])]
        others = ("loras", "lora_weights", "embeddings", "control", "images")
        filled += [add[name] for name in others if name in add]
        add["dropped"].upload(self.fill, [add["dropped"]], [*filled, add["dropped"]], **quiet)
        shown_result = [self.chosen, add["command"], add["inputs"]]
        add["gallery"].select(self.show, [self.results], shown_result, **quiet)
        for task in self.tasks:
            if task.groups:
                work = partial(self.send, task)
                add[f"send_{task.name}"].click(
                    work,
                    [self.results, self.chosen],
                    [*shaped, add["status"]],
                    **quiet,
                )
        blocks.unload(self.leave)

    def _tasks_with_strength(self) -> list[Task]:
        return [task for task in self.tasks if shown(controls()["strength"], task)]

    def _parts_by_task(self) -> dict[Any, set[str]]:
        """The components beside the controls that only some tasks have, with the names of these tasks."""
        parts, found = self.parts, {self.parts[part]: set(tasks) for part, tasks in IMAGES_OF.items()}
        for task in self.tasks:
            found.setdefault(parts[f"model_{task.does}"], set()).add(task.name)
        return found | {parts[f"strength_{task.name}"]: {task.name} for task in self._tasks_with_strength()}

    def _task_controls(self) -> list[str]:
        """Single controls that some task lacks."""
        return [name for name in self.held if any(name in task.leave_out for task in TASKS.values())]

    async def generate(self, asked: dict, request: gr.Request) -> AsyncGenerator[dict]:
        """Makes images of what the controls hold; yields what the page shows meanwhile."""
        async with aclosing(self._work(self._order, asked, request)) as updates:
            async for update in updates:
                yield update

    async def draw_sheet(self, asked: dict, request: gr.Request) -> AsyncGenerator[dict]:
        """Makes the images of a sheet and draws it."""
        async with aclosing(self._work(self._sheet_order, asked, request)) as updates:
            async for update in updates:
                yield update

    async def _work(self, order_of: Any, asked: dict, request: gr.Request) -> AsyncGenerator[dict]:
        """The updates of a job. However it ends, the buttons can be pressed again, and one line says why."""
        add = self.parts
        buttons = [add["generate"], add["draw_sheet"]]
        busy = {button: gr.update(interactive=False) for button in buttons}
        idle = {button: gr.update(interactive=True) for button in buttons}
        idle |= {add["cancel"]: gr.update(interactive=False), add["gallery"]: gr.update(visible=True)}
        yield busy | {add["status"]: status_html("Reading the request …")}
        try:
            async with aclosing(self._progress(order_of, asked, request, idle)) as updates:
                async for update in updates:
                    yield update
        except Exception as error:
            yield idle | {add["status"]: status_html(self._reason(error), "error")}

    def _reason(self, error: Exception) -> str:
        """What the page says about an error; the terminal has those that are nobody's mistake."""
        if isinstance(error, InputError):
            return in_labels(error)
        if isinstance(error, ServiceError):
            return IN_TERMINAL.get(error.code) or _labelled(error.message)
        LOG.error(one_line(f"the page: {type(error).__name__}: {error}"), exc_info=self.debug)
        return "This failed; the terminal in which the page runs says why."

    async def _progress(
        self, order_of: Any, asked: dict, request: gr.Request, idle: dict
    ) -> AsyncGenerator[dict]:
        """How a job goes and, with `idle`, what came of it. InputError, ServiceError, and what else fails."""
        add, results, status = self.parts, asked[self.results], self.parts["status"]
        session = request.session_hash or ""
        client = f"{request.username or 'page'} {session}"
        self.folders.enter(session)
        order = await anyio.to_thread.run_sync(order_of, asked)
        submit = partial(self.engine.submit, client=client, model=order.model, preview=True)
        job = await anyio.to_thread.run_sync(submit, order.requests)
        self.running[session] = job
        try:
            yield {add["cancel"]: gr.update(interactive=True), status: progress_html(job)}
            async with aclosing(changes(job)) as moments:
                async for _ in moments:
                    hidden = {add["gallery"]: gr.update(visible=job.preview is None)}
                    yield hidden | {status: progress_html(job)}
        finally:
            job.cancel()  # if nobody listens any more
            self.running.pop(session, None)
        if job.state == CANCELLED:
            yield idle | {status: status_html("Cancelled.", "note")}
            return
        if job.error is not None:
            raise job.error
        made = await anyio.to_thread.run_sync(self._keep, order, job, session)
        results = [*made, *(one for one in results if Path(one.file).exists())][:KEPT_RESULTS]
        self.folders.keep(session, {Path(one.file).parent for one in results})
        count = "1 image" if len(job.images) == 1 else f"{len(job.images)} images"
        yield idle | {
            self.results: results,
            self.chosen: 0,
            status: status_html(f"{count} in {job.seconds:.1f} s."),
            add["gallery"]: gr.update(
                value=[(one.file, one.caption) for one in results], selected_index=0, visible=True
            ),
            add["command"]: made[0].command,
            add["inputs"]: gr.update(value=list(made[0].inputs) or None, visible=bool(made[0].inputs)),
        }

    def _asked(self, asked: dict) -> tuple[Task, dict[str, Any], dict[str, Any], str]:
        """The task, what its controls hold, its inputs, and its model. InputError."""
        value = {name: asked[part] for name, part in self.parts.items() if part in asked}
        task = TASKS[value["task"]]
        held = {name: asked[part] for name, part in self.held.items()}
        held["strength"] = value.get(f"strength_{task.name}")
        check_texts(held, self.engine.options.max_prompt)  # before one is parsed, which takes longer
        most = self.engine.options.max_pixels
        inputs: dict[str, Any] = {}
        if task.name in IMAGES_OF["editor"]:
            inputs["init_img"], inputs["mask"] = read_editor(value["editor"], most)
        elif task.groups:
            inputs["init_img"] = read_upload(value["image"], "Image to start from", most)
        if task.name in IMAGES_OF["depth_map"]:
            inputs["depth"] = read_upload(value["depth_map"], "Depth map", most)
        if value["loras"]:
            inputs["lora"] = self.files.lora_texts(value["loras"], value["lora_weights"])
        if value["embeddings"]:
            inputs["embedding"] = self.files.embedding_texts(value["embeddings"])
        if has_group(task, CONTROL) and value.get("control", NO_CHOICE) != NO_CHOICE:
            image = read_upload(value["control_image"], "Image that the ControlNet follows", most)
            if image is None:
                raise InputError("the ControlNet follows an image: drop one into its place")
            span = (value[f"control_{name}"] for name in ("weight", "start", "end"))
            inputs["control"] = (self.files.control(value["control"], image, *map(float, span)),)
        given = {name: one for name, one in inputs.items() if one is not None}
        return task, held, given, value[f"model_{task.does}"]

    def _order(self, asked: dict) -> Order:
        task, held, inputs, model = self._asked(asked)
        request = request_of(task, held, inputs)
        self.files.check(request)
        if request.seed is None:
            request = request.twin(seed=secrets.randbelow(2**32))
        images = _whole(asked[self.parts["images"]])
        return Order(task, model, tuple(image_of(request, k) for k in range(images)), request)

    def _sheet_order(self, asked: dict) -> Order:
        task, held, inputs, model = self._asked(asked)
        seed = request_of(task, held, inputs).seed
        seed = secrets.randbelow(2**32) if seed is None else seed
        x, y = (Axis.of(asked[self.parts[axis]], asked[self.parts[f"{axis}_values"]]) for axis in ("x", "y"))
        for axis in (x, y):
            check_texts({axis.name: axis.values}, self.engine.options.max_prompt)
        images, most = len(x.values) * len(y.values), self.engine.options.max_images
        if images > most:  # before a request is made for each
            raise InputError(
                f"the sheet has {len(x.values):,} columns and {len(y.values):,} rows, which are {images:,} "
                f"images; the most is {most:,}"
            )
        sheet = sheet_of(task, held, inputs, seed, x, y)
        for cell in sheet.cells:
            self.files.check(cell)
        first = request_of(task, held, inputs).twin(seed=seed)
        return Order(task, model, tuple(sheet.cells), first, sheet)

    def _keep(self, order: Order, job: Job, session: str) -> list[Result]:
        """Writes a finished job's files, and those that its command starts from."""
        with self.folders.adding(session, job.id) as folder:
            return self._written(order, job, folder)

    def _written(self, order: Order, job: Job, folder: Path) -> list[Result]:
        inputs = []
        for name, image in input_images(order.request).items():
            image.save(folder / name)
            inputs.append(str(folder / name))
        reader = self.engine.models.reader(order.model)
        command = partial(
            command_line,
            order.task,
            files=reader.files,
            runtime=self.engine.runtime,
            lora_folder=self.engine.options.lora_folder,
            loras=self.files.loras.values(),
            safety=self.engine.models.choices.get("safety", "auto"),
        )
        if order.sheet is not None:
            seed = order.request.seed
            file = folder / "sheet.png"
            file.write_bytes(self._drawn(order.sheet, job, seed))
            line = command(order.request, further=order.sheet.words(), script=SCRIPT)
            return [Result(str(file), f"sheet, seed {seed}", line, tuple(inputs))]
        made = []
        for k, image in enumerate(job.images):
            file = folder / f"{image.seed}.png"
            file.write_bytes(encoded(image, signer=self.signer))
            height, width = np.shape(image.pixels)[:2]
            caption = f"seed {image.seed}, {width}x{height}" + (", blackened" if image.nsfw else "")
            made.append(Result(str(file), caption, command(image_of(order.request, k)), tuple(inputs)))
        return made

    def _drawn(self, sheet: Sheet, job: Job, seed: int) -> bytes:
        """The file of a sheet with watermark, settings and signature, as compare.py writes it."""
        requests = [image.request for image in job.images]
        settings = grid_settings(job.images[0].pipeline, requests, {"n_samples": 1}, seed) | sheet.facts
        drawn = Watermarker.of(settings["watermark"])(sheet.drawn([image.pixels for image in job.images]))
        data = encode_image(drawn, image_texts(settings), source=source_type(settings))
        return data if self.signer is None else self.signer(data, "png", settings)

    def cancel(self, request: gr.Request) -> None:
        """Gives up what this session has running."""
        if job := self.running.get(request.session_hash or ""):
            job.cancel()

    def leave(self, request: gr.Request) -> None:
        """The browser has gone: nobody waits for its images any more, or looks at those that it has."""
        self.cancel(request)
        self.folders.leave(request.session_hash or "")

    def choose_task(self, name: str) -> dict:
        """Shows what a task has, and hides the rest."""
        return self._shape(TASKS[name])

    def _shape(self, task: Task) -> dict:
        updates = {
            **{part: gr.update(visible=task.name in tasks) for part, tasks in self._parts_by_task().items()},
            **{part: gr.update(visible=has_group(task, group)) for group, part in self.groups.items()},
        }
        for name in self._task_controls():
            updates[self.held[name]] = gr.update(visible=shown(controls()[name], task))
        return updates

    def fill(self, path: str | None) -> dict:
        """Fills the controls with the settings of a dropped image."""
        status, dropped = self.parts["status"], {self.parts["dropped"]: None}
        try:
            found = read_dropped(path, self.files, self.engine.options.max_pixels)
        except Exception as error:
            return dropped | {status: status_html(self._reason(error), "error")}
        if found.task not in self.tasks:
            return dropped | {
                status: status_html(f"{found.task.title} needs a model that is not here.", "error")
            }
        return dropped | self._filled(found)

    def _filled(self, found: Recorded) -> dict:
        task, add = found.task, self.parts
        updates = self._shape(task) | {add["task"]: task.name}
        for name in self.held.keys() & found.held.keys():
            value = found.held[name]
            updates[self.held[name]] = gr.update(value=value, **updates.get(self.held[name], {}))
        if task in self._tasks_with_strength():
            part = add[f"strength_{task.name}"]
            updates[part] = gr.update(visible=True, value=found.held["strength"])
        if model := self._model_by_hash(found):
            updates[add[f"model_{task.does}"]] = gr.update(visible=True, value=model)
        weights = ", ".join(found.loras.values()) or "1"
        updates |= {
            add["loras"]: gr.update(value=list(found.loras)),
            add["lora_weights"]: weights,
            add["embeddings"]: gr.update(value=list(found.embeddings)),
            add["images"]: 1,
        }
        if "control" in add:
            updates[add["control"]] = NO_CHOICE
        message = "The settings of that image are in the controls."
        updates[add["status"]] = status_html(" ".join([message, *map(_sentence, found.notes)]), "note")
        return updates

    def _model_by_hash(self, found: Recorded) -> str | None:
        """The bundled model that made an image; others are too large to be hashed meanwhile."""
        for name in self.models[found.task.does] if found.model_hash else ():
            weights = self.engine.models.reader(name).files.weights
            if bundled_family(weights) and same_model(found.model_hash, weights):
                return name
        return None

    def show(self, results: list[Result], event: gr.SelectData) -> dict:
        """The command of the image that was chosen in the gallery."""
        index = event.index if isinstance(event.index, int) and 0 <= event.index < len(results) else 0
        if not results:
            return {self.chosen: 0}
        one = results[index]
        files = gr.update(value=list(one.inputs) or None, visible=bool(one.inputs))
        return {self.chosen: index, self.parts["command"]: one.command, self.parts["inputs"]: files}

    def send(self, task: Task, results: list[Result], chosen: int) -> dict:
        """Takes the chosen result as the image that another task starts from."""
        if not results:
            return {self.parts["status"]: status_html("There is no result to start from yet.", "error")}
        file = results[min(chosen, len(results) - 1)].file
        if not Path(file).exists():
            message = "That result is there no more; its command makes it again."
            return {self.parts["status"]: status_html(message, "error")}
        updates = self._shape(task) | {self.parts["task"]: task.name}
        if task.name in IMAGES_OF["editor"]:
            part, value = self.parts["editor"], {"background": file, "layers": [], "composite": file}
        else:
            part, value = self.parts["image"], file
        updates[part] = gr.update(value=value, visible=True)
        return updates


async def changes(job: Job) -> AsyncGenerator[None]:
    """Comes back at the changes of a job, at most five times a second, until it is over. Holds no thread."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    stop = job.listen(lambda _: loop.call_soon_threadsafe(changed.set))
    try:
        while not job.over:
            await changed.wait()
            changed.clear()
            if not job.over:
                yield
                await asyncio.sleep(REDRAWN)
    finally:
        stop()


def image_of(request: ImageRequest, k: int) -> ImageRequest:
    """Image k of a run: its own seed, and its own noise to vary towards."""
    own = {"seed": image_seed(request.seed, k)}
    if request.variation_seed is not None:
        own["variation_seed"] = image_seed(request.variation_seed, k)
    return request.twin(**own)


def _whole(images: float | None) -> int:
    """The number of images that is asked for, 1 by an empty field. FieldError."""
    if images is None:
        return 1
    try:
        return IMAGES.check(int(images) if float(images).is_integer() else images)
    except ValueError as error:
        raise FieldError("Images: {why}", why=str(error)) from None


def status_html(message: str, kind: str = "") -> str:
    role = "alert" if kind == "error" else "status"
    return f'<p class="message {kind}" role="{role}">{html.escape(message)}</p>'


def progress_html(job: Job) -> str:
    """A job's bar, and what its images look like so far."""
    if job.state == QUEUED:
        ahead = job.position
        waiting = "1 image is ahead" if ahead == 1 else f"{ahead} images are ahead"
        text = f"Waiting: {waiting}." if ahead else "Waiting for the model …"
    else:
        text = f"{job.progress:.0%} after {job.seconds:.0f} s"
    bar = f'<progress max="1" value="{job.progress:.3f}" aria-label="Progress">{job.progress:.0%}</progress>'
    preview = ""
    if job.preview is not None:
        data = base64.b64encode(job.preview).decode("ascii")
        preview = f'<img class="preview" alt="Preview of the image" src="data:image/png;base64,{data}">'
    return f'<div role="status"><p class="message">{html.escape(text)}</p></div>{bar}{preview}'


def _labelled(message: str) -> str:
    """A message of the engine with a capital."""
    return message[:1].upper() + message[1:]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _short(control: Control) -> str:
    """A placeholder that fits its field."""
    own = {"width": "auto", "height": "auto", "scale": "auto", "seed": "random"}
    return own.get(control.name) or ("" if len(control.placeholder) > 24 else control.placeholder)


def _id(group: str) -> str:
    return "group_" + group.replace(" ", "_")
