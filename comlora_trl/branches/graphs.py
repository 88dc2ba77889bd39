"""Decoder layers as CUDA graphs: the forward and backward of each layer are captured once for each shape and replayed.

With a small model, the time of a step is limited by the host, which launches thousands of kernels. A replay launches
a whole layer with one call. The layer is compiled before it is captured (one compilation serves all layers and
shapes). If the compilation fails, the uncompiled layer is captured.

Graphs are kept by the shape of the decoder layers' input:

1. The first pass with a shape runs without graphs, and the arguments of each layer (masks, positions) are recorded.
2. The second pass captures all layers. The outputs and gradients of some or all layers are compared with those of the
   uncompiled layers. Then the pass replays the graphs.
3. Later passes replay the graphs.

Everything else runs without graphs: another shape, a layer that gets other arguments, a second forward before the
backward. For autograd, a replayed layer is one function, so both kinds of layers can be mixed in a pass.

All graphs share one memory pool. This is safe because only one pass at a time is between its forward and its backward.
Hidden states between layers and gradients of weights must outlive a graph, so they are in buffers outside the pool,
which all shapes share.
"""

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from comlora_trl import compat
from comlora_trl.branches.kernels import BranchWeights
from comlora_trl.branches.layers import ActivePass, CompetingBranches
from comlora_trl.branches.static_weights import LayerWeights, StaticWeights

# The largest number of shapes that are captured, and that are recorded. Padding to multiples keeps lengths few
MOST_SHAPES = 32
_MOST_SEEN = 64
# Relative errors (Frobenius norm) up to these count as rounding: of a layer's output, of all its gradients together,
# and of a single gradient. The last limit is high in half precision, because terms may cancel in a single gradient,
# and the rounding error is then large relative to it. A real error (a wrong row or branch, a missing factor) is 0.3 or
# more
_ROUNDING = {torch.float64: (1e-9, 1e-9, 1e-7), torch.float32: (1e-3, 3e-3, 3e-2)}
_HALF_ROUNDING = (2e-2, 3e-2, 0.15)
_CHECKPOINTING = "gradient_checkpointing"  # a layer's own flag, in transformers
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)


class Graph(Protocol):
    """Records the kernels of a function once and runs them again."""

    def capture(self, work: Callable[[], None]) -> None:
        """Records the kernels that `work` launches, without running them."""

    def replay(self) -> None:
        """Runs the recorded kernels on the memory addresses of the capture."""


class CudaGraphs:
    """Makes CUDA graphs that share one memory pool and are captured on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool: Any = None
        self._keeper: Any = None

    def new(self) -> Graph:
        """An empty graph."""
        return _CudaGraph(self)

    def release(self) -> None:
        """Frees the memory pool as soon as no graph uses it."""
        self._keeper = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, an operation that waits for the GPU raises an error.

        Such an operation in a capture would leave the GPU unusable for the process, so it is searched for before.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def check(self) -> None:
        """Checks after a failed capture that the process can still use the GPU.

        Raises:
            RuntimeError: if it can't.
        """
        try:
            torch.cuda.synchronize()
            torch.empty(1, device=self.device).normal_()
        except RuntimeError as error:
            raise RuntimeError(
                "a capture of CUDA graphs has failed and left the GPU's state unusable in this process: set "
                "comlora_graphs=False and start again."
            ) from error

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The context of captures and of the runs that warm up for them, on a separate stream."""
        current = torch.cuda.current_stream()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the pool can't use memory that is cached for passes without graphs
        collecting = gc.isenabled()
        gc.disable()  # a garbage collection during a capture could free other graphs
        try:
            with torch.cuda.stream(self.stream):
                if self._keeper is None:
                    # PyTorch can't use a pool again after its last graph was freed, so this empty graph is kept
                    self.pool, self._keeper = torch.cuda.graph_pool_handle(), _CudaGraph(self)
                    nothing = torch.zeros(1, device=self.device)
                    self._keeper.capture(nothing.zero_)
                yield
        finally:
            if collecting:
                gc.enable()
            current.wait_stream(self.stream)


