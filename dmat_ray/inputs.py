"""What callers from Python give, checked where it comes in: each message names what was found, and the way out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dmat_ray.attack import frozen
from dmat_ray.config import Config, Section
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError, first_line
from dmat_ray.networks.classifiers import HEEDS_OTHERS, heeds_others
from dmat_ray.types import Generator
from dmat_ray.validated import describe
from dmat_ray.wording import did_you_mean

Kind = TypeVar("Kind", bound=Section)
RENDERED_AGAIN = 16 / 255  # how far pixels of bf16 may be from those of a set, which are rounded to levels
LOOKED_AT = 32  # images of a set that are rendered again: all may be too many


def shape_of(x: Tensor) -> str:
    """A shape as messages have it."""
    return str(tuple(x.shape))


def require_images(x: Any, name: str = "x_BCHW", *, levels: bool = False) -> Tensor:
    """Raise UserError unless these are images BCHW in [0, 1]; with `levels` uint8 will do, too, and floats of half precision."""
    if not isinstance(x, Tensor):
        raise _no_tensor(x, name)
    if x.dtype == torch.uint8 and not levels:
        raise UserError(f"{name} is uint8, but images are float in [0, 1] here; give {name} / 255")
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise UserError(f"{name} is {_dtype(x)}, but images are float in [0, 1]{' or uint8' if levels else ''} here")
    if x.dtype in (torch.float16, torch.bfloat16) and not levels:
        raise UserError(
            f"{name} is {_dtype(x)}, whose steps are too coarse for a budget; give {name}.float() and network.float()"
        )
    if x.dim() != 4 or len(x) == 0:
        hint = f"; give {name}[None] for one image" if x.dim() == 3 else f"; give {name}[:, None]" if x.dim() == 2 else ""
        raise UserError(f"{name} has the shape {shape_of(x)}, but must have images, channels, height, width{hint}")
    if x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise UserError(f"{name} has the shape {shape_of(x)}, its channels last; give {name}.permute(0, 3, 1, 2)")
    if x.is_floating_point():
        low, high = (float(end) for end in x.detach().aminmax())
        if not 0 <= low <= high <= 1:
            hint = "; divide by 255" if low >= 0 and high > 2 else ""
            if low < 0:
                hint = "; undo their normalisation, which belongs inside the network"
            raise UserError(f"{name} ranges from {low:.6g} to {high:.6g}, but images must lie in [0, 1]{hint}")
    return x


def require_made_by(generator: Generator, x_BCHW: Tensor, name: str = "x_BCHW") -> None:
    """Raise UserError unless images have the shape of a generator's."""
    shape = (generator.channels, generator.resolution, generator.resolution)
    if tuple(x_BCHW.shape[1:]) != shape:
        raise UserError(
            f"{name} has images of {_by(x_BCHW.shape[1:])}, the generator makes {_by(shape)}; scale or pad them to that"
        )


def require_labels(y: Any, x_BCHW: Tensor, num_classes: int, name: str = "y_B") -> Tensor:
    """Raise UserError unless these are int64 labels of these images, each below `num_classes`."""
    if not isinstance(y, Tensor):
        raise UserError(f"{name} is a {type(y).__name__}, not a torch tensor; give torch.tensor({name})")
    if y.dtype != torch.int64:
        way = f"{name}.argmax(dim=1)" if y.dim() == 2 else f"{name}.long()"
        raise UserError(f"{name} is {_dtype(y)}, but labels are int64; give {way}")
    if y.shape != x_BCHW.shape[:1]:
        raise UserError(f"{name} has the shape {shape_of(y)}, but {len(x_BCHW)} images have as many labels, ({len(x_BCHW)},)")
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise UserError(
            f"{name} ranges from {int(y.min())} to {int(y.max())}, but the network puts out {num_classes} classes, 0 to "
            f"{num_classes - 1}"
        )
    return y


