"""The pieces for a notebook: one call each for projection, threats, attacks and evaluation.

Nothing is computed here: inputs are checked, and what the jobs are made of is called. Needs no Ray.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dmat_ray import attack as attacks
from dmat_ray import cli, inputs, suites, threats
from dmat_ray.attack import Attacked
from dmat_ray.attack.search import require_reach
from dmat_ray.config import ON_MANIFOLD, THREATS, Config, EvaluationConfig, ProjectionConfig, Row
from dmat_ray.config.threats import named
from dmat_ray.data import set_reader
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation
from dmat_ray.evaluation.metrics import Results
from dmat_ray.manifold import encoder, generators
from dmat_ray.manifold.projection import Projection, Projector
from dmat_ray.models import checkpoint
from dmat_ray.storage import Place
from dmat_ray.types import Batch, Generator, Threat
from dmat_ray.validated import describe
from dmat_ray.wording import did_you_mean

_THREATS = {named(kind): kind for kind in THREATS}
_OF_TABLES = ("name", "group", "curve")  # fields of a row that say its place in a table: a single search has none


def project(
    generator: Generator | Place,
    x_BCHW: Tensor,
    config: ProjectionConfig | None = None,
    *,
    ids: list[str] | None = None,
    **projection: Any,
) -> Projection:
    """For each image x the w in W+ whose g(w) comes close to it (DMAT, arXiv 2009.02470, section 3).

    `generator` is loaded, or a name or folder; x_BCHW has its size, float in [0, 1] or uint8. `config` is a section such as
    `settings("demo").projection`, by default the published 1,000 steps with LPIPS; `projection` are single settings over it.
    Returns w_BLD, its images x_BCHW in [0, 1], and for each image lpips_B, l1_B (mean absolute), l2_B (mean squared), steps_B
    and given_up_B (its loss or gradient was not finite), all on the CPU. `ids` (by default numbers) seed each image's noise. The
    search runs where the generator is. start="encoder" needs a name or folder of the generator, and takes the encoder in the
    folder `encoder`, else in runs/default/encoder, else beside the generator.
    Raises UserError for images of another size, range or type, and for LPIPS weights or an encoder that there is not.

    >>> from dmat_ray import load_images, project, settings
    >>> digits, _ = load_images("mnist5k", limit=10)
    >>> config = settings("demo").projection
    >>> nearest = project("mnist32", digits.x_BCHW, config, lpips=0, steps=1)
    >>> found = project("mnist32", digits.x_BCHW, config, lpips=0)
    >>> found.w_BLD.shape, bool(found.l1_B.mean() < 0.8 * nearest.l1_B.mean())  # about half as far from x
    (torch.Size([10, 8, 64]), True)
    """
    inputs.require_gradients("a projection")
    config = inputs.section(ProjectionConfig, projection, "projection", over=config)
    inputs.require_images(x_BCHW, levels=True)
    g = _loaded(generator)
    inputs.require_made_by(g, x_BCHW)
    ids = inputs.names_of(x_BCHW, ids)
    start, device = None, g.w_mean.device
    if config.start == "encoder":
        if not isinstance(generator, Place):
            raise UserError(
                "start is encoder, which lies beside the generator: give that one's name or folder, or start='nearest'"
            )
        folder = encoder.locate_encoder(config.encoder, Config().output, str(generator))
        start = encoder.load_encoder(folder, generators.fingerprint(str(generator)), device)
    return Projector(g, config, device, start).project(x_BCHW.detach().cpu(), ids)


def build_threat(threat: str, *, generator: Generator | Place | None = None, **settings: Any) -> Threat:
    """What an attack may change, and how far, by its name in suites: image, latent, joint, fog, snow, jpeg, stadv, ...

    `settings` are those of its rows and terms, such as eps (a number, or a text such as "8/255") and norm; images are in [0, 1],
    moves of w in raw W units or standard deviations (scale="std"). latent and joint move w, and need the generator.
    Raises UserError for a name, a setting or a value that there is not.

    >>> from dmat_ray import build_threat
    >>> build_threat("image", eps="8/255").limit
    0.03137254901960784
    >>> build_threat("latent", generator="mnist32", eps=0.06, norm="l2").norm
    'l2'
    >>> build_threat("image", epsilon=0.1)
    Traceback (most recent call last):
    dmat_ray.errors.UserError: threat image: epsilon: there is no such setting (found 0.1); did you mean eps?
    """
    if threat not in _THREATS:
        raise UserError(f"there is no threat '{threat}'; {did_you_mean(str(threat), _THREATS)}choose from {', '.join(_THREATS)}")
    if generator is None and issubclass(_THREATS[threat], ON_MANIFOLD):
        raise UserError(f"threat {threat} moves w; give its generator, as build_threat('{threat}', generator='mnist32')")
    config = inputs.section(_THREATS[threat], settings, f"threat {threat}")
    return threats.build(config, None if generator is None else _loaded(generator))


def attack_images(
    network: nn.Module,
    threat: Threat,
    x_BCHW: Tensor,
    y_B: Tensor,
    w_BLD: Tensor | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    **search: Any,
) -> Attacked:
    """Search a threat for images that the network takes for another class: projected gradient descent, unless told otherwise.

    `network` is any classifier that takes images in [0, 1] and looks at each by itself; it is attacked in eval mode, on GPUs
    without TF32, and left as it was. x_BCHW is float in [0, 1], y_B int64, both on its device; for a threat that moves w, w_BLD
    with g(w) = x_BCHW.
    `search` are settings of a suite's rows: steps, step_size, random_start, restarts, method (pgd, momentum, apgd, lagrange,
    lpa, square, random), loss, targets, early_exit. One step of size eps without random_start is FGSM. What becomes of an image
    depends on `seed` and its name in `ids` (by default numbers), not on `batch_size`.
    Returns x_BCHW as attacked, theta (what renders them), loss_B, and broken_B: which images the network gets wrong now, those
    included that it got wrong before. Raises UserError for inputs that do not fit together, NotFiniteError for outputs that are
    not finite.

    >>> import torch
    >>> from dmat_ray import attack_images, build_threat, load_images
    >>> train, test = load_images("mnist5k", "train")[0], load_images("mnist5k", limit=200)[0]
    >>> means = torch.stack([train.x_BCHW[train.y_B == k].mean(dim=0).flatten() for k in range(10)])
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))  # the class of the nearest mean image
    >>> _ = network[1].weight.data.copy_(means), network[1].bias.data.copy_(-means.square().sum(dim=1) / 2)
    >>> wrong = network(test.x_BCHW).argmax(dim=1) != test.y_B
    >>> fgsm = attack_images(network, build_threat("image", eps=0.1), test.x_BCHW, test.y_B,
    ...                      steps=1, step_size=0.1, random_start=False)
    >>> warp = attack_images(network, build_threat("stadv", eps=0.05), test.x_BCHW, test.y_B, steps=10)
    >>> share = [images.float().mean().item() for images in (wrong, fgsm.broken_B, warp.broken_B)]  # about 0.2, 0.4, 0.9
    >>> share[0] < 0.3 < share[1] < 0.6 < share[2]
    True
    """
    inputs.require_gradients("an attack")
    inputs.require_threat(threat)
    batch_size = inputs.require_batch_size(batch_size)
    inputs.require_images(x_BCHW)
    num_classes = inputs.require_classifier(network, x_BCHW)
    inputs.require_labels(y_B.to(x_BCHW.device) if isinstance(y_B, Tensor) else y_B, x_BCHW, num_classes)
    if (generator := getattr(threat, "generator", None)) is not None:
        inputs.require_codes(w_BLD, x_BCHW, generator, batch_size)
    elif w_BLD is not None:
        inputs.require_one_each(w_BLD, x_BCHW)
    if wrong := [key for key in _OF_TABLES if key in search]:
        raise UserError(f"{wrong[0]} belongs to a suite's table, not to a search")
    row = inputs.section(Row, {**search, "name": "attack"}, "attack", hidden=_OF_TABLES)
    require_reach(row, threat)
    names = inputs.names_of(x_BCHW, ids)
    batch = Batch(names, x_BCHW.detach(), y_B.to(x_BCHW.device), None if w_BLD is None else w_BLD.detach())
    parts = [batch.take(rows) for rows in torch.arange(len(batch)).split(batch_size)]
    with tf32(False):
        found = [attacks.attack(network, threat, part, row, seed=seed, purpose="attack") for part in parts]
    return Attacked(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def evaluate(
    models: Mapping[str, nn.Module | Place],
    data: ManifoldSet,
    generator: Generator | Place,
    config: EvaluationConfig | str,
    **evaluation_settings: Any,
) -> Results:
    """Attack models with every row of a suite, on a test set's on-manifold and natural images, as jobs/evaluate.py does.

    `models` gives each by its name: a folder, or any classifier that takes images in [0, 1]. `data` is from `open_set`, and
    `generator` the one that it was projected with. `config` is a section such as `settings("demo").evaluation`, or the name or
    file of a suite; the settings over it are limit, sets, batch_size, ... The models are attacked where the generator is.
    Returns what tables and intervals are made of; its `rows` are a pyarrow table, one row a model, test set, attack and example.
    Raises UserError for a model, a set and a generator that do not fit together.

    >>> from dmat_ray import evaluate, make_set, open_set, settings, terminal_table, train
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> test = open_set(make_set(config), "test")
    >>> results = evaluate({"dmat": train(config)}, test, "mnist32", "digits_search", sets=("on_manifold",), limit=10)
    >>> clean, linf = (results.accuracy("dmat", "on_manifold", name) for name in ("clean", "linf"))  # about 0.8 and 0.6
    >>> linf.value < clean.value, linf.count
    (True, 10)
    >>> row = results.rows.to_pylist()[-1]
    >>> row["model"], row["set"], row["attack"], round(row["linf"], 3)
    ('dmat', 'on_manifold', 'linf', 0.1)
    """
    inputs.require_gradients("an evaluation")
    if not isinstance(models, Mapping):
        raise UserError(f"models is a {type(models).__name__}; give models by names, {{'mine': network}}")
    if not isinstance(data, ManifoldSet):
        found = f"'{data}'" if isinstance(data, str) else f"a {type(data).__name__}"
        raise UserError(f"data is {found}; give a split of an open set, open_set(folder, 'test')")
    given = {"suites": (config,)} if isinstance(config, str) else {}
    base = None if isinstance(config, str) else config
    settings = inputs.section(EvaluationConfig, {**given, **evaluation_settings}, "evaluation", over=base)
    try:
        settings = cli.with_absolute_weights(suites.resolved(settings))
    except ValidationError as error:
        raise UserError(f"evaluation: {describe(error)}") from None
    inputs.require_model_names(models)
    inputs.require_kinds(data, settings.sets)
    g = _loaded(generator)
    first = data.batch(np.arange(min(8, len(data))), "on_manifold").to(g.w_mean.device)
    inputs.require_made_by(g, first.x_BCHW, "the set")
    if isinstance(generator, Place):
        set_reader.require_generator(data.manifest, generators.fingerprint(str(generator)), "the set")
    else:
        inputs.require_set_of(g, data)
    evaluation.require_suite(settings, data.manifest)
    networks: dict[str, nn.Module] = {}
    for name, model in models.items():
        if isinstance(model, Place):
            networks[name], run = checkpoint.load_classifier(model, first.x_BCHW.device)
            evaluation.require_fit(run, data.manifest, name, settings)
        else:
            networks[name] = model
        count = inputs.require_classifier(networks[name], first.x_BCHW, f"model '{name}'")
        if count != len(data.class_names):
            raise UserError(f"model '{name}' puts out {count} classes, the set has {len(data.class_names)}")
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(attacks.frozen(network))
        evaluator = evaluation.Evaluator(settings, data, g, networks.__getitem__, list(networks), first.x_BCHW.device)
        return Results(evaluation.evaluate_here(evaluator), settings)


def _loaded(generator: Generator | Place) -> Generator:
    """A generator given by name, by folder or as it is."""
    if isinstance(generator, Place):
        return generators.load_generator(str(generator))
    if not callable(getattr(generator, "synthesis", None)):
        raise UserError(f"generator is a {type(generator).__name__}; give 'mnist32', a folder, or what load_generator returns")
    return generator
