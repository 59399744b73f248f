"""Traced operations that are no products in the sense of ``macs``: they move, compare, combine elementwise, normalise
or pool. What stands neither here nor among the counted operations is reported as uncounted.
"""

from __future__ import annotations

_SHAPES_AND_COPIES = """
Bool Float FloatImplicit Int IntImplicit ScalarImplicit arange broadcast_tensors broadcast_to cat
channel_shuffle chunk clone concat constant_pad_nd contiguous copy detach diagonal dim empty empty_like expand
expand_as fill flatten flip full full_like gather hstack index index_add index_copy index_fill index_put
index_select item lift_fresh linspace meshgrid movedim moveaxis narrow new_empty new_full new_ones new_zeros
nonzero numel numpy_T ones ones_like pad permute pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d
repeat repeat_interleave replication_pad2d reshape resolve_conj resolve_neg roll scatter select size slice split
split_with_sizes squeeze stack swapaxes sym_size t take tensor tensor_split tile to transpose tril triu type_as
unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as vstack zero zeros zeros_like
"""
_COMPARISONS = """
__and__ __or__ _assert_async all any argmax argmin argsort bitwise_and bitwise_not bitwise_or eq ge gt le
logical_and logical_not logical_or lt masked_fill masked_select ne sort topk where
"""
_ELEMENTWISE = """
abs add addcdiv addcmul alpha_dropout celu ceil clamp clamp_max clamp_min cos div dropout elu erf exp expm1
feature_dropout floor floor_divide fmod frac gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log
log1p log_sigmoid log_softmax logit maximum minimum mish mul neg pow prelu reciprocal relu relu6 remainder round
rrelu rsqrt rsub selu sigmoid sign silu sin softmax softplus softshrink softsign sqrt square sub tanh tanhshrink
threshold true_divide
"""
_REDUCTIONS_NORMS_POOLS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d amax amin avg_pool1d avg_pool2d avg_pool3d batch_norm cumsum group_norm instance_norm
layer_norm linalg_norm linalg_vector_norm local_response_norm logsumexp lp_pool2d max max_pool1d max_pool2d
max_pool2d_with_indices max_pool3d mean min norm normalize prod rms_norm std std_mean sum var var_mean
"""

NOT_PRODUCTS = frozenset(
    f"aten::{name}{in_place}"
    for names in (_SHAPES_AND_COPIES, _COMPARISONS, _ELEMENTWISE, _REDUCTIONS_NORMS_POOLS)
    for name in names.split()
    for in_place in ("", "_")
)