def require_classifier(network: Any, x_BCHW: Tensor, name: str = "the network") -> int:
    """Raise UserError unless a network takes such images and puts out a logit a class; returns the number of classes.

    In eval mode it must look at each image by itself.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} is a {type(network).__name__}, not a torch.nn.Module")
    where = next(iter([*network.parameters(), *network.buffers()]), x_BCHW).device
    if where != x_BCHW.device:
        raise UserError(f"{name} is on {where}, the images are on {x_BCHW.device}; move one of them, as by .to('{where}')")
    try:
        with frozen(network), torch.no_grad():
            logits = network(x_BCHW[:1])
    except Exception as error:  # of whatever type its author thinks right
        reason = first_line(error)
        raise UserError(f"{name} cannot take images of {_by(x_BCHW.shape[1:])}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        found = shape_of(logits) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{name} puts out {found} for one image, but must put out one logit a class, (1, classes)")
    with frozen(network), tf32(False):
        if heeds_others(network, x_BCHW[:1].repeat(2, 1, 1, 1)):
            raise UserError(f"{name} {HEEDS_OTHERS}")
    return int(logits.shape[1])


def require_codes(w: Any, x_BCHW: Tensor, generator: Generator, batch_size: int, name: str = "w_BLD") -> Tensor:
    """Raise UserError unless these are codes of these images, and the images are g(w): a move along the manifold begins there.

    All are looked at, `batch_size` at a time.
    """
    if w is None:
        raise UserError(
            f"this threat moves w, and there is none; give {name} and its images g(w), as `project` or a set has them"
        )
    if not isinstance(w, Tensor):
        raise _no_tensor(w, name)
    shape = (len(x_BCHW), generator.num_ws, generator.w_dim)
    if tuple(w.shape) != shape:
        raise UserError(f"{name} has the shape {shape_of(w)}, but {len(x_BCHW)} codes of this generator have {shape}")
    require_made_by(generator, x_BCHW)
    where = generator.w_mean.device
    for what, value in ((name, w), ("x_BCHW", x_BCHW)):
        if value.device != where:
            raise UserError(f"{what} is on {value.device}, the generator is on {where}; move one of them, as by .to('{where}')")
    far_B = _apart(generator, w, x_BCHW, batch_size)
    if len(wrong := (~(far_B <= RENDERED_AGAIN)).nonzero()):
        row = int(wrong[0])
        raise UserError(
            f"x_BCHW is not g({name}): pixels of image {row} differ by up to {float(far_B[row]):.2g}; a move along the manifold "
            "begins there, so give the images that `project` returns beside its w, in their order, not those that it was given"
        )
    return w


def require_one_each(w: Any, x_BCHW: Tensor, name: str = "w_BLD") -> None:
    """Raise UserError unless this is a tensor with a row for each image, of whatever meaning."""
    if not isinstance(w, Tensor):
        raise _no_tensor(w, name)
    if w.shape[:1] != x_BCHW.shape[:1]:
        raise UserError(
            f"{name} has the shape {shape_of(w)}, but {len(x_BCHW)} images have as many codes; leave it out, or give these"
        )


def require_set_of(generator: Generator, data: ManifoldSet) -> None:
    """Raise UserError unless the images of a set, of the generator's size, are its g(w), as far as LOOKED_AT of them tell."""
    shape, found = (generator.num_ws, generator.w_dim), data.w.shape[1:]
    some = np.sort(np.random.default_rng(0).permutation(len(data))[:LOOKED_AT])
    batch = data.batch(some, "on_manifold").to(generator.w_mean.device)
    assert batch.w_BLD is not None
    if found != shape:
        told = f"its w is {_by(found)}, this one's {_by(shape)}"
    elif not (far := float(_apart(generator, batch.w_BLD, batch.x_BCHW, 8).max())) <= RENDERED_AGAIN:
        told = f"its images are not g(w), pixels differ by up to {far:.2g}"
    else:
        return
    raise UserError(f"the set was made by another generator: {told}; give the one that it was projected with")


