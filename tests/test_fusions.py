"""Kernels, what they hold and the bytes they spare: programs counted by hand, and printed ones."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Struct
from jax import lax

from jaxaccel import measure
from jaxaccel.measure import _fusions, _hlo

BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
OPS = {"tanh": jnp.tanh, "exponential": jnp.exp, "sine": jnp.sin, "cosine": jnp.cos}
IMAGES = Struct((8, 28, 28, 1), jnp.float32)
KERNEL, BIAS = Struct((5, 5, 1, 10), jnp.float32), Struct((10,), jnp.float32)
CONV_BYTES = 4 * 8 * 24 * 24 * 10


def square(side: int = 64) -> Struct:
    return Struct((side, side), jnp.float32)


def layer(params, x, held=lambda x: x):
    """Convolution, bias, relu and max pool, each held apart from the next."""
    kernel, bias = params
    layout = ("NHWC", "HWIO", "NHWC")
    x = held(lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout))
    x = held(jnp.maximum(held(x + bias), 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def ops(found: measure.Fusions) -> list[tuple[str, ...]]:
    return [kernel.ops for kernel in found.kernels]


@given(
    parts=st.lists(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=4), max_size=4),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
)
def test_chains_between_barriers(parts, shape):
    def chain(x):
        for place, part in enumerate(parts):
            x = lax.optimization_barrier(x) if place else x
            for name in part:
                x = OPS[name](x)
        return x

    found = measure.fusions(chain, Struct(shape, jnp.float32), compiler_options=BARRIERS)
    size = 4 * int(np.prod(shape))
    # A program that returns its argument copies it.
    assert ops(found) == ([tuple(part) for part in parts] or [("copy",)])
    assert found.ops_before == sum(map(len, parts))
    assert found.bytes_saved == sum(2 * size * (len(part) - 1) for part in parts)
    assert {(k.bytes_read, k.bytes_written) for k in found.kernels} == {(size, size)}


def test_two_products_are_two_kernels():
    found = measure.fusions(lambda a, b: (a @ b) @ b, square(), square())
    assert ops(found) == [("dot",), ("dot",)]
    assert (found.ops_before, found.bytes_saved, found.backend) == (2, 0, "cpu")
    assert found.bytes_moved == 2 * 3 * 4 * 64**2


def test_cpu_keeps_a_convolution_apart_from_bias_relu_and_pool():
    found = measure.fusions(layer, (KERNEL, BIAS), IMAGES)
    convolution, behind = found.kernels
    assert convolution.ops == ("convolution",)
    assert [name for name in behind.ops if name != "broadcast"] == [
        "add",
        "maximum",
        "reduce-window",
    ]
    # Bias and relu are each written once and read once less.
    assert found.bytes_saved == 4 * CONV_BYTES
    assert (behind.bytes_read, behind.bytes_written) == (CONV_BYTES + 40, CONV_BYTES // 4)


def test_bytes_saved_are_those_that_the_program_held_apart_moves_more():
    held = lambda params, x: layer(params, x, lax.optimization_barrier)
    apart = measure.fusions(held, (KERNEL, BIAS), IMAGES, compiler_options=BARRIERS)
    fused = measure.fusions(layer, (KERNEL, BIAS), IMAGES)
    assert (len(fused.kernels), len(apart.kernels)) == (2, 4)
    assert apart.bytes_saved == 0
    assert apart.bytes_moved - fused.bytes_moved == fused.bytes_saved


@pytest.mark.parametrize("steps", [3, 300])
def test_a_loop_counts_its_body_once_and_says_so(steps):
    found = measure.fusions(
        lambda x: lax.fori_loop(0, steps, lambda i, c: jnp.sin(c @ c), x), square()
    )
    assert found.loops == 1
    assert ops(found).count(("dot",)) == ops(found).count(("sine",)) == 1
    assert "1 loop(s): operations, kernels and bytes count a loop's body once." in str(found)
    assert "loop(s)" not in str(measure.fusions(jnp.sin, square()))


def test_calls_count_each_time_branches_all_and_reshapes_never():
    inner = jax.jit(lambda x: jnp.sin(x @ x))
    assert measure.fusions(lambda x: inner(inner(x)), square()).ops_before == 4
    assert measure.fusions(lambda x: jnp.sin(x.reshape(-1)), square()).ops_before == 1
    branches = lambda p, x: lax.cond(p, jnp.sin, lambda x: x @ x, x)
    assert {("sine",), ("dot",)} <= set(ops(measure.fusions(branches, True, square())))


def test_a_slice_is_read_and_an_update_written_alone():
    (kernel,) = measure.fusions(lambda x: jnp.sin(x[3:5]), square()).kernels
    assert (kernel.bytes_read, kernel.bytes_written) == (2 * 64 * 4, 2 * 64 * 4)
    update = lambda x: lax.dynamic_update_slice(x, x[:1], (3, 0))
    found = measure.fusions(update, square())
    (kernel,) = [k for k in found.kernels if "dynamic-update-slice" in k.ops]
    assert kernel.bytes_written == 64 * 4
    assert kernel.bytes_read <= 64 * 4 + 8


def test_what_one_kernel_uses_twice_is_read_once():
    (kernel,) = measure.fusions(lambda x: jnp.sin(x) + jnp.cos(x), square()).kernels
    assert (kernel.bytes_read, kernel.bytes_written) == (4 * 64**2, 4 * 64**2)
    found = measure.fusions(lambda x: jnp.square(jnp.sin(x)), square())
    assert found.bytes_saved == 2 * 4 * 64**2


def test_a_library_call_is_named_and_its_inside_not_counted():
    found = measure.fusions(jnp.linalg.qr, square(8))
    assert {k.ops for k in found.kernels if k.kind == "library"} >= {("lapack_sgeqrf_ffi",)}
    assert "What a library's call fuses inside is not in these bytes." in str(found)


def test_a_sharded_program():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jnp.ones((64, 64)), rows)
    constrained = lambda x: lax.with_sharding_constraint(jnp.sin(x), rows)
    found = measure.fusions(lambda x: jnp.sum(constrained(x)), x)
    assert found.ops_before == 2  # annotations of the layout are none
    mapped = jax.shard_map(jnp.sin, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    assert measure.fusions(mapped, x).ops_before == 1
    assert ("all-reduce",) in ops(found)
    assert max(k.bytes_read for k in found.kernels) <= 64 * 64 * 4 // 8 + 4  # one device's


def test_what_is_printed():
    found = measure.fusions(lambda x: jnp.sin(jnp.exp(x)), square())
    assert str(found).splitlines() == [
        "kernels  kind  operations of each  bytes read  bytes written",
        "-" * 60,
        "      1  loop  exponential, sine       16,384         16,384",
        "",
        "cpu: 2 operation(s) before, 1 kernel(s) left; 32,768 bytes moved, 32,768 no longer.",
    ]
    many = ("slice", "add", "slice", *map(str, range(8)))
    assert _fusions._summary(many) == "2 slice, add, 0, 1, 2, 3, 4, 5, 2 more"
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["kernels"][0]["ops"] == ["exponential", "sine"]
    assert (plain["ops_before"], plain["bytes_moved"], plain["loops"]) == (2, 32768, 0)


def test_bad_input():
    with pytest.raises(TypeError, match=r"^fusions: fn is of type float; give a JAX function$"):
        measure.fusions(3.0, 1.0)  # pyright: ignore[reportArgumentType]
    message = (
        r"^fusions: args\[1\]\['name'\]: expected an array, got str; "
        r"fn takes pytrees of arrays \(close over anything else\)$"
    )
    with pytest.raises(TypeError, match=message):
        measure.fusions(lambda p, x: p, 1.0, {"name": "relu"})


# An excerpt in the format that XLA:GPU prints, put together from the public test files of XLA
# (cudnn_fused_conv_rewriter, cudnn fusion compiler, command buffers); not measured here.
GPU = """HloModule jit_net, is_scheduled=true, entry_computation_layout={(f32[8,32,32,3]{3,2,1,0})->f32[]}

