"""The simulated GPU through the real cuda-python; run by tests/runtime/backends/test_simulated_gpu.py."""

import ctypes
import sys
from typing import Any

import cuda.bindings.driver as cu
import cuda.core
from simulator import Simulator, memory

core: Any = cuda.core  # an extension without stubs
Device, EventOptions, StreamOptions = core.Device, core.EventOptions, core.StreamOptions
LegacyPinnedMemoryResource = core.LegacyPinnedMemoryResource
gpu = Simulator()
device = Device(0)
device.set_current()


def ok(result):
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) == 2 else result[1:]


def refused(result, name):
    assert result[0].name == "CUDA_ERROR_" + name, result[0]


streams: list = []


def new_stream(**options):
    streams.append(device.create_stream(options=StreamOptions(**options)))  # a handle alone keeps no stream alive
    return streams[-1].handle


def device_memory(size):
    return int(ok(cu.cuMemAlloc(size)))


def pinned(size):
    return int(ok(cu.cuMemHostAlloc(size, 0)))


def fill(stream, address, value, size=64):
    return cu.cuMemsetD8Async(address, value, size, stream)


def content(address, size=64):
    values = set(memory(address, size))
    assert len(values) == 1, values
    return values.pop()


GLOBAL, THREAD_LOCAL, RELAXED = (
    getattr(cu.CUstreamCaptureMode, "CU_STREAM_CAPTURE_MODE_" + name) for name in ("GLOBAL", "THREAD_LOCAL", "RELAXED")
)


def instantiate(graph):
    return ok(cu.cuGraphInstantiate(graph, 0))


def streams_and_events() -> None:
    stream = device.create_stream(options=StreamOptions(priority=-1))
    assert stream.priority == -1 and stream.is_nonblocking and stream.device == device and stream.context
    other = device.create_stream(options=StreamOptions(nonblocking=False))
    timed = EventOptions(timing_enabled=True)
    first = stream.record(options=timed)

    def busy():
        return sum(range(300_000))

    assert gpu.launch(stream, busy) == 0
    second = stream.record(options=timed)
    other.wait(second)
    other.wait(stream)
    stream.sync()
    second.sync()
    assert first.is_done and second.is_done and 0.5 < second - first < 5000
    stream.record(first)
    untimed = stream.record()
    try:
        _ = untimed - first
    except RuntimeError:
        pass
    else:
        raise AssertionError("an event without timing has no time")
    device.default_stream.sync()
    handle = stream.handle
    stream.close()
    other.close()
    refused(cu.cuStreamSynchronize(handle), "INVALID_HANDLE")
    del first, second, untimed
    assert gpu.live_objects()["stream"] == gpu.live_objects()["event"] == 0, gpu.live_objects()


def memory_calls() -> None:
    a, b, h = device_memory(1000), device_memory(64), pinned(1000)
    assert a % 256 == b % 256 == 0
    assert content(a, 1000) == content(h, 1000) == 0xA5
    assert gpu.live_bytes() == 1064 and gpu.live_objects()["device"] == 2 and gpu.live_objects()["pinned"] == 1

    sent, received = bytearray(range(64)), bytearray(64)
    ok(cu.cuMemcpyHtoD(b, (ctypes.c_char * 64).from_buffer(sent), 64))
    ok(cu.cuMemcpyDtoD(a + 8, b, 64))
    ok(cu.cuMemcpyDtoH((ctypes.c_char * 64).from_buffer(received), a + 8, 64))
    assert sent == received

    stream = device.create_stream()
    ok(cu.cuMemsetD32Async(a, 0x01020304, 250, stream.handle))
    ok(cu.cuMemcpyDtoHAsync(h, a, 1000, stream.handle))
    assert bytes(memory(h, 8)) == bytes([4, 3, 2, 1] * 2)
    ok(cu.cuMemsetD8(a, 3, 1000))
    ok(cu.cuMemcpyAsync(h, a, 1000, stream.handle))
    assert content(h, 1000) == 3

    refused(cu.cuMemcpyHtoD(a, h, 1001), "INVALID_VALUE")  # runs over the end
    refused(cu.cuMemcpyDtoD(a + 990, b, 64), "INVALID_VALUE")  # so does this
    refused(cu.cuMemcpyHtoD(h + 4096, h, 8), "INVALID_VALUE")  # between two allocations
    refused(
        cu.cuMemcpyHtoDAsync(ctypes.addressof(ctypes.create_string_buffer(8)), h, 8, stream.handle), "INVALID_VALUE"
    )
    refused(cu.cuMemcpyDtoH(b, a, 8), "INVALID_VALUE")  # not into host memory
    refused(fill(stream.handle, a, 0, 1001), "INVALID_VALUE")
    refused(cu.cuMemFree(a + 8), "INVALID_VALUE")

    ok(cu.cuMemFree(b))
    assert content(b) == 0xDD  # what a stale pointer sees
    refused(cu.cuMemFree(b), "INVALID_VALUE")
    refused(cu.cuMemcpyDtoD(a, b, 64), "INVALID_VALUE")
    assert all(device_memory(64) != b for _ in range(100))  # an address never comes back
    ok(cu.cuMemFree(a))
    ok(cu.cuMemFreeHost(h))
    assert gpu.live_bytes() == 6400 and gpu.peak_bytes() == 7400, (gpu.live_bytes(), gpu.peak_bytes())


