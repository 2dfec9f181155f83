"""SOAP over pyVmomi's own types and serializer: request bytes → method and arguments, values and faults → bytes.

pyVmomi's serializer is the client's; two corrections make it a server's (Go clients decode nil otherwise): no `versionId`
attribute, and `ManagedObjectReference` as the type of references. (reference/vsphere.md B.2)
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any
from xml.parsers.expat import ExpatError, ParserCreate
from xml.sax.saxutils import escape

from farshore.lab.vcenter.vim import Array, ManagedObject, make_fault, soap, support, vmodl

NAMESPACE = "urn:vim25"
API_VERSIONS = ("8.0.3.0", "8.0.0.1", "7.0", "6.7", "6.5", "6.0")
_FALLBACK = "vim25/8.0.3.0"
_BASE = "vim.version.version1"
_ENVELOPE = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<soapenv:Envelope xmlns:soapenc="http://schemas.xmlsoap.org/soap/encoding/"'
    ' xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"'
    ' xmlns:xsd="http://www.w3.org/2001/XMLSchema"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
    "<soapenv:Body>{}</soapenv:Body></soapenv:Envelope>"
)
_ACTION = re.compile(r"urn:(vim25/[\w.]+)")
_VERSION_ID = re.compile(r' versionId="[^"]*"')
_MOREF_TYPE = re.compile(r'(xsi:type=")(?:\w+:)?ManagedObject"')
_FETCH = support.Object(
    wsdlName="Fetch", params=(support.Object(name="prop", type=str, flags=0),), result=object
)


@dataclass(slots=True)
class Call:
    """A request as understood."""

    name: str
    this: Any
    arguments: dict[str, Any]
    info: Any


@dataclass(slots=True)
class _Reader:
    """Feeds each parameter of the request to pyVmomi's deserializer."""

    name: str = ""
    info: Any = None
    this: Any = None
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    types: dict[str, Any] = field(default_factory=dict[str, Any])
    prefixes: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    current: tuple[str, Any] | None = None
    in_body: bool = False
    parser: Any = None
    deserializer: Any = None

    def parse(self, body: bytes) -> Call:
        self.parser = ParserCreate(namespace_separator=soap.NS_SEP)
        self.parser.buffer_text = True
        self.deserializer = soap.SoapDeserializer(None)
        soap.SetHandlers(
            self.parser, (self.start, self.end, lambda _data: None, self.open_prefix, self.close_prefix)
        )
        self.parser.Parse(body, True)
        self.flush()
        if self.info is None:
            raise make_fault("vmodl.fault.InvalidRequest", "The request has no method.")
        if self.this is None:
            raise make_fault("vmodl.fault.InvalidRequest", f"{self.name} has no target object.")
        return Call(self.name, self.this, self.arguments, self.info)

    def open_prefix(self, prefix: str | None, uri: str) -> None:
        self.prefixes.setdefault(prefix, []).append(uri)  # pyright: ignore[reportArgumentType] expat gives None for the default prefix

    def close_prefix(self, prefix: str | None) -> None:
        self.prefixes[prefix].pop()  # pyright: ignore[reportArgumentType] see open_prefix

    def flush(self) -> None:
        """Take over the parameter that the deserializer has finished."""
        if self.current is None:
            return
        name, kind = self.current
        value = self.deserializer.GetResult()
        self.current = None
        if name == "_this":
            self.this = value
        elif issubclass(kind, list):
            self.arguments.setdefault(name, kind()).append(value)
        else:
            self.arguments[name] = value

    def start(self, tag: str, attributes: Any) -> None:
        self.flush()
        namespace, _, name = tag.rpartition(soap.NS_SEP)
        if name == "Body":
            self.in_body = True
            return
        if not self.in_body:
            return
        if self.info is None:
            self.method(namespace, name)
            return
        if name == "_this":
            kind = ManagedObject
        elif name in self.types:
            kind = self.types[name]
        else:
            raise make_fault("vmodl.fault.InvalidRequest", f"{self.name} has no parameter {name}.")
        self.current = (name, kind)
        # A list parameter arrives as repeated siblings. Given the list's type, the deserializer would swallow the
        # element that follows: so it gets the item's type, once for each.
        self.deserializer.result = None
        item: Any = getattr(kind, "Item", kind) if issubclass(kind, list) else kind
        self.deserializer.Deserialize(self.parser, item, False, self.prefixes)
        self.deserializer.StartElementHandler(tag, attributes)

    def end(self, _tag: str) -> None:
        self.flush()

    def method(self, namespace: str, name: str) -> None:
        self.name = name
        if name == "Fetch":
            self.info = _FETCH
        else:
            try:
                self.info = support.GetWsdlMethod(namespace, name).info
            except KeyError as error:
                raise make_fault(
                    "vmodl.fault.MethodNotFound",
                    f"Unable to resolve WSDL method name {name}",
                    receiver=ManagedObject("unknown"),
                    method=name,
                ) from error
        self.types = {p.name: p.type for p in self.info.params}


