"""Read a checkpoint safely, pick its weights, load them strictly.

Tensors are mapped from the file, not read: a 4 GB checkpoint opens in a fraction of a second, and of a
training checkpoint with its optimizer only the weights are ever touched.
"""

import io
import json
import mmap
import re
import struct
import traceback
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.families import family, identify
from ldm.weights.files import check_file, user_file
from ldm.weights.unpickle import StoredTensor, StoredValues, Unpickler

State = dict[str, Tensor]

# What people have instead of a checkpoint, by its first bytes.
OTHER_FILES = (
    (rb"version https://git-lfs", "a git-LFS pointer instead of the weights: run `git lfs pull`"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page, often a login or error page: download the file itself"),
    (rb"\s*[\[{]", "JSON text: give the .ckpt or .safetensors file itself"),
    (rb"\x1f\x8b|BZh|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive: unpack it first"),
    (rb"GGUF", "a GGUF file: give the .ckpt or .safetensors that it was made from"),
    (rb"\x89HDF", "a Keras (HDF5) file: give the .ckpt or .safetensors that it was made from"),
    (rb"", "not a checkpoint: its content is neither that of a .safetensors nor of a .ckpt"),
)
SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, the library's own
PICKLE_LIMIT = 100_000_000  # bytes; a full training checkpoint's has less than one


def read_state_dict(path: str | Path) -> State:
    """The tensors of a `.safetensors` or `.ckpt` by name: on the CPU, in the file's dtypes.

    The content decides which format it is, not the extension. The tensors are mapped: pages load when used,
    writing to one never reaches the file, and the file must stay unchanged while they live. A `state_dict` or
    `model` wrapper is removed. Whatever is not a tensor is dropped, and so are tensors of dtypes that no
    weight can have (quantised ones).

    Raises InputError for a file that is missing, a folder, empty, cut short, damaged, of another kind, or
    that carries code.
    """
    path = Path(path)
    check_file(path)
    with user_file(path), path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    head = buffer[:512]
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= SAFETENSORS_HEADER_LIMIT:
        read = _read_safetensors
    elif head.startswith(b"PK"):
        read = _read_zip
    elif head.startswith(b"\x80"):
        read = _read_legacy
    else:
        what = next(what for start, what in OTHER_FILES if re.match(start, head, re.I))
        raise InputError(f"{path} is {what}")
    try:
        return read(path, buffer)
    except InputError:
        raise
    except Exception as error:  # there is nothing that damaged or hostile bytes cannot make a parser raise
        if buffer.tell() == len(buffer):  # only the old format's pickles are read from the buffer itself
            raise _cut_short(path, "its pickle ends early") from error
        # str(error) fails where the error is about a number of thousands of digits
        why = "".join(traceback.format_exception_only(error)).partition("\n")[0][:300]
        raise InputError(f"{path} is damaged ({why}): download or copy it again") from error


def _read_safetensors(path: Path, buffer: mmap.mmap) -> State:
    end = 8 + int.from_bytes(buffer[:8], "little")
    if end <= len(buffer):
        header = json.loads(buffer[8:end])
        end += max((t["data_offsets"][1] for key, t in header.items() if key != "__metadata__"), default=0)
    if end > len(buffer):
        raise _cut_short(path, f"its header promises {end:,} bytes and it holds {len(buffer):,}")
    with safe_open(path, "pt") as file:
        return _not_empty({name: file.get_tensor(name) for name in file.keys()}, header, path)  # noqa: SIM118


def _read_zip(path: Path, buffer: mmap.mmap) -> State:
    """torch.save since 1.6: a zip of `<name>/data.pkl` and one record `<name>/data/<key>` per storage."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise _cut_short(path, "it begins like a .ckpt but lacks the directory at its end") from error
    with archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch("[^/]+/data.pkl", name)]
        if not roots:
            raise InputError(f"{path} is a zip archive, but not of torch.save: unpack the checkpoint inside")
        root = roots[0]
        if f"{root}byteorder" in names:
            with archive.open(f"{root}byteorder") as file:
                if file.read(7) != b"little":
                    raise _big_endian(path)
        program = archive.getinfo(f"{root}data.pkl")
        if program.file_size > PICKLE_LIMIT:  # a few kB of a zip can stand for gigabytes
            size = f"{program.file_size:,} bytes"
            raise InputError(f"{path} is no ordinary checkpoint: it has {size} besides the tensors")

        def locate(values: StoredValues) -> tuple[Any, int]:
            record = archive.getinfo(f"{root}data/{values.key}")
            if record.file_size < values.nbytes:
                raise ValueError(f"{record.filename!r} is too short")
            if record.compress_type != zipfile.ZIP_STORED:  # packed again by another program
                return bytearray(archive.read(record)), 0
            name_and_extra = struct.unpack_from("<HH", buffer, record.header_offset + 26)  # lengths
            return buffer, record.header_offset + 30 + sum(name_and_extra)

        content = Unpickler(io.BytesIO(archive.read(program)), path).load()
        return _map_tensors(content, locate, path)


def _read_legacy(path: Path, buffer: mmap.mmap) -> State:
    """torch.save before 1.6: pickles of a magic number, the version, the system, the object and its storages'
    keys; then for each key a count (int64) and the values."""
    if Unpickler(buffer, path).load() != 0x1950A86A20F9469CFC6C:
        raise InputError(f"{path} is a pickle, but not of torch.save: save the state dict with torch.save")
    _version, system = (Unpickler(buffer, path).load() for _ in range(2))
    if not system["little_endian"]:
        raise _big_endian(path)
    unpickler = Unpickler(buffer, path)
    content = unpickler.load()
    keys = Unpickler(buffer, path).load()
    positions, end = {}, buffer.tell()
    for key in keys:
        positions[key] = end + 8
        end = positions[key] + unpickler.values[key].nbytes
    if end > len(buffer):
        raise _cut_short(path, f"its tensors need {end:,} bytes and it holds {len(buffer):,}")
    return _map_tensors(content, lambda values: (buffer, positions[values.key]), path)


def _map_tensors(content: Any, locate: Callable[[StoredValues], tuple[Any, int]], path: Path) -> State:
    """The tensors of the innermost state dict; `locate` gives the buffer and position of stored values."""
    for _ in range(8):  # not `while`: a hostile file may contain itself
        inner = [content.get(key) for key in ("state_dict", "model")] if isinstance(content, dict) else []
        content = next((value for value in inner if isinstance(value, dict)), content)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict: save the model's state_dict() instead of the model")
    stored = {
        name: t
        for name, t in content.items()
        if isinstance(name, str) and isinstance(t, StoredTensor) and t.is_usable
    }
    return _not_empty({name: t.map(*locate(t.values)) for name, t in stored.items()}, content, path)


def _not_empty(state: State, content: dict, path: Path) -> State:
    if not state:
        found = ", ".join(repr(key)[:60] for key in list(content)[:5]) or "nothing"
        raise InputError(f"{path} is not a model checkpoint: it holds no tensors (found: {found})")
    return state


def _cut_short(path: Path, how: str) -> InputError:
    return InputError(f"{path} is cut short: {how}. Download or copy it again")


def _big_endian(path: Path) -> InputError:
    return InputError(f"{path} was written on a big-endian machine: save it again on an ordinary one")


def pick_weights(
    state: Mapping[str, Tensor], which: str, *, path: str | Path, names: Iterable[str] = ()
) -> State:
    """The state dict with its "raw" or averaged ("ema") UNet weights as `model.*`, and without `model_ema.*`.

    Training keeps each UNet weight twice: `model.a.b.weight` and, averaged over the steps,
    `model_ema.abweight`. `names` are the model's weight names, needed for a file that has only the latter.

    Raises InputError where the file lacks the weights asked for.
    """
    if which not in ("ema", "raw"):
        raise InputError(f"unknown weights {which!r}: choose ema or raw")
    ema = {name for name in state if name.startswith("model_ema.")}
    averaged = ema - {"model_ema.decay", "model_ema.num_updates"}
    picked = {name: tensor for name, tensor in state.items() if name not in ema}
    unet = [name for name in picked if name.startswith("model.")]
    if which == "raw":
        if averaged and not unet:
            raise InputError(f"{path} has only EMA weights for its UNet: use --weights ema")
        return picked
    if ema and not averaged:  # sd-v1-4.ckpt and others
        raise InputError(f"{path} keeps its EMA weights as its plain ones: use --weights raw")
    if not averaged:
        raise InputError(f"{path} has no EMA weights: use --weights raw")
    twins = {name: _ema_name(name) for name in unet or names if name.startswith("model.")}
    lacking = [name for name, twin in twins.items() if twin not in averaged]
    if lacking:
        count = f"{len(lacking)} of {len(twins)} EMA weights"
        raise InputError(f"{path} lacks {count}, first that of {lacking[0]}: use --weights raw")
    return picked | {name: state[twin] for name, twin in twins.items()}


def _ema_name(name: str) -> str:
    """`model.diffusion_model.out.0.bias` -> `model_ema.diffusion_modelout0bias` (CompVis `LitEma`)."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


# The file's copies of what the model computes itself. They are never loaded: merge tools round them to half.
COMPUTED = re.compile(
    r"(low_scale_model\.|noise_augmentor\.)?(betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod"
    r"|sqrt_(recip_|recipm1_)?alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights)"
    r"|.*\.position_ids|cond_stage_model\..*\.attn_mask"
)
# What training and conversion leave in files, ignored by a model that has no such weight.
LEFTOVER = re.compile(
    r"logvar|scale_factor|v_pred|ztsnr|(first_stage_model\.)?(loss|model_ema)\..*"
    r"|cond_stage_model\.(model\.|transformer\.)?(logit_scale|text_projection(\.weight)?)"
)


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, path: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Assign every weight of `model`, built on the meta device: none is initialised or held twice.

    Floating-point weights become `dtype` (None: stay as stored); those that are already stay mapped.
    `requires_grad` stays as the model was built. CLIP's names fit with `text_model.` and without it
    (transformers >= 5.6, NovelAI). Schedule buffers are never taken from the file.

    Weights that the model does not have (merges carry `embedding_manager.*` and the like) are left out, with
    a notice. Raises InputError for missing or misshapen ones, naming the model that the file looks like.
    """
    wanted = {name: t for name, t in model.state_dict().items() if not COMPUTED.fullmatch(name)}
    given = {_respell(name, wanted): t for name, t in state.items() if not COMPUTED.fullmatch(name)}
    missing = [name for name in wanted if name not in given]
    misshapen = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    unknown = [name for name in given if name not in wanted and not LEFTOVER.fullmatch(name)]
    no_floats = [
        name
        for name, t in wanted.items()
        if name in given and t.is_floating_point() and not given[name].is_floating_point()
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(wanted)} weights are missing (first {missing[0]})")
    if misshapen:
        first = misshapen[0]
        shapes = f"{list(given[first].shape)} instead of {list(wanted[first].shape)}"
        faults.append(
            f"{len(misshapen)} of {len(wanted)} weights have another shape (first {first}: {shapes})"
        )
    if no_floats:
        first = no_floats[0]
        faults.append(
            f"{len(no_floats)} of {len(wanted)} weights are no floating-point numbers "
            f"(first {first}: {given[first].dtype})"
        )
    if faults:
        if unknown:
            faults.append(f"{len(unknown)} weights are not of this model (first {unknown[0]!r})")
        given_family, config = family(given)
        fit = f"its config is {config}" if config else "no config here fits it"
        raise InputError(
            f"{path} looks like {given_family} ({fit}), the model is {identify(wanted)}: {', '.join(faults)}"
        )
    if unknown:
        first = ", ".join(repr(name[:80]) for name in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        notice(f"{path}: {len(unknown)} of its weights are not of this model and are left out ({first})")

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    model.load_state_dict({name: convert(given[name]) for name in wanted}, strict=False, assign=True)
    hollow = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if hollow:
        raise RuntimeError(f"{len(hollow)} tensors of the model are left without values (first {hollow[0]})")


def _respell(name: str, wanted: Mapping[str, Tensor]) -> str:
    """A text-encoder name as the model spells it: with `text_model.`"""
    full = name.replace("cond_stage_model.transformer.", "cond_stage_model.transformer.text_model.", 1)
    return full if name not in wanted and full in wanted else name
