"""How many multiplications, each with its addition, a network takes: what the literature calls MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Of the matrix products and convolutions of `function(*arguments)`; nothing is computed.

    As usual, zeros around an image are counted as pixels, and what is done to single values (norms, activations,
    resizing) is not counted. Half of what counters of floating-point operations print.

    Args:
        arguments: arrays, or their shapes (`jax.ShapeDtypeStruct`).
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        match equation.primitive.name:
            case "dot_general":
                (summed, _), _ = equation.params["dimension_numbers"]
                total += outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
            case "conv_general_dilated":
                kernel, layout = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
                total += outputs * math.prod(kernel) // kernel[layout[0]]
            case "dot_product_attention_fwd_wrapper":  # cuDNN's, on a GPU: queries with keys, weights with values
                (batch, tokens, heads, width), (_, keys, *_) = (v.aval.shape for v in equation.invars[:2])
                total += 2 * batch * heads * tokens * keys * width
            case "cond":  # one of the branches is taken; those for several platforms count alike, or a sum as a product
                total += max(map(_of, _inner(equation.params)))
            case "while":
                raise ValueError("how often a while loop runs is not known before it runs")
            case _:
                total += equation.params.get("length", 1) * sum(map(_of, _inner(equation.params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
