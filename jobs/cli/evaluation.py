"""Commands on what weights are worth: accuracies, features, reconstructions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TextIO

import typer

from jobs.cli.completion import run_names
from jobs.cli.elsewhere import at_cluster, at_store
from jobs.cli.shared import Overrides, RunRoot, amended_recipe, existing_run, open_session
from pipeline.access.places import normal
from pipeline.errors import UserError

app = typer.Typer()

WHAT_HELP = (
    "A run, RUN@STEP, a consolidated .safetensors file or a folder of several, an official .pth file, or `random`: "
    "weights that nothing has trained."
)
Weights = Annotated[str, typer.Option("--weights", help=WHAT_HELP, autocompletion=run_names)]
Step = Annotated[
    int | None,
    typer.Option(min=1, help="Step of one of the run's checkpoints; default: the newest.", show_default=False),
]
RecipeOfWeights = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="Recipe whose model a .pth file or `random` has; default for a .pth file: convmae_base_official.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of `random`; default: the recipe's.", show_default=False)]
ImageSize = Annotated[str, typer.Option(help="Size of the images: 224, or 256x192; default: that of the pretraining.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto: GPUs where there are any.")]


@app.command(cls=at_cluster("data", "train_data", "labels", "train_labels", "json_file", "page"))
def evaluate(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=WHAT_HELP, autocompletion=run_names)],
    overrides: Overrides = None,
    *,
    data: Annotated[str, typer.Option(help="URL of the data set to test on.")],
    train_data: Annotated[
        str, typer.Option(help="URL of a data set to learn from; default: --data is divided.", show_default=False)
    ] = "",
    labels: Annotated[
        str,
        typer.Option(help="Text file of labels for --data, a key, a tab and a label in each line; default: its own."),
    ] = "",
    train_labels: Annotated[str, typer.Option(help="The same for --train-data.")] = "",
    knn: Annotated[bool, typer.Option("--knn", help="Weighted nearest neighbours.")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="A linear probe on frozen features.")] = False,
    head: Annotated[bool, typer.Option("--head", help="The head of a fine-tuned classifier, on whole images.")] = False,
    finetune: Annotated[
        bool,
        typer.Option("--finetune", help="Fine-tune WHAT on the train samples, as a run, and measure the classifier."),
    ] = False,
    finetune_recipe: Annotated[
        str, typer.Option(help="Of --finetune; default: the one for models of this architecture.", show_default=False)
    ] = "",
    k: Annotated[list[int] | None, typer.Option("--k", help="Neighbours; default: 10 and 20.")] = None,
    l2: Annotated[float, typer.Option(help="Weight of the linear probe's squared weights, 1/C of scikit-learn.")] = 1.0,
    test_ratio: Annotated[float, typer.Option(help="Share of --data to test on where it is divided.")] = 0.2,
    samples: Annotated[int, typer.Option(min=0, help="Most samples of each data set; 0: all.")] = 0,
    split_seed: Annotated[int, typer.Option(min=0, help="Of the division, and of the choice of --samples.")] = 0,
    step: Step = None,
    recipe: RecipeOfWeights = "",
    seed: Seed = None,
    image_size: ImageSize = "",
    device: Device = "auto",
    json_file: Annotated[str, typer.Option("--json", help="JSON file to write; `-`: standard output.")] = "",
    page: Annotated[str, typer.Option(help="HTML page to write.")] = "",
    run_root: RunRoot = "",
) -> None:
    """Measure what weights are worth on labelled samples: by kNN, a linear probe, fine-tuning, or a classifier's head.

    Top-1 and top-5 with confidence intervals, each class, and the confusion matrix. Without --knn, --linear, --head and
    --finetune a fine-tuned classifier is measured by its head, other weights by kNN and a linear probe. The same
    command gives the same figures. FIELD=VALUE changes the model of --recipe; with --finetune, `model.` fields do, and
    all others change the fine-tuning.
    """
    from jobs.evaluate.commands import STANDARD_OUTPUT, Outputs, evaluate_and_say
    from jobs.evaluate.evaluation import ProbePlan, SamplePlan
    from jobs.evaluate.knn import NEIGHBOURS

    session = open_session()
    json_url = json_file if json_file in ("", STANDARD_OUTPUT) else normal(json_file)
    outputs = Outputs(json_url, page and normal(page))
    if finetune_recipe and not finetune:
        raise UserError("--finetune-recipe", "must be given with --finetune", finetune_recipe, "add --finetune")
    of_model = [word for word in overrides or () if not finetune or word.startswith("model.")]
    session.storage.check(normal(data), write=False)
    subject = _subject(
        session,
        what,
        step=step,
        recipe=recipe,
        overrides=of_model,
        seed=seed,
        run_root=run_root,
        encoder_alone=True,
    )
    head = head or (subject.head is not None and not (knn or linear or finetune))
    if not (head or finetune):
        knn, linear = (True, True) if knn == linear else (knn, linear)
    if k and not knn:
        raise UserError("--k", "must be given with --knn", k[0], "add --knn")
    plan = SamplePlan(
        data=normal(data),
        train_data=train_data and normal(train_data),
        labels=labels and normal(labels),
        train_labels=train_labels and normal(train_labels),
        test_ratio=test_ratio,
        most_samples=samples,
        seed=split_seed,
        learns=knn or linear or finetune,
    )
    tuned = None
    if finetune:
        from jobs.control.finetune_evaluation import finetuning_recipe
        from jobs.recipe.overrides import parse_overrides

        changes = parse_overrides([word for word in overrides or () if word not in of_model])
        named = what if step is None else f"{what}@{step}"
        tuned = _finetuning(
            session, finetuning_recipe(finetune_recipe, subject.config, plan, changes), named, subject, run_root
        )
    evaluate_and_say(
        session,
        subject,
        plan,
        ProbePlan(tuple(sorted(set(k or NEIGHBOURS))) if knn else (), linear, l2, head),
        outputs,
        image_size=image_size,
        device=device,
        used=_trained_with(session, what, plan, run_root) if head else None,
        finetune=tuned,
    )


@app.command(cls=at_cluster("dataset", "out"))
def embed(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="URL of a data set.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The .parquet or .npz file to write, as a path or URL.")],
    overrides: Overrides = None,
    *,
    weights: Weights,
    step: Step = None,
    recipe: RecipeOfWeights = "",
    seed: Seed = None,
    image_size: ImageSize = "",
    device: Device = "auto",
    run_root: RunRoot = "",
) -> None:
    """Write the features of every image of a data set, as Parquet or NumPy's npz: id, key, label, features.

    The features are those that `convmae evaluate` uses: the mean over the patches of the last stage, then a LayerNorm.
    FIELD=VALUE changes the model of --recipe.
    """
    from jobs.evaluate.commands import embed_and_say
    from jobs.evaluate.feature_files import check_suffix

    session, data, out = open_session(), normal(dataset), normal(out)
    check_suffix(out)
    session.storage.check(data, write=False)
    subject = _subject(
        session,
        weights,
        step=step,
        recipe=recipe,
        overrides=overrides,
        seed=seed,
        run_root=run_root,
        encoder_alone=True,
    )
    embed_and_say(session, subject, data, out, image_size=image_size, device=device)


@app.command(cls=at_store("pictures", "out"))
def reconstruct(
    pictures: Annotated[
        list[str], typer.Argument(metavar="PICTURES...", help="Image files, or folders that hold some; paths or URLs.")
    ],
    *,
    weights: Weights,
    out: Annotated[str, typer.Option(help="The .png file to write, as a path or URL.")],
    step: Step = None,
    recipe: RecipeOfWeights = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the masks; and of the weights, where they are `random`.")] = 0,
    run_root: RunRoot = "",
) -> None:
    """Draw pictures, what a model sees of them, and how it reconstructs the rest.

    Each picture is cut to its centre. What a model of normalised patches predicts is shown with the mean and variance
    of the original patch.
    """
    from jobs.evaluate.commands import check_suffix, reconstruct_and_say
    from jobs.weights.named_weights import RANDOM

    session, out = open_session(), normal(out)
    check_suffix("--out", out, ".png")
    of_weights = seed if weights == RANDOM else None
    subject = _subject(session, weights, step=step, recipe=recipe, seed=of_weights, run_root=run_root)
    reconstruct_and_say(session, subject, pictures, out, seed=seed)


def _subject(
    session: Any,
    what: str,
    *,
    step: int | None,
    recipe: str,
    seed: int | None,
    run_root: str,
    overrides: Iterable[str] | None = None,
    encoder_alone: bool = False,
) -> Any:
    """The weights that a user names.

    Raises:
        UserError: There are none, or options do not fit them.
    """
    from jobs.evaluate.subject import OFFICIAL_RECIPE, Subject
    from jobs.weights.named_weights import RANDOM, is_file, parted

    what, step = parted(what, step)
    is_random = what == RANDOM
    is_foreign = not is_random and is_file(session.storage, what)
    named = recipe or (OFFICIAL_RECIPE if is_foreign and not _is_consolidated(what) else "")
    for option, value, fits in (
        ("--step", step, not (is_random or is_foreign)),
        ("--seed", seed, is_random),
        ("--recipe", recipe or None, is_random or is_foreign),
        ("FIELD=VALUE", next(iter(overrides or ()), None), bool(named)),
    ):
        if value is not None and not fits:
            raise UserError(option, f"must not be given with {what}", value, "leave it out")
    if is_random and not recipe:
        raise UserError("--recipe", "must name the model of random weights", "", "give --recipe tiny")
    config = amended_recipe(named, overrides) if named else None
    if is_random:
        assert config is not None
        seed = config.seed if seed is None else seed
        return Subject.of_seed(config.model, seed, config.name, config.statistics)
    if is_foreign:
        model = None if config is None else config.model
        return Subject.of_file(session.storage, normal(what), model, encoder_alone=encoder_alone)
    return Subject.of_run(existing_run(session, what, run_root), step)


def _finetuning(session: Any, recipe: Any, what: str, subject: Any, run_root: str) -> Any:
    """What fine-tunes weights by a recipe; all input is checked here.

    Raises:
        UserError: It does not fit.
    """
    from jobs.control.finetune_evaluation import finetuned, planned_finetuning
    from jobs.evaluate.commands import Finetuned
    from jobs.evaluate.subject import Subject
    from jobs.weights.named_weights import RANDOM, resolved_weights

    if what == RANDOM:
        recipe = recipe.amended({"seed": subject.origin["seed"]})
    fields = resolved_weights(session.storage, recipe, what, lambda name: existing_run(session, name, run_root))

    plan = planned_finetuning(session, recipe.amended(fields), what)

    def classifier(stream: TextIO) -> Finetuned:
        run = finetuned(session, plan, stream)
        return Finetuned(Subject.of_run(run), {"recipe": recipe.name, "epochs": recipe.epochs, "run": run.url})

    return classifier


def _trained_with(session: Any, what: str, plan: Any, run_root: str) -> Any:
    """The samples of the evaluated data set that a fine-tuned run was trained with; None where it is no such run."""
    from jobs.finetune.training_labels import TrainingLabels
    from jobs.weights.named_weights import RANDOM, is_file, parted

    if what == RANDOM or is_file(session.storage, what):
        return None
    recipe = existing_run(session, parted(what)[0], run_root).read_recipe()
    if recipe.finetune is None or recipe.data != plan.data:
        return None
    return TrainingLabels.of(session.storage, recipe).train


def _is_consolidated(what: str) -> bool:
    """Whether a file knows its model: safetensors of ours do, official files do not."""
    from jobs.weights.named_weights import TORCH_SUFFIXES

    return not what.endswith(TORCH_SUFFIXES)
