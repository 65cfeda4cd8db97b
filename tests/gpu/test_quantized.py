"""bitsandbytes on a card: what it multiplies is what the processor multiplies; and its 4 bits in RAM beside a card.

Not run on a card yet.
"""

from __future__ import annotations

import pytest

from tests.gpu import report
from tests.gpu.contact import Contact, ended_well
from tests.gpu.test_contact import printed

pytestmark = pytest.mark.gpu

PRODUCTS = """
import copy, torch
import bitsandbytes as bnb

torch.manual_seed(0)
plain = torch.nn.Linear(512, 256, bias=False, dtype=torch.float16)
inputs = torch.randn(4, 512, dtype=torch.float16)
exact = inputs.float() @ plain.weight.detach().float().T
for made in (bnb.nn.Linear4bit(512, 256, bias=False, quant_type="nf4", compute_dtype=torch.float16),
             bnb.nn.Linear8bitLt(512, 256, bias=False, has_fp16_weights=False)):
    made.load_state_dict(plain.state_dict())
    got = made.to("cuda")(inputs.cuda()).float().cpu()
    print(float((got - exact).norm() / exact.norm()))
"""


def test_products_are_those_of_the_weights_within_what_bits_cost(contact: Contact) -> None:
    """nf4 keeps a weight within about a tenth, int8 within a hundredth: far from what a wrong kernel or layout gives."""
    assert contact.machine.gpus
    four, eight = map(float, printed(PRODUCTS).split())
    assert 0.01 < four < 0.15
    assert eight < 0.03


def test_four_bits_in_ram_beside_a_card_are_as_slow_as_planned(contact: Contact) -> None:
    """bitsandbytes loads its CUDA library there, which lacks the product for processors."""
    result = ended_well(contact.case("int4", "cpu", "--new-tokens", "4"))
    assert result.metrics.get("vram_peak_bytes") in (None, 0)
    rows = [row for row in report.compared(result) if row.figure == "decode"]
    if not rows:
        pytest.skip(f"noisy: {result.noisy.get('decode_tok_s')}")
    assert rows[0].holds, f"measured {rows[0].measured}, planned {rows[0].planned}"