%region_0.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.9 = f32[] add(f32[] %a.1, f32[] %b.1)
}

%fused_reduce (param_0.1: f32[8,16,16,64]) -> (f32[8], f32[8,16,16,64]) {
  %param_0.1 = f32[8,16,16,64]{3,2,1,0} parameter(0)
  %tanh.1 = f32[8,16,16,64]{3,2,1,0} tanh(%param_0.1)
  %constant_1 = f32[] constant(0)
  %reduce.1 = f32[8]{0} reduce(%tanh.1, %constant_1), dimensions={1,2,3}, to_apply=%region_0.1
  ROOT %tuple.1 = (f32[8]{0}, /*index=1*/f32[8,16,16,64]{3,2,1,0}) tuple(%reduce.1, %tanh.1)
}

%fusion_dot (p0: bf16[8,64], p1: bf16[64,10]) -> bf16[8,10] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = bf16[64,10]{1,0} parameter(1)
  %d = bf16[8,10]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %neg = bf16[8,10]{1,0} negate(%d)
}

%command_buffer (p.0: bf16[8,64], p.1: bf16[64,10]) -> bf16[8,10] {
  %p.0 = bf16[8,64]{1,0} parameter(0)
  %p.1 = bf16[64,10]{1,0} parameter(1)
  ROOT %gemm_fusion = bf16[8,10]{1,0} fusion(%p.0, %p.1), kind=kCustom, calls=%fusion_dot, backend_config={"operation_queue_id":"0","fusion_backend_config":{"kind":"__cudnn$fusion","cudnn_fusion_config":{"plan_id":"0"}}}
}

