"""The XMP of a picture: that a machine made it, from which source, and the plan that repeats it.

The marking is IPTC's Digital Source Type (Photo Metadata Standard 2023.2; the vocabulary is
http://cv.iptc.org/newscodes/digitalsourcetype/), which exiftool, photo libraries, search engines and C2PA read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape

from defusedxml.ElementTree import fromstring

from pipelines.plan import GenerationPlan
from pipelines.upscale import UpscalePlan

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MACHINE_MADE = "trainedAlgorithmicMedia"
"""Made by a model alone."""
COMPOSITE = "compositeWithTrainedAlgorithmicMedia"
"""Something else, such as a photo, that a model changed."""
ENHANCED = "algorithmicallyEnhanced"
"""A picture that an algorithm without training corrected, such as a resized one."""

_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_OURS = "urn:sdgraph:picture:1.0/"
_TEMPLATE = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="{iptc}"
 xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/" xmlns:stRef="http://ns.adobe.com/xap/1.0/sType/ResourceRef#"
 xmlns:sdgraph="{ours}">
<xmp:CreatorTool>sdgraph</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>{more}
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
_DERIVED = '<xmpMM:DerivedFrom rdf:parseType="Resource"><stRef:documentID>{}</stRef:documentID></xmpMM:DerivedFrom>'
# XML 1.0 has no way to write these; JSON has. Its other control characters are escaped already.
_NOT_IN_XML = re.compile("[\ufffe\uffff]")


@dataclass(frozen=True)
class XmpContents:
    """The contents of an XMP packet that this project reads."""

    digital_source_type: str | None = None
    """A term of IPTC's vocabulary, such as `trainedAlgorithmicMedia` or `digitalCapture`."""
    plan: str | None = None
    """The plan of one of our pictures, as JSON."""


def digital_source_type(plan: GenerationPlan | UpscalePlan | None) -> str:
    """How a picture was made. What starts from a picture that no model made alone is a composite, as IPTC says.

    One that was only resized remains what it says that it is.
    """
    source = plan.source if plan else None
    if isinstance(plan, UpscalePlan) and plan.component is None:
        return plan.source.digital_source_type or ENHANCED
    return MACHINE_MADE if source is None or source.digital_source_type == MACHINE_MADE else COMPOSITE


def xmp_packet(plan: GenerationPlan | UpscalePlan | None, max_bytes: int | None = None) -> bytes:
    """The packet of a picture; without a plan (a preview) the marking alone.

    A plan that would make it longer than `max_bytes` is replaced by a note that says so; the marking always stays.
    """
    source_type = VOCABULARY + digital_source_type(plan)
    more = ""
    if plan is not None:
        if plan.ai_system is not None:
            more += f"\n<Iptc4xmpExt:AISystemUsed>{escape(plan.ai_system)}</Iptc4xmpExt:AISystemUsed>"
        if plan.source is not None:
            more += "\n" + _DERIVED.format(f"urn:sha256:{plan.source.sha256}")

    def packet(text: str | None) -> bytes:
        ours = f"\n<sdgraph:plan>{escape(text)}</sdgraph:plan>" if text else ""
        return _TEMPLATE.format(iptc=_IPTC, ours=_OURS, source_type=source_type, more=more + ours).encode()

    text = _NOT_IN_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", plan.model_dump_json()) if plan else None
    whole = packet(text)
    if text is None or max_bytes is None or len(whole) <= max_bytes:
        return whole
    return packet(json.dumps({"omitted": f"{len(text)} characters, more than JPEG holds; PNG and WebP do"}))


def read_xmp(packet: bytes) -> XmpContents:
    """What any program's packet tells; nothing if it cannot be read. Entities and document types are refused."""
    try:
        root = fromstring(packet.strip(b"\0 \n").decode("utf-8", "replace").lstrip("\ufeff"))
    except Exception:  # the XML parser and its guard raise many types on hostile bytes
        return XmpContents()
    source_type = _property(root, _IPTC, "DigitalSourceType") or ""
    term = source_type.removeprefix(VOCABULARY)
    return XmpContents(term if re.fullmatch("[A-Za-z]{1,60}", term) else None, _property(root, _OURS, "plan"))


def _property(root: Element, namespace: str, name: str) -> str | None:
    """A property's text: XMP writers choose freely between elements, attributes and rdf:resource."""
    key = f"{{{namespace}}}{name}"
    for element in root.iter():
        if key in element.attrib:
            return element.attrib[key]
        if element.tag == key:
            resource = element.attrib.get("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}resource")
            return resource or (element.text or "").strip() or None
    return None