def buffers_of_cuda_core() -> None:
    stream = device.create_stream()
    buffer = device.allocate(100, stream=stream)
    host = LegacyPinnedMemoryResource().allocate(100)
    assert buffer.is_device_accessible and not buffer.is_host_accessible and host.is_host_accessible
    buffer.fill(7, stream=stream)
    buffer.copy_to(host, stream=stream)
    stream.sync()
    assert content(int(host.handle), 100) == 7
    buffer.close(stream)
    host.close()
    assert gpu.live_bytes() == 0 and gpu.live_objects()["pinned"] == 0


def out_of_memory() -> None:
    kept = device_memory(600)
    refused(cu.cuMemAlloc(401), "OUT_OF_MEMORY")
    assert ok(cu.cuMemGetInfo()) == (400, 1000)
    stream = device.create_stream()
    try:
        device.allocate(401, stream=stream)
    except Exception as e:
        assert "OUT_OF_MEMORY" in str(e)
    else:
        raise AssertionError
    pinned(5000)  # is not the device's
    ok(cu.cuMemFree(kept))
    device_memory(1000)


def a_graph_builder() -> None:
    stream = device.create_stream()
    a, b, h = device_memory(64), device_memory(64), pinned(64)
    calls: list = []
    for builder in (device.create_graph_builder(), stream.create_graph_builder()):
        calls.clear()
        builder.begin_building()
        assert builder.is_building
        ok(fill(builder.stream.handle, a, 1))
        builder.callback(lambda: calls.append("host"))
        left, right = builder.split(2)
        ok(fill(right.stream.handle, b, 2))
        assert gpu.launch(left, lambda: calls.append(content(a)), [(a, 64)]) == 0
        builder = left.join(left, right)
        ok(cu.cuMemcpyDtoHAsync(h, b, 64, builder.stream.handle))
        graph = builder.end_building().complete()
        assert not calls and content(h) == 0xA5  # recorded, not run
        gpu.clear()
        graph.upload(stream)
        graph.launch(stream)
        graph.launch(stream)
        stream.sync()
        assert gpu.trace() == ["cuGraphUpload", "cuGraphLaunch", "cuGraphLaunch", "cuStreamSynchronize"], gpu.trace()
        assert calls == ["host", 1] * 2 and content(h) == 2
        memory(h, 64)[:] = b"\xa5" * 64
        graph.close()
        builder.close()
    stream.close()
    assert gpu.live_objects()["graph"] == gpu.live_objects()["exec"] == gpu.live_objects()["stream"] == 0


def a_raw_capture() -> None:
    stream, side = new_stream(), new_stream()
    fork, join = (ok(cu.cuEventCreate(2)) for _ in range(2))
    timed = [ok(cu.cuEventCreate(0)) for _ in range(2)]
    a, b, source, h = device_memory(64), device_memory(64), pinned(64), pinned(64)
    memory(source, 64)[:] = bytes([1] * 64)
    external = int(cu.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)

    ok(cu.cuStreamBeginCapture(stream, GLOBAL))
    ok(cu.cuEventRecordWithFlags(timed[0], stream, external))
    ok(cu.cuMemcpyHtoDAsync(a, source, 64, stream))
    ok(cu.cuEventRecord(fork, stream))
    ok(cu.cuStreamWaitEvent(side, fork, 0))
    assert int(ok(cu.cuStreamIsCapturing(side))) == 1
    assert (
        gpu.launch(
            side,
            lambda: memory(b, 64).__setitem__(slice(None), bytes(2 * v for v in memory(a, 64))),
            [(a, 64), (b, 64)],
        )
        == 0
    )
    ok(cu.cuEventRecord(join, side))
    ok(cu.cuStreamWaitEvent(stream, join, 0))
    ok(cu.cuMemcpyDtoHAsync(h, b, 64, stream))
    ok(cu.cuEventRecordWithFlags(timed[1], stream, external))
    graph = ok(cu.cuStreamEndCapture(stream))
    assert int(ok(cu.cuStreamIsCapturing(stream))) == int(ok(cu.cuStreamIsCapturing(side))) == 0
    assert ok(cu.cuGraphGetNodes(graph, 0))[1] == 5
    assert content(h) == 0xA5
    executable = instantiate(graph)
    ok(cu.cuGraphDestroy(graph))

    for value in (1, 5, 9):  # what is in the buffers is data, the graph stays
        memory(source, 64)[:] = bytes([value] * 64)
        ok(cu.cuGraphLaunch(executable, stream))
        ok(cu.cuStreamSynchronize(stream))
        assert content(h) == 2 * value
    assert ok(cu.cuEventElapsedTime(*timed)) > 0
    ok(cu.cuGraphExecDestroy(executable))
    refused(cu.cuGraphLaunch(executable, stream), "INVALID_HANDLE")


