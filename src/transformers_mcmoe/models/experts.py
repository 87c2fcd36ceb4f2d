# SPDX-License-Identifier: Apache-2.0
"""Finds the experts of any transformers model and reads, runs and replaces them through one interface.

Shapes come from tensors and flags from instances, never from configs. It knows one experts module at a time; it does
not know checkpoints, calibration or widths.

E experts, H hidden size, I intermediate size, T tokens, K experts per token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers.quantizers_utils import should_convert_module

# called with (expert, its tokens [n, H], their routing weights [n] or None where the block applies them outside)
Record = Callable[[int, Tensor, Tensor | None], None]
# rows of a half-precision matrix product on CPU, see `Experts.in_blocks`
BLOCK = 128
FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class Projection:
    """One matrix that every expert of a module has; `role` is "gate_up" (reads the hidden state) or "down"."""

    name: str
    role: str
    out_features: int
    in_features: int


class Experts:
    """What the pipeline needs of an experts module; the subclasses know where its matrices lie.

    Attributes:
        path: module path in the model.
        module: the module itself.
        num_experts: E.
        projections: the matrices of one expert, inputs first.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module: Any = module  # its attributes are the model's own
        self.num_experts = 0
        self.projections: tuple[Projection, ...] = ()

    def matrix(self, expert: int, projection: str) -> Tensor:
        """View [out, in] of an expert's matrix; writing to it writes to the module."""
        raise NotImplementedError

    def bias(self, expert: int, projection: str) -> Tensor | None:
        """View [out] of the bias that belongs to a matrix."""
        raise NotImplementedError

    def run(self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output [n, H] of one expert for tokens [n, H], with its own or the given matrices [out, in]."""
        raise NotImplementedError

    def inputs(self, expert: int, x: Tensor) -> dict[str, Tensor]:
        """What the matrices of each role read for tokens `x` [n, H]: "gate_up" -> [n, H], "down" -> [n, I]."""
        raise NotImplementedError

    def tensor(self, expert: int, leaf: str) -> str:
        """Module path of an expert's packed matrix."""
        return f"{self.path}.{expert}.{leaf}"

    def drop(self, expert: int) -> None:
        """Make an expert return zeros (for the pass that propagates a plan that drops it)."""
        last = self.projections[-1].name
        self.matrix(expert, last).zero_()
        if (bias := self.bias(expert, last)) is not None:
            bias.zero_()

    @contextmanager
    def observe(self, record: Record) -> Iterator[None]:
        """While open, every call of the module hands each routed expert's tokens to `record`."""
        raise NotImplementedError
        yield

    @contextmanager
    def idle(self, value: float = 0.0) -> Iterator[None]:
        """While open, experts are not run: each returns `value` in all places."""
        raise NotImplementedError
        yield

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        """While open, the module runs its experts on padded blocks of BLOCK tokens, with the same results but rounding.

        On CPU, torch multiplies half-precision matrices with oneDNN, which keeps a buffer of the weights' size for
        every number of rows it meets, up to 1024 of them; with one number there is one.
        """
        raise NotImplementedError
        yield


class FusedExperts(Experts):
    """Modules called as `experts(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])` with stacked weights.

    Covers every class decorated with transformers' `use_experts_implementation`, whose five flags it reads.
    """

    identity_experts = 0  # ids from E on that return their input (Longcat); all others from E on are skipped

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        for flag, default in zip(FLAGS, (True, False, False, False, True), strict=True):
            setattr(self, flag, bool(getattr(module, flag, default)))
        self._read_shapes()

    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool

    def _read_shapes(self) -> None:
        down = self._stack("down_proj")
        self.num_experts = down.shape[0]
        hidden, inner = (down.shape[2], down.shape[1]) if self.is_transposed else (down.shape[1], down.shape[2])
        inputs = ("gate_proj", "up_proj") if self.has_gate else ("up_proj",)
        self.projections = (
            *(Projection(name, "gate_up", inner, hidden) for name in inputs),
            Projection("down_proj", "down", hidden, inner),
        )

    def _stack(self, name: str) -> Tensor:
        return getattr(self.module, name).data

    def parameter_names(self) -> tuple[str, ...]:
        """Names, relative to the module, of every parameter that packed matrices replace; the guard's name first."""
        names = ["gate_up_proj" if self.has_gate else "up_proj", "down_proj"]
        return tuple(names + [f"{name}_bias" for name in names if self.has_bias])

    def _rows(self, projection: str) -> slice:
        """Rows of gate or up in the stacked gate_up matrix."""
        inner = self.projections[-1].in_features
        if self.is_concatenated:
            return slice(0, inner) if projection == "gate_proj" else slice(inner, 2 * inner)
        return slice(0, None, 2) if projection == "gate_proj" else slice(1, None, 2)

    def matrix(self, expert: int, projection: str) -> Tensor:
        fused = self.has_gate and projection != "down_proj"
        stack = self._stack("gate_up_proj" if fused else projection)[expert]
        stack = stack.T if self.is_transposed else stack
        return stack[self._rows(projection)] if fused else stack

    def bias(self, expert: int, projection: str) -> Tensor | None:
        if not self.has_bias:
            return None
        fused = self.has_gate and projection != "down_proj"
        stack = self._stack(f"{'gate_up_proj' if fused else projection}_bias")[expert]
        return stack[self._rows(projection)] if fused else stack

    def run(self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.combine(x, partial(self._linear, expert, matrices))

    def inputs(self, expert: int, x: Tensor) -> dict[str, Tensor]:
        return {"gate_up": x, "down": self.inner(x, partial(self._linear, expert, None))}

    def _linear(self, expert: int, matrices: Mapping[str, Tensor] | None, x: Tensor, projection: str) -> Tensor:
        weight = matrices[projection] if matrices is not None else self.matrix(expert, projection).to(x.dtype)
        bias = self.bias(expert, projection)
        return functional.linear(x, weight, bias.to(x.dtype) if bias is not None else None)

    def combine(self, x: Tensor, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
        """One expert's output [n, H], given how to apply its projections by name."""
        output = linear(self.inner(x, linear), "down_proj")
        return self.module.post_expert_norm(output) if self.has_post_expert_norm else output

    def inner(self, x: Tensor, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
        """What one expert's down projection reads, [n, I]."""
        if not self.has_gate:
            return self.module.act_fn(linear(x, "up_proj"))
        gate, up = linear(x, "gate_proj"), linear(x, "up_proj")
        if self.is_concatenated:
            return self._apply_gate(torch.cat((gate, up), dim=-1))
        return self._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    def route(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The module's call as tokens [T, H], expert ids [T, K] and routing weights [T, K]."""
        hidden_states, top_k_index, top_k_weights = args
        return hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index, top_k_weights

    def finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Gives the combined output [T, H] the shape that the original module returns."""
        return output

    @contextmanager
    def observe(self, record: Record) -> Iterator[None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, index, weights = self.route(*args)
            for expert in index.unique().tolist():
                if expert < self.num_experts:
                    token, slot = torch.where(index == expert)
                    record(expert, x[token], weights[token, slot])

        handle = self.module.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        def forward(hidden_states: Tensor, *args: Tensor) -> Tensor:
            return self.dispatch(
                hidden_states, *args, run=lambda expert, x: _in_blocks(lambda block: self.run(expert, block), x)
            )

        with _forward(self.module, forward):
            yield

    @contextmanager
    def idle(self, value: float = 0.0) -> Iterator[None]:
        def forward(hidden_states: Tensor, *args: Tensor) -> Tensor:
            x = self.route(hidden_states, *args)[0]
            return self.finish(torch.full_like(x, value), hidden_states)

        with _forward(self.module, forward):
            yield

    def dispatch(self, hidden_states: Tensor, *args: Tensor, run: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        """The module's output for its arguments, given how to run one expert on its tokens [n, H].

        Sums are taken in float32 and rounded to the dtype of `hidden_states`. Slots whose id is no expert's, and
        experts for which `run` gives None, add nothing.
        """
        x, index, weights = self.route(hidden_states, *args)
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            if expert < self.num_experts:
                y = run(expert, x[token])
            else:
                y = x[token] if expert < self.num_experts + self.identity_experts else None
            if y is not None:
                output = output.index_add(0, token, (y * weights[token, slot, None]).to(torch.float32))
        return self.finish(output.to(hidden_states.dtype), hidden_states)


class LongcatExperts(FusedExperts):
    """LongcatFlash: ids from E on are experts that return their input."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        self.identity_experts = int(self.module.zero_expert_num)


class DbrxExperts(FusedExperts):
    """DBRX: three flat matrices [E * I, H] in a child module; the down projection is stored transposed."""

    _NAMES = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}  # noqa: RUF012

    def _read_shapes(self) -> None:
        glu = self.module.mlp
        self.num_experts = int(glu.moe_num_experts)
        hidden, inner = glu.w1.shape[1], glu.w1.shape[0] // self.num_experts
        self.projections = (
            Projection("gate_proj", "gate_up", inner, hidden),
            Projection("up_proj", "gate_up", inner, hidden),
            Projection("down_proj", "down", hidden, inner),
        )

    def parameter_names(self) -> tuple[str, ...]:
        return ("mlp.w1", "mlp.v1", "mlp.w2")

    def matrix(self, expert: int, projection: str) -> Tensor:
        flat = getattr(self.module.mlp, self._NAMES[projection]).data
        matrix = flat.unflatten(0, (self.num_experts, -1))[expert]
        return matrix.T if projection == "down_proj" else matrix

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.module.mlp.activation_fn(gate) * up

    def finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        return output.view(hidden_states.shape[0], -1, output.shape[-1])


class Llama4Experts(FusedExperts):
    """Llama 4: the block hands over [E * T, H], every token once per expert, zero where it is not routed there."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        self.is_transposed = True
        self._read_shapes()

    def route(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (hidden_states,) = args
        rows = hidden_states.shape[0]
        expert = torch.arange(self.num_experts, device=hidden_states.device)
        index = expert.repeat_interleave(rows // self.num_experts).unsqueeze(1)
        # a row of zeros gives zeros (no biases), so it may be skipped: id E
        index = torch.where((hidden_states != 0).any(-1, keepdim=True), index, self.num_experts)
        return hidden_states, index, hidden_states.new_ones(rows, 1)


class ListExperts(Experts):
    """A ModuleList or ModuleDict with one dense MLP per expert (NLLB, remote code): its linears are packed in place."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        named = _expert_children(module)
        self.keys, self.children = list(named), list(named.values())
        self.num_experts = len(self.children)
        # without the hooks and forwards that the children get while the model runs; parameters are shared
        self._bare: list[Any] = [
            copy.deepcopy(child, {id(parameter): parameter for parameter in child.parameters()})
            for child in self.children
        ]
        linears = {name: m for name, m in self.children[0].named_modules() if isinstance(m, nn.Linear)}
        hidden = next(iter(linears.values())).in_features
        roles = {name: "gate_up" if m.in_features == hidden else "down" for name, m in linears.items()}
        if "down" not in roles.values():  # square: the registered order decides, except for the usual w1, w2, w3
            roles["w2" if "w2" in roles and "w3" in roles else list(roles)[-1]] = "down"
        self.projections = tuple(
            Projection(name, roles[name], linears[name].out_features, linears[name].in_features)
            for name in sorted(linears, key=lambda name: roles[name] == "down")
        )

    def tensor(self, expert: int, leaf: str) -> str:
        return f"{self.path}.{self.keys[expert]}.{leaf}"

    def linear(self, expert: int, projection: str) -> nn.Linear:
        """The linear layer of an expert."""
        linear: Any = self.children[expert].get_submodule(projection)
        return linear

    def matrix(self, expert: int, projection: str) -> Tensor:
        return self.linear(expert, projection).weight.data

    def bias(self, expert: int, projection: str) -> Tensor | None:
        bias = self.linear(expert, projection).bias
        return bias.data if bias is not None else None

    def run(self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> Tensor:
        child = self.children[expert]
        state = {name: parameter.to(x.dtype) for name, parameter in child.named_parameters()}
        state |= dict(child.named_buffers())
        state |= {f"{name}.weight": matrix for name, matrix in (matrices or {}).items()}
        return torch.func.functional_call(self._bare[expert], state, (x,))

    def inputs(self, expert: int, x: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def hook(role: str) -> Any:
            def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen.setdefault(role, args[0])

            return keep

        bare = self._bare[expert]
        handles = [bare.get_submodule(p.name).register_forward_pre_hook(hook(p.role)) for p in self.projections]
        try:
            self.run(expert, x)
        finally:
            for handle in handles:
                handle.remove()
        return {role: value.reshape(-1, value.shape[-1]) for role, value in seen.items()}

    @contextmanager
    def observe(self, record: Record) -> Iterator[None]:
        def hook(expert: int) -> Any:
            return lambda module, args: record(expert, args[0].reshape(-1, args[0].shape[-1]), None)

        handles = [child.register_forward_pre_hook(hook(e)) for e, child in enumerate(self.children)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(_forward(child, partial(_in_blocks, child.forward)))
            yield

    @contextmanager
    def idle(self, value: float = 0.0) -> Iterator[None]:
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(_forward(child, lambda x: torch.full_like(x, value)))
            yield


@contextmanager
def _forward(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a module runs another forward; whatever it ran before comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _in_blocks(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run` on blocks of BLOCK rows of `x` [n, H], the last one padded with zeros."""
    rows = x.shape[0]
    if rows == 0 or x.dim() != 2:
        return run(x)
    padded = functional.pad(x, (0, 0, 0, -rows % BLOCK))
    return torch.cat([run(block) for block in padded.split(BLOCK)])[:rows]


def _is_fused(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    # older releases set fewer of the flags; those two have always been there
    flagged = hasattr(module, "is_transposed") and hasattr(module, "has_bias")
    return flagged and isinstance(down, nn.Parameter) and down.dim() == 3


def _is_expert_list(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or "expert" not in name or "shared" in name:
        return False
    children = list(_expert_children(module).values())
    shapes = [[tuple(m.weight.shape) for m in c.modules() if isinstance(m, nn.Linear)] for c in children]
    return len(children) > 1 and len(shapes[0]) > 1 and all(shape == shapes[0] for shape in shapes)


def _expert_children(module: nn.Module) -> dict[str, nn.Module]:
    """The children that hold linear layers; a container may have others, such as a dropout."""
    named = module.named_children()
    return {name: c for name, c in named if any(isinstance(m, nn.Linear) for m in c.modules())}


# Classes that the five flags do not describe. A string says why a class cannot be packed.
EXCEPTIONS: dict[str, type[Experts] | str] = {
    "Step3p7Experts": FusedExperts,
    "LongcatFlashExperts": LongcatExperts,
    "DbrxExperts": DbrxExperts,
    "Llama4TextExperts": Llama4Experts,
    "JetMoeParallelExperts": "its experts are routed in the attention as well",
    "DogeCDMoE": "its experts are rows of an embedding",
    "VitPoseNaiveMoe": "its experts are not gated by a router per token",
    "SwitchTransformersExperts": "its experts cast their input to the dtype of their weights",
}


def find_experts(model: nn.Module, modules_to_not_convert: Sequence[str] = ()) -> dict[str, Experts]:
    """All experts of a model, by module path.

    Raises:
        ValueError: the model has no experts, or all of them are excluded.
        NotImplementedError: the model has experts that cannot be packed; the message names their class and path.
    """
    found: dict[str, Experts] = {}
    excluded = False
    for path, module in model.named_modules():
        kind = EXCEPTIONS.get(type(module).__name__)
        if kind is None:
            if _is_fused(module):
                kind = FusedExperts
            elif _is_expert_list(path, module):
                kind = ListExperts
            elif not _looks_unsupported(path, module, found):
                continue
            else:
                kind = "its layout is not known"
        if isinstance(kind, str):
            raise NotImplementedError(
                f"The experts of class {type(module).__name__} at '{path}' cannot be packed ({kind}); "
                "this model is not supported."
            )
        if should_convert_module(path, list(modules_to_not_convert)):
            found[path] = kind(path, module)
        else:
            excluded = True
    if not found:
        reason = "modules_to_not_convert excludes all of its experts" if excluded else "it has no MoE experts"
        raise ValueError(
            f"{type(model).__name__} cannot be compressed: {reason}; transformers_mcmoe is for Mixture-of-Experts models."
        )
    return found


def _looks_unsupported(path: str, module: nn.Module, found: Mapping[str, Experts]) -> bool:
    """Whether a module is a set of routed experts that no adapter covers: never skip one in silence."""
    name = path.rpartition(".")[2]
    named = re.search(r"Experts?$", type(module).__name__) is not None or name == "experts"
    if not named or "shared" in path.lower() or "Shared" in type(module).__name__:
        return False
    inside = any(path == other or path.startswith(other + ".") for other in found)
    return not inside and any(parameter.dim() >= 2 for parameter in module.parameters())


def find_linears(
    model: nn.Module,
    experts: Mapping[str, Experts],
    attention_bits: int,
    shared_expert_bits: int,
    modules_to_not_convert: Sequence[str] = (),
) -> dict[str, int]:
    """Width of every linear layer that is quantized beside the experts, by module path.

    Attention projections (MLA's too) take `attention_bits`, shared experts and dense MLPs `shared_expert_bits`, both
    only in the decoder layers that belong to the experts' stack; 16 leaves them. Routers, gates of shared experts,
    convolution, Mamba and linear-attention projections stay as they are.
    """
    stacks = {layer_of(path)[0] + "." for path in experts}
    widths: dict[str, int] = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or not path.startswith(tuple(stacks)):
            continue
        if any(path.startswith(other + ".") for other in experts):
            continue
        parent_path = path.rpartition(".")[0]
        parent = model.get_submodule(parent_path)
        if _is_attention(parent):
            bits = attention_bits
        elif _is_mlp(parent) and not any(other.startswith(parent_path + ".") for other in experts):
            bits = shared_expert_bits
        else:
            continue
        if bits != 16 and should_convert_module(path, list(modules_to_not_convert)):
            widths[path] = bits
    return widths


def layer_of(path: str) -> tuple[str, int]:
    """The ModuleList and the index of the decoder layer a module lies in: "model.layers.3.mlp" -> ("model.layers", 3).

    Raises:
        NotImplementedError: the path has no layer number.
    """
    match = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
    if match is None:
        raise NotImplementedError(f"'{path}' lies in no numbered decoder layer; this model is not supported.")
    return match.group(1), int(match.group(2))


def _is_attention(module: nn.Module) -> bool:
    """Softmax attention: it has a scale for its logits, which linear attention and state-space layers lack."""
    name = type(module).__name__
    if not hasattr(module, "scaling") or re.search(r"Linear|Lightning|Delta|Mamba|Indexer", name):
        return False
    return hasattr(module, "num_key_value_groups") or "Attention" in name


def _is_mlp(module: nn.Module) -> bool:
    return re.search(r"(MLP|FeedForward|DenseActDense)$", type(module).__name__) is not None
