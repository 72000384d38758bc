"""The stages with int4 and int8 weights: against fp64, the same bits for any number of tokens, compiled ahead."""

from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from fastgen.kernels import (
    fixed_point,
    fused,
    launch,
    linear_sum,
    packed_linear,
    packed_product,
    packed_units,
    reference,
)
from fastgen.kernels.packed import Form, PackedLinear, form_of, pack_int4, pack_int8, unpack
from quantize import int4, int8
from tests.kernels import support
from tests.kernels.support import compiled_ahead, on_gpu

FORMATS = ["int8", "g32", "g64 zeros", "g128", "g128 zeros", "g256 zeros"]
TOKENS = [1, 5, 8, 16]


def linear(out: int, width: int, form: str, dtype: torch.dtype, *, bias: bool = False) -> PackedLinear:
    """A quantized linear with weights of about 1 / sqrt(width)."""
    weight = torch.randn(out, width, device="cuda") * width**-0.5
    offsets = torch.randn(out, device="cuda").to(dtype) if bias else None
    if form == "int8":
        q, scale = int8.quantize(weight, dtype)
        return pack_int8(q, scale, offsets)
    group = int(form.partition(" ")[0][1:])
    q, scale, zero_point = int4.quantize(weight, group, symmetric="zeros" not in form, scale_dtype=dtype)
    return pack_int4(int4.pack(q), scale, zero_point, offsets)


def in_fp64(packed: PackedLinear) -> nn.Module:
    """The same linear, exactly; scales have at most 11 bits and weights 8, so their products are exact in fp64."""
    exact = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, dtype=torch.float64)
    exact.to("cuda").requires_grad_(False)
    exact.weight.copy_(unpack_exactly(packed))
    if packed.bias is not None:
        exact.bias.copy_(packed.bias)
    return exact