class _CudaGraph:
    def __init__(self, owner: CudaGraphs) -> None:
        self.owner, self.graph = owner, torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        # thread_local: calls of other threads, such as pinning memory, must not make the capture fail
        self.graph.capture_begin(pool=self.owner.pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            try:
                self.graph.capture_end()
            except RuntimeError:
                pass  # raised because the capture is invalid after the first error
            raise
        self.graph.capture_end()

    def replay(self) -> None:
        self.graph.replay()


class LayerGraphs:
    """Replays decoder layers in passes over branches, see the text of this module.

    Args:
        branches: the state that the model's adapted layers share.
        layers: the decoder layers from the first adapted one on, in the order in which they run.
        maker: makes graphs: `CudaGraphs`, or a stand-in in tests.
        report: shows a line to the user.
        compiler: compiles a function; None to capture uncompiled layers.

    Attributes:
        off: the reason why graphs are no longer used; None while they are used.
        captures: number of shapes captured so far.
        replays: number of layers replayed so far.
        capture_seconds: time that the captures took, in seconds.
    """

    def __init__(
        self,
        branches: CompetingBranches,
        layers: Sequence[nn.Module],
        maker: Any,
        report: Callable[[str], None],
        compiler: Callable[[Callable], Callable] | None = None,
    ) -> None:
        self.branches, self.layers, self.maker, self.report = branches, list(layers), maker, report
        self.off: str | None = None
        self.run_layer = None if compiler is None else compiler(_run_layer)
        self._groups: list[Any] | None = None
        self._weights: dict[int, StaticWeights] = {}
        self._seen: dict[tuple[Any, ...], list[_Call] | None] = {}
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._last: weakref.ref[_Token] | None = None
        self._run: _Run | None = None
        self._forwards = [_Forward(self, index, layer) for index, layer in enumerate(self.layers)]
        self._hooks = [hooks for layer in self.layers for hooks in _hooks(layer)]
        self.captures, self.replays, self.capture_seconds = 0, 0, 0.0

    # ---- The start and the end of a pass ----

    def begin(self, one: ActivePass) -> None:
        """Replaces the forwards of the layers for a pass, if the pass may be recorded or replayed."""
        self._run = None
        if self.off or not one.differentiable or one.compiled or is_compiling():
            return
        if any("forward" in layer.__dict__ for layer in self.layers):
            self.turn_off("the forward of a decoder layer has been replaced")
            return
        if any(self._hooks) or compat.has_global_hooks():
            self.turn_off("there is a hook on a decoder layer or on all modules")
            return
        if not all(layer.training for layer in self.layers):
            return
        if self._groups is not self.branches.groups:
            self._forget_shapes()
            self._groups = self.branches.groups
        self._run = _Run(one)
        for forward in self._forwards:
            forward.begin()

    def end(self) -> None:
        """Restores the forwards of the layers."""
        run, self._run = self._run, None
        if run is None:
            return
        for forward in self._forwards:
            forward.end()
        if run.unfit is not None:
            self.turn_off(run.unfit)
        elif run.recorded is not None and len(run.recorded) == len(self.layers):
            self._seen[run.key] = run.recorded

    def turn_off(self, reason: str) -> None:
        """Stops using graphs for the rest of the run, frees them, and reports the reason."""
        self.off = reason
        self._forget_shapes()
        self.maker.release()
        self.report(f"comlora_graphs: decoder layers run without CUDA graphs from here on: {reason}.")

    def forget_more_than(self, k: int) -> None:
        """Frees the graphs of passes over more than k branches. Call it when fewer branches are left."""
        for key in [key for key in self._shapes if key[0] > k]:
            del self._shapes[key]
        for own in [own for own in self._weights if own > k]:
            del self._weights[own]
        for weights in self._weights.values():
            weights.forget()
        if not self._shapes:
            self._buffers = {}
            self.maker.release()

    def _forget_shapes(self) -> None:
        self._shapes, self._seen, self._weights, self._buffers = {}, {}, {}, {}

    # ---- The call of a layer ----

    def call(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs or replays the forward of decoder layer `index` in a pass."""
        run = self._run
        own = self._forwards[index].own
        if run is None or run.one is not self.branches.active or not torch.is_grad_enabled():
            return own(args, kwargs)
        call = _Call.of(args, kwargs)
        if index == 0:
            self._decide(run, call)
        if run.shape is not None and call is not None:
            output = run.shape.replay(run, index, call)
            if output is not None:
                self.replays += 1
                return output
        output = own(args, kwargs)
        if call is None:
            run.unfit = f"a graph can't take the arguments of {type(layer).__name__}"
        elif run.recorded is not None and index == len(run.recorded):
            if call.returned(output):
                run.recorded.append(call.kept(run.slots))
            else:
                run.unfit = f"{type(layer).__name__} returns more than hidden states"
        return output

    def _decide(self, run: "_Run", call: "_Call | None") -> None:
        """Decides at the first layer whether a pass replays, captures and replays, is recorded, or none of these.

        Args:
            run: the state of the pass, which is changed.
            call: the first layer's call; None if a graph can't take its arguments.
        """
        if call is None:
            return
        names = run.one.names
        device = call.hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (len(names), call.spec, autocast, self._checkpointing)
        if self._last is not None and (token := self._last()) is not None and not token.done:
            return  # an earlier pass still needs the buffers, because its backward may come later
        shape = self._shapes.get(key)
        if shape is None:
            recorded = self._seen.get(key[1:])  # the number of branches does not matter here
            if recorded is None:
                if len(self._seen) < _MOST_SEEN:
                    run.key, run.recorded = key[1:], []
                return
            if len(self._shapes) >= MOST_SHAPES:
                return
            shape = self._capture(key, recorded, names, call)
            if shape is None:
                return
        weights = shape.weights.begin(names)
        if weights is None:
            return
        run.shape, run.filled, run.token = shape, weights, _Token()
        self._last = run.token.reference

    @property
    def _checkpointing(self) -> bool:
        """Whether layers use gradient checkpointing. transformers' own property would visit every module each time."""
        return any(forward.checkpointing for forward in self._forwards)

    def _capture(
        self, key: tuple[Any, ...], recorded: "list[_Call]", names: tuple[str, ...], call: "_Call"
    ) -> "_Shape | None":
        weights = self._weights.get(len(names))
        if weights is None:
            weights = StaticWeights.of(self.branches.groups, self.layers, names)
            if weights is None:
                self.turn_off("the batched products can't compute an adapted layer")
                return None
            self._weights[len(names)] = weights
        recompute = self._checkpointing
        ways = [self.run_layer, None] if self.run_layer is not None else [None]
        for way in ways:
            shape, begun = _Shape(self, recorded, weights, recompute, way), time.perf_counter()
            try:
                with torch.no_grad(), self.maker.capturing():
                    shape.capture(call.hidden, names, check_all=self.captures == 0)
            except _Differs as error:
                reason = str(error)
            except Exception as error:  # captures, the compiler and model code may raise any error
                text = (str(error).strip().splitlines() or ["no message"])[0][:200]
                doing = "compiling" if way is not None else "capturing"
                reason = f"{doing} a layer ended in {type(error).__name__} ({text})"
            else:
                self._shapes[key] = shape
                self.captures += 1
                self.capture_seconds += time.perf_counter() - begun
                return shape
            del shape
            self.maker.check()
            if way is not None:
                self.run_layer = None
                self.report(f"comlora_graphs: decoder layers are captured without compilation: {reason}.")
        self.turn_off(reason)
        return None

    def buffer(self, name: tuple[Any, ...], like: Tensor) -> Tensor:
        """A tensor with the shape, dtype and device of `like`. All shapes share the memory of one name."""
        key = (*name, like.dtype, like.device)
        flat = self._buffers.get(key)
        if flat is None or flat.numel() < like.numel():
            flat = self._buffers[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return flat[: like.numel()].view(like.shape)


class _Forward:
    """Replaces the forward of a decoder layer during a pass.

    Gradient checkpointing is switched off in the layer and done here, for layers that are not replayed. A replayed
    layer does not need it, because the graph of its backward contains the second forward.
    """

    def __init__(self, graphs: LayerGraphs, index: int, layer: nn.Module) -> None:
        self.graphs, self.index, self.layer = graphs, index, layer
        self.checkpointing: bool | None = None

    def begin(self) -> None:
        """Replaces the layer's forward and switches its own gradient checkpointing off."""
        own = self.layer.__dict__
        self.checkpointing = own.get(_CHECKPOINTING)
        own["forward"], own[_CHECKPOINTING] = self, False

    def end(self) -> None:
        """Restores the layer's forward and its gradient checkpointing."""
        own = self.layer.__dict__
        own.pop("forward", None)
        own.pop(_CHECKPOINTING, None)
        if self.checkpointing is not None:
            own[_CHECKPOINTING] = self.checkpointing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graphs.call(self.index, self.layer, args, kwargs)

    def own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer without a graph, with gradient checkpointing if the layer uses it."""
        if self.checkpointing and torch.is_grad_enabled():
            run = partial(_run_once, self.layer, **kwargs)
            return compat.checkpoint(self.layer, run, *args)
        return _run_layer(self.layer, args, kwargs)


def _run_once(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs a layer whose own gradient checkpointing is off, also when it runs again in the backward."""
    with _not_checkpointed(layer):
        return _run_layer(layer, args, kwargs)


class _Token:
    """Marks a pass between its forward and its backward. It is freed with the pass's autograd graph."""

    def __init__(self) -> None:
        self.done, self.reference = False, weakref.ref(self)


class _Run:
    """The state of one pass over the layers.

    Attributes:
        one: the pass.
        key: the key under which the recorded calls are stored.
        unfit: why a graph can't run these layers; None if it can as far as is known.
        recorded: the calls recorded so far; None if the pass is not recorded.
        slots: the different tensors among the recorded arguments.
        shape: the graphs to replay; None if the pass does not replay.
        filled: the weights for the graphs.
        copied: the arguments that were copied to the graphs' memory, by slot.
        token: marks the pass for its backward; None if the pass does not replay.
    """

    def __init__(self, one: ActivePass) -> None:
        self.one = one
        self.key: tuple[Any, ...] = ()
        self.unfit: str | None = None
        self.recorded: list[_Call] | None = None
        self.slots: list[Tensor] = []
        self.shape: _Shape | None = None
        self.filled: LayerWeights | None = None
        self.copied: dict[int, Tensor] = {}
        self.token: _Token | None = None


class _Differs(Exception):
    """Raised if a compiled or captured layer gives other numbers than the layer itself."""


class _Call:
    """One call of a decoder layer.

    Attributes:
        hidden: the hidden states, the layer's first argument.
        tensors: the other tensors among the arguments (masks, positions), in order.
        spec: shapes, dtypes and all values that are not tensors. Two calls with the same spec can use the same graph.
        slots: for each of `tensors`, its index among the different tensors of all layers.
        is_tuple: whether the layer returns a tuple with one item.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs, self.is_tuple = args, kwargs, False
        named = {**dict(enumerate(args)), **kwargs}
        self.hidden = named.pop(0) if args else named.pop("hidden_states")
        self.tensors: list[Tensor] = []
        others = tuple((name, _spec(value, self.tensors)) for name, value in named.items())
        hidden = self.hidden
        self.spec = (hidden.shape, hidden.dtype, hidden.requires_grad, others)
        self.slots: list[int] = []

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call | None":
        """The call with these arguments; None if a graph can't take one of them."""
        try:
            call = cls(args, kwargs)
        except (KeyError, TypeError):
            return None
        return call if isinstance(call.hidden, Tensor) and call.hidden.dim() == 3 else None

    def returned(self, output: Any) -> bool:
        """Notes whether the layer returned a tuple. Returns False if a graph can't return this output."""
        self.is_tuple = type(output) is tuple and len(output) == 1
        output = output[0] if self.is_tuple else output
        return isinstance(output, Tensor) and output.shape == self.hidden.shape and output.dtype == self.hidden.dtype

    def kept(self, slots: list[Tensor]) -> "_Call":
        """Removes the tensors from the call, stores each different one once in `slots`, and returns the call."""
        for tensor in self.tensors:
            place = next((place for place, one in enumerate(slots) if one is tensor), None)
            if place is None:
                place = len(slots)
                slots.append(tensor)
            self.slots.append(place)
        self.slot_values = slots
        nothing = self.hidden.new_empty(0)
        self.args, self.kwargs = self.with_tensors(nothing, [nothing] * len(self.tensors))
        self.hidden, self.tensors = nothing, []
        return self

    def with_tensors(self, hidden: Tensor, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments, with the given hidden states and tensors."""
        left = iter(tensors)
        named = {**dict(enumerate(self.args)), **self.kwargs}
        first = 0 if self.args else "hidden_states"
        new = {name: hidden if name == first else _replaced(value, left) for name, value in named.items()}
        args = tuple(new.pop(index) for index in range(len(self.args)))
        return args, new


def _spec(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError("only the hidden states may require gradients")
        tensors.append(value)
        return ("tensor", value.shape, value.dtype)
    if type(value) in _CONSTANTS:
        return value
    if type(value) in (tuple, list):
        return (type(value).__name__, *(_spec(item, tensors) for item in value))
    if isinstance(value, Mapping):
        return ("mapping", *((name, _spec(item, tensors)) for name, item in value.items()))
    raise TypeError(f"{type(value).__name__} among a layer's arguments")


def _replaced(value: Any, left: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(left)
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, left) for item in value)
    if isinstance(value, Mapping):
        return {name: _replaced(item, left) for name, item in value.items()}
    return value


class _Shape:
    """The graphs of all layers for one input shape and number of branches.

    Args:
        graphs: the owner.
        recorded: the calls of all layers in a pass with this shape.
        weights: the fixed memory for the weights of that many branches.
        recompute: whether the backward of a layer runs its forward again (gradient checkpointing).
        run_layer: runs a compiled layer; None to capture the uncompiled layer.
    """

    def __init__(
        self,
        graphs: LayerGraphs,
        recorded: list[_Call],
        weights: StaticWeights,
        recompute: bool,
        run_layer: Callable | None,
    ) -> None:
        self.graphs, self.weights, self.recompute, self.run_layer = graphs, weights, recompute, run_layer
        self.slots = [value.clone() for value in recorded[0].slot_values]
        self.calls = recorded
        self.layers: list[_Layer] = []

    def capture(self, hidden: Tensor, names: tuple[str, ...], check_all: bool) -> None:
        """Captures all layers and compares them with the uncompiled layers.

        Args:
            hidden: the hidden states, as an example of the shape.
            names: adapter names of the branches.
            check_all: whether all layers are compared, or only the first, the middle and the last one.

        Raises:
            _Differs: if the numbers differ by more than rounding.
        """
        graphs, count = self.graphs, len(self.graphs.layers)
        self.weights.fill(names)
        like = hidden.detach()
        hiddens = [graphs.buffer(("hidden", index), like) for index in range(count + 1)]
        grads = [graphs.buffer(("grad", index), like) for index in range(2)]
        hiddens[0].copy_(like)
        checked = set(range(count)) if check_all else {0, count // 2, count - 1}
        expected: dict[int, _Figures] = {}
        for index in range(count):
            layer = _Layer(self, index, hiddens[index], hiddens[index + 1], grads[(index + 1) % 2], grads[index % 2])
            if index in checked:
                expected[index] = layer.figures(None)
            if self.run_layer is not None and index in checked:
                found = layer.figures(self.run_layer)  # compiles and loads kernels, which a capture must not do
                expected[index].compare(found, f"compiled, decoder layer {index}")
            elif index not in checked and check_all:
                layer.figures(None)
            if check_all:
                with graphs.maker.watched():
                    layer.figures(self.run_layer)
            layer.capture_forward()
            layer.forward.replay()
            if index in checked:
                expected[index].compare_output(layer.output, f"captured, decoder layer {index}")
            self.layers.append(layer)
        for layer in reversed(self.layers):
            layer.capture_backward()
        # All forwards, then all backwards, as in a pass: the graphs share memory on the assumption of this order
        for layer in self.layers:
            layer.forward.replay()
        for layer in reversed(self.layers):
            layer.draw_grad(layer.grad_output)
            layer.backward.replay()
            if layer.index in checked:
                found = [layer.grad_input, *layer.weight_grads]
                expected[layer.index].compare_gradients(found, f"captured, decoder layer {layer.index}")

    def replay(self, run: _Run, index: int, call: _Call) -> Any:
        """Replays a layer and returns its output; None if the call differs from the captured one."""
        known = self.calls[index]
        if call.spec != known.spec:
            return None
        for tensor, slot in zip(call.tensors, known.slots, strict=True):
            copied = run.copied.get(slot)
            if copied is None:
                self.slots[slot].copy_(tensor)
                run.copied[slot] = tensor
            elif copied is not tensor:
                return None
        output = _Replay.apply(self.layers[index], run.token, call.hidden, *run.filled.of_layer(index))
        return (output,) if known.is_tuple else output


class _Figures:
    """The output and the gradients of a layer, to compare a compiled or captured layer with."""

    def __init__(self, output: Tensor, gradients: Sequence[Tensor]) -> None:
        self.output, self.gradients = output, list(gradients)
        self.limits = _ROUNDING.get(output.dtype, _HALF_ROUNDING)

    def compare(self, other: "_Figures", what: str) -> None:
        self.compare_output(other.output, what)
        self.compare_gradients(other.gradients, what)

    def compare_output(self, output: Tensor, what: str) -> None:
        _compare([output], [self.output], self.limits[0], f"output of a layer ({what})")

    def compare_gradients(self, gradients: Sequence[Tensor], what: str) -> None:
        dx, *weights = gradients
        own_dx, *own_weights = self.gradients
        _compare([dx], [own_dx], self.limits[1], f"gradient of a layer's input ({what})")
        if weights:
            _compare(weights, own_weights, self.limits[1], f"gradient of a layer's adapters ({what})", self.limits[2])


def _compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], limit: float, what: str, single: float | None = None
) -> None:
    """Compares tensors with expected ones.

    Args:
        found, expected: the tensors.
        limit: the largest relative error of all tensors together (Frobenius norm).
        what: what is compared, for the message.
        single: the largest relative error of each tensor; None for no such limit.

    Raises:
        _Differs: if an error is larger than its limit.
    """
    wide = torch.float64 if expected[0].dtype == torch.float64 else torch.float32
    errors = torch.stack([(a.to(wide) - b.to(wide)).norm() for a, b in zip(found, expected, strict=True)])
    scales = torch.stack([one.norm(dtype=wide) for one in expected])
    checks = [(errors.norm(), scales.norm(), limit)]
    if single is not None:
        worst = (errors / scales.clamp(min=1e-30)).nan_to_num(nan=float("inf")).argmax()
        checks.append((errors[worst], scales[worst], single))
    for error, scale, allowed in ((e.item(), s.item(), own) for e, s, own in checks):
        if not error <= allowed * scale + 1e-12:
            off = error / max(scale, 1e-30)
            raise _Differs(f"the {what} is {off:.1e} off, more than rounding ({allowed:g})")


class _Layer:
    """The graphs of one decoder layer for one shape.

    Attributes:
        input, output: hidden states in fixed memory, [K·B, T, d].
        grad_output, grad_input: gradients of the output and the input, in fixed memory.
        weight_grads: gradients of the layer's stacked weights, in fixed memory.
        owner: the token of the pass that ran the last forward; None after its backward.
    """

    def __init__(
        self, shape: _Shape, index: int, input: Tensor, output: Tensor, grad_output: Tensor, grad_input: Tensor
    ) -> None:
        self.index, self.input, self.output = index, input, output
        self.grad_output, self.grad_input = grad_output, grad_input
        self.recompute, self.run_layer = shape.recompute, shape.run_layer
        self.module, self.call = shape.graphs.layers[index], shape.calls[index]
        self.tensors = [shape.slots[slot] for slot in self.call.slots]
        self.weights, self.weight_grads = shape.weights.of_layer(index)
        self.groups, self.kept = shape.weights.groups[index], shape.weights.kept(index)
        self.k = shape.weights.k
        self.maker = shape.graphs.maker
        self.forward: Graph = self.maker.new()
        self.backward: Graph = self.maker.new()
        self.owner: weakref.ref[_Token] | None = None
        self._kept: tuple[Tensor, list[Tensor]] | None = None

    def figures(self, way: Callable | None) -> _Figures:
        """Runs forward and backward without a graph, by the compiled forward `way` or by the layer itself if None."""
        output, leaves = self._run(way)
        grad, dx = torch.empty_like(self.output), torch.empty_like(self.input)
        self.draw_grad(grad)
        self._write_gradients(output, leaves, grad, dx)
        return _Figures(output.detach(), [dx, *(one.clone() for one in self.weight_grads)])

    def draw_grad(self, into: Tensor) -> None:
        """Fills a gradient with random numbers that are the same for each call."""
        into.normal_(generator=torch.Generator(into.device).manual_seed(self.index))

    def capture_forward(self) -> None:
        """Captures the forward."""
        self.forward.capture(self._forward)

    def capture_backward(self) -> None:
        """Captures the backward; the forward must have been captured."""
        self.backward.capture(self._backward)
        self._kept = None

    def _forward(self) -> None:
        output, leaves = self._run(self.run_layer)
        if not self.recompute:
            self._kept = output, leaves
        self.output.copy_(output.detach())

    def _backward(self) -> None:
        output, leaves = self._run(self.run_layer) if self.recompute else self._kept
        self._kept = None
        self._write_gradients(output, leaves, self.grad_output, self.grad_input)

    def _write_gradients(self, output: Tensor, leaves: list[Tensor], grad: Tensor, dx: Tensor) -> None:
        """Writes the gradients of input and weights. A compiled layer writes those of the weights itself."""
        gradients = torch.autograd.grad(output, leaves, grad, allow_unused=True)
        for target, gradient in zip([dx, *self.weight_grads], gradients, strict=False):
            if gradient is None:
                target.zero_()
            else:
                target.copy_(gradient)

    def _run(self, way: Callable | None) -> tuple[Tensor, list[Tensor]]:
        """Runs the layer on `input`.

        Returns:
            the output, and the leaves whose gradients are needed: the input and, for an uncompiled layer, the weights.
        """
        with torch.enable_grad():
            # The first layer's input too, although its gradient is not used: otherwise it needs its own compilation
            hidden = self.input.detach().requires_grad_()
            args, kwargs = self.call.with_tensors(hidden, self.tensors)
            weights = [] if way is not None else [weight.detach().requires_grad_() for weight in self.weights]
            left = iter(weights)
            for group, kept in zip(self.groups, self.kept, strict=True):
                if way is None:
                    by_branch = [next(left).view(self.k, -1, own.size(-1)) for own in (kept.a, *kept.b)]
                    group.weights, group.kept = BranchWeights(by_branch[0], tuple(by_branch[1:])), None
                else:
                    group.weights, group.kept = None, (kept.number, kept.a.size(1), kept.a.dtype)
            if way is not None:
                _mark_lengths(hidden, self.tensors)
            try:
                with _not_checkpointed(self.module), _without_autocast_cache(), compat.distinct_symbols():
                    output = (way or _run_layer)(self.module, args, kwargs)
            finally:
                for group in self.groups:
                    group.forget()
        output = output[0] if type(output) is tuple else output
        return output, [hidden, *weights]


def _mark_lengths(hidden: Tensor, tensors: Sequence[Tensor]) -> None:
    """Tells the compiler that the length of the rows varies.

    The compiler finds other sizes that vary by itself, with another compilation. Marking them all would make each
    compilation several times slower.
    """
    length = hidden.size(1)
    for tensor in (hidden, *tensors):
        for dimension, size in enumerate(tensor.shape):
            if dimension > 0 and size == length:
                compat.mark_varying(tensor, dimension)


def _run_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


class _Replay(torch.autograd.Function):
    """The autograd function that replays a layer."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, token: _Token, hidden: Tensor, *weights: Tensor) -> Tensor:
        if hidden.data_ptr() != layer.input.data_ptr():
            layer.input.copy_(hidden)
        layer.forward.replay()
        layer.owner = token.reference
        ctx.layer, ctx.token, ctx.weights = layer, token, len(weights)
        return layer.output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        if layer.owner is not ctx.token.reference:
            raise RuntimeError(
                "backward() was called twice for a pass, or after the decoder layers have run again: call backward() "
                "once after each forward, or set comlora_graphs=False."
            )
        layer.owner = None
        if grad.data_ptr() != layer.grad_output.data_ptr():
            layer.grad_output.copy_(grad)
        layer.backward.replay()
        if layer.index == 0:
            ctx.token.done = True
        dx = layer.grad_input.detach() if ctx.needs_input_grad[2] else None
        return None, None, dx, *(one.detach() for one in layer.weight_grads)


@contextmanager
def _not_checkpointed(layer: nn.Module) -> Iterator[None]:
    """Within the block, a layer's own gradient checkpointing is off."""
    own = layer.__dict__
    kept = own.get(_CHECKPOINTING)
    own[_CHECKPOINTING] = False
    try:
        yield
    finally:
        if kept is None:
            del own[_CHECKPOINTING]
        else:
            own[_CHECKPOINTING] = kept


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Within the block, autocast does not cache the weights that it casts. A cached one would be outside the graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _hooks(layer: nn.Module) -> Iterator[Mapping[int, Any]]:
    """The dicts of hooks on a layer's modules, except for forward hooks on the layer itself, which still run."""
    for module in layer.modules():
        of_the_call, of_the_backward = compat.hooks_of(module)
        yield from of_the_backward
        if module is not layer:
            yield from of_the_call
