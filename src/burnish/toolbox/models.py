"""What models there are, by the names of their modules: whose modules a file speaks of, in whatever spelling.

Names and shapes are those of the families' own skeletons, native names those of their export tables; no model has to be
there. Releases of other depths and widths than the skeleton's have the same names but for the first number in them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from burnish.adapters.layer import adaptable_modules, weight_shape
from burnish.errors import AdapterError
from burnish.export.formats import key_prefix
from burnish.export.stacking import native_module
from burnish.export_keys import ExportKeys, NativeModule
from burnish.families.registry import families, family_named
from burnish.family import Family

_FIRST_NUMBER = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")
_DOTTED = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "unet.", "transformer.", "")
_FLAT = ("lora_unet__", "lora_unet_", "lycoris_")
_LEAST_BLOCKS = 6  # of a stack whose number differs between releases
_CLIP_LAYER = re.compile(
    r"(text_model[._])?encoder[._]layers[._](?P<layer>\d+)[._]"
    r"(?P<module>self_attn[._][qkv]_proj|self_attn[._]out_proj|mlp[._]fc[12])"
)
_TEXT = re.compile(
    r"(base_model\.model\.)?(lora_te(?P<flat>\d?)_|text_encoder(_(?P<dotted>\d))?\."
    r"|text_encoders\.(?P<comfy>\w+)\.(transformer\.)?)(?P<rest>.+)"
)
_COMFY_ENCODERS = {"clip_l": 1, "clip_h": 1, "clip_g": 2}


@dataclass(frozen=True, slots=True)
class TextModule:
    """A module of a text encoder: which, counted from 1, and what module as transformers has it with `text_model.`.

    Of an encoder that is no CLIP `module` is what stood in the key.
    """

    encoder: int
    module: str
    is_clip: bool


def text_module(spelled: str) -> TextModule | None:
    """What a key of a text encoder means; None of any other key."""
    match = _TEXT.fullmatch(spelled)
    if match is None:
        return None
    number = match["flat"] or match["dotted"] or _COMFY_ENCODERS.get(match["comfy"] or "", 1)
    layer = _CLIP_LAYER.fullmatch(match["rest"])
    if layer is None:
        return TextModule(int(number), match["rest"], is_clip=False)
    module = re.sub(r"^(self_attn|mlp)[._]", r"\1.", layer["module"])
    return TextModule(int(number), f"text_model.encoder.layers.{layer['layer']}.{module}", is_clip=True)


@dataclass(frozen=True)
class Model:
    """One family's denoiser as its adapters know it."""

    name: str
    family: type[Family]
    keys: ExportKeys
    part: str
    shapes: Mapping[str, tuple[int, ...]]  # of the weights of all that takes an adapter, as released
    norms: Mapping[str, tuple[int, ...]]  # of what has a weight of one axis, which some files change as well
    title: str

    def native(self, module: str) -> NativeModule:
        return native_module(self.keys, module)

    @cached_property
    def _targets(self) -> dict[str, NativeModule]:
        """What each module is called, with dots and without, in both namings -> what is meant."""
        known = {**self.shapes, **self.norms}
        natives = [self.native(module) for module in known]
        # Where a native name is also one of diffusers', of another module, diffusers' is meant.
        targets = [native for native in natives if known.keys() >= set(native.holds)]
        targets += [NativeModule(module, (module,)) for module in known]
        flat = {target.name.replace(".", "_"): target for target in targets}
        return {**flat, **{target.name: target for target in targets}}

    @cached_property
    def _by_block(self) -> dict[str, NativeModule]:
        """The same with `#` for the number of the block, where both namings count alike."""
        stacks = Counter(stack for stack, _ in {_stack(module) for module in self.shapes})
        found = {}
        for spelled, target in self._targets.items():
            first = _FIRST_NUMBER.search(spelled.replace("_", "."))
            numbers = {match[0] for one in target.holds if (match := _FIRST_NUMBER.search(one))}
            # Stages of a UNet are few, and not more in any release.
            if first is None or numbers != {first[0]} or stacks[_stack(target.holds[0])[0]] < _LEAST_BLOCKS:
                continue
            general = NativeModule(
                _general(target.name), tuple(map(_general, target.holds)), target.halves_swapped
            )
            found[_general(spelled)] = general
        for pattern, holds in self.keys.spellings.items():
            found[pattern] = NativeModule(pattern, holds)
        return found

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        own = [key_prefix(format, self.part, self.keys) for format in self.keys.formats]
        flat = (*_FLAT, f"lora_{self.part}_")
        known = dict.fromkeys([*own, f"{self.part}.", *flat, *_DOTTED])
        return tuple(sorted(known, key=len, reverse=True))

    def find(self, spelled: str) -> NativeModule | None:
        """The module, or modules stacked, that the beginning of a key means; None if not of this model."""
        for prefix in self._prefixes:
            if spelled.startswith(prefix):
                name = spelled[len(prefix) :]
                target = self._targets.get(name) or self._in_any_block(name)
                if target is not None:
                    return target
        return None

    def _in_any_block(self, name: str) -> NativeModule | None:
        number = _FIRST_NUMBER.search(name.replace("_", "."))
        general = None if number is None else self._by_block.get(_general(name))
        if general is None or number is None:
            return None
        holds = tuple(one.replace("#", number[0], 1) for one in general.holds)
        return NativeModule(general.name.replace("#", number[0], 1), holds, general.halves_swapped)

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight as released; of a block further than released ones, as in the first.

        Raises:
            AdapterError: there is no such module.
        """
        found = self.shapes.get(module) or self.norms.get(module) or self._first_shapes.get(_general(module))
        if found is None:
            raise AdapterError(f"{self.title} has no module {module}")
        return found

    def takes(self, module: str) -> bool:
        """Whether a module can have an adapter."""
        return module in self.shapes or _general(module) in self._first_shapes

    @cached_property
    def _first_shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            found.setdefault(_general(name), shape)
        return found

    def rows(self, target: NativeModule, total: int) -> list[int]:
        """How the rows of a stack are shared out among what it holds, in a release of any width.

        Raises:
            AdapterError: so many rows cannot be shared as in the released model.
        """
        told = [self.shape(part)[0] for part in target.holds]
        shares = [total * one // sum(told) for one in told]
        if sum(shares) != total or any(total * one % sum(told) for one in told):
            raise AdapterError(
                f"{target.name} has {total} rows, which {', '.join(target.holds)} cannot share as {told}",
                remedy="Is it an adapter of another family? Name the family with --family.",
            )
        return shares

    def shape_of(self, target: NativeModule) -> tuple[int, ...]:
        """Of a native module as released."""
        rows = sum(self.shape(part)[0] for part in target.holds)
        return rows, *self.shape(target.holds[0])[1:]


def _stack(module: str) -> tuple[str, str]:
    """What stands before the first number of a name, and that number."""
    match = _FIRST_NUMBER.search(module)
    return (module, "") if match is None else (module[: match.start()], match[0])


def _general(name: str) -> str:
    """`#` for the first number of a name."""
    match = _FIRST_NUMBER.search(name.replace("_", "."))
    return name if match is None else f"{name[: match.start()]}#{name[match.end() :]}"


def known_models() -> tuple[Model, ...]:
    """Every family's, in the order of the registry; a few seconds."""
    return tuple(model_of_family(family) for family in families().values())


