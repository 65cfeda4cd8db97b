"""Back through a graph in Python, in the order of torch's engine: that one asks for streams of a card, and here is none.

What it does is that of torch/csrc/autograd/engine.cpp (`Engine::evaluate_function`, `validate_outputs`) and of
accumulate_grad.h; `tests/worker/test_training.py` holds it against the engine itself, on the processor.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

_ACCUMULATES = "AccumulateGrad"
_GRAPH = 1  # any id: a checkpoint recomputes once for each id of a backward pass


class Walk:
    """One walk back. `landed` is called with the gradient of every leaf that was set or added to."""

    def __init__(self, landed: Callable[[torch.Tensor], None] = lambda _: None) -> None:
        self._landed = landed
        self._grads: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)  # of the outputs of a node, until it is its turn
        self._awaited: dict[Any, int] = defaultdict(int)

    def run(self, roots: list[Any]) -> None:
        """Walk from the only node in a list, that of a scalar loss, and take it out: with it the graph is freed, node by node.

        Nobody else may hold it, nor the loss.
        """
        root, met = roots.pop(), 0
        self._count(root)
        (loss,) = root._input_metadata
        self._grads[root][0] = torch.ones(loss.shape, dtype=loss.dtype, device=loss.device)
        ready = [(_order(root), 0, root)]
        with mock.patch.object(torch._C, "_current_graph_task_id", return_value=_GRAPH), torch.no_grad():
            del root
            while ready:
                node = heapq.heappop(ready)[-1]
                for each in self._visit(node):
                    met += 1
                    heapq.heappush(ready, (_order(each), met, each))
                    del each
                del node

    def _count(self, root: Any) -> None:
        """Count for every node how many edges lead to it."""
        seen, left = {root}, [root]
        while left:
            for after, _ in left.pop().next_functions:
                if after is None:
                    continue
                self._awaited[after] += 1
                if after not in seen:
                    seen.add(after)
                    left.append(after)

    def _visit(self, node: Any) -> Iterator[Any]:
        """Run a node, hand its results on, and yield the nodes that now have all that they wait for."""
        given = self._grads.pop(node, {})
        if type(node).__name__ == _ACCUMULATES:
            self._accumulate(node.variable, given.pop(0, None))
            return
        edges = node.next_functions
        made = _run(node, given) if given else [None] * len(edges)
        given.clear()
        self._awaited.pop(node, None)
        del node
        for number, (after, index) in enumerate(edges):
            if after is None:
                continue
            grad, made[number] = made[number], None
            if grad is not None:
                self._add(after, index, _fitted(grad, after, index))
            del grad
            self._awaited[after] -= 1
            if not self._awaited[after]:
                yield after

    def _add(self, node: Any, index: int, grad: torch.Tensor) -> None:
        held = self._grads[node].pop(index, None)
        self._grads[node][index] = grad if held is None else held + grad

    def _accumulate(self, leaf: torch.Tensor, grad: torch.Tensor | None) -> None:
        """Set or add to the gradient of a leaf; what is laid out otherwise or lies in a larger storage is copied."""
        if grad is None:
            return
        if leaf.grad is not None:
            leaf.grad += grad
        elif grad.stride() == leaf.stride() and grad.untyped_storage().nbytes() == grad.numel() * grad.itemsize:
            leaf.grad = grad.detach()
        else:
            leaf.grad = torch.empty_like(leaf).copy_(grad)
        self._landed(leaf.grad)


def _order(node: Any) -> int:
    """Return what is smallest for the node that is run first: leaves, then what was made last."""
    return -(1 << 62) if type(node).__name__ == _ACCUMULATES else -int(node._sequence_nr())


def _run(node: Any, given: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a node's inputs, in the order of its edges."""
    grads = [given.get(index) for index in range(len(node._input_metadata))]
    given.clear()
    if not hasattr(node, "needs_input_grad"):
        return _listed(node(*grads))
    # A function in Python answers for every argument, and takes zeros where nothing came back.
    filled = [torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if grad is None else grad
              for grad, meta in zip(grads, node._input_metadata, strict=True)]  # fmt: skip
    answers = _listed(node.apply(*filled))
    needed = (answer for answer, needs in zip(answers, node.needs_input_grad, strict=False) if needs)
    return [next(needed, None) if after is not None else None for after, _ in node.next_functions]


def _listed(out: Any) -> list[torch.Tensor | None]:
    return list(out) if isinstance(out, Sequence) else [out]


def _fitted(grad: torch.Tensor, node: Any, index: int) -> torch.Tensor:
    """Sum what was broadcast, and cast, to what the node is said to take."""
    meta = node._input_metadata[index]
    if grad.shape != meta.shape:
        grad = grad.sum_to_size(meta.shape)
    return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)
