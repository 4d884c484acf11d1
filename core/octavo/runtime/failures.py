"""Whose fault a failed step is, read off the exception's traceback: layers pay nothing for being named."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import walk_tb

from octavo.batch import BatchShape
from octavo.errors import StepError


@contextmanager
def named_failures(providers: Mapping[type, str], layers: Sequence[object], shape: BatchShape) -> Iterator[None]:
    """Raises what fails inside as a StepError with provider, layer and batch shape.

    `providers` names each provider's class. The innermost of them on the traceback is the one that failed.
    """
    try:
        yield
    except Exception as error:
        raise StepError(_describe(error, providers, layers, shape)) from error


def _describe(error: Exception, providers: Mapping[type, str], layers: Sequence[object], shape: BatchShape) -> str:
    owners = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    who = next((providers[type(one)] for one in reversed(owners) if type(one) in providers), "The model")
    where = next((f" in layer {i}" for i, layer in enumerate(layers) for one in owners if one is layer), "")
    return f"{who} failed{where} on {_describe_shape(shape)}: {type(error).__name__}: {error}"


def _describe_shape(shape: BatchShape) -> str:
    return (
        f"a batch of {shape.num_tokens} tokens in {shape.num_requests} requests "
        f"({shape.num_decodes} decoding, longest query {shape.max_query_len}, padding included)"
    )
