# SPDX-License-Identifier: Apache-2.0
"""A decoder as pure functions of its parameters, and a loaded model that carries both."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache as cached
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..errors import InputError
from ..typing import Array, Float, Int, Key, PyTree
from .attention import as_valid, default_positions
from .config import DecoderConfig, validate_config
from .cudnn_attention import AttentionKind, check_model
from .decoder import Cache, Decoder, Remat
from .layer import Layer
from .layer_loop import Context, LayerFunctions, Loop, run_layers
from .per_layer import per_layer
from .rope import all_angles
from .virtual import count_virtual, has_prefix, has_prompt, with_virtual


@dataclass(frozen=True, kw_only=True)
class DecoderFunctions:
    """The functions of one decoder; the first argument of each is the parameter tree.

    Attributes:
        apply: `(params, tokens, *, attention_mask, positions, segment_ids) -> logits`.
        hidden: The same arguments; final hidden states instead of logits.
        head: `(params, hidden) -> logits`.
        decode_hidden: `(params, tokens, cache, *, attention_mask, positions)
            -> (hidden, cache)`.
        begin: `(params, cache) -> cache`: an empty cache with the virtual tokens of `params`, if
            there are any.
    """

    apply: Callable[..., Array]
    hidden: Callable[..., Array]
    head: Callable[..., Array]
    decode_hidden: Callable[..., tuple[Array, Cache]]
    begin: Callable[..., Cache]

    def map(self, transform: Callable[[Callable], Callable]) -> "DecoderFunctions":
        """Return the functions, each transformed, e.g. by `lift`."""
        return replace(self, **{f.name: transform(getattr(self, f.name)) for f in fields(self)})


def decoder_functions(
    config: DecoderConfig,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    attention: str = "blocks",
    transform: Callable[[Callable], Callable] | None = None,
    fetch: Callable[[PyTree], PyTree] | None = None,
    layer_chunk: int = 2048,
) -> DecoderFunctions:
    """Build the functions of a decoder; no parameter is created.

    Args:
        config: The model's shape.
        compute_dtype: dtype of matmul operands and of the residual stream: float32, bfloat16 or
            float16, whatever the dtype of the parameters.
        remat: What the backward recomputes: "none", nothing that costs a matmul; "dots", all but
            the outputs of linears; "full", each layer from its input; "offload", the same with
            these inputs in host memory.
        attention: "blocks" is attention in blocks, on any device; "cudnn" is cuDNN's kernel, on an
            NVIDIA GPU, which `cudnn_attention.check_device` asks whether it can. It takes rows
            whole, so with "full" and "offload" a layer must too (`layer_chunk`), and it takes no
            `segment_ids`. Decoding from a cache is the same with both.
        transform: What every function of parameters goes through, e.g. `lift`. Given here, and not
            put around the result, it lets "full" and "offload" run the layers in a loop with a
            backward of its own (`layer_loop`), which keeps the least memory.
        fetch: For that loop: brings one layer's parameters from host memory to the device.
        layer_chunk: For that loop: tokens that go through a layer at once.

    Returns:
        Pure functions, jit-friendly, of a nested dict of arrays shaped as `abstract_params` says.

    Raises:
        InputError: An impossible configuration, an unknown dtype, remat or attention setting, or a
            model that cuDNN's attention cannot do.
    """

    @cached
    def graphdef(prompt: bool, prefix: bool) -> nnx.GraphDef[Decoder]:
        how: dict[str, Any] = dict(remat=remat, attention=attention, prompt=prompt, prefix=prefix)
        return nnx.split(_abstract_decoder(config, compute_dtype, **how))[0]

    def merge(params: PyTree) -> Decoder:
        return nnx.merge(graphdef(has_prompt(params), has_prefix(params["layers"])), params)

    graphdef(False, False)  # an impossible configuration shows here
    loop = None
    if transform is not None and remat in ("full", "offload"):
        layer = _layer_functions(config, compute_dtype, transform, cast(AttentionKind, attention))
        loop = Loop(layer=layer, chunk=layer_chunk, offload=remat == "offload", fetch=fetch)
    embed = (transform or _same)(lambda params, *args: merge(params).embed(*args))

    def hidden(
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Float[Array, "batch seq d"]:
        count, virtual = count_virtual(params, config), None
        length = count + tokens.shape[1]
        if positions is None and segment_ids is None and length > config.max_length:
            raise InputError(
                f"A sequence of {length} tokens{f', {count} of them virtual' if count else ''}: "
                f"expected at most {config.max_length}, the model's context. Shorten it, or pass "
                "segment_ids or positions if it is packed."
            )
        valid = as_valid(attention_mask, tokens)
        if count and segment_ids is not None:
            raise InputError(
                f"segment_ids for parameters with {count} virtual tokens: expected None, as each "
                "document of a packed row would need them anew. Give each document a row."
            )
        if count:
            tokens, valid, positions, virtual = with_virtual(count, tokens, valid, positions)
        elif positions is None:
            positions = default_positions(valid, segment_ids)
        if loop is not None:
            context = Context(*all_angles(config, positions), valid, segment_ids, virtual)
            x = embed(params, tokens, positions, virtual)
            x = run_layers(loop, params["layers"], x, context, per_layer(config))
        else:
            x = merge(params).hidden(
                tokens, valid=valid, positions=positions, segment_ids=segment_ids, virtual=virtual
            )
        return x[:, count:] if count else x

    def head(params: PyTree, hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead vocab"]:
        if "layers" not in params:  # from `head_params`
            params = params | {"layers": abstract_params(config)["layers"]}
        return merge(params).head(hidden)

    def apply(
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        x = hidden(
            params,
            tokens,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
        )
        return head(params, x)

    def decode_hidden(
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Float[Array, "batch seq d"], Cache]:
        slots = cache.valid.shape[1]
        if tokens.shape[1] > slots:
            raise InputError(
                f"{tokens.shape[1]} tokens for a cache of {slots} slots: expected at most {slots}. "
                "Pass a larger max_len to init_cache."
            )
        hidden, new = merge(params).decode(
            tokens, cache, attention_mask=attention_mask, positions=positions
        )
        if count := count_virtual(params, config):  # without them no answer, not a wrong one
            begun = cache.length >= count
            hidden = jnp.where(begun, hidden, jnp.nan)
            new = new._replace(length=jnp.where(begun, new.length, cache.length))
        return hidden, new

    def begin(params: PyTree, cache: Cache) -> Cache:
        count = count_virtual(params, config)
        return merge(params).begin(cache, count) if count else cache

    whole = transform or _same
    if loop is None:
        hidden = whole(hidden)  # the loop's pieces are transformed already
    head = whole(head)
    return DecoderFunctions(
        apply=apply,
        hidden=hidden,
        head=head,
        decode_hidden=whole(decode_hidden),
        begin=whole(begin),
    )


def _same(f: Callable) -> Callable:
    return f


def _layer_functions(
    config: DecoderConfig,
    dtype: DTypeLike,
    transform: Callable[[Callable], Callable],
    attention: AttentionKind,
) -> LayerFunctions:
    """One layer's pieces as functions of its parameters."""

    @cached
    def abstract(prefix: bool) -> Layer:
        how: dict[str, Any] = dict(dtype=jnp.dtype(dtype), attention=attention, prefix=prefix)
        return nnx.eval_shape(lambda: Layer(config, **how, rngs=nnx.Rngs(0)))

    def merge(params: PyTree) -> Layer:
        return nnx.merge(nnx.split(abstract(has_prefix(params)))[0], params)

    def piece(name: str) -> Callable[..., Any]:
        return transform(lambda params, *args: getattr(merge(params), name)(*args))

    attends = abstract(False).self_attn

    return LayerFunctions(
        keys_values=piece("keys_values"),
        queries=piece("queries"),
        queries_keys_values=piece("queries_keys_values"),
        finish=piece("finish"),
        attend=attends.attend,
        whole_rows=attention == "cudnn",
        scale=attends.scale,
        softcap=attends.softcap,
    )


