"""ONNX Runtime's own reader of model packages, through its C API: ``python ort_package_reader.py PACKAGE``. No test.

It is in the library of the wheel, and Python has no binding of it yet. Prints JSON: what it read, the variant that it
chose for a program that names no execution provider, and how many inputs and outputs the session of that has; or the
error that it gave. Runs in a process of its own, since a wrong offset into a table of functions ends that.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

#: The version of ONNX Runtime's C API with OrtApi::GetModelPackageApi; tables of functions only ever grow at their end.
API_VERSION = 31
# Places in OrtApi.
GET_ERROR_MESSAGE, CREATE_ENV, CREATE_SESSION_OPTIONS, INPUT_COUNT, OUTPUT_COUNT = 2, 3, 10, 30, 31
GET_MODEL_PACKAGE_API = 427
# Places in OrtModelPackageApi.
CREATE_OPTIONS, CREATE_CONTEXT, SCHEMA_VERSION, COMPONENT_NAMES, VARIANT_NAMES = 0, 2, 4, 6, 8
VARIANT_EP, SELECT_COMPONENT, SELECTED_NAME, SELECTED_FOLDER, CREATE_SESSION = 9, 11, 13, 14, 15


def library() -> Path:
    """The library inside the installed wheel."""
    import onnxruntime.capi

    (found,) = Path(onnxruntime.capi.__path__[0]).glob("libonnxruntime.so*")
    return found


class Refused(Exception):
    """What ONNX Runtime said, or a package with nothing or too much to choose from."""


def main(package: str) -> dict[str, Any]:
    loaded = ctypes.CDLL(str(library()))
    loaded.OrtGetApiBase.restype = POINTER(c_void_p)
    address = ctypes.CFUNCTYPE(c_void_p, c_uint32)(loaded.OrtGetApiBase()[0])(API_VERSION)
    if not address:
        return {"absent": f"ONNX Runtime has no C API {API_VERSION}"}
    api = ctypes.cast(address, POINTER(c_void_p))
    packages = ctypes.cast(ctypes.CFUNCTYPE(c_void_p)(api[GET_MODEL_PACKAGE_API])(), POINTER(c_void_p))

    def call(table: Any, place: int, *arguments: Any) -> None:
        types = [type(a) if isinstance(a, c_void_p | c_int | c_char_p) else c_void_p for a in arguments]
        status = ctypes.CFUNCTYPE(c_void_p, *types)(table[place])(*arguments)
        if status:
            text = ctypes.CFUNCTYPE(c_char_p, c_void_p)(api[GET_ERROR_MESSAGE])(status)
            raise Refused(text.decode())

    def names(place: int, *arguments: Any) -> list[str]:
        found, count = POINTER(c_char_p)(), c_size_t()
        call(packages, place, *arguments, byref(found), byref(count))
        return [found[index].decode() for index in range(count.value)]

    try:
        context, schema = c_void_p(), c_int64()
        call(packages, CREATE_CONTEXT, c_char_p(package.encode()), byref(context))
        call(packages, SCHEMA_VERSION, context, byref(schema))
        components = names(COMPONENT_NAMES, context)
        if len(components) != 1:
            raise Refused(f"it has {len(components)} components")
        component = components[0]
        variants: dict[str, str | None] = {}
        for name in names(VARIANT_NAMES, context, c_char_p(component.encode())):
            provider = c_char_p()
            call(
                packages,
                VARIANT_EP,
                context,
                c_char_p(component.encode()),
                c_char_p(name.encode()),
                byref(provider),
            )
            variants[name] = provider.value.decode() if provider.value else None
        environment, session_options, options = c_void_p(), c_void_p(), c_void_p()
        call(api, CREATE_ENV, c_int(3), c_char_p(b"reader"), byref(environment))
        call(api, CREATE_SESSION_OPTIONS, byref(session_options))
        call(packages, CREATE_OPTIONS, environment, session_options, byref(options))
        chosen, selected, folder, session = c_void_p(), c_char_p(), c_char_p(), c_void_p()
        call(packages, SELECT_COMPONENT, context, c_char_p(component.encode()), options, byref(chosen))
        call(packages, SELECTED_NAME, chosen, byref(selected))
        call(packages, SELECTED_FOLDER, chosen, byref(folder))
        call(packages, CREATE_SESSION, environment, chosen, c_void_p(), byref(session))
        inputs, outputs = c_size_t(), c_size_t()
        call(api, INPUT_COUNT, session, byref(inputs))
        call(api, OUTPUT_COUNT, session, byref(outputs))
    except Refused as error:
        return {"refused": str(error)}
    assert selected.value is not None
    assert folder.value is not None
    return {
        "schema": schema.value,
        "component": component,
        "variants": variants,
        "selected": selected.value.decode(),
        "folder": folder.value.decode(),
        "inputs": inputs.value,
        "outputs": outputs.value,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))  # noqa: T201