def what_a_capture_forbids() -> None:
    import threading

    stream, other = new_stream(), new_stream()
    event = ok(cu.cuEventCreate(2))
    a, h = device_memory(64), pinned(64)

    def spoils(call, name="STREAM_CAPTURE_UNSUPPORTED", mode=GLOBAL):
        ok(cu.cuStreamBeginCapture(stream, mode))
        refused(call(), name)
        refused(fill(stream, a, 1), "STREAM_CAPTURE_INVALIDATED")
        refused(cu.cuStreamEndCapture(stream), "STREAM_CAPTURE_INVALIDATED")
        assert int(ok(cu.cuStreamIsCapturing(stream))) == 0

    def allowed(call, mode):
        ok(cu.cuStreamBeginCapture(stream, mode))
        ok(call())
        ok(cu.cuGraphDestroy(ok(cu.cuStreamEndCapture(stream))))

    def in_thread(call):
        results = []

        def body():
            Device(0).set_current()
            results.append(call())

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        return results[0]

    for mode in (GLOBAL, THREAD_LOCAL, RELAXED):
        spoils(lambda: cu.cuStreamSynchronize(stream), mode=mode)
        spoils(lambda: cu.cuStreamQuery(stream), mode=mode)
        spoils(cu.cuCtxSynchronize, mode=mode)
    for call in (
        lambda: cu.cuStreamSynchronize(other),
        lambda: cu.cuEventSynchronize(event),
        lambda: cu.cuEventQuery(event),
        lambda: cu.cuMemcpyHtoD(a, h, 64),
        lambda: cu.cuMemcpyDtoH(h, a, 64),
        lambda: cu.cuMemAlloc(64),
        lambda: cu.cuMemHostAlloc(64, 0),
        lambda: cu.cuMemFree(a),
    ):
        spoils(call)
        spoils(call, mode=THREAD_LOCAL)
    spoils(lambda: in_thread(lambda: cu.cuMemAlloc(64)))
    allowed(lambda: in_thread(lambda: cu.cuMemAlloc(64)), THREAD_LOCAL)
    allowed(lambda: cu.cuMemAlloc(64), RELAXED)
    allowed(lambda: cu.cuMemcpyHtoD(a, h, 64), RELAXED)
    spoils(lambda: (cu.cuEventRecord(event, stream), cu.cuEventSynchronize(event))[1], "CAPTURED_EVENT", RELAXED)
    ok(cu.cuEventRecord(event, other))
    spoils(lambda: cu.cuStreamWaitEvent(stream, event, 0), "STREAM_CAPTURE_ISOLATION")
    spoils(lambda: fill(stream, a, 1, 65), "INVALID_VALUE")

    # The legacy stream would wait for a blocking one.
    stream = new_stream(nonblocking=False)
    spoils(lambda: fill(0, a, 1), "STREAM_CAPTURE_IMPLICIT", RELAXED)
    refused(cu.cuStreamBeginCapture(0, GLOBAL), "STREAM_CAPTURE_UNSUPPORTED")

    # A branch that the origin never waits for.
    ok(cu.cuStreamBeginCapture(stream, GLOBAL))
    ok(cu.cuEventRecord(event, stream))
    ok(cu.cuStreamWaitEvent(other, event, 0))
    ok(fill(other, a, 1))
    refused(cu.cuStreamEndCapture(stream), "STREAM_CAPTURE_UNJOINED")
    refused(cu.cuStreamEndCapture(stream), "ILLEGAL_STATE")

    # cuda.core reports the same.
    builder = device.create_graph_builder().begin_building()
    try:
        builder.stream.sync()
    except Exception as e:
        assert "STREAM_CAPTURE_UNSUPPORTED" in str(e)
    else:
        raise AssertionError


