"""How an attack asks for gradients: by eager kernels, one compiled region, or one CUDA graph.

compile     forward pass, loss and backward pass are one function of the images under torch.compile, with no weight's
            gradient in it. It is compiled once per model and shape, and later attacks find it again. Its guards ask at
            every call whether anything about the model has changed; an attack, which leaves the model alone, lets them
            ask twice.
cudagraph   the kernels of eager mode, captured once per attack and shape and replayed at every step, so that launching
            them costs the host one call.

Both are for losses by name, whose inputs are known, and batches that keep their size.
"""

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm import ops
from rvlm.attacks.checks import AttackWarning
from rvlm.attacks.losses import ce, loss_at_head, loss_at_logits, of_ops, wide

__all__ = ["ENGINES", "FIXED", "Answer", "Compiled", "Question", "Replayed", "engine_for"]

ENGINES = ("auto", "eager", "compile", "cudagraph")
FIXED = ("compile", "cudagraph")  # those for which a batch of another size is slow at first


class Question(NamedTuple):
    """What a gradient is asked of.

    Attributes:
        model: callable, or with a head a module that has embed(x) [B, D].
        loss: its name.
        labels: int64 [B].
        target: int64 [B] of a loss that aims at one class after another, else None.
        head: [D, C] if the backward pass begins at the embedding (`ops.clip_head_loss`), else None.
    """

    model: Callable
    loss: str
    labels: Tensor
    target: Tensor | None
    head: Tensor | None


class Answer(NamedTuple):
    """loss [B], logits [B, C], and the gradient of the summed loss, like x."""

    loss: Tensor
    logits: Tensor
    grad: Tensor


class Compiled:
    """engine="compile" during one attack.

    Attributes:
        model, embed: the model's passes, compiled, for what is no region: losses of the caller's own, maps in front of
            the model, gradients of single logits.
    """

    def __init__(self, model: Callable) -> None:
        self.model = _compiled(model)
        self.embed = _compiled(model.embed) if hasattr(model, "embed") else None
        self.regions = _regions_of(model)
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.convolves = sum(isinstance(m, nn.Conv2d) for m in modules) > 1  # not only to cut patches
        self.asked: dict[Any, int] = {}

    @property
    def classes(self) -> int | None:
        """Of the model's outputs, once it was asked by eager code, in this attack or before."""
        return self.regions.classes

    @classes.setter
    def classes(self, number: int) -> None:
        self.regions.classes = number

    def gradient(self, question: Question, x: Tensor) -> Answer | None:
        """None where the model cannot be compiled so."""
        region = self.regions.of(question, x.shape)
        if region is None:
            return None
        if self.convolves and x.dim() == 4 and not x.is_cuda:
            # The compiler keeps the layout of the images, and the CPU's convolutions are faster in this one.
            x = x.contiguous(memory_format=torch.channels_last)
        key = (question.loss, x.shape, x.dtype, x.stride(), torch.is_autocast_enabled(x.device.type))
        asked = self.asked.get(key, 0)
        # The first call may compile. One that would compile again tells of a model that changes as it runs.
        stance = (
            {} if asked == 0 else {"skip_guard_eval_unsafe": True} if asked > 1 else {"stance": "fail_on_recompile"}
        )
        try:
            with torch.no_grad(), torch.compiler.set_stance(**stance) if stance else _nothing:
                found = region(*question, x)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self.regions.forget(question, x.shape)
            return self.gradient(question, x)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.regions.refuse(question, error)
            return None
        except RuntimeError as error:
            if asked != 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            self.regions.refuse(question, error)
            return None
        self.asked[key] = asked + 1
        return Answer(*found)


_nothing = contextlib.nullcontext()


def _compiled(work: Callable, **how: Any) -> Callable:
    """torch.compile whose guards see hooks, too, which may come and go between two attacks."""
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)(torch.compile(work, dynamic=False, **how))


class _Regions:
    """Compiled functions of one model."""

    def __init__(self, own: bool) -> None:
        self.own, self.classes, self.known, self.refused = own, None, {}, set()

    def of(self, question: Question, shape: torch.Size) -> Callable | None:
        work, loss, _ = key = self._key(question, shape)
        if (work, loss) in self.refused:
            return None
        if key not in self.known:
            if self.own:  # code of its own: torch counts by code how often it has compiled, and gives up after eight
                work = types.FunctionType(work.__code__.replace(co_name=work.__name__), work.__globals__)
            self.known[key] = _compiled(work, fullgraph=True, options={"post_grad_custom_pre_pass": _fold()})
        return self.known[key]

    def forget(self, question: Question, shape: torch.Size) -> None:
        """The next one begins with code that was never compiled: a model may change more often than torch goes along
        with, as one does whose adapter's factor is swept."""
        self.own = True
        del self.known[self._key(question, shape)]

    def refuse(self, question: Question, error: Exception) -> None:
        self.refused.add(self._key(question)[:2])
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(
            f"engine='compile' compiles this model's forward pass alone, which is slower: {first}",
            AttackWarning,
            stacklevel=2,
        )

    @staticmethod
    def _key(question: Question, shape: torch.Size | None = None) -> tuple[Callable, str, torch.Size | None]:
        return _at_logits if question.head is None else _at_head, question.loss, shape


_of_modules: "weakref.WeakKeyDictionary[nn.Module, _Regions]" = weakref.WeakKeyDictionary()


