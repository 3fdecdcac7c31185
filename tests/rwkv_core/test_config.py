from typing import get_args

from kernels.choice import Form, Op
from rwkv_core.config import ModelConfig


def test_op_may_be_what_the_kernels_know():
    """Said twice, for settings are read without torch."""
    assert get_args(ModelConfig.model_fields["op"].annotation) == get_args(Op)
    assert set(get_args(Op)) == {*get_args(Form), "auto"}
