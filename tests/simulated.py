"""A simulated GPU: tensors that claim to be on ``cuda:0``, with values on the CPU, and CUDA's rules.

It shows, without a GPU:

- operations on tensors of different devices, which raise a RuntimeError as on a GPU;
- copies to pinned memory whose values are used before they have arrived: until the host waits for the
  device, its tensor contains NaN (or the smallest integer);
- results, which are computed by the CPU.

Copies arrive when the host waits for an event, for the device or for a blocking copy. It cannot show how often the
host waits (benchmarks/gpu.py counts that), speed, memory, the rounding of GPU kernels, errors inside of kernels, errors
that depend on several streams or devices (there is one of each), or a pinned source that is overwritten before it is
sent.
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
TOTAL_BYTES = 16 << 30


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

    def __repr__(self) -> str:
        return f"OnDevice({self.held!r})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} of a simulated tensor, but the simulation has ended or is another thread's")


class SimulatedDevice(TorchDispatchMode):
    """Intercepts all operations while it is active.

    Attributes:
        reserved, allocated: bytes, as PyTorch's allocator would report them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reserved = self.allocated = 0
        self._sent: list[tuple[Tensor, Tensor]] = []  # (host, values) that have not arrived yet
        self._arrived = 0  # number of arrived copies
        self._pinned: dict[int, Any] = {}  # storages by address, kept so that addresses are not reused

    def arrive(self, upto: int | None = None) -> None:
        """Lets the first `upto` copies to the host arrive, or all."""
        while self._sent and (upto is None or self._arrived < upto):
            host, values = self._sent.pop(0)
            host.copy_(values)
            self._arrived += 1

    def sent(self) -> int:
        """Returns the number of copies to pinned memory so far."""
        return self._arrived + len(self._sent)

    def pin(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return x

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        to_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not to_device and not any(isinstance(leaf, OnDevice) for leaf in leaves):
            pinned = kwargs.get("pin_memory")
            out = func(*args, **{**kwargs, "pin_memory": False} if pinned else kwargs)
            return self.pin(out) if pinned else out
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # composite operations, in inference mode; in other modes they are intercepted one by one
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            return getattr(self, f"_{name.strip('_')}")(*args, **kwargs)
        if name == "record_stream":
            return None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self._indices(*args[:2]), *args[2:])
            leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(not isinstance(each, OnDevice) and each.ndim for each in tensors):
            shapes = [(str(each.device), tuple(each.shape)) for each in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, {func} got {shapes}")
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the operation on the values of the tensors."""
        owners = {id(leaf.held): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)}
        args, kwargs = tree_map(_held, (args, kwargs))
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", None)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        for owner in owners.values():
            if owner.shape != owner.held.shape:
                raise NotImplementedError(f"{func} changes a shape in place, which is not simulated")
        if device is not None and device.type == "cpu":
            return self.pin(out) if pinned else out

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return owners[id(x)] if id(x) in owners else OnDevice(x)  # an in-place operation returns the tensor itself

        return tree_map(placed, out)

    def _to_copy(self, x: Tensor, *, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
        options.pop("pin_memory", None)
        if device is None or (device.type == "cuda") == isinstance(x, OnDevice):
            return self._run(torch.ops.aten._to_copy.default, (x,), options)
        if device.type == "cuda":
            return OnDevice(torch.ops.aten._to_copy.default(x, **options))
        values = torch.ops.aten._to_copy.default(x.held, **options)
        if not non_blocking:
            self.arrive()
            return values
        return self._send(self.pin(torch.empty_like(values)), values)

    def _copy(self, to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(to, OnDevice):
            to.held.copy_(_held(x))
        elif non_blocking and self._is_pinned(to):
            self._send(to, x.held.to(to.dtype, copy=True).expand(to.shape))
        else:
            self.arrive()
            to.copy_(x.held)
        return to

    def _send(self, host: Tensor, values: Tensor) -> Tensor:
        if host.is_floating_point():
            host.fill_(torch.nan)
        else:
            host.fill_(0 if host.dtype == torch.bool else torch.iinfo(host.dtype).min)
        self._sent.append((host, values))
        return host

    def _is_pinned(self, x: Tensor) -> bool:
        return not isinstance(x, OnDevice) and x.numel() > 0 and x.untyped_storage().data_ptr() in self._pinned

    def _indices(self, x: Tensor, indices: list[Tensor | None]) -> list:
        """Copies indices to the device of the tensor, as CUDA does."""
        move = isinstance(x, OnDevice)
        return [OnDevice(each) if move and isinstance(each, Tensor) and not isinstance(each, OnDevice) else each
                for each in indices]  # fmt: skip


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """A context in which PyTorch has one GPU, the simulated one."""
    device = SimulatedDevice()
    torch._C._ensureCUDADeviceGuardSet()  # without a driver, choosing the device does nothing

    class Event:
        """An event of the only stream: copies sent before it was recorded have arrived after synchronize()."""

        def __init__(self) -> None:
            self.upto = device.sent()

        def synchronize(self) -> None:
            device.arrive(self.upto)

    class Stream:
        """The only stream, which is in order."""

        def __init__(self, *_: Any) -> None:
            pass

        def record_event(self) -> Event:
            return Event()

        def wait_event(self, event: Event) -> None:
            pass

    cuda: dict[str, Callable] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda _=None: "simulated",
        "mem_get_info": lambda _=None: (TOTAL_BYTES - device.reserved, TOTAL_BYTES),
        "memory_reserved": lambda _=None: device.reserved,
        "memory_allocated": lambda _=None: device.allocated,
        "empty_cache": lambda: None,
        "synchronize": lambda _=None: device.arrive(),
        "is_current_stream_capturing": lambda: False,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "Stream": Stream,
        "_lazy_init": lambda: None,  # called by PyTorch's C++ code before each factory function
    }
    accelerator: dict[str, Callable] = {  # of which a DataLoader asks before it pins memory
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "set_device_index": lambda _: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((torch.cuda, cuda), (getattr(torch, "accelerator", None), accelerator)):
            for name, value in names.items() if module else ():
                patch.setattr(module, name, value, raising=False)
        patch.setattr(torch.backends.cudnn, "enabled", False)  # its operators cannot run on a CPU
        patch.setattr(Tensor, "pin_memory", lambda x, *_: device.pin(x.clone()))
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