@cache
def model_of_family(family: type[Family]) -> Model:
    skeleton = family.skeleton()
    part, denoiser = next(iter(skeleton.denoisers.items()))
    shapes = {module: weight_shape(layer) for module, layer in adaptable_modules(denoiser).items()}
    norms = {
        name.removesuffix(".weight"): tuple(one.shape)
        for name, one in denoiser.named_parameters()
        if name.endswith(".weight") and one.dim() == 1
    }
    return Model(family.name, family, skeleton.export, part, shapes, norms, family.title)


def model_named(name: str) -> Model:
    """Raises UserError where there is no such family."""
    return model_of_family(family_named(name))


@dataclass(frozen=True, slots=True)
class Match:
    """A model that a file may be for."""

    model: Model
    known: int  # modules of the file that it has
    exact: int  # those of them whose shape is as released
    named: bool  # in the file's metadata


def matches(
    shapes: Mapping[str, Sequence[int] | None], metadata: Mapping[str, str], among: Iterable[Model]
) -> list[Match]:
    """The models that know any of the spelled modules, the likeliest first.

    Args:
        shapes: rows and columns of each module's change by its spelling, as far as the file tells them.
    """
    found = []
    for model in among:
        targets = {spelled: model.find(spelled) for spelled in shapes}
        known = {spelled: target for spelled, target in targets.items() if target is not None}
        if known:
            exact = sum(_fits(model, target, shapes[spelled]) for spelled, target in known.items())
            found.append(Match(model, len(known), exact, _is_named(model.keys, metadata)))
    return sorted(found, key=lambda one: (-one.known, -one.named, -one.exact))


def _fits(model: Model, target: NativeModule, shape: Sequence[int] | None) -> bool:
    if shape is None:
        return False
    try:
        rows, *rest = model.shape_of(target)
    except AdapterError:
        return False
    columns = 1
    for one in rest:
        columns *= one
    return tuple(shape) == (rows, columns)


def _is_named(keys: ExportKeys, metadata: Mapping[str, str]) -> bool:
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    return keys.modelspec == architecture or keys.base_model_version == metadata.get("ss_base_model_version")
