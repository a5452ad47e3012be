"""Any image as plain data that json.dumps takes: for `snap show`, bug reports and golden tests.

Bytes that are text (paths, names) become text, others hexadecimal; addresses and masks become "0x...". Nothing
is left out but the bulk of xstate and of queued data, which is given by its size and its first bytes.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from images.codec import parse

MAX_BYTES_SHOWN = 64

TEXT_FIELDS = frozenset({"path", "comm", "name", "anon_name"})
HEX_FIELDS = frozenset(
    {
        "start", "end", "handler", "restorer", "mask", "sigmask", "offset_bytes", "altstack_sp", "robust_list_head",
        "clear_child_tid", "rseq_pointer", "rseq_signature", "sigval", "xfeatures", "start_code", "end_code",
        "start_data", "end_data", "start_brk", "brk", "start_stack", "arg_start", "arg_end", "env_start", "env_end",
        "cap_inheritable", "cap_permitted", "cap_effective", "cap_bounding", "cap_ambient", "guard_pages", "prot",
        "events", "rdev", "dev",
    }
)  # fmt: skip
OCTAL_FIELDS = frozenset({"mode", "umask"})


def show(name: str, data: bytes) -> dict[str, Any]:
    """Decode the image called `name`; see images.codec.parse for what is refused."""
    return message_dict(parse(name, data))


def message_dict(message: Message) -> dict[str, Any]:
    """The set fields of a message, in the order of the .proto, as JSON-able values."""
    return {field.name: _field(field, value) for field, value in message.ListFields()}


def _field(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, (bytes, str)) or not hasattr(value, "__len__"):
        return _value(field, value)
    return [_value(field, item) for item in value]


def _value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Message):
        return message_dict(value)
    if isinstance(value, bytes):
        return _bytes(field.name, value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if field.name in HEX_FIELDS:
        return hex(value)
    if field.name in OCTAL_FIELDS:
        return oct(value)
    return value


def _bytes(name: str, value: bytes) -> str:
    if name in TEXT_FIELDS:
        return value.decode("utf-8", "backslashreplace")
    if len(value) <= MAX_BYTES_SHOWN:
        return value.hex()
    return f"{value[:MAX_BYTES_SHOWN].hex()}... ({len(value)} bytes)"