ENTRY %main.9 (x.1: f32[8,32,32,3], k.1: f32[64,3,3,3], b.1: f32[64], h: bf16[8,64], w: bf16[64,10]) -> (f32[8], bf16[8,10]) {
  %x.1 = f32[8,32,32,3]{3,2,1,0:T(8,128)} parameter(0)
  %k.1 = f32[64,3,3,3]{3,2,1,0} parameter(1)
  %b.2 = f32[64]{0} parameter(2)
  %h = bf16[8,64]{1,0} parameter(3)
  %w = bf16[64,10]{1,0} parameter(4)
  %copy-start = (bf16[8,64]{1,0:S(5)}, bf16[8,64]{1,0}, u32[]) copy-start(%h)
  %cudnn-conv-bias-activation.3 = (f32[8,16,16,64]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %k.1, %b.2), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", metadata={op_name="jit(net)/max"}, backend_config={"cudnn_conv_backend_config":{"activation_mode":"kRelu","conv_result_scale":1}}
  %get-tuple-element.1 = f32[8,16,16,64]{3,2,1,0} get-tuple-element(%cudnn-conv-bias-activation.3), index=0
  %copy-done = bf16[8,64]{1,0:S(5)} copy-done(%copy-start)
  %input_reduce_fusion = (f32[8]{0}, f32[8,16,16,64]{3,2,1,0}) fusion(%get-tuple-element.1), kind=kInput, calls=%fused_reduce
  %call = bf16[8,10]{1,0} call(%copy-done, %w), to_apply=%command_buffer, metadata={op_name="f(\\"0\\"), calls=%none"}
  ROOT %tuple.9 = ((f32[8]{0}, f32[8,16,16,64]{3,2,1,0}), bf16[8,10]{1,0}) tuple(%input_reduce_fusion, %call)
}, execution_thread="main"
"""  # noqa: E501


def test_gpu_text():
    found = _fusions.read(GPU, GPU, "gpu")
    rows = {k.name: (k.kind, k.ops, k.bytes_read, k.bytes_written) for k in found.kernels}
    maps, target = 8 * 16 * 16 * 64, "__cudnn$convBiasActivationForward"
    operands = 4 * (8 * 32 * 32 * 3 + 64 * 27 + 64)
    assert rows == {
        "copy-start": ("op", ("copy",), 1024, 1024),
        "cudnn-conv-bias-activation.3": ("library", (target,), operands, 4 * maps),
        "input_reduce_fusion": ("input", ("tanh", "reduce"), 4 * maps, 4 * maps + 32),
        "gemm_fusion": ("__cudnn$fusion", ("dot", "negate"), 1024 + 1280, 160),
    }
    # tanh is an output as well, so only its reading is spared; the product is written and read.
    assert found.bytes_saved == 4 * maps + 2 * 160
    assert found.backend == "gpu"


SMALL = """%inside (p: f32[4,4]) -> f32[2,8] {
  %p = f32[4,4]{1,0} parameter(0)
  %c = f32[4,4]{1,0} custom-call(f32[4,4]{1,0} %p), custom_call_target="inner"
  ROOT %b = f32[2,8]{1,0} bitcast(%c)
}

ENTRY %main (t: (f32[4,4], s32[])) -> f32[8,2] {
  %t = (f32[4,4]{1,0}, s32[]) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element((f32[4,4]{1,0}, s32[]) %t), index=0
  %f.1 = f32[2,8]{1,0} fusion(f32[4,4]{1,0} %x), kind=kLoop, calls=%inside
  %r = f32[8,2]{0,1} reshape(f32[2,8]{1,0} %f.1)
  ROOT %a = f32[8,2]{0,1} add(%r, %r)
}
"""


def test_a_result_under_another_name_and_a_reshape_that_moves_data():
    found = _fusions.read(SMALL, SMALL, "gpu")
    assert ops(found) == [("inner",), ("reshape",), ("add",)]
    assert found.bytes_saved == 0  # the bitcast's operand is what the kernel writes
    assert found.bytes_moved == 6 * 64  # the sum reads its one operand once


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("s4[5]{0:E(4)}", 3),
        ("f8e4m3fn[2,3]{1,0}", 6),
        ("c64[2]{0}", 16),
        ("f32[8,<=4]{1,0}", 128),
        ("(s32[], /*index=1*/bf16[2]{0:T(8,128)}, token[])", 8),
    ],
)
def test_bytes_of_types(kind, size):
    module = _hlo.parse(f"ENTRY main {{\n  ROOT x.1 = {kind} parameter(0)\n}}\n")
    assert module.computations["main"].instructions["x.1"].bytes == size


HEAD = "ENTRY m {\n  "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule m\n", "no ENTRY computation in the text; give the text of a whole module"),
        (HEAD + "x = f32[] iota()\n", "the text ends inside of the computation 'ENTRY m {'"),
        (HEAD + "ROOT gibberish\n}", "cannot read the instruction 'ROOT gibberish'"),
        (HEAD + "ROOT x = f32[] sine(\n}", "a bracket is not closed in 'f32[] sine('"),
        (HEAD + "x = f32[] sine(y)\n}", "an operand is not defined above of 'x = f32[] sine(y)'"),
        (HEAD + "x = f32[] constant(0)\n}", "the computation 'm' has no ROOT instruction"),
        ("wrong head here {\n}", "cannot read the head of a computation: 'wrong head here {'"),
        (HEAD + "ROOT x = f32[] add(?)\n}", "cannot read the operands '?' of 'add'"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=f"^HLO: {re.escape(message)}$"):
        _hlo.parse(text)
