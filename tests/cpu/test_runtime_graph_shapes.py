"""Which graph serves a batch: the smallest that holds it, or none."""

import pytest
from octavo.attention.interface import GraphSupport
from octavo.batch import BatchShape
from octavo.runtime.graphs import GraphShapes, decode_sizes, mixed_shapes


def decodes(number: int) -> BatchShape:
    return BatchShape(number, number, 1, number)


@pytest.mark.parametrize("most", [1, 2, 3, 31, 32, 33, 256, 300])
def test_decode_sizes_end_with_the_largest_batch(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most


@pytest.mark.parametrize("number", range(1, 257))
def test_a_batch_of_decodes_gets_the_smallest_graph_that_holds_it(number: int) -> None:
    shapes = GraphShapes(GraphSupport.DECODE, 256, 8192)
    found = shapes.find(decodes(number))
    assert found is not None
    assert found == decodes(min(size for size in decode_sizes(256) if size >= number))
    assert found.num_requests - number < 16, "padding costs a decode of 16 requests at most"


def test_more_decodes_than_any_graph_holds_get_none() -> None:
    assert GraphShapes(GraphSupport.DECODE, 8, 64).find(decodes(9)) is None


@pytest.mark.parametrize("shape", [BatchShape(40, 3, 38, 2), BatchShape(65, 1, 65, 0), BatchShape(1024, 256, 700, 200)])
def test_a_mixed_batch_gets_a_graph_that_holds_it(shape: BatchShape) -> None:
    found = GraphShapes(GraphSupport.MIXED, 256, 8192).find(shape)
    assert found is not None
    assert found.num_tokens >= shape.num_tokens
    assert found.num_requests >= shape.num_requests
    assert found.max_query_len >= shape.max_query_len
    assert found.num_decodes < found.num_requests, "a graph of decodes alone has no kernel for prompts"
    assert found.num_tokens - shape.num_tokens < 64


def test_long_prompts_get_no_graph() -> None:
    assert GraphShapes(GraphSupport.MIXED, 256, 8192).find(BatchShape(1025, 2, 1024, 1)) is None


def test_mixed_batches_get_no_graph_of_a_backend_that_has_only_decodes_in_graphs() -> None:
    assert GraphShapes(GraphSupport.DECODE, 256, 8192).find(BatchShape(40, 3, 38, 2)) is None


def test_nothing_is_captured_without_support() -> None:
    assert GraphShapes(GraphSupport.NONE, 256, 8192).all() == []


def test_shapes_that_need_most_memory_come_first() -> None:
    shapes = GraphShapes(GraphSupport.MIXED, 256, 8192).all()
    sizes = [shape.num_tokens for shape in shapes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(shapes)) == len(shapes)


def test_a_step_of_few_tokens_limits_the_graphs() -> None:
    assert all(shape.num_tokens <= 96 for shape in GraphShapes(GraphSupport.MIXED, 256, 96).all())
    assert mixed_shapes(1, 8192) == [], "one request alone is a decode or a prompt"