def head_params(params: PyTree) -> PyTree:
    """Return the part of a parameter tree that the output head takes: all but the layers."""
    return {name: value for name, value in params.items() if name != "layers"}


def abstract_params(config: DecoderConfig) -> PyTree:
    """Return the parameter tree of a decoder as shapes: a nested dict of `ShapeDtypeStruct`.

    Args:
        config: The model's shape.

    Raises:
        InputError: An impossible configuration.
    """
    return nnx.to_pure_dict(nnx.split(_abstract_decoder(config, jnp.float32))[1])


def init_params(
    key: Key[Array, ""], config: DecoderConfig, *, dtype: DTypeLike = jnp.float32
) -> PyTree:
    """Draw random parameters, for tests and benchmarks.

    Args:
        key: Random key.
        config: The model's shape.
        dtype: dtype of every parameter.

    Returns:
        A nested dict of arrays.

    Raises:
        InputError: An impossible configuration.
    """
    validate_config(config)

    @jax.jit
    def draw(key: Array) -> PyTree:
        model = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(key))
        return jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(nnx.split(model)[1]))

    return draw(key)


def init_cache(
    config: DecoderConfig, batch: int, max_len: int, *, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Allocate an empty cache.

    Args:
        config: The model's shape.
        batch: Rows.
        max_len: Tokens a row can hold, padding included: prompt and continuation.
        dtype: The compute dtype of the functions that will use it.

    Raises:
        InputError: `max_len` is more than the model's context.
    """
    if max_len > config.max_length:
        raise InputError(
            f"A cache of {max_len} tokens: expected at most {config.max_length}, the model's "
            "context. Shorten the prompt or generate fewer tokens."
        )
    shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, max_len), jnp.bool_),
        length=jnp.int32(0),
    )


def _abstract_decoder(
    config: DecoderConfig,
    compute_dtype: DTypeLike,
    remat: str = "none",
    attention: str = "blocks",
    prompt: bool = False,
    prefix: bool = False,
) -> Decoder:
    validate_config(config)
    dtype = jnp.dtype(compute_dtype)
    if dtype.name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"compute_dtype is {dtype.name}: expected float32, bfloat16 or float16.")
    if remat not in get_args(Remat):
        raise InputError(f"remat is {remat!r}: expected one of {', '.join(get_args(Remat))}.")
    if attention not in get_args(AttentionKind):
        raise InputError(
            f"attention is {attention!r}: expected one of {', '.join(get_args(AttentionKind))}."
        )
    if attention == "cudnn":
        check_model(config, dtype)
    how: dict[str, Any] = dict(remat=remat, attention=attention, prompt=prompt, prefix=prefix)
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, **how, rngs=nnx.Rngs(0)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A decoder, its parameters and its tokenizer.

    The methods take the parameters as an argument, so that the same model runs its own `params`,
    the same with adapters attached, or another tree of that structure, and `jax.jit` bakes none in.

    Attributes:
        config: The model's shape.
        params: Nested dict of arrays, or of special leaves that `functions` was lifted for.
        tokenizer: A `transformers` tokenizer, or None.
        functions: The decoder's functions, lifted if need be.
        compute_dtype: dtype of matmul operands and caches.
    """

    config: DecoderConfig
    params: PyTree
    functions: DecoderFunctions
    compute_dtype: Any
    tokenizer: Any = None

    def apply(
        self,
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Return the logits of every token.

        Args:
            params: The parameter tree.
            tokens: Token ids.
            attention_mask: Bool or 0/1, `[batch, seq]`: which tokens are not padding, which may be
                on either side. None: all.
            positions: int `[batch, seq]`: position of each token in its document; counted from
                `attention_mask` and `segment_ids` by default.
            segment_ids: int `[batch, seq]`: the document of each token of a packed row; tokens of
                different documents do not see each other.

        Returns:
            float32 logits.

        Raises:
            InputError: More tokens than the model's context.
        """
        return self.functions.apply(
            params,
            tokens,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
        )

    def hidden(
        self,
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Float[Array, "batch seq d"]:
        """Return final hidden states; `head` of them are the logits. Arguments as `apply`'s."""
        return self.functions.hidden(
            params,
            tokens,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
        )

    def head(self, params: PyTree, hidden: Float[Array, "*lead d"]) -> Float[Array, "*lead vocab"]:
        """Return float32 logits of final hidden states, e.g. of some positions only."""
        return self.functions.head(params, hidden)

    def init_cache(self, batch: int, max_len: int, params: PyTree | None = None) -> Cache:
        """Allocate a cache for `decode`.

        Args:
            batch: Rows.
            max_len: Tokens a row can hold, padding included and virtual tokens not.
            params: The parameter tree, if it has virtual tokens: the cache begins with them, and
                `decode` gives NaN for one that does not.

        Raises:
            InputError: More tokens than the model's context.
        """
        count = count_virtual(params, self.config)
        cache = init_cache(self.config, batch, count + max_len, dtype=self.compute_dtype)
        return self.functions.begin(params, cache) if count else cache

    def decode(
        self,
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Float[Array, "batch seq vocab"], Cache]:
        """Return logits of tokens that follow what the cache holds, and the cache with them added.

        The prompt is the first call, with any padding (left or right) marked by `attention_mask`;
        then come single tokens. Under `jax.jit`, donate the cache.

        Args:
            params: The parameter tree.
            tokens: The next tokens of each row.
            cache: From `init_cache`, or from the last call. Writing past its end gives NaN.
            attention_mask: Which of `tokens` are not padding. None: all.
            positions: Position of each token; continues each row's count by default.
        """
        hidden, cache = self.decode_hidden(
            params, tokens, cache, attention_mask=attention_mask, positions=positions
        )
        return self.head(params, hidden), cache

    def decode_hidden(
        self,
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Float[Array, "batch seq d"], Cache]:
        """As `decode`, but final hidden states: of a prompt, only the last one needs `head`."""
        return self.functions.decode_hidden(
            params, tokens, cache, attention_mask=attention_mask, positions=positions
        )


def abstract_model(config: DecoderConfig, *, tokenizer: Any = None) -> Model:
    """Return a model without weights: its parameters are shapes.

    Args:
        config: The model's shape.
        tokenizer: Its tokenizer, or None.

    Raises:
        InputError: An impossible configuration.
    """
    return Model(
        config=config,
        params=abstract_params(config),
        functions=decoder_functions(config),
        compute_dtype=jnp.float32,
        tokenizer=tokenizer,
    )