def unpack_exactly(packed: PackedLinear) -> Tensor:
    """Weights in fp64: integers are unpacked with scales of one, then multiplied."""
    size = (packed.out_features, packed.in_features)
    groups = form_of(packed.words, packed.scales).groups
    scales = packed.scales.view(packed.dtype).clone()
    tail = packed.scales.clone()
    tail.view(packed.dtype)[..., : 16 * max(1, groups)] = 1
    integers = unpack(packed.words, tail, *size, packed.dtype).double()
    if not groups:
        rows = scales.view(-1, 8, 2).permute(2, 0, 1).reshape(-1)[: size[0]]
        return integers * rows.double()[:, None]
    tiles, units = packed.words.shape[:2]
    scales = scales[..., : 16 * groups].reshape(tiles, units, groups, 8, 2)
    rows = scales.permute(4, 0, 3, 1, 2).reshape(16 * tiles, units * groups)
    return integers * rows.double().repeat_interleave(128 // groups, dim=1)[: size[0], : size[1]]


def inputs(out: int, width: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, nn.RMSNorm, Tensor]:
    torch.manual_seed(out + width + tokens)
    x = torch.randn(1, tokens, width, device="cuda").to(dtype)
    return x, support.norm(width, dtype=dtype, device="cuda"), torch.randn(1, tokens, out, device="cuda").to(dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("out", "width", "bias"), [(112, 256, True), (4096, 1536, False)])
def test_error_is_at_most_twice_torchs(out: int, width: int, bias: bool, form: str, dtype: torch.dtype) -> None:
    for tokens in TOKENS:
        x, norm, residual = inputs(out, width, tokens, dtype)
        packed = linear(out, width, form, dtype, bias=bias)
        exact, exact_norm = in_fp64(packed), support.in_fp64(norm)
        for name, arguments, precise in (
            ("norm_linear", (x, norm, packed), (x.double(), exact_norm, exact)),
            ("linear_add", (x, packed, residual), (x.double(), exact, residual.double())),
            ("norm_swiglu", (x, norm, packed), (x.double(), exact_norm, exact)),
            ("head", (x, norm, packed), None),
        ):
            actual = support.poisoned(getattr(fused, name), *arguments)
            if precise is None:
                assert torch.equal(actual.to(dtype), fused.norm_linear(x, norm, packed)), "head"
                continue
            wanted = getattr(reference, name)(*precise)
            support.assert_as_good_as(actual, getattr(reference, name)(*arguments), wanted, f"{name}, {tokens} tokens")


@on_gpu
@pytest.mark.parametrize(("out", "width"), [(111, 72), (333, 1000), (48, 40)])
def test_odd_sizes(out: int, width: int) -> None:
    for tokens in (1, 3, 9):
        x, _, residual = inputs(out, width, tokens, torch.bfloat16)
        packed = linear(out, width, "int8", torch.bfloat16)
        wanted = reference.linear_add(x.double(), in_fp64(packed), residual.double())
        actual = support.poisoned(fused.linear_add, x, packed, residual)
        support.assert_as_good_as(actual, reference.linear_add(x, packed, residual), wanted, f"{tokens} tokens")


@on_gpu
@pytest.mark.parametrize("form", ["int8", "g32", "g128 zeros"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("out", "width"), [(112, 128), (4096, 4096), (16384, 2048), (512, 11008), (128, 28672)])
def test_a_token_has_the_same_bits_among_others(out: int, width: int, dtype: torch.dtype, form: str) -> None:
    x, norm, residual = inputs(out, width, 16, dtype)
    packed = linear(out, width, form, dtype)
    together = fused.norm_linear(x, norm, packed), fused.linear_add(x, packed, residual)
    for tokens in (1, 2, 7, 8, 9):
        some = x[:, :tokens].contiguous()
        assert torch.equal(fused.norm_linear(some, norm, packed), together[0][:, :tokens]), f"{tokens} tokens, norm"
        apart = fused.linear_add(some, packed, residual[:, :tokens].contiguous())
        assert torch.equal(apart, together[1][:, :tokens]), f"{tokens} tokens"


@on_gpu
@pytest.mark.parametrize("form", ["int8", "g128 zeros"])
def test_the_greedy_head_takes_the_first_of_the_largest_logits(form: str) -> None:
    x, norm, _ = inputs(1000, 512, 11, torch.bfloat16)
    packed = linear(1000, 512, form, torch.bfloat16)
    logits = fused.head(x, norm, packed)
    assert torch.equal(fused.greedy_head(x, norm, packed), logits.argmax(-1))
    x[0, 3] = float("nan")
    tokens = fused.greedy_head(x, norm, packed)[0].tolist()
    assert tokens[3] == -1 and -1 not in tokens[:3] + tokens[4:]
    one = torch.ones(1000, 512, dtype=torch.int8, device="cuda")
    same = pack_int8(one, one[:, :1].bfloat16(), None)
    assert not fused.greedy_head(x[:, :3].abs(), norm, same).any(), "all logits are equal: the lowest token"


@on_gpu
def test_large_and_small_activations_stay_finite_in_fp16() -> None:
    x, norm, _ = inputs(256, 512, 2, torch.float16)
    packed = linear(256, 512, "g128 zeros", torch.float16)
    for scale in (1e-3, 1e4):
        scaled = (x.double() * scale).half()
        exact = reference.norm_linear(scaled.double(), support.in_fp64(norm), in_fp64(packed))
        for tokens in (1, 2):
            y = fused.norm_linear(scaled[:, :tokens].contiguous(), norm, packed)
            assert support.distance(y, exact[:, :tokens]) < 2e-3, f"activations around {scale}"


@on_gpu
def test_compiles_in_one_graph_and_passes_opcheck() -> None:
    x, norm, residual = inputs(512, 256, 3, torch.bfloat16)
    packed = linear(512, 256, "g64 zeros", torch.bfloat16, bias=True)
    compiled = torch.compile(lambda x: fused.linear_add(x, packed, residual) * 2, fullgraph=True)
    assert torch.equal(compiled(x), fused.linear_add(x, packed, residual) * 2)
    weight = (packed.words, packed.scales, packed.bias)
    torch.library.opcheck(packed_linear.packed_linear, (x, norm.weight, 1e-5, *weight, residual, 512, False))
    torch.library.opcheck(packed_linear.packed_swiglu, (x, norm.weight, 1e-5, *weight, 512))
    torch.library.opcheck(packed_linear.packed_greedy_head, (x, norm.weight, 1e-5, *weight, 512))


@on_gpu
@pytest.mark.parametrize(
    ("form", "width"),
    [("int8", 2752), ("int8", 2816), ("g32 zeros", 96), ("g64", 192), ("g64", 2752), ("g128 zeros", 2688)],
)
def test_a_part_of_a_sum_is_not_rounded(form: str, width: int) -> None:
    for tokens in (1, 16):
        x, _, _ = inputs(4096, width, tokens, torch.bfloat16)
        packed = linear(4096, width, form, torch.bfloat16, bias=True)
        actual = support.poisoned(fused.partial_linear, x, packed)
        assert actual.dtype is torch.float32
        assert support.distance(actual, reference.partial_linear(x.double(), in_fp64(packed))) < 1e-4


@on_gpu
@pytest.mark.parametrize("form", ["int8", "g32 zeros"])
def test_little_shared_memory_changes_no_bits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, norm, residual = inputs(512, 1024, 16, torch.bfloat16)
    packed = linear(512, 1024, form, torch.bfloat16)
    wanted = fused.norm_linear(x, norm, packed), fused.linear_add(x, packed, residual)
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99)
    assert torch.equal(fused.norm_linear(x, norm, packed), wanted[0])
    assert torch.equal(fused.linear_add(x, packed, residual), wanted[1])


@pytest.mark.parametrize("memory", [99, 163, 227])
def test_eight_tokens_fit_every_gpu_and_sixteen_the_larger_ones(memory: int) -> None:
    for form in (Form(1, 1, True), Form(1, 4, True), Form(2, 0, False)):
        for width in (64, 4096, 11008, 28672):
            for tokens in (1, 2, 8, 16):
                for tiles in (1, 100):
                    chosen = packed_linear.choose(form, width, tokens, memory, tiles)
                    assert chosen.slots >= 2 or (tokens == 16 and memory == 99)
                    assert chosen.slots < 2 or 1 <= chosen.early < chosen.slots
                    assert chosen.staged or not chosen.kept or chosen.early <= triton.cdiv(width, 8 * 128)
                    room = memory * 1024 - packed_product.fixed_bytes(
                        width, form.groups, chosen.sets, chosen.shape.tiles, chosen.kept, chosen.staged
                    )
                    assert room >= fixed_point.WARPS.value * chosen.slots * packed_product.slot_bytes(
                        *form, chosen.sets, chosen.shape.tiles, chosen.kept
                    )  # fmt: skip


def test_few_tokens_are_prepared_by_every_program_and_more_before() -> None:
    """As measured on an H200, by width and tokens: int4 in groups of 128, five tiles a multiprocessor."""
    form = Form(1, 1, True)
    staged = {
        width: [tokens for tokens in range(1, 17) if packed_linear.choose(form, width, tokens, 227, 5).staged]
        for width in (2048, 4096, 8192, 11008)
    }
    assert staged == {2048: [1, 2], 4096: [1, 2, 3, 4], 8192: [1, 2, 3, 4], 11008: [1]}


def test_more_of_a_ring_is_asked_for_early_the_more_weights_a_program_has() -> None:
    """wo, qkv and gate/up of a 7B model at 8 tokens, on 132 multiprocessors."""
    chosen = [packed_linear.choose(Form(1, 1, True), 4096, 8, 227, n / 16 / 132) for n in (4096, 12288, 22016)]
    assert [(how.early, how.slots) for how in chosen] == [(1, 5), (3, 5), (4, 5)]


def test_prepared_tokens_keep_their_places_where_little_memory_is_left() -> None:
    assert packed_linear.choose(Form(2, 0, False), 3072, 16, 227, 10).kept
    assert packed_linear.choose(Form(1, 1, True), 512, 16, 99, 10).slots >= 2


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_warp_copies_the_tails_of_a_slot_at_once(groups: int, zeros: bool) -> None:
    for shape in packed_linear.SHAPES[4]:
        assert shape.tiles * packed_units.tail_stride(groups, zeros) <= 32 * 16


def compile_ahead(kernel: Any, capability: int, constants: dict[str, Any], registers: int) -> Any:
    """Compile a kernel for a GPU that need not be there."""
    types = {
        "words": "*i32", "scales": "*i32", "factors": "*fp32", "best": "*fp32", "ids": "*i32", "tokens": "i32",
        "n": "i32", "tiles": "i32", "record": "i32", "eps": "fp32", "boxes": "*i64", "calls": "*i32", "rank": "i32",
    }  # fmt: skip
    types |= {} if "factors" in constants else {"x": "*i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if signature[name].startswith("*")
    }
    options = {"num_warps": fixed_point.WARPS.value, "maxnreg": registers}
    options |= {"launch_pdl": True} if capability >= 90 else {}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), support.TARGETS)