def require_kinds(data: ManifoldSet, sets: Sequence[str]) -> None:
    """Raise UserError unless an open set has its images g(w), by which its generator is known, and those of `sets`."""
    for kind in ("on_manifold", *sets):
        if len(getattr(data, kind)) < len(data):
            raise UserError(f"data was opened without its {kind} images, which are needed here; open it with images=None")


def require_threat(threat: Any) -> None:
    """Raise UserError for what renders no images: a threat's name, say."""
    if not callable(getattr(threat, "render", None)):
        found = f"'{threat}'" if isinstance(threat, str) else f"a {type(threat).__name__}"
        raise UserError(f"threat is {found}; give what build_threat makes, as build_threat('image', eps='8/255')")


def require_batch_size(batch_size: Any) -> int:
    """A number of images, of any type of whole numbers. Raises UserError for none, and for what is no number of them."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; give a whole number, 1 or more")
    return int(batch_size)


def require_config(config: Any) -> None:
    """Raise UserError for what are no settings: a preset's name, say."""
    if not isinstance(config, Config):
        found = f"'{config}'" if isinstance(config, str) else f"a {type(config).__name__}"
        raise UserError(f"config is {found}; give what settings makes, as settings('demo', 'dmat')")


def require_model_names(models: Mapping[Any, Any]) -> None:
    """Raise UserError unless there are models, each by a text."""
    if not models:
        raise UserError("there are no models to evaluate; give them by names, {'mine': network}")
    for name in models:
        if not isinstance(name, str) or not name:
            raise UserError(f"models has the name {name!r}; names are texts, as in {{'mine': network}}")


def require_gradients(what: str) -> None:
    """Raise UserError where torch keeps what gradients need from being recorded; torch.no_grad() alone does not."""
    if torch.is_inference_mode_enabled():
        raise UserError(f"torch.inference_mode() is on, and {what} needs gradients; call it outside, or use torch.no_grad()")


def names_of(x_BCHW: Tensor, ids: list[str] | None) -> list[str]:
    """The images' names, by default numbers. Raises UserError unless each has one of its own."""
    if ids is None:
        return [str(k) for k in range(len(x_BCHW))]
    if len(ids) != len(x_BCHW):
        raise UserError(f"ids has {len(ids)} names for {len(x_BCHW)} images")
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise UserError(f"ids has '{twice}' more than once; give each image a name of its own, from which its draws come")
    return ids


def section(
    kind: type[Kind], values: dict[str, Any], what: str, *, over: Kind | None = None, hidden: tuple[str, ...] = ("threat",)
) -> Kind:
    """Settings of a kind, checked, over others of it. Raises UserError that names what is wrong, and what there is.

    Fields in `hidden` are not among what there is: the caller sets them.
    """
    if over is not None and not isinstance(over, kind):
        raise UserError(f"{what} settings are a {type(over).__name__}; give a {kind.__name__}, a section of settings(...)")
    before = {} if over is None else {name: getattr(over, name) for name in kind.model_fields}
    try:
        return kind.model_validate({**before, **values})
    except ValidationError as error:
        said, known = describe(error, kind, hidden).removeprefix("settings: "), [n for n in kind.model_fields if n not in hidden]
        unknown = [str(item["loc"][-1]) for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = "" if all(did_you_mean(name, known) for name in unknown) else f"; it has {', '.join(known)}"
        raise UserError(f"{what}: {said}{hint}") from None


@torch.no_grad()
def _apart(generator: Generator, w_BLD: Tensor, x_BCHW: Tensor, batch_size: int) -> Tensor:
    """For each image the largest difference of a pixel between g(w) and x."""
    parts = zip(w_BLD.split(batch_size), x_BCHW.split(batch_size), strict=True)
    return torch.cat([(generator.synthesis(w) - x).abs().flatten(1).amax(dim=1) for w, x in parts])


def _no_tensor(value: Any, name: str) -> UserError:
    return UserError(f"{name} is a {type(value).__name__}, not a torch tensor; convert it, as by torch.from_numpy")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _by(shape: Any) -> str:
    return "x".join(map(str, shape))
