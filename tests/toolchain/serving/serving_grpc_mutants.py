"""Malformed messages over gRPC from a seed, for the test of abuse: a function a kind."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from serving_mutants import DTYPES, MODEL, SHAPES, SIZES, K, Mutant, X, misplaced, registration
from tritonclient.grpc import service_pb2 as pb


def right_grpc() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=MODEL, id="7")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.inputs.add(name="k", datatype="INT64", shape=[1, 2])
    request.raw_input_contents.extend([X.tobytes(), K.tobytes()])
    return request


def _raw(r: random.Random) -> Mutant:
    request = right_grpc()
    which, size = r.randrange(2), r.choice([0, 1, 15, 17, 32, 1000])
    request.raw_input_contents[which] = r.randbytes(size)
    return Mutant("raw contents of another size", request.SerializeToString())


def _count(r: random.Random) -> Mutant:
    request = right_grpc()
    if r.random() < 0.5:
        request.raw_input_contents.append(r.randbytes(16))
    else:
        del request.raw_input_contents[r.randrange(2) :]
    return Mutant("more or fewer raw contents than inputs", request.SerializeToString())


def _dtype(r: random.Random) -> Mutant:
    request = right_grpc()
    tensor = request.inputs[r.randrange(2)]
    tensor.datatype = r.choice([d for d in DTYPES if d != tensor.datatype])
    return Mutant("wrong dtype", request.SerializeToString())


def _shape(r: random.Random) -> Mutant:
    request = right_grpc()
    tensor = request.inputs[r.randrange(2)]
    shape = r.choice([s for s in SHAPES if s != list(tensor.shape)])
    del tensor.shape[:]
    tensor.shape.extend(shape)
    return Mutant("wrong shape", request.SerializeToString())


def _name(r: random.Random) -> Mutant:
    request = right_grpc()
    match r.randrange(4):
        case 0:
            request.inputs[r.randrange(2)].name = r.choice(["", "w", "x" * 9999])
        case 1:
            request.outputs.add(name=r.choice(["", "x", "w" * 999]))
        case 2:
            request.outputs.add(name="y")
            request.outputs.add(name="y")
        case _:
            request.inputs.add().CopyFrom(request.inputs[0])
            request.raw_input_contents.append(X.tobytes())
    return Mutant("names unknown or twice", request.SerializeToString())


def _model(r: random.Random) -> Mutant:
    request = right_grpc()
    if r.random() < 0.5:
        request.model_name = r.choice(["", "..", "../two", "a" * 9999, "two\0", "TWO", "/etc/passwd"])
    else:
        request.model_version = r.choice(["0", "2", "-1", "x", "..", "9" * 99, "01"])
    return Mutant("no such model or version", request.SerializeToString())


def _typed(r: random.Random) -> Mutant:
    request = right_grpc()
    contents = request.inputs[0].contents
    match r.randrange(5):
        case 0:  # both forms at once
            contents.fp32_contents.extend([1, 2, 3, 4])
        case 1:
            del request.raw_input_contents[:]
            contents.fp32_contents.extend([1.0] * r.choice([0, 3, 5]))
            request.inputs[1].contents.int64_contents.extend([1, 2])
        case 2:
            del request.raw_input_contents[:]
            contents.int_contents.extend([1, 2, 3, 4])
            request.inputs[1].contents.int64_contents.extend([1, 2])
        case 3:
            del request.raw_input_contents[:]
            contents.bytes_contents.extend([r.randbytes(4)] * 4)
            request.inputs[1].contents.int64_contents.extend([1, 2])
        case _:
            del request.raw_input_contents[:]
    return Mutant("typed contents that do not fit", request.SerializeToString())


def _parameters(r: random.Random) -> Mutant:
    request = right_grpc()
    where = r.choice([request, request.inputs[0]])
    name = r.choice(["shared_memory_region", "sequence_id", "priority", "timeout", "binary_data_size", "x"])
    parameter = where.parameters[name]
    match r.randrange(4):
        case 0:
            parameter.int64_param = r.choice(SIZES)
        case 1:
            parameter.string_param = r.choice(["", "x", "x" * 9999])
        case 2:
            parameter.bool_param = True
        case _:
            parameter.double_param = r.choice([float("nan"), float("inf"), -1.5])
    return Mutant("parameters of another kind", request.SerializeToString(), harmless=True)


def _memory(r: random.Random) -> Mutant:
    request = right_grpc()
    if r.random() < 0.5:
        where = request.inputs[0]
        if r.random() < 0.8:
            del request.raw_input_contents[0]
    else:
        where = request.outputs.add(name="y")
    for name, value in misplaced(r).items():
        if isinstance(value, str):
            where.parameters[name].string_param = value
        else:
            where.parameters[name].int64_param = value
    return Mutant("shared memory that is not there", request.SerializeToString())


def _register(r: random.Random) -> Mutant:
    name, said = registration(r)
    message = pb.SystemSharedMemoryRegisterRequest(name=name, **said).SerializeToString()
    return Mutant("shared memory that cannot be registered", message, "SystemSharedMemoryRegister")


def _bytes(r: random.Random) -> Mutant:
    data = bytearray(right_grpc().SerializeToString())
    match r.randrange(3):
        case 0:
            data = bytearray(r.randbytes(r.choice([1, 10, 200])))
        case 1:
            del data[r.randrange(1, len(data)) :]
        case _:
            for _ in range(r.randint(1, 4)):
                data[r.randrange(len(data))] = r.randrange(256)
    return Mutant(
        "random bytes", bytes(data), r.choice(["ModelInfer", "ModelConfig", "RepositoryIndex"]), harmless=True
    )


def _utf8(r: random.Random) -> Mutant:
    data = right_grpc().SerializeToString()
    wrong = r.choice([b"\xff\xff\xff", b"\xc3\x28x", b"\xed\xa0\x80", b"\x80xx"])
    return Mutant("invalid UTF-8", data.replace(b"\x03two", b"\x03" + wrong, 1))


def _method(r: random.Random) -> Mutant:
    names = ["ModelMetadata", "ModelReady", "ModelConfig", "ModelStatistics"]
    request = pb.ModelReadyRequest(name=r.choice(["", "..", "a" * 9999, "two\0"]), version=r.choice(["", "x", "2"]))
    # an empty name is all models to ModelStatistics, and a model that is not there is one that is not ready
    return Mutant("no such model", request.SerializeToString(), r.choice(names), harmless=True)


def _unknown(r: random.Random) -> Mutant:
    names = ["Nothing", "ModelInfer2", "x" * 500, "SystemSharedMemoryRegister", "TraceSetting", "LogSettings"]
    return Mutant("no such method", r.randbytes(5), r.choice(names))


def _huge(r: random.Random) -> Mutant:
    request = right_grpc()
    request.raw_input_contents[0] = bytes(2 << 20)
    return Mutant("larger than is taken", request.SerializeToString())


_GRPC: tuple[Callable[[random.Random], Mutant], ...] = (
    _raw, _count, _dtype, _shape, _name, _model, _typed, _parameters, _bytes, _utf8, _method,
    _unknown, _huge, _memory, _register,
)  # fmt: skip


def grpc_mutants(count: int, seed: int) -> list[Mutant]:
    """``count`` wrong messages, every kind as often as any other."""
    return [_GRPC[i % len(_GRPC)](random.Random(seed * 1_000_003 + i)) for i in range(count)]


def http2_junk(r: random.Random) -> bytes:
    """What is no HTTP/2, or stops being it after the preface."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frame = struct.pack(">I", r.randrange(1 << 24))[1:] + bytes([r.randrange(256), r.randrange(256)]) + r.randbytes(4)
    return r.choice(
        [r.randbytes(100), b"GET / HTTP/1.1\r\n\r\n", preface + r.randbytes(200), preface + frame + r.randbytes(50)]
    )
