"""What a captured step of the engine launches and moves, by operation, as arithmetic with the sizes of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ssd_kernels import CachePlan
from ssd_kernels.layout import LayerLayout
from ssd_kernels.triton.launch import step_bytes

LOGIT, NUMBER = 4, 8  # bytes of a logit, and of a token's or a row's number


@dataclass(frozen=True)
class Part:
    """A part of a step: a row of the table in docs/engine.md.

    Attributes:
        name: of the part. operations: names as the pretended machine logs them, and bytes that they read and write.
        launches, nbytes: their floors. Of the bytes it is what has to be read whatever is fused: every weight and every
            kept slot once.
        in_layer: there is one in every layer.
    """

    name: str
    operations: list[tuple[str, int]]
    launches: int = 0
    nbytes: int = 0
    in_layer: bool = False


@dataclass(frozen=True)
class Step:
    """A step of guided pictures, drawn by the launch that filters and draws, or greedily.

    Attributes:
        pictures: each of two rows. hidden, intermediate, layers: of the language model. heads, query_heads, head_dim:
            of its attention. codes: of the image. code_dim: of a code's embedding. size: bytes of a weight.
        plan, prompt, step: kept, prompt tokens of every row, and tokens drawn.
        table: there is a table of next inputs. greedy: tokens are the likeliest.
    """

    pictures: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    query_heads: int
    head_dim: int
    codes: int
    code_dim: int
    size: int
    plan: CachePlan = field(repr=False)
    prompt: int
    step: int
    num_visual_tokens: int
    table: bool
    greedy: bool = False

    @property
    def rows(self) -> int:
        return 2 * self.pictures

    def _product(self, inputs: int, outputs: int, bias: bool = False) -> tuple[int, int]:
        """Bytes of a product, and of its weights alone."""
        weights = (inputs * outputs + bias * outputs) * self.size
        return weights + self.rows * (inputs + outputs) * self.size, weights

    def _elementwise(self, width: int, tensors: int) -> int:
        return tensors * self.rows * width * self.size

    def _norm(self) -> int:
        """With the float32 factor of every row, which torch's kernel returns, too."""
        return self._elementwise(self.hidden, 2) + self.hidden * self.size + 4 * self.rows

    def attention(self) -> int:
        """Bytes of the attention of all rows, on average over the layers."""
        layouts = [LayerLayout.build(specs, self.plan, self.prompt, self.num_visual_tokens)
                   for specs in self.plan.layers]
        return self.rows * sum(step_bytes(layout, self.prompt, self.step, self.head_dim, self.size, self.query_heads,
                                          self.plan.kv_format == "int8") for layout in layouts) // self.layers

    def parts(self) -> Iterator[Part]:
        """Of a step, those of a layer first."""
        hidden, heads = self.hidden, self.query_heads * self.head_dim
        products = [self._product(*sides) for sides in (
            (hidden, heads + 2 * self.heads * self.head_dim), (heads, hidden), (hidden, 2 * self.intermediate),
            (self.intermediate, hidden))]
        attention = self.attention()
        yield Part("layer: norms", 2 * [("_fused_rms_norm", self._norm())], 2, 2 * hidden * self.size, True)
        yield Part("layer: products", [("mm", moved) for moved, _ in products], 4,
                   sum(weights for _, weights in products), True)
        yield Part("layer: rotation, append, attention, scores, eviction", [("decode_kernel (triton)", attention)], 1,
                   attention, True)
        activation, times = (self._elementwise(self.intermediate, tensors) for tensors in (2, 3))
        yield Part("layer: gate's activation, times up", [("silu", activation), ("mul", times)], 1, 0, True)
        yield Part("layer: sums with what came in", 2 * [("add", self._elementwise(hidden, 3))], 0, 0, True)
        first, last = self._product(hidden, hidden, True), self._product(hidden, self.codes, True)
        yield Part("last norm, head, its activation",
                   [("_fused_rms_norm", self._norm()), ("addmm", first[0]), ("gelu", self._elementwise(hidden, 2)),
                    ("addmm", last[0])], 3, hidden * self.size + first[1] + last[1])
        logits = self.rows * self.codes
        if self.size != LOGIT:
            yield Part("logits to float32", [("_to_copy", logits * (self.size + LOGIT))])
        yield Part("tokens", list(self._choice(self.pictures * self.codes * LOGIT)), 1)
        yield self._next_input()

    def _choice(self, guided: int) -> Iterator[tuple[str, int]]:
        """``guided``: bytes of the logits of all pictures."""
        pictures = self.pictures
        if self.greedy:
            yield from (("sub", 3 * guided), ("mul", 2 * guided + LOGIT * pictures), ("add", 3 * guided),
                        ("argmax", guided + NUMBER * pictures))
        else:  # logits of all rows; tokens, seeds, scales, the step
            yield "sample_kernel (triton)", 2 * guided + (2 * NUMBER + LOGIT) * pictures + NUMBER

    def _next_input(self) -> Part:
        rows, pictures, numbers = self.rows, self.pictures, NUMBER * self.rows
        operations = [("index_copy_", 2 * NUMBER * pictures + NUMBER), ("add_", 2 * NUMBER),
                      ("index_select", 3 * numbers), ("copy_", self._elementwise(self.hidden, 2))]
        if self.table:
            return Part("next input and where the tokens go",
                        [*operations, ("index_select", numbers + self._elementwise(self.hidden, 2))], 1,
                        pictures * self.hidden * self.size)
        first, last = self._product(self.code_dim, self.hidden, True), self._product(self.hidden, self.hidden, True)
        return Part("next input and where the tokens go",
                    [*operations, ("embedding", numbers + 2 * rows * self.code_dim * self.size), ("addmm", first[0]),
                     ("gelu", self._elementwise(self.hidden, 2)), ("addmm", last[0])], 2,
                    first[1] + last[1] + pictures * self.code_dim * self.size)


def lines(step: Step) -> list[str]:
    """The rows of a table in Markdown: launches and megabytes, and the floors of both."""

    def line(name: str, mark: str, *numbers: int) -> str:
        launches, floor, moved, least = numbers
        cells = (name, str(launches), str(floor), f"{moved / 1e6:.2f}", f"{least / 1e6:.2f}")
        return f"| {' | '.join(f'{mark}{cell}{mark}' for cell in cells)} |"

    def sums(parts: list[Part]) -> list[int]:
        return [sum(len(part.operations) for part in parts), sum(part.launches for part in parts),
                sum(moved for part in parts for _, moved in part.operations), sum(part.nbytes for part in parts)]

    parts = list(step.parts())
    inside, outside = ([part for part in parts if part.in_layer is wanted] for wanted in (True, False))
    layer, rest = sums(inside), sums(outside)
    whole = [step.layers * one + other for one, other in zip(layer, rest, strict=True)]
    return [*(line(part.name, "", *sums([part])) for part in inside), line("a layer", "**", *layer),
            *(line(part.name, "", *sums([part])) for part in outside), line("a step", "**", *whole)]
