"""An optimizer by the path of its class."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch

from burnish.config.optimizers import CustomOptimizer
from burnish.config.suggest import nearest
from burnish.errors import ConfigError, MissingPackage

_HERE = "train.optimizer"


def custom(section: CustomOptimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of the class that the section names.

    Raises:
        ConfigError: no such class, none of an optimizer, or one that does not take the arguments; names those it takes.
        MissingPackage: its package is not installed.
    """
    found = _class(section.class_path)
    parameters = inspect.signature(found).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    names = [
        name
        for name, one in list(parameters.items())[1:]
        if one.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    arguments = {"lr": section.learning_rate, **section.arguments}
    if section.weight_decay is not None:
        arguments["weight_decay"] = section.weight_decay
    for name in arguments:
        if name not in names and not takes_any:
            raise _not_taken(section, name, names)
    missing = [
        name
        for name in names
        if parameters[name].default is inspect.Parameter.empty and name not in arguments
    ]
    if missing:
        raise ConfigError(
            f"{_HERE}.arguments: {section.class_path} needs {', '.join(missing)}, which is not given"
        )
    try:
        optimizer: torch.optim.Optimizer = found(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{_HERE}.arguments: {section.class_path} refuses them: {error}",
            remedy=f"It takes {', '.join(names)}.",
        ) from error
    return optimizer


def _class(path: str) -> type[torch.optim.Optimizer]:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{_HERE}.class_path: {module_name} cannot be imported: no module named {error.name}",
            remedy="Install its package, or mend the path: it is a module and a class, as torch.optim.RAdam.",
        ) from error
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    classes = [
        one
        for one, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    ]
    near = nearest(name, classes)
    hint = f"; did you mean {module_name}.{near}?" if near else ""
    what = "there is no such class" if found is None else "this is no torch.optim.Optimizer"
    raise ConfigError(f"{_HERE}.class_path: {what}: {path}{hint}")


def _not_taken(section: CustomOptimizer, name: str, names: list[str]) -> ConfigError:
    takes = f"{section.class_path} takes {', '.join(names)}"
    if name == "lr":
        return ConfigError(f"{_HERE}.class_path: this class has no learning rate (`lr`): {takes}")
    where = f"{_HERE}.{name}" if name == "weight_decay" else f"{_HERE}.arguments.{name}"
    near = nearest(name, names)
    return ConfigError(
        f"{where}: no such argument" + (f"; did you mean {near}?" if near else ""), remedy=f"{takes}."
    )
