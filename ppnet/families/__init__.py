"""Where units live in Hugging Face models: one file per family, found by listing this folder."""

import importlib
import pkgutil

from ppnet.families.base import FAMILIES, Family, check_decoder, is_decoder, predicts_tokens, structure_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family", "check_decoder", "is_decoder", "predicts_tokens", "structure_of"]
