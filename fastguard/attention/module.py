"""`nn.MultiheadAttention` with a clamp before the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention.bias import CausalBias
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastguard._compiling import is_exporting

from .functional import (
    AttentionStats,
    attended,
    check_options,
    clamped_attention_and_weights,
    plain_mask,
)
from .masks import extended, seen
from .scripted import ScriptedAttention

#: Where torch.ao.quantization has the layers that take quantized tensors alone.
_STATICALLY_QUANTIZED = "torch.ao.nn.quantized.modules.linear"


class ClampedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads are clamped before the output projection.

    Vaswani et al. 2017 (arXiv 1706.03762), with `clamped_attention` in the middle. It is torch's
    class with another `forward`: parameters, state dict and initialisation are torch's, and with
    ``clamp=None`` so are the results, save that a row without a key attends to nothing (torch gives
    NaN where it returns weights) and that NaN in a padded key or value reaches no output. (It does
    reach the gradient of the weight that projects it, which multiplies it by zero, as in torch.)

    `forward` is always called. Torch's inference fast path reads a module's weights and does not
    call `forward`; it is switched off for this class and for an `nn.TransformerEncoderLayer` that
    holds one. torch.fx treats it as one module, as it does torch's. `torch.jit.script` compiles a
    twin in plain torch.

    Args:
        embed_dim: C, width of query and output.
        num_heads: H, must divide `embed_dim`. Heads wider than 256 channels are computed in plain
            torch.
        dropout: probability, in [0, 1), of dropping an attention weight in training.
        bias: whether the four projections have a bias.
        add_bias_kv: append a learnt key and value to the sequence of keys.
        add_zero_attn: append a key and a value of zeros.
        kdim, vdim: width of key and value; None means C.
        batch_first: (N, T, C) instead of (T, N, C).
        clamp: bound on the attention output, > 0; None leaves it free.
        softcap: bound on the logits, see `clamped_attention`; None leaves them free.
        record_stats: keep the `AttentionStats` of the last forward in `stats`; a `GradGuard` of the
            model writes them to its reports on bad steps. May be set later. A forward that returns
            weights has none, nor one inside `torch.vmap`.

    Raises:
        AssertionError: as torch, for an `embed_dim` that is not a multiple of `num_heads`.
        ValueError: a size below 1, or an option out of its range.
    """

    #: Of the last forward, None if it recorded none.
    stats: AttentionStats | None = None
    record_stats: bool = False

    #: Whether `replace_attention_` made it what it is, and it has not run since.
    never_ran: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        clamp: float | None = 10.0,
        softcap: float | None = None,
        record_stats: bool = False,
    ):
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            error = ValueError if min(embed_dim, num_heads) < 1 else AssertionError  # as torch's
            raise error(
                f"num_heads must divide embed_dim, got embed_dim={embed_dim}, "
                f"num_heads={num_heads}: change one of the two"
            )
        check_options(dropout, softcap, clamp)
        added = (add_bias_kv, add_zero_attn)
        super().__init__(
            embed_dim, num_heads, dropout, bias, *added, kdim, vdim, batch_first, device, dtype
        )
        self.clamp = clamp
        self.softcap = softcap
        self.record_stats = record_stats
        self.keep_fast_path_off()

    def keep_fast_path_off(self) -> None:
        """Have torch's layers call this module, whose weights alone their fast path would read.

        It is for modules without hooks only.
        """
        if _nothing not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_nothing)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # One of an older fastguard kept the fast path off by another value of this.
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        self.keep_fast_path_off()

    def __prepare_scriptable__(self) -> ScriptedAttention:
        """What `torch.jit.script` compiles in its place."""
        return ScriptedAttention(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (T, N, C), with `batch_first` (N, T, C), unbatched (T, C); dtype of the
                parameters, or any under autocast.
            key, value: likewise, S for T, and of `kdim` and `vdim` channels.
            key_padding_mask: (N, S), unbatched (S,). Bool, True where the key is padding, or
                floating point, added to the logits; -inf is padding.
            need_weights: also return the weights. They are T x S numbers for each head, by
                definition, and computed in plain torch: pass False where they are not wanted.
            attn_mask: (T, S) or (N * H, T, S), unbatched (H, T, S). Bool, True where the key is
                hidden (the opposite of `clamped_attention`'s), or floating point, added; or torch's
                `CausalBias` of (T, S). One that requires a gradient gets it, in plain torch.
            average_attn_weights: return the mean of the heads' weights.
            is_causal: row i sees keys 0 to i, and those appended. `attn_mask` may be None then
                (torch insists); one that is given is taken to say the same, and not read.

        Returns:
            The output, shaped as `query`, and the weights or None. Weights are those that the
            values were multiplied by, after dropout as in torch and zero in a row without a key:
            (N, T, S), with ``average_attn_weights=False`` (N, H, T, S), unbatched without N. S
            counts the keys appended.

        A nested tensor, as `nn.TransformerEncoder` makes it for its fast path, is padded. Its
        output is nested again; its weights are padded with zeros, as torch's.

        Raises:
            AssertionError: as torch, for query, key, value or key_padding_mask of shapes that do
                not fit, nested tensors that are not one for all three, and masks that are neither
                bool nor floating point.
            RuntimeError: as torch, for attn_mask of sizes that do not fit (of dimensions that do
                not, it is an AssertionError); for dtypes that differ from the weights'.
                (`in_proj_bias` may be of another dtype.)
            TypeError, ValueError: masks that are no dense tensors, float8 and the like; see
                `clamped_attention`. Quantized inputs.
            NotImplementedError: opacus asks for per-sample gradients.
        """
        exporting = is_exporting()
        # Compiled code is guarded by what it reads, and compiled again when that changes.
        compiled = torch.compiler.is_compiling() and not exporting
        if compiled or (self.never_ran and not exporting):
            self.never_ran = False
        if any(isinstance(x, fx.Proxy) for x in (query, key, value)):
            inputs = (query, key, value, key_padding_mask, need_weights, attn_mask)
            return self._called(*inputs, average_attn_weights, is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            # One of no sequences does not say how wide they would be.
            if query is not key or key is not value or masked or query.dim() != 3:
                raise AssertionError(
                    "ClampedMultiheadAttention takes a nested tensor that is query, key and value "
                    "in one, of at least one sequence and without masks: pad, and pass "
                    "key_padding_mask"
                )
            return self._of_nested(query, need_weights, average_attn_weights, is_causal)
        self._refuse_frameworks(query)
        self._check_inputs(query, key, value)
        batched = query.dim() == 3
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        sizes = (q.size(0), q.size(2), k.size(2))
        options = self._masks(key_padding_mask, attn_mask, is_causal, sizes, batched, q)
        options["dropout_p"] = self.dropout if self.training else 0.0
        options.update(softcap=self.softcap, clamp=self.clamp)
        k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        if compiled or self.stats is not None:
            self.stats = None  # of another batch
        if not need_weights:
            # What torch.vmap has made of the inputs means nothing outside of it.
            record = self.record_stats and not any(map(_is_batched, (q, k, v)))
            options.update(return_stats=record, in_place=not _is_plain(self.out_proj))
            output, stats = attended(q, k, v, scale=None, **options)
            if record:
                self.stats = stats
            return self._join_heads(output, batched), None
        output, weights = clamped_attention_and_weights(q, k, v, **options)
        if average_attn_weights:
            weights = weights.mean(1)
        return self._join_heads(output, batched), weights if batched else weights.squeeze(0)

    def _called(self, *args) -> fx.Proxy:
        """A call of this module in the graph that torch.fx traces, as of one of torch.nn's."""
        tracer = next(x for x in args if isinstance(x, fx.Proxy)).tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})

    def _of_nested(
        self, x: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` of a nested tensor. The weights are padded with zeros, as torch's."""
        lengths = [len(each) for each in x.unbind()]
        padded = nn.utils.rnn.pad_sequence(list(x.unbind()), batch_first=True)
        hidden = torch.arange(padded.size(1)) >= torch.tensor(lengths)[:, None]
        hidden = hidden.to(padded.device)
        by_rows = padded if self.batch_first else padded.transpose(0, 1)
        output, weights = ClampedMultiheadAttention.forward(
            self, *[by_rows] * 3, hidden, need_weights, None, average_attn_weights, is_causal
        )
        output = output if self.batch_first else output.transpose(0, 1)
        rows = [each[:length] for each, length in zip(output, lengths, strict=True)]
        if weights is not None:
            of_padding = hidden[:, :, None] if average_attn_weights else hidden[:, None, :, None]
            weights = weights.masked_fill(of_padding, 0.0)
        return torch.nested.as_nested_tensor(rows, layout=x.layout), weights

    def _refuse_frameworks(self, query: Tensor) -> None:
        """Raise for what other packages would do wrong with this module, or cannot do."""
        if query.is_quantized or type(self.out_proj).__module__ == _STATICALLY_QUANTIZED:
            raise TypeError(
                f"ClampedMultiheadAttention is not quantized, got {query.dtype} and an out_proj of "
                f"{type(self.out_proj).__module__}: set its qconfig to None before prepare(), and "
                "put a DeQuantStub before it and a QuantStub after it"
            )
        if "ft_compute_sample_grad" in self.__dict__:  # of opacus' GradSampleModule
            raise NotImplementedError(
                "opacus has no per-sample gradients of ClampedMultiheadAttention: freeze its "
                "parameters before GradSampleModule, or use opacus.layers.DPMultiheadAttention, "
                "which has no clamp"
            )

    def _check_inputs(self, *inputs: Tensor) -> None:
        query, key, value = shapes = [tuple(x.shape) for x in inputs]
        batch_dim = 0 if self.batch_first else 1
        widths = (self.embed_dim, self.kdim, self.vdim)
        if (
            len(query) not in (2, 3)
            or not len(query) == len(key) == len(value)
            or tuple(shape[-1] for shape in shapes) != widths
            or key[:-1] != value[:-1]
            or (len(query) == 3 and query[batch_dim] != key[batch_dim])
        ):
            layout = "(N, {0}, {1})" if self.batch_first else "({0}, N, {1})"
            wanted = ", ".join(map(layout.format, "TSS", widths))
            raise AssertionError(
                f"query, key and value must be {wanted}, or unbatched without N, with "
                f"batch_first={self.batch_first}; got {', '.join(map(str, shapes))}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of all heads, in as few GEMMs as may be; shaped as the inputs."""
        width, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        dtype = (self.q_proj_weight if weight is None else weight).dtype
        if bias is not None and bias.dtype != dtype:  # torch takes one in some layouts
            bias = bias.to(dtype)
        if weight is not None and key is value:
            if query is key:
                return F.linear(query, weight, bias).chunk(3, dim=-1)
            weights = weight.split([width, 2 * width])
            biases = (None, None) if bias is None else bias.split([width, 2 * width])
            projected, both = map(F.linear, (query, key), weights, biases)
            return projected, *both.chunk(2, dim=-1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if weight is not None:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(N, T, C), (T, N, C) or (T, C) -> (N, H, T, D), a view."""
        # Not unflatten: the old ONNX exporter gives what follows it the lengths of its example.
        x = x.reshape(*map(x.size, range(x.dim() - 1)), self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, H, T, D) -> `forward`'s output: (N, T, C), (T, N, C) or (T, C)."""
        x = x.transpose(1, 2).flatten(2)
        if not batched:
            x = x.squeeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)  # the one copy, in the projection, whose output is contiguous
        return self.out_proj(x)

    def _append(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(N, H, S, D) -> (N, H, S', D), with what `add_bias_kv` and `add_zero_attn` append."""
        parts = [x]
        if bias is not None:
            bias = bias.view(1, self.num_heads, 1, self.head_dim)
            parts.append(bias.expand(x.size(0), -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(x.size(0), self.num_heads, 1, self.head_dim))
        return torch.cat(parts, 2) if len(parts) > 1 else x

    def _masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        sizes: tuple[int, int, int],
        batched: bool,
        like: Tensor,
    ) -> dict:
        """`clamped_attention`'s arguments for `forward`'s, which leave the appended keys seen.

        Args:
            sizes: N, T, S.
            like: on the device of the masks; a DTensor among DTensors.
        """
        batch, rows, keys = sizes
        appended = (self.bias_k is not None) + self.add_zero_attn
        # Where it says so, is_causal stands for a mask that says the same.
        if not is_causal or isinstance(attn_mask, CausalBias):
            plain, is_causal = plain_mask(attn_mask, is_causal, rows, keys, like)
            # torch's attention biases say which keys take part, masks here which do not.
            attn_mask = plain if plain is None or plain is attn_mask else ~plain
        if is_causal:
            attn_mask = None
            if appended:  # the kernel would hide these as keys of the future
                attn_mask = like.new_ones(rows, keys, dtype=torch.bool).triu(1)
        if attn_mask is not None:
            shapes = {"(T, S)": (rows, keys), "(N * H, T, S)": (batch * self.num_heads, rows, keys)}
            # torch's types of error.
            wrong_dim = attn_mask.dim() != 2 and (attn_mask.dim() != 3 or not batched)
            error = AssertionError if wrong_dim else RuntimeError
            attn_mask = extended("attn_mask", attn_mask, shapes, appended, error)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None:
            shapes = {"(N, S)": (batch, keys)} if batched else {"(S,)": (keys,)}
            key_padding_mask = extended(
                "key_padding_mask", key_padding_mask, shapes, appended, AssertionError
            ).view(batch, keys + appended)
        key_padding_mask, attn_mask = seen(key_padding_mask, attn_mask)
        return {
            "key_padding_mask": key_padding_mask,
            "attn_mask": attn_mask,
            "is_causal": is_causal and not appended,
        }

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}, clamp={self.clamp}, softcap={self.softcap}"
        )


def _nothing(_module: nn.Module, _args: tuple) -> None:
    """The hook of `keep_fast_path_off`."""


def _is_plain(linear: nn.Module) -> bool:
    """Whether a call of it shows its input to nobody."""
    hooks = (
        linear._forward_pre_hooks
        or linear._forward_hooks
        or nn.modules.module._has_any_global_hook()
    )
    own = type(linear) in (nn.Linear, NonDynamicallyQuantizableLinear)
    return own and "forward" not in vars(linear) and not hooks


def _is_batched(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)
