"""The benchmark of the operators on a CPU, in tiny sizes."""

import pytest

from benchmarks import kernels


def test_tables():
    lines = kernels.measure([(1, 20, 2, 16)], [(20, 32, 99)], 1).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| wkv")] == ["| wkv7", "| wkv6", "| wkv4"]
    assert sum(line.startswith("| R20 C32 V99") for line in lines) == 1


@pytest.mark.parametrize(("version", "squares"), [(4, 13), (6, 13), (7, 12)])
def test_the_matrices_of_a_layer(version, squares):
    """As in the reference's count, in squares of C; low-rank pairs beside them."""
    c = 4096
    sizes = [rows * columns for rows, columns in kernels.layer(version, c)]
    assert sum(size for size in sizes if size >= c * c) == squares * c * c
    assert sum(sizes) < 1.2 * squares * c * c