def _regions_of(model: Callable) -> _Regions:
    """Modules keep theirs as long as they live; of other callables, which may be made anew for every batch, torch knows
    which are alike."""
    if not isinstance(model, nn.Module):
        return _Regions(own=False)
    return _of_modules.setdefault(model, _Regions(own=True))


@functools.cache
def _fold():
    """A pass over a region: products of a batch of matrices with one and the same matrix become one product.

    So torch does it to a trainable weight by itself. A frozen one, or one whose gradient nobody asks for, is multiplied
    with every token alone where its input is transposed, as in a batch-first nn.MultiheadAttention (pytorch/pytorch
    #161564).
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Fold(CustomGraphPass):
        def uuid(self):
            return get_hash_for_files((__file__,))

        def __call__(self, graph: torch.fx.Graph) -> None:
            aten = torch.ops.aten
            for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
                left, right = (argument.meta["val"] for argument in node.args)
                if right.stride(0) != 0:
                    continue
                rows, width = left.shape[0] * left.shape[1], right.shape[2]
                with graph.inserting_before(node):
                    flat = graph.call_function(aten.reshape.default, (node.args[0], [rows, left.shape[2]]))
                    one = graph.call_function(aten.select.int, (node.args[1], 0, 0))
                    product = graph.call_function(aten.mm.default, (flat, one))
                    whole = graph.call_function(aten.reshape.default, (product, [*left.shape[:2], width]))
                flat.meta["val"] = left.new_empty(rows, left.shape[2])
                one.meta["val"] = right[0]
                product.meta["val"] = left.new_empty(rows, width)
                whole.meta["val"] = left.new_empty(*left.shape[:2], width)
                node.replace_all_uses_with(whole)
                graph.erase_node(node)

    return Fold()


def _at_head(model: nn.Module, loss: str, labels: Tensor, target: Tensor | None, head: Tensor, x: Tensor):
    embedding, back = torch.func.vjp(model.embed, x)
    value, logits, slope = loss_at_head(loss, embedding, head, labels, target)
    return value, logits, back(slope)[0]


def _at_logits(model: Callable, loss: str, labels: Tensor, target: Tensor | None, head: None, x: Tensor):
    output, back = torch.func.vjp(lambda v: model(v), x)
    logits = wide(output)
    if loss == "ce":  # torch's, as in eager mode
        value, slope = ce(logits, labels), torch.softmax(logits, 1) - F.one_hot(labels, logits.shape[1])
    else:
        kind, label, other, sign = of_ops(loss, labels, target)
        value, _, slope = ops.attack_loss(logits, label, kind, other)
        value, slope = sign * value, sign * slope
    return value, logits, back(slope.to(output.dtype))[0]


def eager(question: Question, x: Tensor) -> Answer:
    """The same by autograd: what a CUDA graph captures."""
    model, loss, labels, target, head = question
    leaf = x.detach().requires_grad_()
    if head is not None:
        output = model.embed(leaf)
        value, logits, slope = loss_at_head(loss, output, head, labels, target)
    else:
        logits = wide(model(leaf))
        value = output = loss_at_logits(loss, logits, labels, target)
        slope = torch.ones_like(value)
    (grad,) = torch.autograd.grad(output, leaf, slope)
    return Answer(value.detach(), logits.detach(), grad)


class Replayed:
    """engine="cudagraph" during one attack: a graph per shape, whose inputs lie in memory of their own.

    capture: work -> (replay, what work returned, to be overwritten by every replay).
    """

    def __init__(self, capture: Callable[[Callable[[], Answer]], tuple[Callable[[], None], Answer]]) -> None:
        self.capture, self.graphs, self.classes = capture, {}, None

    def gradient(self, question: Question, x: Tensor) -> Answer:
        key = (question.loss, x.shape, x.dtype, x.stride(), torch.is_autocast_enabled(x.device.type))
        given = (x, question.labels, question.target, question.head)
        if key not in self.graphs:
            held = [None if t is None else t.clone() for t in given]
            asked = Question(question.model, question.loss, *held[1:])
            self.graphs[key] = (held, *self.capture(lambda: eager(asked, held[0])))
        held, replay, found = self.graphs[key]
        for mine, new in zip(held, given, strict=True):
            if mine is not None:
                mine.copy_(new)
        replay()
        return Answer(*(t.clone() for t in found))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all attacks: cuBLAS keeps a workspace of its own for every stream that it has seen."""
    return torch.cuda.Stream(device)


def cuda_graph(device: torch.device, work: Callable[[], Answer]) -> tuple[Callable[[], None], Answer]:
    """Runs work once, for what is set up at a first call, and captures it.

    Not by torch.cuda.graph, which empties the allocator's cache first: too slow for every attack.
    """
    side, caller = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(caller)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        work()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            found = work()
        finally:
            graph.capture_end()
    caller.wait_stream(side)
    return graph.replay, found


def engine_for(engine: str, model: Callable, x: Tensor) -> Compiled | Replayed | None:
    """What `engine` of an attack stands for; None is eager mode.

    Raises:
        ValueError: engine="cudagraph" for images that are not on a CUDA device.
    """
    if engine == "compile":
        return Compiled(model)
    if engine != "cudagraph":
        return None
    if not x.is_cuda:
        raise ValueError(f"engine='cudagraph' is for CUDA devices, x is on {x.device}: use 'compile' or 'eager' there")
    return Replayed(functools.partial(cuda_graph, x.device))
