"""The modelling files that travel with compacted models: `modeling_ppnet_<stem>.py`.

They are copied beside the weights and must import torch and transformers only, never ppnet. Decoders that are known by
their layout share one, which makes its classes from the stock ones. To ship a family of another shape, add its file
here; classes are found by `model_type` (``ppnet_<base>``) and by the stock class they extend.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ppnet.errors import UnsupportedModelError
from ppnet.families import FAMILIES
from ppnet.families.layout import SHIPPED

PREFIX = "ppnet_"


@dataclass(frozen=True)
class Shipped:
    """Classes for one base model type: the config, and the models by the Auto class that makes them (``AutoModel`` the
    bare one), those with a head first."""

    config: Any
    models: Mapping[str, Any]

    @property
    def auto_map(self) -> dict[str, str]:
        """The `auto_map` entry of config.json: which class of the copied file each Auto class takes."""
        classes = {"AutoConfig": self.config, **self.models}
        return {auto: f"{item.__module__.rpartition('.')[2]}.{item.__name__}" for auto, item in classes.items()}

    def for_stock(self, stock: type) -> type:
        """The shipped class that extends a stock model class.

        Raises:
            UnsupportedModelError: a class with another head.
        """
        for shipped in self.models.values():
            if issubclass(shipped, stock):
                return shipped
        *most, last = [shipped.__mro__[2].__name__ for shipped in self.models.values()]
        raise UnsupportedModelError(
            f"model: a {stock.__name__} with layers of different widths cannot be written; supported are "
            f"{', '.join(most)} and {last}, or a plan with equal widths."
        )


def _module(model_type: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.modeling_ppnet_{FAMILIES[model_type].stem}")


def shipped(model_type: str) -> Shipped:
    """The classes for a base model type such as ``llama``. Imports the family's modelling file on first use."""
    if FAMILIES[model_type].stem == SHIPPED:
        return _derived(model_type)
    classes: list[Any] = [item for item in vars(_module(model_type)).values() if isinstance(item, type)]
    config = next(item for item in classes if getattr(item, "model_type", None) == PREFIX + model_type)
    models = {item._auto_class: item for item in classes if getattr(item, "config_class", None) is config}
    bare = models.pop("AutoModel")
    return Shipped(config, {**models, "AutoModel": bare})


def _derived(model_type: str) -> Shipped:
    """The classes of a decoder that is known by its layout, each made from the stock one of transformers."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    module = _module(model_type)
    if model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"model: transformers has no class for {model_type!r} to extend by layers of different widths; give a plan "
            "with equal widths."
        )
    names = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES[model_type],
    }
    config = getattr(module, f"PPNet{CONFIG_MAPPING_NAMES[model_type]}")
    return Shipped(config, {auto: getattr(module, f"PPNet{name}") for auto, name in names.items()})


def _activate(model_type: str) -> Any:
    """Registers the real classes of one model type with the Auto classes; returns the config class."""
    import transformers

    classes = shipped(model_type)
    transformers.AutoConfig.register(PREFIX + model_type, classes.config, exist_ok=True)
    for auto, model in classes.models.items():
        getattr(transformers, auto).register(classes.config, model, exist_ok=True)
    return classes.config


def _deferred_config(base: str) -> type:
    """A stand-in for a config class that loads the real one when AutoConfig first uses it."""

    class DeferredConfig:
        model_type = PREFIX + base

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _activate(base)(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return _activate(base).from_dict(*args, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return _activate(base).from_pretrained(*args, **kwargs)

    return DeferredConfig


def register() -> None:
    """Lets `AutoModelForCausalLM.from_pretrained(folder)` load compacted models without `trust_remote_code`.

    Cheap and safe to call again: modelling files are imported when a compacted model is first loaded.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for base in FAMILIES:
        if PREFIX + base not in CONFIG_MAPPING:
            AutoConfig.register(PREFIX + base, _deferred_config(base))
