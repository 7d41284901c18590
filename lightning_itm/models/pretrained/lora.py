"""Adapters of low rank (LoRA) in the towers of a model, made by ``peft``."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_itm.models.optimization import is_in_block
from lightning_itm.models.pretrained.lora_options import LoraOptions


def import_peft() -> Any:
    """Return the module ``peft``.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "Expected the package `peft`, which makes the adapters of `lora`, got none. Install it: "
            'pip install "lightning_itm[lora]".'
        ) from error
    return peft


def add_adapters(model: nn.Module, towers: Mapping[str, nn.Module], options: Mapping[str, LoraOptions]) -> None:
    """Freeze a model and put adapters into its towers, in place.

    Adapters start at zero, so the model computes what it did before.

    Args:
        model: The model. All its weights are frozen.
        towers: Its towers, of the same parts.
        options: The options of each tower that gets adapters.

    Raises:
        ValueError: if a tower has no layer that can be adapted, or a layer that was named can't be.
    """
    peft = import_peft()
    model.requires_grad_(False)
    parts = set(model.modules())
    for kind, wanted in options.items():
        tower = towers[kind]
        names = _target_names(kind, tower, wanted.target_modules)
        alpha = 2 * wanted.rank if wanted.alpha is None else wanted.alpha
        # The text tower may be a new module around parts of the model. A layer is replaced in the module that holds it, so
        # it must be looked for in these parts.
        roots = {"": tower} if tower in parts else {f"{name}.": part for name, part in tower.named_children()}
        for prefix, root in roots.items():
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            if own:
                config = peft.LoraConfig(
                    r=wanted.rank, lora_alpha=alpha, lora_dropout=wanted.dropout, target_modules=own
                )
                peft.inject_adapter_in_model(config, root)
                vars(root).pop("peft_config", None)  # it would be taken for a model of peft where it is saved
    from lightning_itm.models.pretrained.lora_attention import AdaptedAttention

    for module in model.modules():
        if _is_attention(module):
            module.__class__ = AdaptedAttention


def merge_adapters(model: nn.Module, owner: nn.Module | None = None) -> nn.Module:
    """Return a copy of a model whose adapters are added to the weights. The names of its weights are those without adapters.

    Args:
        model: A model with adapters, or without any. It is not changed.
        owner: The module around it, whose methods may be hooks of the model. It is not copied, and the copy has no such hooks.
    """
    merged = copy.deepcopy(model, {} if owner is None else {id(owner): owner})
    merged._state_dict_pre_hooks.clear()
    while adapted := [(name, part) for name, part in merged.named_modules() if hasattr(part, "lora_A")]:
        name, layer = adapted[0]  # the outermost first: an attention layer merges what it holds
        part: Any = layer
        if _is_attention(part):
            plain = part.merge_into_plain()
        else:
            part.merge()
            plain = part.get_base_layer()
        parent, _, last = name.rpartition(".")
        setattr(merged.get_submodule(parent), last, plain)
    return merged


def _target_names(kind: str, tower: nn.Module, wanted: tuple[str, ...] | None) -> list[str]:
    modules = dict(tower.named_modules())
    can = {name: _why_not(name, modules) for name in modules}
    if wanted is None:
        names = [name for name, reason in can.items() if reason is None and is_in_block(name)]
        # A captioner stands in the text tower of CoCa, and no embedding depends on it.
        names = [name for name in names if not name.startswith("text_decoder.")]
        if not names:
            raise ValueError(
                f"Expected an {kind} tower with attention or linear layers in blocks for `lora`, got none in "
                f"{_kind_of(tower)}. Leave {kind!r} out of `lora`: the tower is then frozen."
            )
        return names
    found = {one: [name for name in modules if name == one or name.endswith(f".{one}")] for one in wanted}
    for one, names in found.items():
        reasons = [can[name] for name in names if can[name] is not None]
        if reasons or not names:
            raise ValueError(
                f"Expected `target_modules` of `lora` to be layers of the {kind} tower that can be adapted, got {one!r}: "
                f"{reasons[0] if reasons else 'there is no such layer'}. Those that can are "
                f"{sorted({name.rpartition('.')[2] for name, reason in can.items() if reason is None})}."
            )
    return sorted({name for names in found.values() for name in names})


def _why_not(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return why a layer can't be adapted, and None if it can."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention):
        same = module._qkv_same_embed_dim
        return None if same else "its queries and keys have other widths, which `peft` does not adapt"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, and only attention and linear layers are adapted"
    # Such a layer is never called. Its weights are read by the attention, and an adapter around it would do nothing.
    if isinstance(parent, nn.MultiheadAttention):
        return "it belongs to an attention layer of torch, which is adapted as a whole"
    if type(parent).__name__ == "AttentionPool2d":
        return "it belongs to the attention pool of a ResNet, which reads its weights without calling it"
    if parent is modules[""] and type(parent) is nn.Module:
        return "it stands directly in the model, outside of its blocks"
    return None


def _kind_of(tower: nn.Module) -> str:
    return type(tower).__name__ if type(tower) is not nn.Module else str([name for name, _ in tower.named_children()])


def _is_attention(module: Any) -> bool:
    return hasattr(module, "lora_A") and isinstance(module.get_base_layer(), nn.MultiheadAttention)