def decode(body: bytes) -> Call:
    """Parse a request. Raises a `MethodFault` that says what is wrong with it."""
    try:
        return _Reader().parse(body)
    except ExpatError as error:
        raise make_fault("vmodl.fault.InvalidRequest", f"XML document is not well formed: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        # what pyVmomi's deserializer raises for types and values that do not fit the schema
        raise make_fault("vmodl.fault.InvalidRequest", f"Cannot deserialize the request: {error}") from error


def client_version(action: str) -> Any:
    """pyVmomi's name of the version that the SOAPAction header asks for."""
    match = _ACTION.search(action)
    return support.versionMap.get(match[1] if match else _FALLBACK) or support.versionMap[_FALLBACK]


def encode(call_name: str, kind: Any, value: Any, version: Any) -> bytes:
    """The answer of a method whose declared result is `kind`."""
    if value is None or kind is None or kind is type(None) or support.GetWsdlName(kind) == "void":
        inner = ""
    else:
        if isinstance(value, list) and not isinstance(value, Array):
            typed: Any = kind()
            typed.extend(value)
            value = typed
        info = support.Object(name="returnval", type=kind, version=_BASE, flags=support.F_OPTIONAL)
        inner = serialize(value, info, version)
    return _ENVELOPE.format(
        f'<{call_name}Response xmlns="{NAMESPACE}">{inner}</{call_name}Response>'
    ).encode()


def serialize(value: Any, info: Any, version: Any) -> str:
    return _correct(soap.SerializeToStr(value, info, version, _prefixes()))


def encode_fault(fault: Any, version: Any) -> bytes:
    """A `MethodFault` as a SOAP fault."""
    message = fault.msg or support.GetWsdlName(type(fault))
    bare = copy.copy(fault)
    bare.msg = None
    kind = support.GetWsdlName(type(fault))
    info = support.Object(name=f"{kind}Fault", type=type(fault), version=_BASE, flags=0)
    detail = _correct(soap.SerializeFaultDetail(bare, info, version, _prefixes()))
    # The type is what Go clients decode by; pyVmomi's serializer leaves it out at the top.
    detail = detail.replace(f"<{kind}Fault", f'<{kind}Fault xmlns="{NAMESPACE}" xsi:type="{kind}"', 1)
    return _ENVELOPE.format(
        "<soapenv:Fault><faultcode>ServerFaultCode</faultcode>"
        f"<faultstring>{escape(message)}</faultstring><detail>{detail}</detail></soapenv:Fault>"
    ).encode()


def system_error(reason: str) -> Any:
    """The fault for a defect of the laboratory itself."""
    return vmodl.fault.SystemError(reason=reason, msg=f"A general system error occurred: {reason}")


def versions_document() -> bytes:
    """`vimServiceVersions.xml`."""
    prior = "".join(f"<version>{v}</version>" for v in API_VERSIONS[1:])
    return (
        '<?xml version="1.0" encoding="UTF-8" ?>\n<namespaces version="1.0">\n<namespace>'
        f"<name>{NAMESPACE}</name><version>{API_VERSIONS[0]}</version>"
        f"<priorVersions>{prior}</priorVersions></namespace>\n</namespaces>\n"
    ).encode()


def _prefixes() -> Any:
    prefixes = soap.SOAP_NSMAP.copy()
    prefixes[NAMESPACE] = ""
    return prefixes


def _correct(text: str) -> str:
    return _MOREF_TYPE.sub(r'\1ManagedObjectReference"', _VERSION_ID.sub("", text))
