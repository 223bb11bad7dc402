"""
The README that goes with a trained model: where it comes from, how it was made, how to use it, whom to cite.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES_DIR = Path(__file__).parent / "templates"

# Shown whatever their value; what a reader looks for first.
_USUAL_ARGUMENTS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "optim",
    "seed",
    "bf16",
)
# Secrets, places on the author's machine, and what says nothing about the training.
_HIDDEN_ARGUMENTS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "resume_from_checkpoint",
    "deepspeed",
    "fsdp",
    "local_rank",
    "do_train",
    "do_eval",
    "do_predict",
    "report_to",
    "push_to_hub",
    "disable_tqdm",
    "tp_size",
    "debug",
}
_HIDDEN_PREFIXES = ("hub_", "push_to_hub", "logging_", "save_", "dataloader_", "log_level", "trackio_", "use_cpu")
_HIDDEN_PARTS = ("token_", "api_key", "password", "secret", "base_url", "_host")


def _is_hidden(name: str) -> bool:
    if name in ("eos_token", "pad_token"):
        return False
    return (
        name in _HIDDEN_ARGUMENTS
        or name.startswith(_HIDDEN_PREFIXES)
        or name.endswith(("_token", "_dir", "_path"))
        or any(part in name for part in _HIDDEN_PARTS)
    )


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _text(value: Any) -> str:
    value = getattr(value, "value", value)  # an enum's own text
    return str(value).replace("|", "\\|").replace("\n", " ")


def training_arguments_table(arguments: Any) -> list[tuple[str, str]]:
    """
    Name and value of the arguments a reader wants: the usual ones, and those that differ from their defaults.

    Args:
        arguments: the trainer's config (a dataclass), or a mapping, which is shown whole. Tokens, keys and local paths
            are left out of both.
    """
    if arguments is None:
        return []
    if isinstance(arguments, Mapping):
        return [(name, _text(value)) for name, value in arguments.items() if not _is_hidden(name)]
    fields = {field.name: field for field in dataclasses.fields(arguments) if field.init}
    shown = [name for name in _USUAL_ARGUMENTS if name in fields]
    for name, field in fields.items():
        value = getattr(arguments, name)
        simple = isinstance(value, (str, int, float, bool, list, tuple, dict)) or hasattr(value, "value")
        if name not in shown and simple and value != _default(field) and not _is_hidden(name):
            shown.append(name)
    return [(name, _text(getattr(arguments, name))) for name in shown]


def framework_versions() -> list[tuple[str, str]]:
    """Versions of what took part in the training; PEFT where an adapter was trained."""
    packages = ["trl", "transformers", "torch", "datasets", "tokenizers", "accelerate"]
    if "peft" in sys.modules:
        packages.append("peft")
    versions = []
    for package in packages:
        try:
            versions.append((package, version(package)))
        except PackageNotFoundError:  # run from a source tree
            versions.append((package, "unknown"))
    return versions


def _render(template_file: str, **values: Any) -> str:
    """Render a bundled template, or a file of the user's (which may include the bundled ones)."""
    path = Path(template_file)
    folders = [str(TEMPLATES_DIR)]
    if path.parent != Path("."):
        folders.insert(0, str(path.parent))
    environment = Environment(loader=FileSystemLoader(folders), undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(path.name).render(**values)


def _links(names: str | Sequence[str] | None) -> str:
    names = [names] if isinstance(names, str) else list(names or [])
    links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in names]
    return " and ".join([", ".join(links[:-1]), links[-1]]) if len(links) > 1 else "".join(links)


def generate_model_card(
    base_model: str | None,
    model_name: str,
    hub_model_id: str,
    dataset_name: str | None,
    tags: list[str],
    wandb_url: str | None,
    trackio_url: str | None,
    trainer_name: str,
    trainer_citation: str | None = None,
    template_file: str | None = None,
    paper_title: str | None = None,
    paper_id: str | None = None,
    comet_url: str | None = None,
    arguments: Any = None,
    curves: str | Path | None = None,
) -> ModelCard:
    """
    Write the card of a trained model.

    Args:
        base_model: the Hub id of what was trained; None where it has none.
        model_name: title of the card.
        hub_model_id: where the model is or will be; used in the quick start.
        dataset_name: Hub id of the dataset, or a list of them.
        tags: tags on the Hub.
        wandb_url: address of the run at Weights & Biases.
        trackio_url: address of the run's trackio Space.
        trainer_name: the method ("SFT", ...).
        trainer_citation: BibTeX of the method.
        template_file: a bundled template's name (`lm_model_card.md`, `rm_model_card.md`), or the path of your own;
            default the first.
        paper_title: title of the method's paper.
        paper_id: its arXiv id.
        comet_url: address of the run at Comet.
        arguments: the trainer's config, or a mapping; shown as a table without tokens, keys and paths.
        curves: the picture of the training curves, lying next to the card.

    Returns:
        The card; `card.save(path)` writes it.
    """
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name or None,
        library_name="transformers",
        model_name=model_name,
        tags=tags,
    )
    run_links = [
        f"[{tracker}]({url})"
        for tracker, url in (("Weights & Biases", wandb_url), ("trackio", trackio_url), ("Comet", comet_url))
        if url
    ]
    versions = framework_versions()
    content = _render(
        template_file or "lm_model_card.md",
        card_data=data.to_yaml(),
        base_model=base_model,
        model_name=model_name,
        hub_model_id=hub_model_id,
        dataset_name=dataset_name,
        dataset_links=_links(dataset_name),
        tags=tags,
        wandb_url=wandb_url,
        trackio_url=trackio_url,
        comet_url=comet_url,
        run_links=", ".join(run_links),
        trainer_name=trainer_name,
        trainer_citation=trainer_citation,
        paper_title=paper_title,
        paper_id=paper_id,
        arguments=training_arguments_table(arguments),
        curves=Path(curves).name if curves is not None else None,
        versions=versions,
        trl_version=dict(versions)["trl"],
    )
    return ModelCard(content)


def generate_completions_card(
    dataset_name: str, hub_model_id: str | None = None, trainer_name: str | None = None
) -> DatasetCard:
    """
    Write the card of a dataset of completions logged in training.

    Args:
        dataset_name: title of the card.
        hub_model_id: the model that wrote them.
        trainer_name: the method it was trained with.

    Returns:
        The card; `card.push_to_hub(repo_id)` puts it in place.
    """
    data = DatasetCardData(tags=["trl", "completions"])
    content = _render(
        "completions_dataset_card.md",
        card_data=data.to_yaml(),
        dataset_name=dataset_name,
        hub_model_id=hub_model_id,
        trainer_name=trainer_name,
    )
    return DatasetCard(content)