def lazy_work_waits_for_a_synchronization() -> None:
    stream, other = device.create_stream(), device.create_stream()
    a, h = device_memory(64), pinned(64)

    def start(value):
        memory(h, 64)[:] = bytes([9] * 64)
        ok(fill(stream.handle, a, value))
        ok(cu.cuMemcpyDtoHAsync(h, a, 64, stream.handle))
        assert content(h) == 9  # stale

    start(1)
    stream.sync()
    assert content(h) == 1
    start(2)
    other.sync()  # waits for other work
    assert content(h) == 9
    device.sync()
    assert content(h) == 2
    start(3)
    event = stream.record()
    ok(fill(stream.handle, a, 4))
    assert not event.is_done
    event.sync()
    assert content(h) == 3 == content(a) and event.is_done
    start(5)
    other.wait(stream)
    other.sync()
    assert content(h) == 5
    start(6)
    event = stream.record(event)
    for _ in range(10):  # polling gets on as well
        if event.is_done:
            break
    assert event.is_done and content(h) == 6

    # A synchronous copy waits for blocking streams only.
    into = bytearray(64)

    def copy():
        return ok(cu.cuMemcpyDtoH((ctypes.c_char * 64).from_buffer(into), a, 64))

    ok(fill(stream.handle, a, 7))
    copy()
    assert set(into) == {6}
    blocking = device.create_stream(options=StreamOptions(nonblocking=False))
    stream.sync()
    ok(fill(blocking.handle, a, 8))
    copy()
    assert set(into) == {8}

    # Pageable memory is read before the call returns, and written too.
    ok(cu.cuMemcpyHtoDAsync(a, (ctypes.c_char * 64).from_buffer(into), 64, stream.handle))
    into[:] = bytes(64)
    ok(cu.cuMemcpyDtoHAsync((ctypes.c_char * 64).from_buffer(into), a, 64, stream.handle))
    assert set(into) == {8}


def a_callback_may_not_call_the_driver() -> None:
    stream = device.create_stream()
    results = []
    assert gpu.launch(stream, lambda: results.append(cu.cuMemAlloc(64))) == 0
    refused(results[0], "NOT_PERMITTED")


def a_thread_without_a_context() -> None:
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(cu.cuMemAlloc(64)))
    thread.start()
    thread.join()
    refused(results[0], "INVALID_CONTEXT")


def the_trace() -> None:
    stream = device.create_stream()
    a, h = device_memory(1024), pinned(1024)
    gpu.clear()
    ok(cu.cuMemcpyHtoDAsync(a, h, 1024, stream.handle))
    gpu.launch(stream, lambda: None, [(a, 1024)])
    refused(cu.cuMemcpyDtoHAsync(h, a, 2048, stream.handle), "INVALID_VALUE")
    stream.sync()
    expected = ["cuMemcpyHtoDAsync_v2 1024", "sim_launch", "cuMemcpyDtoHAsync_v2 2048", "cuStreamSynchronize"]
    assert gpu.trace() == expected, gpu.trace()
    gpu.clear()
    assert gpu.trace() == []


def a_failing_kernel_fails_the_test() -> None:
    gpu.launch(device.create_stream(), lambda: 1 / 0)


def the_device() -> None:
    print(
        device.name,
        *device.compute_capability,
        ok(cu.cuMemGetInfo())[1],
        ok(cu.cuDeviceGetCount()),
        ok(cu.cuDriverGetVersion()),
    )
    device.sync()
    assert device.pci_bus_id and device.uuid


def what_is_not_simulated_says_so() -> None:
    try:
        cu.cuModuleLoad(b"kernels.cubin")
    except RuntimeError as e:
        print(e)


def a_replay_with_a_freed_pointer(laziness: str) -> None:
    stream = new_stream()
    lazy = laziness == "lazy"

    def replay(record, free):
        ok(cu.cuStreamBeginCapture(stream, GLOBAL))
        record()
        executable = instantiate(ok(cu.cuStreamEndCapture(stream)))
        ok(cu.cuGraphLaunch(executable, stream))
        ok(cu.cuStreamSynchronize(stream))
        free()
        device_memory(64)  # malloc would give the same address again
        launched = cu.cuGraphLaunch(executable, stream)
        if lazy:
            ok(launched)
            refused(cu.cuStreamSynchronize(stream), "ILLEGAL_ADDRESS")
        else:
            refused(launched, "ILLEGAL_ADDRESS")
        refused(cu.cuMemAlloc(64), "ILLEGAL_ADDRESS")  # nothing works any more
        gpu.clear_error()

    a = device_memory(64)
    replay(lambda: ok(fill(stream, a, 1)), lambda: ok(cu.cuMemFree(a)))
    b = device_memory(64)
    calls = []
    replay(lambda: gpu.launch(stream, lambda: calls.append(1), [(b, 64)]), lambda: ok(cu.cuMemFree(b)))
    assert calls == [1]
    c, h = device_memory(64), pinned(64)
    replay(lambda: ok(cu.cuMemcpyHtoDAsync(c, h, 64, stream)), lambda: ok(cu.cuMemFreeHost(h)))

    if not lazy:
        assert gpu.launch(stream, lambda: None, [(c, 65)]) == 700


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
