"""What a denoiser is told besides latents and time, named tensors with the batch first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from burnish.hardware import sent


class Conditioning(Mapping[str, Tensor]):
    """What the denoiser is told besides latents and time: a frozen mapping of named tensors, batch first.

    Names that start with `tokens` or `mask` have a token axis at dimension 1 and are padded with zeros (False)
    when samples of different length are collated; all others must agree in shape. Cached on disk as is.

    Whole numbers and masks keep the copy that was on the CPU when they are moved to a device: what a family has to know
    of them (`on_host`) costs no wait for the device, which is the price of reading a tensor back.
    """

    def __init__(self, tensors: Mapping[str, Tensor], on_host: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors)
        self._on_host = dict(on_host or {})  # of tensors on a device, as they were on the CPU

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}={tuple(v.shape)}" for k, v in self._tensors.items())
        return f"Conditioning({shapes})"

    @property
    def batch_size(self) -> int:
        return len(next(iter(self._tensors.values())))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to `device`; cast floating tensors to `dtype` when one is given."""
        here = {
            k: v for k, v in self._tensors.items() if v.device.type == "cpu" and not v.is_floating_point()
        }
        return Conditioning(
            {k: sent(v, device, dtype if v.is_floating_point() else None) for k, v in self._tensors.items()},
            {**self._on_host, **here},
        )

    def on_host(self, name: str) -> Tensor | None:
        """A tensor on the CPU, where possible without asking the device; None of one without values (meta device)."""
        tensor = self._tensors[name]
        if name in self._on_host:
            return self._on_host[name]
        if tensor.is_meta:
            return None
        if tensor.device.type == "cpu":
            return tensor
        self._on_host[name] = tensor.cpu()
        return self._on_host[name]

    def merged(self, other: Mapping[str, Tensor]) -> Conditioning:
        """This and `other` together; `other` wins where both name a tensor."""
        kept = {k: v for k, v in self._on_host.items() if k not in other}
        known = other._on_host if isinstance(other, Conditioning) else {}
        return Conditioning({**self._tensors, **other}, {**kept, **known})

    def rows(self, index: slice | Sequence[int]) -> Conditioning:
        """The chosen batch rows."""
        return Conditioning(
            {k: chosen_rows(v, index) for k, v in self._tensors.items()},
            {k: chosen_rows(v, index) for k, v in self._on_host.items()},
        )

    @staticmethod
    def collate(samples: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch, padding the token axis of `tokens*` and `mask*` to the longest.

        Raises:
            ValueError: the samples do not hold the same names.
        """
        names = list(samples[0])
        for sample in samples:
            if list(sample) != names and set(sample) != set(names):
                raise ValueError(f"conditioning of different kinds: {sorted(names)} and {sorted(sample)}")
        return Conditioning({name: _join(name, [sample[name] for sample in samples]) for name in names})


def chosen_rows(tensor: Tensor, index: slice | Sequence[int]) -> Tensor:
    """Rows by number, without a list of numbers on its way to the device, which waits for it."""
    return tensor[index] if isinstance(index, slice) else torch.stack([tensor[row] for row in index])


def _join(name: str, tensors: Sequence[Tensor]) -> Tensor:
    if name.startswith(("tokens", "mask")):
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [_padded(tensor, longest) for tensor in tensors]
    return torch.cat(list(tensors))


def _padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
