"""What a computation costs: multiply-accumulates, time, memory; each by a function of one measured call."""

import gc
import math
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cea_arch.layers import CEALayer, HyperAdapter
from cea_arch.layers.blocks import ChannelAttention, GatedFeedForward

Call = Callable[[], object]
UNITS = (CEALayer, HyperAdapter, ChannelAttention, GatedFeedForward)  # taken whole in a breakdown by type
REST = 'between modules'
# products that torch's counter passes over, besides those of its table; what has no formula here is named instead
_UNCOUNTED = (
    '_attention',
    '_fft_',
    'cudnn_rnn',
    'deform_conv2d',
    'gru',
    'grid_sampler',
    'lstm',
    'mkldnn_rnn_layer',
    '_transformer_encoder_layer_fwd',
    '_trilinear',
    'linalg_lu',
    'linalg_qr',
    'linalg_solve',
    'linalg_svd',
)


def _backward_of_convolution(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: object,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """The gradients of input and of weights each cost what the forward pass did, in groups too."""
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(wanted[:2])


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _backward_of_attention(_grad: object, *shapes: Any, **words: Any) -> int:
    """Four products; that the scores are computed once more is how it is done, not what it is."""
    return 2 * _attention(*shapes, **words)


_FORMULAS = {  # by shapes, beside those of torch, or instead of them
    torch.ops.aten.mv: lambda matrix, vector, *_, **__: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda start, matrix, vector, *_, **__: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda one, other, *_, **__: 2 * math.prod(one),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_of_attention,
    # torch's own takes a depthwise convolution for a full one
    torch.ops.aten.convolution_backward: _backward_of_convolution,
}


@dataclass(frozen=True)
class Times:
    """Seconds of the repetitions of one call.

    Attributes:
        seconds: One a repetition, in the order in which they were taken.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median; 0 for one repetition."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method='inclusive')
        return (high - low) / self.median

    def over(self, other: 'Times') -> float:
        """The median of the ratios to ``other``, each of two calls that were taken one after the other."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(calls: Mapping[str, Call], repeats: int, device: torch.device) -> dict[str, Times]:
    """Time calls in turn, ``repeats`` rounds after one that does not count, so that what disturbs one disturbs all."""
    seconds = defaultdict(list)
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = _clock(device)
            call()
            if number:
                seconds[name].append(_clock(device) - start)
    return {name: Times(tuple(seconds[name])) for name in calls}


def count_macs(call: Call) -> tuple[int, list[str]]:
    """Multiply-accumulates of matrix products, convolutions and attention, and the operators that were not counted.

    One multiply-accumulate is one multiplication and one addition, half of what ``FlopCounterMode`` counts. It passes
    over element-wise operations, normalisations and softmaxes; products with vectors are added here; transforms,
    sampling, recurrences and the like are named, each with its number of calls.
    """
    counter = _flop_counter()
    with _whole_operators(), _Uncounted(counter.flop_registry) as uncounted, counter:
        call()
    return counter.get_total_flops() // 2, [f'{name} ({count})' for name, count in sorted(uncounted.seen.items())]


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes of CUDA's tensors, beyond those there before, at the moment when they are the most; ``None`` elsewhere.

    What a process holds on a CPU depends on what the system's allocator keeps.
    """
    if device.type != 'cuda':
        return None
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Let so many other processes compute meanwhile, without end."""
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def by_type(net: nn.Module) -> dict[nn.Module, str]:
    """A label for each module that a breakdown by type tells apart: ``UNITS`` whole, else the modules without children.

    Modules within a unit have none. A hyper-adapter within another module is taken out of it.
    """
    units = [m for m in net.modules() if isinstance(m, UNITS)]
    inside = {child for unit in units for child in unit.modules() if child is not unit}
    leaves = [m for m in net.modules() if not any(m.children()) and m not in inside]
    return {m: type(m).__name__ for m in (*leaves, *units)}


def by_stage(net: nn.Module) -> dict[nn.Module, str]:
    """A label for each stage: the network's children, lists of modules as one; of an only child, its children."""
    while len(children := list(net.children())) == 1 and any(children[0].children()):
        net = children[0]
    labels = {}
    for name, child in net.named_children():
        for part in child if isinstance(child, nn.ModuleList) else (child,):
            labels[part] = name
    return labels


def breakdown(labels: Mapping[nn.Module, str], call: Call, read: Callable[[], float]) -> dict[str, float]:
    """How much ``read`` grows within the labelled modules during ``call``, by label; ``REST`` is what remains.

    Each module counts what is its own: without the labelled modules that run within it.

    Args:
        labels: From :func:`by_type` or :func:`by_stage`.
        call: Runs the network forward.
        read: Gives what grows: seconds, or operations so far.
    """
    grown = dict.fromkeys(labels.values(), 0.0) | {REST: 0.0}
    running: list[list[float]] = []  # of each module that runs: the reading at its start, and what others took of it

    def begin(*_: object) -> None:
        running.append([read(), 0.0])

    def end(module: nn.Module | None, *_: object) -> None:
        start, taken = running.pop()
        whole = read() - start
        grown[REST if module is None else labels[module]] += whole - taken
        if running:
            running[-1][1] += whole

    handles = [m.register_forward_pre_hook(begin) for m in labels]
    handles += [m.register_forward_hook(end) for m in labels]
    try:
        begin()
        call()
        end(None)
    finally:
        for handle in handles:
            handle.remove()
    return grown


def time_breakdown(labels: Mapping[nn.Module, str], call: Call, repeats: int, device: torch.device) -> dict[str, Times]:
    """Seconds by label over ``repeats`` calls, see :func:`breakdown`."""
    call()
    rounds = [breakdown(labels, call, lambda: _clock(device)) for _ in range(repeats)]
    return {name: Times(tuple(one[name] for one in rounds)) for name in rounds[0]}


def mac_breakdown(labels: Mapping[nn.Module, str], call: Call) -> dict[str, int]:
    """Multiply-accumulates by label, see :func:`breakdown` and :func:`count_macs`."""
    with _whole_operators(), _flop_counter() as counter:
        flops = breakdown(labels, call, counter.get_total_flops)
    return {name: round(value) // 2 for name, value in flops.items()}


def _clock(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()
    return time.perf_counter()


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


class _Uncounted(TorchDispatchMode):
    """Notes operators whose products :func:`count_macs` does not count."""

    def __init__(self, counted: Container[Any]) -> None:
        super().__init__()
        self.counted = counted
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.overloadpacket not in self.counted and any(part in name for part in _UNCOUNTED):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _whole_operators() -> Iterator[None]:
    """Let nn.MultiheadAttention be computed by products that can be counted, not by one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
