"""The proxy in front of layerwise instances, and what it says of the releases it sent."""

from typing import Any

from fakes.proxy_stack import ProxyStack


def split_stack(prefills: int = 1, decodes: int = 1, encoders: int = 0, **options: Any) -> ProxyStack:
    return ProxyStack(encoders, 0, prefills=prefills, decodes=decodes, **options)


async def metrics(stack: ProxyStack) -> list[str]:
    return (await stack.get("/metrics")).body.decode().splitlines()


async def released(stack: ProxyStack, outcome: str) -> None:
    """Wait until one release has come to ``outcome``, and nothing is left."""
    await stack.until_idle()
    assert stack.link.held == {}
    shown = [line for line in await metrics(stack) if line.startswith("epd_proxy_releases_total")]
    assert shown == [f'epd_proxy_releases_total{{outcome="{outcome}"}} 1.0']