@pytest.mark.parametrize(
    ("name", "tokens", "form", "tiles", "most_staged"),
    [
        ("linear", 1, Form(1, 1, True), 2, 0), ("swiglu", 16, Form(1, 4, False), 2, 0),
        ("best", 1, Form(2, 0, False), 2, 0), ("linear", 8, Form(2, 0, False), 2, 0),
        ("swiglu", 16, Form(1, 1, False), 10, 0), ("linear", 16, Form(2, 0, False), 2, 0),
        ("post", 1, Form(1, 1, True), 2, 0), ("post", 8, Form(1, 1, True), 2, 0),
        ("post", 16, Form(1, 1, True), 10, 0), ("post", 1, Form(2, 0, False), 2, 0),
        ("post", 16, Form(2, 0, False), 2, 0), ("linear", 8, Form(2, 0, False), 2, 8),
        ("swiglu", 8, Form(1, 4, True), 2, 8), ("best", 2, Form(1, 1, True), 10, 8),
        ("post", 4, Form(1, 1, False), 2, 8),
    ],
)  # fmt: skip
def test_weights_go_from_memory_to_the_tensor_cores_without_a_barrier(
    name: str, tokens: int, form: Form, tiles: int, most_staged: int, capability: int, pdl: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(packed_linear, "MOST_STAGED", most_staged)
    chosen = packed_linear.choose(form, 4096, tokens, 227 if capability == 90 else 163, tiles)
    sets, shape, slots, early, kept, staged = chosen
    has_room = capability == 90 or form.planes == 1  # beside a ring of int8
    assert staged == (tokens == 1 or (most_staged > 0 and has_room))
    constants = {
        "WIDTH": 4096, "PLANES": form.planes, "GROUPS": form.groups, "ZEROS": form.zeros, "SETS": sets,
        "R": shape.tiles, "STAGES": slots, "EARLY": early, "KEPT": kept, "DTYPE": gl.bfloat16, "PDL": pdl, "bias": None,
    }  # fmt: skip
    constants |= {"factors": None} if staged else {}
    constants |= {"norm": None, "WORLD": 4} if name == "post" else {}
    kernels = linear_sum if name == "post" else packed_linear
    compiled = compile_ahead(getattr(kernels, f"packed_{name}_kernel"), capability, constants, shape.registers)
    ptx, copied = compiled.asm["ptx"], "cp.async.cg.shared.global"
    assert support.usage(compiled)["STACK"] == 0, "no register is spilled"
    slot = packed_product.slot_bytes(*form, sets, shape.tiles, kept)
    memory = packed_product.fixed_bytes(4096, form.groups, sets, shape.tiles, kept, staged)
    memory += fixed_point.WARPS.value * slots * slot
    assert compiled.metadata.shared == triton.cdiv(memory, 1024) * 1024, "nothing else lies in shared memory"
    copies = 2 * form.planes * shape.tiles + (1 if form.groups else 0)
    of_x = triton.cdiv(fixed_point.digit_bytes(form.groups, sets), 512) if not staged else 0
    wanted = 2 * copies + (of_x if kept else 2 * of_x)
    assert ptx.count(copied) >= wanted, "slots are filled ahead, in a loop, and one in each turn"
    products = ptx[ptx.index("mma.sync") : ptx.rindex("mma.sync")]
    assert products.count("mma.sync.aligned.m16n8k32") >= 3 and "bar.sync" not in products
    assert "ld.shared.v4" in ptx and ".x4.shared" not in ptx, "operands are read as they lie there"
    if pdl:
        wait = ptx.index("griddepcontrol.wait")
        assert ptx.index(copied) < wait < ptx.index("mma.sync"), "weights are copied before the wait"
        assert wait < ptx.index("griddepcontrol.launch_dependents"), "the next kernel starts after the wait"


@compiled_ahead
def test_more_tails_than_a_warp_copies_at_once_are_refused() -> None:
    constants = {
        "WIDTH": 4096, "PLANES": 1, "GROUPS": 4, "ZEROS": True, "SETS": 0, "R": 4, "STAGES": 3, "EARLY": 1,
        "KEPT": True, "DTYPE": gl.bfloat16, "PDL": True, "bias": None, "factors": None,
    }  # fmt: skip
    with pytest.raises(triton.CompilationError) as refused:
        compile_ahead(packed_linear.packed_linear_kernel, 90, constants, 128)
    assert "16 bytes of the tails" in str(refused.getrepr())
