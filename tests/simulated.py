"""A simulated GPU: tensors that claim to be on ``cuda:0``, with values on the CPU, and CUDA's rules.

It shows, without a GPU: operations on tensors of different devices, which raise a RuntimeError; asynchronous copies to
the host whose values are used before they have arrived, which are NaN (or the smallest integer) until the host waits
for an event, the device or a blocking copy; and results, which the CPU computes. Waits, speed, memory and the rounding
of GPU kernels need a real one: benchmarks/gpu.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")


class OnDevice(Tensor):
    """A tensor on the simulated device; `held` has its values."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        with torch.inference_mode(False):  # so that views can be created inside and outside of that mode
            out = Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
                device=DEVICE,
            )  # fmt: skip
        out.held = held
        return out

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} of a simulated tensor, but the simulation has ended or is another thread's")


class SimulatedDevice(TorchDispatchMode):
    """Intercepts all operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[Tensor, Tensor]] = []  # (host, values) of all asynchronous copies
        self._arrived = 0  # number of arrived copies

    def arrive(self, upto: int | None = None) -> None:
        """Lets the first `upto` copies to the host arrive, or all."""
        for host, values in self.sent[self._arrived : upto]:
            host.copy_(values)
        self._arrived = max(self._arrived, len(self.sent) if upto is None else upto)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        leaves = tree_leaves((args, kwargs))
        to_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not to_device and not any(isinstance(leaf, OnDevice) for leaf in leaves):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # composite operations, in inference mode; in other modes they are intercepted one by one
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            return getattr(self, f"_{name.strip('_')}")(*args, **kwargs)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # CUDA copies indices to its device
            moved = tree_map(lambda each: OnDevice(_held(each)) if isinstance(each, Tensor) else each, args[1])
            args = (args[0], moved, *args[2:])
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and not isinstance(each, OnDevice) and each.ndim:
                raise RuntimeError(f"Expected all tensors to be on the same device: {func}, {each.shape} on the CPU")
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the operation on the values of the tensors."""
        owners = {id(leaf.held): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)}
        args, kwargs = tree_map(_held, (args, kwargs))
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return out

        def placed(x: Any) -> Any:  # an in-place operation returns the tensor itself
            return (owners[id(x)] if id(x) in owners else OnDevice(x)) if isinstance(x, Tensor) else x

        return tree_map(placed, out)

    def _to_copy(self, x: Tensor, *, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
        if device is None or (device.type == "cuda") == isinstance(x, OnDevice):
            return self._run(torch.ops.aten._to_copy.default, (x,), options)
        values = torch.ops.aten._to_copy.default(_held(x), **options)
        if device.type == "cuda":
            return OnDevice(values)
        return self._copy(torch.empty_like(values), OnDevice(values), non_blocking)

    def _copy(self, to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(to, OnDevice):
            to.held.copy_(_held(x))
        elif non_blocking:
            to.fill_(torch.nan if to.is_floating_point() else to.dtype != torch.bool and torch.iinfo(to.dtype).min)
            self.sent.append((to, x.held.to(to.dtype, copy=True).expand(to.shape)))
        else:
            self.arrive()
            to.copy_(x.held)
        return to


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """A context in which PyTorch has one GPU, the simulated one, with one stream."""
    device = SimulatedDevice()
    torch._C._ensureCUDADeviceGuardSet()  # without a driver, choosing the device does nothing

    class Event:
        """Copies sent before it was recorded have arrived after synchronize()."""

        def __init__(self) -> None:
            self.upto = len(device.sent)

        def synchronize(self) -> None:
            device.arrive(self.upto)

    class Stream:
        def __init__(self, *_: Any) -> None:
            self.record_event, self.wait_event = Event, lambda event: None

    cuda: dict[str, Callable] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "mem_get_info": lambda _=None: (16 << 30, 16 << 30), "memory_reserved": lambda _=None: 0,
        "memory_allocated": lambda _=None: 0, "synchronize": lambda _=None: device.arrive(),
        "is_current_stream_capturing": lambda: False, "current_stream": Stream, "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "_lazy_init": lambda: None,  # called by PyTorch's C++ code before each factory function
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.backends.cudnn, "enabled", False)  # its operators cannot run on a CPU
        patch.setattr(Tensor, "record_stream", lambda x, stream: None)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies visibly
        try:
            with device:
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(before)
