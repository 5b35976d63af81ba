"""Count the multiply-adds (MACs in the literature) of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Return how many multiply-adds the matrix products and convolutions of `function(*arguments)` take.

    Nothing is computed. As usual, zeros around an image count as pixels, and operations on single values (norms,
    activations, resizing) do not count. Counters of floating-point operations report twice this number.

    Args:
        arguments: arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
        ValueError: the function contains a while loop, whose length is unknown.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        match equation.primitive.name:
            case "dot_general":
                (summed, _), _ = equation.params["dimension_numbers"]
                total += outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
            case "conv_general_dilated":
                kernel = equation.invars[1].aval.shape
                layout = equation.params["dimension_numbers"].rhs_spec
                total += outputs * math.prod(kernel) // kernel[layout[0]]
            case "dot_product_attention_fwd_wrapper":  # cuDNN attention: queries by keys, weights by values
                (batch, tokens, heads, width), (_, keys, *_) = (v.aval.shape for v in equation.invars[:2])
                total += 2 * batch * heads * tokens * keys * width
            case "jit" if equation.params["name"] == "weighted_sums":  # the CPU's form of a matrix product (fusion.py)
                levels, blocks = equation.invars[0].aval.shape
                total += levels * blocks * outputs
            case "cond":
                total += max(map(_count, _inner_jaxprs(equation.params)))
            case "while":
                raise ValueError("multiply-adds of a while loop: its number of iterations is unknown")
            case _:
                total += equation.params.get("length", 1) * sum(map(_count, _inner_jaxprs(equation.params)))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
