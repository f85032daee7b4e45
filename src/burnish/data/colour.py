"""Colour profiles to sRGB, and transparency onto a background."""

from __future__ import annotations

import io
from typing import cast

from PIL import Image, ImageCms

_SRGB = ImageCms.createProfile("sRGB")
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode it applies to


def to_srgb(picture: Image.Image, profile: bytes | None, fixes: list[str]) -> Image.Image:
    """The picture in sRGB, as mode RGB, or RGBA where it had alpha. `profile` is the embedded ICC profile.

    Without a usable profile CMYK is converted by the plain formula, everything else is taken as sRGB.
    """
    alpha = None
    if picture.mode in ("RGBA", "LA", "La", "RGBa"):
        picture = picture.convert("RGBA" if picture.mode in ("RGBA", "RGBa") else "LA")
        alpha = picture.getchannel("A")
        picture = picture.convert(picture.mode.removesuffix("A"))
    converted = _by_profile(picture, profile, fixes) if profile else None
    if converted is None:
        if picture.mode == "CMYK":
            fixes.append("CMYK without a usable colour profile converted by the plain formula")
        converted = picture.convert("RGB")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _by_profile(picture: Image.Image, profile: bytes, fixes: list[str]) -> Image.Image | None:
    """None where there is nothing to convert by."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = (source.profile.profile_description or "").strip()
        space = source.profile.xcolor_space.strip()
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        fixes.append("damaged colour profile ignored")
        return None
    if picture.mode == "RGB" and "srgb" in name.lower():
        return None
    if _MODES.get(space) == "RGB" and picture.mode == "L":
        picture = picture.convert("RGB")
    if _MODES.get(space) != picture.mode:
        fixes.append(f"colour profile for {space} ignored: the picture is {picture.mode}")
        return None
    try:
        converted = ImageCms.profileToProfile(
            picture,
            source,
            ImageCms.ImageCmsProfile(_SRGB),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        fixes.append("damaged colour profile ignored")
        return None
    fixes.append(f"converted from {name or space} to sRGB")
    return cast(Image.Image, converted)


def onto_background(picture: Image.Image, background: str, fixes: list[str]) -> Image.Image:
    """Mode RGB; transparent parts show `background` (`#rrggbb`), not the colour hidden under alpha."""
    if picture.mode != "RGBA":
        return picture
    lowest, _ = cast(tuple[int, int], picture.getchannel("A").getextrema())
    if lowest == 255:
        return picture.convert("RGB")
    fixes.append(f"transparency laid on {background}")
    ground = Image.new("RGBA", picture.size, background)
    return Image.alpha_composite(ground, picture).convert("RGB")
