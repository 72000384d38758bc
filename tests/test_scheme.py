"""Which linear gets which format, by flags and rules."""

import pytest

from fastgen.config import ModelConfig
from fastgen.errors import UsageError
from quantize.format import INT8, WeightFormat
from quantize.scheme import Scheme, contradiction, describe
from tests.models import TINY

CONFIG = ModelConfig(**(TINY | {"dim": 96, "head_dim": 16, "hidden_dim": 256}))
G32 = WeightFormat(bits=4, group_size=32, symmetric=False)
G128 = WeightFormat(bits=4, group_size=128, symmetric=False)


def test_int8_takes_every_linear_and_the_head() -> None:
    formats = Scheme(quant="int8").formats(CONFIG)
    assert set(formats.values()) == {INT8}
    assert len(formats) == 2 * 4 + 1


def test_int4_keeps_the_head_in_int8_and_fits_groups_to_widths() -> None:
    formats = Scheme(quant="int4").formats(CONFIG)
    assert formats["lm_head"] == INT8
    assert formats["layers.0.wqkv"] == G32
    assert formats["layers.1.w_down"] == G128
    assert formats["layers.0.wo"].group_size == 64


def test_a_rule_may_give_int8_a_few_groups() -> None:
    formats = Scheme(quant="int8", group_size=32, symmetric=True, keep="w_down=int4").formats(CONFIG)
    assert formats["layers.1.w_down"] == WeightFormat(bits=4, group_size=32, symmetric=True)
    assert formats["layers.1.wo"] == INT8


def test_rules_apply_in_their_order_to_names_and_parts_of_names() -> None:
    formats = Scheme(quant="int4", keep="lm_head=bf16, layers.0=int8,w_down=int8,layers.*.wo=bf16").formats(CONFIG)
    assert "lm_head" not in formats
    assert formats["layers.0.wqkv"] == INT8
    assert formats["layers.1.w_down"] == INT8
    assert "layers.0.wo" not in formats
    assert "layers.1.wo" not in formats
    assert formats["layers.1.wqkv"] == G32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"quant": "int4", "keep": "layers.9=bf16"}, "layers.9"),
        ({"quant": "int4", "keep": "lm_head"}, "NAME=FORMAT"),
        ({"quant": "int4", "keep": "lm_head=int3"}, "int3"),
        ({"quant": "int4", "keep": "*=bf16"}, "nothing to quantize"),
        ({"quant": "int8", "group_size": 64}, "only int4 has groups"),
        ({"quant": "q8_0"}, "q8_0"),
        ({"quant": "int4", "group_size": 48}, "48"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Scheme(**flags).formats(CONFIG)


def test_a_scheme_knows_when_a_folder_is_quantized_otherwise() -> None:
    stored = Scheme(quant="int4").formats(CONFIG)
    assert contradiction(Scheme(quant="int4"), CONFIG, stored) is None
    assert "int8" in str(contradiction(Scheme(quant="int8"), CONFIG, stored))
    assert contradiction(Scheme(quant="int4", symmetric=True), CONFIG, stored)
    assert describe(stored) == "int4-g32-asym, int4-g64-asym, int4-g128-asym, int8"
