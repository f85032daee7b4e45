"""Pictures that a request shows to the model beside its prompt, as training shows them.

Shape letters: B batch, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from burnish.data.buckets import Bucket, cover
from burnish.data.companions import mask_values
from burnish.data.pictures import BadPicture, open_picture
from burnish.data.prepare import pixels_of
from burnish.errors import UserError
from burnish.family import Family


def check_references(family: Family, references: Sequence[Path], mask: Path | None) -> None:
    """Raises:
    UserError: more than the family can see, or without what it cannot draw without.
    """
    can = family.capabilities
    if len(references) > can.references:
        sees = f"sees at most {can.references}" if can.references else "sees none"
        raise UserError(
            f"{len(references)} reference picture(s) are given, and {family.title} {sees}.",
            remedy="Take some out, or take a model that edits pictures (`burnish families`).",
        )
    if mask is not None and not can.masks:
        raise UserError(f"A mask is given, and {family.title} fills no holes.", remedy="Take it out.")
    # One that also sees other pictures, such as a control picture, draws without a hole as well.
    needs_hole = can.masks and can.references == 1
    if (needs_hole or mask is not None) and (mask is None or not references):
        raise UserError(
            f"{family.title} fills holes: it needs a picture and a mask, white where it is to be filled.",
            remedy="Give --reference and --mask, or `references` and `mask` of the sample prompt.",
        )
    if can.first_frame and not references:
        raise UserError(
            f"{family.title} goes on from a first frame, and none is given.",
            remedy="Give --reference, or `references` of the sample prompt.",
        )
    if can.last_frame and len(references) < can.own_references:
        raise UserError(
            f"{family.title} goes on from a first frame to a last one, and one picture is given.",
            remedy="Give --reference twice, or two `references` of the sample prompt, the last frame second.",
        )


def reference_pixels(family: Family, references: Sequence[Path], size: tuple[int, int]) -> list[Tensor]:
    """Each (3, H, W) in [-1, 1]: scaled to cover the size that the family wants, and cut in the middle.

    Args:
        size: of what is to be drawn, (height, width); the picture to be filled, first and last frames are taken at it.

    Raises:
        UserError: a file cannot be read.
    """
    can = family.capabilities
    pixels = []
    for index, path in enumerate(references):
        picture = _opened(path, "#ffffff")
        is_target = index < can.own_references
        wanted = size if is_target else family.reference_size(picture.height, picture.width, size)
        pixels.append(pixels_of(_covering(picture, wanted)))
    return pixels


def mask_pixels(mask: Path, size: tuple[int, int]) -> Tensor:
    """(1, H, W): 1 where the mask is light.

    Raises:
        UserError: the file cannot be read.
    """
    return mask_values(_covering(_opened(mask, "#000000"), size))


def _covering(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return cover(picture.height, picture.width, Bucket(*size)).apply(picture, flipped=False)


def _opened(path: Path, background: str) -> Image.Image:
    try:
        picture, _ = open_picture(path, background=background)
    except BadPicture as error:
        raise UserError(f"{path}: {error.message}", remedy=error.remedy) from error
    return picture
