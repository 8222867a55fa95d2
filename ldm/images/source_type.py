"""IPTC's digital source type: what an image file says about whether it was generated.

It stands in the file's XMP packet, where search engines, archives and editors look for it. Sources: IPTC's
NewsCodes (http://cv.iptc.org/newscodes/digitalsourcetype/) and its Photo Metadata Standard 2023.1, "Digital
Source Type"; XMP Specification Part 3 (ISO 16684-1) for the places in PNG, JPEG and WebP files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED = "trainedAlgorithmicMedia"  # all of the image comes from a model
COMPOSITE = "compositeWithTrainedAlgorithmicMedia"  # a part of it, or what it enlarges, was given

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>{type}</Iptc4xmpExt:DigitalSourceType>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
_PROPERTY = re.compile(r"""[:<\s]DigitalSourceType\s*(?:=\s*["']|>)\s*([^"'<>\s]{1,200})""")


def source_type(settings: Mapping[str, Any]) -> str:
    """The source type of an image with these settings.

    It is a composite where a mask, or the space around it, keeps a part of the init image, and where a pixel
    upscaler, which has no sampler, enlarges an image.
    """
    kept = settings.get("mask") or settings.get("outpaint")
    enlarged = bool(settings) and "sampler" not in settings
    return COMPOSITE if kept or enlarged else TRAINED


def source_address(name: str) -> str:
    """The address in IPTC's vocabulary that stands for a source type."""
    return VOCABULARY + name


def xmp_packet(name: str) -> str:
    """An XMP packet that holds a source type and nothing else."""
    return _PACKET.format(type=source_address(name))


def source_type_in(packet: str | bytes | None) -> str | None:
    """The source type in an XMP packet, by its name where it is of IPTC's vocabulary; None without one.

    The packet is searched and not parsed: no entity that it declares can be expanded.
    """
    if packet is None:
        return None
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    found = _PROPERTY.search(text)
    if found is None:
        return None
    return re.sub(r"^https?://cv\.iptc\.org/newscodes/digitalsourcetype/", "", found[1])
