"""A plugin with a misspelt hook beside a right one."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_attention_backend() -> list[Provider]:
    return []


@hookimpl
def octavo_models() -> list[Provider]:
    return [Provider(name="MisspeltForCausalLM", factory="nowhere:Nothing", summary="never reached")]
